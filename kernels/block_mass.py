"""How each query's attention is spread over blocks of keys: exact, in slabs, never a matrix of all pairs.

Whatever lists of blocks are compared, the share of attention that a list keeps is the sum of these over its blocks,
which is exp(lse_sparse - lse_dense): one pass serves any number of lists.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sparseprefill.contracts import AttentionInputs, BlockGrid


def block_mass(inputs: AttentionInputs, grid: BlockGrid, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The attention mass of each key block, for every query of some rows of the grid, and the lse of dense attention.

    Holds [batch, query_heads, rows, block_q, keys] logits up to the last key that these rows see: keep `rows` short.

    Args:
        rows: int64 [rows], ascending rows of the grid.

    Returns:
        float32 (float64 for such inputs) [batch, query_heads, rows, block_q, blocks], where `blocks` ends with the last
        block that any of these queries sees; and [batch, query_heads, rows, block_q]. A query sums to 1; one that sees
        nothing, or is outside of the inputs, has mass 0 and lse -inf.
    """
    accurate = torch.float64 if inputs.query.dtype == torch.float64 else torch.float32
    block = grid.first[:, None, None] + rows[:, None]
    slot = grid.anchor[:, None, None] + block * grid.block_q + torch.arange(grid.block_q, device=inputs.device)
    asked = (slot >= inputs.query_start) & (slot < inputs.query_start + inputs.queries)
    place = (slot - inputs.query_start).clamp(0, inputs.queries - 1).flatten(1)
    low, high = (bound.gather(1, place).view_as(slot) for bound in inputs.visible_range())
    high = torch.where(asked, high, low)
    blocks = int((-(-(high - grid.anchor[:, None, None]) // grid.block_k)).amax().clamp(1, grid.key_blocks))

    query = inputs.query.gather(2, place[:, None, :, None].expand(-1, inputs.query_heads, -1, inputs.head_dim))
    query = (query.to(accurate) * inputs.scale).unflatten(1, (inputs.kv_heads, inputs.group_size)).flatten(2, 3)
    logits = query @ _anchored(inputs, grid, blocks).to(accurate).mT  # [batch, kv_heads, group * queries, keys]
    if inputs.softcap is not None:
        logits.div_(inputs.softcap).tanh_().mul_(inputs.softcap)
    logits = logits.view(inputs.batch, inputs.kv_heads, inputs.group_size, -1, logits.shape[-1])
    clear = 0  # keys before it are seen by every query here
    if inputs.window is None and inputs.segment is None and inputs.key_valid is None and bool(asked.all()):
        clear = int(high.amin())
    key = torch.arange(clear, blocks * grid.block_k, device=inputs.device) + grid.anchor[:, None]
    hidden = (key[:, None] < low.flatten(1)[..., None]) | (key[:, None] >= high.flatten(1)[..., None])
    if inputs.key_valid is not None:
        hidden |= ~inputs.key_valid.gather(1, key.clamp(max=inputs.keys - 1))[:, None]
    logits[..., clear:].masked_fill_(hidden[:, None, None], -torch.inf)

    peak = logits.amax(-1, keepdim=True).clamp_(min=torch.finfo(accurate).min)  # a query that sees nothing
    mass = logits.sub_(peak).exp_().unflatten(-1, (blocks, grid.block_k)).sum(-1)
    total = mass.sum(-1, keepdim=True)
    lse = (total.log() + peak)[..., 0]
    shape = (inputs.batch, inputs.query_heads, len(rows), grid.block_q)
    return (mass / total.clamp(min=torch.finfo(accurate).tiny)).view(*shape, blocks), lse.view(shape)


def _anchored(inputs: AttentionInputs, grid: BlockGrid, blocks: int) -> Tensor:
    """[batch, kv_heads, blocks * block_k, head_dim]: keys from each batch row's anchor on, a view where that allows."""
    size = blocks * grid.block_k
    if inputs.key_valid is None:
        part = inputs.key[:, :, :size]
        return functional.pad(part, (0, 0, 0, size - part.shape[2])) if part.shape[2] < size else part
    slot = (grid.anchor[:, None] + torch.arange(size, device=inputs.device)).clamp(max=inputs.keys - 1)
    return inputs.key.gather(2, slot[:, None, :, None].expand(-1, inputs.kv_heads, -1, inputs.head_dim))
