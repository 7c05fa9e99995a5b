"""What methods keep of the attention at what cost, each over a sweep of its knob: the comparison of selectors.

Every selector meets the same queries and keys: those of a model's layers under dense attention, or heads made up. What
is kept is the exact mass (see `sparseprefill.patterns.scores`), mean and low quantile over the queries. Methods are
compared at equal density, or at equal work, read off the line between the two points of a sweep that lie around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from sparseprefill.contracts import BlockGrid
from sparseprefill.estimators.selection import check_share
from sparseprefill.evals.compared_inputs import NamedInputs
from sparseprefill.evals.curves import Curve, Refusal, SelectorTime
from sparseprefill.evals.measured_selectors import Scored, Selector, Tile, accepted, measured, timed
from sparseprefill.evals.rounding_bound import BoundCount, count_bound
from sparseprefill.evals.selector_result import SelectorResult
from sparseprefill.kernels.low_bit import EXACT
from sparseprefill.patterns import AShape, BlockSparse, Dense, Pattern, RandomBlocks, Sale, VerticalSlash
from sparseprefill.patterns.methods import METHODS, MethodRow
from sparseprefill.patterns.names import parse_options
from sparseprefill.patterns.scores import check_quantile
from sparseprefill.prefill import resolve_method

SHARES = (0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7)
"""Knobs of SALE and its rivals with a budget."""

THRESHOLDS = (0.98, 0.9, 0.7, 0.5, 0.3, 0.1, 0.03, 0.01, 0.004, 0.001)
"""Knobs of SALE with a threshold."""

WIDTHS = ((4, "tile"), (2, "token"), (2, "tile"), (8, "token"), (8, "tile"))
"""Bits, and what shares a scale, beside the default of 4 and a token."""

TILES = ((64, 64), (64, 32), (128, 64))
"""Queries and keys of a tile of attention: what is compared, and what the tiles of SALE are chosen among."""

PER_HEAD = {
    "sale, per head": ("sale", "sale by threshold", "sale, short window"),
    "block_sparse, per head": ("block_sparse",),
    "vertical_slash, per head": ("vertical_slash",),
}
"""Families whose knobs are also chosen head by head, with hindsight: what a perfect profile of each would reach."""

_POINTS = 24  # of such a curve


def method_selectors(names: Sequence[str] | None = None) -> tuple[Selector, ...]:
    """The sweeps of `METHODS`: each method that has a knob, and dense. `names`: of some of them alone.

    A name may carry options, `NAME:option=value:option=value`, which stay what they are in its sweep, under this name.
    A wrapper with `inner=` is swept over the knob of what it goes around.

    Raises ValueError for a name that is none, that is there twice, or has no knob, and for options that it does not
    have or that are its knob.
    """
    known = [name for name, row in METHODS.items() if row.knob or row.pattern is Dense]
    names = known if names is None else list(names)
    for name in names:
        if name.partition(":")[0] not in known or names.count(name) > 1:
            raise ValueError(f"no sweep of {name!r}, or it is named twice: choose from {', '.join(known)}")
    if not names:
        raise ValueError(f"there is nothing to compare: choose from {', '.join(known)}")
    made = []
    for name in names:
        row, swept, fixed = METHODS[name.partition(":")[0]], _swept(name), _fixed(name)
        native = row.native if row.knob else None
        shared: dict[str, Any] = {"kind": row.kind, "native": native, "repeats": _repeated(name)}
        for value in swept.knobs if swept.knob else (1.0,):
            options = {**fixed, swept.knob: value} if swept.knob else fixed
            pattern: Any = resolve_method(name.partition(":")[0], **options)  # as a command line would have it
            made.append(Selector(name, value, pattern, **shared))
    return tuple(made)


def _fixed(name: str) -> dict[str, Any]:
    """Options that stay what they are in a sweep: those that go with the knob, and those that the name carries."""
    method, own, swept = name.partition(":")[0], _given(name), _swept(name)
    if swept.knob in own:
        raise ValueError(f"{name!r} sets {swept.knob}, which is what the sweep changes: leave it out")
    return {**METHODS[method].fixed, **(swept.fixed if METHODS[method].wraps else {}), **own}


def _given(name: str) -> dict[str, Any]:
    """Options that a name carries; those of a second method, `other=NAME:option=value`, close it."""
    text, _, other = name.partition(":")[2].partition("other=")
    return parse_options(text.replace(":", ",")) | ({"other": other} if other else {})


def _swept(name: str) -> MethodRow:
    """The row whose knob a sweep turns: that of the method, or of what a wrapper was told to go around."""
    row = METHODS[name.partition(":")[0]]
    inner = METHODS.get(str(_given(name).get("inner"))) if row.wraps else None
    return row if inner is None or not inner.knob else inner


def _repeated(name: str) -> str | None:
    """What a wrapper goes around, if its sweep is that method's; pbs sweeps a method with options of its own."""
    row = METHODS[name.partition(":")[0]]
    if not row.wraps or row.around is not dict or _swept(name).knob in row.options:
        return None
    return str(_given(name).get("inner", row.inner))


