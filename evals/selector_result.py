"""A comparison of methods as a whole: its curves, what is read off them, its file and its tables."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparseprefill.evals.compared_inputs import of_models
from sparseprefill.evals.curves import Curve, Refusal, SelectorTime
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.evals.ranking import Place, places, standings
from sparseprefill.evals.rounding_bound import BoundCount
from sparseprefill.files import read_json
from sparseprefill.reports import number, table

SCHEMA = "sparseprefill-selectors-2"
"""Of a result; those of `READ` are read, others refused."""

READ = (SCHEMA, "sparseprefill-selectors-1")
"""The first had no work, errors, times and refusals."""

DENSITIES = (0.05, 0.1, 0.2, 0.3)
"""At which a table compares."""

WORKS = (0.2, 0.3, 0.5, 0.7)
"""Tile work and work of finding the blocks together, at which a table compares."""

_DIGITS = 6  # in a result


@dataclass(frozen=True, slots=True)
class SelectorResult:
    """What a comparison came to. `str()` gives tables, `to_dict()` what JSON can hold."""

    curves: tuple[Curve, ...]
    bounds: dict[str, BoundCount] = field(default_factory=dict)  # by group; see `compare`
    settings: dict[str, Any] = field(default_factory=dict)  # what the figures depend on
    provenance: dict[str, Any] = field(default_factory=dict)
    times: tuple[SelectorTime, ...] = ()
    refused: tuple[Refusal, ...] = ()

    def __add__(self, other: SelectorResult) -> SelectorResult:
        """Both, of groups that are not the same; settings and provenance of the first."""
        return dataclasses.replace(
            self, curves=self.curves + other.curves, bounds={**self.bounds, **other.bounds},
            times=self.times + other.times, refused=self.refused + other.refused,
        )  # fmt: skip

    @property
    def tile(self) -> tuple[int, int]:
        """The one that all methods run on, or would."""
        return self.curves[0].tile

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(each.group for each in self.curves))

    @property
    def measure(self) -> str:
        """What methods are compared by; see `MEASURES`."""
        return "mass" if any(each.error is None for each in self.curves) else "error"

    def curve(self, group: str, family: str, tile: tuple[int, int] | None = None) -> Curve:
        """One of the curves; None: on the common tile. Raises KeyError where there is none."""
        tile = self.tile if tile is None else tile
        for each in self.curves:
            if (each.group, each.family, each.tile) == (group, family, tile):
                return each
        raise KeyError(f"no curve of {family!r} on {group!r} in tiles of {tile}")

    def on(self, group: str, tile: tuple[int, int] | None = None) -> list[Curve]:
        """The curves of a group on one tile; None: each method on its native one, dense on the common one."""
        mine = [each for each in self.curves if each.group == group]
        if tile is not None:
            return [each for each in mine if each.tile == tile]
        with_own = {each.family for each in self.curves if each.native}
        return [each for each in mine if each.native or (each.tile == self.tile and each.family not in with_own)]

    def ranked(self, tile: tuple[int, int] | None, groups: Iterable[str] | None = None) -> list[Curve]:
        """The curves of all groups (None: all that there are) on one tile, or each on its native one."""
        return [each for group in (self.groups if groups is None else groups) for each in self.on(group, tile)]

    def knob_at(self, group: str, family: str, density: float, tile: tuple[int, int] | None = None) -> float:
        """What `Curve.knob_at` says; None: on the common tile."""
        return self.curve(group, family, tile).knob_at(density)

    def specs_at(self, group: str, density: float) -> dict[str, MethodSpec | str]:
        """Each method that has a knob, set to a density on a group's common tile; or why it cannot be."""
        fixed: dict[str, Any] = self.settings.get("methods", {})
        found: dict[str, MethodSpec | str] = {}
        for each in self.on(group, self.tile):
            if each.family not in fixed:
                continue
            knob, options = fixed[each.family]["knob"], fixed[each.family]["fixed"]
            try:
                found[each.family] = MethodSpec(each.family.partition(":")[0], {knob: each.knob_at(density), **options})
            except ValueError as error:
                found[each.family] = str(error)
        return found

    def rounded(self) -> SelectorResult:
        """With the digits that `to_dict` keeps, so that tables say the same before and after a file."""
        return dataclasses.replace(
            self, curves=tuple(Curve(**_tuples(_plain(each))) for each in self.curves),
            times=tuple(SelectorTime(**_tuples(_plain(each))) for each in self.times),
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, numbers rounded."""
        return {
            "schema": SCHEMA, "settings": self.settings, "provenance": self.provenance,
            "bounds": {group: dataclasses.asdict(each) for group, each in self.bounds.items()},
            "refused": [dataclasses.asdict(each) for each in self.refused],
            "times": list(map(_plain, self.times)), "curves": list(map(_plain, self.curves)),
        }  # fmt: skip

    @staticmethod
    def load(path: Any) -> SelectorResult:
        """What `to_dict` wrote to a file. Raises ValueError for anything else, FileNotFoundError for no file."""
        data = read_json(path, "comparison")
        if not isinstance(data, dict) or data.get("schema") not in READ:
            raise ValueError(f"the comparison {path} is not of schema {SCHEMA}: make it again, `sparseprefill compare`")
        try:
            return SelectorResult(
                tuple(Curve(**_tuples(each)) for each in data["curves"]),
                {group: BoundCount(**each) for group, each in data["bounds"].items()},
                data["settings"], data["provenance"],
                tuple(SelectorTime(**_tuples(each)) for each in data.get("times", ())),
                tuple(Refusal(**_tuples(each)) for each in data.get("refused", ())),
            )  # fmt: skip
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"the comparison {path} is damaged ({error}): make it again") from error

    def __str__(self) -> str:
        return self.text()

    def text(
        self, densities: Sequence[float] = DENSITIES, works: Sequence[float] = WORKS, *, markdown: bool = False
    ) -> str:
        """Tables: what each family keeps at these densities, what its curve says beside, and how methods rank."""
        parts = []
        for group in self.groups:
            for tile in self._tiles(group):
                where = "each method on its native tile" if tile is None else f"tiles of {_tile(tile)}"
                parts.append(f"{group}, {where}: {_WORDS[self.measure]} at a density")
                parts.append(_table(self.on(group, tile), densities, self.measure, markdown, tile is None))
        parts += self._ranking(densities, works, markdown)
        if self.refused:
            parts.append("left out, because they cannot run on these tiles")
            parts.append(_refused_table(self.refused, len(self.groups), markdown))
        if self.times:
            parts.append("times over that of torch's dense attention, on the first heads of each group")
            parts.append(_times_table(self.times, markdown))
        if self.bounds:
            parts.append("tiles between sink and window, and what rounding did to them at one threshold, in 4 bits")
            names = [each.name for each in dataclasses.fields(BoundCount)]
            rows = [[group, *map(str, dataclasses.astuple(each))] for group, each in self.bounds.items()]
            parts.append(table(["group", *names], rows, markdown=markdown))
        return "\n\n".join(parts)

    @property
    def _has_native(self) -> bool:
        """Whether some methods also ran on a tile of their own."""
        return any(each.native and each.tile != self.tile for each in self.curves)

    def _tiles(self, group: str) -> list[tuple[int, int] | None]:
        """The tables of a group: one a tile that was asked for, and one (None) of native tiles."""
        asked = dict.fromkeys(
            each.tile for each in self.curves if each.group == group and (not each.native or each.tile == self.tile)
        )
        return [*asked, *([None] if self._has_native and self.on(group) else [])]

    def _ranking(self, densities: Sequence[float], works: Sequence[float], markdown: bool) -> list[str]:
        """Ranks on the common tile, cell by cell and summed up; summed up at equal work and on native tiles too."""
        own = of_models(self.groups)
        if any(each.work is None for each in self.curves):
            return []  # a comparison within one method, or an old file
        parts = [
            f"ranks at densities of {_listed(densities)}, tiles of {_tile(self.tile)} (*: it cannot be so "
            "sparse, and ranks last; +: a control, which moves nobody; -: no method can)",
            _ranks_table(self, densities, markdown),
        ]
        tiles: dict[str, tuple[int, int] | None] = {f"tiles of {_tile(self.tile)}": self.tile}
        if self._has_native:
            tiles["each method on its native tile"] = None
        some = {"all groups": list(self.groups)}
        if own and len(own) < len(self.groups):
            some["the groups of models alone"] = own
        for where, tile in tiles.items():
            for axis, at in (("density", densities), ("work", works)):
                for what, groups in some.items():
                    title = "equal density" if axis == "density" else "equal work, finding the blocks included"
                    parts.append(f"ranking at {title} ({_listed(at)}), {where}, {what}")
                    parts.append(_standings_table(self.ranked(tile, groups), at, self.measure, axis, markdown))
        return parts


_WORDS = {"mass": "kept mass", "error": "error of the output"}


def _listed(at: Sequence[float]) -> str:
    return ", ".join(f"{each:g}" for each in at)


def _tuples(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}


def _tile(tile: tuple[int, int]) -> str:
    return f"{tile[0]} x {tile[1]}"


def marked(each: Curve) -> str:
    """A family's name, with a plus where it is a control."""
    return f"{each.family} +" if each.control else each.family


def _table(
    curves: Sequence[Curve], densities: Sequence[float], measure: str, markdown: bool, tiles: bool
) -> str:  # fmt: skip
    extra = [
        (name, words)
        for name, words in (("agreement", "agreement"), ("found", "needle found"))
        if any(getattr(each, name) is not None for each in curves)
    ]
    if measure == "error":
        extra.insert(0, ("mass", "kept mass"))
    middle = densities[len(densities) // 2]
    low = measure == "mass"  # an error is one number a head
    head = ["family", *(["tile"] if tiles else []), *(f"at {each:g}" for each in densities)]
    head += [
        *(f"low at {each:g}" for each in densities if low),
        "estimator",
        *(f"{words} at {middle:g}" for _, words in extra),
    ]
    rows = [
        [marked(each), *([_tile(each.tile)] if tiles else []),
         *(number(each.at(density, measure)) for density in densities),
         *(number(each.at(density, "low_mass")) for density in densities if low), number(each.estimator[0], 4),
         *(number(each.at(middle, name)) for name, _ in extra)]
        for each in curves
    ]  # fmt: skip
    return table(head, rows, markdown=markdown)


def _ranks_table(result: SelectorResult, densities: Sequence[float], markdown: bool) -> str:
    """A row a group, a column a method, in each cell its rank at each density."""
    families = list(dict.fromkeys(map(marked, result.ranked(result.tile))))
    rows = []
    for group in result.groups:
        curves = result.on(group, result.tile)
        found = [places(curves, density, result.measure) for density in densities]
        names = {marked(each): each.family for each in curves}
        rows.append([group, *(" ".join(_rank(cell.get(names.get(name, ""))) for cell in found) for name in families)])
    return table(["group", *families], rows, markdown=markdown)


def _rank(place: Place | None) -> str:
    if place is None or place.rank is None:
        return "-"
    return f"{place.rank}{'*' if place.value is None else ''}"


def _standings_table(
    curves: Sequence[Curve], at: Sequence[float], measure: str, axis: str, markdown: bool
) -> str:  # fmt: skip
    tiles = {each.family: _tile(each.tile) for each in curves}
    names = {each.family: marked(each) for each in curves}
    head = [
        "family", "tile", "worst rank", "mean rank", f"mean {_WORDS[measure]}", "where all can be so sparse",
        "compared", "cannot be so sparse",
    ]  # fmt: skip
    rows = [
        [names[each.family], tiles[each.family], "-" if each.worst is None else str(each.worst),
         number(each.mean_rank, 2), number(each.mean), number(each.shared), str(each.compared), str(each.unreached)]
        for each in standings(curves, at, measure, axis)
    ]  # fmt: skip
    return table(head, rows, markdown=markdown)


def _refused_table(refused: Sequence[Refusal], groups: int, markdown: bool) -> str:
    counts = Counter((each.family, each.tile, each.reason) for each in refused)
    rows = [[family, _tile(tile), f"{count} / {groups}", why] for (family, tile, why), count in counts.items()]
    return table(["family", "tile", "groups", "reason"], rows, markdown=markdown)


def _times_table(times: Sequence[SelectorTime], markdown: bool) -> str:
    head = [
        "group", "family", "tile", "knob", "density", "find / dense", "attend / dense", "total / dense",
        "this kernel, all blocks / dense", "dense s",
    ]  # fmt: skip
    rows = [
        [each.group, each.family, _tile(each.tile), f"{each.knob:g}", number(each.density),
         number(each.find), number(each.attend), number(each.total), number(each.kernel), number(each.dense, 4)]
        for each in times
    ]  # fmt: skip
    return table(head, rows, markdown=markdown)


def _plain(each: Curve | SelectorTime) -> dict[str, Any]:
    """Its fields, but for those that are None."""
    return {name: _rounded(value, name) for name, value in dataclasses.asdict(each).items() if value is not None}


def _rounded(value: Any, name: str = "") -> Any:
    if isinstance(value, (list, tuple)):
        return [_rounded(each, name) for each in value]
    if not isinstance(value, float):
        return value
    # a knob may be very small
    return float(f"{value:.6g}") if name in ("knob", "dense") else round(value, _DIGITS)
