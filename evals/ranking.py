"""Which method keeps most where all cost the same: ranks in each group and at each density or work, and what is worst.

A rank is 1 and the number of methods that are strictly better, by the three digits that tables show. A method that
cannot be so sparse has the last rank there. Where none can, nothing is compared. Controls are no competitors: each has
the rank that it would take, and moves nobody.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from sparseprefill.evals.curves import Curve

_DIGITS = 3


@dataclass(frozen=True, slots=True)
class Place:
    """A method among others, on one group at one density or work."""

    rank: int | None  # None for a control that cannot be so sparse
    value: float | None  # None where it cannot be so sparse


@dataclass(frozen=True, slots=True)
class Standing:
    """A method over all groups and densities (or works) at which it is compared."""

    family: str
    control: bool
    worst: int | None  # rank; None for a control that never can be so sparse
    mean_rank: float | None
    mean: float | None  # of the measure, where it can be so sparse
    shared: float | None  # of the measure, where all competitors can; None where they never all can, or it cannot
    compared: int  # groups x densities
    unreached: int  # of these, where it cannot be so sparse


def places(curves: Sequence[Curve], place: float, measure: str = "mass", axis: str = "density") -> dict[str, Place]:
    """Each family among the curves of one group, at one density or work; nothing where none can be so sparse."""
    values = {each.family: each.at(place, measure, axis) for each in curves}
    controls = {each.family for each in curves if each.control}
    # less is better
    scores = {
        family: round(value if measure == "error" else -value, _DIGITS)
        for family, value in values.items() if value is not None
    }  # fmt: skip
    field = [score for family, score in scores.items() if family not in controls]
    if not field:
        return {}
    last = len(values) - len(controls)
    found = {}
    for family, value in values.items():
        if value is not None:
            found[family] = Place(1 + sum(other < scores[family] for other in field), value)
        else:
            found[family] = Place(None if family in controls else last, None)
    return found


def standings(
    curves: Sequence[Curve], at: Sequence[float], measure: str = "mass", axis: str = "density"
) -> tuple[Standing, ...]:
    """Best worst-case rank first, ties by mean rank, then by name; controls behind all others.

    Args:
        curves: one for each group and family, as `SelectorResult.on` gives them.
        at: densities or works at which to compare.
        measure, axis: see `MEASURES` and `AXES`.
    """
    groups = dict.fromkeys(each.group for each in curves)
    cells = [places([each for each in curves if each.group == group], x, measure, axis) for group in groups for x in at]
    everywhere = [cell for cell in cells if cell and all(each.value is not None for each in _field(cell, curves))]
    made = []
    for family, control in dict.fromkeys((each.family, each.control) for each in curves):
        mine = [cell[family] for cell in cells if family in cell]
        ranks = [each.rank for each in mine if each.rank is not None]
        values = [each.value for each in mine if each.value is not None]
        shared = [cell[family].value for cell in everywhere if family in cell]
        made.append(
            Standing(
                family, control, max(ranks, default=None), _mean(ranks), _mean(values), _mean(shared), len(mine),
                len(mine) - len(values),
            )
        )  # fmt: skip
    return tuple(sorted(made, key=_order))


def _field(cell: dict[str, Place], curves: Sequence[Curve]) -> list[Place]:
    """The competitors of a cell."""
    controls = {each.family for each in curves if each.control}
    return [place for family, place in cell.items() if family not in controls]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _order(each: Standing) -> tuple[bool, float, float, str]:
    never = float("inf")
    worst, mean = (never if value is None else value for value in (each.worst, each.mean_rank))
    return each.control, worst, mean, each.family
