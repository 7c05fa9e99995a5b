"""The pictures of a profile: maps over layers and heads, kept mass against cost, and where each head's mass lies."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from sparseprefill.evals.report_figures import INK, colour, figure_style, marker
from sparseprefill.evals.report_words import short
from sparseprefill.patterns.profiles import label_of, type_of
from sparseprefill.patterns.scores import CandidateTable, Picture
from sparseprefill.patterns.store import PATTERNS, HeadScore, ModelPatterns

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

TYPE_COLOURS = {
    "dense": "#D55E00",
    "a_shape": "#56B4E9",
    "tri_shape": "#0072B2",
    "vertical_slash": "#F0C541",
    "block_sparse": "#009E73",
    "random": "#5A5A5A",
    "sale": "#693CFF",
}
"""Of the types that the profiler chooses, in every picture of every profile: told apart with any colour vision."""

_MORE_COLOURS = (
    "#8C6BB1", "#B5E48C", "#7F4F24", "#E5989B", "#17BECF", "#274C77", "#FFB5A7", "#606C38", "#B5179E", "#2D6A4F",
    "#9D0208",
)  # fmt: skip

_LETTERS = {
    "dense": "D",
    "a_shape": "A",
    "tri_shape": "T",
    "vertical_slash": "V",
    "block_sparse": "B",
    "random": "R",
    "sale": "S",
}
_DARK = ("random", "sale")  # letters on them are white
_SINGLY = 1600
"""Up to so many heads are drawn as shapes; more become one image inside a picture, which a browser shows sooner."""


def type_colour(name: str) -> str:
    """Of a pattern's type; one that no profile holds is drawn as the first that has no colour of its own."""
    others = [each for each in PATTERNS if each not in TYPE_COLOURS]
    number = others.index(name) if name in others else 0
    return TYPE_COLOURS.get(name, _MORE_COLOURS[number % len(_MORE_COLOURS)])


def _letter(name: str) -> str:
    return _LETTERS.get(name, name[:2])


Show = Literal["pattern", "density", "mass"]


