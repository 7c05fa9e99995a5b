"""SpargeAttn: the best block means where a mean speaks for its block, and every block where it does not.

Zhang et al., "SpargeAttn: Accurate Sparse Attention Accelerating Any Model Inference", 2025, arXiv:2502.18137: its
map of blocks. What it looks at stands in `sparseprefill.estimators.self_similarity`.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.estimators.mean_pooled import count_real
from sparseprefill.estimators.selection import Budget, check_budget, check_tokens, keep_blocks
from sparseprefill.estimators.self_similarity import SelfSimilarity
from sparseprefill.patterns.expected_density import kept_share
from sparseprefill.patterns.expected_overhead import Overhead, stated_overhead

PUBLISHED_TOPK = 0.5
"""What is kept where neither cdf nor topk is given, as in the published call that needs no tuning."""

_RANKED_ENTRIES = 1 << 23  # tiles that are ranked at one time, at about 50 bytes

PerHeadNumber = float | tuple[float, ...]


@dataclass(frozen=True, slots=True, eq=False)
class RankedBlocks:
    """What rows choose from; `SpargeAttn.choose` cuts it."""

    rank: Tensor  # int32 [batch, query_heads, rows, key_blocks], place among the row's blocks, best first
    reach: Tensor  # float64 [batch, query_heads, rows, key_blocks], mass of a block and of all that rank before it
    candidate: Tensor  # bool [batch, query_heads, rows, key_blocks], blocks that the ranking decides on
    unknown: Tensor  # bool [batch, query_heads, rows], rows that cannot be judged
    whole: Tensor  # bool [batch, query_heads, rows], rows kept whole: those, and queries unlike one another


@dataclass(frozen=True, slots=True)
class SpargeAttn:
    """Of the blocks whose tokens are alike, those with the most mass by block means, and all other blocks.

    A block is judged by its mean where its self-similarity (mean cosine of all pairs of its tokens) is above
    `similarity`. Of the judged key blocks a row keeps the best ones: with `cdf` while their mass together is at most
    that share, but one in any case; with `topk` a budget. Key blocks that are not judged are kept by all rows, and rows
    whose queries are not judged are kept whole. The row's own blocks are kept always, and those of the first `sink`
    keys.

    `topk` = 1.0, `cdf` = 1.0 and `similarity` = 1.0 are dense. With `similarity` below 0 every block is judged.

    Rows with a query that is not finite, and heads with such a key, are kept whole, and the index counts them
    (`BlockIndex.unjudged`). The mean of all keys of the call is taken off before keys are compared, so which blocks are
    judged depends on later tokens: it looks ahead, unless `similarity` is below 0.

    SpargeAttn, arXiv:2502.18137. Raises ValueError or TypeError for options out of range and for both of cdf and topk,
    in `build_index` ValueError where there are not as many numbers as query heads.
    """

    similarity: PerHeadNumber = -0.1  # in [-1, 1]; one number, or one for each query head
    cdf: PerHeadNumber | None = None  # share of the mass of the judged blocks, in [0, 1]; one number, or one a head
    topk: Budget | None = None  # instead: tokens, or a share of the visible keys; None without a cdf: 0.5
    sink: int = 0  # first tokens kept always
    pv_skip: float | None = None  # tiles whose weights are 2 ** -pv_skip of the largest so far, or less, add no values

    def __post_init__(self) -> None:
        for name in ("similarity", "cdf"):
            if isinstance(getattr(self, name), list):  # from JSON; a list is not hashable
                object.__setattr__(self, name, tuple(getattr(self, name)))
        _check_numbers("similarity", self.similarity, -1.0)
        if self.cdf is not None and self.topk is not None:
            raise ValueError(
                f"spargeattn takes either a cdf or a topk, got cdf={self.cdf!r:.80} and topk={self.topk!r:.80}: "
                "leave one out"
            )
        if self.cdf is not None:
            _check_numbers("cdf", self.cdf, 0.0)
        if self.topk is not None:
            check_budget("topk", self.topk)
        check_tokens("sink", self.sink, least=0)
        if self.pv_skip is not None:
            if isinstance(self.pv_skip, bool) or not isinstance(self.pv_skip, (int, float)):
                raise TypeError(f"pv_skip must be a number of at least 0, or None, got {self.pv_skip!r:.80}")
            if not 0.0 <= self.pv_skip <= sys.float_info.max:
                raise ValueError(f"pv_skip must be at least 0 and finite, got {self.pv_skip!r:.80}")

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        blocks = SelfSimilarity.of(inputs, grid)
        return self._index(partial(self._rank, blocks), inputs, grid)

    @property
    def family(self) -> tuple[Any, ...]:
        """What decides how many of the judged blocks are kept cuts the same ranking."""
        return SpargeAttn, self.similarity

    def estimate(self, inputs: AttentionInputs, grid: BlockGrid) -> RankedBlocks:
        """The ranking of all rows."""
        blocks = SelfSimilarity.of(inputs, grid)
        parts = [self._rank(blocks, *slab) for slab in _slabs(inputs, grid)]
        names = [field.name for field in dataclasses.fields(RankedBlocks)]
        return RankedBlocks(*(torch.cat([getattr(part, name) for part in parts], 2) for name in names))

    def choose(self, estimate: RankedBlocks, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        """`build_index` from an estimate of its family."""
        names = [field.name for field in dataclasses.fields(RankedBlocks)]

        def part(start: int, stop: int) -> RankedBlocks:
            return RankedBlocks(*(getattr(estimate, name)[:, :, start:stop] for name in names))

        return self._index(part, inputs, grid)

    def estimator_products(self, inputs: AttentionInputs, grid: BlockGrid) -> int:
        """See `sparseprefill.patterns.nested`. Tokens are read for their means, their lengths, and the means of units;
        keys once more, for the mean of all.
        """
        return grid.rows * grid.key_blocks + 3 * inputs.queries + 4 * inputs.last_key

    def expected_density(self, keys: int) -> float:
        """Share of a prompt's pairs that the cost model reckons with: `topk`, or one half, and what is forced.

        As if every block were judged, and in blocks of 64, as for all methods.
        """
        lowest = min(self.similarity) if isinstance(self.similarity, tuple) else self.similarity
        if lowest >= 1.0 or self.cdf == 1.0:
            return 1.0
        forced = kept_share(64 + -(-self.sink // 64) * 64, keys)
        kept = 0.5 if self.topk is None and self.cdf is not None else kept_share(self.topk or PUBLISHED_TOPK, keys)
        return min(1.0, kept + forced)

    def expected_overhead(self, device: torch.device, head_dim: int, block_q: int, block_k: int) -> Overhead:
        """Means and likeness of all tokens, and every tile ranked."""
        return stated_overhead(device, head_dim, keys=48, tiles=1.5 / (block_q * block_k), steps=0.7)

    def _index(
        self, ranked: Callable[[int, int], RankedBlocks], inputs: AttentionInputs, grid: BlockGrid
    ) -> BlockIndex:
        """Lists of all rows, a slab at a time."""
        visible = grid.visible_block_mask(inputs)
        forced = self._forced(inputs, grid)
        unknown = torch.zeros(inputs.batch, inputs.query_heads, grid.rows, dtype=torch.bool, device=inputs.device)
        cdf = None if self.cdf is None else _of_heads("cdf", self.cdf, inputs, torch.float64)

        def chosen(start: int, stop: int) -> Tensor:
            rows, seen = ranked(start, stop), visible[:, start:stop]
            unknown[:, :, start:stop] = rows.unknown
            if cdf is None:
                budget = PUBLISHED_TOPK if self.topk is None else self.topk
                selected = rows.rank < keep_blocks(budget, seen.sum(-1), grid.block_k)[:, None, :, None]
            else:
                # all at 1, though sums round
                selected = (rows.reach <= cdf) | (cdf == 1.0) | (rows.rank == 0)
            mask = selected | ~rows.candidate | rows.whole[..., None] | forced[:, None, start:stop]
            return mask.logical_and_(seen[:, None])

        slabs = _slabs(inputs, grid)
        if inputs.device.type == "cpu":
            index = BlockIndex.stack([BlockIndex.from_mask(grid, chosen(*slab)) for slab in slabs])
        else:
            index = BlockIndex.from_slabs(grid, inputs.query_heads, slabs, chosen)
        begin, end = grid.row_slots()
        unjudged = (count_real(inputs, begin, end)[:, None] * unknown).sum(-1)
        return self._skipping(BlockIndex(grid, index.columns, index.start, index.count, unjudged))

    def _skipping(self, index: BlockIndex) -> BlockIndex:
        """With what the kernel may leave out of the kept blocks; their order is that of the keys."""
        return index if self.pv_skip is None else index.skipping(-self.pv_skip * math.log(2))

    def _rank(self, blocks: SelfSimilarity, start: int, stop: int) -> RankedBlocks:
        """What a slab of rows chooses from."""
        inputs, grid, scores = blocks.inputs, blocks.grid, blocks.scores(start, stop)
        visible = grid.visible_block_mask(inputs)[:, None, start:stop]
        begin, end = (slots[:, start:stop] for slots in grid.row_slots())
        asked = (count_real(inputs, begin, end) > 0)[:, None]  # [batch, 1, rows]
        least = _of_heads("similarity", self.similarity, inputs, scores.logits.dtype)  # [query_heads, 1, 1]

        # not "<=": what is not finite is not alike
        alike = (scores.key_similarity.repeat_interleave(inputs.group_size, 1) > least) | ~scores.real[:, None]
        candidate = alike & visible
        eligible = candidate & scores.real[:, None]
        logits = scores.logits.masked_fill(~eligible, -torch.inf)
        share = logits.softmax(-1).masked_fill_(~eligible, 0)  # NaN where no block is eligible
        known = blocks.mean_key.isfinite().all(-1).repeat_interleave(inputs.group_size, 1)[..., None]
        known = known & scores.query_similarity.isfinite() & share.isfinite().all(-1)
        # blocks without a real key come last of those that are ranked
        logits.masked_fill_(candidate & ~scores.real[:, None], torch.finfo(logits.dtype).min)
        order = logits.argsort(dim=-1, descending=True, stable=True)
        reach = torch.empty_like(share, dtype=torch.float64)
        reach.scatter_(-1, order, share.gather(-1, order).cumsum(-1, dtype=torch.float64))
        place = torch.arange(grid.key_blocks, dtype=torch.int32, device=order.device).expand_as(order)
        rank = torch.empty_like(place).scatter_(-1, order, place)
        unlike = ~(scores.query_similarity > least[..., 0])
        return RankedBlocks(rank, reach, candidate, ~known & asked, (~known | unlike) & asked)

    def _forced(self, inputs: AttentionInputs, grid: BlockGrid) -> Tensor:
        """bool [batch, rows, key_blocks]: the row's own blocks, and those of the sink."""
        row = grid.first[:, None] + torch.arange(grid.rows, device=inputs.device)
        first, last = row * grid.block_q // grid.block_k, grid.frontier() - 1
        block = torch.arange(grid.key_blocks, device=inputs.device)
        own = (block >= first[..., None]) & (block <= last[..., None])
        end = grid.visible_blocks(inputs)[1] - 1  # where the row's queries end; rows without a query have block 0
        return own | (block == end[..., None]) | (block < -(-self.sink // grid.block_k))


def _slabs(inputs: AttentionInputs, grid: BlockGrid) -> list[tuple[int, int]]:
    return list(grid.slabs(inputs.query_heads, _RANKED_ENTRIES))


def _check_numbers(name: str, numbers: PerHeadNumber, lowest: float) -> None:
    """Raise ValueError or TypeError unless it is a number in [lowest, 1], or a tuple of such."""
    each = numbers if isinstance(numbers, tuple) else (numbers,)
    if not each:
        raise ValueError(f"{name} has no numbers: give one, or one for each query head")
    for number in each:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"{name} must be a number in [{lowest:g}, 1], or a tuple of them, got {number!r:.80}")
        if not lowest <= number <= 1.0:
            raise ValueError(f"{name} must be in [{lowest:g}, 1], got {number!r:.80}")


def _of_heads(name: str, numbers: PerHeadNumber, inputs: AttentionInputs, dtype: torch.dtype) -> Tensor:
    """[query_heads, 1, 1], or [1, 1, 1] where all heads have the same."""
    each = numbers if isinstance(numbers, tuple) else (numbers,)
    if len(each) not in (1, inputs.query_heads) or (isinstance(numbers, tuple) and len(each) != inputs.query_heads):
        raise ValueError(f"{name} has {len(each)} numbers for {inputs.query_heads} query heads")
    tensor = torch.tensor(each, dtype=dtype).to(inputs.device, non_blocking=True)  # a GPU is not waited for
    return tensor[:, None, None]
