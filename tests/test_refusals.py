"""Everything that is refused: which exception, what it says, and that model and files are as they were."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tokens
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from ways import BLOCKS, LENGTH, logits

from sparseprefill import explain, huggingface, huggingface_masks, patch_model, register
from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.evals.loading import load_model
from sparseprefill.huggingface_masks import NAME
from sparseprefill.patterns import AShape, Dense, ModelPatterns, VerticalSlash, load_patterns, save_patterns

Act = Callable[[PreTrainedModel, Path], Any]

# the only types that the library raises for what it refuses
DOCUMENTED = (TypeError, ValueError, NotImplementedError, FileNotFoundError, FloatingPointError, RuntimeError)


@dataclass(frozen=True)
class Refusal:
    """`act` must raise `error` with `message`; `prepare` makes the model, and the files it reads."""

    act: Act
    error: type[Exception] | tuple[type[Exception], ...]
    message: str
    prepare: Callable[[Path], PreTrainedModel] = lambda folder: tiny_model("llama")


def patching(*args: Any, **kwargs: Any) -> Act:
    return lambda model, folder: patch_model(model, *args, **kwargs)


def calling(call: Callable[[PreTrainedModel], Any], method: Any = "dense", **kwargs: Any) -> Act:
    def act(model: PreTrainedModel, folder: Path) -> Any:
        with patch_model(model, method, **{**BLOCKS, **kwargs}):
            return call(model)

    return act


def run(model: PreTrainedModel, **inputs: Any) -> Tensor:
    return logits(model, input_ids=tokens(1, LENGTH), **inputs)


def with_profile(text: str | bytes | ModelPatterns) -> Callable[[Path], PreTrainedModel]:
    def prepare(folder: Path) -> PreTrainedModel:
        path = folder / "profile.json"
        if isinstance(text, ModelPatterns):
            save_patterns(text, path)
        elif isinstance(text, bytes):
            path.write_bytes(text)
        else:
            path.write_text(text)
        return tiny_model("llama")

    return prepare


def profiled(model: PreTrainedModel, folder: Path) -> Any:
    return patch_model(model, profile=folder / "profile.json")


def built(kind: str, **options: Any) -> Callable[[Path], PreTrainedModel]:
    return lambda folder: AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options)).eval()


def changed(change: Callable[[PreTrainedModel], Any], **options: Any) -> Callable[[Path], PreTrainedModel]:
    def prepare(folder: Path) -> PreTrainedModel:
        model = tiny_model("llama", **options)
        change(model)
        return model

    return prepare


def with_attentions(model: PreTrainedModel) -> Any:
    with torch.no_grad():
        return model(input_ids=tokens(1, LENGTH), output_attentions=True)


def a_nan(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = torch.nan


class OtherGrid:
    """A method of the user's own that answers on another grid than it was asked for."""

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        if inputs.queries < LENGTH:
            return Dense().build_index(inputs, grid)
        import dataclasses

        short = dataclasses.replace(inputs, query=inputs.query[:, :, 1:], query_start=inputs.query_start + 1)
        return Dense().build_index(short, BlockGrid.of(short, 16, 16))


def longer_keys(model: PreTrainedModel) -> None:
    """A model that hands over more keys than its mask was made for."""
    attention = model.model.layers[0].self_attn
    real = attention.forward

    class Longer:
        def update(self, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
            return torch.cat([key, key], 2), torch.cat([value, value], 2)

    attention.forward = lambda *args, **kwargs: real(*args, **{**kwargs, "past_key_values": Longer()})


def no_rows(model: PreTrainedModel) -> Tensor:
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1] = 0
    return logits(model, input_ids=tokens(2, LENGTH), attention_mask=mask)


def by_name(**options: Any) -> Act:
    return lambda model, folder: register("dense", **options)


def patched_twice(model: PreTrainedModel, folder: Path) -> Any:
    with patch_model(model, "dense"):
        return patch_model(model, "dense")


ROWS = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "n_layer": 1, "n_head": 2, "num_heads": 2}
DOGE = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip

