"""Scores along antidiagonals on a GPU, reduced to one number for a group of queries and a block of keys.

One program multiplies a tile of query groups, of some query heads that share keys, and a tile of key groups: a matrix
product whose inner dimension walks the tokens of a group, those of the queries from the last, those of the keys from
the first. Tokens are read where they lie; what is no valid token is read as zeros. What leaves the program is the
logsumexp of each query group over each block of keys, so that the scores themselves never reach memory. A program whose
tile lies in the future of all its groups, or before their windows, ends at once.

Letter code: see `triton_forward`. STRIDE tokens are a group, SPAN key groups a block of the grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseprefill.contracts import AttentionInputs
from sparseprefill.kernels.triton_forward import (
    _dot,
    _tanh,
    device_limits,
    interpreted,
    why_not_device,
)

_LOG2E = math.log2(math.e)
_LN2 = tl.constexpr(math.log(2.0))
_LATEST = tl.constexpr(2**31 - 1)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_STRIDES = (4, 8, 16)
_MOST_SPAN = 32  # key groups of a block
_MOST_DIM = 256


@dataclass(frozen=True, slots=True)
class AntidiagonalTiling:
    """How one program is laid out on the hardware."""

    groups: int  # query groups of a head, a power of two
    heads: int  # query heads in one tile, a power of two that divides those that share keys
    keys: int  # key groups of a tile, a power of two, one or more blocks of the grid
    channels: int  # of a token that are multiplied in one step, a power of two
    warps: int
    stages: int  # steps in flight, the one at work included

    def shared_bytes(self, dtype: torch.dtype) -> int:
        """Upper estimate of the shared memory of one program.

        `stages` buffers of queries and keys, which the scores may take over on their way to the sums; 8 KiB for
        reductions.
        """
        rows = self.groups * self.heads
        buffers = self.stages * (rows + self.keys) * self.channels * dtype.itemsize
        return max(buffers, rows * self.keys * 4) + 8192


def antidiagonal_tiling(
    block_k: int, stride: int, group: int, head_dim: int, dtype: torch.dtype, shared_limit: int
) -> AntidiagonalTiling | None:
    """The tiling for blocks of `block_k` keys, `group` query heads a KV head; None where no tile fits.

    Chosen for registers and shared memory (`sparseprefill.kernels.triton_inspect`), never timed.
    """
    wide = dtype == torch.float32  # products without tensor cores leave few registers
    rows, span = 32 if wide else 128, block_k // stride
    # a tile of many small blocks has as many sums, which want registers too
    keys = max(span, 32 if wide else min(128, 32 * span))
    # steps end with a token: a power of two that divides it, or else its rest is masked
    channels = min(head_dim & -head_dim, 32 if wide else 64)
    if channels < 16:
        channels = min(32 if wide else 64, max(16, 1 << (head_dim - 1).bit_length()))
    heads = min(group & -group, rows // 16)
    for stages in (3, 2, 1):
        tiling = AntidiagonalTiling(rows // heads, heads, keys, channels, 4 if wide else 8, stages)
        if tiling.shared_bytes(dtype) <= shared_limit:
            return tiling
    return None


# lengths change from call to call: specialising on them would compile again and again
@triton.jit(
    do_not_specialize=[
        "kv_heads", "groups", "query_start", "queries", "keys", "last_key", "key_groups", "blocks", "scale", "cap",
    ]
)  # fmt: skip
def antidiagonal_kernel(
    p_q, p_k, p_valid, p_occupied, p_anchor, p_first, p_low, p_high, p_out,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qt, stride_qd,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kt, stride_kd,
    kv_heads, groups, query_start, queries, keys, last_key, key_groups, blocks, scale, cap,
    GROUP: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr, SPAN: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_CAP: tl.constexpr, PRECISION: tl.constexpr, PRECISE: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """logsumexp of a tile of query groups over the blocks of a tile of key groups.

    program_id(0) counts tiles of query groups times the query heads of a KV head, HEADS at a time; (1) tiles of key
    groups; (2) KV heads of all batch rows. What no program writes keeps what p_out held.
    """
    TURNS: tl.constexpr = GROUP // HEADS
    TILES: tl.constexpr = BLOCK_T // SPAN
    STEPS: tl.constexpr = (D + BLOCK_C - 1) // BLOCK_C
    i_bg = tl.program_id(2).to(tl.int64)
    i_b, i_kv, i_turn = i_bg // kv_heads, i_bg % kv_heads, tl.program_id(0) % TURNS
    n_t = tl.program_id(1) * BLOCK_T

    # [HEADS * BLOCK_P]
    o_n = tl.arange(0, HEADS * BLOCK_P)
    o_p = tl.program_id(0) // TURNS * BLOCK_P + o_n % BLOCK_P
    o_h = i_turn * HEADS + o_n // BLOCK_P
    m_p = o_p < groups
    b_low = tl.load(p_low + i_b * groups + o_p, mask=m_p, other=0)
    b_high = tl.load(p_high + i_b * groups + o_p, mask=m_p, other=0)
    m_p &= b_low < b_high
    n_low = tl.min(tl.where(m_p, b_low, _LATEST), 0)
    n_high = tl.max(tl.where(m_p, b_high, 0), 0)
    if (n_t >= n_high) | (n_t + BLOCK_T <= n_low):
        return

    n_anchor = tl.load(p_anchor + i_b).to(tl.int32)
    # token of a query group that is multiplied first, and of a key group
    o_q = n_anchor + (tl.load(p_first + i_b).to(tl.int32) + o_p) * STRIDE + (STRIDE - 1)
    # [BLOCK_T]
    o_t = n_t + tl.arange(0, BLOCK_T)
    o_k = n_anchor + o_t * STRIDE
    p_qh = p_q + i_b * stride_qb + (i_kv * GROUP + o_h)[:, None] * stride_qh
    p_kh = p_k + i_b * stride_kb + i_kv * stride_kh
    if HAS_VALID:
        p_valid += i_b * keys

    # [HEADS * BLOCK_P, BLOCK_T]
    b_s = tl.zeros([HEADS * BLOCK_P, BLOCK_T], tl.float32)
    for i_step in range(0, STRIDE * STEPS):
        n_phase = i_step // STEPS
        o_c = i_step % STEPS * BLOCK_C + tl.arange(0, BLOCK_C)
        o_qt, o_kt = o_q - n_phase, o_k + n_phase
        m_q = m_p & (o_qt >= query_start) & (o_qt < query_start + queries)
        m_k = o_kt < last_key
        if HAS_VALID:
            m_q &= tl.load(p_valid + o_qt, mask=m_q, other=0) != 0
            m_k &= tl.load(p_valid + o_kt, mask=m_k, other=0) != 0
        # [HEADS * BLOCK_P, BLOCK_C], [BLOCK_T, BLOCK_C]
        p_qc = p_qh + (o_qt - query_start)[:, None].to(tl.int64) * stride_qt + o_c[None, :].to(tl.int64) * stride_qd
        p_kc = p_kh + o_kt[:, None].to(tl.int64) * stride_kt + o_c[None, :].to(tl.int64) * stride_kd
        if D % BLOCK_C == 0:
            b_q = tl.load(p_qc, mask=m_q[:, None], other=0.0)
            b_k = tl.load(p_kc, mask=m_k[:, None], other=0.0)
        else:
            b_q = tl.load(p_qc, mask=m_q[:, None] & (o_c < D)[None, :], other=0.0)
            b_k = tl.load(p_kc, mask=m_k[:, None] & (o_c < D)[None, :], other=0.0)
        b_s = _dot(b_q, tl.trans(b_k), b_s, PRECISION, WIDEN)
    b_s *= scale
    if HAS_CAP:
        b_s = cap * _tanh(b_s, PRECISE)

    m_s = (o_t[None, :] >= b_low[:, None]) & (o_t[None, :] < b_high[:, None])
    if HAS_VALID:
        m_s &= (tl.load(p_occupied + i_b * key_groups + o_t, mask=o_t < key_groups, other=0) != 0)[None, :]
    # a maximum may pass over NaN: what is not finite is counted
    m_bad = m_s & ((tl.abs(b_s) < float("inf")) == 0)
    b_s = tl.where(m_s, b_s, float("-inf"))
    # [HEADS * BLOCK_P, TILES]
    b_s = tl.reshape(b_s, [HEADS * BLOCK_P, TILES, SPAN])
    b_bad = tl.max(tl.reshape(m_bad.to(tl.int32), [HEADS * BLOCK_P, TILES, SPAN]), 2)
    b_peak = tl.max(b_s, 2)
    b_base = tl.where(b_peak == float("-inf"), 0.0, b_peak)
    b_l = tl.sum(tl.exp2(b_s - b_base[:, :, None]), 2)
    m_some = b_l > 0
    b_lse = tl.where(m_some, (b_base + tl.log2(tl.where(m_some, b_l, 1.0))) * _LN2, float("-inf"))
    b_lse = tl.where(b_bad > 0, float("nan"), b_lse)
    o_n = n_t // SPAN + tl.arange(0, TILES)
    p_row = p_out + ((i_bg * GROUP + o_h) * groups + o_p)[:, None] * blocks
    tl.store(p_row + o_n[None, :], b_lse, mask=m_p[:, None] & (o_n < blocks)[None, :])


def why_not_antidiagonal(inputs: AttentionInputs, block_k: int, stride: int) -> str | None:
    """Why this kernel cannot score blocks of `block_k` keys in groups of `stride`, or None.

    Inputs on the CPU are served by the interpreter alone, for tests; `auto` must not choose that.
    """
    if inputs.query.dtype not in _DTYPES:
        return f"it multiplies float16, bfloat16 and float32, not {inputs.query.dtype}"
    if stride not in _STRIDES:
        return f"it takes groups of {', '.join(map(str, _STRIDES))} tokens, not of {stride}"
    if inputs.head_dim > _MOST_DIM:
        return f"it multiplies head_dim 1 to {_MOST_DIM}, not {inputs.head_dim}"
    span, rest = divmod(block_k, stride)
    if rest or span & (span - 1) or not 1 <= span <= _MOST_SPAN:
        return (
            f"it takes blocks of 1, 2, 4, .. {_MOST_SPAN} groups of {stride} keys, and {block_k} keys are "
            f"{block_k / stride:g}"
        )
    reason = why_not_device(inputs.device)
    if reason is not None:
        return reason
    limits = device_limits(inputs.device)
    if antidiagonal_tiling(block_k, stride, 1, inputs.head_dim, inputs.query.dtype, limits.shared) is None:
        return f"no tile fits into the {limits.shared} bytes of shared memory that a block may use"
    return None


def antidiagonal_arguments(
    inputs: AttentionInputs,
    lse: Tensor,
    tiling: AntidiagonalTiling,
    *,
    stride: int,
    block_k: int,
    anchor: Tensor,
    first_group: Tensor,
    low: Tensor,
    high: Tensor,
    occupied: Tensor | None,
) -> dict[str, object]:
    """What `antidiagonal_kernel` is launched with, by name."""
    # the softmax is computed in base 2: log2(e) goes into whatever factor is applied last to the scores
    scale, cap = inputs.scale / stride * _LOG2E, 0.0
    if inputs.softcap is not None:
        scale, cap = inputs.scale / stride / inputs.softcap, inputs.softcap * _LOG2E
    valid = None if inputs.key_valid is None else inputs.key_valid.contiguous().view(torch.uint8)
    some = None if occupied is None else occupied.contiguous().view(torch.uint8)
    return {
        "p_q": inputs.query, "p_k": inputs.key, "p_valid": valid, "p_occupied": some, "p_anchor": anchor,
        "p_first": first_group, "p_low": low.contiguous(), "p_high": high.contiguous(), "p_out": lse,
        **{f"stride_q{axis}": stride for axis, stride in zip("bhtd", inputs.query.stride(), strict=True)},
        **{f"stride_k{axis}": stride for axis, stride in zip("bhtd", inputs.key.stride(), strict=True)},
        "kv_heads": inputs.kv_heads, "groups": low.shape[1], "query_start": inputs.query_start,
        "queries": inputs.queries, "keys": inputs.keys, "last_key": inputs.last_key,
        "key_groups": 0 if some is None else some.shape[1], "blocks": lse.shape[-1], "scale": scale, "cap": cap,
        "GROUP": inputs.group_size, "D": inputs.head_dim, "STRIDE": stride, "SPAN": block_k // stride,
        "HEADS": tiling.heads, "BLOCK_P": tiling.groups, "BLOCK_T": tiling.keys, "BLOCK_C": tiling.channels,
        "HAS_VALID": valid is not None, "HAS_CAP": inputs.softcap is not None, "PRECISION": "ieee",
        "PRECISE": inputs.query.dtype == torch.float32, "WIDEN": interpreted(),
    }  # fmt: skip


def triton_block_lse(
    inputs: AttentionInputs,
    *,
    stride: int,
    block_k: int,
    anchor: Tensor,
    first_group: Tensor,
    low: Tensor,
    high: Tensor,
    occupied: Tensor | None,
    blocks: int,
    tiling: AntidiagonalTiling | None = None,
) -> Tensor:
    """float32 [batch, query_heads, groups, blocks]: logsumexp of the scores of each query group in each block of keys.

    -inf where a group sees nothing of a block, NaN where one of the scores there is not finite. Products are of the
    inputs' own dtype, summed in float32. Nothing is read back to the host.

    Args:
        inputs: queries and keys are read, where they are valid and were filled.
        stride: tokens of a group.
        block_k: tokens of a block of keys.
        anchor: int64 [batch], the slot where groups and blocks are counted from.
        first_group: int64 [batch], the number of the first query group.
        low, high: int32 [batch, groups]: query group i sees the key groups in [low, high) that are occupied.
        occupied: bool [batch, key groups], or None without padding: those that hold a valid key.
        blocks: how many blocks of keys are computed, from the first.
        tiling: instead of the one that the device asks for.

    Raises NotImplementedError with the reason where the kernel cannot serve.
    """
    reason = why_not_antidiagonal(inputs, block_k, stride)
    if reason is not None:
        raise NotImplementedError(f"triton cannot score antidiagonals: {reason}")
    if tiling is None:
        limits = device_limits(inputs.device)
        tiling = antidiagonal_tiling(
            block_k, stride, inputs.group_size, inputs.head_dim, inputs.query.dtype, limits.shared
        )
    assert tiling is not None
    groups = low.shape[1]
    lse = torch.full((inputs.batch, inputs.query_heads, groups, blocks), -torch.inf, device=inputs.device)
    arguments = antidiagonal_arguments(
        inputs, lse, tiling, stride=stride, block_k=block_k, anchor=anchor, first_group=first_group, low=low,
        high=high, occupied=occupied,
    )  # fmt: skip
    programs = (
        triton.cdiv(groups, tiling.groups) * (inputs.group_size // tiling.heads),
        triton.cdiv(blocks * block_k // stride, tiling.keys),
        inputs.batch * inputs.kv_heads,
    )
    with torch.cuda.device_of(inputs.query):
        antidiagonal_kernel[programs](**arguments, num_warps=tiling.warps, num_stages=tiling.stages)
    return lse
