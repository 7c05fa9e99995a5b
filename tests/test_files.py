"""Damaged, hostile and unlucky files: every failure is one of ours, nothing is executed, nothing is lost."""

from __future__ import annotations

import functools
import json
import os
import pickle
import random
import shutil
import stat
import zlib
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sparseprefill import files
from sparseprefill.cli import main
from sparseprefill.contracts import BlockGrid
from sparseprefill.evals.loading import load_model
from sparseprefill.files import check_folder, parse_json, read_json, read_text, write_bytes, write_text
from sparseprefill.patterns import (
    AShape,
    BlockSparse,
    Dense,
    HeadScore,
    LastRowsDense,
    ModelPatterns,
    RandomBlocks,
    TriShape,
    VerticalSlash,
    load_patterns,
    save_patterns,
    store,
)
from sparseprefill.patterns.gna import Gna, Span
from sparseprefill.patterns.hip import Hip
from sparseprefill.patterns.names import parse_options
from sparseprefill.prefill import resolve_method
from support import make_inputs

OURS = (ValueError, FileNotFoundError, PermissionError)
HEADS = (
    AShape(16, 0.2), VerticalSlash(density=0.3), BlockSparse(keep=0.2), RandomBlocks(seed=3), TriShape(), Dense()
)  # fmt: skip
SCORES = (*(HeadScore(0.9 - n / 100, 0.5, n / 10, n / 9) for n in range(5)), None)
PROFILE = ModelPatterns(
    (HEADS, HEADS[::-1]),
    {
        "layers": 2, "query_heads": 6, "kv_heads": 2, "head_dim": 64, "architecture": "llama", "vocabulary": 9,
        "rope": {"rope_type": "default", "rope_theta": 1e4},
    },
    weights="0a1b", tuning=(SCORES, SCORES[::-1]), held_out=(SCORES[::-1], SCORES), made={"seeds": [1, 2]},
)  # fmt: skip


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    save_patterns(PROFILE, tmp_path / "profile.json")
    return tmp_path / "profile.json"


def outcome(run: Callable[[], Any], *kinds: type[Exception]) -> tuple[Any, str]:
    """(what it gave, "") or (None, the message) of a refusal, which is of exactly one of these kinds."""
    try:
        return run(), ""
    except kinds as error:
        refusal = error
    assert type(refusal) in kinds, f"not plainly ours: {type(refusal)}"  # UnicodeDecodeError is a ValueError too
    assert 0 < len(str(refusal)) < 2000, "a message, and not the file"
    return None, str(refusal)


def load_or_refuse(path: Path) -> ModelPatterns | None:
    """What the loader gave; None where it refused as documented: our type, the path, a reason."""
    found, message = outcome(lambda: load_patterns(path), *OURS)
    assert found is not None or str(path) in message
    return found  # type: ignore[no-any-return]


# ---- reading


def test_every_truncation_of_a_profile_is_refused(profile: Path) -> None:
    whole = profile.read_bytes()
    for size in range(0, len(whole) - 2, 7):
        profile.write_bytes(whole[:size])
        assert load_or_refuse(profile) is None, size


def test_every_flipped_bit_is_refused_or_read_as_what_stands_there(profile: Path) -> None:
    """A flip inside a number makes another profile; it must then be one that is written and read alike."""
    whole, draw = profile.read_bytes(), random.Random("flips")
    read = 0
    for _ in range(600):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 1, 1, 8))):
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        profile.write_bytes(damaged)
        found = load_or_refuse(profile)
        if found is not None:
            read += 1
            save_patterns(found, profile)
            assert load_patterns(profile) == found
    assert 0 < read < 300


WRONG = [
    "x",
    "",
    0,
    -1,
    1.5,
    -0.0,
    1e308,
    10**30,
    -(10**400),
    True,
    None,
    [],
    {},
    [[[]]],
    {"type": "dense"},
    "9" * 5000,
]


