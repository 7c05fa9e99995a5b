"""What methods keep of the attention at what density, each over a sweep of its knob: the comparison of selectors.

Every selector meets the same queries and keys: those of a model's layers under dense attention, or heads made up. What
is kept is the exact mass (see `sparseprefill.patterns.scores`), mean and low quantile over the queries. Methods are
compared at equal density, read off the line between the two points of a sweep that lie around it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.evals.compared_inputs import NamedInputs
from sparseprefill.evals.rounding_bound import BoundCount, count_bound
from sparseprefill.files import read_json
from sparseprefill.kernels.low_bit import EXACT
from sparseprefill.patterns import AShape, BlockSparse, Pattern, RandomBlocks, Sale, VerticalSlash
from sparseprefill.patterns.scores import check_quantile, score, summarise
from sparseprefill.reports import number, table

SCHEMA = "sparseprefill-selectors-1"
"""Of a result; another one is refused."""

DENSITIES = (0.05, 0.1, 0.2, 0.3)
"""At which a table compares."""

SHARES = (0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7)
"""Knobs of methods with a budget."""

THRESHOLDS = (0.98, 0.9, 0.7, 0.5, 0.3, 0.1, 0.03, 0.01, 0.004, 0.001)
"""Knobs of methods with a threshold."""

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
_DIGITS = 4  # in a result


@dataclass(frozen=True, slots=True)
class Selector:
    """One method at one setting of its knob."""

    family: str  # whose curve it is a point of
    knob: float
    pattern: Pattern
    like: str | None = None  # family whose lists, at the same knob, these are compared with one by one
    drawn: bool = True  # in the picture


@dataclass(frozen=True, slots=True)
class Curve:
    """A family on a group: means over its heads, one entry a knob."""

    group: str
    tile: tuple[int, int]  # queries and keys of a tile
    family: str
    knob: tuple[float, ...]  # of `PER_HEAD`: mass that a share of density must bring
    density: tuple[float, ...]
    mass: tuple[float, ...]  # kept, mean over queries
    low_mass: tuple[float, ...]  # kept at least by all but the quantile of the queries
    estimator: tuple[float, ...]  # work of finding the blocks, in the unit of tile_work
    found: tuple[float, ...] | None = None  # share of the queries behind a needle whose list has it
    agreement: tuple[float, ...] | None = None  # with the lists of the exact family: shared over all, by tiles
    drawn: bool = True

    def at(self, density: float, what: str = "mass") -> float | None:
        """A figure at this density; None where the family cannot be so sparse. Dense closes each curve."""
        values = getattr(self, what)
        if values is None or density < min(self.density):
            return None
        order = sorted(range(len(self.density)), key=lambda n: (self.density[n], values[n]))
        return float(np.interp(density, [*(self.density[n] for n in order), 1.0], [*(values[n] for n in order), 1.0]))


@dataclass(frozen=True, slots=True)
class SelectorResult:
    """What a comparison came to. `str()` gives tables, `to_dict()` what JSON can hold."""

    curves: tuple[Curve, ...]
    bounds: dict[str, BoundCount] = field(default_factory=dict)  # by group; see `compare`
    settings: dict[str, Any] = field(default_factory=dict)  # what the figures depend on
    provenance: dict[str, Any] = field(default_factory=dict)

    def __add__(self, other: SelectorResult) -> SelectorResult:
        """Both, of groups that are not the same; settings and provenance of the first."""
        return dataclasses.replace(self, curves=self.curves + other.curves, bounds={**self.bounds, **other.bounds})

    def curve(self, group: str, family: str, tile: tuple[int, int] = TILES[0]) -> Curve:
        """One of the curves. Raises KeyError where there is none."""
        for each in self.curves:
            if (each.group, each.family, each.tile) == (group, family, tile):
                return each
        raise KeyError(f"no curve of {family!r} on {group!r} in tiles of {tile}")

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(each.group for each in self.curves))

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, numbers rounded."""
        curves = [
            {name: _rounded(value) for name, value in dataclasses.asdict(each).items() if value is not None}
            for each in self.curves
        ]
        bounds = {group: dataclasses.asdict(each) for group, each in self.bounds.items()}
        return {
            "schema": SCHEMA, "settings": self.settings, "provenance": self.provenance, "bounds": bounds,
            "curves": curves,
        }  # fmt: skip

    @staticmethod
    def load(path: Any) -> SelectorResult:
        """What `to_dict` wrote to a file. Raises ValueError for anything else, FileNotFoundError for no file."""
        data = read_json(path, "comparison")
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise ValueError(f"the comparison {path} is not of schema {SCHEMA}: make it again, `sparseprefill compare`")
        try:
            curves = tuple(Curve(**_tuples(each)) for each in data["curves"])
            bounds = {group: BoundCount(**each) for group, each in data["bounds"].items()}
            return SelectorResult(curves, bounds, data["settings"], data["provenance"])
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"the comparison {path} is damaged ({error}): make it again") from error

    def __str__(self) -> str:
        return self.text()

    def text(self, densities: Sequence[float] = DENSITIES, *, markdown: bool = False) -> str:
        """Tables: what each family keeps at these densities, and what its curve says beside."""
        parts = []
        for group in self.groups:
            for tile in dict.fromkeys(each.tile for each in self.curves if each.group == group):
                mine = [each for each in self.curves if (each.group, each.tile) == (group, tile)]
                parts.append(
                    f"{group}, tiles of {tile[0]} x {tile[1]}: kept mass at a density, and in the low quantile"
                )
                parts.append(_table(mine, densities, markdown))
        if self.bounds:
            parts.append("tiles between sink and window, and what rounding did to them at one threshold, in 4 bits")
            names = [each.name for each in dataclasses.fields(BoundCount)]
            rows = [[group, *map(str, dataclasses.astuple(each))] for group, each in self.bounds.items()]
            parts.append(table(["group", *names], rows, markdown=markdown))
        return "\n\n".join(parts)


