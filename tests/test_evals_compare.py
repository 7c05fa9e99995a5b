"""Comparisons with dense: intervals against enumeration and simulation, flips, tests of flips, costs."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from eval_results import METHODS, assemble, needle_result

from sparseprefill.evals.compare import (
    bootstrap_interval,
    flips,
    mcnemar,
    most_flips,
    quantile,
    row_mean,
    summarise,
)
from sparseprefill.evals.results import Cost, EvalResult, Observed, Record, Run
from sparseprefill.evals.tasks import Answer, Item, Metric

PAIR = METHODS[:2]
OTHER = METHODS[1].label


def result_of(
    prompts: list[list[tuple[dict[str, Any], float, float]]], metric: Metric | None = None,
    axes: tuple[str, ...] = ("row",),
) -> EvalResult:  # fmt: skip
    """A result of dense and one method: for each prompt its items as (group, dense's value, the method's value)."""
    metric = metric or Metric("right", "is it right", binary=True)
    records = []
    for p, found in enumerate(prompts):
        items = tuple(Item(f"{p}/{i}", group) for i, (group, _, _) in enumerate(found))
        runs = {
            label: Run(tuple(Answer(i.id, {metric.name: each[place]}) for i, each in zip(items, found, strict=True)))
            for place, label in ((1, "dense"), (2, OTHER))
        }  # fmt: skip
        records.append(Record(str(p), 100, "0" * 64, items, {}, runs))
    return assemble("hand", PAIR, [metric], axes, records)


def exact_quantiles(sums: list[list[float]], counts: list[list[float]], strata: list[Any]) -> tuple[float, float]:
    """The 2.5 % and 97.5 % points of the bootstrap distribution, by trying every draw of every stratum."""
    groups = [[p for p, each in enumerate(strata) if each == s] for s in dict.fromkeys(strata)]
    alone = [members[0] for members in groups if len(members) == 1]
    groups = [members for members in groups if len(members) > 1] + ([alone] if alone else [])
    found: Counter[float] = Counter()
    for draws in itertools.product(*(itertools.product(members, repeat=len(members)) for members in groups)):
        drawn = [p for draw in draws for p in draw]
        means = []
        for row in range(len(sums[0])):
            count = sum(counts[p][row] for p in drawn)
            if count:
                means.append(sum(sums[p][row] for p in drawn) / count)
        found[round(sum(means) / len(means), 9)] += 1
    total, reached, ends = sum(found.values()), 0, []
    wanted = [0.025 * total, 0.975 * total]
    for value, count in sorted(found.items()):
        reached += count
        while wanted and reached >= wanted[0]:
            ends.append(value)
            wanted.pop(0)
    return ends[0], ends[1]


@pytest.mark.parametrize(
    ("sums", "counts", "strata"),
    [
        pytest.param([[0.0], [-1.0], [1.0], [-3.0]], [[1.0]] * 4, ["a"] * 4, id="one row"),
        pytest.param([[0.0], [-1.0], [-1.0], [2.0]], [[1.0], [2.0], [3.0], [1.0]], ["a"] * 4, id="items weigh"),
        pytest.param([[5.0], [6.0], [-9.0], [-7.0]], [[1.0]] * 4, ["a", "a", "b", "b"], id="strata stay as they are"),
        pytest.param([[1.0], [6.0], [-9.0]], [[1.0]] * 3, ["a", "b", "c"], id="all alone"),
        pytest.param([[1.0], [6.0], [-9.0], [4.0]], [[1.0]] * 4, ["a", "alone", "alone", "c"], id="a stratum 'alone'"),
        pytest.param(
            [[1.0, 0.0], [0.0, -2.0], [3.0, 1.0], [0.0, 4.0]], [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 1.0]],
            ["a"] * 4, id="a row may not be drawn at all",
        ),
    ],
)  # fmt: skip
def test_the_interval_is_the_one_of_all_draws(
    sums: list[list[float]], counts: list[list[float]], strata: list[Any]
) -> None:  # fmt: skip
    low, high = bootstrap_interval(np.array(sums), np.array(counts), strata, resamples=40_000)
    assert (low, high) == pytest.approx(exact_quantiles(sums, counts, strata), abs=1e-6)


def test_one_prompt_has_no_interval_and_equal_differences_have_one_without_width() -> None:
    assert bootstrap_interval(np.ones((1, 1)), np.ones((1, 1)), ["a"]) == (None, None)
    assert bootstrap_interval(np.full((7, 1), 0.25), np.ones((7, 1)), ["a"] * 7) == pytest.approx((0.25, 0.25))


def test_the_same_seed_draws_the_same_and_more_confidence_is_wider() -> None:
    draw = np.random.default_rng(3)
    sums, counts, strata = draw.normal(size=(30, 1)), np.ones((30, 1)), ["a"] * 30
    first = bootstrap_interval(sums, counts, strata, seed=4)
    assert first == bootstrap_interval(sums, counts, strata, seed=4)
    wide, narrow = (bootstrap_interval(sums, counts, strata, confidence=c) for c in (0.99, 0.5))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]  # type: ignore[operator]


def test_intervals_hold_the_true_difference_as_often_as_they_claim() -> None:
    draw = np.random.default_rng(5)
    runs, prompts, covered = 400, 60, 0
    for _ in range(runs):
        # two items of a prompt share most of what happens to them; half of the prompts are of an easier row
        shared = draw.normal(-0.1, 0.4, size=(prompts, 1)) + draw.normal(0, 0.1, size=(prompts, 2))
        sums, counts = np.zeros((prompts, 2)), np.zeros((prompts, 2))
        for p in range(prompts):
            sums[p, p % 2], counts[p, p % 2] = shared[p].sum() + (p % 2), 2
        low, high = bootstrap_interval(sums, counts, [p % 2 for p in range(prompts)], resamples=600)
        assert low is not None
        assert high is not None
        covered += low <= -0.1 + 0.25 <= high
    # a binomial count of 400 at 0.95 stays within 3.5 standard deviations; the percentile method loses about a point
    assert 0.94 - 3.5 * math.sqrt(0.94 * 0.06 / runs) < covered / runs < 0.985


def test_items_of_one_prompt_do_not_narrow_the_interval() -> None:
    draw = random.Random(0)
    pairs = [(1.0, float(draw.random() < 0.7)) for _ in range(24)]
    single = summarise(result_of([[({"row": 0}, d, v)] for d, v in pairs])).paired[0]
    tenfold = summarise(result_of([[({"row": 0}, d, v)] * 10 for d, v in pairs])).paired[0]
    loose = summarise(result_of([[({"row": 0}, d, v)] for d, v in pairs for _ in range(10)])).paired[0]
    assert (tenfold.low, tenfold.high) == pytest.approx((single.low, single.high))
    assert tenfold.items == 10 * single.items
    assert tenfold.prompts == single.prompts
    assert loose.high - loose.low < 0.5 * (single.high - single.low)  # type: ignore[operator]
    assert single.mcnemar == mcnemar(single.better, single.worse)
    assert tenfold.mcnemar is None, "its items are not independent"


def test_rows_weigh_the_same_however_many_items_they_have() -> None:
    prompts = [[({"row": "small"}, 1.0, 0.0)]] * 2 + [[({"row": "large"}, 1.0, 1.0)]] * 18
    result = result_of(prompts)
    summary = summarise(result)
    whole, small, large = summary.paired
    assert (whole.group, small.group, large.group) == ({}, {"row": "small"}, {"row": "large"})
    assert (whole.dense, whole.value, whole.difference) == (1.0, 0.5, -0.5)
    assert (small.value, large.value) == (0.0, 1.0)
    assert row_mean(summary.cells, OTHER, "right") == whole.value
    assert row_mean(summary.cells, "dense", "right") == whole.dense
    overall = next(cell for cell in summary.cells if cell.method == OTHER and not cell.group)
    assert overall.mean == 0.9, "the plain mean over items is another number"
    assert overall.items == 20


def test_cells_are_means_over_their_items_and_chance_is_the_headlines() -> None:
    result = needle_result(samples=3, planned=None)
    summary = summarise(result, resamples=50)
    for method in result.methods:
        for cell in (each for each in summary.cells if each.method == method.label):
            mine = [answer.values["right"] for item, answer in result.answers(method.label)
                    if all(item.group[key] == value for key, value in cell.group.items())]  # fmt: skip
            assert cell.items == len(mine)
            assert cell.mean == pytest.approx(sum(mine) / len(mine))
            assert cell.chance == pytest.approx(0.001)
    assert sum(len(cell.group) == 2 for cell in summary.cells) == 5 * 20
    unknown = replace(result.records[0], items=(replace(result.records[0].items[0], chance=None),))
    partly = summarise(replace(result, records=(unknown, *result.records[1:])), resamples=50)
    assert next(cell for cell in partly.cells if not cell.group).chance is None, "half known is not known"


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (0, 1), (0, 5), (3, 3), (2, 9), (9, 2), (40, 70)])
def test_mcnemar_is_the_chance_of_a_split_as_uneven(better: int, worse: int) -> None:
    n = better + worse
    uneven = abs(better - worse)
    ways = sum(math.comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= uneven)
    assert mcnemar(better, worse) == pytest.approx(float(Fraction(ways, 2**n)))


def test_mcnemar_of_thousands_of_flips_is_a_number() -> None:
    assert mcnemar(2500, 2500) == 1.0
    assert 0 <= mcnemar(1000, 3000) < 1e-200


@pytest.mark.parametrize("items", [1, 5, 60, 4750])
def test_most_flips_is_the_share_that_would_go_unseen_once_in_twenty(items: int) -> None:
    share = most_flips(items)
    assert (1 - share) ** items == pytest.approx(0.05)
    if items > 30:
        assert share == pytest.approx(3 / items, rel=0.05), "the rule of three"


def test_most_flips_is_only_told_where_nothing_flipped() -> None:
    same = summarise(result_of([[({"row": 0}, 1.0, 1.0)]] * 20)).paired[0]
    assert same.most_flips == most_flips(20)
    assert (same.low, same.high, same.mcnemar) == (0.0, 0.0, 1.0)
    assert (
        summarise(result_of([[({"row": 0}, 1.0, 1.0)]] * 19 + [[({"row": 0}, 1.0, 0.0)]])).paired[0].most_flips is None
    )
    graded = Metric("score", "graded")
    assert summarise(result_of([[({"row": 0}, 0.5, 0.5)]] * 20, graded)).paired[0].most_flips is None


def test_strata_keep_what_cannot_be_exchanged_apart() -> None:
    prompts = [[({"row": 0, "column": c}, 1.0, float(c))] for c in (0, 1) for _ in range(10)]
    apart = summarise(result_of(prompts, axes=("row", "column"))).paired[0]
    assert (apart.low, apart.high) == (-0.5, -0.5), "within a cell nothing varies"
    mixed = summarise(result_of(prompts)).paired[0]
    assert mixed.low < -0.6 < -0.4 < mixed.high  # type: ignore[operator]


@pytest.mark.parametrize("higher", [True, False])
def test_flips_begin_with_the_largest_loss(higher: bool) -> None:
    values = [(0.5, 0.5), (0.2, 0.9), (0.9, 0.1), (0.5, 0.4)]
    metric = Metric("score", "graded", higher_is_better=higher)
    result = result_of([[({"row": 0}, d, v)] for d, v in values], metric)
    found = [flip.item for flip in flips(result, OTHER)]
    assert found == (["2/0", "3/0", "1/0"] if higher else ["1/0", "3/0", "2/0"])
    paired = summarise(result).paired[0]
    assert (paired.better, paired.worse) == ((1, 2) if higher else (2, 1))


def test_costs_are_of_timed_prompts_and_ratios_are_taken_prompt_by_prompt() -> None:
    result = result_of([[({"row": 0, "length": n}, 1.0, 1.0)] for n in (100, 100, 200, 200)], axes=("row", "length"))
    times = {"dense": (None, 1.0, 8.0, 10.0), OTHER: (None, 2.0, 4.0, 2.0)}
    records = []
    for number, record in enumerate(result.records):
        runs = {}
        for label, run in record.runs.items():
            seconds = times[label][number]
            cost = Cost(seconds, seconds and 2 * seconds, number and 1000 * number)
            observed = None if number or label == "dense" else Observed(0.2, 0.3, None)
            kernels = {} if label == "dense" else {"triton": 3, "cpu": number}
            runs[label] = replace(run, cost=cost, observed=observed, kernels=kernels, previous_calls={"dense layer": 1})
        records.append(replace(record, runs=runs))
    costs = {
        (each.method, each.group.get("length")): each
        for each in summarise(replace(result, records=tuple(records))).costs
    }
    assert sorted(costs, key=str) == sorted([(m, n) for m in ("dense", OTHER) for n in (None, 100, 200)], key=str)
    whole = costs[OTHER, None]
    assert (whole.prompts, whole.first_token_p50, whole.first_token_p90) == (3, 2.0, pytest.approx(3.6))
    assert whole.speed_up == 2.0, "the median of 0.5, 2 and 5, not the ratio of medians"
    assert (whole.peak_bytes, whole.density, whole.tile_work, whole.kept_mass) == (3000, 0.2, 0.3, None)
    assert whole.kernels == {"triton": 12, "cpu": 6}
    assert whole.previous_calls == {"dense layer": 4}
    assert costs["dense", None].speed_up == 1.0
    assert (costs[OTHER, 100].prompts, costs[OTHER, 100].speed_up) == (1, 0.5)
    assert (costs[OTHER, 200].density, costs[OTHER, 200].speed_up) == (None, 3.5)


def test_quantiles_lie_between_the_nearest_values() -> None:
    assert quantile([], 0.5) is None
    assert quantile([3.0], 0.9) == 3.0
    assert quantile([1.0, 2.0, 4.0], 0.75) == 3.0


def test_what_cannot_be_compared_is_refused() -> None:
    result = needle_result(samples=1)
    with pytest.raises(ValueError, match="no dense run"):
        summarise(replace(result, methods=result.methods[1:]))
    with pytest.raises(ValueError, match="no answers yet"):
        summarise(replace(result, records=()))