@pytest.mark.parametrize("value", WRONG, ids=lambda value: f"{value!r:.20}")
def test_wrong_values_anywhere_in_a_profile(profile: Path, value: Any) -> None:
    """Each place of the file in turn holds something of another kind or size."""
    data = json.loads(profile.read_text())
    places: list[tuple[Any, Any]] = []

    def collect(inner: Any) -> None:
        for key in list(inner) if isinstance(inner, dict) else range(len(inner)):
            places.append((inner, key))
            if isinstance(inner[key], (dict, list)):
                collect(inner[key])

    collect(data)
    for holder, key in places:
        before, holder[key] = holder[key], value
        profile.write_text(json.dumps(data) if not _huge(value) else json.dumps(data).replace(str(value), "9" * 5000))
        found = load_or_refuse(profile)
        for pattern in [p for heads in found.layers for p in heads] if found else []:
            _builds(pattern)
        holder[key] = before
    assert len(places) > 30


def _huge(value: Any) -> bool:
    return isinstance(value, int) and abs(value) > 10**300


@functools.cache
def _builds(pattern: Any) -> None:
    """Whatever was accepted serves a prefill."""
    inputs = make_inputs(queries=40, head_dim=8)
    pattern.build_index(inputs, BlockGrid.of(inputs, 16, 16)).validate(inputs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": NaN}', "NaN is no number of JSON"),
        ('{"schema": -Infinity}', "-Infinity is no number"),
        ('{"schema": 2, "x": 1e999}', "1e999 is too large"),
        ('{"schema": 2, "schema": 1}', "'schema' comes twice"),
        ('{"schema": 2, "layers": [[{"type": "a_shape", "sink": 1, "sink": 2}]]}', "'sink' comes twice"),
        ("[" * 100000, "nests deeper than|is not a JSON profile"),
        ("[" * 100000 + "]" * 100000, "nests deeper than"),
        ("[" * 20 + "]" * 20, "nests deeper than 16"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "nests deeper than"),
        ("9" * 5000, "is not a JSON profile.*digits"),
        ('{"schema": true}', "schema True"),
        ('{"schema": 1.0}', "schema 1.0"),
        ('{"schema": 2, "layers": [[{"type": "dense"}]], "then": 1}', "unknown entry 'then'"),
        ('{"schema": 2, "layers": [[{"type": ["dense"]}]]}', "layer 0, head 0: a pattern needs a `type`"),
        ('{"schema": 2, "layers": [[{"type": "__import__"}]]}', "a pattern needs a `type`"),
        ('{"schema": 2, "layers": [[{"type": "dense", "__class__": 1}]]}', "has no option '__class__'"),
        ('{"schema": 2, "layers": [[{"type": "dense"}]], "model": []}', "`model` must be an object"),
        ('{"schema": 1, "layers": [[{"type": "dense"}]]}', "schema 1; this version reads schema 2: make it again"),
        ('{"schema": 2, "layers": [[{"type": "dense"}]], "made": 1}', "`made` must be an object"),
        ('{"schema": 2, "layers": [[{"type": "dense"}]], "weights": 1}', "`weights` must be a text"),
        (
            '{"schema": 2, "layers": [[{"type": "dense"}]], "made": {"a": 1}, "model": {"layers": 1}}',
            "`model` lacks architecture, query_heads, kv_heads, head_dim, rope, vocabulary",
        ),
        (
            '{"schema": 2, "layers": [[{"type": "dense"}]], "model": {"layers": 2}}',
            "damaged: it has 1 layers, and says 2",
        ),
        (
            '{"schema": 2, "layers": [[{"type": "dense"}]], "model": {"query_heads": 2}}',
            "damaged: layer 0 has 1 heads, and says 2",
        ),
        (
            '{"schema": 2, "layers": [[{"type": "dense"}]], "model": {"query_heads": [1, 1]}}',
            "damaged: `query_heads` has 2 entries for 1 layers",
        ),
        ('{"schema": 2, "layers": [[{"type": "dense", "tuning": {"mass": 1}}]]}', "head 0: `tuning` must have mass"),
        (
            '{"schema": 2, "layers": [[{"type": "dense", "held_out": '
            '{"mass": 1.1, "low_mass": 1, "density": 1, "work": 1}}]]}',
            "layer 0, head 0: held_out: mass must be between 0 and 1",
        ),
        (
            '{"schema": 2, "layers": [[{"type": "dense", "tuning": '
            '{"mass": true, "low_mass": 1, "density": 1, "work": 1}}]]}',
            "layer 0, head 0: tuning: mass must be a number",
        ),
        (json.dumps({"schema": 2, "layers": [[{"type": "dense"}]] * 1025}), "1025 layers .* at most 1024"),
        (json.dumps({"schema": 2, "layers": [[{"type": "dense"}] * 1025]}), "1 layers of up to 1025 heads"),
    ],
    ids=lambda value: f"{value:.40}",
)  # fmt: skip
def test_what_json_leaves_open_is_refused(profile: Path, text: str, message: str) -> None:
    profile.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_patterns(profile)
    assert type(caught.value) is ValueError
    assert str(profile) in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
