"""The native CPU path: codes of vectors, their int8 products and the largest score of a tile in one pass."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sparseprefill.kernels.low_bit import BITS, EstimatedLogits, LowBit
from sparseprefill.kernels.native_build import library, why_not_built

_STEP = 16  # keys; STEP in native_block_max.cpp


def why_not_native(device: torch.device, dtype: torch.dtype, bits: int, block_k: int) -> str | None:
    """Why this path cannot serve, or None."""
    if device.type != "cpu":
        return f"it runs on the CPU, the inputs are on {device}"
    if dtype != torch.float32:
        return f"it scores in float32, not in {dtype}"
    if bits not in BITS:
        return f"it multiplies codes of {', '.join(map(str, BITS))} bits, not of {bits}"
    if block_k % _STEP:
        return f"it needs blocks of a multiple of {_STEP} keys, not of {block_k}"
    return why_not_built()


def native_block_max(logits: EstimatedLogits) -> Tensor:
    """See `sparseprefill.kernels.low_bit.block_max`; `why_not_native` must have said nothing."""
    native = library()
    assert native is not None, why_not_built()
    batch, kv_heads, keys, bytes_ = logits.key.codes.shape
    shape = (
        batch, kv_heads, logits.group_size, logits.rows, logits.block_q, keys, logits.block_k, logits.key_blocks,
        bytes_, logits.key.bits,
    )  # fmt: skip
    # the library writes float32 into memory of the CPU, whatever the caller's default dtype and device are
    best = torch.full(
        (batch, kv_heads * logits.group_size, logits.rows, logits.key_blocks), -torch.inf, dtype=torch.float32,
        device="cpu",
    )  # fmt: skip
    tensors = [
        tensor.contiguous()
        for tensor in (
            logits.query.codes, logits.key.codes, logits.query.scale, logits.shift, logits.reference, logits.key.scale,
            logits.bias, logits.low, logits.high, logits.anchor,
        )
    ]  # fmt: skip
    status = native.sparseprefill_block_max(
        (ctypes.c_int64 * len(shape))(*shape),
        (ctypes.c_void_p * (len(tensors) + 1))(*(tensor.data_ptr() for tensor in tensors), best.data_ptr()),
        (ctypes.c_float * 2)(logits.scale, logits.softcap or 0.0),
        ctypes.c_int64(torch.get_num_threads()),
    )
    _check(status, shape)
    return best


def native_quantize(
    vectors: Tensor, mean: Tensor, bits: int, *, group_size: int, anchor: Tensor, real: Tensor | None
) -> LowBit:
    """See `sparseprefill.kernels.products.low_bit_codes`; float32, bfloat16 and float16, channels beside each other."""
    native = library()
    assert native is not None, why_not_built()
    batch, heads, tokens, dim = vectors.shape
    channels = -(-dim // 8) * 8
    bytes_ = channels if bits == 8 else channels // 2
    codes = torch.empty(batch, heads, tokens, bytes_, dtype=torch.int8, device="cpu")
    scale = torch.empty(batch, heads, tokens, dtype=torch.float32, device="cpu")
    kind = (torch.float32, torch.bfloat16, torch.float16).index(vectors.dtype)
    shape = (batch, heads, tokens, dim, bytes_, bits, kind, group_size, *vectors.stride()[:3])
    own = None if real is None else real.contiguous()
    inputs = (vectors, mean.contiguous(), anchor.contiguous())  # alive until the call returns
    status = native.sparseprefill_quantize(
        (ctypes.c_int64 * len(shape))(*shape),
        (ctypes.c_void_p * 6)(
            *(each.data_ptr() for each in inputs), None if own is None else own.data_ptr(), codes.data_ptr(),
            scale.data_ptr(),
        ),
        ctypes.c_int64(torch.get_num_threads()),
    )  # fmt: skip
    _check(status, shape)
    return LowBit(codes, scale, bits, dim)


def _check(status: int, shape: tuple[int, ...]) -> None:
    if status == 2:
        raise MemoryError(f"the native library ran out of memory or threads for the shape {shape}")
    if status:
        raise RuntimeError(f"the native library refused the shape {shape}")
