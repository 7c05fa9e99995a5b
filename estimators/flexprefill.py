"""What FlexPrefill looks at: the last block of queries, exactly, and a map of the products of block means.

Lai et al., "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference", 2025,
arXiv:2502.20766. Blocks are those of the grid, of square tiles.

A block line o is all tiles (m, m - o). The last query stands in row m of the grid, `pad` places before the row's end,
and sees the key at distance delta in key block m - o with o = floor((delta + pad) / block). So distances count for the
line in which the last query meets them. The published pooling, groups of `block` distances counted from the farthest
one, is the same: with N = m * block + block - pad tokens, m - floor((N - 1 - delta) / block) is that o.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid
from sparseprefill.estimators.mean_pooled import (
    count_real,
    key_block_means,
    pooled_logits,
    query_block_means,
    range_means,
    real_key_blocks,
)
from sparseprefill.estimators.probe import Probe, head_slabs

_PROBE_ENTRIES = 1 << 24  # logits of the probe that are held at one time, in about six copies
_MAP_ENTRIES = 1 << 23  # tiles of maps that are ranked at one time, at about 40 bytes


@dataclass(frozen=True, slots=True, eq=False)
class LastBlock:
    """What the last block of queries of each batch row says of each head.

    The queries are those in the last `block` slots up to the last real query; what is not real asks nothing.
    """

    column: Tensor  # [batch, query_heads, key_blocks], mean attention to each key block
    line: Tensor  # [batch, query_heads, key_blocks], on each block line
    column_mass: Tensor  # float64 [batch, query_heads, keys], of the 1, 2, ... single keys with the most, together
    line_mass: Tensor  # float64 [batch, query_heads, keys], of the 1, 2, ... single distances with the most
    divergence: Tensor  # float64 [batch, query_heads], Jensen-Shannon distance of `column` and what block means say
    known: Tensor  # bool [batch, query_heads], all of it is finite

    @staticmethod
    def of(inputs: AttentionInputs, grid: BlockGrid) -> LastBlock:
        """Looks at them: block * keys products a head, and those of one mean query with the mean of each key block."""
        entries = inputs.batch * grid.block_k * max(1, inputs.last_key)
        slabs = head_slabs(inputs, max(1, _PROBE_ENTRIES // entries))
        parts = [_look(part, grid) for _, _, part in slabs]
        return LastBlock(
            *(torch.cat([getattr(part, field.name) for part in parts], 1) for field in dataclasses.fields(LastBlock))
        )


def _look(inputs: AttentionInputs, grid: BlockGrid) -> LastBlock:
    size, start, tail = grid.block_k, inputs.query_start, inputs.tail()
    rows = min(size, inputs.queries)
    first = (tail - rows).clamp(min=start)  # slot of the first query that is looked at
    asked = count_real(inputs, first[:, None], tail[:, None]).clamp(min=1)[..., None]  # [batch, 1, 1]
    mass = Probe(size).mass(inputs)
    columns, lines = mass.column[..., : inputs.last_key] / asked, mass.diagonal / asked

    pad = size - 1 - (tail - 1 - grid.anchor) % size
    distance = torch.arange(grid.key_blocks * size, device=inputs.device) - pad[:, None]
    inside = (distance >= 0) & (distance < inputs.keys)
    place = distance.clamp(0, inputs.keys - 1)[:, None].expand(*lines.shape[:2], -1)
    line = (lines.gather(2, place) * inside[:, None]).unflatten(2, (-1, size)).sum(-1)
    column = mass.block_columns(grid) / asked

    real = None if inputs.key_valid is None else inputs.key_valid[:, start:]
    query = range_means(inputs.query, (first - start)[:, None], (tail - start)[:, None], real, size)
    logits = pooled_logits(query, key_block_means(inputs, grid), inputs)[:, :, 0]
    seen = _seen_by_the_last(inputs, grid, first, rows)[:, None]
    guess = logits.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0)
    known = guess.isfinite().all(-1) & columns.isfinite().all(-1)
    return LastBlock(
        column, line, largest_together(columns), largest_together(lines), jensen_shannon(guess, column), known
    )


def _seen_by_the_last(inputs: AttentionInputs, grid: BlockGrid, first: Tensor, rows: int) -> Tensor:
    """bool [batch, key_blocks]: blocks in which one of the last real queries sees a key."""
    low, high = inputs.visible_range()
    tail = inputs.tail()
    if inputs.key_valid is not None:  # the first of them that is real
        slot = first[:, None] + torch.arange(rows, device=inputs.device)
        first = first + inputs.key_valid.gather(1, slot).int().argmax(1)
    low = low.gather(1, (first - inputs.query_start)[:, None])
    high = high.gather(1, (tail - 1 - inputs.query_start)[:, None])
    begin = grid.anchor[:, None] + torch.arange(grid.key_blocks, device=inputs.device) * grid.block_k
    return (begin + grid.block_k > low) & (begin < high) & real_key_blocks(inputs, grid)


def largest_together(shares: Tensor) -> Tensor:
    """float64 like shares: the sums of the 1, 2, 3, ... largest of the last dimension."""
    return shares.sort(dim=-1, descending=True).values.cumsum(-1, dtype=torch.float64)


def jensen_shannon(one: Tensor, other: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence over the last dimension, in nats: 0 to sqrt(ln 2); float64.

    0 log 0 is 0.
    """
    one, other = one.double(), other.double()
    middle = (one + other) / 2

    def from_middle(share: Tensor) -> Tensor:
        return (torch.xlogy(share, share) - torch.xlogy(share, middle)).sum(-1)

    return ((from_middle(one) + from_middle(other)) / 2).clamp(min=0).sqrt()