def test_wrong_encodings(profile: Path, encoding: str) -> None:
    profile.write_bytes(profile.read_text().replace("llama", "lláma").encode(encoding))
    with pytest.raises(ValueError, match=r"is not UTF-8 text: .* at byte") as caught:
        load_patterns(profile)
    assert type(caught.value) is ValueError
    profile.write_bytes(b"\xef\xbb\xbf" + json.dumps({"schema": 2, "layers": [[{"type": "dense"}]]}).encode())
    assert load_patterns(profile).layers == ((Dense(),),)  # a byte order mark is harmless


def test_what_is_no_file(tmp_path: Path) -> None:
    loop, pipe, binary = tmp_path / "loop", tmp_path / "pipe", tmp_path / "binary"
    loop.symlink_to(loop)
    os.mkfifo(pipe)
    binary.write_bytes(zlib.compress(os.urandom(100)))
    for path, kind, message in (
        (tmp_path / "none.json", FileNotFoundError, "there is no profile at"),
        (tmp_path, ValueError, "folder|regular file"),
        (tmp_path / "none" / "none.json", FileNotFoundError, "there is no profile at"),
        (binary / "inside", ValueError, "Not a directory"),
        (loop, ValueError, "links form a loop"),
        (pipe, ValueError, "no regular file"),
        (Path("/dev/zero"), ValueError, "no regular file"),
        (tmp_path / ("x" * 300), ValueError, "too long"),
        (tmp_path / "a\0b", ValueError, "null"),
        (binary, ValueError, "UTF-8|JSON"),
    ):
        with pytest.raises(kind, match=message) as caught:
            load_patterns(path)
        assert type(caught.value) is kind
        assert str(path) in str(caught.value)


