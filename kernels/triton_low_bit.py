"""Low-bit codes and their products on a GPU: `quantize` and `block_max` of `kernels.low_bit` as Triton programs.

Keys are the rows of the products and queries the columns, so that few queries waste nothing, and so that packed keys
go from memory to the registers that multiply them. Of a byte with two codes, the high half alone is 16 times a code,
and so is the low half moved up: no sign is to be carried, and the factor goes into the scale.

Some query heads of one KV head share a program where their queries fit into its tile, the others run next to it. The
programs of one stretch of keys follow one another, later rows, which are longer, first; one past the last key of its
row ends at once.

Letter code: see `triton_forward`; a_ and c_ are factor and summand of a query. SPAN_K is a block of the grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseprefill.kernels.low_bit import BITS, EstimatedLogits, LowBit, check_bits
from sparseprefill.kernels.triton_forward import _load, _tanh, device_limits, interpreted, why_not_device

_MOST_QUERIES = 128  # of a row of the grid
_MOST_KEYS = 128  # of a block
_PART = 4096  # keys of a program
_LATEST = tl.constexpr(2**31 - 1)
_MOST_DIM = 256
_QUANTIZE_NUMBERS = 4096  # of a half tile that is rounded at once


@dataclass(frozen=True, slots=True)
class LowBitTiling:
    """How one program of `block_max_kernel` is laid out on the hardware."""

    block_k: int  # keys of a tile, a power of two, one or more blocks of the grid
    block_q: int  # queries of a head, a power of two
    heads: int  # query heads in one tile, a power of two that divides the group
    warps: int
    stages: int  # tiles of keys in flight, the one at work included
    registers: int | None  # that a thread may have; None: as many as the compiler likes

    def options(self, uneven: bool, capped: bool) -> dict[str, int]:
        """What the compiler is told; masks and soft-caps get the registers they need."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if self.registers is None or uneven or capped else options | {"maxnreg": self.registers}

    def shared_bytes(self, head_dim: int, bits: int) -> int:
        """Upper estimate of the shared memory of one program.

        `stages` buffers of keys as stored; the queries, one code a byte; 8 KiB for reductions.
        """
        half = code_tile(head_dim)
        stored = half if bits < 8 else 2 * half
        return self.stages * self.block_k * stored + 2 * half * self.block_q * self.heads + 8192


