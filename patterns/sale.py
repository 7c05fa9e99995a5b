"""SALE: blocks with a pair whose estimated weight, relative to the mass of sink and window, passes a threshold.

Ji et al., "SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM Prefilling", 2025,
arXiv:2505.24179. The estimate stands in `sparseprefill.estimators.relative_attention`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.estimators.relative_attention import PreparedKeys, RelativeAttention
from sparseprefill.estimators.selection import Budget, TopK, check_share, check_threshold, passed
from sparseprefill.kernels.products import ProductShape, choose_product
from sparseprefill.patterns.expected_density import UNKNOWN, in_blocks, kept_share
from sparseprefill.patterns.expected_overhead import Overhead, stated_overhead

PUBLISHED = 0.004
"""The threshold of the paper's own example, the same for all heads."""

OVERHEAD = {"native": (0.3, 16.0), "torch": (2.0, 0.0), "triton": (0.35, 0.0)}
"""Time of the whole estimate over that of dense attention is a + b / head_dim, by the implementation that multiplies.

The first two are from `overhead_cells` of `sparseprefill.evals.overhead`: natively what prompts of 4k take (0.58 to
0.74 with head_dim 32, 0.47 to 0.70 with 64, 0.35 to 0.46 with 128; long ones take less), in torch more than those of
16k. On a GPU it is an assumption: a quarter of the work of dense attention in 16 bits, and what comes on top.
"""


