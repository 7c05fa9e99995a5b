"""MInference's own configuration files, read as patterns of this package.

Jiang et al., "MInference 1.0", 2024, arXiv:2407.02490: its search writes a JSON list of layers, each an object of query
heads, {"0": [type, v, s, score], ...}. Where its rule and the pattern here differ, or where a head says nothing that
can be mapped, a note says so; such a head is dense, never what MInference would quietly take for it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparseprefill import files
from sparseprefill.patterns.a_shape import AShape
from sparseprefill.patterns.block_sparse import BlockSparse
from sparseprefill.patterns.dense import Dense
from sparseprefill.patterns.last_rows import Pattern
from sparseprefill.patterns.store import MOST_HEADS, MOST_LAYERS
from sparseprefill.patterns.vertical_slash import VerticalSlash

_LEAST_COLUMNS, _LEAST_DISTANCES = 30, 50  # MInference raises smaller budgets to these when it runs
_TOP_BLOCKS, _BLOCK = 100, 64  # what its block-sparse kernel always takes
_DENSE = ", dense here"  # ends what is said of a head that cannot be mapped
_RAISED = f"budgets below {_LEAST_COLUMNS} columns or {_LEAST_DISTANCES} distances are raised to them, as by MInference"

_TAKEN: dict[str, tuple[Callable[[int, int], Pattern], str]] = {
    "vertical_and_slash": (
        lambda v, s: VerticalSlash(verticals=max(v, _LEAST_COLUMNS), slashes=max(s, _LEAST_DISTANCES)),
        "columns and distances are single tokens in MInference and whole blocks here: budgets in tokens are the same, "
        "rounded up to blocks, but stand together; what covers most of the last queries' attention may differ",
    ),
    "stream_llm": (
        lambda v, s: AShape(sink=v, window=s),
        "every block that holds a token of the sink or of the window is computed whole",
    ),
    "block_sparse": (
        lambda v, s: BlockSparse(keep=_TOP_BLOCKS * _BLOCK, sink=0, local=0),
        f"MInference's kernel takes {_TOP_BLOCKS} blocks of {_BLOCK} tokens whatever the entry says: as many tokens "
        "are kept here, and the numbers of the entry are not used",
    ),
}  # fmt: skip
"""By MInference's name: the pattern of (v, s), and what changes in meaning."""


def read_minference(
    path: str | Path, *, query_heads: int | Sequence[int] | None = None, layers: int | None = None
) -> tuple[list[list[Pattern]], list[str]]:
    """Patterns [layer][query head] of a configuration file of MInference, and notes for whoever imports it.

    `vertical_and_slash` becomes `VerticalSlash`, its budgets raised to 30 columns and 50 distances as MInference does;
    `stream_llm` becomes `AShape`; `block_sparse` becomes `BlockSparse` with 6400 tokens, sink and window not forced. A
    note says once for each what changes in meaning. A head that is missing, or whose entry cannot be mapped (another
    type, no whole numbers), is `Dense`, and a note names it. The scores are of MInference's search and are not kept.

    Args:
        query_heads: of the model, one number or one a layer. None: one more than the largest head the file names.
        layers: of the model. None: as many as the file has.

    Raises:
        FileNotFoundError, PermissionError: as for any file.
        ValueError: no such JSON; more layers or heads than the model has, or fewer layers; more than a model can have.
    """
    name = f"the MInference configuration {path}"
    data = files.read_json(path, "MInference configuration")
    if not isinstance(data, list) or not data or not all(isinstance(layer, dict) for layer in data):
        raise ValueError(f"{name} must be a list of layers, each an object of heads, got {files.shown(data)}")
    if len(data) > MOST_LAYERS:
        raise ValueError(f"{name} has {len(data)} layers, at most {MOST_LAYERS} are read")
    if layers is not None and len(data) != layers:
        unfinished = "; its search writes a layer at a time and may not have ended" if len(data) < layers else ""
        raise ValueError(f"{name} has {len(data)} layers, the model has {layers}{unfinished}")
    entries = [_by_head(layer, f"{name}: layer {number}") for number, layer in enumerate(data)]
    counts, notes = _counts(entries, query_heads, name)

    patterns: list[list[Pattern]] = []
    types: set[str] = set()
    doubts: dict[str, list[tuple[int, int, str]]] = {}  # layer, head and what stands there, by what is said of them
    for number, (layer, count) in enumerate(zip(entries, counts, strict=True)):
        patterns.append([])
        for head in range(count):
            entry: Any = layer.get(head)
            pattern, doubt = _pattern(entry) if head in layer else (Dense(), f"not in the file{_DENSE}")
            patterns[-1].append(pattern)
            if not isinstance(pattern, Dense):
                types.add(entry[0])
            if doubt is not None:
                shown = files.shown(entry, 60) if head in layer else ""
                doubts.setdefault(doubt, []).append((number, head, shown))
    notes += [f"{kind}: {what}" for kind, (_, what) in _TAKEN.items() if kind in types]
    for doubt, places in doubts.items():
        example = places[0][2] and f"; the first is {places[0][2]}"
        notes.append(f"{doubt}: {_places([place[:2] for place in places])}{example}")
    return patterns, notes


