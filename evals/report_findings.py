"""What a report says in words: one verdict a method, and what a reader must know before believing it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sparseprefill.evals.compare import CostSummary, Paired, Summary, most_flips, row_mean
from sparseprefill.evals.report_words import (
    change,
    group_value,
    interval,
    one_line,
    score,
    some,
    times,
)
from sparseprefill.evals.results import EvalResult
from sparseprefill.evals.tasks import Metric

FEW_PROMPTS = 10
"""Below so many prompts a bootstrap interval is too narrow to be trusted."""

TERMS: tuple[tuple[str, str], ...] = (
    ("overall", "The mean of the means of all rows (values of the first axis), so that a row counts once however many "
     "items it has. The averages of a benchmark follow rules of their own."),
    ("difference", "A method's score less dense attention's on the very same items. Scores of two runs on different "
     "samples cannot be compared nearly as finely."),
    ("95% interval", "Prompts were drawn again and again from those that were asked, whole, with all their items, and "
     "the difference taken each time; the middle 95% of these lie in the interval. Where it holds zero, the difference "
     "may be luck. Of twenty intervals one misses the truth by chance, so one row that stands out among many is no "
     "finding by itself."),
    ("better, worse", "Items on which the method scores higher or lower than dense (where less is better: lower or "
     "higher). A method can lose some and gain others and keep its mean."),
    ("McNemar p", "How often flips would fall at least this unevenly if either way were equally likely. Only for "
     "scores that are right or wrong and prompts with a single item."),
    ("chance", "The score of a guess that has not read the prompt. Where dense attention is no better than that, "
     "nothing can be lost, and the method is not tested."),
    ("density", "The pairs of a query and a key that were computed, of all pairs that dense attention computes."),
    ("tile work", "The same counted in whole tiles, as a kernel works: what the time should follow."),
    ("kept mass", "The share of the softmax weight, under dense attention, that falls on the computed pairs. 1: "
     "nothing of weight was skipped."),
    ("TTFT", "Time to first token: the whole model on the whole prompt, until the first new token is known. p50 is the "
     "median over prompts, p90 is exceeded by one in ten. The speed-up is the median over prompts of dense's time by "
     "the method's, each pair measured in the same minutes. Prompts that warm up or are observed are not timed."),
    ("did not run sparsely", "Attention calls of a patched model that were left to the model's own attention, with the "
     "reason. Decoding is always among them: only the prefill is sparse."),
    ("looks ahead", "The blocks that a row attends to were chosen with tokens that come after it. Generated answers "
     "are fairly judged, since all of the prompt is known before the first token. Perplexity and whatever else is read "
     "off inside the prompt is not: it flatters such a method."),
)  # fmt: skip
"""The words of a report."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one method did to the headline score."""

    method: str
    state: str  # of `state_of_difference`, or "not tested"
    sentence: str


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting, flattened, with what it does to comparability."""

    name: str
    value: str
    why: str


def state_of(result: EvalResult) -> str:
    """Whether a result is complete, or how much of the plan has been answered."""
    done = f"{len(result.records)} of {some(result.planned, 'prompt')}"
    return f"complete, {some(result.planned, 'prompt')}" if result.complete else f"INCOMPLETE: {done}"


def state_of_difference(paired: Paired, metric: Metric) -> str:
    """The state of a verdict, from numbers alone.

    "lost" or "gained" ("worse" or "better" where less is better), "no difference shown", "no item differs" or
    "one prompt".
    """
    if paired.low is None or paired.high is None:
        return "one prompt"
    if paired.better + paired.worse == 0:
        return "no item differs"
    if paired.low <= 0 <= paired.high:
        return "no difference shown"
    if not metric.higher_is_better:
        return "worse" if paired.low > 0 else "better"
    return "gained" if paired.low > 0 else "lost"


def overall(summary: Summary, method: str, metric: Metric) -> Paired:
    """A method's comparison over all items."""
    return next(p for p in summary.paired if (p.method, p.metric, p.group) == (method, metric.name, {}))


def overall_cost(summary: Summary, method: str) -> CostSummary:
    """A method's cost over all prompts."""
    return next(c for c in summary.costs if c.method == method and not c.group)


