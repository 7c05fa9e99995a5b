"""The GPU path: one Triton program for each listed row (a grid row of one head of one batch row), forward only.

Where neighbouring heads of a KV group share their lists, one program takes the row of several of them, stacked in its
tile, so that each tile of keys and values is loaded once for all of them.

A program walks its list in ascending order. Tiles that all its queries see entirely lie in one stretch of the list and
run without any mask; the few before (window, segments) and after them (diagonal, key_length, holes) run with one.
Rows are launched longest first, heads that fit the L2 cache together, so that no long row is left for the end.

Where the index has `skip`, lists whose threshold is above -inf are walked in the order of visits instead. Each tile's
products are made and its rows' maxima compared; exponentials, values and the second product stand behind a branch. The
decision is for the tile of one iteration and the queries of one program: that is the grid's tile where the tiling takes
it whole, else a part of it. No value is fetched ahead there, as none may be needed.

Letter code inside the kernels: p_ pointer, i_ id, n_ scalar count or bound, o_ offsets, m_ mask, b_ tile.
SPAN_Q x SPAN_K are the block sizes of the index, BLOCK_Q x BLOCK_K the tile that one iteration computes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional
from triton.tools.tensor_descriptor import TensorDescriptor

from sparseprefill.contracts import AttentionInputs, AttentionOutput, BlockIndex

_LOG2E = math.log2(math.e)
_LN2 = tl.constexpr(math.log(2.0))
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How one program is laid out on the hardware."""

    block_q: int  # rows of a tile, a power of two: queries of all its heads
    block_k: int  # keys of a tile, a power of two
    warps: int
    stages: int  # tiles of keys and values in flight, the one at work included
    heads: int = 1  # query heads of a tile, a power of two: they share a list and a KV head
    descriptors: bool = False  # the copy engine (TMA) fetches the tiles that need no mask; see `why_not_descriptors`
    specialise: bool = False  # some warps do nothing but fetch, never chosen; see `why_not_specialised`

    @property
    def queries(self) -> int:
        """Queries of a tile, of each of its heads."""
        return self.block_q // self.heads

    def shared_bytes(self, head_dim: int, value_dim: int, dtype: torch.dtype) -> int:
        """Upper estimate of the shared memory of one program.

        `stages` buffers of a key and a value tile; the query tile; the float32 probabilities on their way from one
        product to the next; 4 KiB for barriers and reductions. float32 takes a key and a query tile more, into which
        "tf32x3" splits.
        """
        key_dim, value_dim = sum(split_dim(head_dim)), sum(split_dim(value_dim))
        wide = dtype == torch.float32
        buffers = self.stages * self.block_k * (key_dim + value_dim) + wide * self.block_k * key_dim
        queries = (1 + wide) * self.block_q * key_dim
        return (buffers + queries) * dtype.itemsize + self.block_q * self.block_k * 4 + 4096


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """What a device says about itself."""

    capability: tuple[int, int]
    shared: int  # bytes a block may use
    cache: int  # bytes of L2


# nothing limits the interpreter: tile as on a small GPU
_INTERPRETER_LIMITS = DeviceLimits((8, 0), 99 << 10, 32 << 20)


def split_dim(dim: int) -> tuple[int, int]:
    """Two tile widths, powers of two (the second may be 0), that hold `dim` with little padding: 80 -> 64, 16."""
    first = max(16, 1 << (dim.bit_length() - 1))
    rest = dim - first
    return (first, 0) if rest <= 0 else (first, max(16, 1 << (rest - 1).bit_length()))