@dataclass(frozen=True, slots=True)
class Sale:
    """Sink block, local window, and every block that holds a pair whose estimated weight is above `threshold`.

    A weight is relative to the exact mass of sink and window (see `RelativeAttention`, which explains the other
    options). A tile of the grid is kept if any step of `query_block` x `key_block` in it would be. With `keep` instead
    of a threshold, each row keeps that budget of the tiles with the highest scores, sink and window first.
    `keep` = 1.0 is dense; a threshold near 0 nearly so.

    A row with a query that cannot be judged (keys or queries that are not finite, or no mass in sink and window) keeps
    all its tiles, and the index counts it (`BlockIndex.unjudged`). Means and scales are those of the call, and the mean
    of the keys knows later tokens: it looks ahead.

    SALE, arXiv:2505.24179. Raises ValueError or TypeError for a threshold outside of (0, 1), and for what
    `RelativeAttention` refuses.
    """

    threshold: float | None = None  # weight relative to sink and window, in (0, 1)
    keep: Budget | None = None  # instead: tokens, or a share of the visible keys
    bits: int = 4  # 2, 4 or 8; 16 rounds nothing
    group: str = "token"  # what shares a scale: "token" or "tile"
    window: int = 128  # tokens
    segment: int = 128  # tokens
    query_block: int = 64  # queries
    key_block: int = 32  # keys
    product: str = "auto"  # "triton", "native" or "torch"
    expected: float | None = None  # density that a threshold comes to, for the cost model; it chooses no block

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.keep is None):
            raise ValueError(
                f"sale takes either a threshold or a budget to keep, got threshold={self.threshold!r:.80}, "
                f"keep={self.keep!r:.80}"
            )
        if self.threshold is not None:
            check_threshold(self.threshold)
        else:
            assert self.keep is not None
            TopK(self.keep)
        if self.expected is not None:
            if self.threshold is None:
                raise ValueError("expected says what a threshold comes to: a budget to keep says it by itself")
            check_share("expected", self.expected)
        _ = self.estimator  # refuses the other options

    @property
    def estimator(self) -> RelativeAttention:
        """What scores the tiles."""
        return RelativeAttention(*self.family[1:])

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        return self.build_together([self] * inputs.query_heads, inputs, grid)

    @staticmethod
    def build_together(patterns: Sequence[Sale], inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        """One pattern a head, all of one family: keys are prepared once. See `sparseprefill.patterns.per_head`."""
        first = patterns[0]
        prepared = first.estimator.prepare(inputs, grid)
        return _index(patterns, prepared, prepared.scores, inputs, grid)

    @property
    def together(self) -> tuple[Any, ...]:
        """Heads whose patterns agree in this are served by one `build_together`."""
        return (*self.family, self.keep)

    @property
    def family(self) -> tuple[Any, ...]:
        """Thresholds and budgets share the scores that these options give."""
        return (
            Sale, self.bits, self.group, self.window, self.segment, self.query_block, self.key_block, self.product,
        )  # fmt: skip

    def estimate(self, inputs: AttentionInputs, grid: BlockGrid) -> tuple[Tensor, PreparedKeys]:
        """Scores of all tiles, [batch, query_heads, rows, key_blocks], which `choose` cuts; see `patterns.nested`."""
        prepared = self.estimator.prepare(inputs, grid)
        slabs = [prepared.scores(*slab) for slab in prepared.slabs()]
        return torch.cat(slabs, 2), prepared

    def choose(self, estimate: tuple[Tensor, PreparedKeys], inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        """`build_index` from an estimate of its family."""
        scores, prepared = estimate
        patterns = [self] * inputs.query_heads
        return _index(patterns, prepared, lambda start, stop: scores[:, :, start:stop], inputs, grid)

    def expecting(self, density: float) -> Sale:
        """The same, but the cost model reckons with this density where a threshold decides; see `ModelPatterns`."""
        if self.threshold is None or self.expected is not None or not density > 0:
            return self
        return dataclasses.replace(self, expected=density)

    def tile_law(self) -> str:
        """See `sparseprefill.patterns.expected_tiles`."""
        return "count" if self.keep is not None else "content"

    def expected_density(self, keys: int) -> float:
        # whole segments are tested, and what is left of the last one is window
        forced = kept_share(64 + in_blocks(self.window + self.segment), keys)
        return max((self.expected or UNKNOWN) if self.keep is None else kept_share(self.keep, keys), forced)

    def expected_overhead(self, device: torch.device, head_dim: int, block_q: int, block_k: int) -> Overhead:
        """All pairs, as stated in `OVERHEAD`; of a GPU that is not here, for a plan, by what is meant for GPUs."""
        if device.type == "cuda" and not torch.cuda.is_available():
            product = "triton" if self.product == "auto" else self.product
        else:
            shape = ProductShape(device, torch.float32, self.bits, head_dim, block_q, block_k)
            product = choose_product(shape, self.product)
        share, channels = OVERHEAD[product]
        return stated_overhead(device, head_dim, share=share + channels / head_dim, keys=16, steps=3.0)

    def estimator_products(self, inputs: AttentionInputs, grid: BlockGrid) -> int:
        """See `sparseprefill.patterns.nested`."""
        return self.estimator.products_of_pairs(inputs, grid)


def _index(
    patterns: Sequence[Sale],
    prepared: PreparedKeys,
    scores: Callable[[int, int], Tensor],
    inputs: AttentionInputs,
    grid: BlockGrid,
) -> BlockIndex:
    """Lists of all rows, a slab at a time.

    On a GPU at 128k tokens, 32 query heads over 8 KV heads of head_dim 128, blocks of 64 x 64, 4 bits: the lists take
    260 MiB (`BlockIndex.from_slabs`); keys as codes with scales 68; bias, shift and mass of sink and window 48; masks
    and bounds of rows 16; a slab of 32 rows its queries 20, or then scores, masks and places 36, twice that where a
    budget ranks them. Together 428 MiB, or 464. On the CPU lists are as long as they are full: less.
    """
    forced, visible = patterns[0].estimator.forced(inputs, grid), grid.visible_block_mask(inputs)

    def chosen(start: int, stop: int) -> Tensor:
        return _chosen(patterns, scores(start, stop), forced[:, start:stop], visible[:, start:stop], grid)

    slabs = list(prepared.slabs())
    write = _joined if inputs.device.type == "cpu" else BlockIndex.from_slabs
    return dataclasses.replace(write(grid, inputs.query_heads, slabs, chosen), unjudged=prepared.unjudged())


def _joined(
    grid: BlockGrid, query_heads: int, slabs: Sequence[tuple[int, int]], chosen: Callable[[int, int], Tensor]
) -> BlockIndex:
    """As `BlockIndex.from_slabs`, in storage that holds what was chosen and no more: its size is read."""
    return BlockIndex.stack([BlockIndex.from_mask(grid, chosen(*slab)) for slab in slabs])


def _chosen(patterns: Sequence[Sale], scores: Tensor, forced: Tensor, visible: Tensor, grid: BlockGrid) -> Tensor:
    """bool like scores: what a slab of rows keeps, one pattern a head; all have thresholds, or all the same budget."""
    keep = patterns[0].keep
    if keep is not None:
        best = BlockIndex.from_slots(grid, *TopK(keep).select(scores, visible, forced, grid.block_k))
        mask = best.to_mask() | scores.isposinf()
    else:
        mask = passed([each.threshold for each in patterns if each.threshold is not None], scores)
    return mask.logical_and_(visible[:, None]).logical_or_(forced[:, None])