CASES: dict[str, Refusal] = {
    # the method
    "an unknown method": Refusal(patching("vertical-slash"), ValueError, "Did you mean 'vertical_slash'"),
    "an unknown option": Refusal(patching("a_shape", windw=3), ValueError, "no option 'windw'. Did you mean 'window'"),
    "options for an object": Refusal(patching(AShape(), window=3), ValueError, "options go with a method's name"),
    "not a method": Refusal(patching(3), TypeError, "build_index"),
    "a share above 1": Refusal(patching("block_sparse", keep=1.5), ValueError, "keep as a share must be in"),
    "an empty window": Refusal(patching("a_shape", window=0), ValueError, "window must be at least 1"),
    "half a budget": Refusal(patching("vertical_slash", verticals=3), ValueError, "either verticals and slashes"),
    "a density of 0": Refusal(patching("minference", density=0.0), ValueError, "density must be in"),
    "an unknown budget": Refusal(patching("minference", budget="book"), ValueError, "budget='paper'"),
    "a budget and a density": Refusal(
        patching("minference", budget="paper", density=0.1), ValueError, "a budget or a density"
    ),
    "oblong tiles": Refusal(patching("vertical_slash", block_q=32, block_k=64), ValueError, "needs square tiles"),
    # how it is to run
    "tiles of nothing": Refusal(patching("dense", block_q=0), ValueError, "block_q must be at least 1"),
    "a negative length": Refusal(patching("dense", min_length=-1), ValueError, "min_length must be at least 0"),
    "negative samples": Refusal(patching("dense", sample_rows=-1), ValueError, "sample_rows must be at least 0"),
    "tiles of a text": Refusal(patching("dense", block_q="64"), TypeError, "block_q must be a whole number"),
    "tiles of a fraction": Refusal(patching("dense", block_k=16.5), TypeError, "block_k must be a whole number"),
    "tiles of True": Refusal(patching("dense", block_q=True), TypeError, "block_q must be a whole number"),
    "observe a text": Refusal(patching("dense", observe="no"), TypeError, "observe must be True or False"),
    "a floor above 1": Refusal(patching("dense", min_mass=1.5), ValueError, r"min_mass must be in \(0, 1\]"),
    "one dense layer": Refusal(patching("dense", dense_layers=1), TypeError, "dense_layers must be a list"),
    "layers in a list": Refusal(patching("dense", layers=["a_shape"]), TypeError, "layers must be {layer number"),
    "a layer by a text": Refusal(patching("dense", layers={"0": "a_shape"}), TypeError, "layers must be {layer number"),
    "heads without layers": Refusal(patching("dense", heads={0: "a_shape"}), TypeError, "heads must be"),
    "a layer named twice": Refusal(
        patching("dense", layers={1: "a_shape"}, dense_layers=[-2]), ValueError, "layer 1 is named twice"
    ),
    "a layer by two numbers": Refusal(
        patching("dense", layers={0: "a_shape", -3: "random"}), ValueError, "layer 0 is named twice"
    ),
    "an unknown kernel": Refusal(patching("dense", impl="gpu"), ValueError, "unknown implementation 'gpu'"),
    "layers that do not exist": Refusal(patching("dense", dense_layers=[3]), ValueError, "no attention layer 3"),
    "a method for no layer": Refusal(patching("dense", layers={7: "a_shape"}), ValueError, "no attention layer 7"),
    "heads that do not exist": Refusal(patching("dense", heads={(0, 4): "a_shape"}), ValueError, "no query head 4"),
    "a head with a profile": Refusal(
        patching("dense", heads={(0, 0): ModelPatterns(((Dense(),),))}), ValueError, "a single head takes a pattern"
    ),
    # the profile
    "no profile": Refusal(profiled, FileNotFoundError, "there is no profile at"),
    "a profile and a budget": Refusal(patching(profile="x", density=0.5), ValueError, "a profile brings its own"),
    "a profile cut short": Refusal(profiled, ValueError, "not a JSON profile", with_profile('{"schema": 2, "la')),
    "a profile in bytes": Refusal(profiled, ValueError, "is not UTF-8 text", with_profile(b"\xff\xfe\x00profile")),
    "a profile of a later schema": Refusal(profiled, ValueError, "has schema 99", with_profile('{"schema": 99}')),
    "a profile without layers": Refusal(
        profiled, ValueError, "`layers` must be a list", with_profile('{"schema": 2, "layers": {}}')
    ),
    "an unknown pattern": Refusal(
        profiled, ValueError, "layer 0, head 0: a pattern needs a `type`",
        with_profile('{"schema": 2, "layers": [[{"type": "spiral"}]]}'),
    ),
    "a profile with a bad budget": Refusal(
        profiled, ValueError, "layer 0, head 0: window must be at least 1",
        with_profile('{"schema": 2, "layers": [[{"type": "a_shape", "window": -1}]]}'),
    ),
    "a profile with other layers": Refusal(
        profiled, ValueError, "the profile has 2 layers, this model has 3",
        with_profile(ModelPatterns(((Dense(),) * 4,) * 2)),
    ),
    "a profile with other heads": Refusal(
        profiled, ValueError, "layer 0 of the profile has 5 heads, this model has 4",
        with_profile(ModelPatterns(((Dense(),) * 5,) * 3)),
    ),
    "a profile of another family": Refusal(
        profiled, ValueError, "made for architecture 'qwen2', this model has 'llama'",
        with_profile(ModelPatterns(((Dense(),) * 4,) * 3, {"architecture": "qwen2"})),
    ),
    "a profile that does not fit the tiles": Refusal(
        lambda model, folder: patch_model(model, profile=folder / "profile.json", block_q=32), ValueError,
        "needs square tiles", with_profile(ModelPatterns(((VerticalSlash(density=0.5),) * 4,) * 3)),
    ),
    "a folder for a profile": Refusal(
        lambda model, folder: load_patterns(folder), ValueError, "is a folder: name the file in it"
    ),
    # the model
    "no model": Refusal(lambda model, folder: patch_model(nn.Linear(2, 2), "dense"), TypeError, "got Linear"),
    "a class that does not dispatch": Refusal(
        patching("dense"), NotImplementedError, "BloomForCausalLM does not dispatch through", built("bloom", **ROWS)
    ),
    "a model without attention": Refusal(
        patching("dense"), NotImplementedError, "MambaForCausalLM has no causal self-attention",
        built("mamba", **ROWS),
    ),
    "a model that sees both ways": Refusal(
        patching("dense"), NotImplementedError, "BertLMHeadModel has no causal self-attention",
        built("bert", vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32),
    ),
    "double precision": Refusal(patching("dense"), NotImplementedError, "float64", changed(lambda m: m.double())),
    "triton without a GPU": Refusal(
        patching("dense", impl="triton"), NotImplementedError, "dense_layers=\\[0\\] would leave it as it is",
        changed(lambda m: m.double()),
    ),
    "output_attentions in the configuration": Refusal(
        patching("dense"), NotImplementedError, "output_attentions=True",
        changed(lambda m: setattr(m.config, "output_attentions", True)),
    ),
    "a patch over a patch": Refusal(patched_twice, ValueError, "patched already: remove the first patch"),
    "register over nothing": Refusal(by_name(previous="nothing"), ValueError, "previous must be"),
    "register over itself": Refusal(by_name(previous="sparseprefill"), ValueError, "previous must be"),
    "register with a strange option": Refusal(by_name(windw=1), ValueError, "no option 'windw'"),
    "register to observe": Refusal(by_name(sample_rows=3), ValueError, "register takes no sample_rows"),
    "our name without a method": Refusal(
        lambda model, folder: run(model), RuntimeError, "nothing was registered for it",
        changed(lambda m: setattr(m.config, "_attn_implementation", NAME)),
    ),
    "explain what is no model": Refusal(lambda model, folder: explain(folder), TypeError, "PreTrainedModel"),
    "explain for no device": Refusal(
        lambda model, folder: explain(model, device="moon"), ValueError, "there is no device 'moon'"
    ),
    "no such folder": Refusal(lambda model, folder: load_model(str(folder / "no")), ValueError, "cannot be loaded"),
    "an unknown dtype": Refusal(lambda model, folder: load_model(dtype="float8"), ValueError, "unknown dtype"),
    # the call
    "output_attentions": Refusal(
        calling(with_attentions), (NotImplementedError, ValueError), "output_attentions",
        changed(with_attentions),  # transformers installs hooks of its own the first time
    ),
    "gradients": Refusal(
        calling(lambda m: m(input_ids=tokens(1, LENGTH))), NotImplementedError, r"under torch\.no_grad"
    ),
    "dropout": Refusal(
        calling(run), NotImplementedError, r"call model\.eval", changed(lambda m: m.train(), attention_dropout=0.1)
    ),
    "a NaN": Refusal(calling(run), FloatingPointError, "layer 1 contain NaN", changed(a_nan)),
    "a row of padding only": Refusal(calling(no_rows), ValueError, "batch row 1 is padding only"),
    "a copy of a patched model": Refusal(calling(lambda m: run(copy.deepcopy(m))), RuntimeError, "patch the copy"),
    "continuous batching": Refusal(
        calling(lambda m: m.generate_batch([[5, 6]], max_new_tokens=1)), NotImplementedError, "keeps keys in pages"
    ),
    "a model that computes with its mask": Refusal(
        calling(run), NotImplementedError, "computes with its attention mask", built("doge", **DOGE)
    ),
    "keys that come after the mask": Refusal(
        calling(run), NotImplementedError, "its mask was made for 200 and 200", changed(longer_keys)
    ),
    "a method on another grid": Refusal(
        calling(run, OtherGrid()), ValueError, "the index does not belong to these inputs"
    ),
}  # fmt: skip


