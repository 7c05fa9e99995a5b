"""Every method against dense attention on the same items: differences, intervals, flips, costs.

Unpaired means move by points with the choice of samples; the difference on the same items moves far less, and only it
says what a method lost. Intervals resample prompts, not items: several questions of one prompt stand or fall together.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparseprefill.evals.results import EvalResult, Run
from sparseprefill.evals.tasks import Group, Item, Metric
from sparseprefill.reports import summed

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Cell:
    """Mean of one metric of one method over the items of a group."""

    group: Group  # values of the axes; empty: all items
    method: str
    metric: str
    items: int
    mean: float
    chance: float | None  # mean over the items, of the headline; None where an item's is not known


@dataclass(frozen=True, slots=True)
class Paired:
    """One method against dense on the same items."""

    group: Group  # row of the first axis; empty: all items
    method: str
    metric: str
    items: int
    prompts: int
    dense: float  # mean of the row means, as `value`
    value: float
    difference: float  # value - dense
    low: float | None  # of the bootstrap interval of the difference; None with a single prompt
    high: float | None
    better: int  # items on which the method is better than dense
    worse: int
    mcnemar: float | None  # two-sided exact p; None where values are not 0 or 1, or prompts have several items
    most_flips: float | None  # where no item flipped: the largest share of flips that 95 % confidence leaves


@dataclass(frozen=True, slots=True)
class Flip:
    """An item on which a method and dense differ."""

    item: str
    group: Group
    method: str
    dense: float
    value: float
    references: tuple[str, ...]
    dense_text: str | None
    text: str | None


@dataclass(frozen=True, slots=True)
class CostSummary:
    """What a method cost over the timed prompts, and what it computed on the observed ones."""

    group: Group  # {"length": n}, or empty: all
    method: str
    prompts: int  # timed
    first_token_p50: float | None  # seconds
    first_token_p90: float | None
    speed_up: float | None  # median over prompts of dense time / this time, to the first token
    peak_bytes: int | None  # the largest
    density: float | None  # None for the stock model, and where nothing was observed
    tile_work: float | None
    kept_mass: float | None
    kernels: dict[str, int]  # implementation: attention calls
    previous_calls: dict[str, int]  # reason: calls that did not run sparsely


@dataclass(frozen=True, slots=True)
class Summary:
    """All that is derived from a result."""

    cells: tuple[Cell, ...]
    paired: tuple[Paired, ...]
    flips: tuple[Flip, ...]
    costs: tuple[CostSummary, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)


def summarise(result: EvalResult, *, resamples: int = RESAMPLES, seed: int = 0) -> Summary:
    """Compare every method with "dense". Raises ValueError for a result without it, or without any record.

    An incomplete result is summarised over the prompts it has; whoever shows that must say that it is incomplete.
    """
    labels = [method.label for method in result.methods]
    if "dense" not in labels:
        raise ValueError("there is no dense run in this result, and a method is only ever compared with dense")
    if not result.records:
        raise ValueError("this result holds no answers yet: run the evaluation")
    return Summary(
        tuple(mean_cells(result)),
        tuple(
            paired
            for metric in result.metrics
            for label in labels
            if label != "dense"
            for paired in _all_paired(result, label, metric, resamples, seed)
        ),
        tuple(flip for label in labels if label != "dense" for flip in flips(result, label)),
        tuple(_costs(result)),
    )


def mean_cells(result: EvalResult) -> list[Cell]:
    """The mean of every metric of every method: over all items, over each row, and over each cell of two axes."""
    cells = []
    headline = result.metrics[0].name
    for method in result.methods:
        pairs = result.answers(method.label)
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, (item, _) in enumerate(pairs):
            for depth in range(len(result.axes) + 1):
                groups.setdefault(tuple((k, item.group[k]) for k in result.axes[:depth]), []).append(i)
        for key, members in sorted(groups.items(), key=lambda each: len(each[0])):
            chances = [pairs[i][0].chance for i in members]
            known = [c for c in chances if c is not None]
            for metric in result.metrics:
                mean = math.fsum(pairs[i][1].values[metric.name] for i in members) / len(members)
                chance = math.fsum(known) / len(known) if len(known) == len(chances) else None
                cells.append(
                    Cell(dict(key), method.label, metric.name, len(members), mean,
                         chance if metric.name == headline else None)
                )  # fmt: skip
    return cells


def row_mean(cells: Sequence[Cell], method: str, metric: str) -> float:
    """What `Paired.value` is, for any method, dense among them: the mean of its row means."""
    rows = [cell.mean for cell in cells if len(cell.group) == 1 and (cell.method, cell.metric) == (method, metric)]
    return math.fsum(rows) / len(rows)


def _all_paired(result: EvalResult, label: str, metric: Metric, resamples: int, seed: int) -> list[Paired]:
    rows = list(dict.fromkeys(item.group[result.axes[0]] for record in result.records for item in record.items))
    whole = _paired(result, label, metric, None, resamples, seed)
    if len(rows) < 2:
        return [whole]
    return [whole, *(_paired(result, label, metric, row, resamples, seed) for row in rows)]


def _paired(
    result: EvalResult, label: str, metric: Metric, row: str | int | float | None, resamples: int, seed: int
) -> Paired:
    axis = result.axes[0]
    rows: dict[Any, int] = {}
    table: list[dict[int, list[tuple[float, float]]]] = []  # by prompt: row -> (dense, value) of its items
    strata: list[tuple[Any, ...]] = []
    for record in result.records:
        mine: dict[int, list[tuple[float, float]]] = {}
        kinds = set()
        for item, dense, other in _triples(record.items, record.runs["dense"], record.runs[label], metric.name):
            if row is not None and item.group[axis] != row:
                continue
            kinds.add(tuple(item.group[k] for k in result.axes))
            mine.setdefault(rows.setdefault(item.group[axis], len(rows)), []).append((dense, other))
        if mine:
            table.append(mine)
            strata.append(tuple(sorted(kinds, key=repr)))
    sums = np.zeros((3, len(table), len(rows)))  # dense, value, count
    for p, mine in enumerate(table):
        for r, values in mine.items():
            sums[0, p, r] = math.fsum(d for d, _ in values)
            sums[1, p, r] = math.fsum(v for _, v in values)
            sums[2, p, r] = len(values)
    counts = sums[2].sum(0)
    dense, value = (float((sums[i].sum(0) / counts).mean()) for i in (0, 1))
    pairs = [pair for mine in table for values in mine.values() for pair in values]
    sign = 1 if metric.higher_is_better else -1
    better = sum(sign * (v - d) > 0 for d, v in pairs)
    worse = sum(sign * (v - d) < 0 for d, v in pairs)
    low, high = bootstrap_interval(sums[1] - sums[0], sums[2], strata, resamples=resamples, seed=seed)
    independent = len(pairs) == len(table)
    return Paired(
        {} if row is None else {axis: row}, label, metric.name, len(pairs), len(table), dense, value, value - dense,
        low, high, better, worse, mcnemar(better, worse) if metric.binary and independent else None,
        most_flips(len(pairs)) if metric.binary and independent and better + worse == 0 else None,
    )  # fmt: skip


def _triples(items: Sequence[Item], dense: Run, other: Run, metric: str) -> list[tuple[Item, float, float]]:
    return [
        (item, d.values[metric], v.values[metric])
        for item, d, v in zip(items, dense.answers, other.answers, strict=True)
    ]


def bootstrap_interval(
    differences: NDArray[np.float64],
    counts: NDArray[np.float64],
    strata: Sequence[Any],
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> tuple[float | None, float | None]:
    """Percentile bootstrap of the mean, over rows, of the mean difference of a row's items.

    Whole prompts are drawn, with replacement, as many as there are in each stratum. Prompts that are alone in theirs
    form one stratum together, which widens the interval rather than leaving them out.

    Args:
        differences: float [prompts, rows], summed over the prompt's items in the row.
        counts: float [prompts, rows], items.
        strata: of each prompt; what may be exchanged.
        resamples: draws.
        confidence: between 0 and 1.
        seed: of the draws.

    Returns:
        (low, high); (None, None) for a single prompt, of which nothing can be learnt about the spread.
    """
    prompts = len(differences)
    if prompts < 2:
        return None, None
    by_stratum: dict[Any, list[int]] = {}
    for p, stratum in enumerate(strata):
        by_stratum.setdefault(stratum, []).append(p)
    members = [each for each in by_stratum.values() if len(each) > 1]
    alone = [each[0] for each in by_stratum.values() if len(each) == 1]
    if alone:
        members.append(alone)
    draw = np.random.default_rng(seed)
    estimates = []
    step = max(1, min(resamples, 4_000_000 // max(1, prompts)))
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        weights = np.zeros((size, prompts))
        for each in members:
            weights[:, each] = draw.multinomial(len(each), np.full(len(each), 1 / len(each)), size)
        with np.errstate(invalid="ignore", divide="ignore"):  # a row that no drawn prompt stands in counts for nothing
            estimates.append(np.nanmean((weights @ differences) / (weights @ counts), axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(estimates), [tail, 1 - tail])
    return float(low), float(high)


def mcnemar(better: int, worse: int) -> float:
    """Two-sided exact p of McNemar's test: would flips fall this unevenly if either way were equally likely?"""
    n, k = better + worse, min(better, worse)
    return min(1.0, float(2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n))


