"""MInference's configuration files: what is mapped, what is said, and that a damaged one is never guessed at."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparseprefill.contracts import BlockGrid
from sparseprefill.patterns import (
    AShape,
    BlockSparse,
    Dense,
    ModelPatterns,
    VerticalSlash,
    load_patterns,
    save_patterns,
)
from sparseprefill.patterns.minference_config import read_minference
from support import make_inputs

VS = "vertical_and_slash"
# what the published files hold, and the two other types that MInference reads
WHOLE: list[dict[str, Any]] = [
    {"0": [VS, 1000, 6096, 0.33], "1": [VS, 30, 800, 0.99], "2": [VS, 3500, 100, 336379.0], "3": [VS, 500, 700, 1]},
    {"0": ["stream_llm", 100, 800, 0.96], "1": ["block_sparse", 8, 1, 0.5], "2": [VS, 100, 750, 0], "3": [VS, 9, 9, 1]},
]


def write(path: Path, data: Any) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "best_pattern.json", WHOLE)


def damaged(*changes: tuple[int, str, Any]) -> list[dict[str, Any]]:
    """`WHOLE` with other entries; an Ellipsis takes one away."""
    data = copy.deepcopy(WHOLE)
    for layer, head, entry in changes:
        data[layer][head] = entry
        if entry is ...:
            del data[layer][head]
    return data


def about(notes: list[str], *words: str) -> str:
    """The one note that has these words."""
    (found,) = [note for note in notes if all(word in note for word in words)]
    return found


# ---- mapping


def test_every_type_is_mapped_and_what_changes_is_said_once(file: Path) -> None:
    patterns, notes = read_minference(file, query_heads=4, layers=2)
    assert patterns == [
        [VerticalSlash(1000, 6096), VerticalSlash(30, 800), VerticalSlash(3500, 100), VerticalSlash(500, 700)],
        [AShape(100, 800), BlockSparse(keep=6400, sink=0, local=0), VerticalSlash(100, 750), VerticalSlash(30, 50)],
    ]
    assert "single tokens" in about(notes, "vertical_and_slash:")
    assert "whole" in about(notes, "stream_llm:")
    assert "100 blocks of 64" in about(notes, "block_sparse:")
    assert about(notes, "30 columns or 50 distances").endswith(
        "layer 1: head 3; the first is ['vertical_and_slash', 9, 9, 1]"
    )
    assert len(notes) == 4
    assert read_minference(str(file), query_heads=[4, 4]) == (patterns, notes)


def test_a_file_of_one_type_has_the_notes_of_that_type_alone(tmp_path: Path) -> None:
    file = write(tmp_path / "c.json", [{str(head): [VS, 1000, 6096, 1.0] for head in range(32)}] * 3)
    patterns, notes = read_minference(file, query_heads=32)
    assert patterns == [[VerticalSlash(1000, 6096)] * 32] * 3
    assert [note.split(":")[0] for note in notes] == [VS]


def test_what_is_read_is_a_profile_and_runs(file: Path, tmp_path: Path) -> None:
    patterns, _ = read_minference(file)
    whole = ModelPatterns(tuple(map(tuple, patterns)))
    save_patterns(whole, tmp_path / "profile.json")
    assert load_patterns(tmp_path / "profile.json") == whole
    inputs = make_inputs(query_heads=4, kv_heads=2, queries=300, keys=300)
    for layer in range(2):
        index = whole.for_layer(layer).build_index(inputs, BlockGrid.of(inputs, 64, 64))
        assert int(index.count.min()) >= 1


def test_heads_are_sorted_by_number_and_not_by_name_or_order(tmp_path: Path) -> None:
    numbers = [10, 2, 11, 0, 1, 9, 3, 8, 4, 7, 5, 6]
    file = write(tmp_path / "c.json", [{str(n): [VS, 100 + n, 700, 1.0] for n in numbers}])
    ((*heads,),), _ = read_minference(file)
    assert [head.verticals for head in heads] == list(range(100, 112))


# ---- how many heads and layers


def test_without_a_number_of_heads_the_largest_in_the_file_decides(tmp_path: Path) -> None:
    file = write(tmp_path / "c.json", [{"0": [VS, 100, 750, 1.0]}, {"5": [VS, 100, 750, 1.0]}])
    patterns, notes = read_minference(file)
    assert patterns == [[VerticalSlash(100, 750), *[Dense()] * 5], [*[Dense()] * 5, VerticalSlash(100, 750)]]
    assert "heads a layer: 6" in about(notes, "largest number")
    assert about(notes, "not in the file").endswith("layer 0: heads 1-5; layer 1: heads 0-4")


def test_layers_of_different_numbers_of_heads(file: Path) -> None:
    patterns, notes = read_minference(file, query_heads=[4, 6])
    assert list(map(len, patterns)) == [4, 6]
    assert patterns[1][4:] == [Dense()] * 2
    assert about(notes, "not in the file").endswith("layer 1: heads 4-5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": 3}, r"has 2 layers, the model has 3; its search writes a layer at a time"),
        ({"layers": 1}, r"has 2 layers, the model has 1$"),
        ({"query_heads": 3}, r"layer 0 names head 3, the model has 3 heads there"),
        ({"query_heads": [4, 3]}, r"layer 1 names head 3"),
        ({"query_heads": [4]}, r"has 2 layers, query_heads has numbers for 1"),
        ({"query_heads": 0}, r"0 query heads; 1 to 1024"),
        ({"query_heads": 1025}, r"1025 query heads; 1 to 1024"),
        ({"query_heads": True}, r"True query heads"),
        ({"query_heads": [4, 4.0]}, r"layer 1 would have 4.0 query heads"),
    ],
)
def test_a_file_for_another_model_is_refused(file: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_minference(file, **arguments)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "is not a JSON"),
        ("[{", "is not a JSON"),
        ('[{"0": ["vertical_and_slash", 1, 1, NaN]}]', "NaN is no number of JSON"),
        ('[{"0": [], "0": []}]', "'0' comes twice"),
        ({"0": [VS, 1, 1, 1]}, "must be a list of layers"),
        ([], "must be a list of layers"),
        ([[VS, 1, 1, 1]], "must be a list of layers"),
        ([{}, {}], "names no head at all"),
        ([{"00": [VS, 1, 1, 1]}], "'00', which is no number of a head"),
        ([{"-1": [VS, 1, 1, 1]}], "'-1', which is no number"),
        ([{"٣": [VS, 1, 1, 1]}], "which is no number"),
        ([{"9" * 5000: [VS, 1, 1, 1]}], "which is no number"),
        ([{"1024": [VS, 1, 1, 1]}], "1025 query heads; 1 to 1024"),
        ([{"0": [VS, 1, 1, 1]}] * 1025, "1025 layers, at most 1024"),
    ],
)
def test_what_is_no_configuration_is_refused(tmp_path: Path, data: Any, message: str) -> None:
    file = write(tmp_path / "c.json", data)
    with pytest.raises(ValueError, match=message) as caught:
        read_minference(file)
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no MInference configuration at"):
        read_minference(tmp_path / "none.json")
    with pytest.raises(ValueError, match="is a folder"):
        read_minference(tmp_path)


# ---- what cannot be mapped


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        (["flex_vertical_and_slash", [0.9, 4096], [0.9, 4096], 0.0], "unknown type"),
        (["dense", 1, 1, 1.0], "unknown type"),
        ([None, 1, 1, 1.0], "unknown type"),
        ([[VS], 1, 1, 1.0], "unknown type"),
        ([VS, 1000, 6096], "no [type, v, s, score]"),
        ([VS, 1000, 6096, 1.0, 1], "no [type, v, s, score]"),
        (None, "no [type, v, s, score]"),
        (VS, "no [type, v, s, score]"),
        ({"type": VS}, "no [type, v, s, score]"),
        ([VS, 1000.0, 6096, 1.0], "v and s are no numbers of tokens"),
        ([VS, "1000", 6096, 1.0], "v and s are no numbers of tokens"),
        ([VS, True, 6096, 1.0], "v and s are no numbers of tokens"),
        ([VS, 1000, -1, 1.0], "v and s are no numbers of tokens"),
        ([VS, 1000, None, 1.0], "v and s are no numbers of tokens"),
        (["stream_llm", 100, 0.5, 1.0], "v and s are no numbers of tokens"),  # a share would be a window here
        (["block_sparse", "x", 1, 1.0], "v and s are no numbers of tokens"),
        ([VS, 10**20, 6096, 1.0], "v and s are out of range"),
        ([VS, 10**3000, 6096, 1.0], "v and s are out of range"),
        (["stream_llm", 100, 0, 1.0], "v and s are out of range"),
        ([VS, 1000, 6096, "0.5"], "the score is no number"),
        ([VS, 1000, 6096, None], "the score is no number"),
    ],
)  # fmt: skip
def test_an_entry_that_cannot_be_mapped_is_dense_and_named(tmp_path: Path, entry: Any, why: str) -> None:
    whole, usual = read_minference(write(tmp_path / "whole.json", WHOLE), query_heads=4)
    patterns, notes = read_minference(write(tmp_path / "c.json", damaged((0, "1", entry))), query_heads=4)
    assert patterns[0] == [whole[0][0], Dense(), *whole[0][2:]], "and no other head"
    assert patterns[1] == whole[1]
    (note,) = set(notes) - set(usual)
    assert note.startswith(f"{why}, dense here: layer 0: head 1")
    assert len(note) < 200


def test_a_missing_head_is_dense_and_not_what_minference_would_take(tmp_path: Path) -> None:
    data = damaged((0, "1", ...), (0, "3", ...), (1, "0", ...), (1, "1", ...), (1, "2", ...))
    patterns, notes = read_minference(write(tmp_path / "c.json", data), query_heads=4)
    assert patterns[0][1] == patterns[0][3] == Dense()
    assert patterns[1][:3] == [Dense()] * 3
    assert about(notes, "not in the file") == "not in the file, dense here: layer 0: heads 1, 3; layer 1: heads 0-2"


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)
TYPES = st.sampled_from([VS, "stream_llm", "block_sparse"])
SIZES = st.integers(0, 20000)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.dictionaries(
            st.integers(0, 7).map(str), JUNK | st.tuples(TYPES, SIZES | JUNK, SIZES | JUNK, st.floats(0, 1)).map(list),
            max_size=8,
        ),
        min_size=1, max_size=4,
    )
)  # fmt: skip
def test_any_entry_is_mapped_or_named(tmp_path: Path, data: list[dict[str, Any]]) -> None:
    patterns, notes = read_minference(write(tmp_path / "c.json", data), query_heads=8)
    assert [len(heads) for heads in patterns] == [8] * len(data)
    named: set[tuple[int, int]] = set()
    for note in notes:
        if ", dense here: " not in note:
            continue
        for part in note.split(", dense here: ")[1].split("; the first is ")[0].split("; "):
            layer, heads = part.removeprefix("layer ").split(":")
            for run in heads.split(" ", 2)[2].split(", "):
                first, _, last = run.partition("-")
                named |= {(int(layer), head) for head in range(int(first), int(last or first) + 1)}
    dense = {(n, head) for n, heads in enumerate(patterns) for head, each in enumerate(heads) if each == Dense()}
    assert named == dense
    for layer, head in {(n, h) for n in range(len(data)) for h in range(8)} - dense:
        kind, v, s, _ = data[layer][str(head)]
        pattern = patterns[layer][head]
        if kind == VS:
            assert pattern == VerticalSlash(max(v, 30), max(s, 50))
        else:
            assert pattern == (AShape(v, s) if kind == "stream_llm" else BlockSparse(6400, 0, 0))
