"""Tri-shape: an A-shape whose last rows are dense.

Li et al., "SCBench", 2024, arXiv:2412.10319; TriangleMix, 2025, arXiv:2507.21526.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.estimators.selection import Budget
from sparseprefill.patterns.a_shape import AShape
from sparseprefill.patterns.expected_overhead import Overhead, stated_overhead
from sparseprefill.patterns.last_rows import LastRowsDense


@dataclass(frozen=True, slots=True)
class TriShape:
    """`AShape(sink, window)` with the last `last` queries dense. Defaults are MInference's.

    SCBench, arXiv:2412.10319. Raises ValueError or TypeError for budgets that are none.
    """

    sink: int = 128  # tokens
    window: Budget = 3968  # tokens, or a share of the visible keys
    last: int = 100  # queries, at least 1

    def __post_init__(self) -> None:
        self._composed()

    def _composed(self) -> LastRowsDense:
        return LastRowsDense(AShape(self.sink, self.window), self.last)

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        return self._composed().build_index(inputs, grid)

    def tile_law(self) -> str:
        """See `sparseprefill.patterns.expected_tiles`."""
        return "positions"

    def expected_density(self, keys: int) -> float:
        return self._composed().expected_density(keys)

    def expected_overhead(self, device: torch.device, head_dim: int, block_q: int, block_k: int) -> Overhead:
        """It looks at nothing."""
        return stated_overhead(device, head_dim, steps=0.2)