class CandidateInfo(Protocol):
    """One column of the scores."""

    @property
    def label(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def control(self) -> bool: ...


class PromptInfo(Protocol):
    """One prompt that was scored."""

    @property
    def name(self) -> str: ...
    @property
    def tokens(self) -> int: ...
    @property
    def held_out(self) -> bool: ...


class ProfileScores(Protocol):
    """What every candidate kept and cost, as it was left beside a profile."""

    @property
    def candidates(self) -> Sequence[CandidateInfo]: ...
    @property
    def prompts(self) -> Sequence[PromptInfo]: ...
    @property
    def layers(self) -> Sequence[int]: ...

    def table(self, layer: int, held_out: bool, quantile: float) -> CandidateTable:
        """Means of one layer over the held-out or the tuning prompts."""
        ...

    def picture(self, layer: int) -> tuple[str, Picture] | None:
        """Name of the prompt, and where the mass of one layer lies on it."""
        ...


def judged_on(profile: ModelPatterns) -> str | None:
    """The scores that count: "held_out" where there are any, else "tuning", else None."""
    return "held_out" if profile.held_out else "tuning" if profile.tuning else None


KINDS = {"held_out": "held-out", "tuning": "tuning"}


# Maps over layers and heads


def plot_maps(profile: ModelPatterns, show: Sequence[Show] = ("pattern", "density", "mass")) -> Figure:
    """Layers by heads: which pattern each head has, its density, and the attention mass it keeps.

    Density and mass are those on held-out prompts, else those on tuning prompts; the titles say which. Heads without a
    score are hatched. Of a profile without any scores only the patterns are drawn.

    Raises:
        ValueError: nothing that is asked for can be drawn.
    """
    from matplotlib.figure import Figure

    kind = judged_on(profile)
    wanted = [each for each in show if each == "pattern" or kind is not None]
    if not wanted:
        raise ValueError(f"the profile has no scores to draw {' and '.join(show)} of: show the patterns")
    layers, heads = len(profile.layers), max(map(len, profile.layers))
    cell = min(22.0, max(6.0, 300 / heads))  # points
    wide, high = max(2.6, (heads * cell + 60) / 72), (layers * min(cell, 14.0) + 130) / 72
    abreast = 1 if wide > 7.5 and len(wanted) > 1 else len(wanted)
    down = -(-len(wanted) // abreast)
    with figure_style(INK):
        figure = Figure(figsize=(abreast * (wide + 0.3), down * high), layout="constrained", dpi=200)
        panels = figure.subfigures(down, abreast, squeeze=False).flatten()
        for panel, each in zip(panels, wanted, strict=True):
            _draw_map(panel, profile, each, kind, cell)
    return figure


def _draw_map(panel: Any, profile: ModelPatterns, show: Show, kind: str | None, cell: float) -> None:
    import matplotlib as mpl
    import numpy as np
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import ListedColormap, LogNorm

    axes: Axes = panel.subplots()
    layers, heads = len(profile.layers), max(map(len, profile.layers))
    scores = [
        list(getattr(profile, kind)[layer]) if kind else [None] * len(row) for layer, row in enumerate(profile.layers)
    ]
    values = np.full((layers, heads), np.nan)
    unscored = [(layer, head) for layer, row in enumerate(scores) for head, score in enumerate(row) if score is None]
    options: dict[str, Any] = {"edgecolors": "none", "antialiased": False, "rasterized": layers * heads > _SINGLY}
    if show == "pattern":
        used = types_used(profile)
        for layer, row in enumerate(profile.layers):
            values[layer, : len(row)] = [used.index(type_of(pattern)) for pattern in row]
        own = ListedColormap([type_colour(each) for each in used])
        axes.pcolormesh(np.ma.masked_invalid(values), cmap=own, vmin=-0.5, vmax=len(used) - 0.5, **options)
        if min(cell, 14.0) >= 12 and layers <= 40:
            for layer, row in enumerate(profile.layers):
                for head, pattern in enumerate(row):
                    axes.text(head + 0.5, layer + 0.5, _letter(type_of(pattern)), ha="center", va="center",
                              fontsize=7,
                              color="#ffffff" if type_of(pattern) in _DARK else "#111111")  # fmt: skip
        _legend(panel, used, unscored=bool(unscored) and kind is not None)
        axes.set_title("pattern")
    else:
        for layer, found in enumerate(scores):
            values[layer, : len(found)] = [np.nan if s is None else getattr(s, show) for s in found]
        if show == "density":
            low = max(0.001, min(0.1, float(np.nanmin(values, initial=1.0))))
            norm = LogNorm(low, 1.0, clip=True)
            ticks = [tick for tick in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0) if tick >= low]
            labels = [f"{tick:g}" for tick in ticks]
            if ticks[0] > 1.5 * low:
                ticks, labels = [low, *ticks], [f"{low:.2g}", *labels]
            tints, title = mpl.colormaps["YlGnBu"], "density"
        else:
            values = 1 - values
            norm, ticks = LogNorm(1e-3, 0.5, clip=True), [0.5, 0.1, 0.03, 0.01, 0.001]
            labels, tints, title = (
                ["\u2264 0.5", "0.9", "0.97", "0.99", "\u2265 0.999"],
                mpl.colormaps["YlOrRd"],
                "kept mass",
            )
        shown = np.ma.masked_invalid(values)
        image = axes.pcolormesh(shown, cmap=tints, norm=norm, **options)
        bar = panel.colorbar(image, ax=axes, location="bottom", shrink=0.9, aspect=28, pad=0.02,
                             fraction=min(0.15, 20 / (layers * cell)))  # fmt: skip
        bar.set_ticks(ticks, labels=labels)
        bar.minorticks_off()
        bar.outline.set_visible(False)
        if show == "mass":
            bar.ax.invert_xaxis()
        axes.set_title(f"{title}, {KINDS[kind or 'tuning']} prompts")
    if unscored and kind is not None:
        squares = [[(h, y), (h + 1, y), (h + 1, y + 1), (h, y + 1)] for y, h in unscored]
        ink = "#30343a" if show == "pattern" else "#8a8f98"
        crossed = "xxx" if cell < 10 else "xx"
        axes.add_collection(PolyCollection(squares, facecolors="none", edgecolors=ink, linewidths=0.3, hatch=crossed))
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlim(0, heads)
    axes.set_ylim(layers, 0)
    for axis, count in ((axes.xaxis, heads), (axes.yaxis, layers)):
        step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128) if count / step <= 20)
        axis.set_ticks([n + 0.5 for n in range(0, count, step)], labels=[str(n) for n in range(0, count, step)])
    axes.set_xlabel("head")
    axes.set_ylabel("layer")