def method_settings(chosen: Sequence[Selector]) -> dict[str, dict[str, Any]]:
    """Of each method that is swept: the option that is its knob, and the options that go with it."""
    swept = [each.family for each in chosen if each.family.partition(":")[0] in METHODS]
    rows = {name: _swept(name) for name in dict.fromkeys(swept)}
    return {name: {"knob": row.knob, "fixed": _fixed(name)} for name, row in rows.items() if row.knob}


def sale_selectors(
    shares: Sequence[float] = SHARES,
    thresholds: Sequence[float] = THRESHOLDS,
    widths: Sequence[tuple[int, str]] = WIDTHS,
) -> tuple[Selector, ...]:
    """SALE by budget (with a shorter window too) and by threshold, in 4 bits and exact, and what it is compared with.

    `widths`: other widths and groups of scales, by budget. Lists by budget are compared with those of exact logits.
    """
    made = [Selector("sale exact", each, Sale(keep=each, bits=EXACT), drawn=False) for each in shares]
    made += [
        Selector("sale by threshold exact", each, Sale(threshold=each, bits=EXACT), drawn=False) for each in thresholds
    ]
    made += [Selector("sale", each, Sale(keep=each), like="sale exact") for each in shares]
    made += [Selector("sale by threshold", each, Sale(threshold=each)) for each in thresholds]
    # what sink and window always take is taken from a small budget
    made += [Selector("sale, short window", each, Sale(keep=each, window=64, segment=64)) for each in shares]
    for bits, group in widths:
        name = f"sale {bits} bits a {group}"
        made += [
            Selector(name, each, Sale(keep=each, bits=bits, group=group), like="sale exact", drawn=False)
            for each in shares
        ]
    rivals: dict[str, Callable[[float], Pattern]] = {
        "block_sparse": BlockSparse,
        "vertical_slash": lambda share: VerticalSlash(density=share),
        "a_shape": lambda share: AShape(64, share),
        "random": RandomBlocks,
    }
    made += [
        Selector(family, each, make(each), kind=METHODS[family].kind)
        for family, make in rivals.items() for each in shares
    ]  # fmt: skip
    return tuple(made)


def for_tiles(chosen: Sequence[Selector], tile: Tile) -> list[Selector]:
    """Those that are drawn and stand on tiles that are not square: what is compared on other tiles than the first."""
    return [
        each for each in chosen if each.drawn and not isinstance(each.pattern, (VerticalSlash, AShape, RandomBlocks))
    ]


def compare(
    inputs: Iterable[NamedInputs],
    chosen: Sequence[Selector],
    *,
    tiles: Sequence[Tile] = TILES[:1],
    native: bool = False,
    quantile: float = 0.1,
    every: int = 1,
    errors: bool = False,
    bound: float | None = None,
    per_head: Mapping[str, Sequence[str]] = PER_HEAD,
    time_at: Sequence[float] = (),
    repeats: int = 5,
    progress: Callable[[int], Any] = lambda steps: None,
) -> SelectorResult:
    """Meet every selector with all inputs, a list of theirs at a time.

    Args:
        inputs: what to compare on; means are taken over the heads of a group, each counting the same.
        chosen: the selectors; a family that others are `like` stands before them.
        tiles: queries and keys of a tile. All selectors run on the first, `for_tiles` says which on the others.
        native: each selector also on the tile of its paper.
        quantile: share of the queries that may keep less than `low_mass`.
        every: look at the mass of each n-th row of tiles only, for long prompts.
        errors: also measure how far outputs are from those of dense attention.
        bound: a threshold at which SALE's tiles are held to exact scores and to the bound of the rounding error; None
            for none. See `sparseprefill.evals.rounding_bound`.
        per_head: families whose knobs are also chosen head by head, by the name of what comes out.
        time_at: densities near which each family is timed, on the first inputs of each group; none: nothing is.
        repeats: timed calls; medians are taken.
        progress: called with 1 after each of the inputs.

    Returns:
        Curves, and `refused`: families that cannot be on some tile.

    Raises:
        ValueError: no inputs or no selectors, a family twice at one knob, and what `score` and the selectors raise.
    """
    check_quantile(quantile)
    for density in time_at:
        check_share("a density", density)
    _check_families(chosen)
    plan = _plan(chosen, tiles, native)
    takes_part: dict[tuple[str, Tile], list[Selector]] = {}
    found: dict[tuple[str, Tile], list[Scored]] = {}
    refused: list[Refusal] = []
    times: list[SelectorTime] = []
    bounds: dict[str, BoundCount] = {}
    for given in inputs:
        for tile, some in plan.items():
            key = (given.group, tile)
            first = key not in takes_part
            if first:
                takes_part[key], reasons = accepted(given, some, tile)
                refused += reasons
                if not found and not takes_part[key]:  # of the first tile, on which all are to meet
                    said = "; ".join(f"{each.family}: {each.reason}" for each in refused)
                    raise ValueError(f"no method can run on these tiles ({said}): name another tile")
            if not takes_part[key]:
                continue
            scored = measured(given, takes_part[key], tile, quantile=quantile, every=every, errors=errors)
            found.setdefault(key, []).append(scored)
            if first and time_at:
                times += timed(given, scored, tile, time_at, repeats)
        if bound is not None:
            counted = count_bound(given.inputs, Sale(threshold=bound), BlockGrid.of(given.inputs, *tiles[0]))
            bounds[given.group] = bounds[given.group] + counted if given.group in bounds else counted
        progress(1)
    if not takes_part:
        raise ValueError("there is nothing to compare on: give at least one prompt or made-up head")
    curves = [
        curve for key, some in found.items() for curve in (*_curves(*key, some), *_allocated(*key, some, per_head))
    ]
    return SelectorResult(tuple(curves), bounds, times=tuple(times), refused=tuple(refused))


