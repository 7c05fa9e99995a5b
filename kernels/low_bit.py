"""Low-bit products of queries and keys, and of these the largest in each tile: the reference in plain torch.

A vector minus a mean is rounded to whole numbers of `bits` bits: scale * code, with |code| <= 2 ** (bits - 1) - 1. In 2
and 4 bits two codes share a byte: byte c holds channel c in its high half and channel c + half in its low half, each as
two's complement, where `half` is half the channels (filled up with zeros to a multiple of 8). The products of codes are
whole numbers, so every implementation computes the same ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

BITS = (2, 4, 8)
"""Widths that codes can have."""

EXACT = 16
"""Stands for no rounding at all: codes are the vectors themselves, in float32 (float64 for such inputs), scale 1."""

_SLAB_NUMBERS = 1 << 23  # of queries or keys that are widened at a time
_KEYS_TOGETHER = 2048  # keys, and products of queries and keys, that the reference holds at a time
_TILE_PRODUCTS = 1 << 21


@dataclass(frozen=True, slots=True, eq=False)
class LowBit:
    """Vectors as codes. Product of two vectors ~ product of their codes * both scales."""

    codes: Tensor  # int8 [batch, heads, tokens, bytes], packed as above; with EXACT floating point [.., head_dim]
    scale: Tensor  # float32 [batch, heads, tokens] (float64 for such inputs)
    bits: int
    head_dim: int  # channels before they were filled up

    def unpacked(self) -> Tensor:
        """Codes one by one: int8 (or floating point, if EXACT) [batch, heads, tokens, channels]."""
        if self.bits >= 8:
            return self.codes
        # the low half is pushed up and back down, so that its sign is carried along
        return torch.cat([self.codes >> 4, (self.codes << 4) >> 4], -1)


def check_bits(bits: int) -> None:
    """Raise ValueError or TypeError unless codes can have so many bits, or it is EXACT."""
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"bits must be one of {(*BITS, EXACT)}, got {bits!r:.80}")
    if bits not in (*BITS, EXACT):
        raise ValueError(f"bits must be one of {(*BITS, EXACT)} ({EXACT}: no rounding), got {bits!r:.80}")


def token_means(vectors: Tensor, real: Tensor | None) -> Tensor:
    """Mean of [batch, heads, tokens, dim] over the tokens that are `real` (bool [batch, tokens]; None: all).

    float32 [batch, heads, dim] (float64 for such vectors), 0 where nothing is real. Tokens are widened slab by slab.
    """
    batch, heads, tokens, dim = vectors.shape
    total = torch.zeros(batch, heads, dim, dtype=accurate(vectors), device=vectors.device)
    for part, own in _slabs(vectors, real):
        # padding may hold anything, NaN too
        total += (part if own is None else part.masked_fill(~own[:, None, :, None], 0)).sum(2)
    count = tokens if real is None else real.sum(1).clamp(min=1)[:, None, None]
    return total / count


def quantize(
    vectors: Tensor, mean: Tensor, bits: int, *, group: Tensor | None = None, real: Tensor | None = None
) -> LowBit:
    """Round vectors [batch, heads, tokens, dim] minus their mean [batch, heads, dim] to `bits` bits, half to even.

    Args:
        group: int64 [batch, tokens], numbers below the number of tokens: tokens with one number share a scale. None:
            each has its own.
        real: bool [batch, tokens]; what is not real gets zeros and has no say in the scale of its group.
        bits: see `check_bits`.

    A group of zeros has scale 1. So has one that holds what is not finite, with codes of 0: whoever calls must know.
    """
    check_bits(bits)
    batch, heads, tokens, dim = vectors.shape
    if bits == EXACT:
        exact = vectors.to(accurate(vectors)) - mean[:, :, None]
        if real is not None:
            exact = exact * real[:, None, :, None]
        return LowBit(exact.nan_to_num(0, 0, 0), exact.new_ones(batch, heads, tokens), bits, dim)
    most = 2 ** (bits - 1) - 1
    channels = -(-dim // 8) * 8
    largest = torch.cat(
        [_centred(part, mean, own).abs().amax(-1) for part, own in _slabs(vectors, real)], 2
    )  # [batch, heads, tokens]
    if group is not None:
        by_group = torch.zeros_like(largest).scatter_reduce_(2, group[:, None].expand_as(largest), largest, "amax")
        largest = by_group.gather(2, group[:, None].expand_as(largest))
    scale = torch.where((largest > 0) & (largest < torch.inf), largest / most, 1.0)
    codes = torch.empty(
        batch, heads, tokens, channels if bits == 8 else channels // 2, dtype=torch.int8, device=vectors.device
    )
    done = 0
    for part, own in _slabs(vectors, real):
        stop = done + part.shape[2]
        whole = (_centred(part, mean, own) * (most / largest[:, :, done:stop, None])).nan_to_num_(0, 0, 0)
        whole = functional.pad(whole.round_().clamp_(-most, most).to(torch.int8), (0, channels - dim))
        codes[:, :, done:stop] = whole if bits == 8 else pack(whole)
        done = stop
    return LowBit(codes, scale, bits, dim)


def pack(codes: Tensor) -> Tensor:
    """Codes of at most 4 bits, int8 [..., channels] with an even number of channels, two in a byte."""
    high, low = codes.chunk(2, -1)
    return (high << 4) | (low & 15)


def _centred(part: Tensor, mean: Tensor, real: Tensor | None) -> Tensor:
    centred = part - mean[:, :, None]
    return centred if real is None else centred.masked_fill(~real[:, None, :, None], 0)


def _slabs(vectors: Tensor, real: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Tokens a slab at a time, widened; `real` cut alike."""
    batch, heads, tokens, dim = vectors.shape
    together = max(1, _SLAB_NUMBERS // (batch * heads * dim))
    for start in range(0, tokens, together):
        stop = min(tokens, start + together)
        yield vectors[:, :, start:stop].to(accurate(vectors)), None if real is None else real[:, start:stop]


def accurate(vectors: Tensor) -> torch.dtype:
    """What vectors are widened to."""
    return torch.float64 if vectors.dtype == torch.float64 else torch.float32


@dataclass(frozen=True, slots=True, eq=False)
class EstimatedLogits:
    """Estimated logits of queries that stand in rows of a grid, and what each is compared with.

    With query i and key j of head h, their codes q and k, and capped(x) = x or softcap * tanh(x / softcap):

        score(i, j) = capped(scale * (query.scale[i] * key.scale[j] * <q, k> + bias[j] + shift[i])) - reference[i]

    for the keys low[i] <= j < high[i] whose bias is not -inf. A query that takes no part has low = high.
    """

    query: LowBit  # [batch, query_heads, rows * block_q, ...], rows filled up where they are partial
    key: LowBit  # [batch, kv_heads, keys, ...]
    bias: Tensor  # [batch, query_heads, keys] finite, or -inf for a key that is not real
    shift: Tensor  # [batch, query_heads, rows * block_q] finite
    reference: Tensor  # [batch, query_heads, rows * block_q] finite
    low: Tensor  # int32 [batch, rows * block_q], slots
    high: Tensor  # the same
    anchor: Tensor  # int64 [batch]: key block n begins at slot anchor + n * block_k
    block_q: int  # queries of a row
    block_k: int  # keys of a block
    key_blocks: int
    scale: float
    softcap: float | None

    @property
    def rows(self) -> int:
        return self.query.codes.shape[2] // self.block_q

    @property
    def group_size(self) -> int:
        return self.query.codes.shape[1] // self.key.codes.shape[1]


def block_max(logits: EstimatedLogits) -> Tensor:
    """The largest score of each tile, [batch, query_heads, rows, key_blocks]; -inf where no pair is looked at.

    The reference: a matrix product of codes as floating-point numbers (exact: whole numbers below 2 ** 24), a few
    thousand queries and keys at a time. float64 for such inputs, else float32.
    """
    batch, kv_heads, keys = logits.key.codes.shape[:3]
    heads = logits.query.codes.shape[1]
    group, block_q, block_k = logits.group_size, logits.block_q, logits.block_k
    kind = logits.bias.dtype
    device = logits.bias.device
    best = torch.full((batch, heads, logits.rows, logits.key_blocks), -torch.inf, dtype=kind, device=device)
    blocks_together = max(1, _KEYS_TOGETHER // block_k)
    rows_together = max(1, _TILE_PRODUCTS // (group * block_q * blocks_together * block_k))
    on_cpu = device.type == "cpu"
    for b in range(batch):
        for g in range(kv_heads):
            own = slice(g * group, (g + 1) * group)
            key_codes = _channels(logits.key, b, g).to(kind)
            for first_row in range(0, logits.rows, rows_together):
                row = slice(first_row, min(first_row + rows_together, logits.rows))
                at = slice(row.start * block_q, row.stop * block_q)
                reach = int(logits.high[b, at].max()) if on_cpu else keys  # a GPU is not asked
                query_codes = _channels(logits.query, b, own, at).to(kind)
                for first in range(0, logits.key_blocks, blocks_together):
                    count = min(blocks_together, logits.key_blocks - first)
                    slot = logits.anchor[b] + first * block_k + torch.arange(count * block_k, device=device)
                    if on_cpu and int(slot[0]) >= reach:
                        break
                    score = _scores(logits, b, g, at, slot, query_codes, key_codes)
                    score = score.unflatten(2, (count, block_k)).unflatten(1, (-1, block_q))
                    best[b, own, row, first : first + count] = score.amax((2, 4))
    return best


def _channels(codes: LowBit, *part: Any) -> Tensor:
    return dataclasses.replace(codes, codes=codes.codes[part]).unpacked()


def _scores(
    logits: EstimatedLogits, b: int, g: int, at: slice, slot: Tensor, query_codes: Tensor, key_codes: Tensor
) -> Tensor:
    """[group, queries, slots] of one KV head; -inf for pairs that are not looked at."""
    own = slice(g * logits.group_size, (g + 1) * logits.group_size)
    keys = key_codes.shape[0]
    place = slot.clamp(max=keys - 1)
    score: Tensor = (query_codes.flatten(0, 1) @ key_codes[place].T).unflatten(0, query_codes.shape[:2])
    score *= logits.query.scale[b, own, at, None]
    score *= logits.key.scale[b, g, place]
    bias = logits.bias[b, own, place][:, None]
    score += bias
    score += logits.shift[b, own, at, None]
    score *= logits.scale
    if logits.softcap is not None:
        score.div_(logits.softcap).tanh_().mul_(logits.softcap)
    score -= logits.reference[b, own, at, None]
    low, high = logits.low[b, at, None], logits.high[b, at, None]
    unseen = (slot < low) | (slot >= high) | (slot >= keys) | (bias == -torch.inf)
    masked: Tensor = score.masked_fill_(unseen, -torch.inf)
    return masked
