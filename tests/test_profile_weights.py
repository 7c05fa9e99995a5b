"""Whether a profile was made for the weights that a model runs: the hash of its files, and what a patch says of it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, tiny_config, tiny_model, tokens
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from sparseprefill import huggingface, huggingface_weights, patch_model, register
from sparseprefill.doctor import explain
from sparseprefill.huggingface_modules import STATE, model_facts, text_config
from sparseprefill.huggingface_weights import SLICE_BYTES, SLICES, weights_hash
from sparseprefill.patterns import AShape, ModelPatterns, save_patterns

OPTIONS: dict[str, Any] = {"block_q": 16, "block_k": 16, "min_length": 0}


def profile(weights: str | None, layers: int = 3) -> ModelPatterns:
    return ModelPatterns(((AShape(16, 32),) * 4,) * layers, {}, weights)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 2 MiB in one file."""
    folder = tmp_path_factory.mktemp("original")
    tiny_model("llama", vocab_size=2048).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return shutil.copytree(original, tmp_path / "model")


@pytest.fixture
def _clean_register() -> Iterator[None]:
    huggingface._REGISTERED.clear()
    yield
    huggingface._REGISTERED.clear()


def load(folder: Path, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model.eval()


@torch.no_grad()
def run(model: Any, times: int = 1) -> None:
    for _ in range(times):
        model(tokens(1, 64))


def hash_of(folder: Path) -> str:
    found, place = weights_hash(load(folder))
    assert found is not None, place
    assert place == str(folder)
    return found


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def rewrite(folder: Path, change: Callable[[dict[str, Any], bytearray], None]) -> None:
    path = folder / "model.safetensors"
    header, data = split(path.read_bytes())
    changed = bytearray(data)
    change(header, changed)
    path.write_bytes(joined(header, bytes(changed)))


def test_the_hash_is_that_of_headers_and_evenly_spread_slices(original: Path) -> None:
    raw = (original / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    data = raw[8 + length :]
    assert len(data) > SLICES * SLICE_BYTES
    expected = hashlib.sha256(raw[: 8 + length] + struct.pack("<Q", len(data)))
    for place in range(SLICES):
        start = place * (len(data) - SLICE_BYTES) // (SLICES - 1)
        expected.update(data[start : start + SLICE_BYTES])
    assert hash_of(original) == expected.hexdigest()


def test_the_same_files_elsewhere_and_another_dtype_in_memory_are_the_same(original: Path, folder: Path) -> None:
    assert hash_of(folder) == hash_of(original)
    assert weights_hash(load(folder, dtype=torch.bfloat16))[0] == hash_of(original)


def test_two_shards_differ_from_one_file(original: Path, tmp_path: Path) -> None:
    load(original).save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert hash_of(tmp_path) != hash_of(original)


def test_every_shard_counts_and_no_other_file(original: Path, tmp_path: Path) -> None:
    load(original).save_pretrained(tmp_path, max_shard_size="1MB")
    before = hash_of(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"another layout of the same")
    assert hash_of(tmp_path) == before
    for shard in sorted(tmp_path.glob("model-*.safetensors")):
        kept = shard.read_bytes()
        tensors = load_file(shard)
        name = min(tensors)
        tensors[name].view(-1)[0] += 1
        save_file(tensors, shard, metadata={"format": "pt"})
        assert hash_of(tmp_path) != before
        shard.write_bytes(kept)
    assert hash_of(tmp_path) == before


@pytest.mark.parametrize("place", [0, -1])
def test_a_changed_weight_in_the_sample_differs(place: int, folder: Path) -> None:
    before = hash_of(folder)

    def change(_: dict[str, Any], data: bytearray) -> None:
        data[place] ^= 1

    rewrite(folder, change)
    assert hash_of(folder) != before


def test_a_changed_header_differs(folder: Path) -> None:
    before = hash_of(folder)

    def change(header: dict[str, Any], _: bytearray) -> None:
        header["__metadata__"]["note"] = "other"

    rewrite(folder, change)
    assert hash_of(folder) != before


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.integers(1, 5), st.integers(2, 9))
def test_slices_over_several_files_are_those_of_one(sizes: list[int], width: int, count: int) -> None:
    """Cut at the files' edges, they are the same bytes of all data in order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_weights, "SLICES", count)
        patch.setattr(huggingface_weights, "SLICE_BYTES", width)
        total = sum(sizes)
        shards = [huggingface_weights._Shard(Path(str(n)), b"", size) for n, size in enumerate(sizes)]
        slices = huggingface_weights._slices(total)
        before = {str(n): sum(sizes[:n]) for n in range(len(sizes))}
        met = [
            byte
            for shard, start, stop in huggingface_weights._pieces(shards, slices)
            for byte in range(before[str(shard.path)] + start, before[str(shard.path)] + stop)
        ]
    wanted = [byte for start, stop in slices for byte in range(start, stop)]
    assert sorted(met) == sorted(wanted)
    assert all(0 <= byte < total for byte in met)
    if total <= width * count:
        assert met == list(range(total))
    else:
        assert len(met) == width * count
        assert met[0] == 0
        assert met[-1] == total - 1


def test_few_bytes_are_read_of_a_large_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 4 GB, most of it a hole."""
    data = 4 * 10**9
    entry = {"dtype": "U8", "shape": [data], "data_offsets": [0, data]}
    path = folder / "model.safetensors"
    model = load(folder)
    path.write_bytes(joined({"hole": entry}, b""))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + data)
    read = []
    original = huggingface_weights._read
    monkeypatch.setattr(huggingface_weights, "_read", lambda *each: read.append(each[-1]) or original(*each))
    assert weights_hash(model)[0] is not None
    assert sum(read) < SLICES * SLICE_BYTES + 1000


