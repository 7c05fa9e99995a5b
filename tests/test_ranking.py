"""Ranks on curves made by hand: every number here was counted on paper."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from sparseprefill.evals.curves import Curve, SelectorTime
from sparseprefill.evals.ranking import Place, Standing, places, standings
from sparseprefill.evals.selector_result import SelectorResult
from sparseprefill.evals.selectors import method_selectors
from sparseprefill.evals.selectors_figures import (
    _styles,
    draw_selectors,
    draw_totals,
    kind_picture,
    kinds_of,
    pareto_front,
    write_selectors,
)


def curve(group: str, family: str, points: dict[float, float], **fields: Any) -> Curve:
    """Density: kept mass; no work but that of the tiles, and errors that are what is not kept."""
    density, mass = tuple(points), tuple(points.values())
    made = Curve(
        group, (64, 64), family, density, density, mass, mass, (0.0,) * len(mass), work=density,
        error=tuple(1 - each for each in mass),
    )  # fmt: skip
    return dataclasses.replace(made, **fields)


# at 0.1 and 0.2
ONE = [
    curve("one", "a", {0.1: 0.5, 0.2: 0.6}),
    curve("one", "b", {0.1: 0.7, 0.2: 0.6}),
    curve("one", "c", {0.2: 0.8, 0.3: 0.9}),  # cannot be at 0.1
    curve("one", "random", {0.1: 0.6, 0.2: 0.6}, kind="static"),
    curve("one", "dense", {1.0: 1.0}, kind="static"),
]
TWO = [
    curve("two", "a", {0.1: 0.30001, 0.2: 0.9}),
    curve("two", "b", {0.1: 0.30004, 0.2: 0.3}),  # the same to three digits at 0.1
    curve("two", "c", {0.1: 0.2, 0.2: 0.95}),
    curve("two", "dense", {1.0: 1.0}, kind="static"),
]


def test_ranks_in_a_cell() -> None:
    assert places(ONE, 0.1) == {
        "a": Place(2, 0.5), "b": Place(1, 0.7), "c": Place(3, None), "random": Place(2, 0.6),
        "dense": Place(None, None),
    }  # fmt: skip
    ranks = {family: place.rank for family, place in places(ONE, 0.2).items()}
    assert ranks == {"a": 2, "b": 2, "c": 1, "random": 2, "dense": None}, "ties share, and a control moves nobody"
    assert {family: place.rank for family, place in places(TWO, 0.1).items()} == {"a": 1, "b": 1, "c": 3, "dense": None}


def test_those_that_cannot_be_so_sparse_are_all_last() -> None:
    some = [curve("g", name, {0.2: 0.5}) for name in "abc"] + [curve("g", "d", {0.1: 0.2})]
    assert {name: place.rank for name, place in places(some, 0.1).items()} == {"a": 4, "b": 4, "c": 4, "d": 1}
    assert places(some, 0.05) == {}, "where none can be, nothing is compared"
    assert places([curve("g", "random", {0.1: 0.5}, kind="static")], 0.1) == {}, "nor where only controls are"


def test_the_best_worst_rank_stands_first() -> None:
    """Ranks at one/0.1, one/0.2, two/0.1, two/0.2: a 2 2 1 2, b 1 2 1 3, c 3 1 3 1."""
    found = standings([*ONE, *TWO], (0.1, 0.2))
    assert [each.family for each in found] == ["a", "b", "c", "random", "dense"]
    assert [each.worst for each in found] == [2, 3, 3, 2, None]
    assert [each.mean_rank for each in found] == [1.75, 1.75, 2.0, 2.0, None]
    assert [(each.compared, each.unreached) for each in found] == [(4, 0), (4, 0), (4, 1), (2, 0), (4, 4)]
    assert [each.mean for each in found] == [
        pytest.approx((0.5 + 0.6 + 0.30001 + 0.9) / 4), pytest.approx((0.7 + 0.6 + 0.30004 + 0.3) / 4),
        pytest.approx((0.8 + 0.2 + 0.95) / 3), pytest.approx(0.6), None,
    ]  # fmt: skip
    assert found[2].shared == pytest.approx((0.8 + 0.2 + 0.95) / 3), "c itself cannot be at one/0.1"
    assert found[0].shared == pytest.approx((0.6 + 0.30001 + 0.9) / 3)
    assert found[4].shared is None


def test_ties_of_the_worst_rank_go_by_the_mean_and_then_by_name() -> None:
    some = [
        curve("g", "b", {0.1: 0.5, 0.2: 0.6, 0.3: 0.6}), curve("g", "a", {0.1: 0.5, 0.2: 0.6, 0.3: 0.6}),
        curve("g", "c", {0.1: 0.6, 0.2: 0.5, 0.3: 0.5}), curve("g", "d", {0.1: 0.55, 0.2: 0.55, 0.3: 0.9}),
    ]  # fmt: skip
    # a and b: 3 1 2; c: 1 4 4; d: 2 3 1
    found = standings(some, (0.1, 0.2, 0.3))
    assert [(each.family, each.worst, each.mean_rank) for each in found] == [
        ("a", 3, 2.0), ("b", 3, 2.0), ("d", 3, 2.0), ("c", 4, 3.0)
    ]  # fmt: skip


def test_a_method_is_compared_where_it_is() -> None:
    """One that a tile or group leaves out has fewer cells, and no rank in the others."""
    found = standings([*ONE, *(each for each in TWO if each.family != "c")], (0.1, 0.2))
    assert found[0] == Standing("a", False, 2, 1.5, pytest.approx(2.30001 / 4), pytest.approx(1.80001 / 3), 4, 0)  # type: ignore[arg-type]
    (third,) = [each for each in found if each.family == "c"]
    assert (third.compared, third.unreached, third.worst, third.mean_rank) == (2, 1, 3, 2.0)


def test_errors_rank_the_other_way_and_work_by_its_own_axis() -> None:
    assert {name: each.rank for name, each in places(ONE, 0.1, "error").items()} == {
        "a": 2, "b": 1, "c": 3, "random": 2, "dense": None
    }  # fmt: skip
    dearer = [dataclasses.replace(each, work=tuple(x + 0.1 for x in each.density), estimator=(0.1,) * len(each.mass))
              if each.family == "b" else each for each in ONE]  # fmt: skip
    assert {name: each.rank for name, each in places(dearer, 0.1, axis="work").items()} == {
        "a": 1, "b": 3, "c": 3, "random": 1, "dense": None
    }  # fmt: skip
    assert {name: each.rank for name, each in places(dearer, 0.2, axis="work").items()}["b"] == 2


def test_the_tables_say_ranks_controls_and_what_cannot_be_so_sparse() -> None:
    text = SelectorResult((*ONE, *TWO)).text((0.1, 0.2), (0.5,))
    rows = {line.split("  ")[0]: line.split() for line in text.partition("ranks at")[2].split("\n")}
    head = text.partition("ranks at densities of 0.1, 0.2")[2].split("\n")[2]
    assert re.split(r"  +", head) == ["group", "a", "b", "c", "random +", "dense +"]
    assert rows["one"] == ["one", "2", "2", "1", "2", "3*", "1", "2", "2", "-", "-"]
    assert rows["two"] == ["two", "1", "2", "1", "3", "3", "1", "-", "-", "-", "-"]
    assert "ranking at equal work, finding the blocks included (0.5), tiles of 64 x 64, all groups" in text
    assert "groups of models" not in text
    made_up = [dataclasses.replace(each, group="planted: x") for each in TWO]
    assert "the groups of models alone" in SelectorResult((*ONE, *made_up)).text()
    old = tuple(dataclasses.replace(each, work=None) for each in ONE)
    assert "ranking" not in SelectorResult(old).text(), "an old file has no work to rank by"


# The picture


def test_the_front_is_what_no_cheaper_setting_is_as_good_as() -> None:
    some = [
        curve("g", "a", {0.1: 0.5, 0.2: 0.6, 0.4: 0.7}), curve("g", "b", {0.1: 0.4, 0.3: 0.8}),
        curve("g", "a, per head", {0.05: 0.99}), curve("g", "random", {0.02: 0.1}, kind="static"),
    ]  # fmt: skip
    assert pareto_front(some) == [(0.02, 0.1), (0.1, 0.5), (0.2, 0.6), (0.3, 0.8)]
    assert pareto_front(some, "error") == [(x, pytest.approx(1 - y)) for x, y in pareto_front(some)]


def test_fourteen_methods_look_unlike_one_another() -> None:
    names = ["vertical_slash", "block_sparse", "sale", *(f"method {n}" for n in range(11))]
    some = [curve(group, name, {0.1: 0.4, 0.5: 0.8}) for group in ("g", "h", "i", "j") for name in names]
    some += [curve("g", "random", {0.1: 0.3, 0.5: 0.7}, kind="static")]
    styles = _styles(some)
    assert len({str(style["color"]) for style in styles.values()}) == 15
    assert len({style["marker"] for style in styles.values()}) == 15
    assert styles["random"]["ls"] not in [styles[name]["ls"] for name in names]
    figure = draw_selectors(SelectorResult(tuple(some)))
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == 8, "four groups, by density and by work"
    assert {axes.get_title() for axes in panels} == {"g", "h", "i", "j", ""}
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 16


def test_each_kind_has_a_picture_of_its_own(tmp_path: Path) -> None:
    some = [curve("g", "block_sparse", {0.1: 0.4, 0.5: 0.8}), curve("g", "sale", {0.1: 0.5, 0.5: 0.7}),
            curve("g", "random", {0.1: 0.3, 0.5: 0.7}, kind="static"),
            curve("g", "skip", {0.3: 0.9}, kind="kernel option")]  # fmt: skip
    result = SelectorResult(tuple(some))
    assert kinds_of(result) == ["selector", "static", "kernel option"]
    path = tmp_path / "all.png"
    names = ["all.png", "all_selector.png", "all_static.png", "all_kernel_option.png"]
    assert [each.name for each in write_selectors(result, path, ["g"], by_kind=True)] == names
    assert all((tmp_path / name).stat().st_size > 1000 for name in names)
    assert write_selectors(result, path, ["g"]) == [path]
    assert kind_picture(path, "wrapper").name == "all_wrapper.png"
    (legend,) = draw_selectors(result, ["g"], "static").legends
    assert "random" in [text.get_text() for text in legend.get_texts()]
    assert "sale" not in [text.get_text() for text in legend.get_texts()]
    with pytest.raises(ValueError, match="there is no curve of kind 'wrapper'"):
        draw_selectors(result, ["g"], "wrapper")


def test_a_wrapper_is_drawn_beside_what_it_goes_around_and_ranks_as_a_control() -> None:
    names = ["block_sparse", "sale", "cached", "pbs"]
    some = [curve("g", name, {0.1: 0.3 + 0.1 * n, 0.5: 0.8}) for n, name in enumerate(names)]
    some[2] = dataclasses.replace(some[2], kind="wrapper", repeats="block_sparse")
    some[3] = dataclasses.replace(some[3], kind="wrapper")
    (legend,) = draw_selectors(SelectorResult(tuple(some)), ["g"], "wrapper").legends
    assert {text.get_text() for text in legend.get_texts()} == {"Pareto front", "block_sparse", "cached", "pbs"}
    assert [each.control for each in some] == [False, False, True, False]
    chosen = method_selectors(["cached", "cached:inner=stem", "pbs", "skip_softmax", "block_sparse"])
    assert {each.family: each.repeats for each in chosen} == {
        "cached": "block_sparse", "cached:inner=stem": "stem", "pbs": None, "skip_softmax": None, "block_sparse": None,
    }  # fmt: skip


def test_total_times_have_a_picture(tmp_path: Path) -> None:
    def timed(family: str, density: float, find: float, attend: float) -> SelectorTime:
        return SelectorTime("g", (64, 64), family, density, density, find, attend, 1.0, 1.1)

    times = (timed("sale", 0.1, 1.6, 0.2), timed("sale", 0.22, 1.6, 0.4), timed("block_sparse", 0.19, 0.01, 0.3),
             timed("block_sparse", 0.4, 0.01, 0.6))  # fmt: skip
    curves = (curve("g", "block_sparse", {0.1: 0.4, 0.28: 0.6}),)
    result = SelectorResult(curves, times=times)
    (axes,) = draw_totals(result).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["block_sparse", "sale"]
    assert [text.get_text() for text in axes.texts] == ["density 0.19, keeps 0.50", "density 0.22"]
    assert [round(bar.get_width(), 3) for bar in axes.patches] == [0.01, 1.6, 0.3, 0.4]
    names = [each.name for each in write_selectors(result, tmp_path / "all.png", ["g"])]
    assert names == ["all.png", "all_totals.png"]
    assert (tmp_path / "all_totals.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="nothing was timed"):
        draw_totals(SelectorResult(curves))