def _tuples(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}


def _table(curves: Sequence[Curve], densities: Sequence[float], markdown: bool) -> str:
    extra = [
        (name, words)
        for name, words in (("agreement", "agreement"), ("found", "needle found"))
        if any(getattr(each, name) is not None for each in curves)
    ]
    middle = densities[len(densities) // 2]
    head = ["family", *(f"at {each:g}" for each in densities), *(f"low at {each:g}" for each in densities), "estimator"]
    head += [f"{words} at {middle:g}" for _, words in extra]
    rows = [
        [each.family, *(number(each.at(density)) for density in densities),
         *(number(each.at(density, "low_mass")) for density in densities), number(each.estimator[0], 4),
         *(number(each.at(middle, name)) for name, _ in extra)]
        for each in curves
    ]  # fmt: skip
    return table(head, rows, markdown=markdown)


def _rounded(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_rounded(each) for each in value]
    return round(value, _DIGITS) if isinstance(value, float) else value


def selectors(
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
    made += [Selector(family, each, make(each)) for family, make in rivals.items() for each in shares]
    return tuple(made)


def for_tiles(chosen: Sequence[Selector], tile: tuple[int, int]) -> list[Selector]:
    """Those that are drawn and stand on tiles that are not square: what is compared on other tiles than the first."""
    return [
        each for each in chosen if each.drawn and not isinstance(each.pattern, (VerticalSlash, AShape, RandomBlocks))
    ]


def compare(
    inputs: Iterable[NamedInputs],
    chosen: Sequence[Selector],
    *,
    tiles: Sequence[tuple[int, int]] = TILES[:1],
    quantile: float = 0.1,
    every: int = 1,
    bound: float | None = None,
    progress: Callable[[int], Any] = lambda steps: None,
) -> SelectorResult:
    """Meet every selector with all inputs, a list of theirs at a time.

    Args:
        inputs: what to compare on; means are taken over the heads of a group, each counting the same.
        chosen: the selectors; a family that others are `like` stands before them.
        tiles: queries and keys of a tile. All selectors run on the first, `for_tiles` says which on the others.
        quantile: share of the queries that may keep less than `low_mass`.
        every: look at the mass of each n-th row of tiles only, for long prompts.
        bound: a threshold at which SALE's tiles are held to exact scores and to the bound of the rounding error; None
            for none. See `sparseprefill.evals.rounding_bound`.
        progress: called with 1 after each of the inputs.

    Raises:
        ValueError: no inputs or no selectors, a family twice at one knob, and what `score` and the selectors raise.
    """
    check_quantile(quantile)
    if len({(each.family, each.knob) for each in chosen}) < len(chosen) or not chosen:
        raise ValueError("selectors need families and knobs of their own, and there must be one")
    families = list(dict.fromkeys(each.family for each in chosen))
    for each in chosen:
        if each.like is not None and each.like not in families[: families.index(each.family)]:
            raise ValueError(f"{each.family} is compared with {each.like}, which must stand before it")
    found: dict[tuple[str, tuple[int, int]], list[_Scored]] = {}
    bounds: dict[str, BoundCount] = {}
    for given in inputs:
        for place, tile in enumerate(tiles):
            some = chosen if place == 0 else for_tiles(chosen, tile)
            if some:
                found.setdefault((given.group, tile), []).append(_scored(given, some, tile, quantile, every))
        if bound is not None:
            counted = count_bound(given.inputs, Sale(threshold=bound), BlockGrid.of(given.inputs, *tiles[0]))
            bounds[given.group] = bounds[given.group] + counted if given.group in bounds else counted
        progress(1)
    if not found:
        raise ValueError("there is nothing to compare on: give at least one prompt or made-up head")
    curves = [curve for key, some in found.items() for curve in (*_curves(*key, some), *_allocated(*key, some))]
    return SelectorResult(tuple(curves), bounds)


@dataclass(frozen=True, slots=True, eq=False)
class _Scored:
    """Selectors on one of the inputs; float64 [heads, selectors], or [selectors], NaN where there is nothing."""

    chosen: Sequence[Selector]
    density: Tensor
    mass: Tensor
    low_mass: Tensor
    estimator: Tensor
    found: Tensor
    agreement: Tensor


def _scored(
    each: NamedInputs, chosen: Sequence[Selector], tile: tuple[int, int], quantile: float, every: int
) -> _Scored:  # fmt: skip
    watch = _Watch(chosen, each.needle)
    watched: list[Any] = [_Watched(selector.pattern, n, watch) for n, selector in enumerate(chosen)]
    counts = score(each.inputs, watched, block=tile[0], block_k=tile[1], every=every)
    means = summarise([counts], quantile)
    shared, either = watch.shared.double(), watch.either.double()
    return _Scored(
        chosen, means.density, means.mass, means.low_mass, counts.estimator,
        watch.found / watch.asked, shared / either,
    )  # fmt: skip


class _Watch:
    """What is counted of lists while they are made: whether they hold a needle, and what they share with others."""

    def __init__(self, chosen: Sequence[Selector], needle: int | None) -> None:
        self.needle = needle
        places = {(each.family, each.knob): n for n, each in enumerate(chosen)}
        self.like = [None if each.like is None else places.get((each.like, each.knob)) for each in chosen]
        self.kept: dict[int, BlockIndex] = {}
        self.shared, self.either = (torch.zeros(len(chosen), dtype=torch.int64) for _ in range(2))
        self.found, self.asked = (torch.zeros(len(chosen), dtype=torch.float64) for _ in range(2))

    def note(self, place: int, inputs: AttentionInputs, index: BlockIndex) -> None:
        """An index was made. The families that others are like come first."""
        if place in self.like:
            self.kept[place] = index
        like = self.like[place]
        if like is not None:
            own, other = index.to_mask(), self.kept[like].to_mask()
            self.shared[place] += (own & other).sum().cpu()
            self.either[place] += (own | other).sum().cpu()
        if self.needle is not None:
            grid = index.grid
            own = index.to_mask()[..., self.needle // grid.block_k]
            behind = grid.row_slots()[0] > self.needle + 4 * max(grid.block_q, grid.block_k)  # beyond local windows
            self.found[place] += (own & behind[:, None]).sum().cpu()
            self.asked[place] += int(behind.sum()) * inputs.query_heads


@dataclass(frozen=True, slots=True, eq=False)
class _Watched:
    """A pattern whose indexes are looked at when they are made; all else is the pattern's own."""

    pattern: Any
    place: int
    watch: _Watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pattern, name)

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        index: BlockIndex = self.pattern.build_index(inputs, grid)
        self.watch.note(self.place, inputs, index)
        return index

    def choose(self, estimate: Any, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        index: BlockIndex = self.pattern.choose(estimate, inputs, grid)
        self.watch.note(self.place, inputs, index)
        return index


def _curves(group: str, tile: tuple[int, int], some: Sequence[_Scored]) -> Iterator[Curve]:
    chosen = some[0].chosen

    def means(name: str) -> list[float]:
        values: list[float] = torch.cat([getattr(each, name).view(-1, len(chosen)) for each in some]).mean(0).tolist()
        return values

    columns = {name: means(name) for name in ("density", "mass", "low_mass", "estimator", "found", "agreement")}
    for family in dict.fromkeys(each.family for each in chosen):
        places = [n for n, each in enumerate(chosen) if each.family == family]
        got = {name: tuple(values[n] for n in places) for name, values in columns.items()}
        yield Curve(
            group, tile, family, tuple(chosen[n].knob for n in places), got["density"], got["mass"], got["low_mass"],
            got["estimator"], _unless_nan(got["found"]), _unless_nan(got["agreement"]), chosen[places[0]].drawn,
        )  # fmt: skip


def _allocated(group: str, tile: tuple[int, int], some: Sequence[_Scored]) -> Iterator[Curve]:
    """As `_curves`, each head with a knob of its own, or dense: the most mass at a price of density, at many prices."""
    chosen = some[0].chosen
    names = ("density", "mass", "low_mass", "estimator")
    for label, families in PER_HEAD.items():
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