# ---- what cannot be told


def in_memory(_: Path) -> Any:
    return tiny_model("llama")


def from_a_configuration(folder: Path) -> Any:
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def with_lora(folder: Path) -> Any:
    return peft.get_peft_model(load(folder), peft.LoraConfig(target_modules=["q_proj"], r=2))


def inside_lora(folder: Path) -> Any:
    return with_lora(folder).get_base_model()


def with_an_added_adapter(folder: Path) -> Any:
    model = load(folder)
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], r=2))
    return model


def with_a_prompt(folder: Path) -> Any:
    return peft.get_peft_model(load(folder), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def quantised(folder: Path) -> Any:
    return load(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def gone(folder: Path) -> Any:
    model = load(folder)
    shutil.rmtree(folder)
    return model


def pickled(folder: Path) -> Any:
    model = load(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return model


def cut_short(folder: Path) -> Any:
    model = load(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return model


def damaged(data: bytes) -> Callable[[Path], Any]:
    def write(folder: Path) -> Any:
        model = load(folder)
        (folder / "model.safetensors").write_bytes(data)
        return model

    return write


def with_index(index: Any) -> Callable[[Path], Any]:
    def write(folder: Path) -> Any:
        model = pickled(folder)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return model

    return write


UNKNOWN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "made in memory": (in_memory, "not loaded from files"),
    "made from a configuration on disk": (from_a_configuration, "not loaded from files"),
    "LoRA around it": (with_lora, "adapters"),
    "the model inside LoRA": (inside_lora, "adapters"),
    "an adapter added": (with_an_added_adapter, "adapters"),
    "a tuned prompt": (with_a_prompt, "adapters"),
    "quantised on loading": (quantised, "quantised"),
    "files gone": (gone, "neither a folder nor in the hub's cache"),
    "no safetensors": (pickled, "only safetensors are read"),
    "cut short": (cut_short, "does not describe its .* bytes"),
    "empty": (damaged(b""), "ends before byte 8"),
    "a header longer than the file": (damaged(struct.pack("<Q", 1 << 60) + b"{}"), "its header is said to have"),
    "a header that is no JSON": (damaged(struct.pack("<Q", 4) + b"{{{{"), "is not a JSON header"),
    "a header that is no text": (damaged(struct.pack("<Q", 2) + b"\xff\xfe"), "no UTF-8 text"),
    "a header that is a list": (damaged(struct.pack("<Q", 2) + b"[]"), "no table of tensors"),
    "a header without places": (damaged(joined({"a": {"dtype": "F32"}}, b"1234")), "does not describe"),
    "an index that is a list": (with_index([]), "has no `weight_map`"),
    "an index that leads elsewhere": (with_index({"weight_map": {"a": "../a.safetensors"}}), "no file beside it"),
    "an index of files that are gone": (with_index({"weight_map": {"a": "a.safetensors"}}), "there is no weights file"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_cannot_be_told(name: str, folder: Path) -> None:
    make, reason = UNKNOWN[name]
    model = make(folder)
    found, why = weights_hash(model)
    assert found is None
    assert re.search(reason, why), why


def test_a_wrapper_that_changes_no_weights_is_looked_through(original: Path) -> None:
    assert weights_hash(torch.compile(load(original)))[0] == hash_of(original)


def test_weights_not_loaded_yet_are_those_of_the_files(original: Path) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(original))
    assert weights_hash(model)[0] == hash_of(original)


def test_a_model_of_the_hub_is_found_in_the_cache(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the commit it was loaded at, among several; without the network."""
    home = tmp_path / "models--some--model"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(original, home / "snapshots" / commit)
    (home / "snapshots" / ("b" * 40) / "model.safetensors").unlink()
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("b" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = load(original)
    model.config._name_or_path, model.config._commit_hash = "some/model", "a" * 40
    assert weights_hash(model)[0] == hash_of(original)
    model.config._commit_hash = None
    found, why = weights_hash(model)
    assert found is None
    assert "only safetensors are read" in why


# ---- what a patch says


def test_the_right_weights_are_not_spoken_of(original: Path) -> None:
    model = load(original)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with patch_model(model, profile(hash_of(original)), strict=True, **OPTIONS) as patch:
            run(model)
            assert patch.report().warnings == {}
            assert "warning" not in str(patch.report())


@pytest.mark.parametrize("kind", ["other weights", "made in memory"])
def test_other_weights_are_warned_of_and_counted(kind: str, original: Path) -> None:
    model, text = (
        (load(original), r"made for other weights \(ffffffffffff\.\.\.\)")
        if kind == "other weights"
        else (tiny_model("llama"), "it cannot be told .* not loaded from files")
    )
    before = dict(vars(model)), model.config, [sorted(vars(module)) for module in model.modules()]
    with pytest.warns(UserWarning, match=text) as said:
        patch = patch_model(model, profile("f" * 64), **OPTIONS)
    assert len(said) == 1
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model)
    patch.reset()
    report = patch.report()
    assert report.warnings == {str(said[0].message): 1}
    assert f"warning: {said[0].message} (1 x)" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["warnings"] == report.warnings
    patch.remove()
    assert (dict(vars(model)), model.config, [sorted(vars(module)) for module in model.modules()]) == before


def test_every_profile_is_counted(original: Path) -> None:
    model = load(original)
    right, wrong = profile(hash_of(original)), profile("f" * 64)
    with (
        pytest.warns(UserWarning, match="other weights"),
        patch_model(model, right, layers={0: wrong, 2: wrong}, **OPTIONS) as patch,
    ):
        assert list(patch.report().warnings.values()) == [2]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (profile("f" * 64), "made for other weights"),
        (profile(None), "does not say which weights"),
        ("a_shape", "there is no profile"),
    ],
)
def test_strict_refuses_and_leaves_the_model_as_it_is(method: Any, message: str, original: Path) -> None:
    model = load(original)
    with pytest.raises(ValueError, match=message):
        patch_model(model, method, strict=True, **OPTIONS)
    assert not any(hasattr(module, STATE) for module in model.modules())


def test_strict_refuses_what_cannot_be_compared(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"it cannot be told .* adapters"):
        patch_model(with_lora(folder), profile("f" * 64), strict=True, **OPTIONS)


def test_a_warning_made_an_error_leaves_the_model_as_it_is(original: Path) -> None:
    model = load(original)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="other weights"):
            patch_model(model, profile("f" * 64), **OPTIONS)
    assert not any(hasattr(module, STATE) for module in model.modules())


def test_files_are_read_only_where_a_profile_names_weights(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "weights_hash", lambda _: pytest.fail("nothing is to be compared"))
    for method in (profile(None), "a_shape"):
        patch_model(load(original), method, **OPTIONS).remove()


def test_doctor_says_it_too(original: Path) -> None:
    explained = explain(load(original), profile("f" * 64))
    assert any("made for other weights" in note for note in explained.notes)


def test_a_profile_is_an_argument_of_its_own(original: Path, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    save_patterns(ModelPatterns(((AShape(16, 32),) * 4,) * 3), path)
    model = load(original)
    with patch_model(model, profile=path, **OPTIONS) as patch:
        assert set(patch.patterns.values()) == {AShape(16, 32)}
        assert patch.report().method == "minference"
    for method in ("a_shape", AShape(), profile(None)):
        with pytest.raises(ValueError, match="it goes with the methods 'minference' and 'sale' alone, not with"):
            patch_model(model, method, profile=path, **OPTIONS)
        with pytest.raises(ValueError, match="it goes with the methods 'minference' and 'sale' alone, not with"):
            register(method, profile=path)
    with pytest.raises(FileNotFoundError, match="there is no profile"):
        patch_model(model, profile=tmp_path / "other.json")


@pytest.mark.usefixtures("_clean_register")
def test_a_registered_profile_is_compared_when_a_model_first_runs(original: Path) -> None:
    register(profile("f" * 64), **OPTIONS)
    model = load(original, attn_implementation="sparseprefill")
    with pytest.warns(UserWarning, match="made for other weights") as said:
        run(model, times=2)
    assert len(said) == 1
    register(profile(hash_of(original)), **OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(load(original, attn_implementation="sparseprefill"))
    with pytest.raises(ValueError, match="register takes no strict"):
        register(strict=True)


@pytest.mark.usefixtures("_clean_register")
def test_a_registered_profile_knows_adapters(folder: Path) -> None:
    register(profile(hash_of(folder)), **OPTIONS)
    model = load(folder, attn_implementation="sparseprefill")
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.warns(UserWarning, match=r"it cannot be told .* adapters"):
        run(model.eval())


# ---- rope, a key that must fit


@pytest.mark.parametrize("family", FAMILIES)
def test_rope_is_plain_and_the_same_after_loading(family: str, tmp_path: Path) -> None:
    config = tiny_config(family)
    config.save_pretrained(tmp_path)
    facts = model_facts(config.get_text_config())
    assert json.loads(json.dumps(facts["rope"])) == facts["rope"]
    assert model_facts(AutoConfig.from_pretrained(tmp_path).get_text_config()) == facts


def test_rope_by_layer_type_is_nested() -> None:
    rope = model_facts(tiny_config("gemma3_text"))["rope"]
    assert rope["full_attention"]["rope_theta"] != rope["sliding_attention"]["rope_theta"]


def test_a_profile_for_other_rotations_is_refused() -> None:
    model = tiny_model("llama")
    facts = model_facts(text_config(model))
    made = ModelPatterns(((AShape(16, 32),) * 4,) * 3, facts)
    patch_model(model, made, **OPTIONS).remove()
    stretched = tiny_model("llama", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})
    with pytest.raises(ValueError, match="this profile is of another model: the profile was made for rope"):
        patch_model(stretched, made, **OPTIONS)


def test_a_model_without_rotations_has_none() -> None:
    assert model_facts(AutoConfig.for_model("gpt2"))["rope"] is None
