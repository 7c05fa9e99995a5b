"""The string metrics of RULER and its averages, equal to the official ones (NVIDIA/RULER, arXiv:2404.06654)."""

from __future__ import annotations

import re
from collections.abc import Sequence

EFFECTIVE_SCORE = 85.6
"""What Llama-2-7B-chat gets at 4k: a length at which a model gets as much counts as one it can use."""

_CONTROL = re.compile(r"[\x00-\x1f]")


def postprocess(prediction: str) -> str:
    """Stripped, with every control character, tabs too, made a newline."""
    return _CONTROL.sub("\n", prediction.strip()).strip()


def share_found(prediction: str, references: Sequence[str]) -> float:
    """Share of the references that the prediction contains, upper and lower case alike. No boundaries: 12 is in 123.

    Raises ValueError without references.
    """
    return sum(_hits(prediction, references)) / len(references)


def any_found(prediction: str, references: Sequence[str]) -> float:
    """1 where the prediction contains one of the references, else 0. Raises ValueError without references."""
    return max(_hits(prediction, references))


def official_mean(shares: Sequence[float]) -> float:
    """The mean in percent, rounded as the official scorer does. ValueError of nothing."""
    if not shares:
        raise ValueError("there is no prediction to average")
    total = 0.0
    for share in shares:  # sum() compensates its error from Python 3.12 on, and would round differently
        total += share
    return round(total / len(shares) * 100, 2)


def string_match_all(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean of `share_found`, in percent with two decimals.

    Raises ValueError without predictions, and where there are not as many lists of references.
    """
    _check(predictions, references)
    pairs = zip(predictions, references, strict=True)
    return official_mean([share_found(each, wanted) for each, wanted in pairs])


def string_match_part(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean of `any_found`, in percent with two decimals: the metric of the two QA tasks. Errors: `string_match_all`."""
    _check(predictions, references)
    pairs = zip(predictions, references, strict=True)
    return official_mean([any_found(each, wanted) for each, wanted in pairs])


def nulls(predictions: Sequence[str]) -> str:
    """How many predictions, after `postprocess`, are empty, as in "1/500"."""
    return f"{sum(not each for each in predictions)}/{len(predictions)}"


def length_score(task_scores: Sequence[float]) -> float:
    """Score of a length: the mean over its tasks. Raises ValueError without one."""
    if not task_scores:
        raise ValueError("a length without tasks has no score")
    return sum(task_scores) / len(task_scores)


def average(scores: dict[int, float], weights: str = "equal") -> float:
    """Mean of scores by length: the official Avg, wAvg (inc) and wAvg (dec).

    Args:
        scores: by length.
        weights: "equal"; "increasing": 1, 2, ... from the shortest length; "decreasing": from the longest.

    Raises ValueError without scores and for other weights.
    """
    if not scores:
        raise ValueError("there is no length to average over")
    ranks = range(1, len(scores) + 1)
    by_name: dict[str, list[int]] = {
        "equal": [1] * len(scores), "increasing": list(ranks), "decreasing": list(reversed(ranks)),
    }  # fmt: skip
    if weights not in by_name:
        raise ValueError(f"unknown weights {weights!r}: choose one of {', '.join(by_name)}")
    chosen = by_name[weights]
    return sum(w * scores[n] for w, n in zip(chosen, sorted(scores), strict=True)) / sum(chosen)


def effective_length(scores: dict[int, float], threshold: float = EFFECTIVE_SCORE) -> int | None:
    """The longest length whose score is at least `threshold`; None where there is none."""
    return max((length for length, score in scores.items() if score >= threshold), default=None)


def _hits(prediction: str, references: Sequence[str]) -> list[float]:
    if not references:
        raise ValueError("there is nothing to look for: give at least one reference")
    text = prediction.lower()
    return [1.0 if reference.lower() in text else 0.0 for reference in references]


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not predictions:
        raise ValueError("there are no predictions to score")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions and references for {len(references)}: they belong in pairs")
