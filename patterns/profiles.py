"""Two profiles of one model beside each other: what differs, and the best of both."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sparseprefill import files
from sparseprefill.patterns.candidates import Candidate
from sparseprefill.patterns.last_rows import Pattern
from sparseprefill.patterns.store import HARD_KEYS, PATTERNS, HeadScore, ModelPatterns

_NAMES = {cls: name for name, cls in PATTERNS.items()}
_ABSENT = object()


def type_of(pattern: Pattern) -> str:
    """The type a pattern has in a profile, as in "a_shape"; of one that no profile holds, the name of its class."""
    return _NAMES.get(type(pattern), type(pattern).__name__)


def label_of(pattern: Pattern) -> str:
    """Type and every option that is set, as candidates are labelled: "a_shape:sink=64,window=128"."""
    return Candidate(type_of(pattern), pattern).label


@dataclass(frozen=True, slots=True)
class HeadDifference:
    """One head of which two profiles say different things."""

    layer: int
    head: int
    patterns: tuple[str, str]  # labels, in the first profile and in the second
    tuning: tuple[HeadScore | None, HeadScore | None]
    held_out: tuple[HeadScore | None, HeadScore | None]

    @property
    def other_pattern(self) -> bool:
        """Whether the head computes something else, or is only scored differently."""
        return self.patterns[0] != self.patterns[1]

    @property
    def scores(self) -> tuple[str, HeadScore, HeadScore] | None:
        """On which prompts both are scored, held-out ones if they can be, and these scores."""
        for kind, (first, second) in (("held_out", self.held_out), ("tuning", self.tuning)):
            if first is not None and second is not None:
                return kind, first, second
        return None

    def __str__(self) -> str:
        first, second = self.patterns
        changed = f"{first} -> {second}" if self.other_pattern else f"{first} in both"
        if self.scores is None:
            return f"layer {self.layer}, head {self.head}: {changed}; no scores to compare"
        kind, before, after = self.scores
        told = ", ".join(
            f"{words} {_changed(getattr(before, name), getattr(after, name))}"
            for name, words in (("density", "density"), ("mass", "kept mass"))
        )
        return f"layer {self.layer}, head {self.head}: {changed}; {told} ({_KINDS[kind]} prompts)"


_KINDS = {"held_out": "held-out", "tuning": "tuning"}


def _changed(before: float, after: float) -> str:
    """With as many digits as it takes to see a change."""
    for digits in (2, 3, 4, 5):
        texts = [f"{value:.{digits}f}" for value in (before, after)]
        if texts[0] != texts[1] or before == after:
            break
    return " -> ".join(texts)


@dataclass(frozen=True, slots=True)
class Difference:
    """What differs between two profiles. Empty, and false, where nothing does; `str()` gives a line for each head."""

    first: ModelPatterns
    second: ModelPatterns
    model: tuple[str, ...]  # keys of `model` with other values, the hard ones first
    made: tuple[str, ...]  # keys of `made` with other values
    weights: bool  # other weights, or known in one profile alone
    shape: bool  # other layers or heads; `heads` are then those that both have
    heads: tuple[HeadDifference, ...]  # those with another pattern or another score

    def __bool__(self) -> bool:
        return bool(self.model or self.made or self.weights or self.shape or self.heads)

    @property
    def hard_keys(self) -> tuple[str, ...]:
        """Those of `model` that say the profiles are for different models."""
        return tuple(key for key in self.model if key in HARD_KEYS)

    @property
    def other_patterns(self) -> int:
        """Heads that compute something else."""
        return sum(each.other_pattern for each in self.heads)

    def summary(self) -> str:
        """Counts in one line."""
        common = sum(min(len(a), len(b)) for a, b in zip(self.first.layers, self.second.layers, strict=False))
        rest = len(self.heads) - self.other_patterns
        text = f"{self.other_patterns} of {common} heads have another pattern"
        if rest:
            text += f", {rest} the same pattern and other scores"
        both = [scores for each in self.heads if each.other_pattern and (scores := each.scores) is not None]
        if both:
            told = []
            for name, words in (("density", "density"), ("mass", "kept mass")):
                change = math.fsum(getattr(b, name) - getattr(a, name) for _, a, b in both) / len(both)
                told.append(f"{words} {change:+.3f}")
            text += f"; those with scores change on average by {', '.join(told)}"
        return text

    def __str__(self) -> str:
        if not self:
            return "the profiles are the same"
        return "\n".join([*self._lines(), self.summary()])

    def _lines(self) -> Iterator[str]:
        for place, keys in (("model", self.model), ("made", self.made)):
            first, second = getattr(self.first, place), getattr(self.second, place)
            for key in keys:
                yield f"{place}: {_word(key)}: {_told(first.get(key, _ABSENT))} -> {_told(second.get(key, _ABSENT))}"
        if self.weights:
            texts = ("not known" if each.weights is None else _word(each.weights) for each in (self.first, self.second))
            yield f"weights: {' -> '.join(texts)}"
        if self.shape:
            yield f"heads: {_shape(self.first)} -> {_shape(self.second)}"
        yield from map(str, self.heads)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only. A key that one side lacks has no value on that side."""
        return {
            **{
                place: {key: _sides(getattr(self.first, place), getattr(self.second, place), key) for key in keys}
                for place, keys in (("model", self.model), ("made", self.made))
            },
            "weights": {"first": self.first.weights, "second": self.second.weights} if self.weights else None,
            "heads_by_layer": {
                side: [len(heads) for heads in profile.layers]
                for side, profile in (("first", self.first), ("second", self.second))
            } if self.shape else None,
            "heads": [
                {
                    "layer": each.layer, "head": each.head,
                    **{
                        side: {
                            "pattern": each.patterns[n],
                            **{kind: None if (score := getattr(each, kind)[n]) is None else dataclasses.asdict(score)
                               for kind in ("tuning", "held_out")},
                        }
                        for n, side in enumerate(("first", "second"))
                    },
                }
                for each in self.heads
            ],
            "other_patterns": self.other_patterns, "summary": self.summary(),
        }  # fmt: skip


