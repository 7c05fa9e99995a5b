"""The pictures of a report: heat maps, points by row, differences with intervals, score against cost.

Figures are made without pyplot, so that nothing is kept open. In pages they become inline SVG whose text is text and
takes the colour of what stands around it.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseprefill.evals.compare import Cell, Paired, Summary, mean_cells
from sparseprefill.evals.report_words import clean, group_value, in_cell, score, short
from sparseprefill.evals.results import EvalResult
from sparseprefill.evals.tasks import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCALE = ("#F0496E", "#EBB839", "#0CD79F")
"""Colours of nothing right, half right, all right, as retrieval heat maps have them everywhere."""

MOST_ROWS = 80
"""An axis with more values is not drawn: nobody could read it."""

INK = "#010203"
"""Becomes `currentColor` in pages, so that one picture serves light and dark."""

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#A6761D")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h")


def colour(number: int) -> str:
    """Of the method with this number; dense is drawn in the ink of the text."""
    return _COLOURS[number % len(_COLOURS)]


def marker(number: int) -> str:
    """As `colour`: no two of twelve methods share a shape, so that colour is never needed."""
    return _MARKERS[number % len(_MARKERS)]


@contextlib.contextmanager
def figure_style(ink: str, font: float = 8.5) -> Iterator[None]:
    """What all pictures look like, while they are drawn and while they are written."""
    import matplotlib as mpl

    inked = (
        "text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "xtick.labelcolor",
        "ytick.labelcolor", "axes.titlecolor",
    )  # fmt: skip
    settings: Any = {  # matplotlib's types name every key
        **dict.fromkeys(inked, ink), "font.size": font, "font.family": "sans-serif", "axes.titlesize": font + 0.5,
        "text.parse_math": False,  # a dollar sign in a label is a dollar sign
        "text.usetex": False, "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False,
        "axes.unicode_minus": True, "axes.linewidth": 0.6, "figure.dpi": 72,
    }  # fmt: skip
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a browser has the font
        yield


def axis_values(result: EvalResult, axis: str) -> list[str | int | float]:
    """All values of an axis: numbers in their order, words as they come."""
    found = list(dict.fromkeys(item.group[axis] for record in result.records for item in record.items))
    if all(isinstance(value, (int, float)) for value in found):
        return sorted(found, key=float)
    return found


def _grid(result: EvalResult, cells: Sequence[Cell], metric: Metric, method: str) -> list[list[float | None]]:
    """The means of a method by row and column of the axes; None where nothing was asked."""
    rows = axis_values(result, result.axes[0])
    columns = axis_values(result, result.axes[1])
    found = {
        (cell.group[result.axes[0]], cell.group[result.axes[1]]): cell.mean
        for cell in cells
        if len(cell.group) == 2 and (cell.method, cell.metric) == (method, metric.name)
    }
    return [[found.get((row, column)) for column in columns] for row in rows]


def limits(result: EvalResult, cells: Sequence[Cell], metric: Metric) -> tuple[float, float]:
    """Ends of the colours, the same for all methods: 0 and 1 for percent, else the extremes of all drawn cells."""
    if metric.percent:
        return 0.0, 1.0
    found = [c.mean for c in cells if c.metric == metric.name and len(c.group) == len(result.axes)]
    low, high = min(found), max(found)
    return (low, high) if high > low else (low, low + max(1.0, abs(low)))


def _colours(metric: Metric) -> Any:
    import matplotlib as mpl
    from matplotlib.colors import LinearSegmentedColormap

    if not metric.percent:
        return mpl.colormaps["YlGnBu"]
    return LinearSegmentedColormap.from_list("retrieval", SCALE if metric.higher_is_better else SCALE[::-1])


def _draw_map(
    axes: Axes, values: list[list[float | None]], metric: Metric, ends: tuple[float, float], rows: Sequence[str],
    columns: Sequence[str], width: float,
) -> Any:  # fmt: skip
    import numpy as np
    from matplotlib.colors import Normalize

    colours, norm = _colours(metric), Normalize(*ends, clip=True)
    filled = np.array([[np.nan if value is None else value for value in line] for line in values], dtype=float)
    image = axes.pcolormesh(
        np.ma.masked_invalid(filled), cmap=colours, norm=norm, edgecolors="none", linewidth=0, antialiased=False
    )
    longest = max((len(in_cell(value, metric)) for line in values for value in line if value is not None), default=1)
    room = 72 * (width - 1) / len(columns)  # points a cell, less what the labels of the rows take
    size = max(4.5, min(8.0, room / (0.65 * longest + 0.5)))
    for r, line in enumerate(values):
        for c, value in enumerate(line):
            where: dict[str, Any] = {"x": c + 0.5, "y": r + 0.5, "ha": "center", "va": "center", "fontsize": size}
            if value is None:
                axes.text(s="\N{EN DASH}", **where)
                continue
            red, green, blue, _ = colours(norm(value))
            dark = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 < 0.18
            axes.text(s=in_cell(value, metric), color="#ffffff" if dark else "#111111", **where)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks([c + 0.5 for c in range(len(columns))], columns,
                    rotation=45 if sum(map(len, columns)) > 44 else 0, rotation_mode="default")  # fmt: skip
    axes.set_yticks([r + 0.5 for r in range(len(rows))], rows)
    axes.invert_yaxis()
    return image


def heat_map(result: EvalResult, cells: Sequence[Cell], metric: Metric, method: str) -> Figure | None:
    """One method, rows by columns; None with an axis that is too long to draw."""
    from matplotlib.figure import Figure

    rows, columns = (axis_values(result, axis) for axis in result.axes)
    if max(len(rows), len(columns)) > MOST_ROWS:
        return None
    with figure_style(INK):
        width = max(3.6, 1.2 + 0.36 * len(columns))
        figure = Figure(figsize=(width, 0.75 + 0.27 * len(rows)), layout="constrained")
        axes = figure.subplots()
        names = [[short(group_value(axis, value), 24) for value in values]
                 for axis, values in zip(result.axes, (rows, columns), strict=True)]  # fmt: skip
        grid = _grid(result, cells, metric, method)
        _draw_map(axes, grid, metric, limits(result, cells, metric), names[0], names[1], width)
        axes.set_ylabel(short(result.axes[0]))
        axes.set_xlabel(short(result.axes[1]))
    return figure


def plot_heat_maps(result: EvalResult, metric: str | None = None) -> Figure:
    """A picture for a README: a panel for each method where there are two axes, else one panel, methods by rows.

    Percent metrics are drawn from 0 to 100 always; others between the extremes over all methods.

    Args:
        metric: its name; None: the headline.

    Raises:
        ValueError: no such metric, no answers, or an axis too long to draw.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    chosen = next((each for each in result.metrics if metric in (None, each.name)), None)
    if chosen is None:
        raise ValueError(f"no metric {metric!r} here: choose from {', '.join(each.name for each in result.metrics)}")
    if not result.records:
        raise ValueError("this result holds no answers yet: run the evaluation")
    cells = mean_cells(result)
    values = [axis_values(result, axis) for axis in result.axes]
    if max(map(len, values)) > MOST_ROWS:
        raise ValueError(f"an axis of this result has more than {MOST_ROWS} values, too many to draw")
    names = [[short(group_value(axis, each), 24) for each in found]
             for axis, found in zip(result.axes, values, strict=True)]  # fmt: skip
    ends = limits(result, cells, chosen)
    labels = [method.label for method in result.methods]
    with figure_style("#1a1a1a"), mpl.rc_context({"figure.dpi": 100}):
        if len(result.axes) == 2:
            abreast = min(3, len(labels))
            down = -(-len(labels) // abreast)
            width, height = max(3.0, 1.0 + 0.36 * len(names[1])), max(1.5, 0.9 + 0.27 * len(names[0]))
            figure = Figure(figsize=(abreast * width + 0.6, down * height + 0.7), layout="constrained")
            panels = list(figure.subplots(down, abreast, squeeze=False).flatten())
            for axes, method in zip(panels, result.methods, strict=False):
                grid = _grid(result, cells, chosen, method.label)
                image = _draw_map(axes, grid, chosen, ends, names[0], names[1], width)
                axes.set_title(short(method.label, 40) + (" \N{DAGGER}" if method.looks_ahead else ""))
                axes.set_xlabel(short(result.axes[1]))
                axes.set_ylabel(short(result.axes[0]))
            for axes in panels[len(labels) :]:
                axes.set_visible(False)
        else:
            table = {(cell.group[result.axes[0]], cell.method): cell.mean for cell in cells
                     if len(cell.group) == 1 and cell.metric == chosen.name}  # fmt: skip
            grid = [[table.get((row, label)) for label in labels] for row in values[0]]
            width = max(4.5, 3.0 + 0.8 * len(labels))
            figure = Figure(figsize=(width, 1.9 + 0.25 * len(grid)), layout="constrained")
            panels = [figure.subplots()]
            across = [short(label, 30) for label in labels]
            image = _draw_map(panels[0], grid, chosen, ends, names[0], across, width)
            panels[0].tick_params(axis="x", labelrotation=35)
            for tick in panels[0].get_xticklabels():
                tick.set_horizontalalignment("right")
            panels[0].set_ylabel(short(result.axes[0]))
        label = short(chosen.what if 0 < len(chosen.what) <= 60 else chosen.name, 60)
        bar = figure.colorbar(image, ax=panels, shrink=0.8, label=label)
        bar.outline.set_visible(False)
        if chosen.percent:
            bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0%", "25%", "50%", "75%", "100%"])
        title = short(result.task, 60)
        if not result.complete:
            title += f"   INCOMPLETE: {len(result.records)} of {result.planned} prompts"
        figure.suptitle(title, color="#b00020" if not result.complete else "#1a1a1a")
    return figure


def points_by_row(result: EvalResult, summary: Summary, metric: Metric) -> Figure | None:
    """One axis: a line for each row, a mark for each method, a bar for dense. None with too many rows."""
    from matplotlib.figure import Figure

    axis = result.axes[0]
    rows = axis_values(result, axis)
    if len(rows) > MOST_ROWS:
        return None
    found = {
        (cell.group[axis], cell.method): cell
        for cell in summary.cells
        if len(cell.group) == 1 and cell.metric == metric.name
    }
    others = [method.label for method in result.methods if method.label != "dense"]
    factor = 100 if metric.percent else 1
    with figure_style(INK):
        figure = Figure(figsize=(4.6, 1.0 + 0.18 * len(others) + 0.27 * len(rows)), layout="constrained")
        axes = figure.subplots()
        places = range(len(rows))
        _lines(axes, places)
        chances = [(found[row, "dense"].chance, place) for row, place in zip(rows, places, strict=True)]
        known = [(factor * chance, place) for chance, place in chances if chance is not None]
        if known:
            axes.plot(*zip(*known, strict=True), ls="none", marker=(3, 2, 180), ms=7, color=INK, alpha=0.75,
                      label="a guess (chance)")  # fmt: skip
        dense = [factor * found[row, "dense"].mean for row in rows]
        axes.plot(dense, places, ls="none", marker="|", ms=13, mew=2.2, color=INK, label="dense")
        for number, label in enumerate(others):
            dodge = (number - (len(others) - 1) / 2) * min(0.16, 0.6 / max(1, len(others)))
            axes.plot([factor * found[row, label].mean for row in rows], [place + dodge for place in places], ls="none",
                      marker=marker(number), ms=5, color=colour(number), alpha=0.9, label=short(label, 44))  # fmt: skip
        axes.set_yticks(places, [short(group_value(axis, row), 26) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(short(metric.name) + (" (0 to 100)" if metric.percent else ""))
        if metric.percent:
            axes.set_xlim(-3, 103)
        figure.legend(loc="outside lower left", frameon=False, fontsize=8, handletextpad=0.4)
    return figure


def _lines(axes: Axes, places: Sequence[int]) -> None:
    for place in places:
        axes.axhline(place, color=INK, alpha=0.12, lw=0.6, zorder=0)
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)


def forest(paired: Sequence[Paired], names: Sequence[str], metric: Metric, ends: tuple[float, float]) -> Figure | None:
    """Differences with their intervals, one a line. Filled marks have an interval that leaves out zero."""
    from matplotlib.figure import Figure

    if len(paired) > MOST_ROWS or not paired:
        return None
    factor = 100 if metric.percent else 1
    with figure_style(INK):
        figure = Figure(figsize=(3.9, 0.85 + 0.26 * len(paired)), layout="constrained")
        axes = figure.subplots()
        _lines(axes, range(len(paired)))
        axes.axvline(0, color=INK, lw=1, alpha=0.7)
        for place, each in enumerate(paired):
            known = each.low is not None and each.high is not None
            clear = each.low is not None and each.high is not None and not each.low <= 0 <= each.high
            good = (each.difference > 0) == metric.higher_is_better
            tint = (("#12936f" if good else "#d3264c") if clear else "#7a7f87") if known else "#7a7f87"
            if each.low is not None and each.high is not None:
                axes.plot([factor * each.low, factor * each.high], [place, place], color=tint, lw=1.8,
                          solid_capstyle="butt", marker="|", ms=6, mew=1.4)  # fmt: skip
            axes.plot([factor * each.difference], [place], ls="none", ms=6.5, mew=1.4, color=tint,
                      marker=("^" if (each.difference > 0) else "v") if clear else "o" if known else "x",
                      markerfacecolor=tint if clear else "none")  # fmt: skip
        axes.set_yticks(range(len(paired)), [short(name, 28) for name in names])
        axes.set_ylim(len(paired) - 0.5, -0.5)
        low, high = (factor * end for end in ends)
        pad = 0.06 * (high - low) or 1.0
        axes.set_xlim(low - pad, high + pad)
        less, more = ("worse", "better") if metric.higher_is_better else ("better", "worse")
        unit = "points" if metric.percent else short(metric.name, 20)
        gap = "\N{NO-BREAK SPACE}" * 3  # plain blanks run together in a page
        axes.set_xlabel(f"\N{LEFTWARDS ARROW} {less}{gap}difference ({unit}){gap}{more} \N{RIGHTWARDS ARROW}")
    return figure


def forest_ends(paired: Sequence[Paired]) -> tuple[float, float]:
    """The widest of all intervals, zero among them: one scale for plots that are looked at together."""
    found = [x for each in paired for x in (each.low, each.high, each.difference) if x is not None]
    return min(0.0, *found), max(0.0, *found)


def score_against(
    result: EvalResult, summary: Summary, cost: str, dense: float, chance: float | None
) -> Figure | None:  # fmt: skip
    """Headline score against "density" or "speed_up", with intervals; None where no method has that figure."""
    from matplotlib.figure import Figure

    metric = result.metrics[0]
    factor = 100 if metric.percent else 1
    others = [method.label for method in result.methods if method.label != "dense"]
    costs = {each.method: getattr(each, cost) for each in summary.costs if not each.group}
    wholes = {each.method: each for each in summary.paired if not each.group and each.metric == metric.name}
    if all(costs[label] is None for label in others):
        return None
    with figure_style(INK):
        figure = Figure(figsize=(4.2, 2.6 + 0.18 * (len(others) + 2)), layout="constrained")
        axes = figure.subplots()
        axes.axhline(factor * dense, color=INK, lw=1.2, ls="--", label=f"dense ({score(dense, metric)})")
        if chance is not None:
            axes.axhline(factor * chance, color=INK, lw=1, ls=":", alpha=0.75,
                         label=f"a guess ({score(chance, metric)})")  # fmt: skip
        for number, label in enumerate(others):
            if costs[label] is None:
                continue
            each = wholes[label]
            if each.low is not None and each.high is not None:
                axes.plot([costs[label]] * 2, [factor * (each.dense + each.low), factor * (each.dense + each.high)],
                          color=colour(number), lw=1.4)  # fmt: skip
            axes.plot([costs[label]], [factor * each.value], ls="none", marker=marker(number), ms=7,
                      color=colour(number), label=short(label, 44))  # fmt: skip
        if cost == "density":
            axes.set_xlim(-0.03, 1.03)
            axes.set_xlabel("density (less computed to the left)")
        else:
            axes.axvline(1, color=INK, lw=0.8, alpha=0.5)
            fastest = max(1.0, *(each for each in costs.values() if each is not None))
            axes.set_xlim(0, 1.1 * fastest)
            axes.set_xlabel("speed-up of the first token over dense (faster to the right)")
        axes.set_ylabel(short(metric.name) + (" (0 to 100)" if metric.percent else ""))
        axes.margins(y=0.12)
        axes.grid(color=INK, alpha=0.08, lw=0.6)
        figure.legend(loc="outside lower left", frameon=False, fontsize=8, handletextpad=0.5)
    return figure


def to_svg(figure: Figure, name: str, title: str, description: str) -> str:
    """An SVG element for a page: scales, has a title and a description, and its ids begin with `name`."""
    buffer = io.StringIO()
    with figure_style(INK):
        import matplotlib as mpl

        with mpl.rc_context({"svg.hashsalt": name}):
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<style[^>]*>.*?</style>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(<[^>]* id=")', rf"\g<1>{name}-", text)
    text = text.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-').replace(INK, "currentColor")
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    assert size is not None
    wide = float(size[1])
    opening = (
        f"<svg {size[0]} "
        f'role="img" aria-labelledby="{name}-title {name}-desc" style="max-width:{1.6 * wide:.0f}px;'
        f'min-width:{0.9 * wide if wide > 350 else 0:.0f}px">'
        f'<title id="{name}-title">{escape(clean(title))}</title>'
        f'<desc id="{name}-desc">{escape(clean(description))}</desc>'
    )
    return opening + text[text.index(">") + 1 :].strip()


def check_picture(path: Path) -> None:
    """Raise ValueError for a file that does not end as a PNG. To be asked before work."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"the picture is a PNG file: name one that ends in .png, not {path.name}")


def to_png(figure: Figure) -> bytes:
    """A picture as bytes of a PNG file, without the time it was made."""
    buffer = io.BytesIO()
    with figure_style("#1a1a1a"):
        figure.savefig(buffer, format="png", dpi=130, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
