"""Which implementation computes the blocks: each can say why it cannot, `auto` listens, an explicit choice raises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, AttentionOutput, BlockIndex
from sparseprefill.kernels.cpu import cpu_attention, why_not_cpu
from sparseprefill.kernels.native_attention import native_attention, why_not_native_attention
from sparseprefill.kernels.native_build import why_torch_is_faster
from sparseprefill.kernels.reference import reference_attention

if TYPE_CHECKING:
    from sparseprefill.kernels.triton_forward import DeviceLimits


@dataclass(frozen=True, slots=True)
class Implementation:
    """A way to compute block-sparse attention."""

    why_not: Callable[[AttentionInputs, BlockIndex | None], str | None]
    attend: Callable[..., AttentionOutput]  # (inputs, index, values, only, into)
    automatic: Callable[[AttentionInputs], bool]  # may `auto` ask it?


def _reference(
    inputs: AttentionInputs, index: BlockIndex, values: bool, only: Tensor | None, into: AttentionOutput | None
) -> AttentionOutput:
    full = reference_attention(inputs, index)
    if only is None or into is None:
        return full if values else AttentionOutput(None, full.lse, full.skipped)
    into.lse.copy_(torch.where(only[..., None], full.lse, into.lse))
    if values and into.output is not None and full.output is not None:
        into.output.copy_(torch.where(only[..., None, None], full.output, into.output))
    if into.skipped is not None:
        into.skipped.copy_(into.skipped.where(~only, 0 if full.skipped is None else full.skipped))
    return into


def _cpu(
    inputs: AttentionInputs, index: BlockIndex, values: bool, only: Tensor | None, into: AttentionOutput | None
) -> AttentionOutput:
    return cpu_attention(inputs, index, values=values, only=only, into=into)


def _native(
    inputs: AttentionInputs, index: BlockIndex, values: bool, only: Tensor | None, into: AttentionOutput | None
) -> AttentionOutput:
    return native_attention(inputs, index, values=values, only=only, into=into)


def _why_not_triton(inputs: AttentionInputs, index: BlockIndex | None) -> str | None:
    try:
        from sparseprefill.kernels.triton_forward import why_not_triton
    except ImportError as error:
        return f"triton cannot be imported ({error}); on Linux: pip install triton"
    return why_not_triton(inputs, index)


def _triton(
    inputs: AttentionInputs, index: BlockIndex, values: bool, only: Tensor | None, into: AttentionOutput | None
) -> AttentionOutput:
    from sparseprefill.kernels.triton_forward import triton_attention

    return triton_attention(inputs, index, values=values, only=only, into=into)


def device_limits(device: torch.device) -> DeviceLimits:
    """What a GPU says of itself, as far as it limits the Triton kernels. Raises ImportError without triton."""
    from sparseprefill.kernels.triton_forward import device_limits as ask

    return ask(device)


IMPLEMENTATIONS: dict[str, Implementation] = {
    # on the CPU triton is only ever an interpreter, for those who ask for it
    "triton": Implementation(_why_not_triton, _triton, automatic=lambda inputs: inputs.device.type != "cpu"),
    "native": Implementation(
        why_not_native_attention,
        _native,
        automatic=lambda inputs: inputs.device.type == "cpu" and why_torch_is_faster() is None,
    ),
    "cpu": Implementation(why_not_cpu, _cpu, automatic=lambda inputs: True),
    "reference": Implementation(lambda inputs, index: None, _reference, automatic=lambda inputs: False),
}
"""By name, in the order in which `auto` asks them."""


def why_not(impl: str, inputs: AttentionInputs, index: BlockIndex | None = None) -> str | None:
    """Why this implementation cannot serve these inputs (on this index, if given), or None if it can."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {impl!r}: choose one of {', '.join(['auto', *IMPLEMENTATIONS])}")
    return IMPLEMENTATIONS[impl].why_not(inputs, index)


def choose_implementation(inputs: AttentionInputs, index: BlockIndex | None = None) -> str:
    """The implementation `auto` stands for. Raises NotImplementedError with every reason where there is none."""
    reasons = []
    for name, implementation in IMPLEMENTATIONS.items():
        if not implementation.automatic(inputs):
            continue
        reason = implementation.why_not(inputs, index)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise NotImplementedError("no kernel serves these inputs. " + "; ".join(reasons))


