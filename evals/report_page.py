"""The report of an evaluation: one page that needs nothing else, the same as Markdown, and a few lines for a terminal.

Whatever comes from models or files is shown as text, never as markup. A result that is not complete says so on top of
every form and in every file name, and gives no totals.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseprefill.evals.compare import Cell, Flip, Paired, Summary, row_mean, summarise
from sparseprefill.evals.page_rendering import markup, render_page
from sparseprefill.evals.report_figures import (
    MOST_ROWS,
    axis_values,
    forest,
    forest_ends,
    heat_map,
    limits,
    plot_heat_maps,
    points_by_row,
    score_against,
    to_png,
    to_svg,
)
from sparseprefill.evals.report_findings import (
    TERMS,
    Setting,
    Verdict,
    chance_of,
    overall,
    overall_cost,
    settings_of,
    state_of,
    state_of_difference,
    verdicts,
    warnings,
)
from sparseprefill.evals.report_words import (
    Table,
    change,
    counts,
    cut,
    gibibytes,
    group_value,
    interval,
    markdown,
    markdown_cell,
    one_line,
    probability,
    score,
    seconds,
    some,
    times,
)
from sparseprefill.evals.results import EvalResult, MethodRecord
from sparseprefill.evals.tasks import Metric
from sparseprefill.files import check_folder, write_bytes, write_text
from sparseprefill.reports import number, table

__all__ = ["plot_heat_maps", "report_html", "report_markdown", "report_text", "write_report"]

MOST_FLIPS = 100
"""So many items are listed a method; the result file has all of them."""

MOST_TEXT = 700
"""Characters of an answer that are shown."""

LOOKS_AHEAD = "\N{DAGGER}"


@dataclass(frozen=True, slots=True)
class _Picture:
    svg: str
    caption: str


@dataclass(frozen=True, slots=True)
class _FlipRow:
    item: str
    group: str
    dense: str
    value: str
    references: str
    dense_text: str | None
    text: str | None


@dataclass(frozen=True, slots=True)
class _FlipList:
    method: str
    losses: int
    gains: int
    left_out: int
    texts: bool
    rows: list[tuple[str, list[_FlipRow]]]  # heading: rows


def write_report(result: EvalResult, folder: str | Path, *, summary: Summary | None = None) -> list[Path]:
    """Write `TASK.html`, `TASK.md` and `TASK.png`; of an incomplete result `TASK.incomplete.html` and so on.

    Each file is written whole or not at all. Reports of the incomplete run are removed when it has been completed. No
    picture is written where an axis is too long to draw.

    Args:
        summary: what `summarise` made of this result; None: it is made here, which takes seconds for thousands of
            prompts.

    Returns:
        The files, the page first.

    Raises:
        ValueError: the task's name is no file name, there are no answers, or no dense run among them.
        FileNotFoundError: there is no such folder.
    """
    folder = Path(folder)
    if not re.fullmatch(r"[0-9A-Za-z][0-9A-Za-z_.+-]*", result.task):
        raise ValueError(f"the task {result.task!r} cannot name a file: give it letters, digits, '-', '_', '.' or '+'")
    names = {end: folder / f"{result.task}{'' if result.complete else '.incomplete'}.{end}" for end in _ENDS}
    for path in names.values():
        check_folder(path)
    summary = summary or summarise(result)
    page, document = report_html(result, summary), report_markdown(result, summary)
    write_text(names["html"], page)
    write_text(names["md"], document)
    written = [names["html"], names["md"]]
    if _drawn(result):
        write_bytes(names["png"], to_png(plot_heat_maps(result)))
        written.append(names["png"])
    if result.complete:
        for end in _ENDS:
            (folder / f"{result.task}.incomplete.{end}").unlink(missing_ok=True)
    return written


_ENDS = ("html", "md", "png")


def _drawn(result: EvalResult) -> bool:
    return all(len(axis_values(result, axis)) <= MOST_ROWS for axis in result.axes)


# Tables: what all forms share


def _name(method: MethodRecord) -> str:
    return f"{cut(one_line(method.label), 120)}{' ' + LOOKS_AHEAD if method.looks_ahead else ''}"


def _names(result: EvalResult) -> dict[str, str]:
    return {method.label: _name(method) for method in result.methods}


def _scale(metric: Metric) -> str:
    kind = "points of 100" if metric.percent else "as it is"
    return f"{kind}, {'higher' if metric.higher_is_better else 'lower'} is better"


def _caption(metric: Metric) -> str:
    return f"{one_line(metric.name)}: {one_line(metric.what)} ({_scale(metric)})"


def _so_far(result: EvalResult) -> str:
    return "" if result.complete else f" (INCOMPLETE: {len(result.records)} of {result.planned} prompts)"


def summary_table(result: EvalResult, summary: Summary, metric: Metric) -> Table:
    """Every method's score and its difference to dense."""
    names = _names(result)
    chance = chance_of(result, summary) if metric == result.metrics[0] else None
    items = sum(len(record.items) for record in result.records)
    known = chance is not None
    rows = []
    for method in result.methods:
        if method.label == "dense":
            dense = score(row_mean(summary.cells, "dense", metric.name), metric)
            row = [names["dense"], str(items), dense, *(["-"] * 4)]
        else:
            paired = overall(summary, method.label, metric)
            p = probability(paired.mcnemar)
            row = [
                names[method.label], str(paired.items), score(paired.value, metric), change(paired.difference, metric),
                interval(paired.low, paired.high, metric), f"{paired.better} / {paired.worse}", p,
            ]  # fmt: skip
        rows.append([*row, score(chance, metric)] if known else row)
    head = ["method", "items", "overall", "difference to dense", "95% interval", "better / worse items", "McNemar p"]
    return Table(_caption(metric), [*head, "chance"] if known else head, rows)


