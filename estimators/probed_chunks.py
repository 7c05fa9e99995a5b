"""Chunks of keys judged by a few of their keys: bisection towards the half whose middle key fits the probes better.

Lee et al., "InfiniteHiP", 2025, arXiv:2502.08910, after "HiP", 2024, arXiv:2406.09827: of a chunk of n keys 2 log2(n)
are looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid
from sparseprefill.kernels.low_bit import accurate


def probes(
    inputs: AttentionInputs, grid: BlockGrid, start: int, stop: int, stride: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[batch, query_heads, stop - start, count, head_dim]: means of `stride` neighbouring valid queries of each row.

    And bool [batch, stop - start, count]: which of them are means of something; the others are 0.
    """
    begin, end = (slots[:, start:stop] - inputs.query_start for slots in grid.row_slots())
    edge = grid.anchor[:, None] + (grid.first[:, None] + torch.arange(start, stop, device=inputs.device)) * grid.block_q
    count = -(-grid.block_q // stride)
    offset = torch.arange(count * stride, device=inputs.device)
    place = (edge - inputs.query_start)[..., None] + offset  # [batch, rows, count * stride]
    real = (place >= begin[..., None]) & (place < end[..., None]) & (offset < grid.block_q)
    flat = place.clamp(0, inputs.queries - 1).flatten(1)
    if inputs.key_valid is not None:
        real = real & inputs.key_valid[:, inputs.query_start :].gather(1, flat).view_as(real)
    query = inputs.query.gather(2, flat[:, None, :, None].expand(-1, inputs.query_heads, -1, inputs.head_dim))
    query = query.to(accurate(inputs.query)).unflatten(2, (stop - start, count, stride))
    kept = real.unflatten(2, (count, stride))
    total = query.masked_fill(~kept[:, None, ..., None], 0.0).sum(4)
    return total / kept.sum(3).clamp(min=1)[:, None, ..., None], kept.any(3)


def bisect(
    inputs: AttentionInputs, probe: Tensor, asked: Tensor, begin: Tensor, size: int, low: Tensor, high: Tensor
) -> Tensor:
    """[batch, kv_heads, rows, chunks]: the best product that the search in each chunk of `size` keys met.

    In each step the chunk, or what is left of it, is halved; each half is judged by its middle key, with the largest
    product over all probes of the row and of the heads of the group; the search goes on in the better half (of equal
    ones the earlier). Products are not scaled. -inf for a chunk of which no key that was met may be seen, NaN for one
    in which a product was NaN.

    Args:
        inputs: keys, and which of them are valid.
        probe: of `probes`, [batch, query_heads, rows, count, head_dim].
        asked: of `probes` too, bool [batch, rows, count].
        begin: int64 [batch, kv_heads, rows, chunks], slots.
        size: tokens of a chunk, a power of two.
        low: int64 [batch, rows], the first slot that all of the row's queries see.
        high: int64 [batch, rows], one past the last such slot.
    """
    kv_heads = inputs.kv_heads
    each = probe.unflatten(1, (kv_heads, -1)).transpose(2, 3).flatten(3, 4)  # [batch, kv_heads, rows, all probes, dim]
    none = ~asked.repeat(1, 1, probe.shape[1] // kv_heads)[:, None, :, :, None]  # [batch, 1, rows, all probes, 1]
    rows, chunks = each.shape[2], begin.shape[3]
    best = torch.full(begin.shape, -torch.inf, dtype=probe.dtype, device=probe.device)
    left, half = begin, size
    while half > 1:
        half //= 2
        values = []
        for side in (left, left + half):
            slot = side + half // 2
            inside = (slot < high[:, None, :, None]) & (slot >= low[:, None, :, None])
            at = slot.clamp(0, inputs.keys - 1)
            if inputs.key_valid is not None:
                valid = inputs.key_valid[:, None].expand(-1, kv_heads, -1)
                inside = inside & valid.gather(2, at.flatten(2)).view_as(at)
            key = inputs.key.gather(2, at.flatten(2)[..., None].expand(-1, -1, -1, inputs.head_dim))
            key = key.to(probe.dtype).view(*at.shape[:2], rows, chunks, -1)
            products = torch.einsum("bkrpd,bkrcd->bkrpc", each, key).masked_fill(none, -torch.inf).amax(3)
            values.append(products.masked_fill(~inside, -torch.inf))
        best = torch.maximum(best, torch.maximum(*values))
        left = torch.where(values[1] > values[0], left + half, left)
    return best


def keys_met(size: int) -> int:
    """How many keys of a chunk `bisect` looks at."""
    return 2 * (size.bit_length() - 1)
