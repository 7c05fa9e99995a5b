"""Attention of many queries to keys that all of them see: no mask, so that grouped heads are just more queries.

The keys of a fixed context lie before every question, so nothing of them is masked, and queries of several questions
may stand beside each other. Results are parts, to be joined by `join_outputs`.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOGITS = 1 << 24  # that are held at one time where the fused operator does not serve


def shared_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Every query of a head attends to all its keys.

    Args:
        query: [heads, queries, head_dim].
        key, value: [heads, keys, head_dim] and [heads, keys, value_dim]; there may be no keys.
        scale, softcap: of the logits.

    Returns:
        float32 output [heads, queries, value_dim], and lse float32 [heads, queries]: 0 and -inf without keys.
    """
    heads, queries, _ = query.shape
    if not key.shape[1] or not queries:
        return _nothing(query, value)
    same = key.shape[-1] == value.shape[-1]
    if query.device.type == "cpu" and softcap is None and same and query.dtype is key.dtype is value.dtype:
        query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[None], key[None], value[None], 0.0, False, attn_mask=None, scale=scale
        )
        return output[0].float(), lse[0].float()
    parts = []
    for some in query.split(max(1, _LOGITS // (heads * key.shape[1])), 1):
        logits = _capped(torch.bmm(some.float(), key.float().mT) * scale, softcap)
        lse = logits.logsumexp(-1)
        parts.append((torch.bmm((logits - lse[..., None]).exp(), value.float()), lse))
    return torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts], 1)


def chosen_attention(
    query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Every block of queries attends to the keys that were chosen for it: they are gathered, and nothing else is read.

    Keys and values may lie on the CPU while the queries are on a GPU: what was chosen is sent there.

    Args:
        query: [heads, blocks, queries, head_dim].
        key, value: [heads, keys, head_dim] and [heads, keys, value_dim].
        chosen: bool [heads, blocks, keys], where the keys are.
        scale, softcap: of the logits.

    Returns:
        As `shared_attention`: [heads, blocks, queries, value_dim] and [heads, blocks, queries].
    """
    if query.device.type == "cuda":
        return _padded(query, key, value, chosen, scale, softcap)
    outputs, lses = [], []
    for head in range(query.shape[0]):
        for block in range(query.shape[1]):
            ids = chosen[head, block].nonzero()[:, 0]
            own_key, own_value = (t[head].index_select(0, ids)[None] for t in (key, value))
            output, lse = shared_attention(query[head, block][None], own_key, own_value, scale, softcap)
            outputs.append(output[0])
            lses.append(lse[0])
    shape = query.shape[:2]
    return torch.stack(outputs).unflatten(0, shape), torch.stack(lses).unflatten(0, shape)


def _padded(
    query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Some blocks at once, as many keys as their longest list has: one read of the counts, and few launches."""
    counts = chosen.sum(-1)
    longest = counts.amax(0).tolist()
    width = key.shape[-1] + value.shape[-1] + query.shape[2]
    parts: list[tuple[Tensor, Tensor]] = []
    start = 0
    while start < len(longest):
        stop, most = start + 1, longest[start]
        while stop < len(longest):
            wider = max(most, longest[stop])
            if len(query) * (stop + 1 - start) * wider * width > _LOGITS:
                break
            stop, most = stop + 1, wider
        some = slice(start, stop)
        parts.append(_of_blocks(query[:, some], key, value, chosen[:, some], counts[:, some], most, scale, softcap))
        start = stop
    return torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts], 1)


def _of_blocks(
    query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, count: Tensor, most: int, scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if not most:
        return _nothing(query, value)
    ids = chosen.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :most]
    place = torch.arange(len(chosen), device=ids.device)[:, None, None]
    own_key, own_value = (t[place, ids].to(query.device, non_blocking=True).float() for t in (key, value))
    real = (torch.arange(most, device=ids.device) < count[..., None]).to(query.device)
    logits = _capped(torch.einsum("hbqd,hbkd->hbqk", query.float(), own_key) * scale, softcap)
    logits = logits.masked_fill(~real[:, :, None], -torch.inf)
    lse = logits.logsumexp(-1)
    weight = (logits - lse[..., None]).exp().nan_to_num_(0.0)  # a block without keys: -inf - -inf
    return torch.einsum("hbqk,hbkd->hbqd", weight, own_value), lse


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Grouped attention over few keys with a mask, all logits at once.

    Args:
        query: [batch, query_heads, queries, head_dim].
        key, value: [batch, kv_heads, keys, ...].
        visible: bool [batch, queries, keys].
        scale, softcap: of the logits.

    Returns:
        float32 output [batch, query_heads, queries, value_dim] and lse [batch, query_heads, queries]; a query that sees
        nothing has 0 and -inf.
    """
    grouped = query.float().unflatten(1, (key.shape[1], -1))
    logits = _capped(torch.einsum("bhgqd,bhkd->bhgqk", grouped, key.float()) * scale, softcap)
    logits = logits.masked_fill(~visible[:, None, None], -torch.inf)
    lse = logits.logsumexp(-1)
    weight = (logits - lse[..., None]).exp().masked_fill((lse == -torch.inf)[..., None], 0.0)
    return torch.einsum("bhgqk,bhkd->bhgqd", weight, value.float()).flatten(1, 2), lse.flatten(1, 2)


def key_lse(query: Tensor, key: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    """float32 [heads, queries]: the logsumexp of the logits of [heads, queries, dim] and [heads, keys, dim]."""
    parts = []
    for some in query.split(max(1, _LOGITS // (query.shape[0] * max(1, key.shape[1]))), 1):
        parts.append(_capped(torch.bmm(some.float(), key.float().mT) * scale, softcap).logsumexp(-1))
    return torch.cat(parts, 1)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _nothing(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    output = query.new_zeros(*query.shape[:-1], value.shape[-1], dtype=torch.float32)
    return output, torch.full(query.shape[:-1], -torch.inf, dtype=torch.float32, device=query.device)
