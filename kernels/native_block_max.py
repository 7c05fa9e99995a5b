"""The native CPU path of `block_max`: int8 products and the largest score of a tile in one pass over cached keys."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sparseprefill.kernels.low_bit import BITS, EstimatedLogits
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
    best = torch.full((batch, kv_heads * logits.group_size, logits.rows, logits.key_blocks), -torch.inf)
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
    if status == 2:
        raise MemoryError(f"the native library ran out of memory or threads for the shape {shape}")
    if status:
        raise RuntimeError(f"the native library refused the shape {shape}")
    return best
