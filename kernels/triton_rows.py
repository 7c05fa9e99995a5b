"""Logsumexp of dense attention for some queries on a GPU: one Triton program for a tile of them and a span of keys.

The queries of all heads that share keys form one matrix, so that the products are large although the rows are few; the
keys are cut into spans, so that there are programs enough. A program past the last key that its queries see ends at
once. Spans are joined outside. Letter code: see `triton_forward`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseprefill.contracts import AttentionInputs
from sparseprefill.kernels.triton_forward import (
    Tiling,
    _dot,
    _load,
    _tanh,
    choose_tiling,
    device_limits,
    interpreted,
    split_dim,
    why_not_triton,
)

_LOG2E = math.log2(math.e)
_LN2 = tl.constexpr(math.log(2.0))
_SPAN = 1024  # keys of a program


@triton.jit(
    do_not_specialize=[
        "kv_heads", "rows", "queries_together", "keys", "last_key", "scale", "cap",
    ]
)  # fmt: skip
def rows_kernel(
    p_q, p_k, p_low, p_high, p_valid, p_part,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kt, stride_kd,
    kv_heads, rows, queries_together, keys, last_key, scale, cap,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    SPAN: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_LOW: tl.constexpr, HAS_VALID: tl.constexpr, HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr, PRECISE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """lse of a tile of queries over one span of keys; -inf where they see none of them.

    program_id(0) counts query tiles, (1) spans, (2) KV heads of all batch rows.
    """
    i_bh = tl.program_id(2).to(tl.int64)
    i_b, i_h = i_bh // kv_heads, i_bh % kv_heads
    p_q += i_bh * queries_together * D
    p_k += i_b * stride_kb + i_h * stride_kh
    p_part += (tl.program_id(1).to(tl.int64) * tl.num_programs(2) + i_bh) * queries_together
    if HAS_VALID:
        p_valid += i_b * keys

    # [BLOCK_Q]
    o_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_q = o_q < queries_together
    p_bound = i_b * rows + o_q % rows
    b_high = tl.load(p_high + p_bound, mask=m_q, other=0)
    b_low = tl.load(p_low + p_bound, mask=m_q, other=0) if HAS_LOW else b_high
    o_d0, o_d1 = tl.arange(0, D0), D0 + tl.arange(0, D1 if D1 > 0 else 1)
    # [BLOCK_Q, D0], [BLOCK_Q, D1]
    p_row = p_q + o_q[:, None].to(tl.int64) * D
    b_q0 = _load(p_row + o_d0[None, :], m_q, o_d0, D, True, D0 > D)
    b_q1 = b_q0
    if D1 > 0:
        b_q1 = _load(p_row + o_d1[None, :], m_q, o_d1, D, True, D0 + D1 > D)

    b_m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_Q], tl.float32)
    n_from = tl.program_id(1) * SPAN
    n_to = tl.minimum(tl.minimum(n_from + SPAN, last_key), tl.max(b_high, 0))
    for n_key in range(n_from, n_to, BLOCK_K):
        # [BLOCK_K]
        o_k = n_key + tl.arange(0, BLOCK_K)
        m_k = o_k < n_to
        # [BLOCK_K, D0], [BLOCK_K, D1]
        p_tile = p_k + o_k[:, None].to(tl.int64) * stride_kt
        b_k0 = _load(p_tile + o_d0[None, :].to(tl.int64) * stride_kd, m_k, o_d0, D, True, D0 > D)
        # [BLOCK_Q, BLOCK_K]
        b_s = _dot(b_q0, tl.trans(b_k0), None, PRECISION, WIDEN)
        if D1 > 0:
            b_k1 = _load(p_tile + o_d1[None, :].to(tl.int64) * stride_kd, m_k, o_d1, D, True, D0 + D1 > D)
            b_s = _dot(b_q1, tl.trans(b_k1), b_s, PRECISION, WIDEN)
        b_s *= scale
        if HAS_CAP:
            b_s = cap * _tanh(b_s, PRECISE)
        m_s = m_k[None, :] & (o_k[None, :] < b_high[:, None])
        if HAS_LOW:
            m_s &= o_k[None, :] >= b_low[:, None]
        if HAS_VALID:
            m_s &= (tl.load(p_valid + o_k, mask=m_k, other=0) != 0)[None, :]
        b_s = tl.where(m_s, b_s, float("-inf"))
        # [BLOCK_Q]
        b_peak = tl.maximum(b_m, tl.max(b_s, 1))
        b_base = tl.where(b_peak == float("-inf"), 0.0, b_peak)
        b_l = b_l * tl.exp2(b_m - b_base) + tl.sum(tl.exp2(b_s - b_base[:, None]), 1)
        b_m = b_peak

    m_seen = b_l > 0
    b_lse = tl.where(m_seen, (b_m + tl.log2(tl.where(m_seen, b_l, 1.0))) * _LN2, float("-inf"))
    tl.store(p_part + o_q, b_lse, mask=m_q)


def rows_arguments(inputs: AttentionInputs, place: Tensor, tiling: Tiling) -> tuple[dict[str, object], Tensor]:
    """What `rows_kernel` is launched with, by name; and where it writes: [spans, batch, kv_heads, group, rows]."""
    rows = place.shape[1]
    low, high = (bound.gather(1, place).to(torch.int32) for bound in inputs.visible_range())
    picked = place[:, None, :, None].expand(-1, inputs.query_heads, -1, inputs.head_dim)
    spans = max(1, triton.cdiv(inputs.last_key, _SPAN))
    part = torch.empty(
        spans, inputs.batch, inputs.kv_heads, inputs.group_size, rows, dtype=torch.float32, device=inputs.device
    )
    # the softmax is computed in base 2: log2(e) goes into whatever factor is applied last to the logits
    scale, cap = inputs.scale * _LOG2E, 0.0
    if inputs.softcap is not None:
        scale, cap = inputs.scale / inputs.softcap, inputs.softcap * _LOG2E
    d0, d1 = split_dim(inputs.head_dim)
    valid = None if inputs.key_valid is None else inputs.key_valid.contiguous().view(torch.uint8)
    arguments: dict[str, object] = {
        "p_q": inputs.query.gather(2, picked).contiguous(), "p_k": inputs.key, "p_low": low.contiguous(),
        "p_high": high.contiguous(), "p_valid": valid, "p_part": part,
        **{f"stride_k{axis}": stride for axis, stride in zip("bhtd", inputs.key.stride(), strict=True)},
        "kv_heads": inputs.kv_heads, "rows": rows, "queries_together": inputs.group_size * rows, "keys": inputs.keys,
        "last_key": inputs.last_key, "scale": scale, "cap": cap,
        "D": inputs.head_dim, "D0": d0, "D1": d1, "SPAN": _SPAN,
        "BLOCK_Q": tiling.block_q, "BLOCK_K": tiling.block_k,
        "HAS_LOW": inputs.window is not None or inputs.segment is not None, "HAS_VALID": valid is not None,
        "HAS_CAP": inputs.softcap is not None, "PRECISION": "ieee", "PRECISE": inputs.query.dtype == torch.float32,
        "WIDEN": interpreted(),
    }  # fmt: skip
    return arguments, part


def why_not_rows(inputs: AttentionInputs) -> str | None:
    """Why this kernel cannot serve these inputs, or None; the attention kernel may still serve them."""
    reason = why_not_triton(inputs, None)
    if reason is not None:
        return reason
    limits = device_limits(inputs.device)
    if rows_tiling(inputs.head_dim, inputs.query.dtype, limits.shared, limits.capability) is None:
        return f"no tile of rows at head_dim {inputs.head_dim} fits into {limits.shared} bytes of shared memory"
    return None


def triton_row_lse(inputs: AttentionInputs, place: Tensor) -> Tensor:
    """As `row_lse`, but products are of the inputs' own dtype, summed in float32. Nothing is read back to the host.

    Raises NotImplementedError with the reason where the kernels cannot serve the inputs.
    """
    reason = why_not_rows(inputs)
    if reason is not None:
        raise NotImplementedError(f"triton cannot compute this: {reason}")
    limits = device_limits(inputs.device)
    tiling = rows_tiling(inputs.head_dim, inputs.query.dtype, limits.shared, limits.capability)
    assert tiling is not None
    arguments, part = rows_arguments(inputs, place, tiling)
    spans, batch, kv_heads, group, rows = part.shape
    programs = (triton.cdiv(group * rows, tiling.block_q), spans, batch * kv_heads)
    with torch.cuda.device_of(inputs.query):
        rows_kernel[programs](**arguments, num_warps=tiling.warps, num_stages=tiling.stages)
    return part.logsumexp(0).flatten(1, 2)


def rows_tiling(head_dim: int, dtype: torch.dtype, shared_limit: int, capability: tuple[int, int]) -> Tiling | None:
    """Tiles of at most 64 queries and 64 keys; values take no room here, so that more fits than is reckoned."""
    return choose_tiling(head_dim, head_dim, dtype, 64, 64, shared_limit, capability)
