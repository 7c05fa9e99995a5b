"""Inputs and promises that the tests of strided selectors share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from method_cases import INPUTS as SHARED_INPUTS
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.patterns import Dense
from support import left_padding, make_inputs

Slow = Callable[[AttentionInputs, int, int, Iterable[int], Any, int, int], dict[int, set[int]]]


def with_holes(valid: Tensor) -> Tensor:
    """A second turn in a left-padded batch: padding between valid keys."""
    valid = valid.clone()
    valid[0, 50:59] = False
    valid[-1, 100:141] = False
    return valid


INPUTS: dict[str, dict[str, Any]] = {
    **SHARED_INPUTS,
    "holes": {"batch": 2, "queries": 90, "keys": 200, "key_valid": with_holes(left_padding(200, [3, 75]))},
    "window": {"queries": 200, "window": 61},
    "packed": {"queries": 200, "segment": torch.tensor([[0] * 90 + [1] * 110])},
    # in a group of 4 the window begins behind the last valid key
    "holes-window": {
        "batch": 2, "queries": 90, "keys": 200, "key_valid": with_holes(left_padding(200, [3, 75])), "window": 62,
    },
    "static-cache": {"queries": 100, "keys": 300, "query_start": 50, "key_length": 150},
    "cut-cache": {"queries": 100, "keys": 300, "query_start": 50, "key_length": 90},
}  # fmt: skip
TILES = [(16, 16), (32, 16), (16, 32), (48, 20)]
ON_TILES = [
    *((name, TILES[0]) for name in INPUTS),
    *((name, sizes) for name in ("holes", "chunk", "static-cache") for sizes in TILES[1:]),
]


def index_of(pattern: Any, inputs: AttentionInputs, block_q: int = 16, block_k: int = 16) -> BlockIndex:
    index: BlockIndex = pattern.build_index(inputs, BlockGrid.of(inputs, block_q, block_k))
    return index


def poisoned(inputs: AttentionInputs) -> AttentionInputs:
    """What may not be looked at is NaN: padding, and the part of a cache that is not filled."""
    there = torch.ones(inputs.batch, inputs.keys, dtype=torch.bool) if inputs.key_valid is None else inputs.key_valid
    there = there & (torch.arange(inputs.keys) < inputs.filled)
    asked = there[:, inputs.query_start : inputs.query_start + inputs.queries]
    if inputs.key_valid is None:
        asked = torch.ones_like(asked)
    changes = {n: getattr(inputs, n).masked_fill(~there[:, None, :, None], torch.nan) for n in ("key", "value")}
    return dataclasses.replace(
        inputs, query=inputs.query.masked_fill(~asked[:, None, :, None], torch.nan), **changes
    )  # fmt: skip


def assert_equals_slow(pattern: Any, slow: Slow, name: str, block_q: int, block_k: int) -> None:
    """The same lists in float64, for each row of the grid in which a valid query stands or padding before one."""
    inputs = make_inputs(query_heads=2, kv_heads=1, head_dim=8, dtype=torch.float64, seed=3, **INPUTS[name])
    index = index_of(pattern, poisoned(inputs), block_q, block_k)
    mask = index.to_mask()
    start, stop = inputs.query_start, inputs.query_start + inputs.queries
    for b in range(inputs.batch):
        anchor, first = int(index.grid.anchor[b]), int(index.grid.first[b])
        valid = torch.ones(inputs.keys, dtype=torch.bool) if inputs.key_valid is None else inputs.key_valid[b]
        rows = []
        for m in range(first, first + index.grid.rows):
            slots = [p for p in range(anchor + m * block_q, anchor + (m + 1) * block_q) if start <= p < stop]
            if any(valid[p] for p in slots):
                rows.append(m)
        for h in range(2):
            expected = slow(inputs, b, h, rows, pattern, block_q, block_k)
            for m in rows:
                got = set(mask[b, h, m - first].nonzero()[:, 0].tolist())
                assert got == expected[m], f"batch row {b}, head {h}, grid row {m}"
    assert index.unjudged is None or not index.unjudged.any()


def assert_legal(pattern: Any, full: Any, name: str, block_q: int, block_k: int) -> None:
    """Lists are what the kernels ask for, they hold the row's own blocks, and a full budget is dense."""
    inputs = make_inputs(head_dim=8, **INPUTS[name])
    index = index_of(pattern, poisoned(inputs), block_q, block_k)
    index.validate(inputs)  # never empty, ascending, unique, nothing of the future
    dense = index_of(Dense(), inputs, block_q, block_k).to_mask()
    assert torch.equal(index_of(full, inputs, block_q, block_k).to_mask(), dense)
    slot = torch.arange(inputs.query_start, inputs.query_start + inputs.queries)
    own = (slot - index.grid.anchor[:, None]) // block_k
    row = index.grid.query_rows()
    mask, seen = index.to_mask(), (row >= 0) & (slot < inputs.filled)
    for b in range(inputs.batch):
        assert mask[b][:, row[b][seen[b]], own[b][seen[b]]].all(), "a query does not see its own block"


def assert_batch_rows_are_independent(pattern: Any, right: bool) -> None:
    pads = (0, 75, 30)
    valid = left_padding(200, list(pads))
    inputs = make_inputs(batch=3, queries=200, head_dim=8, key_valid=valid.flip(1) if right else valid)
    mask = index_of(pattern, poisoned(inputs)).to_mask()
    for b, pad in enumerate(pads):
        here = slice(0, 200 - pad) if right else slice(pad, 200)
        row = dataclasses.replace(
            inputs, **{n: getattr(inputs, n)[b : b + 1, :, here] for n in ("query", "key", "value")}, key_valid=None
        )
        alone = index_of(pattern, row)
        rows, blocks = alone.grid.rows, alone.grid.key_blocks
        assert torch.equal(mask[b : b + 1, :, :rows, :blocks], alone.to_mask())


def looks_ahead(pattern: Any, block_q: int = 16, block_k: int = 16) -> bool:
    """Whether the blocks of some row change with tokens behind it, or with how many there are."""
    before, other = (make_inputs(queries=240, head_dim=8, seed=seed) for seed in (1, 2))
    changed = False
    whole = index_of(pattern, before, block_q, block_k).to_mask()
    for m in range(1, 240 // block_q, 2):
        edge = (m + 1) * block_q
        later = {
            n: torch.cat([getattr(before, n)[:, :, :edge], getattr(other, n)[:, :, edge:] * 3], 2)
            for n in ("query", "key", "value")
        }
        a = index_of(pattern, dataclasses.replace(before, **later), block_q, block_k).to_mask()
        short = dataclasses.replace(before, **{n: getattr(before, n)[:, :, :edge] for n in later})
        b = index_of(pattern, short, block_q, block_k).to_mask()
        changed |= not torch.equal(a[:, :, : m + 1], whole[:, :, : m + 1])
        changed |= not torch.equal(b, whole[:, :, : m + 1, : b.shape[-1]])
    return changed


def chunk_of(inputs: AttentionInputs, start: int, stop: int) -> AttentionInputs:
    """Queries [start, stop) of a prompt, with the keys so far."""
    return dataclasses.replace(
        inputs, query=inputs.query[:, :, start:stop], key=inputs.key[:, :, :stop], value=inputs.value[:, :, :stop],
        query_start=inputs.query_start + start,
        key_valid=None if inputs.key_valid is None else inputs.key_valid[:, :stop],
    )  # fmt: skip
