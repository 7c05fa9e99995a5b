"""Every family, called in every way: right, or refused by name. `make support` prints the table of these cells."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, served_layers, tiny_config, tiny_model, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from ways import BLOCKS, LENGTH, OLD, WAYS, Way, logits

from sparseprefill import patch_model
from sparseprefill.doctor import TESTED
from sparseprefill.evals.loading import provenance

# what transformers itself does not do: (family or *, way) and the pattern of what it says then
NOT_IN_TRANSFORMERS: dict[tuple[str, str], str] = {
    ("*", "generate, prefill_chunk_size"): "Cannot use prefill chunking without a cache",  # 5.0
    ("*", "generate, assisted"): "Cannot `crop`|assisted generation is not supported",
    ("*", "generate, prompt lookup"): "Cannot `crop`|assisted generation is not supported",
    ("*", "4-D bool mask"): "does not support an attention implementation",  # over sdpa
    ("*", "over sdpa"): "does not support an attention implementation",
    ("deepseek_v3", "8-bit weights"): r"The size of tensor a \(\d+\) must match the size of tensor b \(\d+\)",
    ("*", "over flex_attention"): "does not support an attention implementation|sinks cannot be run on CPU",
}

# the same, of the oldest release alone
if OLD:
    NOT_IN_TRANSFORMERS |= {
        ("llama4_text", "8-bit weights"): "too many values to unpack",
        ("llama4_text", "4-bit weights"): "N must be divisible by block_n",
        ("qwen3_next", "static cache"): "no attribute 'has_previous_state'",
        ("qwen3_next", "quantized cache"): "no attribute 'has_previous_state'",
        ("*", "torch.compile"): "Dynamo failed to run FX node with fake tensors",  # grouped experts
        ("lfm2", "chunked prefill, left padding"): "must match the size of tensor",
        ("lfm2", "several turns, left padding"): "must match the size of tensor",
        ("lfm2", "static cache"): "no attribute 'conv_cache'",
        ("lfm2", "quantized cache"): "no attribute 'conv_cache'",
        ("qwen2_5_vl", "inputs_embeds"): "'NoneType' object has no attribute 'shape'",
        ("qwen2_5_vl", "4-D float mask"): "the number of sizes provided",
        ("qwen2_5_vl", "4-D bool mask"): "does not support an attention implementation|the number of sizes provided",
    }

# stock implementations that are not what eager is: the prefill is ours and right, decoding is theirs
STOCK_DIFFERS: dict[tuple[str, str], str] = {
    ("gemma2", "over sdpa"): "sdpa drops the soft-cap",  # 5.0, where it is allowed
}

# ways in which the stock model of the oldest release gives something else each time, so that nothing can be compared:
# a convolution that goes on from a cache with several tokens writes one slot several times, in no order
VARIES = {("lfm2", "chunked prefill"), ("lfm2", "cached prefix")} if OLD else set()

QUICK_WAYS = ("one prompt", "batch, left padding", "chunked prefill", "generate")
SLOW_WAYS = ("torch.compile",)


def cells() -> list[Any]:
    """All (family, way); the quick run takes all ways of one family, and some ways of all."""
    table = []
    for family in FAMILIES:
        for name, way in WAYS.items():
            if way.only is not None and family not in way.only:
                continue
            quick = (family == "llama" or name in QUICK_WAYS or bool(way.only)) and name not in SLOW_WAYS
            marks = [] if quick else [pytest.mark.slow]
            if way.gpu:
                marks.append(pytest.mark.gpu)
            table.append(pytest.param(family, name, marks=marks, id=f"{family}-{name}"))
    return table


def agree(got: Tensor, expected: Tensor) -> None:
    """Token ids exactly; float32 through a whole model to a thousandth of the spread of what is compared."""
    assert got.shape == expected.shape
    if not got.is_floating_point():
        assert torch.equal(got, expected)
        return
    assert not got.isnan().any()
    scale = expected.std() if expected.numel() > 1 else expected.abs()
    assert (got - expected).abs().max() <= 1e-3 * scale, (
        f"off by {(got - expected).abs().max() / scale:.1e} of the spread"
    )


def known_limit(table: dict[tuple[str, str], str], family: str, name: str) -> str | None:
    return table.get((family, name), table.get(("*", name)))


def without_patch(way: Way, family: str) -> Tensor | Exception:
    """What the way gives on the stock model, or what it raises."""
    try:
        return way.run(way.make(family), family)
    except Exception as error:
        return error


@pytest.mark.parametrize(("family", "name"), cells())
def test_right_or_refused(family: str, name: str, record_property: Callable[[str, object], None]) -> None:
    way = WAYS[name]
    record_property("family", family)
    record_property("way", name)
    stock = without_patch(way, family) if way.oracle is None else None
    limit = known_limit(NOT_IN_TRANSFORMERS, family, name)
    if limit is not None and way.oracle is not None:
        stock = without_patch(way, family)
    if isinstance(stock, Exception):
        assert limit is not None, f"the stock model raises {stock!r}"
        said = re.search(limit, str(stock))
        assert said, stock
        record_property("verdict", f"transformers: {said[0]}")
        return
    expected = way.oracle(family) if way.oracle is not None else stock
    assert isinstance(expected, Tensor)
    model = way.make(family)
    with patch_model(model, "dense", **BLOCKS) as patch:
        got = way.run(model, family)
        report = patch.report()
    ours = way.ours and family not in way.elsewhere
    assert (report.sparse_calls >= served_layers(family)) == ours, report
    if not ours:
        assert report.previous_calls, "what runs elsewhere is counted"
    if (family, name) in VARIES:
        assert got.isfinite().all()
        record_property("verdict", "transformers: the stock model gives something else each time")
        return
    differs = STOCK_DIFFERS.get((family, name)) if OLD else None
    if differs is not None:
        agree(got[:, :LENGTH], expected[:, :LENGTH])
        alone = way.run(way.make(family), family)
        assert (alone - expected).abs().max() > 0.1 * expected.std(), "the stock implementation differs no more"
        record_property("verdict", f"right in the prefill; {differs}")
        return
    agree(got, expected)
    if name in ("autocast", "bfloat16"):
        record_property("verdict", "served")
        return
    record_property("verdict", "right" if ours else "right, on the previous implementation")


# --- refused by name --------------------------------------------------------------------------------------------------


def _continuous_batching(model: PreTrainedModel, family: str) -> None:
    model.generate_batch([tokens(1, 50)[0].tolist()], max_new_tokens=2)


def _patch_over_patch(model: PreTrainedModel, family: str) -> None:
    patch_model(model, "dense")


def _output_attentions(model: PreTrainedModel, family: str) -> None:
    logits(model, input_ids=tokens(1, LENGTH), output_attentions=True)


def _gradients(model: PreTrainedModel, family: str) -> None:
    model(input_ids=tokens(1, LENGTH))


def _a_row_of_padding(model: PreTrainedModel, family: str) -> None:
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1] = 0
    logits(model, input_ids=tokens(2, LENGTH), attention_mask=mask)


def _a_copy(model: PreTrainedModel, family: str) -> None:
    logits(copy.deepcopy(model), input_ids=tokens(1, 8))


Refusal = tuple[Callable[[PreTrainedModel, str], None], type[Exception] | tuple[type[Exception], ...], str]
REFUSED: dict[str, Refusal] = {
    "continuous batching": (_continuous_batching, NotImplementedError, "keeps keys in pages"),
    "patch over patch": (_patch_over_patch, ValueError, "is patched already"),
    "output_attentions": (_output_attentions, (NotImplementedError, ValueError), "output_attentions"),
    "gradients": (_gradients, NotImplementedError, r"under torch\.no_grad"),
    "a row of padding only": (_a_row_of_padding, ValueError, "batch row 1 is padding only"),
    "a copy of a patched model": (_a_copy, RuntimeError, "patch the copy"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(
            family, name, marks=[] if family in ("llama", "lfm2") else [pytest.mark.slow], id=f"{family}-{name}"
        )
        for family in FAMILIES
        for name in REFUSED
    ],
)
def test_refused_by_name(family: str, name: str, record_property: Callable[[str, object], None]) -> None:
    call, error, message = REFUSED[name]
    record_property("family", family)
    record_property("way", name)
    model, ids = tiny_model(family), tokens(1, LENGTH)
    before = logits(model, input_ids=ids)
    with patch_model(model, "dense", **BLOCKS):
        with pytest.raises(error, match=message):
            call(model, family)
        agree(logits(model, input_ids=ids), before)  # it goes on working
    assert torch.equal(logits(model, input_ids=ids), before)
    record_property("verdict", f"refused: {message}".replace("\\", ""))


# --- two models, one configuration ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [f if f == "llama" else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_two_patched_models_of_one_config(family: str, record_property: Callable[[str, object], None]) -> None:
    record_property("family", family)
    record_property("way", "two models, one config")
    first = tiny_model(family)
    second = type(first)(first.config).eval()
    assert second.config is first.config
    ids = tokens(1, LENGTH)
    alone = [logits(model, input_ids=ids) for model in (first, second)]
    with patch_model(first, "dense", **BLOCKS) as one:
        assert torch.equal(logits(second, input_ids=ids), alone[1])
        with patch_model(second, "dense", **BLOCKS) as two:
            agree(logits(first, input_ids=ids), alone[0])
            agree(logits(second, input_ids=ids), alone[1])
            assert one.report().sparse_calls == two.report().sparse_calls == served_layers(family)
        assert torch.equal(logits(second, input_ids=ids), alone[1])
    record_property("verdict", "right")


# --- the table can fail: each thing that makes a family special, dropped ----------------------------------------------


def _drop(field: str, value: Any = None) -> Callable[[pytest.MonkeyPatch, PreTrainedModel], None]:
    """The seam forgets one field of the inputs."""

    def mutate(patch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
        from sparseprefill import huggingface

        real = huggingface.AttentionInputs
        patch.setattr(huggingface, "AttentionInputs", lambda *args, **fields: real(*args, **{**fields, field: value}))

    return mutate


def _drop_norm(names: tuple[str, ...]) -> Callable[[pytest.MonkeyPatch, PreTrainedModel], None]:
    """As a seam does that copies `forward` and forgets the norm of queries and keys."""

    def mutate(patch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
        found = [module for name, module in model.named_modules() if name.rpartition(".")[2] in names]
        assert found
        for module in found:
            patch.setattr(module, "forward", lambda x: x)

    return mutate


def _ignore_padding(patch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    _drop("key_valid")(patch, model)


QK_NORM = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "qk_norm")
MUTATIONS: dict[tuple[str, str], tuple[str, Callable[[pytest.MonkeyPatch, PreTrainedModel], None]]] = {
    ("gemma2", "soft-cap"): ("one prompt", _drop("softcap")),
    ("gemma2", "window"): ("one prompt", _drop("window")),
    ("gemma2", "scale"): ("one prompt", _drop("scale", 0.25)),
    ("gemma3_text", "window"): ("one prompt", _drop("window")),
    ("gemma3_text", "QK-norm"): ("one prompt", _drop_norm(QK_NORM)),
    ("gemma3", "window"): ("one prompt", _drop("window")),
    ("mistral", "window"): ("one prompt", _drop("window")),
    ("cohere2", "window"): ("one prompt", _drop("window")),
    ("gpt_oss", "window"): ("one prompt", _drop("window")),
    ("gpt_oss", "sinks"): ("one prompt", _drop("sinks")),
    ("llama4_text", "chunks"): ("one prompt", _drop("segment")),
    ("llama4_text", "QK-norm"): ("one prompt", _drop_norm(QK_NORM)),
    ("qwen3", "QK-norm"): ("one prompt", _drop_norm(QK_NORM)),
    ("qwen3_moe", "QK-norm"): ("one prompt", _drop_norm(QK_NORM)),
    ("olmo2", "QK-norm"): ("one prompt", _drop_norm(QK_NORM)),
    ("qwen3_next", "QK-norm"): ("one prompt", _drop_norm(QK_NORM)),
    ("lfm2", "QK-norm"): ("one prompt", _drop_norm(QK_NORM)),
    ("granite", "scale"): ("one prompt", _drop("scale", 0.25)),
    ("llama", "padding"): ("batch, left padding", _drop("key_valid")),
    ("llama", "packing"): ("packed sequences", _drop("segment")),
    ("llama", "offset"): ("chunked prefill", _drop("query_start", 0)),
    ("llama", "filled slots"): ("static cache", _drop("query_start", 0)),
}  # fmt: skip


@pytest.mark.parametrize(("family", "dropped"), MUTATIONS, ids=[f"{f}-{d}" for f, d in MUTATIONS])
def test_dropping_what_makes_a_family_special_is_seen(
    family: str, dropped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, mutate = MUTATIONS[family, dropped]
    way, model = WAYS[name], tiny_model(family)
    expected = way.run(model, family)
    with patch_model(model, "dense", **BLOCKS):
        agree(way.run(model, family), expected)
        mutate(monkeypatch, model)
        with pytest.raises((AssertionError, ValueError)):
            agree(way.run(model, family), expected)


def test_versions_of_the_table(record_property: Callable[[str, object], None]) -> None:
    versions = provenance()["versions"]
    record_property("versions", json.dumps(versions))
    assert versions["transformers"] in TESTED


def test_the_page_has_every_family_and_way() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "support.md").read_text(encoding="utf-8")
    head = next(line for line in page.split("\n") if line.startswith("| way of calling"))
    assert [cell.strip() for cell in head.strip("|").split("|")][1:] == list(FAMILIES)
    rows = set(re.findall(r"^\| ([^|]+?) +\|", page, flags=re.MULTILINE))
    assert not {*WAYS, *REFUSED, "two models, one config"} - rows, "run `make support`"


def test_the_table_has_every_family_the_project_names() -> None:
    assert len(FAMILIES) >= 18
    assert all(tiny_config(family).get_text_config().num_hidden_layers == 3 for family in FAMILIES)
    assert isinstance(tiny_model("llama"), AutoModelForCausalLM.from_config(tiny_config("llama")).__class__)
