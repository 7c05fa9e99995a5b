"""The oracle: attention over the listed blocks from the definition, in float64. Never chosen automatically."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, AttentionOutput, BlockGrid, BlockIndex


def reference_attention(
    inputs: AttentionInputs, index: BlockIndex | None = None, *, dtype: torch.dtype = torch.float64, slab: int = 512
) -> AttentionOutput:
    """Dense where `index` is None. Output and lse come in `dtype`; `slab` queries are computed at a time.

    With `dtype` set to the dtype of the inputs this is the plain low-precision attention that error budgets are
    derived from. Where `index` lists every visible block, the result is the dense one. What `index.skip` leaves out is
    decided in float64 whatever `dtype`, tile by tile of the grid, so that budgets compare the same selection.
    """
    skipped = None
    tiles = None if index is None else computed_tiles(inputs, index)
    if index is not None and index.skip is not None:
        skipped = torch.zeros(inputs.query.shape[:2], dtype=torch.int64, device=inputs.device)
    batch, heads, queries = inputs.query.shape[:3]
    query = inputs.query.to(dtype).unflatten(1, (inputs.kv_heads, inputs.group_size))
    key, value = inputs.key.to(dtype), inputs.value.to(dtype)
    output = query.new_zeros(batch, heads, queries, inputs.value_dim)
    lse = query.new_full((batch, heads, queries), -torch.inf)
    for start in range(0, queries, slab):
        stop = min(queries, start + slab)
        logits = torch.einsum("bkgid,bkjd->bkgij", query[:, :, :, start:stop], key).flatten(1, 2) * inputs.scale
        if inputs.softcap is not None:
            logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
        mask = inputs.visible_mask(start, stop)[:, None]
        if index is not None and tiles is not None:
            if skipped is not None:
                dropped = index.to_mask() & ~tiles
                skipped += (mask & _by_token(index.grid, dropped, inputs.keys, start, stop)).sum((2, 3))
            mask = mask & _by_token(index.grid, tiles, inputs.keys, start, stop)
        logits = logits.masked_fill(~mask, -torch.inf)
        row_lse = logits.logsumexp(-1)
        total = row_lse
        if inputs.sinks is not None:
            total = torch.logaddexp(row_lse, inputs.sinks.to(dtype)[None, :, None])
        share = (logits - total[..., None]).exp().masked_fill(~mask, 0)
        share = share.unflatten(1, (inputs.kv_heads, inputs.group_size))
        output[:, :, start:stop] = torch.einsum("bkgij,bkjd->bkgid", share, value).flatten(1, 2)
        lse[:, :, start:stop] = row_lse
    return AttentionOutput(output, lse, skipped)


def computed_tiles(inputs: AttentionInputs, index: BlockIndex) -> Tensor:
    """bool [batch, query_heads, rows, key_blocks]: the listed tiles that `index.skip` does not leave out.

    From the definition in `BlockIndex`: one list after another, one tile after another.
    """
    grid, skip = index.grid, index.skip
    computed = index.to_mask()
    if skip is None:
        return computed
    visit = index.columns if index.visit is None else index.visit
    begin, end = (slots.tolist() for slots in grid.row_slots())
    for b, h, row in itertools.product(*map(range, index.count.shape)):
        start, stop = begin[b][row] - inputs.query_start, end[b][row] - inputs.query_start
        threshold = float(skip[b, h, row])
        if start >= stop or threshold == -math.inf:
            continue
        logits = inputs.query[b, h, start:stop].double() @ inputs.key[b, h // inputs.group_size].double().mT
        logits *= inputs.scale
        if inputs.softcap is not None:
            logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
        logits = logits.masked_fill(~inputs.visible_mask(start, stop)[b], -torch.inf)
        counts = torch.ones(stop - start, dtype=torch.bool, device=inputs.device)
        if inputs.key_valid is not None:
            counts = inputs.key_valid[b, begin[b][row] : end[b][row]]
        peak = logits.new_full((stop - start,), -torch.inf)
        first = int(index.start[b, h, row])
        for block in visit[first : first + int(index.count[b, h, row])].tolist():
            key = int(grid.anchor[b]) + block * grid.block_k
            tile_peak = logits[:, key : key + grid.block_k].amax(1)
            negligible = (tile_peak == -torch.inf) | (tile_peak <= peak + threshold)  # NaN is neither
            if bool((negligible | ~counts).all()):
                computed[b, h, row, block] = False
            else:
                peak = torch.maximum(peak, tile_peak)
    return computed


def listed_mask(index: BlockIndex, keys: int, start: int, stop: int) -> Tensor:
    """bool [batch, query_heads, stop - start, keys]: key stands in a block listed for the query's row."""
    return _by_token(index.grid, index.to_mask(), keys, start, stop)


def _by_token(grid: BlockGrid, tiles: Tensor, keys: int, start: int, stop: int) -> Tensor:
    """bool [batch, query_heads, stop - start, keys] from [batch, query_heads, rows, key_blocks]."""
    rows = grid.query_rows()[:, start:stop]
    past = torch.arange(keys, device=rows.device) - grid.anchor[:, None]
    block = past // grid.block_k
    legal = (past >= 0) & (block < grid.key_blocks)
    heads = tiles.shape[1]
    by_row = tiles.gather(2, rows.clamp(min=0)[:, None, :, None].expand(-1, heads, -1, grid.key_blocks))
    by_key = by_row.gather(3, block.clamp(0, grid.key_blocks - 1)[:, None, None].expand(-1, heads, stop - start, -1))
    return by_key & legal[:, None, None] & (rows >= 0)[:, None, :, None]
