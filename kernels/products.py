"""Which implementation computes the scores of tiles from low-bit codes; as `dispatch` does for attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseprefill.kernels.low_bit import EstimatedLogits, LowBit, block_max, quantize
from sparseprefill.kernels.native_block_max import native_block_max, native_quantize, why_not_native


@dataclass(frozen=True, slots=True)
class Product:
    """A way to compute `block_max`."""

    why_not: Callable[[ProductShape], str | None]
    scores: Callable[[EstimatedLogits], Tensor]
    automatic: Callable[[ProductShape], bool]  # may `auto` ask it?


@dataclass(frozen=True, slots=True)
class ProductShape:
    """What an implementation must know to say whether it can."""

    device: torch.device
    dtype: torch.dtype  # of scales and scores
    bits: int
    head_dim: int
    block_q: int
    block_k: int

    @staticmethod
    def of(logits: EstimatedLogits) -> ProductShape:
        return ProductShape(
            logits.bias.device, logits.bias.dtype, logits.key.bits, logits.key.head_dim, logits.block_q, logits.block_k
        )


def _why_not_triton(shape: ProductShape) -> str | None:
    try:
        from sparseprefill.kernels.triton_low_bit import why_not_triton_low_bit
    except ImportError as error:
        return f"triton cannot be imported ({error}); on Linux: pip install triton"
    return why_not_triton_low_bit(shape.device, shape.dtype, shape.bits, shape.head_dim, shape.block_q, shape.block_k)


def _triton(logits: EstimatedLogits) -> Tensor:
    from sparseprefill.kernels.triton_low_bit import triton_block_max

    return triton_block_max(logits)


PRODUCTS: dict[str, Product] = {
    "triton": Product(_why_not_triton, _triton, automatic=lambda shape: shape.device.type != "cpu"),
    "native": Product(
        lambda shape: why_not_native(shape.device, shape.dtype, shape.bits, shape.block_k),
        native_block_max,
        automatic=lambda shape: True,
    ),
    "torch": Product(lambda shape: None, block_max, automatic=lambda shape: True),
}
"""By name, in the order in which `auto` asks them."""


def check_product(name: str) -> None:
    """Raise ValueError unless it names an implementation, or is "auto"."""
    if name not in ("auto", *PRODUCTS):
        raise ValueError(f"unknown implementation {name!r:.80}: choose one of {', '.join(('auto', *PRODUCTS))}")


def choose_product(shape: ProductShape, name: str = "auto") -> str:
    """The implementation that `auto` stands for, or `name` itself.

    Raises NotImplementedError with the reason where `name` cannot serve this shape.
    """
    check_product(name)
    if name == "auto":
        return next(
            each for each, product in PRODUCTS.items() if product.automatic(shape) and product.why_not(shape) is None
        )
    reason = PRODUCTS[name].why_not(shape)
    if reason is not None:
        raise NotImplementedError(f"{name} cannot score tiles: {reason}")
    return name


def tile_scores(logits: EstimatedLogits, name: str = "auto") -> Tensor:
    """`block_max` by the implementation `name`: float32 [batch, query_heads, rows, key_blocks]."""
    return PRODUCTS[choose_product(ProductShape.of(logits), name)].scores(logits)


def low_bit_codes(
    vectors: Tensor, mean: Tensor, bits: int, name: str, *, group_size: int, anchor: Tensor, real: Tensor | None
) -> LowBit:
    """`quantize` for the implementation `name` (not "auto"), which may make its own codes.

    Args:
        group_size: consecutive tokens that share a scale; 1: each has its own.
        anchor: int64 [batch], where a group begins: a token, or a place before or behind them all.
        vectors, mean, bits, real: see `quantize`.
    """
    if name == "triton":
        from sparseprefill.kernels.triton_low_bit import triton_quantize

        return triton_quantize(vectors, mean, bits, group_size=group_size, anchor=anchor, real=real)
    if name == "native" and vectors.stride(-1) == 1:
        return native_quantize(vectors, mean, bits, group_size=group_size, anchor=anchor, real=real)
    if group_size == 1:
        return quantize(vectors, mean, bits, real=real)
    group = (torch.arange(vectors.shape[2], device=vectors.device) - anchor[:, None]) // group_size
    return quantize(vectors, mean, bits, group=group - group[:, :1], real=real)
