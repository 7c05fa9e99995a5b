"""How far rounding can move an estimated logit, and which tiles it therefore cannot lose.

With codes q and k, scales s and t, and |.|_1 the sum over channels of absolute values, a vector is s * q + e, where no
channel of the error e is beyond s / 2: codes are rounded to the nearest, and the largest value of a group is a whole
code. So the product that is estimated by s * t * <q, k> is off by

    e_q . (t * k) + (s * q) . e_k + e_q . e_k,   at most   s / 2 * |t * k|_1 + |s * q|_1 * t / 2 + dims * s * t / 4.

What is added to the product is exact, and soft-capping brings logits nearer together. A tile with a pair whose exact
score is further above the threshold than this bound, times the scale of attention, is kept.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sparseprefill.contracts import AttentionInputs, BlockGrid
from sparseprefill.kernels.low_bit import EXACT, LowBit, accurate, token_means
from sparseprefill.patterns import Sale

_PAIRS = 1 << 22  # that are looked at together


@dataclass(frozen=True, slots=True)
class BoundCount:
    """Tiles between sink and window that have pairs to look at, of all heads."""

    tiles: int
    above: int  # with a pair whose exact score is above the threshold
    certain: int  # of these, above it by more than the bound
    lost: int  # of these, not kept: none, if the bound is right
    missed: int  # above the threshold, yet not kept
    spurious: int  # kept by the threshold, though no exact score is above it

    def __add__(self, other: BoundCount) -> BoundCount:
        return BoundCount(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))


def logit_errors(query: LowBit, key: LowBit) -> tuple[Tensor, Tensor]:
    """Two factors [batch, heads, tokens, 3] whose products over the last dimension bound each pair's error.

    Of the product of queries and keys, before attention's scale. Raises ValueError for vectors that were not rounded.
    """
    if EXACT in (query.bits, key.bits):
        raise ValueError("vectors that were not rounded have no rounding error")
    rows = []
    for each in (query, key):
        size = each.unpacked().abs().sum(-1, dtype=torch.int32) * each.scale
        rows.append((size, each.scale / 2))
    (query_size, query_half), (key_size, key_half) = rows
    dims = query.head_dim
    return (
        torch.stack([query_size, query_half, dims * query_half], -1),
        torch.stack([key_half, key_size, key_half], -1),
    )


def count_bound(inputs: AttentionInputs, pattern: Sale, grid: BlockGrid) -> BoundCount:
    """Hold `pattern`, which has a threshold, to exact scores and to the bound.

    Exact scores are computed here from queries and keys themselves; an allowance for the rounding of floating-point
    sums, derived from the sizes of what is summed, is added to the bound.

    Raises:
        ValueError: a pattern without a threshold or without rounding, a batch, padding, or queries that are not all.
    """
    if pattern.threshold is None or pattern.bits == EXACT:
        raise ValueError("the bound is about a threshold and rounded logits: name a threshold, and 2, 4 or 8 bits")
    if inputs.batch != 1 or inputs.key_valid is not None or inputs.query_start:
        raise ValueError("the bound is counted on one whole prompt without padding")
    prepared = pattern.estimator.prepare(inputs, grid)
    if bool(prepared.unjudged().any()):
        raise ValueError("the bound is counted where all queries can be judged: some keys or queries are not finite")
    kept, kind = pattern.build_index(inputs, grid), accurate(inputs.query)
    floor, eps = math.log(pattern.threshold), torch.finfo(kind).eps
    counts = torch.zeros(6, dtype=torch.int64)
    blocks, size = grid.key_blocks, grid.key_blocks * grid.block_k
    key = functional.pad(inputs.key[0].to(kind), (0, 0, 0, max(0, size - inputs.keys)))[:, :size]
    key_mean = token_means(inputs.key, None)[0]
    together = max(1, _PAIRS // (inputs.group_size * grid.block_q * size))
    forced = pattern.estimator.forced(inputs, grid)[0]
    for start in range(0, grid.rows, together):
        stop = min(grid.rows, start + together)
        logits, _ = prepared.estimated(start, stop)
        by_query, by_key = logit_errors(logits.query, logits.key)
        place = torch.arange(start * grid.block_q, stop * grid.block_q, device=inputs.device)
        real = (place < inputs.queries)[:, None]
        query = inputs.query[0][:, place.clamp(max=inputs.queries - 1)].to(kind)
        slot = torch.arange(size, device=inputs.device)
        seen = (slot >= logits.low[0][:, None]) & (slot < logits.high[0][:, None]) & real
        own_kept = kept.to_mask(start, stop)[0]
        looked_at = seen.unflatten(0, (-1, grid.block_q)).unflatten(2, (blocks, -1)).any(3).any(1) & ~forced[start:stop]
        for h in range(inputs.query_heads):
            g = h // inputs.group_size
            exact = inputs.scale * (query[h] @ key[g].T)
            if inputs.softcap is not None:
                exact = inputs.softcap * torch.tanh(exact / inputs.softcap)
            exact -= logits.reference[0, h][:, None]
            far = functional.pad(by_key[0, g], (0, 0, 0, max(0, size - inputs.keys)))[:size]
            bound = inputs.scale * (by_query[0, h] @ far.T)
            # four products of vectors and their means, each a sum of so many channels; then the reference
            longest = query[h].norm(dim=1) + prepared.query_mean[0, h].norm(), key[g].norm(dim=1) + key_mean[g].norm()
            bound += eps * (4 * inputs.head_dim + 16) * inputs.scale * longest[0][:, None] * longest[1]
            bound += 16 * eps * (1 + logits.reference[0, h].abs()[:, None])
            above, certain = (
                _by_tile((each > floor) & seen, grid) & looked_at for each in (exact, exact - bound)
            )  # fmt: skip
            mine = own_kept[h] & looked_at
            counts += torch.stack([
                looked_at.sum(), above.sum(), certain.sum(), (certain & ~mine).sum(), (above & ~mine).sum(),
                (mine & ~above).sum(),
            ]).cpu()  # fmt: skip
    return BoundCount(*counts.tolist())


def _by_tile(pairs: Tensor, grid: BlockGrid) -> Tensor:
    tiles: Tensor = pairs.unflatten(0, (-1, grid.block_q)).unflatten(2, (-1, grid.block_k))
    return tiles.any(3).any(1)