def test_a_file_that_may_not_be_read(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The superuser may read everything, so the refusal of the system is played."""

    def refuse(path: Any, *_: Any) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files.os, "open", refuse)
    with pytest.raises(PermissionError, match="may not be read: change its permissions"):
        load_patterns(profile)


def test_huge_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(1 << 40)  # no block of it is on the disk
    with pytest.raises(ValueError, match="larger than 16777216 bytes"):
        load_patterns(huge)
    monkeypatch.setattr(files, "MOST_TEXT_BYTES", 10)
    assert read_text(_written(tmp_path / "ten", "0123456789"), "haystack", 10) == "0123456789"
    with pytest.raises(ValueError, match="larger than 10 bytes"):
        read_text(_written(tmp_path / "eleven", "0123456789x"), "haystack", 10)


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=30)
@given(JSON)
def test_sound_json_is_read_as_python_reads_it(data: Any) -> None:
    assert parse_json(json.dumps(data), "it") == data


@settings(max_examples=150)
@given(st.text(alphabet='{}[]",:0123456789.eE+-truefalsn \\u', max_size=40))
@example("[" * 3000)
def test_any_text_is_read_or_refused(text: str) -> None:
    _, message = outcome(lambda: parse_json(text, "the file"), ValueError)
    assert not message or message.startswith("the file")


@settings(max_examples=100)
@given(st.dictionaries(st.sampled_from(["type", "sink", "window", "keep", "density", "seed", "probe", "last"]), JSON))
@example({"type": "vertical_slash", "density": True})
@example({"type": "tri_shape", "last": 1.5})
@example({"type": "random", "seed": "x"})
@example({"type": "block_sparse", "sink": 0.2})
def test_any_entry_is_a_pattern_that_builds_or_refused(entry: dict[str, Any]) -> None:
    for kind in (entry.get("type"), *store.PATTERNS):
        pattern, message = outcome(functools.partial(store._pattern, {**entry, "type": kind}, "place"), ValueError)
        if pattern is None:
            assert message.startswith("place: ")
        else:
            _builds(pattern)


@settings(max_examples=100)
@given(st.text(max_size=30))
@example("keep=" + "9" * 5000)
@example("keep=" + "[" * 10000)
@example("keep=1e999")
@example("keep=NaN")
def test_options_of_the_command_line_are_parsed_or_refused(text: str) -> None:
    options, message = outcome(lambda: parse_options(text), ValueError)
    assert options is not None or "name=value" in message
    for method in ("block_sparse", "random", "tri_shape", "vertical_slash"):
        make = functools.partial(resolve_method, method, **(options or {}))
        pattern, _ = outcome(make, ValueError, TypeError)
        if pattern is not None:
            _builds(pattern)


def test_options_may_be_lists_and_dictionaries() -> None:
    assert parse_options("stages=[[256,0,4],[64,8192,4]],keep=0.2, sink=64") == {
        "stages": [[256, 0, 4], [64, 8192, 4]], "keep": 0.2, "sink": 64,
    }  # fmt: skip
    assert parse_options("inner=a],stages=[[1,0,4],[2,3,4]]") == {"inner": "a]", "stages": [[1, 0, 4], [2, 3, 4]]}
    assert parse_options("profile=/tmp/x[1.json,keep=0.2") == {"profile": "/tmp/x[1.json", "keep": 0.2}
    text = 'spans=[{"start":8,"shape":[4,4],"window":[3,3]}],window=64'
    pattern = resolve_method("gna", **parse_options(text))
    assert pattern == Gna(window=64, spans=(Span(8, (4, 4), (3, 3)),))
    assert resolve_method("hip", **parse_options("stages=[[64,0,8]],keep=0.2")) == Hip(0.2, stages=((64, 0, 8),))


# ---- writing


def test_a_failed_save_leaves_the_old_profile(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, others = profile.read_bytes(), sorted(profile.parent.iterdir())
    unsaved = {
        "no LastRowsDense": ModelPatterns(((LastRowsDense(Dense(), 3),),)),
        "what JSON cannot": ModelPatterns(((Dense(),),), {"x": object()}),
        "NaN|what JSON": ModelPatterns(((Dense(),),), {"x": float("nan")}),
        "read back": ModelPatterns(((Dense(),),), {5: "five"}),  # type: ignore[dict-item]
        "list of layers": ModelPatterns(()),
        "1025 layers": ModelPatterns(((Dense(),),) * 1025),
        "larger than": ModelPatterns(((Dense(),),), {"x": "x" * (17 << 20)}),
    }
    for message, patterns in unsaved.items():
        with pytest.raises(ValueError, match=message):
            save_patterns(patterns, profile)
        assert profile.read_bytes() == old

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    for name in ("fsync", "replace"):
        for failure, kind in ((full, OSError), (killed, KeyboardInterrupt)):
            with monkeypatch.context() as patch:
                patch.setattr(files.os if name == "fsync" else files.Path, name, failure)
                with pytest.raises(kind, match="No space left.*unchanged" if kind is OSError else None):
                    save_patterns(ModelPatterns(((Dense(),),)), profile)
            assert profile.read_bytes() == old
            assert sorted(profile.parent.iterdir()) == others, "no part is left behind"


def test_writing_keeps_links_and_permissions(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    write_text(real, "old")
    assert stat.S_IMODE(real.stat().st_mode) == 0o666 & ~_umask(), "a new file is as readable as any other"
    real.chmod(0o640)
    link.symlink_to(real)
    write_bytes(link, b"new")
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    long = tmp_path / ("n" * 250 + ".json")
    write_text(long, "a name as long as a folder holds")
    assert long.read_text()
    with pytest.raises(FileNotFoundError, match=r"no folder .*none to write x\.json into: make it first"):
        write_text(tmp_path / "none" / "x.json", "")
    with pytest.raises(ValueError, match="is a folder"):
        check_folder(tmp_path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ---- models: nothing is executed


class Payload:
    """What a hostile pickle holds: reading it would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (self.target,)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = resources.files("sparseprefill") / "needle_model"
    shutil.copytree(str(source), tmp_path / "model")
    return tmp_path / "model"


def changed(folder: Path, name: str, **values: Any) -> None:
    data = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**data, **values}))