def _sides(first: dict[str, Any], second: dict[str, Any], key: str) -> dict[str, Any]:
    return {side: values[key] for side, values in (("first", first), ("second", second)) if key in values}


def _told(value: Any) -> str:
    return "nothing" if value is _ABSENT else files.shown(value, 60)


def _word(text: str) -> str:
    """A name from a file, which cannot do anything to a terminal."""
    return text[:80] if text[:80].isprintable() else repr(text[:80])


def _shape(profile: ModelPatterns) -> str:
    counts = sorted({len(heads) for heads in profile.layers})
    each = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{len(profile.layers)} layers of {each}"


def difference(first: ModelPatterns, second: ModelPatterns) -> Difference:
    """What differs between two profiles, in whatever they hold.

    Profiles of different models are compared too: what they have in common is compared head by head.
    """
    heads = []
    for layer, (a, b) in enumerate(zip(first.layers, second.layers, strict=False)):
        for head, patterns in enumerate(zip(a, b, strict=False)):
            labels = (label_of(patterns[0]), label_of(patterns[1]))  # 1 token and a share of 1.0 are equal in Python
            tuning, held_out = (
                (_score(first, kind, layer, head), _score(second, kind, layer, head)) for kind in ("tuning", "held_out")
            )
            if labels[0] != labels[1] or tuning[0] != tuning[1] or held_out[0] != held_out[1]:
                heads.append(HeadDifference(layer, head, labels, tuning, held_out))
    model = _other_keys(first.model, second.model)
    return Difference(
        first, second, tuple(sorted(model, key=lambda key: key not in HARD_KEYS)),
        tuple(_other_keys(first.made, second.made)), first.weights != second.weights,
        [len(heads) for heads in first.layers] != [len(heads) for heads in second.layers], tuple(heads),
    )  # fmt: skip


