"""The native CPU path of `block_max`: int8 products and the largest score of a tile in one pass over cached keys."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseprefill.kernels.low_bit import EstimatedLogits
from sparseprefill.kernels.native_build import why_not_built


def why_not_native(device: torch.device, dtype: torch.dtype, bits: int, block_k: int) -> str | None:
    """Why this path cannot serve, or None."""
    if device.type != "cpu":
        return f"it runs on the CPU, the inputs are on {device}"
    return why_not_built()


def native_block_max(logits: EstimatedLogits) -> Tensor:
    """See `sparseprefill.kernels.low_bit.block_max`."""
    raise NotImplementedError(why_not_built())