def _check_families(chosen: Sequence[Selector]) -> None:
    if len({(each.family, each.knob) for each in chosen}) < len(chosen) or not chosen:
        raise ValueError("selectors need families and knobs of their own, and there must be one")
    families = list(dict.fromkeys(each.family for each in chosen))
    for each in chosen:
        if each.like is not None and each.like not in families[: families.index(each.family)]:
            raise ValueError(f"{each.family} is compared with {each.like}, which must stand before it")


def _plan(chosen: Sequence[Selector], tiles: Sequence[Tile], native: bool) -> dict[Tile, list[Selector]]:
    """Which selectors run on which tile."""
    plan = {tiles[0]: list(chosen)} | {tile: for_tiles(chosen, tile) for tile in tiles[1:]}
    for each in chosen if native else ():
        if each.native is not None and each not in plan.setdefault(each.native, []):
            plan[each.native].append(each)
    return {tile: some for tile, some in plan.items() if some}


def _curves(group: str, tile: Tile, some: Sequence[Scored]) -> Iterator[Curve]:
    chosen = some[0].chosen

    def means(name: str) -> list[float]:
        values: list[float] = torch.cat([getattr(each, name).view(-1, len(chosen)) for each in some]).mean(0).tolist()
        return values

    names = ("density", "mass", "low_mass", "estimator", "found", "agreement", "work", "error")
    columns = {name: means(name) for name in names}
    for family in dict.fromkeys(each.family for each in chosen):
        places = [n for n, each in enumerate(chosen) if each.family == family]
        got = {name: tuple(values[n] for n in places) for name, values in columns.items()}
        own = chosen[places[0]]
        yield Curve(
            group, tile, family, tuple(chosen[n].knob for n in places), got["density"], got["mass"], got["low_mass"],
            got["estimator"], _unless_nan(got["found"]), _unless_nan(got["agreement"]), own.drawn, got["work"],
            _unless_nan(got["error"]), own.kind, own.native == tile, own.repeats,
        )  # fmt: skip


def _allocated(
    group: str, tile: Tile, some: Sequence[Scored], per_head: Mapping[str, Sequence[str]]
) -> Iterator[Curve]:  # fmt: skip
    """As `_curves`, each head with a knob of its own, or dense: the most mass at a price of density, at many prices.

    These have no work: what was chosen with hindsight is not ranked.
    """
    chosen = some[0].chosen
    names = ("density", "mass", "low_mass", "estimator")
    for label, families in per_head.items():
        places = [n for n, each in enumerate(chosen) if each.family in families]
        if not places:
            continue
        values = {
            name: torch.cat([getattr(each, name).expand(each.density.shape)[:, places] for each in some])
            for name in names
        }
        # [heads, knobs + 1]: dense keeps all, and looks for nothing
        values = {name: functional.pad(each, (0, 1), value=name != "estimator") for name, each in values.items()}
        points: dict[float, dict[str, float]] = {}
        for price in np.geomspace(1e-3, 1e2, 200).tolist():
            best = (values["mass"] - price * values["density"]).argmax(1, keepdim=True)
            means = {name: float(each.gather(1, best).mean()) for name, each in values.items()}
            points.setdefault(means["density"], {"price": price, **means})
        got = [points[each] for each in sorted(points)]
        got = [each for n, each in enumerate(got) if n % -(-len(got) // _POINTS) == 0 or n == len(got) - 1]
        columns: dict[str, Any] = {name: tuple(each[name] for each in got) for name in names}
        yield Curve(group, tile, label, tuple(each["price"] for each in got), **columns)


def _unless_nan(values: tuple[float, ...]) -> tuple[float, ...] | None:
    return None if np.isnan(values).any() else values