def code_tile(head_dim: int) -> int:
    """Channels of half a vector as a tile: a power of two, at least what a product of bytes takes."""
    half = -(-head_dim // 8) * 4
    return max(32, 1 << (half - 1).bit_length())


def low_bit_tiling(
    block_q: int,
    block_k: int,
    group: int,
    head_dim: int,
    bits: int,
    shared_limit: int,
    capability: tuple[int, int] = (8, 0),
) -> LowBitTiling | None:
    """The tiling for rows of `block_q` queries and blocks of `block_k` keys, `group` query heads a KV head.

    None where no tile fits into shared memory. On capability 9.x products wait for one another, so that three programs
    shall find room side by side, and more queries a tile cost nothing; elsewhere more keys a tile are fewer
    instructions a product. Registers and instructions were counted in what the compiler makes
    (`sparseprefill.kernels.triton_inspect`), not timed.
    """
    queries = max(16, 1 << (block_q - 1).bit_length())
    hopper = capability[0] == 9
    keys = max(block_k, 64 if hopper else 128 * 64 // max(queries, 64))
    heads = min(group & -group, max(1, 128 * 64 // keys // queries))
    warps = 4 if keys * queries * heads <= 128 * 64 else 8
    registers = 168 if hopper and warps == 4 and head_dim <= 128 else None
    for stages in (3, 2, 1):
        tiling = LowBitTiling(keys, queries, heads, warps, stages, registers)
        if tiling.shared_bytes(head_dim, bits) <= shared_limit:
            return tiling
    return None


@triton.jit
def _times_16(b_codes, WIDEN: tl.constexpr):
    """Of bytes that hold two codes, 16 times those in the high halves, and 16 times those in the low halves."""
    if WIDEN:  # the interpreter runs no assembly
        return b_codes & -16, b_codes << 4
    # four bytes at a time, which the compiler would take apart: what is shifted into the next byte is masked away
    return tl.inline_asm_elementwise(
        """
        and.b32 $0, $2, 0xF0F0F0F0;
        shl.b32 $1, $2, 4;
        and.b32 $1, $1, 0xF0F0F0F0;
        """,
        "=&r,=r,r", [b_codes], dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
    )  # fmt: skip


# lengths change from call to call: specialising on them would compile again and again
@triton.jit(do_not_specialize=["kv_heads", "rows", "keys", "key_blocks", "part", "scale", "cap"])
def block_max_kernel(
    p_q, p_qs, p_k, p_ks, p_bias, p_shift, p_reference, p_low, p_high, p_anchor, p_out,
    kv_heads, rows, keys, key_blocks, part, scale, cap,
    GROUP: tl.constexpr, C: tl.constexpr, HALF: tl.constexpr, BLOCK_C: tl.constexpr,
    SPAN_Q: tl.constexpr, SPAN_K: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    UNEVEN: tl.constexpr, HAS_CAP: tl.constexpr, PACKED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The largest scores of one row of the grid, for some query heads, over one part of the keys.

    program_id(0) counts rows, the last one first, times the query heads of a KV head, HEADS at a time; (1) parts of
    `part` keys, a multiple of BLOCK_K; (2) KV heads of all batch rows. What no program writes keeps what p_out held.

    Tiles that all queries of a row see alike are computed without UNEVEN, the others with it: a mask for each query
    takes registers that the rest would miss.
    """
    TURNS: tl.constexpr = GROUP // HEADS
    BLOCKS: tl.constexpr = BLOCK_K // SPAN_K
    i_r = rows - 1 - tl.program_id(0) // TURNS
    i_bg = tl.program_id(2).to(tl.int64)
    i_b, i_h = i_bg // kv_heads, i_bg * GROUP + tl.program_id(0) % TURNS * HEADS  # heads of all batch rows
    n_queries = rows.to(tl.int64) * SPAN_Q

    # [HEADS * BLOCK_Q]
    o_n = tl.arange(0, HEADS * BLOCK_Q)
    o_q = o_n % BLOCK_Q
    p_low += i_b * n_queries + i_r * SPAN_Q + o_q
    p_high += i_b * n_queries + i_r * SPAN_Q + o_q
    b_low = tl.load(p_low, mask=o_q < SPAN_Q, other=0)
    b_high = tl.load(p_high, mask=o_q < SPAN_Q, other=0)
    m_q = b_low < b_high
    n_low, n_all_low = tl.min(tl.where(m_q, b_low, _LATEST), 0), tl.max(tl.where(m_q, b_low, 0), 0)
    n_high, n_all_high = tl.max(tl.where(m_q, b_high, 0), 0), tl.min(tl.where(m_q, b_high, _LATEST), 0)
    n_anchor = tl.load(p_anchor + i_b).to(tl.int32)
    n_low = tl.maximum(n_low, n_anchor)
    n_high = tl.minimum(tl.minimum(n_high, keys), n_anchor + key_blocks * SPAN_K)

    # tiles [i_from, i_to) hold something; all queries that take part see those in [i_clear, i_edge) alike
    i_from, i_to = (n_low - n_anchor) // BLOCK_K, tl.cdiv(n_high - n_anchor, BLOCK_K)
    m_even = (n_all_low <= n_low) & (n_all_high >= n_high)
    i_clear = tl.cdiv(tl.maximum(n_all_low - n_anchor, 0), BLOCK_K)
    i_edge = tl.maximum(tl.minimum(n_all_high, n_high) - n_anchor, 0) // BLOCK_K
    i_clear = tl.where(m_even, i_from, tl.minimum(i_clear, i_to))
    i_edge = tl.where(m_even, i_to, tl.maximum(i_edge, i_clear))
    i_part = tl.program_id(1) * (part // BLOCK_K)
    i_from, i_to = tl.maximum(i_from, i_part), tl.minimum(i_to, i_part + part // BLOCK_K)
    i_clear, i_edge = tl.maximum(i_clear, i_from), tl.minimum(i_edge, i_to)
    if UNEVEN:
        n_clear = tl.maximum(i_edge - i_clear, 0)
        i_to -= n_clear
    else:
        n_clear = 0
        i_from, i_to = i_clear, i_edge
    if i_from >= i_to:
        return

    p_k += i_bg * keys * C
    p_ks += i_bg * keys
    p_bias += i_h * keys
    stride_oh = rows.to(tl.int64) * key_blocks
    p_out += i_h * stride_oh + i_r.to(tl.int64) * key_blocks
    # a query that takes no part scores -inf
    p_row = (i_h + o_n // BLOCK_Q) * n_queries + i_r * SPAN_Q + o_q
    b_a = tl.load(p_qs + p_row, mask=m_q, other=0.0) * scale
    if PACKED:
        b_a *= 0.0625
    b_shift = tl.load(p_shift + p_row, mask=m_q, other=0.0) * scale
    b_c = -tl.load(p_reference + p_row, mask=m_q, other=float("inf"))
    if not HAS_CAP:
        b_c += b_shift
    # [HEADS * BLOCK_Q, BLOCK_C] twice, channels of the first and of the second half
    o_c = tl.arange(0, BLOCK_C)
    p_codes = p_q + p_row[:, None] * C + o_c[None, :]
    b_q0 = _load(p_codes, m_q, o_c, HALF, True, BLOCK_C > HALF)
    if PACKED:
        b_q1 = (b_q0 << 4) >> 4
        b_q0 = b_q0 >> 4
    else:
        b_q1 = _load(p_codes + HALF, m_q, o_c, HALF, True, BLOCK_C > HALF)
    b_q0, b_q1 = tl.trans(b_q0), tl.trans(b_q1)

    o_k, o_h = tl.arange(0, BLOCK_K), tl.arange(0, HEADS)
    for i_step in range(i_from, i_to):
        i_tile = i_step + tl.where(i_step >= i_clear, n_clear, 0) if UNEVEN else i_step
        n_key = n_anchor + i_tile * BLOCK_K
        # [BLOCK_K]
        m_k = o_k < n_high - n_key
        # [BLOCK_K, BLOCK_C] twice
        p_tile = p_k + n_key.to(tl.int64) * C + o_k[:, None].to(tl.int64) * C + o_c[None, :]
        b_k0 = _load(p_tile, m_k, o_c, HALF, True, BLOCK_C > HALF)
        if PACKED:
            b_k0, b_k1 = _times_16(b_k0, WIDEN)
        else:
            b_k1 = _load(p_tile + HALF, m_k, o_c, HALF, True, BLOCK_C > HALF)
        # [BLOCK_K, HEADS * BLOCK_Q]; whole numbers
        b_n = tl.dot(b_k0, b_q0, out_dtype=tl.int32)
        b_n = tl.dot(b_k1, b_q1, b_n, out_dtype=tl.int32)
        # [BLOCK_K], [BLOCK_K, HEADS]; what no query sees has a bias of -inf
        b_ks = tl.load(p_ks + n_key + o_k, mask=m_k, other=0.0)
        p_here = p_bias + n_key + o_k[:, None] + o_h[None, :].to(tl.int64) * keys
        m_here = m_k & (o_k >= n_low - n_key)
        b_bias = tl.load(p_here, mask=m_here[:, None] & (o_h >= 0)[None, :], other=float("-inf")) * scale
        b_s = b_n.to(tl.float32) * b_ks[:, None] * b_a[None, :]
        if HAS_CAP:
            b_each = tl.broadcast_to(b_bias[:, :, None], [BLOCK_K, HEADS, BLOCK_Q])
            b_each = tl.reshape(b_each, [BLOCK_K, HEADS * BLOCK_Q])
            b_s = cap * _tanh((b_s + b_each + b_shift[None, :]) / cap, True)
        b_s += b_c[None, :]
        if UNEVEN:
            # read again, as registers are dear
            b_low, b_high = tl.load(p_low, mask=m_q, other=0), tl.load(p_high, mask=m_q, other=0)
            m_s = (o_k[:, None] >= (b_low - n_key)[None, :]) & (o_k[:, None] < (b_high - n_key)[None, :])
            b_s = tl.where(m_s, b_s, float("-inf"))
        # [BLOCK_K, HEADS], then [BLOCKS, HEADS]
        b_best = tl.max(tl.reshape(b_s, [BLOCK_K, HEADS, BLOCK_Q]), 2)
        if HAS_CAP:
            b_best = tl.where(b_bias == float("-inf"), float("-inf"), b_best)
        else:
            b_best += b_bias  # the same for all queries, so that it may be added after the maximum
        b_best = tl.max(tl.reshape(b_best, [BLOCKS, SPAN_K, HEADS]), 1)
        o_block = i_tile * BLOCKS + tl.arange(0, BLOCKS)
        p_best = p_out + o_h[None, :].to(tl.int64) * stride_oh + o_block[:, None]
        tl.store(p_best, b_best, mask=(o_block < key_blocks)[:, None] & (o_h >= 0)[None, :])


def why_not_triton_low_bit(
    device: torch.device, dtype: torch.dtype, bits: int, head_dim: int, block_q: int, block_k: int
) -> str | None:
    """Why this kernel cannot score such tiles, or None. `dtype` is that of scales and scores."""
    if bits not in BITS:
        return f"it multiplies codes of {', '.join(map(str, BITS))} bits, not of {bits}"
    if dtype != torch.float32:
        return f"it computes scores in float32, not in {dtype}"
    if not 1 <= head_dim <= _MOST_DIM:
        return f"it computes head_dim 1 to {_MOST_DIM}, not {head_dim}"
    if not 16 <= block_q <= _MOST_QUERIES:
        return f"it computes rows of 16 to {_MOST_QUERIES} queries, not of {block_q}"
    if not 16 <= block_k <= _MOST_KEYS or block_k & (block_k - 1):
        return f"it computes blocks of 16, 32, 64 or {_MOST_KEYS} keys, not of {block_k}"
    reason = why_not_device(device)
    if reason is not None:
        return reason
    limits = device_limits(device)
    if low_bit_tiling(block_q, block_k, 1, head_dim, bits, limits.shared, limits.capability) is None:
        return f"no tile fits into the {limits.shared} bytes of shared memory that a block may use"
    return None


def block_max_arguments(
    logits: EstimatedLogits, best: Tensor, tiling: LowBitTiling, part: int, uneven: bool
) -> dict[str, object]:
    """What `block_max_kernel` is launched with, by name."""
    size = logits.key.codes.shape[-1]
    packed = logits.key.bits < 8
    return {
        "p_q": logits.query.codes.contiguous(), "p_qs": logits.query.scale.contiguous(),
        "p_k": logits.key.codes.contiguous(), "p_ks": logits.key.scale.contiguous(),
        "p_bias": logits.bias.contiguous(), "p_shift": logits.shift.contiguous(),
        "p_reference": logits.reference.contiguous(), "p_low": logits.low.contiguous(),
        "p_high": logits.high.contiguous(), "p_anchor": logits.anchor, "p_out": best,
        "kv_heads": logits.key.codes.shape[1], "rows": logits.rows, "keys": logits.key.codes.shape[2],
        "key_blocks": logits.key_blocks, "part": part, "scale": logits.scale, "cap": logits.softcap or 0.0,
        "GROUP": logits.group_size, "C": size, "HALF": size if packed else size // 2,
        "BLOCK_C": code_tile(logits.key.head_dim), "SPAN_Q": logits.block_q, "SPAN_K": logits.block_k,
        "HEADS": tiling.heads, "BLOCK_Q": tiling.block_q, "BLOCK_K": tiling.block_k,
        "UNEVEN": uneven, "HAS_CAP": logits.softcap is not None, "PACKED": packed, "WIDEN": interpreted(),
    }  # fmt: skip


def triton_block_max(logits: EstimatedLogits, *, tiling: LowBitTiling | None = None) -> Tensor:
    """`block_max`, with products of int8 summed in int32. Nothing is read back to the host.

    Raises NotImplementedError with the reason where the kernel cannot serve.
    """
    device, key = logits.bias.device, logits.key
    reason = why_not_triton_low_bit(
        device, logits.bias.dtype, key.bits, key.head_dim, logits.block_q, logits.block_k
    )  # fmt: skip
    if reason is not None:
        raise NotImplementedError(f"triton cannot score tiles: {reason}")
    if tiling is None:
        limits = device_limits(device)
        tiling = low_bit_tiling(
            logits.block_q, logits.block_k, logits.group_size, key.head_dim, key.bits, limits.shared, limits.capability
        )
    assert tiling is not None
    batch, heads = logits.query.codes.shape[:2]
    best = torch.full((batch, heads, logits.rows, logits.key_blocks), -torch.inf, device=device)
    turns = logits.rows * (logits.group_size // tiling.heads)
    length = triton.cdiv(logits.key_blocks * logits.block_k, _PART) * _PART
    with torch.cuda.device_of(best):
        # tiles that a row's queries see differently are few: one program takes all of a row
        for part, uneven in ((_PART, False), (length, True)):
            arguments = block_max_arguments(logits, best, tiling, part, uneven)
            programs = (turns, length // part, key.codes.shape[0] * key.codes.shape[1])
            block_max_kernel[programs](**arguments, **tiling.options(uneven, logits.softcap is not None))
    return best


@triton.jit
def _centred(
    p_x, p_mean, p_real, o_t, m_t, o_c, stride_xt, stride_xd,
    D: tl.constexpr, HALF: tl.constexpr, HAS_REAL: tl.constexpr,
):  # fmt: skip
    """Vectors minus their mean, both halves of the channels; 0 where there is none and where a token is not real."""
    if HAS_REAL:
        m_t &= tl.load(p_real + o_t, mask=m_t, other=0) != 0
    p_tile = p_x + o_t[:, None].to(tl.int64) * stride_xt + o_c[None, :].to(tl.int64) * stride_xd
    m_c0, m_c1 = o_c < (HALF if HALF < D else D), (o_c < HALF) & (o_c < D - HALF)
    m_x0, m_x1 = m_t[:, None] & m_c0[None, :], m_t[:, None] & m_c1[None, :]
    b_x0 = tl.load(p_tile, mask=m_x0, other=0.0).to(tl.float32)
    b_x1 = tl.load(p_tile + HALF * stride_xd, mask=m_x1, other=0.0).to(tl.float32)
    b_x0 -= tl.load(p_mean + o_c, mask=m_c0, other=0.0)[None, :]
    b_x1 -= tl.load(p_mean + HALF + o_c, mask=m_c1, other=0.0)[None, :]
    return tl.where(m_x0, b_x0, 0.0), tl.where(m_x1, b_x1, 0.0)


@triton.jit
def _largest(b_x0, b_x1):
    """[BLOCK_T]: the largest magnitude of each vector, NaN if one of its numbers is."""
    b_most = tl.maximum(tl.max(tl.abs(b_x0), 1), tl.max(tl.abs(b_x1), 1))
    b_bad = tl.maximum(tl.max((b_x0 != b_x0).to(tl.int32), 1), tl.max((b_x1 != b_x1).to(tl.int32), 1))
    return tl.where(b_bad > 0, float("nan"), b_most)


@triton.jit
def _code(b_x, b_factor, MOST: tl.constexpr):
    """Rounded to whole numbers, half to even; 0 for what is not finite."""
    b_x = b_x * b_factor
    b_x = tl.where(tl.abs(b_x) < float("inf"), b_x, 0.0)
    b_floor = tl.floor(b_x)
    b_rest = b_x - b_floor
    b_floor = tl.minimum(tl.maximum(b_floor, -MOST - 1.0), MOST + 0.0).to(tl.int32)
    b_up = (b_rest > 0.5) | ((b_rest == 0.5) & (b_floor % 2 != 0))
    b_n = b_floor + b_up.to(tl.int32)
    return tl.minimum(tl.maximum(b_n, -MOST), MOST)


@triton.jit
def _largest_of(n_most, b_most):
    """The largest number of all, NaN if one of them is."""
    n_bad = tl.max((b_most != b_most).to(tl.int32), 0)
    n_new = tl.maximum(n_most, tl.max(tl.where(b_most == b_most, b_most, 0.0), 0))
    return tl.where((n_bad > 0) | (n_most != n_most), float("nan"), n_new)


@triton.jit
def _write(
    p_codes, p_scale, o_t, m_t, o_c, b_x0, b_x1, b_most,
    C: tl.constexpr, HALF: tl.constexpr, MOST: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    b_whole = tl.full(b_most.shape, MOST, tl.float32)
    b_factor = tl.div_rn(b_whole, b_most)[:, None]
    b_n0, b_n1 = _code(b_x0, b_factor, MOST), _code(b_x1, b_factor, MOST)
    p_tile = p_codes + o_t[:, None].to(tl.int64) * C + o_c[None, :]
    m_tile = m_t[:, None] & (o_c < HALF)[None, :]
    if PACKED:
        tl.store(p_tile, ((b_n0 << 4) | (b_n1 & 15)).to(tl.int8), mask=m_tile)
    else:
        tl.store(p_tile, b_n0.to(tl.int8), mask=m_tile)
        tl.store(p_tile + HALF, b_n1.to(tl.int8), mask=m_tile)
    tl.store(p_scale + o_t, tl.where((b_most > 0) & (b_most < float("inf")), tl.div_rn(b_most, b_whole), 1.0), mask=m_t)


@triton.jit(do_not_specialize=["heads", "tokens"])
def quantize_kernel(
    p_x, p_mean, p_real, p_anchor, p_codes, p_scale,
    stride_xb: tl.int64, stride_xh: tl.int64, stride_xt, stride_xd, heads, tokens,
    D: tl.constexpr, C: tl.constexpr, HALF: tl.constexpr, BLOCK_C: tl.constexpr,
    SPAN: tl.constexpr, BLOCK_T: tl.constexpr, MOST: tl.constexpr,
    HAS_REAL: tl.constexpr, HAS_ANCHOR: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Codes and scales of the vectors of one head: a tile of them that have scales of their own, or one group.

    program_id(0) counts tiles or groups, (1) heads of all batch rows. The first group is what stands before the place
    where the first whole one begins. Compiled without fused products: they would round once where torch does twice.
    """
    TILES: tl.constexpr = (SPAN + BLOCK_T - 1) // BLOCK_T
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    p_x += i_b * stride_xb + i_h * stride_xh
    p_mean += i_bh * D
    p_codes += i_bh * tokens * C
    p_scale += i_bh * tokens
    if HAS_REAL:
        p_real += i_b * tokens
    if SPAN == 1:
        n_from = tl.program_id(0) * BLOCK_T
        n_to = tokens
    else:
        n_phase = tl.load(p_anchor + i_b) % SPAN if HAS_ANCHOR else 0
        n_phase = tl.where(n_phase < 0, n_phase + SPAN, n_phase).to(tl.int32)
        n_from = n_phase + (tl.program_id(0) - 1) * SPAN
        n_to = tl.minimum(n_from + SPAN, tokens)

    o_c = tl.arange(0, BLOCK_C)
    # [BLOCK_T, BLOCK_C] twice, channels of the first and of the second half
    o_t = n_from + tl.arange(0, BLOCK_T)
    m_t = (o_t >= 0) & (o_t < n_to)
    b_x0, b_x1 = _centred(
        p_x, p_mean, p_real, o_t, m_t, o_c, stride_xt, stride_xd, D, HALF, HAS_REAL
    )  # fmt: skip
    b_most = _largest(b_x0, b_x1)
    if SPAN > 1:
        n_most = _largest_of(0.0, b_most)
        for i_tile in range(1, TILES):
            o_t = n_from + i_tile * BLOCK_T + tl.arange(0, BLOCK_T)
            m_t = (o_t >= 0) & (o_t < n_to)
            b_y0, b_y1 = _centred(p_x, p_mean, p_real, o_t, m_t, o_c, stride_xt, stride_xd, D, HALF, HAS_REAL)
            n_most = _largest_of(n_most, _largest(b_y0, b_y1))
        b_most = tl.zeros([BLOCK_T], tl.float32) + n_most
    o_t = n_from + tl.arange(0, BLOCK_T)
    m_t = (o_t >= 0) & (o_t < n_to)
    _write(p_codes, p_scale, o_t, m_t, o_c, b_x0, b_x1, b_most, C, HALF, MOST, PACKED)
    for i_tile in range(1, TILES):
        o_t = n_from + i_tile * BLOCK_T + tl.arange(0, BLOCK_T)
        m_t = (o_t >= 0) & (o_t < n_to)
        b_y0, b_y1 = _centred(p_x, p_mean, p_real, o_t, m_t, o_c, stride_xt, stride_xd, D, HALF, HAS_REAL)
        _write(p_codes, p_scale, o_t, m_t, o_c, b_y0, b_y1, b_most, C, HALF, MOST, PACKED)


def why_not_triton_quantize(vectors: Tensor, bits: int) -> str | None:
    """Why `triton_quantize` cannot serve, or None."""
    if bits not in BITS:
        return f"it makes codes of {', '.join(map(str, BITS))} bits, not of {bits}"
    if vectors.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it rounds float16, bfloat16 and float32, not {vectors.dtype}"
    if not 1 <= vectors.shape[-1] <= _MOST_DIM:
        return f"it rounds head_dim 1 to {_MOST_DIM}, not {vectors.shape[-1]}"
    return why_not_device(vectors.device)


def quantize_arguments(
    vectors: Tensor, mean: Tensor, codes: LowBit, group_size: int, anchor: Tensor | None, real: Tensor | None
) -> dict[str, object]:
    """What `quantize_kernel` is launched with, by name; it writes into `codes`."""
    size, bits, dim = codes.codes.shape[-1], codes.bits, vectors.shape[-1]
    half = code_tile(dim)
    together = max(16, _QUANTIZE_NUMBERS // half)
    if group_size > 1:
        together = min(together, 1 << (group_size - 1).bit_length())
    return {
        "p_x": vectors, "p_mean": mean.float().contiguous(),
        "p_real": None if real is None else real.contiguous().view(torch.uint8),
        "p_anchor": anchor, "p_codes": codes.codes, "p_scale": codes.scale,
        **{f"stride_x{axis}": stride for axis, stride in zip("bhtd", vectors.stride(), strict=True)},
        "heads": vectors.shape[1], "tokens": vectors.shape[2],
        "D": dim, "C": size, "HALF": size if bits < 8 else size // 2, "BLOCK_C": half,
        "SPAN": group_size, "BLOCK_T": together, "MOST": 2 ** (bits - 1) - 1,
        "HAS_REAL": real is not None, "HAS_ANCHOR": anchor is not None, "PACKED": bits < 8,
    }  # fmt: skip


def triton_quantize(
    vectors: Tensor,
    mean: Tensor,
    bits: int,
    *,
    group_size: int = 1,
    anchor: Tensor | None = None,
    real: Tensor | None = None,
) -> LowBit:
    """`quantize`: the same codes and scales, in one pass that holds nothing widened in memory.

    Args:
        vectors: [batch, heads, tokens, dim] of any strides; `mean` [batch, heads, dim].
        bits: 2, 4 or 8.
        group_size: consecutive tokens that share a scale, in steps counted from `anchor`.
        anchor: int64 [batch], a token, or a place before or behind them all, where a group begins; None: token 0.
        real: bool [batch, tokens]; what is not real gets zeros and has no say in a scale.

    Nothing is read back to the host. Raises NotImplementedError with the reason where the kernel cannot serve,
    ValueError for a group without tokens.
    """
    check_bits(bits)
    if group_size < 1:
        raise ValueError(f"a group holds at least one token, got {group_size}")
    reason = why_not_triton_quantize(vectors, bits)
    if reason is not None:
        raise NotImplementedError(f"triton cannot round these vectors: {reason}")
    batch, heads, tokens, dim = vectors.shape
    channels = -(-dim // 8) * 8
    codes = LowBit(
        torch.empty(
            batch, heads, tokens, channels if bits == 8 else channels // 2, dtype=torch.int8, device=vectors.device
        ),
        torch.empty(batch, heads, tokens, dtype=torch.float32, device=vectors.device),
        bits,
        dim,
    )
    arguments = quantize_arguments(vectors, mean, codes, group_size, anchor, real)
    together = int(str(arguments["BLOCK_T"]))
    groups = triton.cdiv(tokens, together) if group_size == 1 else triton.cdiv(tokens, group_size) + 1
    with torch.cuda.device_of(vectors):
        quantize_kernel[(groups, batch * heads)](**arguments, num_warps=4, enable_fp_fusion=False)
    return codes