def _by_head(layer: dict[str, Any], place: str) -> dict[int, Any]:
    """A layer's entries by head number."""
    for key in layer:
        if not re.fullmatch("0|[1-9][0-9]{0,5}", key):
            raise ValueError(f"{place} has an entry {files.shown(key)}, which is no number of a head")
    return {int(key): entry for key, entry in layer.items()}


def _counts(
    entries: list[dict[int, Any]], query_heads: int | Sequence[int] | None, name: str
) -> tuple[list[int], list[str]]:
    """Heads of every layer, checked, and what to say of them."""
    notes = []
    largest = max((head for layer in entries for head in layer), default=-1)
    if query_heads is None:
        if largest < 0:
            raise ValueError(f"{name} names no head at all")
        counts = [largest + 1] * len(entries)
        notes = [f"heads a layer: {largest + 1}, one more than the largest number in the file"]
    elif isinstance(query_heads, int):
        counts = [query_heads] * len(entries)
    else:
        counts = list(query_heads)
    if len(counts) != len(entries):
        raise ValueError(f"{name} has {len(entries)} layers, query_heads has numbers for {len(counts)}")
    for number, (layer, count) in enumerate(zip(entries, counts, strict=True)):
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST_HEADS:
            raise ValueError(
                f"{name}: layer {number} would have {files.shown(count)} query heads; 1 to {MOST_HEADS} are read"
            )
        if max(layer, default=0) >= count:
            raise ValueError(
                f"{name}: layer {number} names head {max(layer)}, the model has {count} heads there: it was made for "
                "another model"
            )
    return counts, notes


def _pattern(entry: Any) -> tuple[Pattern, str | None]:
    """The pattern of an entry, and what is to be said of it and others like it."""
    if not isinstance(entry, list) or len(entry) != 4:
        return Dense(), f"no [type, v, s, score]{_DENSE}"
    kind, v, s, score = entry
    if not isinstance(kind, str) or kind not in _TAKEN:
        return Dense(), f"unknown type{_DENSE}"
    if any(isinstance(x, bool) or not isinstance(x, int) or x < 0 for x in (v, s)):
        return Dense(), f"v and s are no numbers of tokens{_DENSE}"
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        return Dense(), f"the score is no number{_DENSE}"
    try:
        pattern = _TAKEN[kind][0](v, s)
    except ValueError:
        return Dense(), f"v and s are out of range{_DENSE}"
    low = kind == "vertical_and_slash" and (v < _LEAST_COLUMNS or s < _LEAST_DISTANCES)
    return pattern, _RAISED if low else None


def _places(places: Sequence[tuple[int, int]]) -> str:
    """As in "layer 0: heads 3, 5-7; layer 2: head 1"."""
    said = []
    for layer, group in itertools.groupby(places, key=lambda place: place[0]):
        heads = dict.fromkeys(head for _, head in group)
        starts = [head for head in heads if head - 1 not in heads]
        ends = [head for head in heads if head + 1 not in heads]
        runs = [f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
        said.append(f"layer {layer}: head{'s' * (len(heads) > 1)} {', '.join(runs)}")
    return "; ".join(said)