@dataclass(frozen=True, slots=True, eq=False)
class BlockMaps:
    """Attention between block means, each row of tiles a softmax, ranked over all tiles of a head.

    Of equal tiles the one in the earlier row ranks first, of those in one row the one with the lower id.
    """

    reach: Tensor  # float64 [batch, heads, rows, key_blocks], mass of a tile and of all that rank before it
    judged: Tensor  # int64 [batch, heads], rows that take part: each has a mass of 1
    unknown: Tensor  # bool [batch, heads, rows], rows whose products are not finite; they take no part


def block_maps(
    inputs: AttentionInputs, grid: BlockGrid, wanted: Tensor | None = None
) -> Iterator[tuple[int, int, BlockMaps]]:
    """(start, stop, maps of query heads [start, stop)), a slab of heads at a time: rows * key_blocks products a head.

    On the CPU heads that are not `wanted`, bool [batch, query_heads], in any batch row are left out.
    """
    key = key_block_means(inputs, grid)
    begin, end = grid.row_slots()
    asked = count_real(inputs, begin, end) > 0  # [batch, rows]
    seen = grid.visible_block_mask(inputs) & real_key_blocks(inputs, grid)[:, None]
    skip = wanted is not None and inputs.device.type == "cpu"
    entries = inputs.batch * grid.rows * grid.key_blocks
    group = inputs.group_size
    for start, stop, part in head_slabs(inputs, 1 if skip else max(1, _MAP_ENTRIES // entries)):
        if skip and wanted is not None and not wanted[:, start:stop].any():
            continue
        query = query_block_means(part, grid, 0, grid.rows)
        logits = pooled_logits(query, key[:, start // group : -(-stop // group)], part)
        yield start, stop, ranked_maps(logits, seen, asked)


def ranked_maps(logits: Tensor, seen: Tensor, asked: Tensor) -> BlockMaps:
    """From logits [batch, heads, rows, key_blocks]; seen [batch, rows, key_blocks] and asked [batch, rows] count."""
    share = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    some = (asked & seen.any(-1))[:, None]
    unknown = ~share.isfinite().all(-1) & some
    out = ~(some & ~unknown)[..., None] | ~seen[:, None]
    best, order = share.masked_fill(out, 0).flatten(2).sort(dim=-1, descending=True, stable=True)
    together = best.cumsum(-1, dtype=torch.float64)
    reach = torch.empty_like(together).scatter_(-1, order, together).view_as(logits)
    return BlockMaps(reach, (some & ~unknown).sum(-1), unknown)
