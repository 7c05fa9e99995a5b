"""How time grows with the length of the prompt where budgets are fixed numbers of tokens.

Dense attention looks at all pairs, and its time grows with the square of the tokens. A method that keeps so many tokens
for each query attends to as many pairs for each token, so that attending grows with the tokens; finding them grows as
the method looks: at a few queries, or at all pairs, or at all pairs of blocks. What is given is the slope of the line
that fits the logarithms of times and lengths best: 1 is linear, 2 is the square. All lengths are timed in every turn: a
machine that is slower for some minutes would otherwise be slower for one length, which bends the line.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparseprefill.contracts import BlockGrid
from sparseprefill.evals.bench import checked_parts, dense_attention, median_seconds, random_inputs
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.patterns import ModelPatterns
from sparseprefill.patterns.parts import Part, attend, parts_coverage, parts_of
from sparseprefill.prefill import resolve_method
from sparseprefill.reports import number, table

LENGTHS = (16384, 24576, 32768, 49152, 65536)
"""Tokens, unless they are given."""
LINEAR = (
    "a_shape:sink=64,window=960",
    "vertical_slash:verticals=512,slashes=512",
    "flexprefill:tau=0.0,min_budget=512,max_budget=512",
)
"""Methods that look at no pairs but those of a few queries, with about 1024 tokens each."""
QUADRATIC = (
    "block_sparse:keep=1024", "stem:keep=1024,sink=64,local=128", "flashprefill:keep=1024,sink=64,local=128",
    "xattention:keep=1024", "flexprefill:min_budget=512", "spargeattn:topk=1024", "pbs:keep=1024",
)  # fmt: skip
"""Methods whose finding looks at all pairs, of tokens or of blocks, or ranks all tiles."""
NEAR = 0.1
"""A slope this near to 1 is called linear."""


@dataclass(frozen=True, slots=True)
class GrowthCell:
    """One method at one length; seconds are medians."""

    method: str  # its label
    length: int  # tokens
    density: float  # pairs computed over visible pairs
    finding: float  # seconds of finding the blocks
    attending: float  # seconds of attention over them
    dense: float  # seconds of torch's dense causal attention

    @property
    def total(self) -> float:
        """Seconds of both."""
        return self.finding + self.attending


@dataclass(frozen=True, slots=True)
class Slope:
    """The line through the logarithms of times and lengths."""

    slope: float  # 1 where time grows with the tokens, 2 where it grows with their square
    worst: float  # largest relative distance of a time from the line


def growth(
    methods: Sequence[str] = (*LINEAR, *QUADRATIC),
    *,
    device: str,
    lengths: Sequence[int] = LENGTHS,
    query_heads: int = 2,
    kv_heads: int = 1,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    repeats: int = 3,
    seed: int = 0,
    progress: Callable[[int], Any] = lambda steps: None,
) -> list[GrowthCell]:
    """Time methods, named as on the command line, on random queries and keys.

    Raises ValueError for fewer than two lengths or ones that are not multiples of 128, for a method that is none or
    needs a model, and where a result is wrong.
    """
    lengths = sorted(set(lengths))
    if len(lengths) < 2:
        raise ValueError("a slope needs at least two lengths")
    for length in lengths:
        if length < 256 or length % 128:
            raise ValueError(f"growth is timed at multiples of 128 tokens, from 256 on, got {length}")
    patterns: dict[str, Any] = {}
    for text in methods:
        spec = MethodSpec.parse(text)
        patterns[spec.label] = resolve_method(spec.name, **spec.options)
        if isinstance(patterns[spec.label], ModelPatterns):
            raise ValueError(f"{text} is the profile of a model: name a method that needs none")
    contenders: dict[str, Callable[[], Any]] = {}
    density = {}
    for length in lengths:
        inputs = random_inputs(query_heads, kv_heads, length, head_dim, dtype, device, seed)
        grid = BlockGrid.of(inputs, 64, 64)
        contenders[f"dense {length}"] = functools.partial(dense_attention, inputs)
        for label, pattern in patterns.items():
            parts = parts_of(pattern, inputs, grid)
            density[label, length] = _checked(label, parts)
            contenders[f"find {length} {label}"] = functools.partial(parts_of, pattern, inputs, grid)
            contenders[f"attend {length} {label}"] = functools.partial(attend, parts)
        progress(1)
    seconds = median_seconds(inputs, contenders, repeats)
    return [
        GrowthCell(
            label, length, density[label, length], seconds[f"find {length} {label}"],
            seconds[f"attend {length} {label}"], seconds[f"dense {length}"],
        )
        for length in lengths
        for label in patterns
    ]  # fmt: skip


def _checked(label: str, parts: Sequence[Part]) -> float:
    """The density of what was chosen, once its result was held against the oracle."""
    result = attend(parts)
    assert result.output is not None
    plain = [part for part in parts if part.index.skip is None]
    if len(plain) == len(parts):
        checked_parts(label, parts, result.output)
    return float(parts_coverage(parts, result.skipped).density.mean())


def slope_of(lengths: Sequence[int], seconds: Sequence[float]) -> Slope:
    """Least squares over the logarithms. Raises ValueError for fewer than two lengths."""
    if len(set(lengths)) < 2:
        raise ValueError("a slope needs at least two lengths")
    x, y = [math.log(each) for each in lengths], [math.log(each) for each in seconds]
    middle, mean = math.fsum(x) / len(x), math.fsum(y) / len(y)
    slope = math.fsum((a - middle) * (b - mean) for a, b in zip(x, y, strict=True)) / math.fsum(
        (a - middle) ** 2 for a in x
    )
    worst = max(abs(b - mean - slope * (a - middle)) for a, b in zip(x, y, strict=True))
    return Slope(slope, math.expm1(worst))


def slopes(cells: Sequence[GrowthCell]) -> dict[str, dict[str, Slope]]:
    """Of finding, attending, total and dense, by method."""
    found: dict[str, dict[str, Slope]] = {}
    for method in dict.fromkeys(cell.method for cell in cells):
        own = [cell for cell in cells if cell.method == method]
        found[method] = {
            what: slope_of([cell.length for cell in own], [getattr(cell, what) for cell in own])
            for what in ("finding", "attending", "total", "dense")
        }
    return found


def growth_table(cells: Sequence[GrowthCell], *, markdown: bool = False) -> str:
    """Seconds of each method and length, then the slopes."""
    head = ["method", "length", "density", "finding s", "attending s", "together s", "dense s", "dense / together"]
    rows = [
        [
            cell.method, str(cell.length), number(cell.density), number(cell.finding, 4), number(cell.attending, 4),
            number(cell.total, 4), number(cell.dense, 4), number(cell.dense / cell.total, 2),
        ]
        for cell in cells
    ]  # fmt: skip
    found = slopes(cells)
    fitted = [
        [
            method, *(number(each[what].slope, 2) for what in ("finding", "attending", "total", "dense")),
            f"{100 * each['total'].worst:.0f}%", "yes" if abs(each["total"].slope - 1) <= NEAR else "no",
        ]
        for method, each in found.items()
    ]  # fmt: skip
    return "\n".join([
        table(head, rows, markdown=markdown),
        "",
        table(
            ["method", "finding", "attending", "together", "dense", "off the line", "linear"], fitted, markdown=markdown
        ),
        f"slopes of time against length, both as logarithms: 1 is linear (within {NEAR:g}), 2 the square; off the "
        "line: the largest distance of a time of both together",
    ])  # fmt: skip


def growth_plot(cells: Sequence[GrowthCell], path: Path) -> None:
    """Time against length on two logarithmic axes, beside lines of slopes 1 and 2; format by the name's ending."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    found = slopes(cells)
    lengths = sorted({cell.length for cell in cells})
    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    titles = ("finding and attending together", "finding the blocks alone")
    for axis, what, title in ((left, "total", titles[0]), (right, "finding", titles[1])):
        dense = {cell.length: cell.dense for cell in cells}
        slope = next(iter(found.values()))["dense"].slope
        axis.plot(lengths, [dense[n] for n in lengths], "k-o", markersize=4, label=f"dense ({slope:.2f})")
        for place, (method, each) in enumerate(found.items()):
            own = sorted((cell.length, getattr(cell, what)) for cell in cells if cell.method == method)
            axis.plot(
                *zip(*own, strict=True), marker="os^Dv"[place // 5 % 5], linestyle="-" if place < 5 else "--",
                color=f"C{place % 10}", markersize=4, linewidth=1.2, label=f"{_short(method)} ({each[what].slope:.2f})",
            )  # fmt: skip
        _ideal(axis, lengths, min(getattr(cell, what) for cell in cells), dense[lengths[0]])
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_major_locator(FixedLocator(lengths))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1024:g}k"))
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("tokens")
        axis.grid(visible=True, which="major", linewidth=0.3)
        axis.legend(fontsize=7, title="slope in brackets", title_fontsize=7, loc="upper left", ncols=2)
    left.set_ylabel("seconds")
    low, high = left.get_ylim()
    left.set_ylim(low, high * (high / low) ** 0.45)  # room for the legends
    figure.savefig(path, dpi=150)


def _ideal(axis: Any, lengths: Sequence[int], lowest: float, dense: float) -> None:
    """Thin lines of slopes 1 and 2, below the times."""
    for slope, first in ((1, lowest * 0.7), (2, dense * 0.7)):
        axis.plot(
            lengths, [first * (n / lengths[0]) ** slope for n in lengths], color="0.6", linewidth=0.8, linestyle=":"
        )
        axis.annotate(
            f"slope {slope}", (lengths[-1], first * (lengths[-1] / lengths[0]) ** slope), fontsize=7, color="0.4",
            ha="right", va="top", xytext=(0, -7), textcoords="offset points",
        )  # fmt: skip


def _short(method: str) -> str:
    name, _, options = method.partition(":")
    return f"{name}, maps" if name == "flexprefill" and "tau=0" not in options else name
