"""The native CPU path of `block_max`: int8 products and the largest score of a tile in one pass over cached keys."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sparseprefill.kernels.low_bit import BITS, EstimatedLogits
from sparseprefill.kernels.native_build import library, why_not_built


def why_not_native(device: torch.device, dtype: torch.dtype, bits: int, block_k: int) -> str | None:
    """Why this path cannot serve, or None."""
    if device.type != "cpu":
        return f"it runs on the CPU, the inputs are on {device}"
    if dtype != torch.float32:
        return f"it computes in float32, not in {dtype}"
    if bits not in BITS:
        return f"it multiplies codes of {', '.join(map(str, BITS))} bits, not of {bits}"
    return why_not_built()


def native_block_max(logits: EstimatedLogits) -> Tensor:
    """See `sparseprefill.kernels.low_bit.block_max`."""
    native = library()
    if native is None:
        raise NotImplementedError(why_not_built())
    query, key = logits.query.unpacked().contiguous(), logits.key.unpacked().contiguous()
    batch, kv_heads, keys, channels = key.shape
    sizes = torch.tensor(
        [batch, kv_heads, logits.group_size, logits.rows, logits.block_q, keys, channels, logits.key_blocks,
         logits.block_k]
    )  # fmt: skip
    best = torch.empty(batch, query.shape[1], logits.rows, logits.key_blocks)
    arrays = [
        each.contiguous()
        for each in (
            query, logits.query.scale, key, logits.key.scale, logits.bias, logits.shift, logits.reference, logits.low,
            logits.high, logits.anchor, sizes,
        )
    ]  # fmt: skip
    failed = native.sparseprefill_block_max(
        *(ctypes.c_void_p(each.data_ptr()) for each in arrays), ctypes.c_float(logits.scale),
        ctypes.c_float(logits.softcap or 0.0), ctypes.c_void_p(best.data_ptr()),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"the native library gave up with {failed}")
    return best
