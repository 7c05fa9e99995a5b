"""Patterns of a whole model, and the JSON file that holds them."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparseprefill.patterns.a_shape import AShape
from sparseprefill.patterns.block_sparse import BlockSparse
from sparseprefill.patterns.dense import Dense
from sparseprefill.patterns.last_rows import Pattern
from sparseprefill.patterns.per_head import PerHead
from sparseprefill.patterns.random_blocks import RandomBlocks
from sparseprefill.patterns.tri_shape import TriShape
from sparseprefill.patterns.vertical_slash import VerticalSlash

SCHEMA = 1
# the names that patterns have in a file
PATTERNS: dict[str, type[Any]] = {
    "dense": Dense,
    "a_shape": AShape,
    "tri_shape": TriShape,
    "vertical_slash": VerticalSlash,
    "block_sparse": BlockSparse,
    "random": RandomBlocks,
}


@dataclass(frozen=True, slots=True)
class ModelPatterns:
    """A pattern for every layer and query head, and the model they were made for."""

    layers: tuple[tuple[Pattern, ...], ...]  # [layer][query head]
    model: dict[str, Any] = field(default_factory=dict)  # hard keys of the model; see `mismatch`

    def for_layer(self, layer: int) -> Pattern:
        """The heads of one layer; one pattern where they all agree."""
        if not 0 <= layer < len(self.layers):
            raise ValueError(f"the profile has {len(self.layers)} layers, layer {layer} was asked for")
        own = (getattr(pattern, "for_layer", None) for pattern in self.layers[layer])
        heads = tuple(
            made(layer) if callable(made) else pattern for pattern, made in zip(self.layers[layer], own, strict=True)
        )
        return heads[0] if len(set(heads)) == 1 else PerHead(heads)

    def map(self, change: Callable[[Pattern], Pattern]) -> ModelPatterns:
        """Every pattern replaced by change(pattern)."""
        return dataclasses.replace(self, layers=tuple(tuple(map(change, heads)) for heads in self.layers))

    def mismatch(self, model: dict[str, Any]) -> str | None:
        """Why these patterns are not for a model with these keys, or None. Keys only one side knows are passed over."""
        for name, value in self.model.items():
            if name in model and model[name] != value:
                return f"the profile was made for {name} {value!r}, this model has {model[name]!r}"
        if len(self.layers) != model.get("layers", len(self.layers)):
            return f"the profile has {len(self.layers)} layers, this model has {model['layers']}"
        heads = model.get("query_heads")
        for number, layer in enumerate(self.layers):
            if heads is not None and len(layer) != heads:
                return f"layer {number} of the profile has {len(layer)} heads, this model has {heads}"
        return None


def save_patterns(patterns: ModelPatterns, path: str | Path) -> None:
    """Write a profile; an unfinished file never stands at `path`."""
    names = {cls: name for name, cls in PATTERNS.items()}
    layers = [[{"type": names[type(p)], **_given(p)} for p in heads] for heads in patterns.layers]
    path = Path(path)
    text = json.dumps({"schema": SCHEMA, "model": patterns.model, "layers": layers}, indent=1)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        Path(part).replace(path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def _given(pattern: Any) -> dict[str, Any]:
    values = {f.name: getattr(pattern, f.name) for f in dataclasses.fields(pattern)}
    return {name: value for name, value in values.items() if value is not None}


def load_patterns(path: str | Path) -> ModelPatterns:
    """Read a profile. Raises FileNotFoundError, or ValueError that names the file and the place that is wrong."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no profile at {path}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON profile: {error}") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else None
        raise ValueError(f"{path} has schema {found!r}; this version reads schema {SCHEMA}")
    layers = data.get("layers")
    if not isinstance(layers, list) or not layers or not all(isinstance(h, list) and h for h in layers):
        raise ValueError(f"{path}: `layers` must be a list of layers, each a list of heads")
    made = tuple(
        tuple(_pattern(entry, f"{path}: layer {layer}, head {head}") for head, entry in enumerate(heads))
        for layer, heads in enumerate(layers)
    )
    model = data.get("model", {})
    if not isinstance(model, dict):
        raise ValueError(f"{path}: `model` must be an object, got {type(model).__name__}")
    return ModelPatterns(made, model)


def _pattern(entry: Any, place: str) -> Pattern:
    if not isinstance(entry, dict) or entry.get("type") not in PATTERNS:
        raise ValueError(f"{place}: a pattern needs a `type` of {', '.join(PATTERNS)}, got {entry!r}")
    options = {name: value for name, value in entry.items() if name != "type"}
    try:
        pattern: Pattern = PATTERNS[entry["type"]](**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from error
    return pattern