def _legend(panel: Any, used: Sequence[str], unscored: bool) -> None:
    from matplotlib.patches import Patch

    entries = [Patch(facecolor=type_colour(each), label=f"{_letter(each)} {short(each, 24)}")
               for each in used]  # fmt: skip
    if unscored:
        entries.append(Patch(facecolor="none", edgecolor="#8a8f98", hatch="xxx", label="not profiled"))
    panel.legend(handles=entries, loc="outside lower center", ncols=2, frameon=False, fontsize=7.5, handlelength=1.1,
                 handleheight=1.1, columnspacing=1.2)  # fmt: skip


def types_used(profile: ModelPatterns) -> list[str]:
    """The types of patterns in a profile, in the order of `PATTERNS`, others last."""
    found = {type_of(pattern) for heads in profile.layers for pattern in heads}
    return [name for name in PATTERNS if name in found] + sorted(found - PATTERNS.keys())


# Kept mass against cost


@dataclass(frozen=True, slots=True)
class Uniform:
    """One candidate given to every head that was scored: means over heads."""

    label: str
    family: str
    control: bool
    mass: float
    density: float
    work: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """A profile beside uniform baselines, over the same heads and prompts."""

    kind: str  # "held_out" or "tuning"
    heads: int
    mass: float
    density: float
    work: float
    baselines: tuple[Uniform, ...]


def check_scores(profile: ModelPatterns, scores: ProfileScores) -> None:
    """Raise ValueError where the scores cannot be those of this profile."""
    strangers = [layer for layer in scores.layers if not 0 <= layer < len(profile.layers)]
    if strangers:
        raise ValueError(
            f"the scores have a layer {strangers[0]}, the profile has {len(profile.layers)} layers: they are of "
            "another model, remove them or name another profile"
        )
    if not scores.layers or not scores.candidates:
        raise ValueError("the scores hold no layer or no candidate: let the profile be finished first")


def compare_uniform(profile: ModelPatterns, scores: ProfileScores) -> Comparison:
    """The profile's means, and those of each candidate if all of these heads had it.

    On held-out prompts where both have them, else on tuning prompts; over heads that the profile has a score for.

    Raises:
        ValueError: the scores are of another model, or there is no head that both have scored.
    """
    check_scores(profile, scores)
    held_out = bool(profile.held_out) and any(prompt.held_out for prompt in scores.prompts)
    own = profile.held_out if held_out else profile.tuning
    chosen: list[HeadScore] = []
    totals = {name: [0.0] * len(scores.candidates) for name in ("mass", "density", "work")}
    for layer in scores.layers if own else ():
        table = scores.table(layer, held_out, quantile_of(profile))
        if tuple(table.mass.shape) != (len(own[layer]), len(scores.candidates)):
            raise ValueError(
                f"layer {layer} has scores of {table.mass.shape[0]} heads and {table.mass.shape[1]} candidates, the "
                f"profile has {len(own[layer])} heads and the scores name {len(scores.candidates)} candidates"
            )
        rows = [head for head, score in enumerate(own[layer]) if score is not None]
        chosen += [score for score in own[layer] if score is not None]
        for name, total in totals.items():
            for column, value in enumerate(getattr(table, name)[rows].sum(0).tolist()):
                total[column] += value
    if not chosen:
        raise ValueError("no head has a score both in the profile and beside it")
    means = {name: [value / len(chosen) for value in total] for name, total in totals.items()}
    mass, density, work = (
        math.fsum(getattr(score, name) for score in chosen) / len(chosen) for name in ("mass", "density", "work")
    )
    baselines = tuple(
        Uniform(info.label, info.family, info.control, means["mass"][n], means["density"][n], means["work"][n])
        for n, info in enumerate(scores.candidates)
    )
    return Comparison("held_out" if held_out else "tuning", len(chosen), mass, density, work, baselines)


