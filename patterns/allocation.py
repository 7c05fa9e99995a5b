"""One candidate for every head of a model: the most kept mass for a budget, or the least cost for a target.

The budget is a multiple-choice knapsack (Kellerer, Pferschy and Pisinger, "Knapsack Problems", 2004, chapter 11). It is
solved exactly: the optimal multiplier of the relaxation bounds what any allocation can keep, and only candidates that
can still be in an allocation within that bound enter a dynamic programme. All of it is whole numbers, so that equal
inputs give equal allocations on every machine.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseprefill.estimators.selection import check_share

UNIT = 1e-4
"""Costs count in whole units of this share of dense attention, rounded up."""

_SLACK = 1e-6  # units: 0.07 / 1e-4 is 700.0000000000001 in floating point, and means 700
_MOST_COST = 100.0  # of dense; beyond, products of costs and masses might leave int64
_MOST_TIED_STATES = 1 << 22  # of the search among equal allocations: about 100 MiB
Whole = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Allocation:
    """What `allocate` chose. Means are over heads."""

    chosen: Tensor  # int64 [heads], the candidate of each head
    mass: float  # mean mass of the chosen candidates
    cost: float  # mean cost of the chosen candidates, not rounded
    bound: float  # no allocation within the budget has a larger mean mass: the linear relaxation on rounded costs

    @property
    def gap(self) -> float:
        """What the relaxation promises beyond the mass that was reached; never negative."""
        return self.bound - self.mass


def allocate(mass: Tensor, cost: Tensor, budget: float) -> Allocation:
    """One candidate a head, so that the mean cost is within the budget and the mean mass is the largest possible.

    The optimum is exact for costs rounded up to whole `UNIT`s and for masses rounded to about 2**-46 of the largest.
    Of equal allocations the cheaper one is chosen; of those the one that has, head by head in order, the lower
    candidate number (among millions of them, any, but always the same). A budget that pays for every head's best is
    spent only as far as that.

    Args:
        mass: float64 [heads, candidates], larger is better.
        cost: float64 [heads, candidates], in dense attention.
        budget: the mean cost allowed, in (0, 1].

    Raises:
        ValueError: other dtypes, shapes that differ, numbers that are not finite, negative costs, or a budget that is
            below what the cheapest candidates cost together (the message says how much that is).
    """
    masses, costs = _table(mass, "mass"), _table(cost, "cost")
    if masses.shape != costs.shape:
        raise ValueError(f"mass and cost must have one shape, got {masses.shape} and {costs.shape}")
    if costs.min() < 0 or costs.max() > _MOST_COST:
        raise ValueError(
            f"cost is in dense attention, from 0 to {_MOST_COST:g}: got {costs.min():g} to {costs.max():g}"
        )
    check_share("budget", budget)
    heads = masses.shape[0]
    units = np.maximum(np.ceil(costs / UNIT - _SLACK), 0).astype(np.int64)
    limit = math.floor(budget / UNIT * heads + _SLACK)
    least = int(units.min(1).sum())
    if least > limit:
        enough = math.ceil(least / heads) * UNIT
        raise ValueError(
            f"a budget of {budget:g} is below the mean cost of the heads' cheapest candidates: "
            f"give at least {enough:.4f}"
        )
    worth, digits = _whole(masses, int(units.max()))
    table = _Table(units, worth, _efficient(units, worth, costs))
    chosen, bound = _solve(table, limit)
    row = np.arange(heads)
    reached = math.fsum(masses[row, chosen].tolist()) / heads
    most = float(bound / heads) * 2.0**-digits
    # the bound of rounded masses may lie a rounding below the sum of the real ones
    return Allocation(
        torch.from_numpy(chosen), reached, math.fsum(costs[row, chosen].tolist()) / heads, max(most, reached)
    )


def cheapest_reaching(mass: Tensor, cost: Tensor, target: float, dense: int) -> Tensor:
    """int64 [heads]: for each head the cheapest candidate whose mass is at least `target`, `dense` where none is.

    Of equal costs the higher mass is chosen, then the lower number.

    Args:
        mass: float64 [heads, candidates].
        cost: float64 [heads, candidates].
        target: the mass to reach, in (0, 1].
        dense: the number of the candidate that stands in.

    Raises:
        ValueError: other dtypes, shapes that differ, numbers that are not finite, a target or a candidate that is none.
    """
    masses, costs = _table(mass, "mass"), _table(cost, "cost")
    if masses.shape != costs.shape:
        raise ValueError(f"mass and cost must have one shape, got {masses.shape} and {costs.shape}")
    check_share("target", target)
    if not 0 <= dense < masses.shape[1]:
        raise ValueError(f"dense must be one of the {masses.shape[1]} candidates (0 to {masses.shape[1] - 1}): {dense}")
    reaches = masses >= target
    first = np.lexsort((-masses, np.where(reaches, costs, np.inf)), axis=-1)[:, 0]
    return torch.from_numpy(np.where(reaches.any(1), first, dense).astype(np.int64))


def _table(values: Any, name: str) -> NDArray[np.float64]:
    """float64 [heads, candidates] of a tensor or an array, checked."""
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    if array.dtype != np.float64:
        raise ValueError(f"{name} must be float64, got {array.dtype}, in which 0.3 would cost more than 0.3")
    if array.ndim != 2 or not array.size:
        raise ValueError(f"{name} must be [heads, candidates] with at least one of each, got {array.shape}")
    if not np.isfinite(array).all():
        head, candidate = np.argwhere(~np.isfinite(array))[0]
        raise ValueError(f"{name} must be finite: head {head}, candidate {candidate} has {array[head, candidate]}")
    return array


def _whole(masses: NDArray[np.float64], most_units: int) -> tuple[Whole, int]:
    """Masses as whole multiples of 2**-digits, as fine as sums and products with units stay in int64."""
    bits = min(60 - max(1, most_units.bit_length()), 61 - masses.shape[0].bit_length())
    digits = bits - math.frexp(float(np.abs(masses).max()))[1]
    return np.rint(np.ldexp(masses, digits)).astype(np.int64), digits


def _efficient(units: Whole, worth: Whole, costs: NDArray[np.float64]) -> NDArray[np.bool_]:
    """bool [heads, candidates]: those that no other candidate of the head replaces at no more cost and no less worth.

    Of candidates that are equal in both, the one that was cheaper before rounding stays, then the lower number.
    """
    order = np.lexsort((costs, -worth, units), axis=-1)
    sorted_worth = np.take_along_axis(worth, order, 1)
    before = np.maximum.accumulate(sorted_worth, axis=1)[:, :-1]
    better = np.concatenate([np.ones_like(order[:, :1], dtype=bool), sorted_worth[:, 1:] > before], 1)
    kept = np.empty_like(better)
    np.put_along_axis(kept, order, better, 1)
    return kept


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """The knapsack in whole numbers."""

    units: Whole  # [heads, candidates]
    worth: Whole  # [heads, candidates]
    efficient: NDArray[np.bool_]  # [heads, candidates], the others are never chosen

    def best_at(self, price: Fraction) -> tuple[Whole, Whole, Whole]:
        """Each head's candidates with the most worth - price * units: the cheapest and the dearest, and all's losses.

        The losses against them, [heads, candidates], are times the denominator of `price`; -1 where not efficient.
        """
        score = self.worth * price.denominator - self.units * price.numerator
        score = np.where(self.efficient, score, np.iinfo(np.int64).min // 2)
        loss = score.max(1, keepdims=True) - score
        best = loss == 0
        far = np.iinfo(np.int64).max
        low = np.where(best, self.units, far).argmin(1)
        high = np.where(best, self.units, -1).argmax(1)
        return low, high, np.where(self.efficient, loss, -1)

    def total(self, chosen: Whole) -> tuple[int, int]:
        """Units and worth of an allocation."""
        row = np.arange(len(chosen))
        return int(self.units[row, chosen].sum()), int(self.worth[row, chosen].sum())

    def prices(self) -> list[Fraction]:
        """The slopes of all heads' concave hulls, falling: where the relaxation's choice changes."""
        slopes: set[tuple[int, int]] = set()
        for units, worth, kept in zip(self.units.tolist(), self.worth.tolist(), self.efficient.tolist(), strict=True):
            hull: list[tuple[int, int]] = []
            for u, w in sorted(itertools.compress(zip(units, worth, strict=True), kept)):
                while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (u - hull[-2][0]) <= (w - hull[-2][1]) * (
                    hull[-1][0] - hull[-2][0]
                ):
                    hull.pop()
                hull.append((u, w))
            for (u, w), (next_u, next_w) in itertools.pairwise(hull):
                shared = math.gcd(next_w - w, next_u - u)
                slopes.add(((next_w - w) // shared, (next_u - u) // shared))
        nearly = sorted(slopes, key=lambda slope: -slope[0] / slope[1])  # exact comparisons are dear: few are left
        return sorted((Fraction(*slope) for slope in nearly), reverse=True)


def _solve(table: _Table, limit: int) -> tuple[Whole, Fraction]:
    """The allocation with the most worth within `limit` units, and the relaxation's bound on that worth."""
    _, richest, _ = table.best_at(Fraction(0))
    units, worth = table.total(richest)
    if units <= limit:
        return richest, Fraction(worth)
    prices = table.prices()
    price = prices[bisect.bisect_left(prices, True, key=lambda p: table.total(table.best_at(p)[1])[0] >= limit)]
    low, _, loss = table.best_at(price)
    units, worth = table.total(low)
    bound = worth + price * (limit - units)
    chosen = _fill(table, low, loss, limit - units)
    gap = price.numerator * (limit - table.total(chosen)[0])  # in units of worth / denominator, as losses are
    found, gap = _improve(table, chosen, loss, price.numerator, limit, gap)
    return _first_of_equals(table, found, loss, price.numerator, limit, gap), bound


