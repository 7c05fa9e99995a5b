"""XAttention: the blocks that hold most of the attention mass, as estimated along antidiagonals.

Xu et al., "XAttention: Block Sparse Attention with Antidiagonal Scoring", 2025, arXiv:2503.16428. The estimate stands
in `sparseprefill.estimators.antidiagonal`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.estimators.antidiagonal import Antidiagonal, PreparedGroups
from sparseprefill.estimators.covered_mass import CoveredMass, check_mass
from sparseprefill.estimators.selection import Budget, TopK, check_budget
from sparseprefill.patterns.expected_density import UNKNOWN, kept_share
from sparseprefill.patterns.expected_overhead import Overhead, stated_overhead
from sparseprefill.patterns.own_blocks import with_own_blocks

PUBLISHED = 0.9
"""A threshold for all heads that the authors use; their own for Llama-3.1-8B differ by head."""

OVERHEAD = {"cpu": 2.4, "cuda": 1.5}
"""Time of a multiply-add of the estimate over that of one of dense attention, by kind of device: on a CPU what prompts
of 4k take, long ones take less (docs/performance.md); on a GPU an assumption.
"""


@dataclass(frozen=True, slots=True)
class XAttention:
    """The first block, the row's own, and those of most estimated mass until `threshold` of it is reached.

    The mass of a tile is estimated from one product in `stride` (see `Antidiagonal`). With `keep` instead of a
    threshold, each row keeps that budget of the tiles with most mass, the first block and its own ahead of the others.
    With neither, the threshold is 0.9. A threshold of 0 keeps the first block and the row's own, 1.0 is dense, and so
    is `keep` = 1.0.

    A row that cannot be judged (no finite score for something it sees, or no key that any of its queries sees) keeps
    all its tiles, and the index counts its queries (`BlockIndex.unjudged`). It does not look ahead.

    XAttention, arXiv:2503.16428. Raises ValueError or TypeError for a threshold outside of [0, 1], for a threshold and
    a budget at once, and for what `Antidiagonal` refuses; `build_index` raises ValueError for tiles that are no
    multiples of `stride`, and where there are not as many thresholds as heads.
    """

    rows_alone: ClassVar[bool] = True  # rows choose without each other; see `sparseprefill.patterns.wrapping`

    threshold: float | tuple[float, ...] | None = None  # share of the mass, in [0, 1]; or one for each query head
    keep: Budget | None = None  # instead: tokens, or a share of the visible keys
    stride: int = 8  # tokens of which one pair in `stride` is looked at: 4, 8 or 16
    product: str = "auto"  # what multiplies: "torch" or "triton"

    def __post_init__(self) -> None:
        if self.threshold is not None and self.keep is not None:
            raise ValueError(
                f"xattention takes either a threshold or a budget to keep, got threshold={self.threshold!r:.80}, "
                f"keep={self.keep!r:.80}"
            )
        if isinstance(self.threshold, (tuple, list)):
            if not self.threshold:
                raise ValueError("threshold has no numbers: give one, or one for each query head")
            object.__setattr__(self, "threshold", tuple(self.threshold))  # a list, from JSON, is not hashable
            CoveredMass(tuple(self.threshold))
        elif self.threshold is not None:
            check_mass("threshold", self.threshold)
        elif self.keep is not None:
            check_budget("keep", self.keep)
        else:
            object.__setattr__(self, "threshold", PUBLISHED)
        _ = self.estimator  # refuses the other options

    @property
    def estimator(self) -> Antidiagonal:
        """What scores the tiles."""
        return Antidiagonal(self.stride, self.product)

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        prepared = self.estimator.prepare(inputs, grid)
        return _index(self._rule(inputs.query_heads), prepared, prepared.scores)

    @property
    def together(self) -> tuple[Any, ...]:
        """Heads whose patterns agree in this are served by one `build_together`."""
        return (*self.family, self.keep)

    @staticmethod
    def build_together(patterns: Sequence[XAttention], inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        """One pattern a head, all of one `together`; see `sparseprefill.patterns.per_head`."""
        first = patterns[0]
        prepared = first.estimator.prepare(inputs, grid)
        return _index(first._rule(1) if first.keep is not None else _joint_rule(patterns), prepared, prepared.scores)

    @property
    def family(self) -> tuple[Any, ...]:
        """Thresholds and budgets share the scores that these options give."""
        return XAttention, self.stride, self.product

    def estimate(self, inputs: AttentionInputs, grid: BlockGrid) -> tuple[Tensor, PreparedGroups]:
        """Mass of all tiles, [batch, query_heads, rows, key_blocks], which `choose` cuts; see `patterns.nested`."""
        prepared = self.estimator.prepare(inputs, grid)
        return torch.cat([prepared.scores(*slab) for slab in prepared.slabs()], 2), prepared

    def choose(self, estimate: tuple[Tensor, PreparedGroups], inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        """`build_index` from an estimate of its family."""
        mass, prepared = estimate
        return _index(self._rule(inputs.query_heads), prepared, lambda start, stop: mass[:, :, start:stop])

    def tile_law(self) -> str:
        """See `sparseprefill.patterns.expected_tiles`."""
        return "count" if self.keep is not None else "content"

    def expected_density(self, keys: int) -> float:
        forced = kept_share(128, keys)  # the first block and the row's own, of 64
        if self.keep is None:
            thresholds = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
            each = [1.0 if own == 1 else forced if own == 0 else max(UNKNOWN, forced) for own in thresholds]
            return math.fsum(each) / len(each)
        return max(kept_share(self.keep, keys), forced)

    def expected_overhead(self, device: torch.device, head_dim: int, block_q: int, block_k: int) -> Overhead:
        """What is stated in `OVERHEAD`, and every tile ranked.

        Dense attention multiplies each pair twice, with keys and with values, the estimate one pair in `stride` once.
        """
        share = OVERHEAD["cpu" if device.type == "cpu" else "cuda"] / (2 * self.stride)
        return stated_overhead(device, head_dim, share=share, keys=16, tiles=1 / (block_q * block_k), steps=0.64)

    def estimator_products(self, inputs: AttentionInputs, grid: BlockGrid) -> int:
        """See `sparseprefill.patterns.nested`."""
        return self.estimator.products(inputs)

    def _rule(self, query_heads: int) -> CoveredMass | TopK:
        if self.keep is not None:
            return TopK(self.keep)
        assert self.threshold is not None
        if not isinstance(self.threshold, tuple):
            return CoveredMass((self.threshold,) * query_heads)
        if len(self.threshold) != query_heads:
            raise ValueError(
                f"threshold has {len(self.threshold)} numbers for {query_heads} query heads: give one number for all, "
                "or one for each head"
            )
        return CoveredMass(self.threshold)


def _joint_rule(patterns: Sequence[XAttention]) -> CoveredMass:
    """The thresholds of patterns that serve one head each."""
    rules = [each._rule(1) for each in patterns]
    return CoveredMass(tuple(own for rule in rules if isinstance(rule, CoveredMass) for own in rule.thresholds))


def _index(rule: CoveredMass | TopK, prepared: PreparedGroups, scores: Callable[[int, int], Tensor]) -> BlockIndex:
    """Lists of all rows, a slab at a time."""
    inputs, grid = prepared.inputs, prepared.grid
    visible = grid.visible_block_mask(inputs)
    first = torch.arange(grid.key_blocks, device=inputs.device) == 0
    forced = with_own_blocks(first.expand(visible.shape), inputs, grid)
    unknown: list[Tensor] = []

    def chosen(start: int, stop: int) -> Tensor:
        mass, seen, own = scores(start, stop), visible[:, start:stop], forced[:, start:stop]
        unknown.append(mass[..., 0].isnan())
        if isinstance(rule, TopK):
            kept = BlockIndex.from_slots(grid, *rule.select(mass, seen, own, grid.block_k)).to_mask()
        else:
            kept = rule.select(mass, seen, own)
        return torch.where(unknown[-1][..., None], seen[:, None], kept)

    slabs = list(prepared.slabs())
    if inputs.device.type == "cpu":  # lists as long as they are full
        index = BlockIndex.stack([BlockIndex.from_mask(grid, chosen(*slab)) for slab in slabs])
    else:
        index = BlockIndex.from_slabs(grid, inputs.query_heads, slabs, chosen)
    return dataclasses.replace(index, unjudged=prepared.queries_in_rows(torch.cat(unknown, 2)))
