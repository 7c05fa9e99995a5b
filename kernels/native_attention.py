"""The native CPU path: attention over the listed blocks in one pass, keys in whatever order a list names them."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import functional

from sparseprefill.contracts import AttentionInputs, AttentionOutput, BlockIndex
from sparseprefill.kernels.cpu import why_not_cpu
from sparseprefill.kernels.native_build import library, why_not_built

_KINDS = (torch.float32, torch.bfloat16, torch.float16)  # Kind in native_attention.cpp
MOST_QUERIES = 64
"""That one thread decides for at a time, where tiles may be skipped; MOST_QUERIES there."""


def why_not_native_attention(inputs: AttentionInputs, index: BlockIndex | None) -> str | None:
    """Why this path cannot serve these inputs, or None."""
    reason = why_not_cpu(inputs, index)  # the path in torch takes the same
    if reason is not None:
        return reason
    if index is not None and index.skip is not None and index.grid.block_q > MOST_QUERIES:
        return f"where tiles may be skipped it needs rows of at most {MOST_QUERIES} queries, not {index.grid.block_q}"
    return why_not_built()


def native_attention(
    inputs: AttentionInputs,
    index: BlockIndex,
    *,
    values: bool = True,
    only: Tensor | None = None,
    into: AttentionOutput | None = None,
) -> AttentionOutput:
    """Attention over the listed blocks; with `values=False` only lse is computed and no value is read.

    The output's tokens lie outside its heads in memory, as a model wants them next. `only`, `into`: see
    `block_sparse_attention`. `why_not_native_attention` must have said nothing.
    """
    native = library()
    assert native is not None, why_not_built()
    grid, dtype = index.grid, inputs.query.dtype
    query, key, value = map(_readable, (inputs.query, inputs.key, inputs.value))
    if dtype == torch.bfloat16 and inputs.head_dim % 2:  # numbers are multiplied in pairs
        query, key = functional.pad(query, (0, 1)), functional.pad(key, (0, 1))
    own = dtype if dtype != torch.float16 else torch.float32  # what it writes
    shape = (inputs.batch, inputs.queries, inputs.query_heads, inputs.value_dim)
    everywhere = inputs.key_valid is None  # every query stands in some row
    output: Tensor | None = None
    if into is None:
        # the library writes float32 into memory of the CPU, whatever the caller's default dtype and device are
        lse = torch.full(inputs.query.shape[:3], -torch.inf, dtype=torch.float32, device="cpu")
        if values:
            make = torch.empty if everywhere else torch.zeros
            made = make(shape, dtype=own, device="cpu")
            output = made.transpose(1, 2)
    else:
        # heads that are not named keep their bits; what lies otherwise in memory is written over afterwards
        lse = (
            into.lse if into.lse.dtype == torch.float32 and into.lse.is_contiguous() else into.lse.float().contiguous()
        )
        if values and into.output is not None:
            fits = into.output.dtype == own and into.output.stride(-1) == 1
            output = into.output if fits else into.output.to(own).contiguous()
    low, high = inputs.visible_range()
    begin, end = grid.row_slots()
    valid = None if inputs.key_valid is None else inputs.key_valid.contiguous()
    before = None if valid is None else functional.pad(valid.cumsum(1, dtype=torch.int32), (1, 0))
    skip = None if index.skip is None else index.skip.contiguous()
    skipped = None if skip is None else torch.zeros(index.count.shape, dtype=torch.int64, device="cpu")
    columns = index.columns.contiguous()
    visit = columns if index.visit is None else index.visit.contiguous()
    tensors = (
        query, key, value if values else key, columns, index.start.contiguous(), index.count.contiguous(),
        grid.anchor.contiguous(), begin.contiguous(), end.contiguous(), low.to(torch.int32).contiguous(),
        high.to(torch.int32).contiguous(), valid, before,
        None if inputs.sinks is None else inputs.sinks.float().contiguous(),
        None if only is None else only.contiguous(), visit, skip, skipped, output, lse,
    )  # fmt: skip
    strides = [
        stride for each in (query, key, value, output) for stride in ((0, 0, 0) if each is None else each.stride()[:3])
    ]
    numbers = (
        inputs.batch, inputs.query_heads, inputs.kv_heads, grid.rows, inputs.queries, inputs.keys, grid.block_q,
        grid.block_k, query.shape[3], inputs.value_dim, inputs.query_start, _KINDS.index(dtype), *strides,
    )  # fmt: skip
    status = native.sparseprefill_attention(
        (ctypes.c_int64 * len(numbers))(*numbers),
        (ctypes.c_void_p * len(tensors))(*(None if each is None else each.data_ptr() for each in tensors)),
        (ctypes.c_float * 2)(inputs.scale, inputs.softcap or 0.0),
        ctypes.c_int64(torch.get_num_threads()),
    )
    if status == 2:
        raise MemoryError(f"the native library ran out of memory or threads for queries {tuple(inputs.query.shape)}")
    if status:
        raise RuntimeError(f"the native library refused queries of shape {tuple(inputs.query.shape)}")
    count = None if skipped is None else skipped.sum(2)
    if into is None:
        return AttentionOutput(None if output is None else output.to(dtype), lse, count)
    if only is not None and into.skipped is not None:
        into.skipped.copy_(into.skipped.where(~only, 0 if count is None else count))
    if lse is not into.lse:
        into.lse.copy_(torch.where(_marked(only, 3), lse, into.lse))
    if output is not None and into.output is not None and output is not into.output:
        into.output.copy_(torch.where(_marked(only, 4), output.to(into.output.dtype), into.output))
    return into


def _readable(tensor: Tensor) -> Tensor:
    """With the channels of a token beside each other."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _marked(only: Tensor | None, dims: int) -> Tensor:
    assert only is not None
    return only.view(*only.shape, *(1,) * (dims - 2))
