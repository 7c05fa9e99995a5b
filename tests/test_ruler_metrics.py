"""RULER's metrics: equal to the official ones on stored cases, sane on every string."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseprefill.evals.ruler_metrics import (
    any_found,
    average,
    effective_length,
    length_score,
    nulls,
    postprocess,
    share_found,
    string_match_all,
    string_match_part,
)

CASES = json.loads((Path(__file__).parent / "data" / "ruler_metric_cases.json").read_text(encoding="utf-8"))["cases"]
METRICS = {"string_match_all": string_match_all, "string_match_part": string_match_part}
# scores of Llama-3.1-8B in the benchmark's README, 4k to 128k
PUBLISHED = dict(zip((4096, 8192, 16384, 32768, 65536, 131072), (95.5, 93.8, 91.6, 87.4, 84.7, 77.0), strict=True))

texts = st.text(max_size=40)
references = st.lists(texts, min_size=1, max_size=5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_official_cases(case: dict[str, Any]) -> None:
    predictions = [postprocess(each) for each in case["predictions"]]
    assert predictions == case["postprocessed"]
    assert METRICS[case["metric"]](predictions, case["references"]) == case["expected"]
    assert nulls(predictions) == case["nulls"]


@given(texts, references)
def test_every_string_has_a_score(prediction: str, wanted: list[str]) -> None:
    cleaned = postprocess(prediction)
    assert postprocess(cleaned) == cleaned
    assert not any(ord(c) < 32 and c != "\n" for c in cleaned)
    share, part = share_found(cleaned, wanted), any_found(cleaned, wanted)
    assert 0.0 <= share <= part <= 1.0
    assert (part == 1.0) == (share > 0.0)
    assert share_found(" ".join(wanted), wanted) == 1.0
    assert share_found(cleaned, wanted) == share_found(cleaned, wanted[::-1])


@given(st.lists(st.tuples(texts, references), min_size=1, max_size=8))
def test_a_score_is_the_mean_of_its_samples(pairs: list[tuple[str, list[str]]]) -> None:
    predictions, wanted = zip(*pairs, strict=True)
    for metric, single in ((string_match_all, share_found), (string_match_part, any_found)):
        mean = sum(single(each, lists) for each, lists in pairs) / len(pairs)
        assert metric(predictions, wanted) == pytest.approx(100 * mean, abs=0.005001)


def test_averages_are_the_published_ones() -> None:
    assert average(PUBLISHED) == pytest.approx(88.3, abs=0.05)
    assert average(PUBLISHED, "increasing") == pytest.approx(85.4, abs=0.05)
    assert average(PUBLISHED, "decreasing") == pytest.approx(91.3, abs=0.05)
    assert effective_length(PUBLISHED) == 32768
    assert effective_length({4096: 85.6}) == 4096, "the threshold itself is enough"
    assert effective_length({4096: 85.59}) is None
    assert average({8192: 40.0, 4096: 10.0}, "increasing") == 30.0, "weights follow the length and not the order"
    assert length_score([100.0, 50.0, 0.0]) == 50.0


@given(st.dictionaries(st.integers(1, 10**6), st.floats(0, 100), min_size=1))
def test_averages_lie_between_the_scores(scores: dict[int, float]) -> None:
    for weights in ("equal", "increasing", "decreasing"):
        assert min(scores.values()) - 1e-9 <= average(scores, weights) <= max(scores.values()) + 1e-9


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no predictions"):
        string_match_all([], [])
    with pytest.raises(ValueError, match="1 predictions and references for 2"):
        string_match_part(["x"], [["x"], ["y"]])
    with pytest.raises(ValueError, match="nothing to look for"):
        share_found("x", [])
    with pytest.raises(ValueError, match="nothing to look for"):
        any_found("x", [])
    with pytest.raises(ValueError, match="without tasks"):
        length_score([])
    with pytest.raises(ValueError, match="no length"):
        average({})
    with pytest.raises(ValueError, match="unknown weights 'up'"):
        average({1: 1.0}, "up")