def most_flips(items: int, confidence: float = CONFIDENCE) -> float:
    """The largest share of flips under which `items` items without any flip are no surprise ("rule of three")."""
    return float(1 - (1 - confidence) ** (1 / items))


def flips(result: EvalResult, label: str) -> list[Flip]:
    """Items on which a method and dense differ in the headline metric, the largest losses first."""
    metric = result.metrics[0]
    found = []
    for (item, dense), (_, other) in zip(result.answers("dense"), result.answers(label), strict=True):
        before, after = dense.values[metric.name], other.values[metric.name]
        if before != after:
            found.append(Flip(item.id, item.group, label, before, after, item.references, dense.text, other.text))
    sign = 1 if metric.higher_is_better else -1
    return sorted(found, key=lambda flip: sign * (flip.value - flip.dense))


def _costs(result: EvalResult) -> list[CostSummary]:
    lengths = list(dict.fromkeys(i.group.get("length") for record in result.records for i in record.items))
    wanted: list[str | int | float | None] = [None]
    if None not in lengths and len(lengths) > 1:
        wanted += lengths
    costs = []
    for length in wanted:
        records = [r for r in result.records if length is None or any(i.group["length"] == length for i in r.items)]
        for method in result.methods:
            runs = [record.runs[method.label] for record in records]
            times = [(run.cost, record.runs["dense"].cost) for run, record in zip(runs, records, strict=True)]
            own = [cost.first_token_seconds for cost, _ in times if cost.first_token_seconds is not None]
            ratios = [
                dense.first_token_seconds / cost.first_token_seconds
                for cost, dense in times
                if cost.first_token_seconds and dense.first_token_seconds
            ]
            peaks = [run.cost.peak_bytes for run in runs if run.cost.peak_bytes is not None]
            seen = [run.observed for run in runs if run.observed is not None]
            costs.append(
                CostSummary(
                    {} if length is None else {"length": length}, method.label, len(own), quantile(own, 0.5),
                    quantile(own, 0.9), statistics.median(ratios) if ratios else None, max(peaks, default=None),
                    _mean([each.density for each in seen]), _mean([each.tile_work for each in seen]),
                    _mean([each.kept_mass for each in seen]), summed([run.kernels for run in runs]),
                    summed([run.previous_calls for run in runs]),
                )
            )  # fmt: skip
    return costs


def quantile(values: Sequence[float], share: float) -> float | None:
    """Linear between the two nearest values; None of nothing."""
    return float(np.quantile(np.asarray(values), share)) if values else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
