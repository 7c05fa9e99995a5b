"""What wrappers have in common: what they may go around, rows of a grid as calls of their own, joined lists."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.patterns.dense import Dense
from sparseprefill.patterns.last_rows import LastRowsDense
from sparseprefill.patterns.per_head import PerHead, carries


def check_inner(name: str, inner: Any) -> None:
    """Raise TypeError unless a wrapper of this name can go around it: what names blocks of keys as they lie."""
    if not callable(getattr(inner, "build_index", None)) or getattr(inner, "in_parts", False):
        raise TypeError(
            f"{name} goes around a pattern with build_index(inputs, grid), got {type(inner).__name__}: "
            "what moves keys goes around it instead"
        )
    check_names_blocks_alone(name, inner)


def check_asked_often(name: str, inner: Any) -> None:
    """Raise TypeError where a wrapped pattern counts the calls of a layer, which this wrapper asks more than once."""
    if carries(inner):
        raise TypeError(
            f"{type(inner).__name__} carries something from call to call, and {name} asks more than once in a layer: "
            f"put what carries around {name}"
        )


def check_no_skip(name: str, index: BlockIndex) -> None:
    """Raise ValueError where lists say what a kernel may skip, which this wrapper would lose."""
    if index.skip is not None:
        raise ValueError(f"{name} makes lists anew, and would lose which tiles may be skipped: put skipping around it")


def check_names_blocks_alone(name: str, inner: Any) -> None:
    """Raise TypeError where a wrapped pattern would change outputs too, which nobody would ask it for any more."""
    if hasattr(inner, "correct"):
        raise TypeError(
            f"{type(inner).__name__} changes outputs, and goes around {name}: write it the other way round"
        )  # fmt: skip


def inner_for_layer(inner: Any, layer: int) -> Any:
    """What a wrapped pattern is in this layer."""
    own = getattr(inner, "for_layer", None)
    return own(layer) if callable(own) else inner


def keeps_everything(pattern: Any) -> bool:
    """Whether a pattern is dense by its kind."""
    if isinstance(pattern, PerHead):
        return all(map(keeps_everything, pattern.patterns))
    if isinstance(pattern, LastRowsDense):
        return keeps_everything(pattern.pattern)
    own = getattr(pattern, "keeps_everything", None)  # a wrapper knows it
    return bool(own()) if callable(own) else isinstance(pattern, Dense)


def rows_stand_alone(pattern: Any) -> bool:
    """Whether the blocks of a row follow from its own queries and the keys alone, whatever other rows are in the call.

    A pattern says it by `rows_alone`; one that says nothing is taken to look at the whole call.
    """
    if isinstance(pattern, PerHead):
        return all(map(rows_stand_alone, pattern.patterns))
    return bool(getattr(pattern, "rows_alone", False))


def index_of_rows(name: str, inner: Any, inputs: AttentionInputs, grid: BlockGrid, wanted: Tensor) -> BlockIndex:
    """The lists that `inner` makes where some rows are asked alone; those of the other rows mean nothing.

    The lists are those that a call for all rows makes. Where rows stand alone (`rows_stand_alone`), on a CPU each run
    of wanted ones is a call of its own, so that rows that nobody wants cost nothing; on a GPU that would have to be
    read back, and all rows are asked.

    Args:
        name: of the wrapper that asks.
        inner: the pattern.
        inputs: as for `build_index`.
        grid: likewise.
        wanted: bool [batch, rows].

    Raises ValueError where the lists say what a kernel may skip.
    """
    if inputs.device.type != "cpu" or not rows_stand_alone(inner) or bool(wanted.all()):
        whole: BlockIndex = inner.build_index(inputs, grid)
        check_no_skip(name, whole)
        return whole
    masks = torch.zeros(inputs.batch, inputs.query_heads, grid.rows, grid.key_blocks, dtype=torch.bool)
    unjudged = torch.zeros(inputs.batch, inputs.query_heads, dtype=torch.int64)
    for b in range(inputs.batch):  # batch rows want others, and begin at other slots where there is padding
        own = _of_batch_row(inputs, b)
        for start, stop in _runs(wanted[b].tolist()):
            begin = max(int(grid.anchor[b] + (grid.first[b] + start) * grid.block_q), inputs.query_start)
            end = int(grid.anchor[b] + (grid.first[b] + stop) * grid.block_q)
            end = min(end, inputs.query_start + inputs.queries)
            if begin >= end:
                continue
            part = dataclasses.replace(
                own, query=own.query[:, :, begin - inputs.query_start : end - inputs.query_start], query_start=begin
            )
            if part.key_valid is not None and not bool(part.key_valid[:, begin:end].any()):
                continue
            found = inner.build_index(part, BlockGrid.of(part, grid.block_q, grid.block_k))
            check_no_skip(name, found)
            mask = found.to_mask()
            at = int(found.grid.first[0] - grid.first[b])
            rows = min(mask.shape[2], grid.rows - at)
            masks[b, :, at : at + rows, : mask.shape[3]] |= mask[0, :, :rows, : grid.key_blocks]
            if found.unjudged is not None:
                unjudged[b] += found.unjudged[0]
    visible = grid.visible_block_mask(inputs)[:, None]
    masks = masks & visible
    masks |= visible & ~masks.any(-1, keepdim=True)  # rows of padding, and those that nobody wanted
    return dataclasses.replace(BlockIndex.from_mask(grid, masks), unjudged=unjudged)


def _runs(wanted: Sequence[bool]) -> list[tuple[int, int]]:
    """[start, stop) of each run of True."""
    edges = [n for n, (a, b) in enumerate(itertools.pairwise([False, *wanted, False])) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _of_batch_row(inputs: AttentionInputs, b: int) -> AttentionInputs:
    if inputs.batch == 1:
        return inputs
    cut: dict[str, Any] = {
        name: None if getattr(inputs, name) is None else getattr(inputs, name)[b : b + 1]
        for name in ("query", "key", "value", "key_valid", "segment")
    }
    return dataclasses.replace(inputs, **cut)
