"""Block-sparse: per row, the key blocks whose mean key fits the mean query best.

Jiang et al., "MInference 1.0", 2024, arXiv:2407.02490, section 3.2.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.estimators.covered_mass import CoveredMass
from sparseprefill.estimators.mean_pooled import MeanPooled, count_real
from sparseprefill.estimators.selection import Budget, TopK, check_share, check_tokens, ranked
from sparseprefill.patterns.expected_density import UNKNOWN, in_blocks, kept_share
from sparseprefill.patterns.expected_overhead import Overhead, stated_overhead

PUBLISHED = 6400
"""MInference's own budget in tokens: 100 blocks of 64."""


@dataclass(frozen=True, slots=True)
class BlockSparse:
    """Top `keep` of the visible blocks by mean-pooled score, after those of the sink and of the local window.

    The sink's and the window's blocks count in `keep`, and are kept even where `keep` is smaller. MInference forces
    neither: `sink=0, local=0` is its rule (there, 100 blocks of 64). With `mass` instead, each row keeps the fewest
    blocks that hold this share of a softmax over its blocks, as PBS-Attn does. 1.0 is dense, of either. A row whose
    scores are not finite has no softmax: it keeps all its blocks, and is counted in `BlockIndex.unjudged`.

    MInference, arXiv:2407.02490, section 3.2. Raises ValueError or TypeError for budgets that are none, and for both.
    """

    rows_alone: ClassVar[bool] = True  # rows choose without each other; see `sparseprefill.patterns.wrapping`

    keep: Budget | None = None  # tokens, or a share of the visible keys; None without `mass`: 6400
    sink: int = 64  # first tokens kept always
    local: int = 128  # tokens before the end of a row kept always
    mass: float | None = None  # instead of `keep`: share of a softmax over the blocks of a row, in (0, 1]

    def __post_init__(self) -> None:
        if self.mass is not None:
            if self.keep is not None:
                raise ValueError(
                    f"block-sparse takes keep or mass, got keep={self.keep!r:.80} and mass={self.mass!r:.80}"
                )
            check_share("mass", self.mass)
        TopK(self.budget)
        check_tokens("sink", self.sink, least=0)
        check_tokens("local", self.local, least=0)

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        visible = grid.visible_block_mask(inputs)
        forced = forced_blocks(inputs, grid, self.sink, self.local)
        parts = []
        for start, stop in grid.slabs(inputs.query_heads):
            scores = MeanPooled().scores(inputs, grid, start, stop)
            own = visible[:, start:stop], forced[:, start:stop]
            if self.mass is None:
                parts.append(BlockIndex.from_slots(grid, *TopK(self.budget).select(scores, *own, grid.block_k)))
            else:
                parts.append(self._by_mass(scores, *own, inputs, grid, start))
        return BlockIndex.stack(parts)

    @property
    def budget(self) -> Budget:
        """What a row keeps, where no mass decides it."""
        return PUBLISHED if self.keep is None else self.keep

    @property
    def family(self) -> tuple[Any, ...]:
        """Budgets with the same sink and window rank blocks alike."""
        return BlockSparse, self.sink, self.local, self.mass is None

    def estimate(self, inputs: AttentionInputs, grid: BlockGrid) -> Tensor:
        """What `choose` cuts, [batch, query_heads, rows, key_blocks]: a ranking of blocks; for a mass, their scores."""
        scores = MeanPooled().scores(inputs, grid, 0, grid.rows)
        if self.mass is not None:
            return scores
        return ranked(scores, grid.visible_block_mask(inputs), forced_blocks(inputs, grid, self.sink, self.local))

    def choose(self, estimate: Tensor, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        """`build_index` from an estimate of its family."""
        visible = grid.visible_block_mask(inputs)
        forced = forced_blocks(inputs, grid, self.sink, self.local)
        if self.mass is not None:
            return self._by_mass(estimate, visible, forced, inputs, grid, 0)
        return BlockIndex.from_slots(grid, *TopK(self.budget).cut(estimate, visible, forced, grid.block_k))

    def _by_mass(
        self, scores: Tensor, visible: Tensor, forced: Tensor, inputs: AttentionInputs, grid: BlockGrid, start: int
    ) -> BlockIndex:
        """A slab of rows from row `start` on."""
        assert self.mass is not None
        if inputs.softcap is not None:  # no ranking minds it, a share does
            scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
        real = visible & _real_tiles(inputs, grid, start, start + scores.shape[2])
        weights = scores.masked_fill(~real[:, None], -torch.inf).softmax(-1)
        lost = weights.isnan().any(-1)
        kept = CoveredMass((self.mass,)).select(weights, visible, forced & visible)
        index = BlockIndex.from_mask(grid, torch.where(lost[..., None], visible[:, None], kept))
        asked = grid.real_queries(inputs)[:, None, start : start + scores.shape[2]]
        some = real.any(-1)[:, None]  # where a row sees no key there is nothing to choose
        return dataclasses.replace(index, unjudged=(asked * (lost & some)).sum(-1))

    def estimator_products(self, inputs: AttentionInputs, grid: BlockGrid) -> int:
        """See `sparseprefill.patterns.nested`."""
        return MeanPooled().products(inputs, grid)

    def tile_law(self) -> str:
        """See `sparseprefill.patterns.expected_tiles`."""
        return "count" if self.mass is None else "content"

    def expected_density(self, keys: int) -> float:
        forced = kept_share(in_blocks(self.sink) + in_blocks(self.local), keys)
        return max(UNKNOWN if self.mass is not None else kept_share(self.budget, keys), forced)

    def expected_overhead(self, device: torch.device, head_dim: int, block_q: int, block_k: int) -> Overhead:
        """Means of all tokens, and every tile ranked."""
        return stated_overhead(device, head_dim, keys=16, tiles=1 / (block_q * block_k), steps=0.36)


def forced_blocks(inputs: AttentionInputs, grid: BlockGrid, sink: int, local: int) -> Tensor:
    """bool [batch, rows, key_blocks]: blocks of the first `sink` keys and of the `local` keys before each row's end."""
    block = torch.arange(grid.key_blocks, device=inputs.device)
    low, high = grid.visible_blocks(inputs)
    near = block >= (grid.frontier() - -(-local // grid.block_k))[..., None]
    forced = (block < -(-sink // grid.block_k)) | near
    return forced & (block >= low[..., None]) & (block < high[..., None])


def _real_tiles(inputs: AttentionInputs, grid: BlockGrid, start: int, stop: int) -> Tensor:
    """bool [batch, stop - start, key_blocks]: a real key stands in the block, up to the row's end."""
    edge = grid.anchor[:, None] + torch.arange(grid.key_blocks + 1, device=inputs.device) * grid.block_k
    end = grid.row_slots()[1][:, start:stop, None].clamp(max=inputs.last_key)
    begin, end = edge[:, None, :-1].minimum(end), edge[:, None, 1:].minimum(end)
    return count_real(inputs, begin.flatten(1), end.flatten(1)).view_as(begin) > 0
