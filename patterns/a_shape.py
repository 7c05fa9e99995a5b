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
from sparseprefill.patterns.expected_overhead import Overhead, stated_overhead


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
        sink = -(-self.sink // grid.block_k)
        local = torch.maximum(low, torch.minimum(self._first_local(grid, sink), high - 1))
        before = (high.clamp(max=sink) - low).clamp(min=0)  # sink blocks of a row, and those of them outside the window
        before = torch.minimum(before, local - low)
        count = before + high - local
        slot = torch.arange(self._width(grid, sink), device=inputs.device)
        ids = torch.where(slot < before[..., None], low[..., None] + slot, (local - before)[..., None] + slot)
        # the list of a row is short where it has a window: rows share nothing, but heads do
        index = BlockIndex.from_slots(grid, ids.clamp(max=grid.key_blocks - 1)[:, None], count[:, None])
        return index.for_heads(inputs.query_heads)

    def tile_law(self) -> str:
        """See `sparseprefill.patterns.expected_tiles`."""
        return "positions"

    def expected_density(self, keys: int) -> float:
        return kept_share(self.window if isinstance(self.window, float) else self.sink + self.window, keys)

    def expected_overhead(self, device: torch.device, head_dim: int, block_q: int, block_k: int) -> Overhead:
        """It looks at nothing."""
        return stated_overhead(device, head_dim, steps=0.1)

    def _width(self, grid: BlockGrid, sink: int) -> int:
        """As many blocks as a row keeps at most, known on the host."""
        if isinstance(self.window, float):
            return grid.key_blocks
        # the window of the row's first query, and the row itself
        window = (self.window + grid.block_q + grid.block_k - 2) // grid.block_k + 1
        return min(grid.key_blocks, sink + window)

    def _first_local(self, grid: BlockGrid, sink: int) -> Tensor:
        """int64 [batch, rows]: the first key block of the local window."""
        frontier = grid.frontier()
        if isinstance(self.window, float):
            return frontier - (keep_blocks(self.window, frontier, grid.block_k) - sink).clamp(min=1)
        row = grid.first[:, None] + torch.arange(grid.rows, device=frontier.device)
        return (row * grid.block_q - self.window + 1).clamp(min=0) // grid.block_k
