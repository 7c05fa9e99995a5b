"""Block-sparse: per row, the key blocks whose mean key fits the mean query best.

Jiang et al., "MInference 1.0", 2024, arXiv:2407.02490, section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.estimators.mean_pooled import MeanPooled
from sparseprefill.estimators.selection import Budget, TopK, check_budget, check_tokens, ranked
from sparseprefill.patterns.expected_density import in_blocks, kept_share


@dataclass(frozen=True, slots=True)
class BlockSparse:
    """Top `keep` of the visible blocks by mean-pooled score, after those of the sink and of the local window.

    The sink's and the window's blocks count in `keep`, and are kept even where `keep` is smaller. MInference forces
    neither: `sink=0, local=0` is its rule (there, 100 blocks of 64). `keep` = 1.0 is dense.

    MInference, arXiv:2407.02490, section 3.2. Raises ValueError or TypeError for budgets that are none.
    """

    keep: Budget = 6400  # tokens, or a share of the visible keys
    sink: int = 64  # first tokens kept always
    local: int = 128  # tokens before the end of a row kept always

    def __post_init__(self) -> None:
        check_budget("keep", self.keep)
        check_tokens("sink", self.sink, least=0)
        check_tokens("local", self.local, least=0)

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        visible = grid.visible_block_mask(inputs)
        forced = forced_blocks(inputs, grid, self.sink, self.local)
        estimator, rule = MeanPooled(), TopK(self.keep)
        parts = []
        for start, stop in grid.slabs(inputs.query_heads):
            scores = estimator.scores(inputs, grid, start, stop)
            kept = rule.select(scores, visible[:, start:stop], forced[:, start:stop], grid.block_k)
            parts.append(BlockIndex.from_slots(grid, *kept))
        return BlockIndex.stack(parts)

    @property
    def family(self) -> tuple[Any, ...]:
        """Budgets with the same sink and window rank blocks alike."""
        return BlockSparse, self.sink, self.local

    def estimate(self, inputs: AttentionInputs, grid: BlockGrid) -> Tensor:
        """The ranking of blocks, int64 [batch, query_heads, rows, key_blocks], which `choose` cuts at the budget."""
        scores = MeanPooled().scores(inputs, grid, 0, grid.rows)
        return ranked(scores, grid.visible_block_mask(inputs), forced_blocks(inputs, grid, self.sink, self.local))

    def choose(self, estimate: Tensor, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        """`build_index` from an estimate of its family."""
        visible = grid.visible_block_mask(inputs)
        forced = forced_blocks(inputs, grid, self.sink, self.local)
        return BlockIndex.from_slots(grid, *TopK(self.keep).cut(estimate, visible, forced, grid.block_k))

    def estimator_products(self, inputs: AttentionInputs, grid: BlockGrid) -> int:
        """See `sparseprefill.patterns.nested`."""
        return MeanPooled().products(inputs, grid)

    def expected_density(self, keys: int) -> float:
        forced = kept_share(in_blocks(self.sink) + in_blocks(self.local), keys)
        return max(kept_share(self.keep, keys), forced)


def forced_blocks(inputs: AttentionInputs, grid: BlockGrid, sink: int, local: int) -> Tensor:
    """bool [batch, rows, key_blocks]: blocks of the first `sink` keys and of the `local` keys before each row's end."""
    block = torch.arange(grid.key_blocks, device=inputs.device)
    low, high = grid.visible_blocks(inputs)
    near = block >= (grid.frontier() - -(-local // grid.block_k))[..., None]
    forced = (block < -(-sink // grid.block_k)) | near
    return forced & (block >= low[..., None]) & (block < high[..., None])
