"""The allocation of a budget over heads: judged by brute force, by a plain dynamic programme and by its bound."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparseprefill.patterns import allocation
from sparseprefill.patterns.allocation import Allocation, allocate, cheapest_reaching

Table = np.ndarray[Any, Any]


def table(rows: Any) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def units_of(cost: Table) -> Table:
    """Rounded up, but not from 700.0000000000001 to 701."""
    return np.ceil(cost * 1e4 - 1e-6).astype(np.int64)


def limit_of(budget: float, heads: int) -> int:
    return math.floor(budget * 1e4 * heads + 1e-6)


def brute_force(mass: Table, cost: Table, budget: float) -> tuple[Fraction, int, tuple[int, ...]] | None:
    """(worth, units, choice) of the best of all allocations, ties as documented; None where none is within budget."""
    heads, candidates = mass.shape
    units = units_of(cost).tolist()
    exact = [[Fraction(value) for value in row] for row in mass.tolist()]
    best = None
    for choice in itertools.product(range(candidates), repeat=heads):
        spent = sum(units[head][one] for head, one in enumerate(choice))
        if spent > limit_of(budget, heads):
            continue
        worth = sum((exact[head][one] for head, one in enumerate(choice)), Fraction(0))
        if best is None or (-worth, spent, choice) < best:
            best = (-worth, spent, choice)
    return None if best is None else (-best[0], best[1], best[2])


def relaxed(mass: Table, cost: Table, budget: float) -> float:
    """The linear relaxation by its dual: the least, over prices, of what every head gains at that price."""
    heads, candidates = mass.shape
    units = units_of(cost).tolist()
    exact = [[Fraction(value) for value in row] for row in mass.tolist()]
    prices = {Fraction(0)}
    for head in range(heads):
        for one, other in itertools.combinations(range(candidates), 2):
            if units[head][one] != units[head][other]:
                slope = (exact[head][one] - exact[head][other]) / (units[head][one] - units[head][other])
                prices.add(max(Fraction(0), slope))
    return float(
        min(
            price * limit_of(budget, heads)
            + sum(
                max(gain - price * spent for gain, spent in zip(*row, strict=True))
                for row in zip(exact, units, strict=True)
            )
            for price in prices
        )
        / heads
    )


def check(mass: Table, cost: Table, budget: float) -> Allocation | None:
    """Against all that must hold of one small case."""
    best = brute_force(mass, cost, budget)
    heads = len(mass)
    if best is None:
        with pytest.raises(ValueError, match="is below the mean cost of the heads' cheapest candidates"):
            allocate(torch.from_numpy(mass), torch.from_numpy(cost), budget)
        return None
    worth, units, choice = best
    found = allocate(torch.from_numpy(mass), torch.from_numpy(cost), budget)
    assert found.chosen.dtype == torch.int64
    chosen = found.chosen.numpy()
    assert abs(found.mass - float(worth) / heads) <= 1e-12
    assert math.isclose(found.mass, float(mass[np.arange(heads), chosen].mean()), abs_tol=1e-12)
    assert math.isclose(found.cost, float(cost[np.arange(heads), chosen].mean()), abs_tol=1e-12)
    assert units_of(cost)[np.arange(heads), chosen].sum() == units
    assert found.cost <= budget + 1e-9
    assert found.gap >= 0
    assert math.isclose(found.bound, relaxed(mass, cost, budget), abs_tol=1e-12)
    assert tuple(chosen.tolist()) == choice
    return found


def random_case(draw: np.random.Generator, most_heads: int) -> tuple[Table, Table, float]:
    """Three kinds: no ties, ties everywhere, and costs that are worth what they cost."""
    shape = (draw.integers(1, most_heads + 1), draw.integers(1, 5))
    budget = float(draw.choice([draw.uniform(0.01, 1), draw.integers(1, 11) / 10]))
    kind = draw.integers(3)
    if kind == 0:
        return draw.random(shape), draw.random(shape), budget
    if kind == 1:
        return draw.integers(0, 9, shape) / 8, draw.integers(0, 12, shape) / 10, budget
    cost = draw.integers(0, 128, shape) / 128
    return cost + draw.integers(0, 2, shape) / 64, cost, budget


def test_brute_force_agrees_on_many_small_cases() -> None:
    draw = np.random.default_rng(0)
    served = sum(check(*random_case(draw, 4)) is not None for _ in range(2000))
    served += sum(check(*random_case(draw, 6)) is not None for _ in range(60))
    assert served > 1200


@given(st.data())
def test_brute_force_agrees(data: st.DataObject) -> None:
    heads, candidates = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    # numbers that a mean over few rows and rounded costs have: many are equal, none are smaller than 2**-20
    value = st.one_of(st.integers(0, 8).map(lambda n: n / 8), st.floats(0, 1, width=16))
    table = st.lists(st.lists(value, min_size=candidates, max_size=candidates), min_size=heads, max_size=heads)
    check(np.array(data.draw(table)), np.array(data.draw(table)), data.draw(st.floats(0.001, 1)))


def curves(draw: np.random.Generator, heads: int, candidates: int) -> tuple[Table, Table]:
    """Masses that saturate with cost, differently for each head; the last candidate is dense."""
    cost = np.linspace(0.02, 1.0, candidates) * np.ones((heads, 1))
    cost[:, 1:-1] += 0.02 * draw.random((heads, candidates - 2)) * (np.arange(1, candidates - 1) % 3 == 1)
    mass = 1 - np.exp(-draw.lognormal(2, 1.2, (heads, 1)) * cost) * draw.uniform(0.7, 1, cost.shape)
    mass[:, -1] = 1.0
    return mass, cost


def plain_programme(mass: Table, cost: Table, budget: float) -> float:
    """The best mean mass by the textbook: one number for every cost that can be spent."""
    heads = len(mass)
    best = np.full(limit_of(budget, heads) + 1, -np.inf)
    best[0] = 0.0
    for gains, units in zip(mass, units_of(cost), strict=True):
        after = np.full_like(best, -np.inf)
        for gain, spent in zip(gains, units, strict=True):
            if spent < len(best):
                after[spent:] = np.maximum(after[spent:], best[: len(best) - spent] + gain)
        best = after
    return float(best.max() / heads)


@pytest.mark.parametrize("budget", [0.05, 0.2, 0.6])
@pytest.mark.parametrize("kind", ["curves", "random", "worth its cost"])
def test_a_plain_dynamic_programme_agrees(kind: str, budget: float) -> None:
    draw = np.random.default_rng(3)
    mass, cost = curves(draw, 48, 12)
    if kind == "random":
        mass, cost = draw.random((48, 12)), draw.random((48, 12))
        cost[:, 0] = 0.01
    if kind == "worth its cost":
        mass = cost + 1e-3 * draw.random(cost.shape)
    found = allocate(torch.from_numpy(mass), torch.from_numpy(cost), budget)
    assert abs(found.mass - plain_programme(mass, cost, budget)) <= 1e-12
    assert 0 <= found.gap < 0.01
    assert found.cost <= budget


def test_more_budget_never_keeps_less_and_all_of_it_keeps_everything() -> None:
    mass, cost = (torch.from_numpy(table) for table in curves(np.random.default_rng(4), 64, 20))
    found = [allocate(mass, cost, budget) for budget in np.linspace(0.021, 1, 60)]
    assert all(one.mass <= other.mass + 1e-12 for one, other in itertools.pairwise(found))
    assert math.isclose(found[-1].mass, 1.0, abs_tol=1e-12)
    assert found[-1].gap < 1e-12
    assert found[-1].cost < 1.0, "a candidate that keeps all to within rounding is not paid for twice"


def test_a_model_of_a_thousand_heads_is_within_a_hair_of_the_bound() -> None:
    mass, cost = curves(np.random.default_rng(5), 1024, 45)
    found = allocate(torch.from_numpy(mass), torch.from_numpy(cost), 0.2)
    assert found.gap < 1e-5
    assert 0.1999 < found.cost <= 0.2
    again = allocate(torch.from_numpy(mass), torch.from_numpy(cost), 0.2)
    assert torch.equal(found.chosen, again.chosen)


def test_heads_in_another_order_keep_the_same() -> None:
    draw = np.random.default_rng(6)
    mass, cost = curves(draw, 96, 15)
    order = draw.permutation(96)
    one, other = (
        allocate(torch.from_numpy(mass[rows]), torch.from_numpy(cost[rows]), 0.3) for rows in (range(96), order)
    )
    assert one.mass == other.mass
    assert torch.equal(one.chosen[torch.from_numpy(order)], other.chosen)


@pytest.mark.parametrize("most", [1 << 22, 10])
def test_equal_heads(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two candidates and money for half of the heads: the last ones get it. Where states are too many: any, no less."""
    monkeypatch.setattr(allocation, "_MOST_TIED_STATES", most)
    mass, cost = table([[0.5, 1.0]] * 40), table([[0.1, 0.3]] * 40)
    found = allocate(mass, cost, 0.2)
    assert found.mass == 0.75
    assert found.gap == 0.0
    assert int(found.chosen.sum()) == 20
    if most > 10:
        assert found.chosen.tolist() == [0] * 20 + [1] * 20