def chance_of(result: EvalResult, summary: Summary) -> float | None:
    """The mean over rows of what a guess scores in the headline; None where a row's is not known."""
    headline = result.metrics[0].name
    rows = [c.chance for c in summary.cells if c.method == "dense" and c.metric == headline and len(c.group) == 1]
    known = [each for each in rows if each is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(rows) else None


def nothing_to_lose(dense: float, chance: float | None, prompts: int, metric: Metric) -> bool:
    """Is a score of dense 0, or not clearly above a guess?

    A guess in [0, 1] with mean c has a variance of at most c (1 - c); two standard errors of its mean are left to luck.
    """
    if not metric.higher_is_better:
        return False
    if chance is None or chance <= 0 or not metric.percent:
        return dense <= (chance or 0)
    return dense <= chance + 2 * math.sqrt(max(0.0, chance * (1 - chance)) / max(1, prompts))


def verdicts(result: EvalResult, summary: Summary) -> list[Verdict]:
    """One a method but dense, in order. Of an incomplete result each says that it is not final."""
    return [_verdict(result, summary, each.label) for each in result.methods if each.label != "dense"]


def _verdict(result: EvalResult, summary: Summary, method: str) -> Verdict:
    metric = result.metrics[0]
    paired, chance = overall(summary, method, metric), chance_of(result, summary)
    unit = "points" if metric.percent else f"in {metric.name}"
    amount = change(abs(paired.difference), metric).lstrip("+")
    against = f"{score(paired.value, metric)} against dense's {score(paired.dense, metric)}"
    spread = f"95% interval {interval(paired.low, paired.high, metric)}"
    state = state_of_difference(paired, metric)
    if nothing_to_lose(paired.dense, chance, paired.prompts, metric):
        state = "not tested"
        guess = "" if not chance else f", and a guess {score(chance, metric)}"
        text = f"dense itself scores {score(paired.dense, metric)}{guess}: there was nothing to lose, so this is no " \
            f"test of the method, which scores {score(paired.value, metric)}"  # fmt: skip
    elif state == "no item differs":
        share = 100 * most_flips(paired.prompts)
        text = (
            f"none of {some(paired.items, 'item')} differs from dense ({score(paired.dense, metric)}); with "
            f"{some(paired.prompts, 'prompt')}, up to {share:.2g}% of such prompts may still differ (95% confidence)"
        )
    elif state == "one prompt":
        same = paired.better + paired.worse == 0
        way = "the same as dense" if same else f"{_way(paired, metric)} by {amount} {unit}"
        text = f"{way} on a single prompt ({against}): nothing is known of the spread"
    elif state == "no difference shown":
        worst = (-paired.low if metric.higher_is_better else paired.high) if paired.low is not None else None
        margin = "" if not worst or worst <= 0 else \
            f"; a loss of {change(worst, metric).lstrip('+')} {unit} is not excluded"  # fmt: skip
        text = (
            f"no difference beyond chance: {against}, difference {change(paired.difference, metric)} ({spread}){margin}"
        )
    else:
        done = f"{state} {amount}" if metric.higher_is_better else f"{state} by {amount}"
        text = f"{done} {unit}: {against} ({spread}, which leaves out zero)"
    sentence = f"{text}; {_at_what_cost(overall_cost(summary, method))}."
    if not result.complete:
        sentence = f"so far ({len(result.records)} of {result.planned} prompts, not final): {sentence}"
    return Verdict(method, state, sentence[0].upper() + sentence[1:])


def _way(paired: Paired, metric: Metric) -> str:
    return "better" if (paired.difference > 0) == metric.higher_is_better else "worse"


def _at_what_cost(cost: CostSummary) -> str:
    if not cost.kernels:
        return "it never ran sparsely, so this is dense attention in all but name"
    density = "density not observed" if cost.density is None else f"at density {cost.density:.2f}"
    if cost.speed_up is None:
        return f"{density}; first token not timed"
    slower = ", which is slower" if cost.speed_up < 1 else ""
    return f"{density}; first token {times(cost.speed_up)} as fast as dense{slower}"


def warnings(result: EvalResult, summary: Summary) -> list[str]:
    """What a reader must know before believing the numbers, the gravest first; empty where there is nothing."""
    return [*_about_answers(result, summary), *_about_methods(result, summary), *_about_runs(result)]


def _about_answers(result: EvalResult, summary: Summary) -> Iterator[str]:
    metric, prompts = result.metrics[0], len(result.records)
    dense, chance = row_mean(summary.cells, "dense", metric.name), chance_of(result, summary)
    if nothing_to_lose(dense, chance, prompts, metric):
        guess = "0 means nothing right" if not chance else f"a guess scores {score(chance, metric)}"
        yield f"Dense attention itself scores {score(dense, metric)} ({guess}): nothing can be lost here, and no " \
            "method is tested. Take a model or a task that dense attention can do."  # fmt: skip
    else:
        empty = _untested_rows(result, summary)
        if empty:
            names = ", ".join([*empty[:12], *(["..."] if len(empty) > 12 else [])])
            yield (
                f"Dense attention is no better than a guess in {some(len(empty), 'row')} ({names}): nothing can be "
                "lost there, and the mean hides that."
            )
    if chance is None and metric.percent and metric.higher_is_better:
        yield "What a guess would score is not known for these items: a low score of dense may be no more than one."
    if prompts == 1:
        yield "There is a single prompt: there are no intervals, and nothing is known of the spread."
    elif prompts < FEW_PROMPTS:
        yield f"There are only {prompts} prompts: intervals of so few are too narrow, and not to be relied on."
    if len([each for each in result.methods if each.label != "dense"]) == 0:
        yield "Dense attention alone was run: there is nothing to compare it with."


def _untested_rows(result: EvalResult, summary: Summary) -> list[str]:
    metric, axis = result.metrics[0], result.axes[0]
    prompts: dict[Any, int] = {}
    for record in result.records:
        for row in {item.group[axis] for item in record.items}:
            prompts[row] = prompts.get(row, 0) + 1
    return [
        group_value(axis, cell.group[axis])
        for cell in summary.cells
        if (cell.method, cell.metric, len(cell.group)) == ("dense", metric.name, 1)
        and nothing_to_lose(cell.mean, cell.chance, prompts[cell.group[axis]], metric)
    ]


def _about_methods(result: EvalResult, summary: Summary) -> Iterator[str]:
    for method in result.methods:
        if method.label == "dense":
            continue
        name = one_line(method.label)
        cost = overall_cost(summary, method.label)
        if not cost.kernels:
            why = ", ".join(f"{reason} ({count} calls)" for reason, count in cost.previous_calls.items())
            why = f": {one_line(why)}" if why else ""
            yield f"{name} never ran sparsely{why}. Its scores are those of dense attention."
        else:
            idle = [
                group_value("length", each.group["length"])
                for each in summary.costs
                if each.method == method.label and each.group and not each.kernels
            ]
            if idle:
                yield (
                    f"{name} never ran sparsely at length {', '.join(idle)}: its scores there are those of dense "
                    "attention."
                )
    headline = result.metrics[0].name
    same = [
        one_line(each.method)
        for each in summary.paired
        if not each.group and each.metric == headline and each.better + each.worse == 0
    ]
    prompts = len(result.records)
    if same and prompts > 1:
        yield (
            f"No item differs from dense with {', '.join(same)}. An interval without width is no proof that nothing "
            f"changed: with {some(prompts, 'prompt')}, up to {100 * most_flips(prompts):.2g}% of such prompts may "
            "still differ (95% confidence)."
        )
    ahead = [one_line(each.label) for each in result.methods if each.looks_ahead]
    if ahead:
        yield (
            f"{', '.join(ahead)}: looks ahead (marked \N{DAGGER}), which is to say that blocks are chosen with tokens "
            "that come later. Perplexity, and whatever else is read inside the prompt, flatters that; generated "
            "answers are fair."
        )


def _about_runs(result: EvalResult) -> Iterator[str]:
    machines = {_machine(each) for each in result.provenance}
    if len(machines) > 1:
        yield f"The run took place on {len(machines)} different machines or versions (see Provenance). Speed-ups are " \
            "taken prompt by prompt and hold; the times themselves are of different machines."  # fmt: skip
    rows = result.settings.get("last_rows_dense")
    if rows:
        yield (
            f"The last {rows} rows of every prompt ran densely (last_rows_dense): results with other values, 0 among "
            "them, are of another method."
        )
    if "min_length" in result.settings and result.settings["min_length"] != 0:
        least = result.settings["min_length"]
        yield (
            "Short prompts ran densely by plan "
            + ("(min_length left to the cost model)" if least is None else f"(min_length={least})")
            + ": what they score says nothing about a method."
        )


def _machine(found: dict[str, Any]) -> str:
    return json.dumps({key: found.get(key) for key in ("gpu", "processor", "threads", "versions")}, sort_keys=True)


_WHY = {
    "last_rows_dense": "so many rows at the end of the prompt see every key; most papers have 0",
    "min_length": "shorter prompts run densely; 0: none do",
    "observe": "prompts of each stratum that are observed and not timed; scores do not depend on it",
    "methods": "",
    "chat_template": "a prompt inside a chat template is another prompt",
    "seed": "other seeds, other prompts",
    "samples": "fewer prompts, wider intervals",
    "lengths": "scores fall with length; compare equal lengths",
    "max_length": "longer prompts are cut: another limit, other prompts",
    "dtype": "low precision flips items by itself",
    "weights": "digest of a sample of the weights",
    "config": "digest of the configuration",
    "sha256": "digest of what was read",
    "edition": "editions of a benchmark are different benchmarks",
    "haystack": "what surrounds a needle decides how hard it is to find",
}


def settings_of(result: EvalResult) -> list[Setting]:
    """Every setting, nested ones by dotted names. Two results compare where these are equal, `observe` apart."""
    return list(_flat(result.settings, ""))


def _flat(value: Any, where: str) -> Iterator[Setting]:
    if isinstance(value, dict) and value:
        for key, each in value.items():
            yield from _flat(each, f"{where}.{key}" if where else str(key))
        return
    plain = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    yield Setting(where, plain, _WHY.get(where.rpartition(".")[2], ""))
