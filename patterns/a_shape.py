"""A-shape: the first tokens and a local window.

Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023, arXiv:2309.17453; as a prefill pattern in
Jiang et al., "MInference 1.0", 2024, arXiv:2407.02490.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.estimators.selection import Budget, check_budget, check_tokens, keep_blocks
from sparseprefill.patterns.expected_density import kept_share


@dataclass(frozen=True, slots=True)
class AShape:
    """Key j is kept for the query in slot p iff j < sink or p - j < window, counted from the row's first valid key.

    Blocks that hold any such pair are computed whole. `window` = all keys is dense. As a share, `window` is what a row
    keeps of the blocks it sees, the sink included. Defaults are MInference's.

    StreamingLLM, arXiv:2309.17453; as a prefill pattern MInference, arXiv:2407.02490. Raises ValueError or TypeError
    for budgets that are none.
    """

    sink: int = 128  # tokens
    window: Budget = 3968  # tokens, or a share of the visible keys

    def __post_init__(self) -> None:
        check_tokens("sink", self.sink, least=0)
        check_budget("window", self.window)

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        low, high = grid.visible_blocks(inputs)
        block = torch.arange(grid.key_blocks, device=inputs.device)
        sink = -(-self.sink // grid.block_k)
        first_local = torch.minimum(self._first_local(grid, sink), high - 1)
        keep = (block < sink) | (block >= first_local[..., None])
        keep &= (block >= low[..., None]) & (block < high[..., None])
        # the list of a row is short where it has a window: rows share nothing, but heads do
        return BlockIndex.from_mask(grid, keep[:, None]).for_heads(inputs.query_heads)

    def expected_density(self, keys: int) -> float:
        return kept_share(self.window if isinstance(self.window, float) else self.sink + self.window, keys)

    def _first_local(self, grid: BlockGrid, sink: int) -> Tensor:
        """int64 [batch, rows]: the first key block of the local window."""
        frontier = grid.frontier()
        if isinstance(self.window, float):
            return frontier - (keep_blocks(self.window, frontier, grid.block_k) - sink).clamp(min=1)
        row = grid.first[:, None] + torch.arange(grid.rows, device=frontier.device)
        return (row * grid.block_q - self.window + 1).clamp(min=0) // grid.block_k