def block_sparse_attention(
    inputs: AttentionInputs,
    index: BlockIndex,
    impl: str = "auto",
    *,
    values: bool = True,
    only: Tensor | None = None,
    into: AttentionOutput | None = None,
) -> AttentionOutput:
    """Attention of each query over the visible keys in the blocks listed for its row.

    Where the index has `skip`, tiles are left out while they are visited, as `BlockIndex` says, and the result counts
    their pairs. The reference and the CPU decide for whole tiles of the grid. A Triton program decides for each tile
    that it computes, smaller ones where blocks are large (`choose_tiling`); the same lambda bounds what it drops.

    Args:
        inputs: see `AttentionInputs`.
        index: see `BlockIndex`; must stand on the grid of these inputs.
        impl: "triton", "native" (on the CPU, once built), "cpu", "reference" (float64, slow) or "auto": the first of
            them that can, never the reference.
        values: False computes lse alone and reads no values.
        only: bool [batch, query_heads] on the device of the inputs: these heads alone are computed and written over
            those in `into`, whose other heads keep their bits. Nothing is read back from a GPU.
        into: an earlier result of the same implementation for these inputs; goes with `only`. One that counts skipped
            pairs where this index has `skip`.

    Returns:
        `AttentionOutput`: output in the dtype of the inputs (float64 from the reference) and lse in float32; `into`
        where it was given.

    Raises:
        ValueError: unknown `impl`, an index made for other inputs, or an `only` and `into` that do not fit them.
        NotImplementedError: the chosen implementation (or, for "auto", every one) cannot; the message says why.
    """
    misfit = index.grid.fits(inputs)
    if misfit is not None:
        raise ValueError(f"the index does not belong to these inputs: {misfit}")
    if index.query_heads != inputs.query_heads:
        raise ValueError(f"the index lists blocks of {index.query_heads} heads, the query has {inputs.query_heads}")
    misfit = _why_not_into(inputs, index, values, only, into)
    if misfit is not None:
        raise ValueError(misfit)
    if impl == "auto":
        impl = choose_implementation(inputs, index)
    else:
        reason = why_not(impl, inputs, index)
        if reason is not None:
            raise NotImplementedError(f"{impl} cannot compute this: {reason}")
    with torch.autocast(inputs.device.type, enabled=False):  # what is float32 inside a kernel stays it
        return IMPLEMENTATIONS[impl].attend(inputs, index, values, only, into)


def _why_not_into(
    inputs: AttentionInputs, index: BlockIndex, values: bool, only: Tensor | None, into: AttentionOutput | None
) -> str | None:
    """Why some heads cannot be computed into an earlier result, or None."""
    if only is None and into is None:
        return None
    if only is None or into is None:
        return "`only` names the heads to compute and `into` the result they go into: give both or neither"
    if only.dtype != torch.bool or only.shape != inputs.query.shape[:2] or only.device != inputs.device:
        return (
            f"only must be bool [batch, query_heads] = {tuple(inputs.query.shape[:2])} on {inputs.device}, "
            f"got {only.dtype} {tuple(only.shape)} on {only.device}"
        )
    if into.lse.shape != inputs.query.shape[:3] or into.lse.device != inputs.device:
        return f"into is a result of other inputs: its lse is {tuple(into.lse.shape)} on {into.lse.device}"
    shape = (*inputs.query.shape[:3], inputs.value_dim)
    if into.output is not None and (into.output.shape != shape or into.output.device != inputs.device):
        return (
            f"into is a result of other inputs: its output is {tuple(into.output.shape)} on {into.output.device}, "
            f"these give {shape} on {inputs.device}"
        )
    if (into.output is not None) != values:
        return "into must hold an output where values are computed, and none where lse alone is"
    if index.skip is not None and into.skipped is None:
        return (
            "this index may skip tiles, and into does not count them: compute it with `skip` too (-inf skips nothing)"
        )
    return None