def refused(folder: Path) -> str:
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        load_model(str(folder))
    assert type(caught.value) is ValueError
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_pickled_weights_are_never_read(folder: Path, tmp_path: Path) -> None:
    payload = Payload(tmp_path / "executed")
    assert not (tmp_path / "executed").exists()
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl"):
        (folder / name).write_bytes(pickle.dumps(payload))
    load_model(str(folder))  # safetensors lie beside them
    (folder / "model.safetensors").unlink()
    message = refused(folder)
    assert "pickled weights (.bin), which can run code" in message
    assert "convert them to safetensors" in message
    shutil.copy(folder / "pytorch_model.bin", folder / "model.safetensors")
    refused(folder)
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(payload))
    assert (tmp_path / "executed").exists(), "the payload works where something reads it"


@pytest.mark.parametrize("model_type", ["llama", "of_its_own"])
def test_code_in_a_folder_is_not_run(folder: Path, tmp_path: Path, model_type: str) -> None:
    (folder / "configuration_own.py").write_text(
        f"import os\nos.mkdir({str(tmp_path / 'executed')!r})\n"
        "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'of_its_own'\n"
    )
    changed(
        folder, "config.json", model_type=model_type,
        auto_map={"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"},
    )  # fmt: skip
    changed(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_own.Own", None]})
    if model_type == "llama":
        load_model(str(folder))  # transformers has the class: its own is taken
    else:
        assert "--trust-remote-code" in refused(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
def test_trusted_code_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other side: it was the flag that stopped it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    (folder / "configuration_own.py").write_text(
        f"import os\nos.mkdir({str(tmp_path / 'executed')!r})\n"
        "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'of_its_own'\n"
    )
    changed(folder, "config.json", model_type="of_its_own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    with pytest.raises(ValueError, match="cannot be loaded"):  # there is no model class to it
        load_model(str(folder), trust_remote_code=True)
    assert (tmp_path / "executed").exists()


def test_an_attention_kernel_from_elsewhere_is_refused(folder: Path) -> None:
    changed(folder, "config.json", attn_implementation="somebody/kernel")
    message = refused(folder)
    assert "wants the attention kernel 'somebody/kernel', which is code from elsewhere" in message
    assert "trust_remote_code" in message


def test_the_commands_trust_nothing_by_default() -> None:
    for name in ("needle", "bench"):
        context = main.commands[name].make_context(name, [])
        assert context.params["trust_remote_code"] is False
        assert "--trust-remote-code" in main.commands[name].get_help(context)


def test_weights_that_are_missing_are_not_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if "k_proj.weight" in n)
    for damaged in (
        {n: w for n, w in weights.items() if n != name},
        {**weights, name: weights[name][:8].clone()},
    ):
        save_file(damaged, folder / "model.safetensors", {"format": "pt"})
        assert f"1 weights are {'missing' if name not in damaged else 'mismatched'}, {name}" in refused(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_damaged_model_folders(folder: Path, name: str) -> None:
    whole, draw = (folder / name).read_bytes(), random.Random(name)
    for kind in ("empty", "half", "flips", "zeros", "folder", "loop"):
        damaged = bytearray(whole)
        if kind == "flips":
            for _ in range(40):
                damaged[draw.randrange(min(len(damaged), 4000))] ^= 1 << draw.randrange(8)
        (folder / name).unlink()
        if kind == "folder":
            (folder / name).mkdir()
        elif kind == "loop":
            (folder / name).symlink_to(folder / name)
        else:
            data = {"empty": b"", "half": whole[: len(whole) // 2], "zeros": bytes(len(whole))}.get(kind, damaged)
            (folder / name).write_bytes(data)
        if name == "tokenizer_config.json":  # transformers does without it where it can
            outcome(lambda: load_model(str(folder)), ValueError)
        else:
            refused(folder)
        if kind == "folder":
            (folder / name).rmdir()
        else:
            (folder / name).unlink()
        (folder / name).write_bytes(whole)
    load_model(str(folder))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**9), ("num_attention_heads", 10**9), ("num_hidden_layers", "four"),
        ("num_hidden_layers", -1), ("hidden_size", 10**12), ("vocab_size", 10**12), ("intermediate_size", -5),
        ("num_key_value_heads", 3), ("hidden_act", "__import__('os')"), ("rope_parameters", {"rope_type": "none"}),
        ("dtype", "os.system"), ("model_type", ["llama"]), ("architectures", [["x"]]),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_numbers_in_a_model_configuration(folder: Path, field: str, value: Any) -> None:
    changed(folder, "config.json", **{field: value})
    loaded, message = outcome(lambda: load_model(str(folder)), ValueError)
    if loaded is None:
        assert str(folder) in message
    else:
        assert field in ("architectures", "dtype"), "read by nobody"
        assert loaded[0].num_parameters() > 10**6


# ---- the commands


def output_of(*arguments: str) -> str:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code in (1, 2), result.output
    assert isinstance(result.exception, SystemExit), result.exception
    return result.output


def test_commands_fail_with_a_message(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("Größe und Maß. ".encode("latin-1") * 50)
    short = ("--lengths", "600", "--samples", "1", "--depths", "2", "--method", "dense")
    assert "latin.txt is not UTF-8 text" in output_of(
        "needle", *short, "--haystack", str(tmp_path / "latin.txt"), "--out", str(tmp_path / "out")
    )
    (tmp_path / "file").write_text("")
    assert "is a file" in output_of("needle", *short, "--out", str(tmp_path / "file"))
    assert "Error" in output_of("needle", *short, "--out", str(tmp_path / "file" / "inside"))
    assert "make it first" in output_of("bench", "--device", "cpu", "--out", str(tmp_path / "none" / "bench.json"))
    profile = _written(tmp_path / "p.json", "[" * 5000)
    assert "p.json" in output_of(
        "needle", *short[:-2], "--method", f"minference:profile={profile}", "--out", str(tmp_path / "out")
    )


def test_floating_point_weights_that_are_nan_are_named(folder: Path) -> None:
    """Flipped bits in weights cannot be told from weights; what they may cause is found when it happens."""
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if "q_proj.weight" in n)
    weights[name] = torch.full_like(weights[name], torch.nan)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "contain NaN" in output_of(
        "needle", "--model", str(folder), "--lengths", "600", "--samples", "1", "--depths", "2",
        "--method", "block_sparse:keep=0.5", "--out", str(folder.parent / "out"),
    )  # fmt: skip


def test_read_json_names_what_it_reads(tmp_path: Path) -> None:
    assert read_json(_written(tmp_path / "a.json", "[1]"), "calibration") == [1]
    with pytest.raises(ValueError, match=r"the calibration .*a\.json is not a JSON calibration"):
        read_json(_written(tmp_path / "a.json", "[1"), "calibration")
