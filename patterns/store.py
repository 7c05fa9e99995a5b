"""Patterns of a whole model, and the JSON file that holds them: the profile.

A profile says for which model it was made (hard keys: another value is refused), of which weights (a soft key), how it
was made, and for each query head its pattern with what it kept and cost on the prompts it was chosen on and on held-out
ones. Nothing in it is measured in seconds: what pays off depends on the machine, and a profile does not.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from sparseprefill import files
from sparseprefill.patterns.last_rows import Pattern
from sparseprefill.patterns.methods import METHODS
from sparseprefill.patterns.per_head import PerHead

SCHEMA = 2
HARD_KEYS = ("architecture", "layers", "query_heads", "kv_heads", "head_dim", "rope", "vocabulary")
"""What a model must agree on with the one that a profile was made for."""

INSIDE = "inside"
"""Names the profile of the model that ships inside where a path is asked for."""

SALE_INSIDE = "inside:sale"
"""Names that model's thresholds of SALE."""

_SHIPPED = {INSIDE: "profile.json", SALE_INSIDE: "sale.json"}

# the largest models have 128 layers of 128 heads; a file that claims many times that would only cost memory
MOST_LAYERS, MOST_HEADS = 1024, 1024
# the names that patterns have in a file
PATTERNS: dict[str, type[Any]] = {name: row.pattern for name, row in METHODS.items() if row.stored}


@dataclass(frozen=True, slots=True)
class HeadScore:
    """What a head's pattern keeps and costs, means over some prompts."""

    mass: float  # attention mass kept, mean over query rows
    low_mass: float  # kept at least by all query rows but the share that the profile names
    density: float  # (query, key) pairs of computed tiles over all visible pairs
    work: float  # tile_work and the work of finding the blocks, in units of dense attention

    def __post_init__(self) -> None:
        for name, most in (("mass", 1.0), ("low_mass", 1.0), ("density", 1.0), ("work", 1e6)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {files.shown(value)}")
            if not 0 <= value <= most:
                raise ValueError(f"{name} must be between 0 and {most:g}, got {files.shown(value)}")


@dataclass(frozen=True, slots=True)
class ModelPatterns:
    """A pattern for every layer and query head, the model they were made for, and why each was chosen."""

    layers: tuple[tuple[Pattern, ...], ...]  # [layer][query head]
    model: dict[str, Any] = field(default_factory=dict)  # `HARD_KEYS` of the model; see `mismatch`
    weights: str | None = None  # hash of the weights, see `sparseprefill.huggingface_weights`; None: not known
    tuning: tuple[tuple[HeadScore | None, ...], ...] = ()  # [layer][query head] on the prompts it was chosen on, or ()
    held_out: tuple[tuple[HeadScore | None, ...], ...] = ()  # the same on prompts that had no part in the choice
    made: dict[str, Any] = field(default_factory=dict)  # how: version, prompts, target, candidates; {}: by hand

    def __post_init__(self) -> None:
        for name in ("tuning", "held_out"):
            scores = getattr(self, name)
            if scores and [len(heads) for heads in scores] != [len(heads) for heads in self.layers]:
                raise ValueError(f"{name} must have a score (or None) for each head of each layer")

    def for_layer(self, layer: int) -> Pattern:
        """The heads of one layer; one pattern where they all agree.

        A pattern that has `expecting(density)` learns the density that it had on the prompts it was chosen on.
        """
        if not 0 <= layer < len(self.layers):
            raise ValueError(f"the profile has {len(self.layers)} layers, layer {layer} was asked for")
        heads = tuple(self._of_head(layer, head) for head in range(len(self.layers[layer])))
        return heads[0] if len(set(heads)) == 1 else PerHead(heads)

    def _of_head(self, layer: int, head: int) -> Pattern:
        pattern: Any = self.layers[layer][head]
        if hasattr(pattern, "for_layer"):
            pattern = pattern.for_layer(layer)
        score = self.tuning[layer][head] if self.tuning else None
        if score is not None and hasattr(pattern, "expecting"):
            pattern = pattern.expecting(score.density)
        own: Pattern = pattern
        return own

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
        each = heads if isinstance(heads, list) else [heads] * len(self.layers)  # a list where layers differ
        for number, (layer, count) in enumerate(zip(self.layers, each, strict=True)):
            if count is not None and len(layer) != count:
                return f"layer {number} of the profile has {len(layer)} heads, this model has {count}"
        return None


def save_patterns(patterns: ModelPatterns, path: str | Path) -> None:
    """Write a profile whole or not at all.

    Raises ValueError for what a profile cannot hold (a pattern of your own, say), FileNotFoundError where the folder
    is missing and OSError where the disk refuses; what stood at `path` is then unchanged.
    """
    name = f"the profile for {path}"
    head = {
        "schema": SCHEMA, "made": patterns.made, "model": patterns.model,
        **({} if patterns.weights is None else {"weights": patterns.weights}),
    }  # fmt: skip
    try:
        text = json.dumps(head, indent=1, allow_nan=False)
        layers = [
            ",\n".join(
                "  " + json.dumps(_entry(patterns, layer, head), allow_nan=False) for head in range(len(heads))
            )
            for layer, heads in enumerate(patterns.layers)
        ]  # fmt: skip
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} holds what JSON cannot: {error}") from error
    text = text.removesuffix("\n}") + ',\n "layers": [\n  [\n' + "\n  ],\n  [\n".join(layers) + "\n  ]\n ]\n}\n"
    if len(text) > files.MOST_JSON_BYTES:
        raise ValueError(f"{name} is larger than {files.MOST_JSON_BYTES} bytes, the most that is read")
    if _profile(files.parse_json(text, name), name) != patterns:
        raise ValueError(f"{name} would not be read back as it is: keys and values of `model` and `made` must be plain")
    files.write_text(path, text)


