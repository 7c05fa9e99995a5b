"""Logsumexp of dense attention for some queries alone: what a selection's lse is measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs
from sparseprefill.kernels.dispatch import why_not

# logits that plain torch holds at one time: on a CPU what stays in its cache (half as many were slower), else 128 MiB
_CPU_LOGITS, _GPU_LOGITS = 1 << 20, 1 << 25


def row_lse(inputs: AttentionInputs, place: Tensor, impl: str = "auto") -> Tensor:
    """float32 [batch, query_heads, rows]: natural lse over all that the queries `place` (int64 [batch, rows]) may see.

    -inf where a query sees no key. Keys are taken a slab at a time, so memory does not grow with them; nothing is read
    back from a GPU. `impl` as for `block_sparse_attention`: "triton" has a kernel for it, the others run plain torch
    in float32, on any device, as "triton" and "auto" do where no tile of that kernel fits. On the CPU places in rising
    order are cheapest: a slab skips the queries that stand before it.
    """
    if impl == "triton" or (impl == "auto" and inputs.device.type != "cpu" and why_not("triton", inputs) is None):
        from sparseprefill.kernels.triton_rows import triton_row_lse, why_not_rows

        if why_not_rows(inputs) is None:  # float32 at large head dims may fit the attention kernel and not this one
            return triton_row_lse(inputs, place)
    group, rows = inputs.group_size, place.shape[1]
    low, high = (bound.gather(1, place) for bound in inputs.visible_range())
    picked = place[:, None, :, None].expand(-1, inputs.query_heads, -1, inputs.head_dim)
    query = inputs.query.gather(2, picked).float() * inputs.scale
    query = query.unflatten(1, (inputs.kv_heads, group))
    lse = torch.full(query.shape[:-1], -torch.inf, device=inputs.device)
    on_cpu = inputs.device.type == "cpu"
    most = max(1, (_CPU_LOGITS if on_cpu else _GPU_LOGITS) // (inputs.batch * inputs.query_heads * rows))
    plain = inputs.key_valid is None and inputs.window is None and inputs.segment is None
    reach = [(int(a), int(b)) for a, b in zip(*high.aminmax(dim=0), strict=True)] if on_cpu else None
    space = torch.empty(inputs.batch * inputs.query_heads * rows * min(most, inputs.keys), device=inputs.device)
    for start in range(0, inputs.last_key, most):
        stop = min(inputs.last_key, start + most)
        first, clear = 0, rows
        if reach is not None:  # queries before `first` stand before the slab, those from `clear` on see all of it
            first = next((r for r, (_, latest) in enumerate(reach) if latest > start), rows)
            if first == rows:
                continue
            if plain:
                clear = next((r + 1 for r in range(rows - 1, first - 1, -1) if reach[r][0] < stop), first)
        asked = query[:, :, :, first:].flatten(2, 3).flatten(0, 1)
        key = inputs.key[:, :, start:stop].float().flatten(0, 1)
        logits = space[: asked.shape[0] * asked.shape[1] * (stop - start)].view(*asked.shape[:2], stop - start)
        torch.bmm(asked, key.mT, out=logits)
        if inputs.softcap is not None:
            logits.div_(inputs.softcap).tanh_().mul_(inputs.softcap)
        logits = logits.view(inputs.batch, inputs.kv_heads, group, rows - first, stop - start)
        if clear > first:
            slot = torch.arange(start, stop, device=inputs.device)
            hidden = (slot < low[:, first:clear, None]) | (slot >= high[:, first:clear, None])
            if inputs.key_valid is not None:
                hidden |= ~inputs.key_valid[:, None, start:stop]
            logits[:, :, :, : clear - first].masked_fill_(hidden[:, None, None], -torch.inf)
        peak = logits.amax(-1).clamp_(min=torch.finfo(torch.float32).min)  # a query that sees nothing here
        part = logits.sub_(peak[..., None]).exp_().sum(-1).log_().add_(peak)
        lse[:, :, :, first:] = torch.logaddexp(lse[:, :, :, first:], part)
    return lse.flatten(1, 2)