def fingerprint(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", CASES)
def test_refused_and_nothing_changed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    case = CASES[name]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(huggingface, "_REGISTERED", {})
    monkeypatch.setattr(huggingface_masks, "_DEFAULT", [])
    model = case.prepare(tmp_path)
    files, config, implementation = fingerprint(tmp_path), model.config, model.config._attn_implementation
    attributes = [set(vars(module)) for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(case.error, match=case.message) as raised:
        case.act(model, tmp_path)
    assert type(raised.value) in DOCUMENTED or isinstance(raised.value, NotImplementedError)
    text = str(raised.value)
    assert len(text) > 20, "says what, why and what to do"
    assert model.config is config
    assert config._attn_implementation == implementation
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    for before, after in zip(weights, model.parameters(), strict=True):
        assert torch.equal(before.nan_to_num(), after.nan_to_num())
    assert fingerprint(tmp_path) == files
    record_property("refusal", name)
    record_property("exception", type(raised.value).__name__)
    record_property("message", text.replace(str(tmp_path), "FOLDER"))


def test_a_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    save_patterns(ModelPatterns(((Dense(),),)), path)
    old = path.read_bytes()
    with pytest.raises((KeyError, TypeError, ValueError)):
        save_patterns(ModelPatterns(((Dense(),),), {"x": object()}), path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["profile.json"]
    assert json.loads(old)["schema"] == 2