def _fill(table: _Table, low: Whole, loss: Whole, left: int) -> Whole:
    """Head by head the dearest candidate without loss that still fits: what is left then is less than one step."""
    chosen: Whole = low.copy()
    for head in np.flatnonzero((loss == 0).sum(1) > 1):
        more = table.units[head] - table.units[head, low[head]]
        more = np.where((loss[head] == 0) & (more <= left), more, -1)
        chosen[head] = more.argmax()
        left -= int(more.max())
    return chosen


@dataclass(frozen=True, slots=True, eq=False)
class _States:
    """Partial allocations as changes against a given one; units rise strictly, and worth with them."""

    units: Whole  # [states]
    worth: Whole
    loss: Whole  # against the bound: what the price says that the changes forgo

    @staticmethod
    def start() -> _States:
        zero = np.zeros(1, dtype=np.int64)
        return _States(zero, zero, zero)

    def hold(self, units: int, worth: int) -> bool:
        """Whether there is a state with exactly these."""
        place = int(np.searchsorted(self.units, units))
        return place < len(self.units) and self.units[place] == units and bool(self.worth[place] == worth)


@dataclass(frozen=True, slots=True, eq=False)
class _Changes:
    """What the candidates of one head change against its given one; the given one is among them."""

    head: int
    number: Whole  # [options], of the candidates
    units: Whole
    worth: Whole
    loss: Whole

    @property
    def least_loss(self) -> int:
        """Of a change; the given candidate itself forgoes nothing."""
        return int(np.partition(self.loss, 1)[1])

    def within(self, gap: int) -> _Changes:
        """Those that forgo no more than `gap`."""
        kept = self.loss <= gap
        return _Changes(self.head, self.number[kept], self.units[kept], self.worth[kept], self.loss[kept])


