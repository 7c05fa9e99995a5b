"""The oracle: attention over the listed blocks from the definition, in float64. Never chosen automatically."""

from __future__ import annotations

import torch

from sparseprefill.contracts import AttentionInputs, AttentionOutput, BlockIndex


def reference_attention(
    inputs: AttentionInputs, index: BlockIndex | None = None, *, dtype: torch.dtype = torch.float64, slab: int = 512
) -> AttentionOutput:
    """Dense where `index` is None. Output and lse come in `dtype`; `slab` queries are computed at a time.

    With `dtype` set to the dtype of the inputs this is the plain low-precision attention that error budgets are
    derived from. Where `index` lists every visible block, the result is the dense one.
    """
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
        if index is not None:
            mask = mask & listed_mask(index, inputs.keys, start, stop)
        logits = logits.masked_fill(~mask, -torch.inf)
        row_lse = logits.logsumexp(-1)
        total = row_lse
        if inputs.sinks is not None:
            total = torch.logaddexp(row_lse, inputs.sinks.to(dtype)[None, :, None])
        share = (logits - total[..., None]).exp().masked_fill(~mask, 0)
        share = share.unflatten(1, (inputs.kv_heads, inputs.group_size))
        output[:, :, start:stop] = torch.einsum("bkgij,bkjd->bkgid", share, value).flatten(1, 2)
        lse[:, :, start:stop] = row_lse
    return AttentionOutput(output, lse)


def listed_mask(index: BlockIndex, keys: int, start: int, stop: int) -> torch.Tensor:
    """bool [batch, query_heads, stop - start, keys]: key stands in a block listed for the query's row."""
    grid = index.grid
    rows = grid.query_rows()[:, start:stop]
    past = torch.arange(keys, device=rows.device) - grid.anchor[:, None]
    block = past // grid.block_k
    legal = (past >= 0) & (block < grid.key_blocks)
    mask = index.to_mask()
    heads = mask.shape[1]
    by_row = mask.gather(2, rows.clamp(min=0)[:, None, :, None].expand(-1, heads, -1, grid.key_blocks))
    by_key = by_row.gather(3, block.clamp(0, grid.key_blocks - 1)[:, None, None].expand(-1, heads, stop - start, -1))
    return by_key & legal[:, None, None] & (rows >= 0)[:, None, :, None]
