"""Random blocks: the control. A method that is no better than this at the same density has found nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.estimators.selection import Budget, TopK, check_budget, check_tokens
from sparseprefill.patterns.block_sparse import forced_blocks
from sparseprefill.patterns.expected_density import in_blocks, kept_share
from sparseprefill.patterns.expected_overhead import Overhead, stated_overhead

_PRIME = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class RandomBlocks:
    """`keep` of the visible blocks, drawn by (seed, head, row, block) alone, after those of the sink and the window.

    A row draws the same blocks whatever the batch, the padding or the chunk it stands in. `keep` = 1.0 is dense.
    The control for all other methods: it has no source. Raises ValueError or TypeError for budgets that are none.
    """

    keep: Budget = 0.2  # tokens, or a share of the visible keys
    sink: int = 64  # first tokens kept always
    local: int = 128  # tokens before the end of a row kept always
    seed: int = 0  # of the draw; each layer makes another of it

    def __post_init__(self) -> None:
        check_budget("keep", self.keep)
        check_tokens("sink", self.sink, least=0)
        check_tokens("local", self.local, least=0)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an int, got {self.seed!r:.80}")

    def for_layer(self, layer: int) -> RandomBlocks:
        """Each layer draws its own blocks."""
        return replace(self, seed=self.seed * 1009 + layer)

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        head = torch.arange(inputs.query_heads, device=inputs.device)
        block = torch.arange(grid.key_blocks, device=inputs.device)
        visible = grid.visible_block_mask(inputs)
        forced = forced_blocks(inputs, grid, self.sink, self.local)
        parts = []
        for start, stop in grid.slabs(inputs.query_heads):
            row = grid.first[:, None] + torch.arange(start, stop, device=inputs.device)
            draw = _hash(self.seed % _PRIME, head[None, :, None, None], row[:, None, :, None], block)
            kept = TopK(self.keep).select(draw, visible[:, start:stop], forced[:, start:stop], grid.block_k)
            parts.append(BlockIndex.from_slots(grid, *kept))
        return BlockIndex.stack(parts)

    def tile_law(self) -> str:
        """See `sparseprefill.patterns.expected_tiles`."""
        return "positions"

    def expected_density(self, keys: int) -> float:
        forced = kept_share(in_blocks(self.sink) + in_blocks(self.local), keys)
        return max(kept_share(self.keep, keys), forced)

    def expected_overhead(self, device: torch.device, head_dim: int, block_q: int, block_k: int) -> Overhead:
        """Every tile draws a number, and is ranked by it."""
        return stated_overhead(device, head_dim, tiles=0.5 / (block_q * block_k), steps=0.25)


def _hash(seed: int, *parts: Tensor) -> Tensor:
    """float64 in [0, 1) of broadcast integers, the same on every device: x -> 48271 (x + part) mod 2^31 - 1, mixed."""
    state: Tensor = torch.full((), seed, dtype=torch.int64, device=parts[0].device)
    for part in parts:
        for _ in range(3):
            state = (state + part + 12345) * 48271 % _PRIME
            state = state ^ (state >> 13)
    return state.double() / (1 << 31)
