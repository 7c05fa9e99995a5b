"""Captures: what is written is read back bit for bit, and whatever is wrong with a file is said with its path."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from sparseprefill.cli import main
from sparseprefill.contracts import AttentionInputs
from sparseprefill.evals import captures
from sparseprefill.evals.captures import SCHEMA, Capture, load_capture, save_capture, stored
from sparseprefill.evals.compared_inputs import NamedInputs, layer_inputs, model_inputs, moved
from sparseprefill.evals.loading import load_model
from sparseprefill.prompts import ProfilePrompt
from support import left_padding, make_inputs

FIELDS = ("query", "key", "value", "sinks")


def entries(dtype: torch.dtype = torch.float32) -> list[NamedInputs]:
    plain = make_inputs(queries=96, value_dim=24, dtype=dtype, seed=1)
    odd = make_inputs(
        query_heads=6, kv_heads=3, queries=70, head_dim=20, dtype=dtype, seed=2, scale=0.3, softcap=30.0,
        sinks=torch.randn(6, generator=torch.Generator().manual_seed(3)),
    )  # fmt: skip
    return [NamedInputs("a/0 layer 0", "tiny, 96 tokens", plain), NamedInputs("b layer 3", "other", odd, needle=17)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_capture(entries(), tmp_path / "pack.safetensors", model={"name": "tiny"}, prompts={"source": "made up"})
    return tmp_path / "pack.safetensors"


def assert_same(got: NamedInputs, want: NamedInputs) -> None:
    assert (got.name, got.group, got.needle) == (want.name, want.group, want.needle)
    for name in FIELDS:
        mine, its = getattr(got.inputs, name), getattr(want.inputs, name)
        assert (mine is None) == (its is None)
        if mine is not None:
            assert mine.dtype == its.dtype
            assert torch.equal(mine, its)
    rest = [{f.name: getattr(each.inputs, f.name) for f in dataclasses.fields(AttentionInputs) if f.name not in FIELDS}
            for each in (got, want)]  # fmt: skip
    assert rest[0] == rest[1]


# What is written


@pytest.mark.parametrize("dtype", captures.DTYPES.values(), ids=captures.DTYPES)
def test_a_round_trip_keeps_every_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    given = entries(dtype)
    size = save_capture(given, tmp_path / "x", model={"name": "tiny"}, prompts={"lengths": [96]})
    assert (tmp_path / "x").stat().st_size == size
    found = load_capture(tmp_path / "x")
    assert (len(found), found.model, found.prompts) == (2, {"name": "tiny"}, {"lengths": [96]})
    for got, want in zip(found, given, strict=True):
        assert_same(got, want)
    assert_same(found[-1], given[1])
    assert [each.name for each in found[:1]] == ["a/0 layer 0"]
    with pytest.raises(IndexError):
        found[2]


def test_it_is_a_safetensors_file_that_says_what_it_is(path: Path) -> None:
    with safe_open(path, "pt") as file:
        assert file.metadata()["schema"] == SCHEMA
        assert sorted(file.keys()) == ["0.key", "0.query", "0.value", "1.key", "1.query", "1.sinks", "1.value"]
        assert file.get_tensor("1.query").shape == (6, 70, 20)


def test_tensors_that_share_memory_are_written_each(tmp_path: Path) -> None:
    inputs = make_inputs(queries=64)
    shared = dataclasses.replace(inputs, value=inputs.key, query=inputs.key.repeat(1, 2, 1, 1)[:, :, ::1])
    save_capture([NamedInputs("x", "g", shared)], tmp_path / "x")
    assert_same(load_capture(tmp_path / "x")[0], NamedInputs("x", "g", shared))


def test_heads_and_dtype_make_it_smaller() -> None:
    (each, _) = entries()
    some = stored(each, heads=[2, 3], dtype="bfloat16")
    assert some.inputs.query.shape == (1, 2, 96, 32)
    assert some.inputs.kv_heads == 1, "a whole group keeps its keys together"
    assert torch.equal(some.inputs.key, each.inputs.key[:, 1:].bfloat16())
    broken = stored(each, heads=[3, 0]).inputs
    assert (broken.query_heads, broken.kv_heads) == (2, 2)
    assert torch.equal(broken.key, each.inputs.key[:, [1, 0]])
    same = stored(each)
    assert_same(same, each)
    assert same.inputs.query.data_ptr() != each.inputs.query.data_ptr(), "the model's tensors can be let go"
    for heads, said in (([4], "no head 4"), ([], "at least one"), ([1, 1], "named once")):
        with pytest.raises(ValueError, match=said):
            stored(each, heads=heads)
    with pytest.raises(ValueError, match="int8"):
        stored(each, dtype="int8")
    assert_same(moved(same, "cpu"), each)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"batch": 2}, "several prompts"),
        ({"key_valid": left_padding(64, [3])}, "padded"),
        ({"window": 16}, "part of the prompt"),
        ({"segment": torch.zeros(1, 64, dtype=torch.int64)}, "part of the prompt"),
        ({"queries": 32}, "not all of one prompt"),
        ({"key_length": 40}, "not all of one prompt"),
    ],
)
def test_what_cannot_be_compared_on_is_not_captured(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    inputs = make_inputs(**({"queries": 64, "keys": 64} | fields))
    with pytest.raises(ValueError, match=said):
        save_capture([NamedInputs("x", "g", inputs)], tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_what_is_not_finite_or_too_much_is_not_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = make_inputs(queries=64)
    bad.value[0, 1, 2, 3] = torch.inf
    with pytest.raises(ValueError, match="x cannot be captured: its value is not finite"):
        save_capture([NamedInputs("x", "g", bad)], tmp_path / "x")
    with pytest.raises(ValueError, match="entries"):
        save_capture([], tmp_path / "x")
    monkeypatch.setattr(captures, "MOST_CAPTURE_BYTES", 1000)
    with pytest.raises(ValueError, match="fewer"):
        save_capture(entries(), tmp_path / "x")
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="no folder"):
        save_capture(entries(), tmp_path / "none" / "x")
    assert not list(tmp_path.iterdir())


# What is read


def rewritten(path: Path, **changes: Any) -> None:
    """The same tensors, with something else said of them."""
    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()["capture"])
    said["entries"][0] |= changes
    save_file(load_file(path), path, {"schema": SCHEMA, "capture": json.dumps(said)})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens": 95}, r"query of a/0 layer 0 is F32 \[4, 96, 32\], not float32 \[4, 95, 32\]"),
        ({"dtype": "bfloat16"}, "not bfloat16"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"sinks": True}, "has no sinks"),
        ({"kv_heads": 3}, "no multiple"),
        ({"query_heads": 0}, "query_heads is 0"),
        ({"tokens": 1 << 40}, "tokens is"),
        ({"tokens": "96"}, "tokens is '96'"),
        ({"tokens": True}, "tokens is True"),
        ({"needle": 96}, "needle is 96"),
        ({"needle": 1.5}, "needle is 1.5"),
        ({"name": None}, "name is None"),
        ({"colour": "red"}, "colour"),
        ({"scale": -1.0}, "scale"),
        ({"softcap": 0.0}, "softcap"),
        ({"scale": 10**400}, "scale is a number of"),
        ({"softcap": 1e300}, "softcap"),
        ({"group": "a\x1b[31mred"}, "group is"),
        ({"name": "two\nlines"}, "not one line"),
    ],
)
def test_entries_that_are_not_as_they_say_are_refused(path: Path, changes: dict[str, Any], said: str) -> None:
    rewritten(path, **changes)
    with pytest.raises(ValueError, match=said) as refused:
        list(load_capture(path))
    assert str(path) in str(refused.value)


def test_another_file_is_refused_by_its_name(tmp_path: Path, path: Path) -> None:
    tensors, said = load_file(path), None
    with safe_open(path, "pt") as file:
        said = file.metadata()
    missing = {name: each for name, each in tensors.items() if name != "1.value"}
    nested = said | {"capture": "[" * 50 + "]" * 50}
    cases: dict[str, tuple[dict[str, torch.Tensor], dict[str, str] | None, str]] = {
        "weights": (tensors, None, "not of schema"),
        "newer": (tensors, said | {"schema": "sparseprefill-capture-2"}, "not of schema.*capture-2"),
        "silent": (tensors, {"schema": SCHEMA}, "not a JSON capture"),
        "nested": (tensors, nested, "nests deeper"),
        "list": (tensors, said | {"capture": "[]"}, "damaged"),
        "empty": (tensors, said | {"capture": '{"model": {}, "prompts": {}, "entries": []}'}, "0 entries"),
        "missing": (missing, said, "b layer 3 has no value"),
        "more": (tensors | {"2.query": torch.zeros(1)}, said, "'2.query', which belongs to no entry"),
    }
    for name, (held, metadata, message) in cases.items():
        save_file(held, tmp_path / name, metadata)
        with pytest.raises(ValueError, match=message) as refused:
            load_capture(tmp_path / name)
        assert str(tmp_path / name) in str(refused.value)
    with pytest.raises(FileNotFoundError, match="no capture at"):
        load_capture(tmp_path / "nothing")
    with pytest.raises(ValueError, match="folder"):
        load_capture(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no regular file"):
        load_capture(tmp_path / "pipe")


def test_numbers_that_are_not_finite_are_found_when_they_are_asked_for(path: Path) -> None:
    with safe_open(path, "pt") as file:
        said = file.metadata()
    tensors = load_file(path)
    tensors["1.key"][0, 5, 5] = torch.nan
    save_file(tensors, path, said)
    found = load_capture(path)
    assert found[0].inputs.queries == 96
    with pytest.raises(ValueError, match="b layer 3 has a key that is not finite"):
        found[1]


def test_a_damaged_file_is_refused_or_other_numbers(path: Path) -> None:
    """Truncated anywhere, or with flipped bits: a message with the path, or a capture of the same form."""
    whole, draw = path.read_bytes(), random.Random("captures")
    for size in (0, 1, 7, 8, 100, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="damaged") as refused:
            list(load_capture(path))
        assert str(path) in str(refused.value)
    header = int.from_bytes(whole[:8], "little")
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[draw.randrange(8 + header)] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            assert len(list(load_capture(path))) == 2
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017


def test_a_removed_file_is_said_when_an_entry_is_asked_for(path: Path) -> None:
    found: Capture = load_capture(path)
    path.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=path.name):
        found[0]


# A model's layers, and the command


def test_layers_are_those_that_are_named() -> None:
    model, _ = load_model()
    prompt = ProfilePrompt("p", torch.randint(3, 99, (96,), generator=torch.Generator().manual_seed(0)).tolist())
    ids = torch.tensor([prompt.token_ids])
    every = layer_inputs(model, ids)
    assert list(every) == list(range(model.config.num_hidden_layers))
    some = list(model_inputs(model, [prompt], layers=[2, 0], called="needle_model"))
    assert [each.name for each in some] == ["p layer 2", "p layer 0"]
    assert {each.group for each in some} == {"needle_model, 96 tokens"}
    assert torch.equal(some[0].inputs.query, every[2].query)
    with pytest.raises(ValueError, match="layer 9 is none"):
        list(model_inputs(model, [prompt], layers=[9]))


def test_a_layer_with_a_window_is_refused_by_its_number() -> None:
    model = tiny_model("gemma2")
    prompt = ProfilePrompt("p", list(range(3, 99)))
    whole = [each.name for each in model_inputs(model, [prompt])]
    assert 0 < len(whole) < model.config.num_hidden_layers
    local = next(n for n in range(model.config.num_hidden_layers) if f"p layer {n}" not in whole)
    with pytest.raises(ValueError, match=f"layer {local} is none that sees a whole prompt"):
        list(model_inputs(model, [prompt], layers=[local]))


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["capture", *map(str, words)])


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "pack.safetensors"
    done = run("--lengths", "512,640", "--layers", "0,2-3", "--heads", "0-3", "--store", "bfloat16", "--out", out)
    assert done.exit_code == 0, done.output
    found = load_capture(out)
    assert [each.group for each in found] == ["needle_model, 512 tokens"] * 3 + ["needle_model, 640 tokens"] * 3
    assert [each.name.rpartition(" ")[2] for each in found] == ["0", "2", "3"] * 2
    assert {each.inputs.query.dtype for each in found} == {torch.bfloat16}
    assert {each.inputs.query_heads for each in found} == {4}
    assert found.model["model"]["name"] == "needle_model"
    assert "needle" in found.prompts["source"]
    size = sum(info.bytes for info in found.infos)
    assert f"6 layers of 2 prompts, 4 heads each: {size / 2**20:.1f} MiB" in done.output
    before = out.read_bytes()
    done = run("--lengths", "512", "--out", out)
    assert done.exit_code == 1
    assert "--again replaces it" in done.output
    assert out.read_bytes() == before
    assert run("--lengths", "512", "--layers", "1", "--out", out, "--again").exit_code == 0
    assert len(load_capture(out)) == 1


def test_prompts_are_not_written_over(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words " * 400, encoding="utf-8")
    done = run("--lengths", "512", "--prompts", text, "--out", text, "--again")
    assert done.exit_code == 1
    assert "named twice" in done.output
    assert text.read_text(encoding="utf-8").startswith("some words")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--layers", "40"], "layer 40 is none"),
        (["--heads", "99"], "no head 99"),
        (["--layers", "0,0"], "one twice"),
        (["--layers", "3-"], "0,2,5-7"),
        (["--layers", "0,3-1"], "'3-1' ends before it begins"),
        (["--device", "no_such"], "there is no device 'no_such' here"),
        (["--heads", "0-99999999"], "0,2,5-7"),
        (["--prompts", "builtin:no_such"], "no_such"),
    ],
)
def test_the_command_refuses(tmp_path: Path, options: list[str], said: str) -> None:
    done = run("--lengths", "512", "--out", tmp_path / "x", *options)
    assert done.exit_code in (1, 2)
    assert said in done.output
    assert "Traceback" not in done.output
    assert not list(tmp_path.iterdir())