def _other_keys(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    keys = dict.fromkeys((*first, *second))
    return [key for key in keys if first.get(key, _ABSENT) != second.get(key, _ABSENT)]


def _score(profile: ModelPatterns, kind: str, layer: int, head: int) -> HeadScore | None:
    scores: tuple[tuple[HeadScore | None, ...], ...] = getattr(profile, kind)
    return scores[layer][head] if scores else None


def merge(profiles: Sequence[ModelPatterns], keep: Literal["mass", "density"] = "mass") -> ModelPatterns:
    """For each head the pattern of the profile that did best on its held-out prompts; the first of those that tie.

    Only the profiles' own figures are compared: they should have been made on the same held-out prompts (see
    `same_prompts`). Profiles that agree on every pattern give the patterns and scores of the first.

    Args:
        profiles: two or more, of one model.
        keep: "mass": the pattern that kept more attention mass; "density": the one that computed less.

    Raises:
        ValueError: profiles of different models, weights, tiles or heads, or a head on which they disagree and one has
            no held-out score.
    """
    if keep not in ("mass", "density"):
        raise ValueError(f"keep must be mass or density, got {keep!r}")
    if len(profiles) < 2:
        raise ValueError(f"merging takes two profiles or more, got {len(profiles)}")
    weights = _agreed([each.weights for each in profiles], "are of different weights: {} and {}")
    for number, other in enumerate(profiles[1:], 2):
        _check_same_model(profiles[0], other, number)
    chosen = [
        [_best(profiles, layer, head, keep) for head in range(len(heads))]
        for layer, heads in enumerate(profiles[0].layers)
    ]

    def of(kind: str) -> tuple[tuple[HeadScore | None, ...], ...]:
        found = tuple(
            tuple(_score(profiles[number], kind, layer, head) for head, number in enumerate(numbers))
            for layer, numbers in enumerate(chosen)
        )
        return found if any(score is not None for heads in found for score in heads) else ()

    how = [profile.made for profile in profiles]
    block = _agreed(
        [each.made.get("block") for each in profiles],
        "were made with tiles of {} and {}: no head keeps in other tiles what it says, make one again",
    )
    return ModelPatterns(
        tuple(
            tuple(profiles[number].layers[layer][head] for head, number in enumerate(numbers))
            for layer, numbers in enumerate(chosen)
        ),
        {key: value for key, value in profiles[0].model.items() if all(p.model.get(key) == value for p in profiles)},
        weights, of("tuning"), of("held_out"),
        # what was written by hand stays so
        {"merged": how, "keep": keep, **({} if block is None else {"block": block})} if any(how) else {},
    )  # fmt: skip


def same_prompts(profiles: Sequence[ModelPatterns]) -> bool | None:
    """Whether all were made on the same prompts; None where one does not say."""
    digests = [profile.made.get("prompts_digest") for profile in profiles]
    return None if None in digests else all(digest == digests[0] for digest in digests)


def _agreed(values: Sequence[Any], clash: str) -> Any:
    """What all profiles say that say anything, None where none does; ValueError with `clash` where two differ."""
    known = [(number, value) for number, value in enumerate(values, 1) if value is not None]
    for number, value in known[1:]:
        if value != known[0][1]:
            said = clash.format(files.shown(known[0][1]), files.shown(value))
            raise ValueError(f"profiles {known[0][0]} and {number} {said}")
    return known[0][1] if known else None


def _check_same_model(first: ModelPatterns, other: ModelPatterns, number: int) -> None:
    for key in HARD_KEYS:
        values = [profile.model.get(key, _ABSENT) for profile in (first, other)]
        if values[0] != values[1]:
            raise ValueError(
                f"profiles 1 and {number} are of different models: {key} is {_told(values[0])} and {_told(values[1])}"
            )
    if len(first.layers) != len(other.layers):
        raise ValueError(f"profiles 1 and {number} have {len(first.layers)} and {len(other.layers)} layers")
    for layer, (a, b) in enumerate(zip(first.layers, other.layers, strict=True)):
        if len(a) != len(b):
            raise ValueError(f"profiles 1 and {number} have {len(a)} and {len(b)} heads in layer {layer}")


def _best(profiles: Sequence[ModelPatterns], layer: int, head: int, keep: str) -> int:
    """Number of the profile whose pattern a head gets."""
    labels = [label_of(profile.layers[layer][head]) for profile in profiles]
    if all(label == labels[0] for label in labels):
        return 0
    found = []
    for number, (profile, label) in enumerate(zip(profiles, labels, strict=True)):
        score = _score(profile, "held_out", layer, head)
        if score is None:
            raise ValueError(
                f"layer {layer}, head {head}: profile {number + 1} ({label}) has no score on held-out prompts to be "
                "judged by: make it again with held-out prompts"
            )
        found.append((-score.mass if keep == "mass" else score.density, number))
    return min(found)[1]


__all__ = ["Difference", "HeadDifference", "difference", "label_of", "merge", "same_prompts", "type_of"]
