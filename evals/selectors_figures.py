"""Pictures of a comparison of methods: what they keep against density and work, a column a group, and total times."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseprefill.evals.compared_inputs import of_models
from sparseprefill.evals.curves import AXES, Curve, SelectorTime
from sparseprefill.evals.profile_figures import TYPE_COLOURS
from sparseprefill.evals.report_figures import INK, check_picture, figure_style, to_png
from sparseprefill.evals.report_words import short
from sparseprefill.evals.selector_result import SelectorResult
from sparseprefill.files import check_folder, write_bytes
from sparseprefill.patterns.methods import METHODS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0)
_FINDING, _ATTENDING = "#D55E00", "#56B4E9"
_CLOSE_TICKS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2)
_ABREAST = 3  # groups
_FAMILY_COLOURS = {
    **TYPE_COLOURS, "dense": INK, "sale": "#CC79A7", "sale, short window": "#D55E00", "sale by threshold": "#8C6BB1",
}  # fmt: skip
_COLOURS = (
    "#D62728", "#1F77B4", "#8FB339", "#17BECF", "#7F4F24", "#9467BD", "#FF7F0E", "#E377C2", "#274C77", "#E5989B",
    "#2D6A4F", "#B5179E",
)  # fmt: skip
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h", "d", "8", "H", "x")
_LINES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (4, 1.5, 1, 1.5)))
_LABELS = {"density": "density (less to the left)", "work": "tile work and finding the blocks (less to the left)"}


def draw_selectors(
    result: SelectorResult, groups: Sequence[str] | None = None, kind: str | None = None
) -> Figure:  # fmt: skip
    """A column for each group (None: all), on the common tile: a panel by density, and one by work where it is known.

    `kind`: families of this kind alone (of `sparseprefill.patterns.methods.KINDS`), each as in the whole picture, and
    beside them what wrappers among them go around.

    A curve for each family that is drawn, each with a colour, a mark and a line of its own; controls are dotted in
    thin lines, curves with a knob for each head are dotted without marks. A grey band is the Pareto front of all
    settings, rings are the settings on it. Raises ValueError for groups that the result has not.
    """
    from matplotlib.figure import Figure

    wanted = list(result.groups if groups is None else groups)
    strangers = [each for each in wanted if each not in result.groups]
    if strangers or not wanted:
        raise ValueError(f"there is no group {strangers}: choose from {', '.join(result.groups)}")
    drawn = {group: [each for each in result.on(group, result.tile) if each.drawn] for group in wanted}
    styles = _styles([each for curves in drawn.values() for each in curves])
    if kind is not None:
        mine = {each.family for curves in drawn.values() for each in curves if each.kind == kind}
        beside = mine and mine | _gone_around(mine)
        drawn = {group: [each for each in curves if each.family in beside] for group, curves in drawn.items()}
        if not mine:
            raise ValueError(
                f"there is no curve of kind {kind!r}: {', '.join(kinds_of(result)) or 'no kind'} can be drawn"
            )
        own = {each.family for curves in drawn.values() for each in curves}
        styles = {family: style for family, style in styles.items() if family in own}
    axes_of = [each for each in AXES if each == "density" or any(c.work for curves in drawn.values() for c in curves)]
    across = min(_ABREAST, len(wanted))
    bands = [wanted[n : n + across] for n in range(0, len(wanted), across)]
    down = len(bands) * len(axes_of)
    legend = -(-(len(styles) + 1) // _legend_columns(across))
    with figure_style(INK):
        size = (0.4 + 3.4 * across, 0.4 + 0.22 * legend + 2.8 * down)
        figure = Figure(figsize=size, layout="constrained", dpi=150)
        panels = figure.subplots(down, across, squeeze=False)
        for axes in panels.flatten():
            axes.set_visible(False)
        for band, some in enumerate(bands):
            for row, axis in enumerate(axes_of):
                for column, group in enumerate(some):
                    if not drawn[group]:
                        continue
                    axes = panels[band * len(axes_of) + row, column]
                    axes.set_visible(True)
                    _panel(axes, drawn[group], axis, result.measure, styles)
                    if row == 0:
                        axes.set_title(short(group, 50))
        figure.supylabel({"mass": "kept mass", "error": "error of the output"}[result.measure], fontsize=8.5)
        handles: dict[str, Any] = {}
        for axes in panels.flatten():
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", frameon=False, fontsize=8,
            ncols=_legend_columns(across),
        )  # fmt: skip
    return figure


def _gone_around(families: Iterable[str]) -> set[str]:
    """What the wrappers among these go around."""
    found = set()
    for family in families:
        row = METHODS.get(family.partition(":")[0])
        if row is not None and row.wraps:
            found.add(next((each[6:] for each in family.split(":") if each.startswith("inner=")), row.inner))
    return found


def _legend_columns(across: int) -> int:
    return 2 + across


def _styles(curves: Sequence[Curve]) -> dict[str, dict[str, Any]]:
    """How each family is drawn, in the order in which they come; the same in all panels."""
    styles: dict[str, dict[str, Any]] = {}
    taken = 0
    for family, control in dict.fromkeys((each.family, each.control) for each in curves):
        if family != _uniform(family):
            continue  # drawn as the family whose knob it is
        number = len(styles)
        tint = _FAMILY_COLOURS.get(family)
        if tint is None:
            tint, taken = _COLOURS[taken % len(_COLOURS)], taken + 1
        line = {"ls": (0, (1, 2)), "lw": 1.0} if control else {"ls": _LINES[number // 5 % len(_LINES)], "lw": 1.2}
        styles[family] = {"color": tint, "marker": _MARKERS[number % len(_MARKERS)], "ms": 3.8, **line}
    for family in dict.fromkeys(each.family for each in curves):
        name = _uniform(family)
        if family != name:
            tint = styles[name]["color"] if name in styles else _COLOURS[0]
            styles[family] = {"color": tint, "ls": ":", "lw": 1.6}
    return styles


def _panel(axes: Axes, curves: Sequence[Curve], axis: str, measure: str, styles: dict[str, dict[str, Any]]) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    mine = [each for each in curves if getattr(each, axis) is not None]
    front = pareto_front(mine, measure, axis)
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), color=INK, alpha=0.13, lw=6, solid_capstyle="round", zorder=1,
                  label="Pareto front")  # fmt: skip
    for curve in mine:
        places, values = getattr(curve, axis), getattr(curve, measure)
        order = sorted(range(len(places)), key=lambda n: places[n])
        axes.plot([places[n] for n in order], [values[n] for n in order], label=short(curve.family, 30),
                  **styles[curve.family])  # fmt: skip
    axes.plot(*zip(*front, strict=True), ls="none", marker="o", ms=8, mfc="none", mec=INK, mew=0.7, zorder=4)
    axes.set_xlabel(_LABELS[axis])
    axes.set_xscale("log")
    low = min(min(getattr(each, axis)) for each in mine)
    high = max(1.0, *(max(getattr(each, axis)) for each in mine))
    ticks = _TICKS if high > 3 * low else _CLOSE_TICKS
    axes.set_xticks([tick for tick in ticks if 0.8 * low <= tick <= 1.1 * high])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(0.8 * low, 1.1 * high)
    axes.set_ylim(*((None, 1.02) if measure == "mass" else (-0.02, None)))
    axes.grid(color=INK, alpha=0.1, lw=0.6)


def draw_totals(result: SelectorResult, density: float = 0.2) -> Figure:
    """What each timed method takes in total, finding the blocks and attention over them, over dense attention.

    A panel for each group, a bar for each family on the common tile at the setting timed nearest to `density`, the
    cheapest on top; beside it the density and, where it is known, the mass that is kept there. Raises ValueError for a
    comparison without times.
    """
    from matplotlib.figure import Figure

    timed = [each for each in result.times if each.tile == result.tile]
    if not timed:
        raise ValueError("nothing was timed: compare with times, `sparseprefill compare --time`")
    groups = list(dict.fromkeys(each.group for each in timed))
    nearest = {
        group: sorted(_nearest([each for each in timed if each.group == group], density), key=lambda each: each.total)
        for group in groups
    }
    longest = max(map(len, nearest.values()))
    with figure_style(INK):
        figure = Figure(figsize=(7.2, (0.8 + 0.21 * longest) * len(groups) + 0.4), layout="constrained", dpi=150)
        for axes, group in zip(figure.subplots(len(groups), 1, squeeze=False)[:, 0], groups, strict=True):
            _bars(axes, nearest[group], {each.family: each for each in result.on(group, result.tile)})
            axes.set_title(short(group, 70))
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", frameon=False, fontsize=8, ncols=3)
    return figure


def _nearest(times: Sequence[SelectorTime], density: float) -> list[SelectorTime]:
    """Of each family the setting whose density is nearest to this one; of equally near ones the sparser."""
    found: dict[str, SelectorTime] = {}
    for each in times:
        other = found.get(each.family)
        place = (abs(each.density - density), each.density)
        if other is None or place < (abs(other.density - density), other.density):
            found[each.family] = each
    return list(found.values())


def _bars(axes: Axes, times: Sequence[SelectorTime], curves: dict[str, Curve]) -> None:
    rows = range(len(times))
    axes.barh(rows, [each.find for each in times], color=_FINDING, height=0.7, label="finding the blocks")
    axes.barh(rows, [each.attend for each in times], left=[each.find for each in times], color=_ATTENDING, height=0.7,
              label="attention over them")  # fmt: skip
    axes.axvline(1.0, color=INK, lw=1.0, ls="--", label="dense attention")
    for row, each in zip(rows, times, strict=True):
        curve = curves.get(each.family)
        mass = None if curve is None else curve.at(each.density)
        said = f"density {each.density:.2f}" + ("" if mass is None else f", keeps {mass:.2f}")
        axes.annotate(said, (each.total, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})  # fmt: skip
    axes.set_yticks(rows, [short(each.family, 30) for each in times])
    axes.invert_yaxis()
    axes.set_ylim(len(times) - 0.4, -0.6)
    axes.set_xlim(0, 1.25 * max(1.0, *(each.total for each in times)))  # room for what is said beside the longest
    axes.set_xlabel("time over that of torch's dense attention")
    axes.grid(axis="x", color=INK, alpha=0.1, lw=0.6)


def pareto_front(curves: Sequence[Curve], measure: str = "mass", axis: str = "density") -> list[tuple[float, float]]:
    """(density or work, measure) of the settings that no cheaper one is as good as, cheapest first.

    Curves with a knob for each head, chosen with hindsight, have no part in it.
    """
    sign = -1.0 if measure == "mass" else 1.0
    points = sorted(
        (place, sign * value)
        for each in curves
        if each.family == _uniform(each.family)
        for place, value in zip(getattr(each, axis), getattr(each, measure), strict=True)
    )
    front: list[tuple[float, float]] = []
    best = float("inf")
    for place, value in points:
        if value < best:
            front.append((place, sign * value))
            best = value
    return front


def _uniform(family: str) -> str:
    """Name of a family, without what says that each head has a knob of its own."""
    return family.removesuffix(", per head")


def kinds_of(result: SelectorResult) -> list[str]:
    """Kinds of which a family is drawn, in the order in which they come."""
    return list(dict.fromkeys(each.kind for each in result.curves if each.drawn))


def kind_picture(path: Path, kind: str) -> Path:
    """Where the picture of one kind goes, beside that of all: NAME_kind.png."""
    return path.with_name(f"{path.stem}_{kind.replace(' ', '_')}{path.suffix}")


def totals_picture(path: Path) -> Path:
    """Where the picture of total times goes, beside that of the curves: NAME_totals.png."""
    return path.with_name(f"{path.stem}_totals{path.suffix}")


def write_selectors(
    result: SelectorResult, path: Path, groups: Sequence[str] | None = None, *, by_kind: bool = False
) -> list[Path]:  # fmt: skip
    """`draw_selectors` as a PNG file, and where it went; None: the groups of models, or all where there is none.

    `by_kind`: also one for each kind of method, beside it (`kind_picture`). Where methods were timed, also one of total
    times (`totals_picture`). Raises what `check_picture` and `check_folder` raise.
    """
    check_picture(path)
    check_folder(path)
    wanted = groups or of_models(result.groups) or None
    pictures = {path: draw_selectors(result, wanted)}
    for kind in kinds_of(result) if by_kind else ():
        pictures[kind_picture(path, kind)] = draw_selectors(result, wanted, kind)
    if result.times:
        pictures[totals_picture(path)] = draw_totals(result)
    for place, figure in pictures.items():
        write_bytes(place, to_png(figure))
    return list(pictures)
