"""`doctor` and `explain`: what would run and why, without touching the model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from test_architectures import small_config
from tiny_models import FAMILIES, tiny_model, tokens
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sparseprefill import explain, patch_model
from sparseprefill.cli import main
from sparseprefill.doctor import TESTED, skeleton
from sparseprefill.huggingface_masks import masks_of
from sparseprefill.kernels import native_build
from sparseprefill.patterns import Dense, ModelPatterns, save_patterns
from sparseprefill.prefill import describe_pattern, named_method, resolve_method

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = {"block_q": 16, "block_k": 16}


QUICK = ("llama", "gpt_oss", "llama4_text", "lfm2")


@pytest.mark.parametrize("family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_what_is_explained_is_what_runs(family: str) -> None:
    """Break-even, kernel and mask of every layer, against a run just below and one at that length."""
    model = tiny_model(family)
    asked: dict[str, Any] = {"keep": 0.1, **BLOCKS}
    attributes = [set(vars(m)) for m in model.modules()]
    found = explain(model, "block_sparse", **asked)
    assert found.refused is None
    starts = [layer.break_even for layer in found.layers if layer.break_even is not None]
    assert [set(vars(m)) for m in model.modules()] == attributes
    with patch_model(model, "block_sparse", **asked) as patch, torch.no_grad():
        for length in sorted({s + d for s in starts for d in (-1, 0)}):
            patch.reset()
            model(input_ids=tokens(1, length))
            ran = {layer.layer: layer.kernels for layer in patch.report().layers}
            for layer in found.layers:
                here = layer.break_even is not None and length >= layer.break_even
                assert ran[layer.layer] == ({layer.kernel: 1} if here else {}), (length, layer)
        described = {layer.layer: layer.pattern for layer in explain(model).layers}
        assert described == {layer.layer: layer.pattern for layer in found.layers}


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_every_architecture_is_explained_or_refused(kind: str) -> None:
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(small_config(kind))
    except Exception as error:
        pytest.skip(f"transformers makes no small {kind}: {type(error).__name__}")
    found = explain(model, "a_shape")
    assert found.refused or found.layers
    assert str(found)


def test_masks_are_named() -> None:
    def of(family: str) -> list[str]:
        return [layer.mask for layer in explain(tiny_model(family)).layers]

    assert of("llama") == ["causal"] * 3
    assert of("gemma2") == ["sliding window of 90", "causal", "sliding window of 90"]
    assert of("llama4_text") == ["chunks of 64", "causal", "chunks of 64"]
    assert of("mistral") == ["sliding window of 70"] * 3
    hybrid = explain(tiny_model("lfm2"))
    assert [layer.layer for layer in hybrid.layers] == [1]
    assert any("layers 0, 2 have no attention" in note for note in hybrid.notes)


def test_a_patched_model_is_explained_as_it_is() -> None:
    model = tiny_model("llama")
    with patch_model(model, "a_shape", sink=16, window=32, dense_layers=[1], min_length=300, **BLOCKS):
        found = explain(model)
        assert found.state == "patched with a_shape"
        assert [layer.pattern for layer in found.layers][1] == "dense"
        assert [layer.break_even for layer in found.layers] == [300, None, 300]
        with pytest.raises(ValueError, match="this model is patched"):
            explain(model, "random")
        with pytest.raises(ValueError, match="this model is patched"):
            explain(model, impl="reference")
        model.set_attn_implementation("sdpa")
        assert any("switched to 'sdpa' after" in note for note in explain(model).notes)
    assert explain(model).state == "not patched"


def test_why_not_another_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = explain(tiny_model("llama"))
    assert {layer.kernel for layer in found.layers} == {"cpu"}
    assert "on the CPU" in found.layers[0].why_not["triton"]
    assert found.layers[0].why_not["reference"] == "it is never chosen by itself, impl='reference' asks for it"
    oracle = explain(tiny_model("llama"), impl="reference")
    assert oracle.layers[0].kernel == "reference"
    assert oracle.layers[0].why_not["cpu"] == "impl='reference' was asked for"


def test_what_patch_model_would_refuse_is_said() -> None:
    found = explain(tiny_model("llama").double())
    assert found.refused is not None
    assert "float64" in found.refused
    assert found.layers == ()
    with pytest.raises(ValueError, match="unknown method"):
        explain(tiny_model("llama"), "nothing")
    with pytest.raises(ValueError, match="there is no device 'moon'"):
        explain(tiny_model("llama"), device="moon")
    with pytest.raises(TypeError, match="PreTrainedModel, got int"):
        explain(3)


def test_masks_are_asked_without_touching_the_model() -> None:
    model = tiny_model("gemma2")
    masks = masks_of(model, 64)
    assert {name: mask.window for name, mask in masks.items()} == {"sliding_attention": 90, "full_attention": None}
    assert model.config._attn_implementation == "eager"


class TestCommand:
    """`sparseprefill doctor`."""

    def test_the_model_inside(self) -> None:
        done = CliRunner().invoke(main, ["doctor"])
        assert done.exit_code == 0, done.output
        name, options = named_method(None, None, {})
        default = re.escape(describe_pattern(resolve_method(name, **options)))
        assert re.search(rf"0-3 +causal +{default} +cpu", done.output)

    def test_json_of_a_folder(self, tmp_path: Path) -> None:
        tiny_model("gpt_oss").config.save_pretrained(tmp_path)  # no weights are needed
        done = CliRunner().invoke(main, ["doctor", str(tmp_path), "--method", "a_shape:sink=64,window=256", "--json"])
        assert done.exit_code == 0, done.output
        found = json.loads(done.output)
        assert [layer["mask"] for layer in found["layers"]] == ["causal", "sliding window of 80", "causal"]
        assert found["layers"][0]["pattern"] == "AShape(sink=64, window=256)"

    def test_a_vision_language_model(self, tmp_path: Path) -> None:
        tiny_model("qwen2_5_vl").config.save_pretrained(tmp_path)
        assert type(skeleton(str(tmp_path))).__name__ == "Qwen2_5_VLForConditionalGeneration"

    def test_profile(self, tmp_path: Path) -> None:
        tiny_model("llama").config.save_pretrained(tmp_path)
        save_patterns(ModelPatterns(((Dense(),) * 4,) * 2), tmp_path / "profile.json")
        done = CliRunner().invoke(
            main, ["doctor", str(tmp_path), "--method", f"minference:profile={tmp_path}/profile.json"]
        )
        assert done.exit_code == 1
        assert "profile is of another model: the profile has 2 layers, this model has 3" in done.output

    def test_refusals(self, tmp_path: Path) -> None:
        for arguments, message in (
            ([str(tmp_path / "none")], "no model can be made of"),
            (["--device", "moon"], "there is no device 'moon'"),
            (["--method", "a_shape:window=0"], "window must be at least 1"),
            (["--impl", "gpu"], "unknown implementation 'gpu'"),
        ):
            done = CliRunner().invoke(main, ["doctor", *arguments])
            assert done.exit_code == 1
            assert message in done.output
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 10**9}))
        done = CliRunner().invoke(main, ["doctor", str(tmp_path)])
        assert "claims num_hidden_layers" in done.output
        (tmp_path / "config.json").write_text(
            json.dumps({"model_type": "bloom", "n_layer": 1, "hidden_size": 8, "n_head": 2})
        )
        done = CliRunner().invoke(main, ["doctor", str(tmp_path)])
        assert done.exit_code == 1
        assert "refused    BloomForCausalLM does not dispatch through" in done.output


class TestNative:
    def test_it_is_shown(self, native: Path) -> None:
        found = native_build.built()
        assert found is not None
        shown = explain(tiny_model("llama"))
        assert f"\nnative     built for {found[1].instructions}: {found[0]}\n" in str(shown)
        assert shown.to_dict()["native"] == shown.native

    def test_methods_that_skip_tiles_are_served_by_what_can(self, native: Path) -> None:
        """The native kernel decides for 64 queries at a time: with longer rows another one runs, and is named."""
        long = {"block_q": 128, "block_k": 64, "min_length": 0}
        for method, block_q, kernel in (("skip_softmax", 64, "native"), ("skip_softmax", 128, "cpu"),
                                        ("a_shape", 128, "native")):  # fmt: skip
            layer = explain(tiny_model("llama"), method, **{**long, "block_q": block_q}).layers[0]
            assert layer.kernel == kernel
        why = explain(tiny_model("llama"), "skip_softmax", **long).layers[0].why_not
        assert "rows of at most 64 queries" in why["native"]
        model = tiny_model("llama")
        with pytest.raises(NotImplementedError, match="rows of at most 64 queries"):
            patch_model(model, "skip_softmax", impl="native", **long)
        with patch_model(model, "skip_softmax", **long) as patch, torch.no_grad():
            model(tokens(1, 300))
            assert patch.report().layers[0].kernels == {"cpu": 1}

    def test_so_are_wrappers_of_such_methods(self, native: Path) -> None:
        """`pbs` leaves a prompt of one segment as it is, and skips in longer ones."""
        options = {"inner": "skip_softmax", "block_q": 128, "block_k": 64, "min_length": 0}
        model = tiny_model("llama")
        assert explain(model, "pbs", **options).layers[0].kernel == "cpu"
        with pytest.raises(NotImplementedError, match="rows of at most 64 queries"):
            patch_model(model, "pbs", impl="native", **options)
        with patch_model(model, "pbs", **options) as patch, torch.no_grad():
            model(tokens(1, 600))
            assert patch.report().layers[0].kernels == {"cpu": 1}

    def test_a_local_layer_skips_nothing(self, native: Path) -> None:
        """It computes its whole window, whatever the method."""
        long = {"block_q": 128, "block_k": 64, "min_length": 0}
        kernels = {layer.mask: layer.kernel for layer in explain(tiny_model("gemma2"), "skip_softmax", **long).layers}
        assert kernels == {mask: "native" if "window" in mask else "cpu" for mask in kernels}
        assert len(kernels) == 2
        model = tiny_model("mistral")
        with patch_model(model, "skip_softmax", impl="native", **long) as patch, torch.no_grad():
            model(tokens(1, 300))
            assert patch.report().layers[0].kernels == {"native": 1}

    def test_why_not_is_shown(self) -> None:
        assert "\nnative     it is not built: run `sparseprefill build-cpu`" in str(explain(tiny_model("llama")))


def test_the_range_that_is_called_tested_is_that_of_the_constraints() -> None:
    pinned = [re.search(r"^transformers==(.+)$", (ROOT / name).read_text(), re.MULTILINE)[1] for name in (
        "constraints-oldest.txt", "constraints.txt")]  # fmt: skip
    assert tuple(pinned) == TESTED
