"""Patterns of a whole model, and the JSON file that holds them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparseprefill import files
from sparseprefill.patterns.a_shape import AShape
from sparseprefill.patterns.block_sparse import BlockSparse
from sparseprefill.patterns.dense import Dense
from sparseprefill.patterns.last_rows import Pattern
from sparseprefill.patterns.per_head import PerHead
from sparseprefill.patterns.random_blocks import RandomBlocks
from sparseprefill.patterns.tri_shape import TriShape
from sparseprefill.patterns.vertical_slash import VerticalSlash

SCHEMA = 1
# the largest models have 128 layers of 128 heads; a file that claims many times that would only cost memory
MOST_LAYERS, MOST_HEADS = 1024, 1024
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
                return f"the profile was made for {name:.80} {files.shown(value)}, this model has {model[name]!r}"
        if len(self.layers) != model.get("layers", len(self.layers)):
            return f"the profile has {len(self.layers)} layers, this model has {model['layers']}"
        heads = model.get("query_heads")
        for number, layer in enumerate(self.layers):
            if heads is not None and len(layer) != heads:
                return f"layer {number} of the profile has {len(layer)} heads, this model has {heads}"
        return None


def save_patterns(patterns: ModelPatterns, path: str | Path) -> None:
    """Write a profile whole or not at all.

    Raises ValueError for what a profile cannot hold (a pattern of your own, say), FileNotFoundError where the folder
    is missing and OSError where the disk refuses; what stood at `path` is then unchanged.
    """
    layers = [
        [_entry(pattern, f"layer {layer}, head {head}") for head, pattern in enumerate(heads)]
        for layer, heads in enumerate(patterns.layers)
    ]
    data = {"schema": SCHEMA, "model": patterns.model, "layers": layers}
    name = f"the profile for {path}"
    try:
        text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} holds what JSON cannot: {error}") from error
    if len(text) > files.MOST_JSON_BYTES:
        raise ValueError(f"{name} is larger than {files.MOST_JSON_BYTES} bytes, the most that is read")
    if _profile(files.parse_json(text, name), name) != patterns:
        raise ValueError(f"{name} would not be read back as it is: keys and values of `model` must be plain")
    files.write_text(path, text)


def _entry(pattern: Any, place: str) -> dict[str, Any]:
    names = {cls: name for name, cls in PATTERNS.items()}
    if type(pattern) not in names:
        raise ValueError(f"{place}: a profile holds {', '.join(PATTERNS)}, and no {type(pattern).__name__}")
    values = {f.name: getattr(pattern, f.name) for f in dataclasses.fields(pattern)}
    return {"type": names[type(pattern)], **{name: value for name, value in values.items() if value is not None}}


def load_patterns(path: str | Path) -> ModelPatterns:
    """Read a profile, which is data: nothing in it is ever executed.

    Raises FileNotFoundError or PermissionError with the path, and ValueError that names the file and the place that is
    wrong: no JSON, another schema, an unknown pattern, or more than a model has (see `MOST_LAYERS`).
    """
    return _profile(files.read_json(path, "profile"), f"the profile {path}")


def _profile(data: Any, name: str) -> ModelPatterns:
    if not isinstance(data, dict) or type(data.get("schema")) is not int or data["schema"] != SCHEMA:
        found = files.shown(data.get("schema")) if isinstance(data, dict) else None
        raise ValueError(f"{name} has schema {found}; this version reads schema {SCHEMA}")
    strangers = data.keys() - {"schema", "model", "layers"}
    if strangers:
        raise ValueError(f"{name} has an unknown entry {files.shown(min(strangers))}: is it of a later version?")
    layers = data.get("layers")
    if not isinstance(layers, list) or not layers or not all(isinstance(h, list) and h for h in layers):
        raise ValueError(f"{name}: `layers` must be a list of layers, each a list of heads")
    if len(layers) > MOST_LAYERS or max(map(len, layers)) > MOST_HEADS:
        raise ValueError(
            f"{name} has {len(layers)} layers of up to {max(map(len, layers))} heads; "
            f"at most {MOST_LAYERS} of {MOST_HEADS} are read"
        )
    made = tuple(
        tuple(_pattern(entry, f"{name}: layer {layer}, head {head}") for head, entry in enumerate(heads))
        for layer, heads in enumerate(layers)
    )
    model = data.get("model", {})
    if not isinstance(model, dict):
        raise ValueError(f"{name}: `model` must be an object, got {files.shown(model)}")
    return ModelPatterns(made, model)


def _pattern(entry: Any, place: str) -> Pattern:
    kind = entry.get("type") if isinstance(entry, dict) else None
    if not isinstance(kind, str) or kind not in PATTERNS:
        raise ValueError(f"{place}: a pattern needs a `type` of {', '.join(PATTERNS)}, got {files.shown(entry)}")
    options = {name: value for name, value in entry.items() if name != "type"}
    known = [field.name for field in dataclasses.fields(PATTERNS[kind])]
    for name in options:
        if name not in known:
            raise ValueError(f"{place}: {kind} has no option {files.shown(name)}; its options: {', '.join(known)}")
    try:
        pattern: Pattern = PATTERNS[kind](**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from error
    return pattern
