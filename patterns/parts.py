"""Attention in several parts: what a pattern that changes the keys asks for.

Most patterns name blocks of the keys as they are, by `build_index`. One that lays keys in another order says so with
`in_parts = True` and has the verb

    build_parts(inputs, grid) -> tuple[Part, ...]

instead: inputs and an index for each of some disjoint sets of keys, whose results are joined by logsumexp. The first
part is of the keys as they are, and carries what an index says of the whole call (`unjudged`). Where there are several
parts, rows of an index may be empty. Queries of a part may stand in another order too, and its keys stand for more than
themselves: sampled ones do, and then lse is an estimate of what dense attention has. A pattern that changes the outputs
has the verb `correct`: see `corrected`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, AttentionOutput, BlockGrid, BlockIndex
from sparseprefill.coverage import Coverage, coverage
from sparseprefill.kernels import block_sparse_attention
from sparseprefill.kernels.join import join_outputs
from sparseprefill.patterns.per_head import inside


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Some of the keys, and which of their blocks each row attends to."""

    inputs: AttentionInputs  # of the same queries; keys and values may lie in another order
    index: BlockIndex  # on the grid of these inputs; all queries, keys of this part alone, rows may be empty
    order: Tensor | None = None  # int64 [batch, query_heads, queries]: which query stands in each place; None: its own
    log_weight: Tensor | None = None  # float [batch, 1, queries] by place: each key stands for exp of it many


def parts_of(pattern: Any, inputs: AttentionInputs, grid: BlockGrid) -> tuple[Part, ...]:
    """What a pattern computes: its parts, or its index over the keys as they are."""
    if getattr(pattern, "in_parts", False):
        parts: tuple[Part, ...] = pattern.build_parts(inputs, grid)
        return parts
    return (Part(inputs, pattern.build_index(inputs, grid)),)


def estimates(pattern: Any) -> bool:
    """Whether keys stand for others, so that lse is an estimate and nobody knows what mass is kept: `weighs_keys`."""
    return bool(getattr(pattern, "weighs_keys", False)) or any(map(estimates, inside(pattern)))


def attend(parts: Sequence[Part], impl: str = "auto", *, values: bool = True) -> AttentionOutput:
    """Attention over all parts; `impl` and `values` as for `block_sparse_attention`. Sinks take their share once."""
    if len(parts) == 1:
        return block_sparse_attention(parts[0].inputs, parts[0].index, impl, values=values)
    sinks = parts[0].inputs.sinks
    own = [dataclasses.replace(part.inputs, sinks=None) for part in parts]
    results = [
        placed(block_sparse_attention(inputs, part.index, impl, values=values), part)
        for inputs, part in zip(own, parts, strict=True)
    ]
    return join_outputs(results, sinks if values else None)


def placed(result: AttentionOutput, part: Part) -> AttentionOutput:
    """The result with the weight of its keys, and each query where it belongs."""
    output, lse = result.output, result.lse
    if part.log_weight is not None:
        lse = lse + part.log_weight.to(lse.dtype)
    if part.order is not None:
        lse = torch.empty_like(lse).scatter_(2, part.order, lse)
        if output is not None:
            output = torch.empty_like(output).scatter_(2, part.order[..., None].expand_as(output), output)
    return dataclasses.replace(result, output=output, lse=lse)


def corrected(
    pattern: Any, inputs: AttentionInputs, parts: Sequence[Part], result: AttentionOutput
) -> AttentionOutput:  # fmt: skip
    """What a pattern makes of the result of its parts, by its verb `correct(inputs, parts, result)`, if it has one."""
    own = getattr(pattern, "correct", None)
    changed: AttentionOutput = own(inputs, tuple(parts), result) if callable(own) else result
    return changed


def attended(pattern: Any, inputs: AttentionInputs, parts: Sequence[Part], impl: str = "auto") -> AttentionOutput:
    """What a patch computes once the blocks are known: attention over the parts, corrected where a pattern does so."""
    return corrected(pattern, inputs, parts, attend(parts, impl))


def parts_coverage(parts: Sequence[Part], skipped: Tensor | None = None) -> Coverage:
    """What all parts compute together; see `coverage`. `skipped` is that of the joined result."""
    counts = [coverage(part.inputs, part.index) for part in parts]
    kept, tiles = (
        sum((getattr(each, name) for each in counts[1:]), getattr(counts[0], name)) for name in ("kept", "tiles")
    )
    none = torch.zeros_like(counts[0].kept)
    return dataclasses.replace(counts[0], kept=kept, tiles=tiles, skipped=none if skipped is None else skipped.sum(0))


def without_heads(index: BlockIndex, heads: Tensor) -> BlockIndex:
    """The lists of these heads (bool [batch, query_heads]) made empty."""
    return dataclasses.replace(index, count=index.count.masked_fill(heads[..., None], 0), alike=1)
