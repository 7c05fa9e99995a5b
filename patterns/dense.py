"""Every block: exact attention."""

from __future__ import annotations

from dataclasses import dataclass

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex


@dataclass(frozen=True, slots=True)
class Dense:
    """Keeps everything a query may see: exact attention, by the same kernel."""

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        return BlockIndex.dense(inputs, grid)

    def tile_law(self) -> str:
        """See `sparseprefill.patterns.expected_tiles`."""
        return "positions"

    def expected_density(self, keys: int) -> float:
        return 1.0