def _changes(table: _Table, chosen: Whole, loss: Whole, gap: int) -> list[_Changes]:
    """One entry for each head that has a choice within `gap`, in order of heads."""
    kept = (loss >= 0) & (loss <= gap)
    found = []
    for head in np.flatnonzero(kept.sum(1) > 1):
        number = np.flatnonzero(kept[head])
        units, worth = table.units[head], table.worth[head]
        own = chosen[head]
        found.append(
            _Changes(int(head), number, units[number] - units[own], worth[number] - worth[own], loss[head, number])
        )
    return found


def _improve(table: _Table, chosen: Whole, loss: Whole, price: int, limit: int, gap: int) -> tuple[Whole, int]:
    """The best allocation, and how much it is below the bound, from one that is `gap` below.

    Heads enter in the order in which a change costs least, so that good allocations are found early and most heads
    never enter: the core of a knapsack.
    """
    left = limit - table.total(chosen)[0]
    if gap == 0:
        return chosen, 0
    core = sorted(_changes(table, chosen, loss, gap), key=lambda each: (each.least_loss, each.head))
    states, steps = _States.start(), []
    reach = _reach(core, left, price, gap)
    for place, head in enumerate(core):
        options = head.within(gap)
        if len(options.number) == 1:  # and to change a head that follows costs no less
            break
        states, parent, option = _extend(states, options, gap, *reach[place])
        steps.append((options, parent, option))
        gap = min(gap, _below_bound(states, left, price, gap)[0])
        if gap == 0:
            break
    _, state = _below_bound(states, left, price, gap)
    best = chosen.copy()
    for options, parent, option in reversed(steps):
        best[options.head] = options.number[option[state]]
        state = int(parent[state])
    return best, gap