def quantile_of(profile: ModelPatterns) -> float:
    """Share of query rows that may keep less than `low_mass`, as the profile says; 0.1 where it does not."""
    value = profile.made.get("quantile")
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1
    return float(value) if known and value is not None else 0.1


def plot_pareto(
    profile: ModelPatterns, scores: ProfileScores, cost: Literal["density", "work"] = "density"
) -> Figure:  # fmt: skip
    """Kept mass against density or work: the profile, and a curve a family if every head had the same candidate.

    Random blocks are the dashed control. On held-out prompts, else on tuning prompts; the label says which. Raises
    ValueError as `compare_uniform`.
    """
    return draw_pareto(compare_uniform(profile, scores), cost)


def draw_pareto(found: Comparison, cost: Literal["density", "work"] = "density") -> Figure:
    """`plot_pareto` of what has been compared."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    families = list(dict.fromkeys(each.family for each in found.baselines))
    with figure_style(INK):
        figure = Figure(figsize=(4.8, 3.2 + 0.09 * (len(families) + 2)), layout="constrained")
        axes = figure.subplots()
        for number, family in enumerate(families):
            mine = [each for each in found.baselines if each.family == family]
            control, tint = all(each.control for each in mine), TYPE_COLOURS.get(family, colour(number))
            label = short(family, 30) + (" (control, never chosen)" if control else "")
            axes.plot(
                *_places(mine, cost),
                ls="none",
                ms=4,
                marker=marker(number),
                color=tint,
                alpha=0.45,
                mew=0,
            )
            axes.plot(
                *_places(frontier(mine, cost), cost), ls="--" if control else "-", lw=1.4, ms=4.5,
                marker=marker(number), color=tint, label=label,
            )  # fmt: skip
        axes.plot([max(_LEAST_COST, getattr(found, cost))], [found.mass], ls="none", marker="*", ms=15, color=INK,
                  label="this profile", zorder=5)  # fmt: skip
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        ends = sorted([found.mass, *(each.mass for each in found.baselines)])
        axes.set_ylim(max(0.0, ends[0] - 0.05), 1.02)
        wide = sorted([getattr(found, cost), *(getattr(each, cost) for each in found.baselines)])
        low = max(_LEAST_COST, wide[0])
        axes.set_xticks([tick for tick in _TICKS if 0.7 * low <= tick <= 1.3 * max(1.0, wide[-1])])
        axes.set_xlim(0.8 * low, 1.25 * max(1.0, wide[-1]))
        axes.set_xlabel(f"{cost} (less to the left)")
        axes.set_ylabel(f"kept mass, {KINDS[found.kind]} prompts")
        axes.grid(color=INK, alpha=0.1, lw=0.6)
        figure.legend(loc="outside lower left", frameon=False, fontsize=8, handletextpad=0.5, ncols=2,
                      title="one candidate for all heads", title_fontsize=8, alignment="left")  # fmt: skip
    return figure


def frontier(baselines: Sequence[Uniform], cost: Literal["density", "work"]) -> list[Uniform]:
    """Those that keep more than any other that costs no more, cheapest first."""
    best: list[Uniform] = []
    for each in sorted(baselines, key=lambda each: (getattr(each, cost), -each.mass)):
        if not best or each.mass > best[-1].mass:
            best.append(each)
    return best


def _places(baselines: Sequence[Uniform], cost: str) -> tuple[list[float], list[float]]:
    return [max(_LEAST_COST, getattr(each, cost)) for each in baselines], [each.mass for each in baselines]


_LEAST_COST = 1e-4  # an axis of logarithms has no zero
_TICKS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 2.0, 5.0, 10.0)


# Pictures of heads

LEAST_MASS = 1e-4
"""Cells that hold less are as dark as those that hold nothing."""

OUTLINE = (0, 229, 255)
"""Cyan, which the colours of the mass (black, purple, orange, pale yellow) never come near."""

_LEVELS = 64  # colours of the mass: all an eye tells apart, and small files
_PIXELS = 256  # about so wide


def head_pngs(
    picture: Picture, patterns: Sequence[Any], candidates: Sequence[CandidateInfo]
) -> Iterator[tuple[bytes, bool]]:  # fmt: skip
    """For each head a PNG of where its mass lies, and whether the blocks of its pattern are outlined in it.

    A pattern that is none of the candidates has no outline. What lies in the future is transparent. Where only every
    n-th row of tiles was looked at, a row of the picture stands for n.

    Raises:
        ValueError: a picture of other heads or other candidates.
    """
    import numpy as np

    heads, cells = picture.mass.shape[0], picture.mass.shape[1]
    if heads != len(patterns) or picture.kept.shape[1] != len(candidates):
        raise ValueError(
            f"the picture shows {heads} heads and {picture.kept.shape[1]} candidates, there are {len(patterns)} and "
            f"{len(candidates)}"
        )
    columns = {info.label: n for n, info in enumerate(candidates)}
    looked_at = np.flatnonzero(picture.mass.sum((0, 2)).numpy() > 0)
    if not len(looked_at):
        looked_at = np.arange(cells)
    stands = looked_at[np.searchsorted(looked_at, np.arange(cells)).clip(max=len(looked_at) - 1)]
    future = np.arange(cells) > stands[:, None]
    shades = _shades()
    for head, pattern in enumerate(patterns):
        column = columns.get(label_of(pattern))
        kept = None if column is None else picture.kept[head, column].numpy()[stands]
        pixels = draw_head(picture.mass[head].numpy()[stands], kept, future)
        yield _png(pixels, shades), kept is not None


def draw_head(
    mass: NDArray[np.float32], kept: NDArray[np.bool_] | None, future: NDArray[np.bool_]
) -> NDArray[np.uint8]:  # fmt: skip
    """Numbers of colours, a square of pixels for a cell: `_LEVELS` shades of the mass, the outline, nothing."""
    import numpy as np

    decades = np.log(np.maximum(mass, LEAST_MASS) / LEAST_MASS) / -math.log(LEAST_MASS)
    shade = np.minimum(decades * _LEVELS, _LEVELS - 1).astype(np.uint8)
    shade[future] = _LEVELS + 1
    size = max(2, _PIXELS // len(mass))
    pixels = shade.repeat(size, 0).repeat(size, 1)
    if kept is not None:
        line = 1 if size < 8 else 2
        inside = kept & ~future
        padded = np.pad(kept | future, 1)  # no line along the diagonal: it would hide what lies there
        tiles = pixels.reshape(len(mass), size, len(mass), size)
        for place, beside in (
            (np.s_[:, :line], padded[:-2, 1:-1]), (np.s_[:, -line:], padded[2:, 1:-1]),
            (np.s_[:, :, :, :line], padded[1:-1, :-2]), (np.s_[:, :, :, -line:], padded[1:-1, 2:]),
        ):  # fmt: skip
            edge = (inside & ~beside)[:, None, :, None]
            part = tiles[place]
            part[np.broadcast_to(edge, part.shape)] = _LEVELS
    return pixels


def _shades() -> list[tuple[int, int, int]]:
    """`_LEVELS` colours of the mass, that of the outline, and one that is not seen."""
    import matplotlib as mpl

    magma = mpl.colormaps["magma"]
    levels = [tuple(round(255 * part) for part in magma(n / (_LEVELS - 1))[:3]) for n in range(_LEVELS)]
    return [*((r, g, b) for r, g, b in levels), OUTLINE, (0, 0, 0)]


def scale_png() -> bytes:
    """A strip with the colours of the mass, least to most."""
    import numpy as np

    return _png(np.arange(_LEVELS, dtype=np.uint8)[None].repeat(12, 0).repeat(4, 1), _shades())


def _png(pixels: NDArray[np.uint8], shades: Sequence[tuple[int, int, int]]) -> bytes:
    """A PNG file of numbered colours; the last of them is transparent."""
    import numpy as np
    from matplotlib.image import imsave

    colours = np.array([(*shade, 255) for shade in shades], np.uint8)
    colours[-1, 3] = 0
    file = io.BytesIO()
    imsave(file, colours[pixels], format="png")
    return file.getvalue()