def axis_tables(result: EvalResult, summary: Summary, metric: Metric) -> list[Table]:
    """Scores by the axes: one table with a column a method, or, with two axes, one table a method."""
    names, first = _names(result), result.axes[0]
    rows = axis_values(result, first)
    own = [cell for cell in summary.cells if cell.metric == metric.name]
    if len(result.axes) == 1:
        found: dict[Any, Cell] = {(cell.group[first], cell.method): cell for cell in own if len(cell.group) == 1}
        known = any(found[row, "dense"].chance is not None for row in rows)
        lines = []
        for row in rows:
            dense = found[row, "dense"]
            line = [group_value(first, row), str(dense.items)]
            line += [score(found[row, method.label].mean, metric) for method in result.methods]
            lines.append([*line, score(dense.chance, metric)] if known else line)
        head = [first, "items", *names.values(), *(["chance"] if known else [])]
        return [Table(f"{_caption(metric)}, by {first}", head, lines)]
    columns = axis_values(result, result.axes[1])
    tables = []
    for method in result.methods:
        mine = [cell for cell in own if cell.method == method.label]
        inner = {(c.group[first], c.group[result.axes[1]]): c.mean for c in mine if len(c.group) == 2}
        whole = {c.group[first]: c.mean for c in mine if len(c.group) == 1}
        lines = [
            [group_value(first, row), *(score(inner.get((row, column)), metric) for column in columns),
             score(whole[row], metric)]
            for row in rows
        ]  # fmt: skip
        head = [f"{first} \\ {result.axes[1]}", *(group_value(result.axes[1], each) for each in columns), "all"]
        tables.append(Table(f"{names[method.label]}: {_caption(metric)}", head, lines))
    return tables


def row_differences(result: EvalResult, summary: Summary, metric: Metric) -> Table | None:
    """Differences to dense by row of the first axis, a column a method; None with a single row or dense alone."""
    names, first = _names(result), result.axes[0]
    others = [method.label for method in result.methods if method.label != "dense"]
    found = {
        (each.group[first], each.method): each for each in summary.paired if each.group and each.metric == metric.name
    }
    if not found or not others:
        return None
    lines = []
    for row in axis_values(result, first):
        each = [found[row, label] for label in others]
        texts = [f"{change(x.difference, metric)} {interval(x.low, x.high, metric)}" for x in each]
        lines.append([group_value(first, row), str(each[0].items), score(each[0].dense, metric), *texts])
    return Table(
        f"{one_line(metric.name)}: difference to dense [95% interval], by {first}",
        [first, "items", "dense", *(names[label] for label in others)], lines,
    )  # fmt: skip


