"""Two methods at once: a row attends to what either of them names."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.patterns.expected_density import expected_density
from sparseprefill.patterns.expected_overhead import Overhead, expected_overhead, stated_overhead
from sparseprefill.patterns.expected_tiles import tile_law
from sparseprefill.patterns.nested import products_of
from sparseprefill.patterns.wrapping import check_inner, inner_for_layer, keeps_everything, rows_stand_alone


@dataclass(frozen=True, slots=True)
class Union:
    """The blocks of `inner`, and those of `other`. As unjudged count the queries of the one that has more of them.

    In which order blocks are visited, and what a kernel may skip, is lost: a tile that one of them would compute is
    computed. No paper's: what a static pattern keeps beside a selector is so in many of them. Raises TypeError for what
    names no blocks of keys as they lie.
    """

    inner: Any  # anything with `build_index`
    other: Any  # likewise

    def __post_init__(self) -> None:
        check_inner("union", self.inner)
        check_inner("union", self.other)

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        indexes = [each.build_index(inputs, grid) for each in (self.inner, self.other)]
        parts = [
            BlockIndex.from_mask(grid, indexes[0].to_mask(start, stop) | indexes[1].to_mask(start, stop))
            for start, stop in grid.slabs(inputs.query_heads)
        ]
        counted = [each.unjudged for each in indexes if each.unjudged is not None]
        unjudged = torch.stack(counted).amax(0) if counted else None
        return dataclasses.replace(BlockIndex.stack(parts), unjudged=unjudged)

    @property
    def rows_alone(self) -> bool:
        """Whether rows of both stand alone."""
        return rows_stand_alone(self.inner) and rows_stand_alone(self.other)

    def keeps_everything(self) -> bool:
        """Whether one of them is dense by its kind."""
        return keeps_everything(self.inner) or keeps_everything(self.other)

    def for_layer(self, layer: int) -> Union:
        """What they are in this layer."""
        return Union(inner_for_layer(self.inner, layer), inner_for_layer(self.other, layer))

    def estimator_products(self, inputs: AttentionInputs, grid: BlockGrid) -> float:
        """See `sparseprefill.patterns.nested`."""
        return products_of(self.inner, inputs, grid) + products_of(self.other, inputs, grid)

    def tile_law(self) -> str:
        """See `sparseprefill.patterns.expected_tiles`."""
        return "positions" if {tile_law(self.inner), tile_law(self.other)} == {"positions"} else "content"

    def expected_density(self, keys: int) -> float:
        return min(1.0, expected_density(self.inner, keys) + expected_density(self.other, keys))

    def expected_overhead(self, device: torch.device, head_dim: int, block_q: int, block_k: int) -> Overhead:
        """That of both, and a mask of all tiles."""
        own = stated_overhead(device, head_dim, tiles=0.5 / (block_q * block_k), steps=0.2)
        for each in (self.inner, self.other):
            own = own + expected_overhead(each, device, head_dim, block_q, block_k)
        return own