def choose_tiling(
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    block_q: int,
    block_k: int,
    shared_limit: int,
    capability: tuple[int, int] = (8, 0),
    skip: bool = False,
    heads: int = 1,
) -> Tiling | None:
    """The first tiling, most wanted first, that serves blocks of block_q x block_k and fits; None if none does.

    `heads`: so many may be stacked in a tile (`stackable_heads`). They are where their queries leave room, so that a
    key loaded once meets as many rows as registers hold: 64 queries of two heads take what 128 of one take.

    Registers set the largest tile (`python -m sparseprefill.kernels.triton_inspect` shows spills), shared memory the
    rest. From capability 9.0 on the tensor cores read their operands from shared memory, which leaves registers for
    larger tiles; float32 products without tensor cores leave few. `skip`: for lists whose tiles may be skipped, where
    the branch takes registers: wide heads are spread over more warps.
    """
    widest = max(sum(split_dim(head_dim)), sum(split_dim(value_dim)))
    if dtype == torch.float32:
        most_queries, most_keys, most_stages = (32, 32, 2) if widest <= 64 else (32, 16, 2)
    elif widest <= 64 and (9, 0) <= capability < (10, 0) and not skip:
        # what a step costs beside its products is nearly the same for twice the keys; on 10.0 these spill
        most_queries, most_keys, most_stages = 128, 128, 3
    elif capability >= (9, 0):
        most_queries, most_keys, most_stages = (128, 64, 3) if widest <= 128 else (64, 64, 2)
    elif widest <= 128:
        most_queries, most_keys, most_stages = 128, 64 if widest <= 64 else 32, 3
    else:
        most_queries, most_keys, most_stages = 64, 32, 2
    for keys in (most_keys, most_keys // 2, most_keys // 4):
        for queries in (most_queries, most_queries // 2, most_queries // 4):
            tile_q, tile_k = _tile_of(block_q, max(16, queries)), _tile_of(block_k, max(16, keys))
            stacked = min(heads, max(1, queries // tile_q))
            small = stacked * tile_q <= 64 and widest <= (64 if skip else 128) and dtype != torch.float32
            # a third stage of wide tiles would take the room of a second program of 4 warps
            deepest = min(2, most_stages) if small and widest > 64 and capability >= (9, 0) else most_stages
            for stages in range(deepest, 0, -1):
                tiling = Tiling(stacked * tile_q, tile_k, 4 if small else 8, stages, stacked)
                if tiling.shared_bytes(head_dim, value_dim, dtype) <= shared_limit:
                    return tiling
    return None


def _tile_of(span: int, most: int) -> int:
    """A power of two between 16 and `most` that divides a block of `span`, or else covers it with a masked rest."""
    divisor = min(span & -span, most)
    if divisor >= min(32, most):
        return divisor
    return min(max(16, 1 << (span - 1).bit_length()), most)


@triton.jit
def _tiles_below(p_list, n_list, i_low, i_high, n_bound, SPAN_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """How many tiles of an ascending list begin before `n_bound`, counted from the anchor."""
    TILES: tl.constexpr = (SPAN_K + BLOCK_K - 1) // BLOCK_K
    n_bound = tl.maximum(n_bound, 0)
    n_block = (n_bound + SPAN_K - 1) // SPAN_K
    # ascending ids between i_low and i_high leave few places: a dense stretch needs no search at all
    n_from = tl.maximum(n_list - tl.maximum(i_high + 1 - n_block, 0), 0)
    n_to = tl.minimum(n_list, tl.maximum(n_block - i_low, 0))
    while n_from < n_to:
        n_mid = (n_from + n_to) // 2
        m_below = tl.load(p_list + n_mid) < n_block
        n_from = tl.where(m_below, n_mid + 1, n_from)
        n_to = tl.where(m_below, n_to, n_mid)
    if TILES > 1:
        n_begin = tl.load(p_list + tl.maximum(n_from - 1, 0)) * SPAN_K
        n_inside = tl.minimum((n_bound - n_begin + BLOCK_K - 1) // BLOCK_K, TILES)
        n_from = tl.where(n_from > 0, (n_from - 1) * TILES + n_inside, 0)
    return n_from


@triton.jit
def _block_of(p_list, n_list, i_t, TILES: tl.constexpr):
    """The id of the block that tile `i_t` of a list lies in; past the end, of the last."""
    return tl.load(p_list + tl.maximum(tl.minimum(i_t // TILES, n_list - 1), 0))


@triton.jit
def _step_over(i_t, i_from, n_length):
    return i_t + tl.where(i_t >= i_from, n_length, 0)


@triton.jit
def _tanh(b_x, PRECISE: tl.constexpr):
    b_t = 1.0 - 2.0 / (1.0 + tl.exp2(b_x * 2.8853900817779268))
    if PRECISE:
        # near 0 the difference above cancels
        b_x2 = b_x * b_x
        b_series = -17.0 / 315.0 + b_x2 * (62.0 / 2835.0)
        b_series = b_x * (1.0 + b_x2 * (-1.0 / 3.0 + b_x2 * (2.0 / 15.0 + b_x2 * b_series)))
        b_t = tl.where(b_x2 < 0.09, b_series, b_t)
    return b_t


@triton.jit
def _dot(b_a, b_b, b_sum, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    # the interpreter stores bfloat16 as integers and would multiply those
    if WIDEN:
        b_a, b_b = b_a.to(tl.float32), b_b.to(tl.float32)
    return tl.dot(b_a, b_b, b_sum, input_precision=PRECISION)


@triton.jit
def _nan_or_larger(b_x, b_y):
    return tl.maximum(b_x, b_y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _row_peaks(b_s, WIDEN: tl.constexpr):
    """The largest logit of each row, NaN where one is: `tl.max` would drop it."""
    if WIDEN:
        # the interpreter reduces with a function of ours one number at a time
        b_nan = tl.sum((b_s != b_s).to(tl.int32), 1) > 0
        return tl.where(b_nan, float("nan"), tl.max(tl.where(b_s != b_s, float("-inf"), b_s), 1))
    return tl.reduce(b_s, 1, _nan_or_larger)


@triton.jit
def _logits(
    b_q0, b_q1, p_k, d_k, i_b, i_kv, stride_kt, stride_kd, i_block, n_tile, n_anchor, n_stop, scale, cap,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, SPAN_K: tl.constexpr, BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr, DESCRIBED: tl.constexpr, HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr, PRECISE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Products of all queries with tile `n_tile` of a block, before the scale but for a soft-cap; which keys exist."""
    n_key = n_anchor + i_block * SPAN_K + n_tile
    o_k = tl.arange(0, BLOCK_K)
    o_d0, o_d1 = tl.arange(0, D0), D0 + tl.arange(0, D1 if D1 > 0 else 1)
    # keys that lie beyond every query are not read: a cache's unused slots may hold anything, NaN too
    # [BLOCK_K]
    m_k = o_k < n_stop - n_key
    if SPAN_K % BLOCK_K != 0:
        m_k &= o_k < SPAN_K - n_tile
    # [BLOCK_K, D0], [BLOCK_K, D1]
    p_tile = p_k + n_key.to(tl.int64) * stride_kt + o_k[:, None].to(tl.int64) * stride_kt
    if DESCRIBED:
        b_k0 = d_k.load([i_b, i_kv, n_key, 0]).reshape(BLOCK_K, D0)
    else:
        b_k0 = _load(p_tile + o_d0[None, :].to(tl.int64) * stride_kd, m_k, o_d0, D, MASKED, D0 > D)
    # [BLOCK_Q, BLOCK_K]
    b_s = _dot(b_q0, tl.trans(b_k0), None, PRECISION, WIDEN)
    if D1 > 0:
        b_k1 = _load(p_tile + o_d1[None, :].to(tl.int64) * stride_kd, m_k, o_d1, D, MASKED, D0 + D1 > D)
        b_s = _dot(b_q1, tl.trans(b_k1), b_s, PRECISION, WIDEN)
    if HAS_CAP:
        b_s = cap * _tanh(b_s * scale, PRECISE)
    return b_s, m_k


@triton.jit
def _seen(
    b_low, b_high, m_k, p_valid, n_key,
    SPAN_K: tl.constexpr, BLOCK_K: tl.constexpr, HAS_LOW: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """[BLOCK_Q, BLOCK_K]: who sees whom in a tile that begins at `n_key`."""
    o_k = tl.arange(0, BLOCK_K)
    m_s = o_k[None, :] < (b_high - n_key)[:, None]
    if SPAN_K % BLOCK_K != 0:
        m_s &= m_k[None, :]
    if HAS_VALID:
        # holes are read and hidden: to skip them as well would cost the pipeline
        m_s &= (tl.load(p_valid + n_key + o_k, mask=m_k, other=0) != 0)[None, :]
    if HAS_LOW:
        m_s &= o_k[None, :] >= (b_low - n_key)[:, None]
    return m_s


@triton.jit
def _attend(
    b_m, b_l, b_o0, b_o1, b_q0, b_q1, b_low, b_high,
    p_k, p_v, p_valid, d_k, d_v, i_b, i_kv, stride_kt, stride_kd, stride_vt, stride_vd,
    i_block, i_t, n_anchor, n_stop, scale, cap,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    SPAN_K: tl.constexpr, BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr, DESCRIBED: tl.constexpr, HAS_LOW: tl.constexpr, HAS_VALID: tl.constexpr,
    HAS_CAP: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr, PRECISE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, over tile `i_t` of block `i_block`."""
    n_tile = i_t * BLOCK_K
    n_key = n_anchor + i_block * SPAN_K + n_tile
    b_s, m_k = _logits(
        b_q0, b_q1, p_k, d_k, i_b, i_kv, stride_kt, stride_kd, i_block, n_tile, n_anchor, n_stop, scale, cap,
        D, D0, D1, SPAN_K, BLOCK_K, MASKED, DESCRIBED, HAS_CAP, PRECISION, PRECISE, WIDEN,
    )  # fmt: skip
    if HAS_CAP:
        scale = 1.0
    if MASKED:
        m_s = _seen(b_low, b_high, m_k, p_valid, n_key, SPAN_K, BLOCK_K, HAS_LOW, HAS_VALID)
        b_s = tl.where(m_s, b_s, float("-inf"))
    # [BLOCK_Q]; scale is positive, so that it may be applied after the maximum
    b_peak = tl.maximum(b_m, tl.max(b_s, 1) * scale)
    b_l, b_o0, b_o1 = _add(
        b_peak, b_m, b_l, b_o0, b_o1, b_s, m_k, p_v, d_v, i_b, i_kv, stride_vt, stride_vd, n_key, scale,
        V, V0, V1, BLOCK_K, MASKED, DESCRIBED, VALUES, PRECISION, WIDEN,
    )  # fmt: skip
    return b_peak, b_l, b_o0, b_o1


@triton.jit
def _add(
    b_peak, b_m, b_l, b_o0, b_o1, b_s, m_k, p_v, d_v, i_b, i_kv, stride_vt, stride_vd, n_key, scale,
    V: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr, DESCRIBED: tl.constexpr,
    VALUES: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Add the weights of a tile and its weighted values, as the maximum rises from `b_m` to `b_peak`."""
    # a query that has seen no key yet has -inf here, and -inf - -inf is NaN
    b_base = tl.where(b_peak == float("-inf"), 0.0, b_peak) if MASKED else b_peak
    b_p = tl.exp2(b_s * scale - b_base[:, None])
    b_fade = tl.exp2(b_m - b_base)
    b_l = b_l * b_fade + tl.sum(b_p, 1)
    if VALUES:
        o_k = tl.arange(0, BLOCK_K)
        o_v0, o_v1 = tl.arange(0, V0), V0 + tl.arange(0, V1 if V1 > 0 else 1)
        # [BLOCK_K, V0], [BLOCK_K, V1]
        p_tile = p_v + n_key.to(tl.int64) * stride_vt + o_k[:, None].to(tl.int64) * stride_vt
        if DESCRIBED:
            b_v0 = d_v.load([i_b, i_kv, n_key, 0]).reshape(BLOCK_K, V0)
        else:
            b_v0 = _load(p_tile + o_v0[None, :].to(tl.int64) * stride_vd, m_k, o_v0, V, MASKED, V0 > V)
        b_p = b_p.to(b_v0.dtype)
        b_o0 = _dot(b_p, b_v0, b_o0 * b_fade[:, None], PRECISION, WIDEN)
        if V1 > 0:
            b_v1 = _load(p_tile + o_v1[None, :].to(tl.int64) * stride_vd, m_k, o_v1, V, MASKED, V0 + V1 > V)
            b_o1 = _dot(b_p, b_v1, b_o1 * b_fade[:, None], PRECISION, WIDEN)
    return b_l, b_o0, b_o1


@triton.jit
def _attend_or_skip(
    b_m, b_l, b_o0, b_o1, n_skipped, b_q0, b_q1, m_q, m_counts, b_low, b_high,
    p_k, p_v, p_valid, p_before, stride_kt, stride_kd, stride_vt, stride_vd,
    i_block, i_t, n_anchor, n_stop, n_clear_from, n_clear_to, n_threshold, scale, cap,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    SPAN_K: tl.constexpr, BLOCK_K: tl.constexpr, HAS_LOW: tl.constexpr, HAS_VALID: tl.constexpr, HAS_CAP: tl.constexpr,
    VALUES: tl.constexpr, PRECISION: tl.constexpr, PRECISE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """As `_attend`, of a tile that may need a mask, and may not matter: then its visible pairs are counted instead."""
    n_tile = i_t * BLOCK_K
    n_key = n_anchor + i_block * SPAN_K + n_tile
    b_s, m_k = _logits(
        b_q0, b_q1, p_k, None, 0, 0, stride_kt, stride_kd, i_block, n_tile, n_anchor, n_stop, scale, cap,
        D, D0, D1, SPAN_K, BLOCK_K, True, False, HAS_CAP, PRECISION, PRECISE, WIDEN,
    )  # fmt: skip
    if HAS_CAP:
        scale = 1.0
    m_clear = (n_key >= n_clear_from) & (n_key + BLOCK_K <= n_clear_to)
    # with a mask at all times Triton 3.7 fails on capability 10.0: it follows products into the scalar maximum below
    if not m_clear:
        m_s = _seen(b_low, b_high, m_k, p_valid, n_key, SPAN_K, BLOCK_K, HAS_LOW, HAS_VALID)
        b_s = tl.where(m_s, b_s, float("-inf"))
    # [BLOCK_Q]
    b_t = _row_peaks(b_s, WIDEN) * scale
    # NaN is not below anything; who sees nothing of the tile does not mind
    m_matters = m_counts & (b_t != float("-inf")) & ~(b_t <= b_m + n_threshold)
    if tl.max(m_matters.to(tl.int32), 0) > 0:
        b_peak = _nan_or_larger(b_m, b_t)
        b_l, b_o0, b_o1 = _add(
            b_peak, b_m, b_l, b_o0, b_o1, b_s, m_k, p_v, None, 0, 0, stride_vt, stride_vd, n_key, scale,
            V, V0, V1, BLOCK_K, True, False, VALUES, PRECISION, WIDEN,
        )  # fmt: skip
        b_m = b_peak
    else:
        b_to = tl.minimum(b_high, n_key + tl.minimum(BLOCK_K, SPAN_K - n_tile))
        b_from = tl.minimum(tl.maximum(b_low, n_key) if HAS_LOW else n_key, b_to)
        if HAS_VALID:
            b_from, b_to = tl.load(p_before + b_from, mask=m_q, other=0), tl.load(p_before + b_to, mask=m_q, other=0)
        n_skipped += tl.sum(tl.where(m_q, b_to - b_from, 0), 0)
    return b_m, b_l, b_o0, b_o1, n_skipped


@triton.jit
def _load(p_tile, m_row, o_column, N: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    if MASK_ROWS and MASK_COLUMNS:
        return tl.load(p_tile, mask=m_row[:, None] & (o_column < N)[None, :], other=0.0)
    elif MASK_ROWS:
        return tl.load(p_tile, mask=m_row[:, None], other=0.0)
    elif MASK_COLUMNS:
        return tl.load(p_tile, mask=(o_column < N)[None, :], other=0.0)
    else:
        return tl.load(p_tile)


# lengths change from call to call: specialising on them would compile again and again. Strides that grow with the
# length have one type at any length, and stay specialised: that 16 divides them is what lets loads be wide
@triton.jit(
    do_not_specialize=[
        "stride_start_b", "stride_start_h", "stride_start_r",
        "stride_count_b", "stride_count_h", "stride_count_r", "query_heads", "rows", "query_start", "queries", "keys",
        "key_length", "window", "scale", "cap",
    ]
)  # fmt: skip
def forward_kernel(
    p_q, p_k, p_v, p_out, p_lse, p_sinks, p_valid, p_low,
    p_columns, p_start, p_count, p_order, p_anchor, p_first, p_hole, p_only, p_visit, p_skip, p_before, p_skipped,
    d_k, d_v,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qt, stride_qd,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kt, stride_kd,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vt, stride_vd,
    stride_ob: tl.int64, stride_oh: tl.int64, stride_ot, stride_od,
    stride_start_b, stride_start_h, stride_start_r,
    stride_count_b, stride_count_h, stride_count_r,
    query_heads, rows, query_start, queries, keys, key_length, window, scale, cap,
    GROUP: tl.constexpr, HEADS: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    SPAN_Q: tl.constexpr, SPAN_K: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_VALID: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SEGMENT: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_ONLY: tl.constexpr, HAS_VISIT: tl.constexpr, HAS_SKIP: tl.constexpr,
    VALUES: tl.constexpr, PRECISION: tl.constexpr, PRECISE: tl.constexpr, WIDEN: tl.constexpr,
    DESCRIBED: tl.constexpr, SPECIALISE: tl.constexpr,
):  # fmt: skip
    """Attention of one tile of queries over the listed key blocks.

    program_id(0) walks p_order, program_id(1) the query tiles of a row where SPAN_Q > TILE_Q. A tile holds TILE_Q
    queries of each of HEADS heads that share a list and a KV head, one head after the other. With p_only, programs of
    heads that it does not mark write nothing at all. p_skipped is zero wherever no program adds to it. d_k and d_v
    describe keys and values to the copy engine, which fetches the tiles that need no mask where DESCRIBED, and all
    where SPECIALISE: then some warps do nothing but fetch.
    """
    HAS_LOW: tl.constexpr = HAS_WINDOW or HAS_SEGMENT
    TILES: tl.constexpr = (SPAN_K + BLOCK_K - 1) // BLOCK_K
    TILE_Q: tl.constexpr = BLOCK_Q // HEADS
    n_lists = query_heads // HEADS
    i_row = tl.load(p_order + tl.program_id(0))
    i_b, i_h, i_r = i_row // (n_lists * rows), i_row // rows % n_lists * HEADS, i_row % rows
    i_kv = i_h // GROUP
    i_b32, i_kv32 = i_b.to(tl.int32), i_kv.to(tl.int32)  # as a descriptor takes them
    if HAS_ONLY:  # noqa: SIM102  (with `and` the load would be compiled where there is no pointer)
        if tl.load(p_only + i_b * query_heads + i_h) == 0:
            return
    n_anchor = tl.load(p_anchor + i_b).to(tl.int32)
    n_end = query_start + queries

    p_q += i_b * stride_qb + i_h * stride_qh
    p_k += i_b * stride_kb + i_kv * stride_kh
    p_v += i_b * stride_vb + i_kv * stride_vh
    if VALUES:
        p_out += i_b * stride_ob + i_h * stride_oh
    p_lse += (i_b * query_heads + i_h) * queries
    if HAS_VALID:
        p_valid += i_b * keys

    o_q = tl.arange(0, BLOCK_Q)
    if HEADS > 1:
        # each row of the tile reads and writes from its own head on
        o_h = (o_q // TILE_Q).to(tl.int64)
        o_q = o_q % TILE_Q
        p_q += o_h[:, None] * stride_qh
        p_lse += o_h * queries
        if VALUES:
            p_out += o_h[:, None] * stride_oh
        if HAS_SINKS:
            p_sinks += o_h
    o_d0, o_d1 = tl.arange(0, D0), D0 + tl.arange(0, D1 if D1 > 0 else 1)
    o_v0, o_v1 = tl.arange(0, V0), V0 + tl.arange(0, V1 if V1 > 0 else 1)

    # queries before the anchor stand in no row: the first program writes theirs
    if i_r + tl.program_id(1) == 0:
        n_pad = tl.minimum(n_anchor, n_end) - query_start
        for i_pad in range(0, n_pad, TILE_Q):
            o_pad = i_pad + o_q
            tl.store(p_lse + o_pad, tl.full([BLOCK_Q], float("-inf"), tl.float32), mask=o_pad < n_pad)
            if VALUES:
                p_row = p_out + o_pad[:, None].to(tl.int64) * stride_ot
                b_zero = tl.zeros([BLOCK_Q, V0], p_out.dtype.element_ty)
                m_zero = (o_pad < n_pad)[:, None] & (o_v0 < V)[None, :]
                tl.store(p_row + o_v0[None, :].to(tl.int64) * stride_od, b_zero, mask=m_zero)
                if V1 > 0:
                    b_zero = tl.zeros([BLOCK_Q, V1], p_out.dtype.element_ty)
                    m_zero = (o_pad < n_pad)[:, None] & (o_v1 < V)[None, :]
                    tl.store(p_row + o_v1[None, :].to(tl.int64) * stride_od, b_zero, mask=m_zero)

    # slots [n_from, n_to) are asked of this program
    n_block = n_anchor + (tl.load(p_first + i_b) + i_r).to(tl.int32) * SPAN_Q
    n_slot = n_block + tl.program_id(1) * TILE_Q
    n_from = tl.maximum(n_slot, query_start)
    n_to = tl.minimum(tl.minimum(n_slot + TILE_Q, n_block + SPAN_Q), n_end)
    if n_from >= n_to:
        return

    # [BLOCK_Q]
    o_s = n_slot + o_q
    m_q = (o_s >= n_from) & (o_s < n_to)
    o_t = o_s - query_start
    p_row = p_q + o_t[:, None].to(tl.int64) * stride_qt
    # [BLOCK_Q, D0], [BLOCK_Q, D1]
    b_q0 = _load(p_row + o_d0[None, :].to(tl.int64) * stride_qd, m_q, o_d0, D, True, D0 > D)
    b_q1 = b_q0
    if D1 > 0:
        b_q1 = _load(p_row + o_d1[None, :].to(tl.int64) * stride_qd, m_q, o_d1, D, True, D0 + D1 > D)

    p_list = p_columns + tl.load(p_start + i_b * stride_start_b + i_h * stride_start_h + i_r * stride_start_r)
    n_list = tl.load(p_count + i_b * stride_count_b + i_h * stride_count_h + i_r * stride_count_r)
    # the row of a part may be empty: then what stands at its start is read and means nothing
    i_low, i_high = tl.load(p_list), tl.load(p_list + tl.maximum(n_list - 1, 0))

    # keys before n_stop are seen by some query, keys in [n_clear_from, n_clear_to) by all
    n_stop = tl.minimum(n_to, key_length)
    n_clear_to = tl.minimum(n_from + 1, key_length)
    if HAS_VALID:
        n_clear_to = tl.minimum(n_clear_to, tl.load(p_hole + i_b).to(tl.int32))
    i_stop = _tiles_below(p_list, n_list, i_low, i_high, n_stop - n_anchor, SPAN_K, BLOCK_K)
    i_start, i_clear = 0, 0
    b_low, b_high = o_s, tl.minimum(o_s + 1, n_stop)
    if HAS_LOW:
        if HAS_SEGMENT:
            p_low += i_b * queries
            b_low = tl.load(p_low + o_t, mask=m_q, other=0)
            n_start = tl.load(p_low + (n_from - query_start))
            n_clear_from = tl.load(p_low + (n_to - 1 - query_start))
        else:
            b_low = o_s - window + 1
            n_start = n_from - window + 1
            n_clear_from = n_to - window
        i_start = _tiles_below(p_list, n_list, i_low, i_high, n_start - n_anchor - BLOCK_K + 1, SPAN_K, BLOCK_K)
        i_clear = _tiles_below(p_list, n_list, i_low, i_high, n_clear_from - n_anchor, SPAN_K, BLOCK_K)
        i_start = tl.minimum(i_start, i_stop)
        i_clear = tl.minimum(tl.maximum(i_clear, i_start), i_stop)

    b_m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_Q], tl.float32)
    # [BLOCK_Q, V0], [BLOCK_Q, V1]; a stand-in where there is none
    b_o0 = tl.zeros([BLOCK_Q, V0 if VALUES else 1], tl.float32)
    b_o1 = tl.zeros([BLOCK_Q, V1 if VALUES and V1 > 0 else 1], tl.float32)

    if HAS_SKIP:
        # natural log, as the caller counts; where there is a threshold, the two loops below have nothing to do
        n_threshold = tl.load(p_skip + i_row) * (1 / _LN2)
    n_clear = 0
    # a tile that reaches over its block's end is never clear
    if SPAN_K % BLOCK_K == 0:
        i_mixed = _tiles_below(p_list, n_list, i_low, i_high, n_clear_to - n_anchor - BLOCK_K + 1, SPAN_K, BLOCK_K)
        i_mixed = tl.maximum(tl.minimum(i_mixed, i_stop), i_clear)
        if HAS_SKIP:
            i_mixed = tl.where(n_threshold > float("-inf"), i_clear, i_mixed)
        n_clear = i_mixed - i_clear
        # each block's id is read one step ahead, so that no address waits for it
        i_next = _block_of(p_list, n_list, i_clear, TILES)
        for i_t in tl.range(i_clear, i_mixed, warp_specialize=SPECIALISE):
            i_block = i_next
            i_next = _block_of(p_list, n_list, i_t + 1, TILES)
            b_m, b_l, b_o0, b_o1 = _attend(
                b_m, b_l, b_o0, b_o1, b_q0, b_q1, b_low, b_high,
                p_k, p_v, p_valid, d_k, d_v, i_b32, i_kv32, stride_kt, stride_kd, stride_vt, stride_vd,
                i_block, i_t % TILES, n_anchor, n_stop, scale, cap, D, D0, D1, V, V0, V1, SPAN_K, BLOCK_K,
                False, DESCRIBED, HAS_LOW, HAS_VALID, HAS_CAP, VALUES, PRECISION, PRECISE, WIDEN,
            )  # fmt: skip
    if HAS_SKIP:
        i_stop = tl.where(n_threshold > float("-inf"), i_start, i_stop)
        n_clear = tl.where(n_threshold > float("-inf"), 0, n_clear)
    # the softmax does not mind the order: the clear stretch came first and is stepped over here
    i_next = _block_of(p_list, n_list, _step_over(i_start, i_clear, n_clear), TILES)
    for i_edge in tl.range(i_start, i_stop - n_clear, warp_specialize=SPECIALISE):
        i_t = _step_over(i_edge, i_clear, n_clear)
        i_block = i_next
        i_next = _block_of(p_list, n_list, _step_over(i_edge + 1, i_clear, n_clear), TILES)
        b_m, b_l, b_o0, b_o1 = _attend(
            b_m, b_l, b_o0, b_o1, b_q0, b_q1, b_low, b_high,
            p_k, p_v, p_valid, d_k, d_v, i_b32, i_kv32, stride_kt, stride_kd, stride_vt, stride_vd,
            i_block, i_t % TILES, n_anchor, n_stop, scale, cap, D, D0, D1, V, V0, V1, SPAN_K, BLOCK_K,
            True, SPECIALISE, HAS_LOW, HAS_VALID, HAS_CAP, VALUES, PRECISION, PRECISE, WIDEN,
        )  # fmt: skip

    if HAS_SKIP:
        p_walk = p_list
        if HAS_VISIT:
            p_walk = p_visit + tl.load(p_start + i_b * stride_start_b + i_h * stride_start_h + i_r * stride_start_r)
        m_counts = m_q
        if HAS_VALID:
            m_counts &= tl.load(p_valid + o_s, mask=m_q, other=0) != 0
            p_before += i_b * (keys + 1)
        if not HAS_LOW:
            n_clear_from = 0
        if SPAN_K % BLOCK_K != 0:  # a tile that reaches over its block's end is never clear
            n_clear_to = 0
        n_skipped = tl.full([], 0, tl.int32)
        i_next = tl.load(p_walk)
        for i_t in range(0, tl.where(n_threshold > float("-inf"), n_list * TILES, 0)):
            i_block = i_next
            i_next = _block_of(p_walk, n_list, i_t + 1, TILES)
            b_m, b_l, b_o0, b_o1, n_skipped = _attend_or_skip(
                b_m, b_l, b_o0, b_o1, n_skipped, b_q0, b_q1, m_q, m_counts, b_low, b_high,
                p_k, p_v, p_valid, p_before, stride_kt, stride_kd, stride_vt, stride_vd, i_block, i_t % TILES,
                n_anchor, n_stop, n_clear_from, n_clear_to, n_threshold, scale, cap,
                D, D0, D1, V, V0, V1, SPAN_K, BLOCK_K,
                HAS_LOW, HAS_VALID, HAS_CAP, VALUES, PRECISION, PRECISE, WIDEN,
            )  # fmt: skip
        tl.store(p_skipped + i_row * tl.num_programs(1) + tl.program_id(1), n_skipped)

    m_seen = b_l > 0
    b_l = tl.where(m_seen, b_l, 1.0)
    b_lse = tl.where(m_seen, (b_m + tl.log2(b_l)) * _LN2, float("-inf"))
    tl.store(p_lse + o_t, b_lse, mask=m_q)
    if VALUES:
        b_base = tl.where(m_seen, b_m, 0.0)
        if HAS_SINKS:
            b_sink = tl.load(p_sinks + i_h).to(tl.float32) / _LN2
            b_top = tl.maximum(b_base, b_sink)
            b_l = b_l * tl.exp2(b_base - b_top) + tl.exp2(b_sink - b_top)
            b_share = tl.exp2(b_base - b_top) / b_l
        else:
            b_share = 1.0 / b_l
        b_share = tl.where(m_seen, b_share, 0.0)
        p_row = p_out + o_t[:, None].to(tl.int64) * stride_ot
        b_o0 = (b_o0 * b_share[:, None]).to(p_out.dtype.element_ty)
        m_out = m_q[:, None] & (o_v0 < V)[None, :]
        tl.store(p_row + o_v0[None, :].to(tl.int64) * stride_od, b_o0, mask=m_out)
        if V1 > 0:
            b_o1 = (b_o1 * b_share[:, None]).to(p_out.dtype.element_ty)
            m_out = m_q[:, None] & (o_v1 < V)[None, :]
            tl.store(p_row + o_v1[None, :].to(tl.int64) * stride_od, b_o1, mask=m_out)


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter: TRITON_INTERPRET=1 was set when this module was imported."""
    return not isinstance(forward_kernel, triton.JITFunction)


@functools.lru_cache
def device_limits(device: torch.device) -> DeviceLimits:
    """Limits of a CUDA device, or those assumed for the interpreter."""
    if device.type != "cuda":
        return _INTERPRETER_LIMITS
    number = torch.cuda.current_device() if device.index is None else device.index
    shared = triton.runtime.driver.active.utils.get_device_properties(number)["max_shared_mem"]
    cache = torch.cuda.get_device_properties(number).L2_cache_size
    return DeviceLimits(torch.cuda.get_device_capability(number), shared, cache)


def why_not_device(device: torch.device) -> str | None:
    """Why no kernel of ours can run there with this Triton, or None."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 4):
        return f"it needs triton 3.4 or newer, {triton.__version__} is installed"
    if device.type == "cpu":
        if not (interpreted() and triton.knobs.runtime.interpret):
            return "the inputs are on the CPU (TRITON_INTERPRET=1 would run it there, slowly, for tests)"
    elif device.type != "cuda" or torch.version.hip is not None:
        return f"it is written for NVIDIA GPUs, the inputs are on {device}"
    elif interpreted():
        return "TRITON_INTERPRET=1 is set, which takes inputs on the CPU"
    limits = device_limits(device)
    if limits.capability < (8, 0):
        return f"it needs compute capability 8.0, this GPU has {limits.capability[0]}.{limits.capability[1]}"
    return None


def why_not_triton(inputs: AttentionInputs, index: BlockIndex | None) -> str | None:
    """Why this kernel cannot serve these inputs, or None.

    Inputs on the CPU are served by the interpreter alone, for tests; `auto` must not choose that.
    """
    if inputs.query.dtype not in _DTYPES:
        return f"it computes float16, bfloat16 and float32, not {inputs.query.dtype}"
    for name, dim in (("head_dim", inputs.head_dim), ("value_dim", inputs.value_dim)):
        if not 16 <= dim <= 256:
            return f"it computes {name} 16 to 256, not {dim}"
    if inputs.query.requires_grad or inputs.key.requires_grad or inputs.value.requires_grad:
        return "it has no backward pass: run under torch.no_grad()"
    reason = why_not_device(inputs.device)
    if reason is not None:
        return reason
    limits = device_limits(inputs.device)
    blocks = (64, 64) if index is None else (index.grid.block_q, index.grid.block_k)
    dims = inputs.head_dim, inputs.value_dim
    if choose_tiling(*dims, inputs.query.dtype, *blocks, limits.shared, limits.capability) is None:
        return f"no tile fits into the {limits.shared} bytes of shared memory that a block may use"
    return None


def longest_first(count: Tensor, heads_together: int) -> Tensor:
    """int64 [batch * heads * rows]: flat numbers of rows, by falling count among every `heads_together` heads."""
    batch, heads, rows = count.shape
    grouped = count.reshape(-1, heads_together * rows)
    order = grouped.argsort(dim=1, descending=True, stable=True)
    order += torch.arange(0, batch * heads * rows, heads_together * rows, device=count.device)[:, None]
    return order.flatten()


def heads_that_share(inputs: AttentionInputs, cache: int) -> int:
    """Query heads to run at a time so that their keys and values stay in a cache of so many bytes."""
    head_bytes = inputs.last_key * (inputs.head_dim + inputs.value_dim) * inputs.key.element_size()
    fitting = max(1, cache // max(1, head_bytes))
    kv_heads = max(n for n in range(1, inputs.kv_heads + 1) if inputs.kv_heads % n == 0 and n <= fitting)
    return kv_heads * inputs.group_size


def stackable_heads(inputs: AttentionInputs, index: BlockIndex, only: Tensor | None = None) -> int:
    """How many query heads one tile may hold: a power of two of neighbours that share a list and a KV head.

    Known on the host. One where only some heads are computed, or where each skips tiles of its own.
    """
    if only is not None or index.skip is not None:
        return 1
    together = math.gcd(index.shared_by, inputs.group_size)
    return together & -together


def why_not_descriptors(inputs: AttentionInputs, capability: tuple[int, int]) -> str | None:
    """Why the copy engine cannot fetch tiles of these keys and values, or None. Looks at shapes and strides alone.

    What it needs: compute capability 9.0; a head's numbers side by side in memory, as many as a power of two; every
    other stride, and where the tensor begins, a multiple of 16 bytes; no token, head or batch row that stands for
    several (a stride of 0). float32, whose products take their operands from registers, spills with them.
    """
    if capability < (9, 0):
        return f"compute capability 9.0 is needed, this one is {capability[0]}.{capability[1]}"
    if inputs.key.dtype == torch.float32:
        return "float32 tiles that arrive in shared memory make registers spill"
    for name, tensor in (("key", inputs.key), ("value", inputs.value)):
        dim, size = tensor.shape[3], tensor.element_size()
        if split_dim(dim) != (dim, 0):
            return f"a {name} has {dim} numbers, which is no power of two of at least 16"
        if tensor.stride(3) != 1:
            return f"the numbers of a {name} do not lie side by side"
        if tensor.data_ptr() % 16:
            return f"the {name}s do not begin at a multiple of 16 bytes"
        for stride, length in zip(tensor.stride()[:3], tensor.shape[:3], strict=True):
            if length > 1 and (stride <= 0 or stride * size % 16):
                return f"the {name}s have a stride of {stride * size} bytes, which is no multiple of 16"
    return None


def why_not_specialised(tiling: Tiling, capability: tuple[int, int]) -> str | None:
    """Why warps cannot be given jobs of their own in this tiling, or None.

    Tiles at the edge of what a query sees are then fetched whole: a value that is no number, of a token that the query
    does not see but that shares the tile, reaches it. The compiler (triton 3.4 to 3.7) does it for both loops on
    capability 10.0; on 9.0 it leaves programs of 8 warps as they are and fails with 4.
    """
    if capability < (10, 0):
        return f"compute capability 10.0 is needed, this one is {capability[0]}.{capability[1]}"
    if not tiling.descriptors:
        return "tiles must be fetched by descriptors"
    return None


def choose_for(inputs: AttentionInputs, index: BlockIndex, only: Tensor | None, limits: DeviceLimits) -> Tiling | None:
    """The tiling of a launch: `choose_tiling`, with heads stacked where they may be, descriptors where they serve."""
    tiling = choose_tiling(
        inputs.head_dim, inputs.value_dim, inputs.query.dtype, index.grid.block_q, index.grid.block_k,
        limits.shared, limits.capability, index.skip is not None, stackable_heads(inputs, index, only),
    )  # fmt: skip
    if tiling is None:
        return None
    clear = index.grid.block_k % tiling.block_k == 0  # else no tile goes without a mask
    described = clear and why_not_descriptors(inputs, limits.capability) is None
    return dataclasses.replace(tiling, descriptors=described)


def _refuse_tiling(
    tiling: Tiling, inputs: AttentionInputs, index: BlockIndex, only: Tensor | None, capability: tuple[int, int]
) -> None:
    """Raise ValueError for a tiling that a caller chose and that cannot be had."""
    capability = (10, 0) if interpreted() else capability
    stackable = stackable_heads(inputs, index, only)
    if tiling.heads < 1 or stackable % tiling.heads:
        raise ValueError(f"{tiling.heads} heads cannot be stacked here: {stackable} share a list and a KV head")
    reason = why_not_descriptors(inputs, capability) if tiling.descriptors else None
    if reason is not None:
        raise ValueError(f"tiles cannot be fetched by descriptors: {reason}")
    reason = why_not_specialised(tiling, capability) if tiling.specialise else None
    if reason is not None:
        raise ValueError(f"warps cannot be specialised: {reason}")


def _described(tensor: Tensor, last_key: int, rows: int) -> TensorDescriptor:
    """Keys or values [batch, kv_heads, keys, dim] for the copy engine, in tiles of `rows` tokens.

    What lies from `last_key` on arrives as zeros: a cache's unused slots may hold anything.
    """
    batch, kv_heads, _, dim = tensor.shape
    # a stride along which there is one step may be anything, which the copy engine minds
    strides = [stride if length > 1 else dim for stride, length in zip(tensor.stride(), tensor.shape, strict=True)]
    return TensorDescriptor(tensor, [batch, kv_heads, max(1, last_key), dim], [*strides[:3], 1], [1, 1, rows, dim])


def first_hole(inputs: AttentionInputs, anchor: Tensor) -> Tensor | None:
    """int64 [batch]: the first invalid key after the anchor (left padding has none: then the number of keys)."""
    if inputs.key_valid is None:
        return None
    hole = ~inputs.key_valid & (torch.arange(inputs.keys, device=inputs.device) >= anchor[:, None])
    return torch.where(hole.any(1), hole.int().argmax(1), inputs.keys)


def kernel_arguments(
    inputs: AttentionInputs,
    index: BlockIndex,
    output: Tensor | None,
    lse: Tensor,
    tiling: Tiling,
    cache: int,
    float32_dots: str = "ieee",
    only: Tensor | None = None,
    skipped: Tensor | None = None,
) -> dict[str, object]:
    """What `forward_kernel` is launched with, by name."""
    grid = index.grid
    values = output is not None
    low = inputs.visible_range()[0].to(torch.int32) if inputs.segment is not None else None
    valid = None if inputs.key_valid is None else inputs.key_valid.contiguous().view(torch.uint8)
    (d0, d1), (v0, v1) = split_dim(inputs.head_dim), split_dim(inputs.value_dim)
    visit = None if index.skip is None else index.visit  # without skips the order does not matter
    before = None  # valid keys before each slot
    if index.skip is not None and inputs.key_valid is not None:
        before = functional.pad(inputs.key_valid.cumsum(1, dtype=torch.int32), (1, 0))
    # the softmax is computed in base 2: log2(e) goes into whatever factor is applied last to the logits
    scale, cap = inputs.scale * _LOG2E, 0.0
    if inputs.softcap is not None:
        scale, cap = inputs.scale / inputs.softcap, inputs.softcap * _LOG2E
    arguments: dict[str, object] = {
        "p_q": inputs.query, "p_k": inputs.key, "p_v": inputs.value, "p_out": output, "p_lse": lse,
        "p_sinks": inputs.sinks, "p_valid": valid, "p_low": low,
        "p_columns": index.columns.contiguous(), "p_start": index.start, "p_count": index.count,
        "p_order": longest_first(
            index.count[:, :: tiling.heads], heads_that_share(inputs, cache) // tiling.heads
        ),
        "p_anchor": grid.anchor, "p_first": grid.first, "p_hole": first_hole(inputs, grid.anchor),
        "p_only": None if only is None else only.contiguous().view(torch.uint8),
        "p_visit": None if visit is None else visit.contiguous(),
        "p_skip": None if index.skip is None else index.skip.contiguous(), "p_before": before, "p_skipped": skipped,
        "d_k": _described(inputs.key, inputs.last_key, tiling.block_k) if tiling.descriptors else None,
        "d_v": _described(inputs.value, inputs.last_key, tiling.block_k) if tiling.descriptors and values else None,
    }  # fmt: skip
    for letter, tensor in (("q", inputs.query), ("k", inputs.key), ("v", inputs.value), ("o", output)):
        strides = (0, 0, 0, 1) if tensor is None else tensor.stride()
        arguments |= {f"stride_{letter}{axis}": stride for axis, stride in zip("bhtd", strides, strict=True)}
    for name, tensor in (("start", index.start), ("count", index.count)):
        arguments |= {f"stride_{name}_{axis}": stride for axis, stride in zip("bhr", tensor.stride(), strict=True)}
    return arguments | {
        "query_heads": inputs.query_heads, "rows": grid.rows, "query_start": inputs.query_start,
        "queries": inputs.queries, "keys": inputs.keys, "key_length": inputs.filled, "window": inputs.window or 0,
        "scale": scale, "cap": cap, "GROUP": inputs.group_size, "HEADS": tiling.heads,
        "D": inputs.head_dim, "D0": d0, "D1": d1, "V": inputs.value_dim, "V0": v0, "V1": v1,
        "SPAN_Q": grid.block_q, "SPAN_K": grid.block_k, "BLOCK_Q": tiling.block_q, "BLOCK_K": tiling.block_k,
        "HAS_SINKS": inputs.sinks is not None, "HAS_VALID": valid is not None, "HAS_WINDOW": inputs.window is not None,
        "HAS_SEGMENT": low is not None, "HAS_CAP": inputs.softcap is not None, "HAS_ONLY": only is not None,
        "HAS_VISIT": visit is not None, "HAS_SKIP": index.skip is not None, "VALUES": values,
        "PRECISION": float32_dots, "PRECISE": inputs.query.dtype == torch.float32, "WIDEN": interpreted(),
        "DESCRIBED": tiling.descriptors, "SPECIALISE": tiling.specialise,
    }  # fmt: skip


def triton_attention(
    inputs: AttentionInputs,
    index: BlockIndex,
    *,
    values: bool = True,
    tiling: Tiling | None = None,
    float32_dots: str = "ieee",
    only: Tensor | None = None,
    into: AttentionOutput | None = None,
) -> AttentionOutput:
    """Attention over the listed blocks; with `values=False` only lse is computed and no value is read.

    `float32_dots`: "ieee", or "tf32x3" for three tensor-core products at nearly the same accuracy. Nothing is read
    back to the host. The output's tokens lie outside its heads in memory, as a model wants them next. `only`, `into`:
    see `block_sparse_attention`; programs of heads that are not marked end at once. A tile that may be skipped is
    block_q x block_k of the `tiling`, where the grid's is no smaller.
    """
    limits = device_limits(inputs.device)
    grid = index.grid
    if tiling is None:
        tiling = choose_for(inputs, index, only, limits)
    else:
        _refuse_tiling(tiling, inputs, index, only, limits.capability)
    if tiling is None:
        raise NotImplementedError(f"triton cannot compute this: {why_not_triton(inputs, index)}")
    if into is None:
        shape = (inputs.batch, inputs.queries, inputs.query_heads, inputs.value_dim)
        output = inputs.query.new_empty(shape).transpose(1, 2) if values else None
        lse = torch.empty(inputs.query.shape[:3], dtype=torch.float32, device=inputs.device)
    else:
        output, lse = into.output, into.lse
        if lse.dtype != torch.float32 or not lse.is_contiguous():
            raise ValueError("into must be an earlier result of this kernel: its lse is float32 and contiguous")
    lists = inputs.query_heads // tiling.heads
    programs = (inputs.batch * lists * grid.rows, triton.cdiv(grid.block_q, tiling.queries))
    parts = None
    if index.skip is not None:
        parts = torch.zeros(programs, dtype=torch.int32, device=inputs.device)
    arguments = kernel_arguments(inputs, index, output, lse, tiling, limits.cache, float32_dots, only, parts)
    with torch.cuda.device_of(inputs.query):
        forward_kernel[programs](**arguments, num_warps=tiling.warps, num_stages=tiling.stages)
    skipped = None if parts is None else parts.view(inputs.batch, inputs.query_heads, -1).sum(2)
    if into is None:
        return AttentionOutput(output, lse, skipped)
    if into.skipped is not None and only is not None:
        into.skipped.copy_(into.skipped.where(~only, 0 if skipped is None else skipped))
    return into