def _total(value: float | None) -> str:
    """Two digits as benchmarks print them, more where that would be nothing."""
    return number(value, 2) if value is None or value == 0 or abs(value) >= 10 else f"{value:.4g}"


def totals_table(result: EvalResult) -> Table | None:
    """Aggregates by the rules of a benchmark; None where there are none, as before a run is complete."""
    if not result.complete or not result.totals:
        return None
    kinds = list(dict.fromkeys((total.name, total.what) for total in result.totals))
    found = {(total.name, total.what, total.method): total.value for total in result.totals}
    labels = [method.label for method in result.methods]
    lines = [
        [one_line(name), *(_total(found.get((name, what, label))) for label in labels), one_line(what) or "-"]
        for name, what in kinds
    ]
    caption = "Totals: aggregates that have rules of their own"
    return Table(caption, ["total", *_names(result).values(), "how it is averaged"], lines)


def cost_tables(result: EvalResult, summary: Summary) -> list[Table]:
    """Time, memory and work, over all prompts and by length."""
    names = _names(result)
    head = [
        "method",
        "timed prompts",
        "TTFT p50",
        "TTFT p90",
        "speed-up",
        "peak memory",
        "density",
        "tile work",
        "kept mass",
    ]
    tables = []
    groups = list(dict.fromkeys(tuple(each.group.items()) for each in summary.costs))
    for group in groups:
        lines = [
            [
                names[each.method], str(each.prompts), seconds(each.first_token_p50), seconds(each.first_token_p90),
                times(each.speed_up), gibibytes(each.peak_bytes), number(each.density), number(each.tile_work),
                number(each.kept_mass),
            ]
            for each in summary.costs if tuple(each.group.items()) == group
        ]  # fmt: skip
        where = ", ".join(f"{key} {group_value(key, value)}" for key, value in group) or "all prompts"
        tables.append(Table(f"Cost: {where}", head, lines))
    return tables


def kernel_table(result: EvalResult, summary: Summary) -> Table:
    """What really ran, and what did not run sparsely and why."""
    lines = []
    for method in result.methods:
        cost = overall_cost(summary, method.label)
        stock = method.label == "dense"
        lines.append([
            _name(method), "the model's own" if stock else one_line(counts(cost.kernels)),
            "-" if stock else one_line(counts(cost.previous_calls)),
        ])  # fmt: skip
    return Table("Attention calls, summed over layers and prompts",
                 ["method", "kernels that ran: calls", "calls that did not run sparsely: reason"], lines)  # fmt: skip


def settings_table(settings: Sequence[Setting]) -> Table:
    """All settings, by dotted names."""
    rows = [[one_line(each.name), one_line(cut(each.value, 200)), each.why or "-"] for each in settings]
    return Table("Settings of the run", ["setting", "value", "why it matters"], rows)


def provenance_tables(result: EvalResult) -> list[Table]:
    """What each process that took part ran on."""
    return [
        Table(
            "Where it ran" if len(result.provenance) == 1 else f"Process or session {i} of {len(result.provenance)}",
            ["what", "which"],
            [[one_line(name), one_line(cut(value, 300))] for name, value in _flat(found, "")],
        )
        for i, found in enumerate(result.provenance, 1)
    ]


