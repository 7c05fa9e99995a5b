"""Profiles beside each other: what differs between two, and what is made of several."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profile_cases import drawn_profile

from sparseprefill.patterns import (
    AShape,
    BlockSparse,
    Dense,
    HeadScore,
    ModelPatterns,
    RandomBlocks,
    VerticalSlash,
    load_patterns,
    save_patterns,
)
from sparseprefill.patterns.profiles import difference, label_of, merge, same_prompts, type_of

SEEDS = st.integers(0, 10_000)


def with_head(profile: ModelPatterns, layer: int, head: int, **changes: Any) -> ModelPatterns:
    """With another pattern or score of one head."""
    found = {}
    for name, value in changes.items():
        rows = [list(row) for row in getattr(profile, name)]
        rows[layer][head] = value
        found[name] = tuple(map(tuple, rows))
    return replace(profile, **found)


def test_labels_say_type_and_every_option() -> None:
    assert label_of(AShape(64, 128)) == "a_shape:sink=64,window=128"
    assert label_of(VerticalSlash(density=0.2)) == "vertical_slash:density=0.2,probe=64"
    assert label_of(Dense()) == "dense"
    assert type_of(RandomBlocks()) == "random"

    class Own:
        def build_index(self, inputs: Any, grid: Any) -> Any: ...

    assert type_of(Own()) == label_of(Own()) == "Own"


@given(SEEDS)
@settings(max_examples=20)
def test_a_profile_does_not_differ_from_itself(seed: int) -> None:
    profile = drawn_profile(2, 3, seed)
    same = difference(profile, replace(profile, made=dict(profile.made)))
    assert not same
    assert str(same) == "the profiles are the same"
    assert same.to_dict()["heads"] == []
    json.dumps(same.to_dict())


@given(SEEDS, SEEDS)
@settings(max_examples=30)
def test_differences_are_those_of_a_slow_look(one: int, two: int) -> None:
    a, b = drawn_profile(2, 3, one), replace(drawn_profile(2, 3, two), model=drawn_profile(2, 3, one).model)
    found = difference(a, b)
    assert bool(found) == (a != b)
    places = [(layer, head) for layer in range(2) for head in range(3)]
    other = [(x, y) for x, y in places if a.layers[x][y] != b.layers[x][y]]
    assert [(each.layer, each.head) for each in found.heads if each.other_pattern] == other
    assert found.other_patterns == len(other)
    assert found.model == ()
    text = str(found)
    for x, y in other:
        change = f"layer {x}, head {y}: {label_of(a.layers[x][y])} -> {label_of(b.layers[x][y])}; density "
        assert change in text
    if other:
        mean = sum(b.held_out[x][y].mass - a.held_out[x][y].mass for x, y in other) / len(other)  # type: ignore[union-attr]
        assert f"kept mass {mean:+.3f}" in found.summary()
    told = json.loads(json.dumps(found.to_dict()))
    assert len(told["heads"]) == len(found.heads)
    for entry, each in zip(told["heads"], found.heads, strict=True):
        assert entry["second"]["pattern"] == each.patterns[1]
        assert each.held_out[0] is not None
        assert entry["first"]["held_out"]["mass"] == each.held_out[0].mass


def test_a_head_is_told_with_its_change() -> None:
    scores = ((HeadScore(0.97, 0.9, 0.12, 0.13),) * 2,)
    a = ModelPatterns(((Dense(), AShape(64, 128)),), {"layers": 1}, tuning=scores, held_out=scores)
    b = with_head(a, 0, 1, layers=BlockSparse(0.2), held_out=HeadScore(0.9704, 0.9, 0.2, 0.3))
    assert str(difference(a, b)).splitlines() == [
        "layer 0, head 1: a_shape:sink=64,window=128 -> block_sparse:keep=0.2,sink=64,local=128; "
        "density 0.12 -> 0.20, kept mass 0.9700 -> 0.9704 (held-out prompts)",
        "1 of 2 heads have another pattern; those with scores change on average by density +0.080, kept mass +0.000",
    ]
    unheld = difference(replace(a, held_out=()), b)
    assert "density 0.12 -> 0.12, kept mass 0.97 -> 0.97 (tuning prompts)" in str(unheld)
    assert "no scores to compare" in str(difference(replace(a, held_out=(), tuning=()), b))
    rescored = difference(a, with_head(a, 0, 0, held_out=HeadScore(0.5, 0.4, 0.12, 0.13)))
    assert "layer 0, head 0: dense in both; density 0.12 -> 0.12, kept mass 0.97 -> 0.50" in str(rescored)
    assert rescored.summary() == "0 of 2 heads have another pattern, 1 the same pattern and other scores"


def test_a_share_of_all_is_not_one_token() -> None:
    """The two are equal in Python, and mean everything and nothing."""
    a, b = ModelPatterns(((AShape(64, 1),),)), ModelPatterns(((AShape(64, 1.0),),))
    assert a == b
    assert difference(a, b).other_patterns == 1


def test_other_models_weights_and_ways_are_told() -> None:
    a = drawn_profile(2, 3, 1)
    b = replace(a, model={**a.model, "head_dim": 64, "extra": "\x1b[31m\n"}, weights=None, made={"seed": 2, "k\n": 1})
    found = difference(a, b)
    assert found.model == ("head_dim", "extra")
    assert found.hard_keys == ("head_dim",)
    assert found.made == ("seed", "prompts_digest", "k\n")
    lines = str(found).splitlines()
    assert lines[0] == "model: head_dim: 32 -> 64"
    assert lines[1] == r"model: extra: nothing -> '\x1b[31m\n'"
    assert "made: seed: 1 -> 2" in lines
    assert "weights: 0a1b -> not known" in lines
    assert str(found).isprintable() is False
    assert "".join(lines).isprintable(), "nothing in a file reaches the terminal as it is"
    assert found.to_dict()["model"] == {"head_dim": {"first": 32, "second": 64}, "extra": {"second": "\x1b[31m\n"}}
    assert found.to_dict()["weights"] == {"first": "0a1b", "second": None}


def test_profiles_of_other_shapes_are_compared_as_far_as_they_go() -> None:
    a, b = drawn_profile(2, 3, 1), drawn_profile(3, 2, 1)
    found = difference(a, b)
    assert found.shape
    assert "heads: 2 layers of 3 -> 3 layers of 2" in str(found)
    assert all(each.layer < 2 and each.head < 2 for each in found.heads)
    assert " of 4 heads have another pattern" in found.summary()
    assert found.to_dict()["heads_by_layer"] == {"first": [3, 3], "second": [2, 2, 2]}


@given(st.lists(SEEDS, min_size=2, max_size=4), st.sampled_from(["mass", "density"]))
@settings(max_examples=40)
def test_merging_takes_the_best_of_each_head(seeds: list[int], keep: Any) -> None:
    profiles = [drawn_profile(2, 3, seed) for seed in seeds]
    merged = merge(profiles, keep)
    for layer in range(2):
        for head in range(3):
            found = [profile.held_out[layer][head] for profile in profiles]
            own = [profile.layers[layer][head] for profile in profiles]
            values = [s.mass if keep == "mass" else -s.density for s in found]  # type: ignore[union-attr]
            best = values.index(max(values)) if len(set(map(label_of, own))) > 1 else 0
            assert merged.layers[layer][head] == own[best]
            assert merged.held_out[layer][head] == found[best]
            assert merged.tuning[layer][head] == profiles[best].tuning[layer][head]
    assert merged.model == profiles[0].model
    assert merged.weights == "0a1b"
    assert merged.made == {"merged": [profile.made for profile in profiles], "keep": keep}
    assert merge([*profiles, profiles[0]], keep).layers == merged.layers, "asking one twice changes nothing"
    assert merge([merge(profiles[:1] * 2, keep), *profiles[1:]], keep).layers == merged.layers


def test_profiles_of_other_tiles_are_not_merged() -> None:
    """What a pattern keeps is said of one size of tiles; which one stays known."""
    score = ((HeadScore(0.9, 0.8, 0.2, 0.3),),)
    small, large, unknown = (ModelPatterns(((AShape(64, 128),),), held_out=score, made=made)
                             for made in ({"block": 32}, {"block": 64}, {}))  # fmt: skip
    with pytest.raises(ValueError, match="profiles 1 and 3 were made with tiles of 32 and 64"):
        merge([small, unknown, large])
    assert merge([unknown, small, small]).made["block"] == 32
    assert "block" not in merge([unknown, unknown]).made


def test_ties_go_to_the_first() -> None:
    score = ((HeadScore(0.9, 0.8, 0.2, 0.3),),)
    a, b = (ModelPatterns(((pattern,),), held_out=score) for pattern in (AShape(64, 128), BlockSparse(0.2)))
    for keep in ("mass", "density"):
        assert merge([a, b], keep).layers == a.layers  # type: ignore[arg-type]
        assert merge([b, a], keep).layers == b.layers  # type: ignore[arg-type]


def test_profiles_that_agree_need_no_scores() -> None:
    a = ModelPatterns(((Dense(), AShape(64, 128)),) * 2)
    merged = merge([a, a])
    assert merged == a, "and what was written by hand stays so"
    scored = replace(a, held_out=((None, HeadScore(1, 1, 1, 1)),) * 2)
    assert merge([scored, a]) == scored


def test_unknown_weights_are_those_that_are_known(tmp_path: Path) -> None:
    a, b = drawn_profile(2, 3, 1), replace(drawn_profile(2, 3, 2), weights=None)
    assert merge([b, a]).weights == "0a1b"
    merged = merge([merge([a, b]), b])
    save_patterns(merged, tmp_path / "merged.json")
    assert load_patterns(tmp_path / "merged.json") == merged
    assert same_prompts([a, b]) is True
    assert same_prompts([a, replace(b, made={"prompts_digest": "d2"})]) is False
    assert same_prompts([a, replace(b, made={})]) is None


A = drawn_profile(2, 3, 1)
B = with_head(A, 1, 2, layers=BlockSparse(0.31))


@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        ([A], "merging takes two profiles or more, got 1"),
        ([], "two profiles or more, got 0"),
        ([A, B, replace(A, weights="ff")], "profiles 1 and 3 are of different weights: '0a1b' and 'ff'"),
        (
            [A, replace(A, model={**A.model, "rope": {"rope_type": "yarn"}})],
            "profiles 1 and 2 are of different models: rope is {'rope_type': 'default'} and {'rope_type': 'yarn'}",
        ),
        (
            [A, replace(A, model={k: v for k, v in A.model.items() if k != "vocabulary"})],
            "of different models: vocabulary is 99 and nothing",
        ),
        ([A, replace(drawn_profile(3, 3, 1), model=A.model)], "profiles 1 and 2 have 2 and 3 layers"),
        ([A, replace(drawn_profile(2, 4, 1), model=A.model)], "profiles 1 and 2 have 3 and 4 heads in layer 0"),
        (
            [A, with_head(B, 1, 2, held_out=None)],
            r"layer 1, head 2: profile 2 \(block_sparse:keep=0.31,sink=64,local=128\) has no score on held-out prompts",
        ),
        ([replace(A, held_out=()), B], "layer 1, head 2: profile 1 .* has no score on held-out prompts"),
    ],
)
def test_what_cannot_be_merged_is_refused(profiles: list[ModelPatterns], message: str) -> None:
    message = message.replace("{", r"\{").replace("}", r"\}")
    with pytest.raises(ValueError, match=message):
        merge(profiles)


def test_another_way_to_keep_is_refused() -> None:
    with pytest.raises(ValueError, match="keep must be mass or density, got 'work'"):
        merge([A, B], "work")  # type: ignore[arg-type]
