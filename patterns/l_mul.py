"""Block means scored without multiplying: L-Mul, one addition of integers for each product.

Luo and Sun, "Addition is All You Need for Energy-efficient Language Models", 2024, arXiv:2410.00907.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.estimators.l_mul import check_bits
from sparseprefill.estimators.mean_pooled import MeanPooled
from sparseprefill.estimators.selection import Budget, TopK, check_tokens, ranked
from sparseprefill.patterns.block_sparse import forced_blocks
from sparseprefill.patterns.expected_density import in_blocks, kept_share
from sparseprefill.patterns.expected_overhead import Overhead, stated_overhead


@dataclass(frozen=True, slots=True)
class LMul:
    """What `block_sparse` with `keep` is, with additions of integers in the place of the products of block means.

    Means are rounded to float32, and cut to `bits` bits of mantissa. `keep` = 1.0 is dense. Arxiv:2410.00907. Raises
    ValueError or TypeError for numbers that are none.
    """

    rows_alone: ClassVar[bool] = True  # rows choose without each other; see `sparseprefill.patterns.wrapping`

    keep: Budget = 0.2  # tokens, or a share of the visible keys
    bits: int = 4  # of the mantissa of a mean, 1 to 23
    sink: int = 64  # first tokens kept always
    local: int = 128  # tokens before the end of a row kept always

    def __post_init__(self) -> None:
        TopK(self.keep)
        check_bits(self.bits)
        check_tokens("sink", self.sink, least=0)
        check_tokens("local", self.local, least=0)

    @property
    def family(self) -> tuple[Any, ...]:
        """Budgets of one arithmetic rank blocks alike."""
        return LMul, self.bits, self.sink, self.local

    def estimate(self, inputs: AttentionInputs, grid: BlockGrid) -> Tensor:
        """int64 [batch, query_heads, rows, key_blocks]: a ranking of blocks, which `choose` cuts."""
        visible, forced = grid.visible_block_mask(inputs), forced_blocks(inputs, grid, self.sink, self.local)
        parts = [
            ranked(
                MeanPooled(self.bits).scores(inputs, grid, start, stop), visible[:, start:stop], forced[:, start:stop]
            )
            for start, stop in grid.slabs(4 * inputs.query_heads)  # integers of 8 bytes are on the way
        ]
        return torch.cat(parts, 2)

    def choose(self, estimate: Tensor, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        """`build_index` from an estimate of its family."""
        visible, forced = grid.visible_block_mask(inputs), forced_blocks(inputs, grid, self.sink, self.local)
        return BlockIndex.from_slots(grid, *TopK(self.keep).cut(estimate, visible, forced, grid.block_k))

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        visible, forced = grid.visible_block_mask(inputs), forced_blocks(inputs, grid, self.sink, self.local)
        parts = []
        for start, stop in grid.slabs(4 * inputs.query_heads):
            scores = MeanPooled(self.bits).scores(inputs, grid, start, stop)
            own = visible[:, start:stop], forced[:, start:stop]
            parts.append(BlockIndex.from_slots(grid, *TopK(self.keep).select(scores, *own, grid.block_k)))
        return BlockIndex.stack(parts)

    def estimator_products(self, inputs: AttentionInputs, grid: BlockGrid) -> int:
        """See `sparseprefill.patterns.nested`; an addition counts as a product."""
        return MeanPooled().products(inputs, grid)

    def tile_law(self) -> str:
        """See `sparseprefill.patterns.expected_tiles`."""
        return "count"

    def expected_density(self, keys: int) -> float:
        return max(kept_share(self.keep, keys), kept_share(in_blocks(self.sink) + in_blocks(self.local), keys))

    def expected_overhead(self, device: torch.device, head_dim: int, block_q: int, block_k: int) -> Overhead:
        """As block means; each addition is simulated by a dozen operations on a tensor of its own, as measured."""
        return stated_overhead(
            device, head_dim, pairs=400 / (block_q * block_k), keys=16, tiles=1 / (block_q * block_k), steps=2.0
        )
