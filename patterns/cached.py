"""A cache of choices: rows whose queries are like those of an earlier row take what that one chose.

Wu et al., "TokenSelect", 2024, arXiv:2411.02886: queries of neighbours are alike, so that few of them need a choice of
their own.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.estimators.mean_pooled import query_block_means
from sparseprefill.estimators.selection import check_count
from sparseprefill.patterns.expected_density import expected_density
from sparseprefill.patterns.expected_overhead import Overhead, expected_overhead, stated_overhead
from sparseprefill.patterns.nested import products_of
from sparseprefill.patterns.wrapping import (
    check_asked_often,
    check_inner,
    index_of_rows,
    inner_for_layer,
    keeps_everything,
    rows_stand_alone,
)


@dataclass(frozen=True, slots=True)
class Cached:
    """A row takes the list of the last row that made one, if the cosine of their mean queries is at least `similar`.

    Means are of a row's valid queries, those of all heads side by side, so that all heads of a layer decide together.
    After `most` rows that took a list the next one makes its own. A row that takes one adds all blocks from the
    beginning of the row that made it on, as nobody has judged them. Rows that make one have `inner`'s:
    where rows stand alone, it is asked on a CPU for these, else, and on a GPU, where they would have to be read back,
    for all.

    TokenSelect, arXiv:2411.02886, for chunks of a prompt. Raises ValueError or TypeError for a cosine or rows that are
    none, and for what names no blocks of keys as they lie.
    """

    inner: Any  # anything with `build_index`
    similar: float = 0.9  # cosine
    most: int = 8  # rows of tiles

    def __post_init__(self) -> None:
        if isinstance(self.similar, bool) or not isinstance(self.similar, (int, float)):
            raise TypeError(f"similar must be a number, got {self.similar!r:.80}")
        if not -1.0 <= self.similar <= 2.0 or math.isnan(self.similar):
            raise ValueError(f"similar must be a cosine, or above 1 for no two rows, got {self.similar!r:.80}")
        check_count("most", self.most)
        check_inner("cached", self.inner)
        check_asked_often("cached", self.inner)

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        taken = self.taken_from(inputs, grid)
        row = torch.arange(grid.rows, device=inputs.device)
        made = taken == row  # [batch, rows]
        index = index_of_rows("cached", self.inner, inputs, grid, made)
        if inputs.device.type == "cpu" and bool(made.all()):
            return index
        visible = grid.visible_block_mask(inputs)
        block = torch.arange(grid.key_blocks, device=inputs.device)
        since = (grid.first[:, None] + taken) * grid.block_q // grid.block_k  # where the row begins that made the list
        near = block >= since[..., None]
        source = taken[:, None].expand(index.start.shape)
        lists = dataclasses.replace(
            index, start=index.start.gather(2, source), count=index.count.gather(2, source), visit=None, alike=1
        )
        parts = []
        for start, stop in grid.slabs(inputs.query_heads):
            own = lists.to_mask(start, stop) | (near & ~made[..., None])[:, None, start:stop]
            own = own & visible[:, None, start:stop]
            parts.append(BlockIndex.from_mask(grid, own | (visible[:, None, start:stop] & ~own.any(-1, keepdim=True))))
        return dataclasses.replace(BlockIndex.stack(parts), unjudged=index.unjudged)

    def taken_from(self, inputs: AttentionInputs, grid: BlockGrid) -> Tensor:
        """int64 [batch, rows]: the row whose list each row takes; itself where it makes one."""
        rows = grid.rows
        query = query_block_means(inputs, grid, 0, rows).transpose(1, 2).flatten(2)  # [batch, rows, heads * head_dim]
        unit = functional.normalize(query, dim=-1)
        like = unit @ unit.mT >= self.similar  # NaN is like nothing
        row = torch.arange(rows, device=inputs.device)
        other = torch.where(~like & (row > row[:, None]), row, rows).amin(-1)  # the next row that is not like this one
        other = torch.minimum(other, row + self.most + 1).clamp(max=rows)
        following = functional.pad(other, (0, 1), value=rows)  # [batch, rows + 1]
        made = torch.zeros(inputs.batch, rows + 1, dtype=torch.bool, device=inputs.device)
        made[:, 0] = True
        for _ in range(rows.bit_length()):  # who is reached from row 0: twice as many steps in each round
            made = made | torch.zeros_like(made).scatter_(1, torch.where(made, following, rows), True)
            following = following.gather(1, following)
        taken: Tensor = torch.where(made[:, :rows], row, 0).cummax(1).values
        return taken

    def keeps_everything(self) -> bool:
        """Whether `inner` is dense by its kind."""
        return keeps_everything(self.inner)

    def for_layer(self, layer: int) -> Cached:
        """What `inner` is in this layer."""
        return dataclasses.replace(self, inner=inner_for_layer(self.inner, layer))

    def estimator_products(self, inputs: AttentionInputs, grid: BlockGrid) -> float:
        """See `sparseprefill.patterns.nested`: `inner`'s, for the rows that make a list, and rows with each other."""
        taken = self.taken_from(inputs, grid)
        made = (taken == torch.arange(grid.rows, device=inputs.device)).any(0).double().mean()
        share = float(made) if inputs.device.type == "cpu" and rows_stand_alone(self.inner) else 1.0
        return share * products_of(self.inner, inputs, grid) + grid.rows**2

    def expected_density(self, keys: int) -> float:
        return expected_density(self.inner, keys)

    def expected_overhead(self, device: torch.device, head_dim: int, block_q: int, block_k: int) -> Overhead:
        """That of `inner` for all rows, as nobody knows how many are alike, and a mask of all tiles."""
        own = stated_overhead(device, head_dim, tiles=1 / (block_q * block_k), keys=1, steps=1.0)
        return own + expected_overhead(self.inner, device, head_dim, block_q, block_k)
