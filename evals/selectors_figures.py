"""The picture of a comparison of selectors: kept mass against density, a panel a group."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseprefill.evals.profile_figures import TYPE_COLOURS
from sparseprefill.evals.report_figures import INK, colour, figure_style, marker, to_png
from sparseprefill.evals.report_words import short
from sparseprefill.evals.selectors import SelectorResult
from sparseprefill.files import check_folder, write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
_CONTROL = "random"
_OWN_COLOURS = {"sale": "#CC79A7", "sale, short window": "#D55E00", "sale by threshold": "#8C6BB1"}


def draw_selectors(result: SelectorResult, groups: Sequence[str] | None = None) -> Figure:
    """A panel for each group (None: all), a curve for each family that is drawn, on the first tiles.

    Random blocks are dashed, curves with a knob for each head dotted. Raises ValueError for groups that the result has
    not.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    wanted = list(result.groups if groups is None else groups)
    strangers = [each for each in wanted if each not in result.groups]
    if strangers or not wanted:
        raise ValueError(f"there is no group {strangers}: choose from {', '.join(result.groups)}")
    tile = result.curves[0].tile
    across = min(3, len(wanted))
    down = -(-len(wanted) // across)
    with figure_style(INK):
        figure = Figure(figsize=(0.4 + 3.4 * across, 0.7 + 2.9 * down), layout="constrained", dpi=150)
        panels = figure.subplots(down, across, squeeze=False).flatten()
        for axes, group in zip(panels, wanted, strict=False):
            mine = [each for each in result.curves if (each.group, each.tile) == (group, tile) and each.drawn]
            families = list(dict.fromkeys(_uniform(each.family) for each in mine))
            for curve in mine:
                order = sorted(range(len(curve.density)), key=lambda n: curve.density[n])
                name = _uniform(curve.family)
                number = families.index(name)
                tint = _OWN_COLOURS.get(name, TYPE_COLOURS.get(name, colour(number)))
                style: dict[str, Any] = {"ls": ":", "lw": 1.6}
                if name == curve.family:
                    style = {"ls": "--" if name == _CONTROL else "-", "lw": 1.2, "marker": marker(number), "ms": 3.5}
                axes.plot([curve.density[n] for n in order], [curve.mass[n] for n in order], color=tint,
                          label=short(curve.family, 30), **style)  # fmt: skip
            axes.set_title(short(group, 50))
            axes.set_xlabel("density (less to the left)")
            axes.set_xscale("log")
            axes.set_xticks(_TICKS)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlim(0.8 * min(min(each.density) for each in mine), 1.1)
            axes.set_ylim(None, 1.02)
            axes.grid(color=INK, alpha=0.1, lw=0.6)
        for axes in panels[len(wanted) :]:
            axes.set_visible(False)
        figure.supylabel("kept mass", fontsize=8.5)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", frameon=False, fontsize=8, ncols=3 if across < 3 else 5
        )
    return figure


def _uniform(family: str) -> str:
    """Name of a family, without what says that each head has a knob of its own."""
    return family.removesuffix(", per head")


def write_selectors(result: SelectorResult, path: Path, groups: Sequence[str] | None = None) -> None:
    """`draw_selectors` as a PNG file. Raises ValueError for another ending, and what `check_folder` raises."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"the picture is a PNG file: name one that ends in .png, not {path.name}")
    check_folder(path)
    write_bytes(path, to_png(draw_selectors(result, groups)))