def test_what_is_cheaper_before_rounding_is_preferred() -> None:
    cost = table([[0.10009, 0.10001, 0.10001]])
    assert allocate(torch.ones_like(cost), cost, 0.5).chosen.tolist() == [1]


def test_a_rounded_product_costs_no_unit_more() -> None:
    assert 0.07 * 1e4 > 700
    assert allocate(table([[0.1, 1.0]]), table([[0.01, 0.07]]), 0.07).chosen.tolist() == [1]


def test_the_message_says_how_much_is_needed() -> None:
    mass, cost = curves(np.random.default_rng(7), 10, 5)
    cost += 0.0333
    with pytest.raises(ValueError, match=r"give at least 0\.0533"):
        allocate(torch.from_numpy(mass), torch.from_numpy(cost), 0.05)
    assert allocate(torch.from_numpy(mass), torch.from_numpy(cost), 0.0533).cost <= 0.0533


GOOD = table([[0.5, 1.0], [0.6, 1.0]])


@pytest.mark.parametrize(
    ("mass", "cost", "budget", "message"),
    [
        (GOOD, GOOD, 0.0, r"budget must be in \(0, 1\]"),
        (GOOD, GOOD, 1.5, r"budget must be in \(0, 1\]"),
        (GOOD, GOOD, math.nan, r"budget must be in \(0, 1\]"),
        (GOOD, GOOD[:, :1], 0.5, "one shape"),
        (GOOD[0], GOOD[0], 0.5, r"\[heads, candidates\]"),
        (GOOD[:0], GOOD[:0], 0.5, "at least one of each"),
        (GOOD * math.nan, GOOD, 0.5, "mass must be finite: head 0, candidate 0"),
        (GOOD, GOOD * math.inf, 0.5, "cost must be finite"),
        (GOOD, GOOD.float(), 0.5, "cost must be float64, got float32"),
        (GOOD, -GOOD, 0.5, "cost is in dense attention"),
        (GOOD, GOOD * 1000, 0.5, "cost is in dense attention"),
        (GOOD, GOOD, 0.5, "give at least 0.5500"),
    ],
)
def test_refusals(mass: torch.Tensor, cost: torch.Tensor, budget: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocate(mass, cost, budget)


@given(st.data())
def test_the_cheapest_that_reaches_a_target(data: st.DataObject) -> None:
    heads, candidates = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    value = st.integers(0, 8).map(lambda n: n / 8)
    rows = st.lists(st.lists(value, min_size=candidates, max_size=candidates), min_size=heads, max_size=heads)
    mass, cost = data.draw(rows), data.draw(rows)
    target, dense = data.draw(st.integers(1, 8)) / 8, data.draw(st.integers(0, candidates - 1))
    chosen = cheapest_reaching(table(mass), table(cost), target, dense)
    for head, one in enumerate(chosen.tolist()):
        ranked = sorted((cost[head][n], -mass[head][n], n) for n in range(candidates) if mass[head][n] >= target)
        assert one == (ranked[0][2] if ranked else dense)


@pytest.mark.parametrize(
    ("target", "dense", "message"),
    [(0.0, 1, "target"), (1.01, 1, "target"), (math.nan, 1, "target"), (0.5, 2, "dense must be"), (0.5, -1, "dense")],
)
def test_targets_that_are_none(target: float, dense: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cheapest_reaching(GOOD, GOOD, target, dense)