def _entry(profile: ModelPatterns, layer: int, head: int) -> dict[str, Any]:
    pattern: Any = profile.layers[layer][head]
    names = {cls: name for name, cls in PATTERNS.items()}
    if type(pattern) not in names:
        raise ValueError(
            f"layer {layer}, head {head}: a profile holds {', '.join(PATTERNS)}, and no {type(pattern).__name__}"
        )
    values = {f.name: getattr(pattern, f.name) for f in dataclasses.fields(pattern)}
    entry = {"type": names[type(pattern)], **{name: value for name, value in values.items() if value is not None}}
    for kind in _SCORES:
        scores = getattr(profile, kind)
        if scores and scores[layer][head] is not None:
            entry[kind] = dataclasses.asdict(scores[layer][head])
    return entry


_SCORES = ("tuning", "held_out")


def load_patterns(path: str | Path) -> ModelPatterns:
    """Read a profile, which is data: nothing in it is ever executed.

    "inside" is that of the model that ships inside, "inside:sale" its thresholds of SALE.

    Raises FileNotFoundError or PermissionError with the path, and ValueError that names the file and the place that is
    wrong: no JSON, another schema, an unknown pattern, or more than a model has (see `MOST_LAYERS`).
    """
    if str(path) in _SHIPPED:
        path = str(resources.files("sparseprefill") / "needle_model" / _SHIPPED[str(path)])
    return _profile(files.read_json(path, "profile"), f"the profile {path}")


def _profile(data: Any, name: str) -> ModelPatterns:
    if not isinstance(data, dict) or type(data.get("schema")) is not int or data["schema"] != SCHEMA:
        found = files.shown(data.get("schema")) if isinstance(data, dict) else None
        raise ValueError(
            f"{name} has schema {found}; this version reads schema {SCHEMA}: make it again with `sparseprefill profile`"
        )
    strangers = data.keys() - {"schema", "model", "weights", "made", "layers"}
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
    places = [
        [f"{name}: layer {layer}, head {head}" for head in range(len(heads))] for layer, heads in enumerate(layers)
    ]
    read = [
        [(_pattern(entry, place), *(_score(entry, kind, place) for kind in _SCORES))
         for entry, place in zip(heads, own, strict=True)]
        for heads, own in zip(layers, places, strict=True)
    ]  # fmt: skip
    parts: list[Any] = [tuple(tuple(each[n] for each in heads) for heads in read) for n in range(3)]
    model, how, weights = data.get("model", {}), data.get("made", {}), data.get("weights")
    for key, value in (("model", model), ("made", how)):
        if not isinstance(value, dict):
            raise ValueError(f"{name}: `{key}` must be an object, got {files.shown(value)}")
    if weights is not None and not isinstance(weights, str):
        raise ValueError(f"{name}: `weights` must be a text, got {files.shown(weights)}")
    missing = [key for key in HARD_KEYS if key not in model]
    if how and missing:  # one that was written by hand may say less
        raise ValueError(f"{name}: `model` lacks {', '.join(missing)}: the file is damaged; make it again")

    def some(scores: Any) -> Any:
        return scores if any(score is not None for heads in scores for score in heads) else ()

    made, tuning, held_out = parts
    _check_counts(layers, model, name)
    return ModelPatterns(made, model, weights, some(tuning), some(held_out), how)


def _check_counts(layers: list[list[Any]], model: dict[str, Any], name: str) -> None:
    """Raise ValueError where a profile holds more or less than its model has, as it says itself."""
    said = model.get("layers", len(layers))
    if said != len(layers):
        raise ValueError(f"{name} is damaged: it has {len(layers)} layers, and says {files.shown(said)}")
    heads = model.get("query_heads", [len(each) for each in layers])
    each = heads if isinstance(heads, list) else [heads] * len(layers)  # a list where layers differ
    if len(each) != len(layers):
        raise ValueError(f"{name} is damaged: `query_heads` has {len(each)} entries for {len(layers)} layers")
    for number, (own, count) in enumerate(zip(layers, each, strict=True)):
        if count != len(own):
            raise ValueError(f"{name} is damaged: layer {number} has {len(own)} heads, and says {files.shown(count)}")


def _score(entry: Any, kind: str, place: str) -> HeadScore | None:
    """What an entry says of its tuning or held-out prompts; None where it says nothing."""
    if kind not in entry:
        return None
    values = entry[kind]
    names = [field.name for field in dataclasses.fields(HeadScore)]
    if not isinstance(values, dict) or sorted(values) != sorted(names):
        raise ValueError(f"{place}: `{kind}` must have {', '.join(names)}, got {files.shown(values)}")
    try:
        return HeadScore(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {kind}: {error}") from error


def _pattern(entry: Any, place: str) -> Pattern:
    kind = entry.get("type") if isinstance(entry, dict) else None
    if not isinstance(kind, str) or kind not in PATTERNS:
        raise ValueError(f"{place}: a pattern needs a `type` of {', '.join(PATTERNS)}, got {files.shown(entry)}")
    options = {name: value for name, value in entry.items() if name not in ("type", *_SCORES)}
    known = [field.name for field in dataclasses.fields(PATTERNS[kind])]
    for name in options:
        if name not in known:
            raise ValueError(f"{place}: {kind} has no option {files.shown(name)}; its options: {', '.join(known)}")
    try:
        pattern: Pattern = PATTERNS[kind](**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from error
    return pattern