def _flat(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, each in value.items():
            yield from _flat(each, f"{where}.{key}" if where else str(key))
    else:
        yield where, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# Markdown and text


def report_markdown(result: EvalResult, summary: Summary) -> str:
    """The report as one Markdown document; an incomplete one says so in its title and headings and has no totals."""
    so_far = _so_far(result)
    parts = [f"# {markdown(result.task)}: {state_of(result)}"]
    if not result.complete:
        parts.append(f"> **{state_of(result)}.** The rest has not been answered: every number below will change, and "
                     "none is a result.")  # fmt: skip
    parts.append(_what_ran(result, escape=markdown))
    parts.append("\n".join(f"- **{markdown(each.method)}**: {markdown(each.sentence)}"
                           for each in verdicts(result, summary)))  # fmt: skip
    found = warnings(result, summary)
    if found:
        parts += ["## Before you trust this", "\n".join(f"- {markdown(each)}" for each in found)]
    parts.append(f"## Scores{so_far}")
    for metric in result.metrics:
        parts += _markdown_table(summary_table(result, summary, metric))
    totals = totals_table(result)
    if totals is not None:
        parts += ["## Totals", *_markdown_table(totals)]
    parts.append(f"## By {' and '.join(map(markdown, result.axes))}{so_far}")
    for metric in result.metrics:
        for each in axis_tables(result, summary, metric):
            parts += _markdown_table(each)
    differences = row_differences(result, summary, result.metrics[0])
    if differences is not None:
        parts += _markdown_table(differences)
    parts.append(f"## Cost{so_far}")
    for each in [*cost_tables(result, summary), kernel_table(result, summary)]:
        parts += _markdown_table(each)
    if result.notes:
        parts += ["## Notes", "\n".join(f"- {markdown(note)}" for note in result.notes)]
    parts += ["## Settings", "Compare two results only where these are equal.",
              *_markdown_table(settings_table(settings_of(result)))]  # fmt: skip
    parts.append("## Provenance")
    for each in provenance_tables(result):
        parts += _markdown_table(each)
    parts += ["## Words", "\n".join(f"- **{term}**: {markdown(text)}" for term, text in TERMS)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_table(found: Table) -> list[str]:
    head, rows = (
        [markdown_cell(each) for each in found.head],
        [[markdown_cell(cell) for cell in row] for row in found.rows],
    )
    return [f"**{markdown(found.caption)}**", table(head, rows, markdown=True)]


def _what_ran(result: EvalResult, escape: Any = one_line) -> str:
    model = result.settings.get("model")
    name = model.get("name") if isinstance(model, dict) else model
    items = sum(len(record.items) for record in result.records)
    lengths = [record.tokens for record in result.records]
    span = f"{min(lengths)} tokens" if min(lengths) == max(lengths) else f"{min(lengths)} to {max(lengths)} tokens"
    who = f"Model {escape(str(name))}, " if name else ""
    return f"{who}{len(result.records)} of {some(result.planned, 'prompt')} of {span}, {some(items, 'item')}, " \
        f"{some(len(result.methods), 'method')}."  # fmt: skip


def report_text(result: EvalResult, summary: Summary) -> str:
    """A few lines for a terminal: verdicts, scores and costs."""
    names, metric = _names(result), result.metrics[0]
    lines = [f"{one_line(result.task)}: {state_of(result)}"]
    if not result.complete:
        lines.append("The rest has not been answered: every number here will change, and none is a result.")
    lines += [_what_ran(result), "", _caption(metric)]
    rows = []
    for method in result.methods:
        cost = overall_cost(summary, method.label)
        if method.label == "dense":
            row = [names["dense"], score(row_mean(summary.cells, "dense", metric.name), metric), "-", "-", "-"]
        else:
            each = overall(summary, method.label, metric)
            row = [
                names[method.label], score(each.value, metric), change(each.difference, metric),
                interval(each.low, each.high, metric), f"{each.better} / {each.worse}",
            ]  # fmt: skip
        rows.append(
            [*row, seconds(cost.first_token_p50), times(cost.speed_up), number(cost.density), number(cost.kept_mass)]
        )
    head = [
        "method",
        "score",
        "difference",
        "95% interval",
        "better / worse",
        "TTFT p50",
        "speed-up",
        "density",
        "kept mass",
    ]
    lines += [table(head, rows), ""]
    lines += [f"{one_line(each.method)}: {one_line(each.sentence)}" for each in verdicts(result, summary)]
    lines += [f"! {one_line(each)}" for each in warnings(result, summary)]
    lines += [f"* {one_line(each)}" for each in result.notes]
    totals = totals_table(result)
    if totals is not None:
        lines += ["", totals.caption, table(totals.head, totals.rows)]
    return "\n".join(lines) + "\n"


# The page


def report_html(result: EvalResult, summary: Summary) -> str:
    """One page with its style and pictures inside: nothing is fetched and nothing is run."""
    return render_page("report.html.j2", _context(result, summary))


def _context(result: EvalResult, summary: Summary) -> dict[str, Any]:
    headline = result.metrics[0]
    chance = chance_of(result, summary)
    dense = row_mean(summary.cells, "dense", headline.name)
    settings = settings_of(result)
    costs = cost_tables(result, summary)
    return {
        "task": one_line(result.task), "complete": result.complete, "state": state_of(result),
        "so_far": _so_far(result), "what_ran": _what_ran(result), "headline": headline, "axes": result.axes,
        "verdicts": [(each, _badge(each)) for each in verdicts(result, summary)],
        "warnings": warnings(result, summary), "looks_ahead": {m.label for m in result.methods if m.looks_ahead},
        "dagger": LOOKS_AHEAD, "dense": score(dense, headline), "chance": score(chance, headline),
        "summaries": [summary_table(result, summary, metric) for metric in result.metrics],
        "totals": totals_table(result), "pictures": _pictures(result, summary),
        "cost_all": costs[0], "cost_lengths": costs[1:], "kernels": kernel_table(result, summary),
        "flips": [_flip_list(result, summary, m.label) for m in result.methods if m.label != "dense"],
        "most_flips": MOST_FLIPS, "notes": result.notes, "settings": settings_table(settings),
        "provenance": provenance_tables(result), "terms": TERMS, "file": f"{one_line(result.task)}.json",
    }  # fmt: skip


_CLEAR = ("lost", "gained", "worse", "better")


def _badge(verdict: Verdict) -> tuple[str, str]:
    """A sign and the class of a verdict's colour; the words stand beside it."""
    down, up = "\N{BLACK DOWN-POINTING TRIANGLE}", "\N{BLACK UP-POINTING TRIANGLE}"
    return {
        "lost": (down, "bad"), "gained": (up, "good"), "worse": (up, "bad"), "better": (down, "good"),
        "no difference shown": ("\N{ALMOST EQUAL TO}", "even"), "no item differs": ("=", "even"),
        "one prompt": ("?", "open"), "not tested": ("\N{EMPTY SET}", "open"),
    }[verdict.state]  # fmt: skip


def _pictures(result: EvalResult, summary: Summary) -> dict[str, Any]:
    """Everything that is drawn, with the tables that say the same."""
    metric = result.metrics[0]
    others = [method.label for method in result.methods if method.label != "dense"]
    wholes = [overall(summary, label, metric) for label in others]
    by_row = [each for each in summary.paired if each.group and each.metric == metric.name]
    pictures: dict[str, Any] = {
        "scores": [(metric, _scores(result, summary, metric, i), axis_tables(result, summary, metric))
                   for i, metric in enumerate(result.metrics)],
        "forest": None, "forests": [], "costs": [], "differences": row_differences(result, summary, metric),
    }  # fmt: skip
    if wholes:
        ends = forest_ends(wholes)
        figure = forest(wholes, others, metric, ends)
        if figure is not None:
            told = "; ".join(f"{each.method} {change(each.difference, metric)} {interval(each.low, each.high, metric)}"
                             for each in wholes)  # fmt: skip
            pictures["forest"] = _Picture(
                markup(to_svg(figure, "forest", "Difference to dense, by method", told)), "All items, by method"
            )
        ends = forest_ends([*by_row, *wholes]) if by_row else ends
        for i, label in enumerate(others):
            mine = _in_order(result, [each for each in by_row if each.method == label])
            figure = forest(
                mine, [group_value(result.axes[0], each.group[result.axes[0]]) for each in mine], metric, ends
            )
            if figure is not None:
                clear = sum(state_of_difference(each, metric) in _CLEAR for each in mine)
                told = f"{clear} of {some(len(mine), 'row')} have an interval that leaves out zero; see the table."
                pictures["forests"].append(_Picture(
                    markup(to_svg(figure, f"forest{i}", f"{label}: difference to dense by {result.axes[0]}", told)),
                    label,
                ))  # fmt: skip
        dense, chance = row_mean(summary.cells, "dense", metric.name), chance_of(result, summary)
        for cost, what in (("density", "density"), ("speed_up", "speed-up")):
            figure = score_against(result, summary, cost, dense, chance)
            if figure is None:
                continue
            told = "; ".join(
                f"{label}: {score(overall(summary, label, metric).value, metric)} at "
                f"{number(getattr(overall_cost(summary, label), cost), 2)}"
                for label in others
            )
            pictures["costs"].append(_Picture(
                markup(to_svg(figure, f"cost-{cost.replace('_', '-')}", f"Score against {what}", told)),
                f"Score against {what}",
            ))  # fmt: skip
    return pictures


def _in_order(result: EvalResult, paired: Sequence[Paired]) -> list[Paired]:
    first = result.axes[0]
    place = {value: i for i, value in enumerate(axis_values(result, first))}
    return sorted(paired, key=lambda each: place[each.group[first]])


def _scores(result: EvalResult, summary: Summary, metric: Metric, order: int) -> dict[str, Any]:
    """Heat maps, or points by row, of one metric, and what their colours mean."""
    cells = summary.cells
    if len(result.axes) == 1:
        figure = points_by_row(result, summary, metric)
        title = f"{metric.name} by {result.axes[0]}"
        told = "A line for each row, a mark for each method; the table has the numbers."
        pictures = [] if figure is None else [_Picture(markup(to_svg(figure, f"rows{order}", title, told)), "")]
        return {"pictures": pictures, "maps": False, "colours": ""}
    pictures = []
    for i, method in enumerate(result.methods):
        figure = heat_map(result, cells, metric, method.label)
        if figure is None:
            return {"pictures": [], "maps": True, "colours": ""}
        mean = score(row_mean(cells, method.label, metric.name), metric)
        told = f"Overall {mean}. Rows: {result.axes[0]}; columns: {result.axes[1]}. The tables have the numbers."
        svg = to_svg(figure, f"map{order}-{i}", f"{method.label}: {metric.name} by {' and '.join(result.axes)}", told)
        pictures.append(_Picture(markup(svg), f"{_name(method)}\n{mean} overall"))
    low, high = limits(result, cells, metric)
    if metric.percent:
        best, worst = ("100", "0") if metric.higher_is_better else ("0", "100")
        colours = f"Colours run from red at {worst} over yellow at 50 to green at {best}, in every map of every report."
    else:
        light, dark = score(low, metric), score(high, metric)
        colours = f"Colours run from light at {light} to dark at {dark}, the same in all these maps."
    return {"pictures": pictures, "maps": True, "colours": colours}


def _flip_list(result: EvalResult, summary: Summary, method: str) -> _FlipList:
    """Items on which a method and dense differ: losses first, and some room for the gains."""
    metric = result.metrics[0]
    mine = [flip for flip in summary.flips if flip.method == method]
    sign = 1 if metric.higher_is_better else -1
    losses = [flip for flip in mine if sign * (flip.value - flip.dense) < 0]
    gains = [flip for flip in mine if sign * (flip.value - flip.dense) > 0][::-1]  # the largest first
    room = max(MOST_FLIPS - len(gains), MOST_FLIPS * 7 // 10)
    shown = losses[:room]
    more = gains[: MOST_FLIPS - len(shown)]
    rows = [(heading, [_flip_row(flip, metric) for flip in found])
            for heading, found in (("Lost", shown), ("Gained", more)) if found]  # fmt: skip
    texts = any(flip.text is not None or flip.dense_text is not None for flip in mine)
    left = len(mine) - len(shown) - len(more)
    return _FlipList(method, len(losses), len(gains), left, texts, rows)


def _flip_row(flip: Flip, metric: Metric) -> _FlipRow:
    group = ", ".join(f"{key} {group_value(key, value)}" for key, value in flip.group.items())
    references = [cut(each, MOST_TEXT // 2) for each in flip.references[:5]]
    if len(flip.references) > 5:
        references.append(f"and {len(flip.references) - 5} more")
    return _FlipRow(
        cut(flip.item, 200), group, score(flip.dense, metric), score(flip.value, metric), "\n".join(references),
        None if flip.dense_text is None else cut(flip.dense_text, MOST_TEXT),
        None if flip.text is None else cut(flip.text, MOST_TEXT),
    )  # fmt: skip