def _reach(core: Sequence[_Changes], left: int, price: int, gap: int) -> list[tuple[int, int]]:
    """For each head, the fewest and the most units of a state up to it from which those that follow still get within
    `gap` of the bound.
    """
    down, up, reach = 0, 0, []
    for each in reversed(core):
        reach.append((left - gap // price - up, left - down))
        down, up = down + int(each.units.min()), up + int(each.units.max())
    return reach[::-1]


def _extend(states: _States, options: _Changes, gap: int, fewest: int, most: int) -> tuple[_States, Whole, Whole]:
    """Every state with every option, without those that cannot win; and where each came from: (state, option)."""
    count = len(options.number)
    units = (states.units[None] + options.units[:, None]).ravel()
    worth = (states.worth[None] + options.worth[:, None]).ravel()
    loss = (states.loss[None] + options.loss[:, None]).ravel()
    place = np.flatnonzero((loss <= gap) & (units >= fewest) & (units <= most))
    units, worth, loss = units[place], worth[place], loss[place]
    order = np.lexsort((-worth, units))
    units, worth, loss, place = units[order], worth[order], loss[order], place[order]
    better = np.concatenate([[True], worth[1:] > np.maximum.accumulate(worth)[:-1]])
    place = place[better]
    option, parent = np.divmod(place, len(states.units))
    narrow = np.uint16 if count <= 1 << 16 else np.int64
    return _States(units[better], worth[better], loss[better]), parent.astype(np.int32), option.astype(narrow)


def _below_bound(states: _States, left: int, price: int, gap: int) -> tuple[int, int]:
    """How far the best state that fits is below the bound, and which it is; of equal ones the cheapest."""
    fits = np.flatnonzero((states.units <= left) & (states.units >= left - gap // price))
    if not len(fits):
        return gap + 1, -1
    below = states.loss[fits] + price * (left - states.units[fits])
    first = int(below.argmin())
    return int(below[first]), int(fits[first])


def _first_of_equals(table: _Table, best: Whole, loss: Whole, price: int, limit: int, gap: int) -> Whole:
    """Of the allocations with the worth and the units of `best`: the lowest candidates, the first heads first.

    The dynamic programme again, last head first, with all its states kept: then the first head chooses the lowest
    candidate that some state of the others completes, and so on. `best` itself where the states would be too many.
    """
    left = limit - table.total(best)[0]
    core = _changes(table, best, loss, gap)
    stages, kept = [_States.start()], 1
    for head, window in zip(reversed(core), _reach(core[::-1], left, price, gap), strict=True):
        states, _, _ = _extend(stages[-1], head, gap, *window)
        stages.append(states)
        kept += len(states.units)
        if kept > _MOST_TIED_STATES:
            return best
    first: Whole = best.copy()
    units = worth = 0  # what the heads that are still to choose must come to
    for head, states in zip(core, reversed(stages[:-1]), strict=True):
        options = zip(head.number.tolist(), head.units.tolist(), head.worth.tolist(), strict=True)
        number, own_units, own_worth = next(
            option for option in options if states.hold(units - option[1], worth - option[2])
        )
        first[head.head], units, worth = number, units - own_units, worth - own_worth
    return first
