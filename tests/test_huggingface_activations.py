"""MLPs in chunks of tokens and logits of the last token alone: the same numbers, less held, nothing left behind."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tokens, with_image
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel
from ways import BLOCKS, LENGTH, WAYS, in_chunks, logits, padded

from sparseprefill import explain, patch_model, register
from sparseprefill.huggingface_activations import MLP_NAMES, mlp_of, why_no_chunks

CHUNK = 48
DENSE_MLPS = ("llama", "phi3", "gemma2", "cohere2", "lfm2", "gemma3")
ROUTED = ("qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text", "qwen3_next")


def state(model: PreTrainedModel) -> list[set[str]]:
    return [set(vars(module)) for module in model.modules()]


def agree(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    if not got.is_floating_point():
        assert torch.equal(got, expected)
    else:
        assert (got - expected).abs().max() <= 1e-3 * (expected.std() if expected.numel() > 1 else expected.abs())


def placed(name: str, ids: Tensor, value: Any) -> list[Any]:
    """Arguments of a Llama without their names, up to this one."""
    names = list(inspect.signature(LlamaForCausalLM.forward).parameters)[1:]
    return [ids, *[None] * (names.index(name) - 1), value]


def mlps(model: PreTrainedModel) -> list[nn.Module]:
    return [m for layer in model.modules() if "DecoderLayer" in type(layer).__name__ and (m := mlp_of(layer))]


class TestChunks:
    """`mlp_chunk`."""

    @pytest.mark.parametrize("family", DENSE_MLPS)
    def test_a_family_computes_the_same_in_chunks(self, family: str) -> None:
        model = tiny_model(family)
        batch = {"input_ids": tokens(2, LENGTH)} if family != "gemma3" else with_image(family, tokens(2, LENGTH))
        before, expected = state(model), logits(model, **batch)
        found = mlps(model)
        assert len(found) == 3
        seen: list[int] = []
        for mlp in found:
            first = next(inner for inner in mlp.modules() if isinstance(inner, nn.Linear))
            first.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].numel() // inputs[0].shape[-1]))
        with patch_model(model, "dense", mlp_chunk=CHUNK, **BLOCKS):
            agree(logits(model, **batch), expected)
        assert seen == [*[CHUNK] * (2 * LENGTH // CHUNK), 2 * LENGTH % CHUNK] * 3
        assert state(model) == before
        assert torch.equal(logits(model, **batch), expected)

    @pytest.mark.parametrize("way", ["generate", "chunked prefill, left padding", "labels", "output_hidden_states"])
    def test_in_other_ways_of_calling(self, way: str) -> None:
        model = tiny_model("llama")
        expected = WAYS[way].run(model, "llama")
        with patch_model(model, "dense", mlp_chunk=CHUNK, **BLOCKS):
            agree(WAYS[way].run(model, "llama"), expected)

    @pytest.mark.parametrize("way", ["PEFT adapter", "offloaded weights", "autocast", "4-bit weights"])
    def test_in_other_ways_of_loading(self, way: str) -> None:
        model = WAYS[way].make("llama")
        expected = WAYS[way].run(model, "llama")
        forwards = [vars(module).get("forward") for module in model.modules()]
        with patch_model(model, "dense", mlp_chunk=CHUNK, last_logits=True, **BLOCKS):
            got = WAYS[way].run(model, "llama")
        agree(got, expected if got.shape == expected.shape else expected[:, -1:])
        assert [vars(module).get("forward") for module in model.modules()] == forwards

    def test_in_half_precision_the_dtype_stays(self) -> None:
        model = tiny_model("llama").bfloat16()
        with patch_model(model, "dense", mlp_chunk=CHUNK, **BLOCKS), torch.no_grad():
            assert model.model(input_ids=tokens(1, LENGTH)).last_hidden_state.dtype == torch.bfloat16

    @pytest.mark.parametrize("family", ROUTED)
    def test_experts_are_refused_by_name(self, family: str) -> None:
        model = tiny_model(family)
        before, config = state(model), model.config
        with pytest.raises(NotImplementedError, match=r"routes its tokens to experts.*leave mlp_chunk out"):
            patch_model(model, "dense", mlp_chunk=CHUNK)
        assert state(model) == before
        assert model.config is config

    def test_what_is_not_known_to_take_tokens_alone_is_refused(self) -> None:
        model = tiny_model("llama")
        model.model.layers[1].mlp.act_fn = nn.Conv1d(96, 96, 3)
        with pytest.raises(NotImplementedError, match="LlamaMLP of layer 1 of LlamaForCausalLM holds a Conv1d"):
            patch_model(model, "dense", mlp_chunk=CHUNK)
        model = tiny_model("llama")
        model.model.layers[2].other = model.model.layers[2].mlp
        del model.model.layers[2].mlp
        with pytest.raises(NotImplementedError, match=f"layer 2 .* has no module called {' or '.join(MLP_NAMES)}"):
            patch_model(model, "dense", mlp_chunk=CHUNK)

        class Two(nn.Module):
            def forward(self, hidden: Tensor, gate: Tensor) -> Tensor:
                return hidden * gate

        assert "takes 2 arguments" in (why_no_chunks(Two()) or "")

    def test_an_mlp_that_gives_a_tuple_says_so(self) -> None:
        model = tiny_model("llama")
        real = type(model.model.layers[0].mlp).forward

        class Pair(type(model.model.layers[0].mlp)):  # type: ignore[misc]
            def forward(self, x: Tensor) -> Any:
                return real(self, x), None

        model.model.layers[0].mlp.__class__ = Pair
        with (
            patch_model(model, "dense", mlp_chunk=CHUNK, **BLOCKS),
            pytest.raises(NotImplementedError, match="gives a tuple and no tensor"),
        ):
            logits(model, input_ids=tokens(1, LENGTH))

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"mlp_chunk": 0}, ValueError, "at least 1 token"),
            ({"mlp_chunk": True}, TypeError, "whole number of tokens"),
            ({"mlp_chunk": 64.0}, TypeError, "whole number of tokens"),
            ({"last_logits": 1}, TypeError, "must be True or False"),
        ],
    )
    def test_what_is_no_option(self, options: dict[str, Any], error: type[Exception], message: str) -> None:
        model = tiny_model("llama")
        before = state(model)
        with pytest.raises(error, match=message):
            patch_model(model, "dense", **options)
        assert state(model) == before
        with pytest.raises(ValueError, match=f"register takes no {next(iter(options))}: there is no model yet"):
            register("dense", **options)


class TestLastLogits:
    """`last_logits`."""

    def test_only_where_the_caller_did_not_say(self) -> None:
        model, ids = tiny_model("llama"), tokens(2, LENGTH)
        before, whole = state(model), logits(model, input_ids=ids)
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss
        with patch_model(model, "dense", last_logits=True, **BLOCKS), torch.no_grad():
            agree(logits(model, input_ids=ids), whole[:, -1:])
            agree(model(ids).logits, whole[:, -1:])
            agree(logits(model, input_ids=ids, logits_to_keep=0), whole)
            agree(logits(model, input_ids=ids, logits_to_keep=7), whole[:, -7:])
            agree(model(input_ids=ids, labels=ids).loss, loss)
            agree(model(*placed("labels", ids, ids)).loss, loss)
            agree(model(*placed("logits_to_keep", ids, 5)).logits, whole[:, -5:])
            agree(in_chunks(model, {"input_ids": ids}, [90, 110]), whole[:, [89, 199]])
        assert state(model) == before
        assert torch.equal(logits(model, input_ids=ids), whole)

    @pytest.mark.parametrize("way", ["generate", "generate, assisted", "generate, beams", "pipeline"])
    def test_generation_is_the_same(self, way: str) -> None:
        model = tiny_model("llama")
        expected = WAYS[way].run(model, "llama")
        with patch_model(model, "dense", last_logits=True, mlp_chunk=CHUNK, **BLOCKS):
            assert torch.equal(WAYS[way].run(model, "llama"), expected)

    def test_left_padding(self) -> None:
        model, ids = tiny_model("llama"), tokens(2, LENGTH)
        batch = padded([ids[0], ids[1, :120]])
        expected = logits(model, **batch)[:, -1:]
        with patch_model(model, "dense", last_logits=True, **BLOCKS):
            agree(logits(model, **batch), expected)

    def test_a_model_without_logits_is_refused(self) -> None:
        model = tiny_model("llama").model
        with pytest.raises(NotImplementedError, match="LlamaModel takes no logits_to_keep"):
            patch_model(model, "dense", last_logits=True)


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_before_while_and_after() -> None:
    """Compiled and run before it is patched: what was compiled then must not be what runs."""
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", dynamic=True)
    expected = logits(compiled, input_ids=ids)
    with patch_model(compiled, "dense", mlp_chunk=CHUNK, last_logits=True, **BLOCKS), torch.no_grad():
        first = compiled(input_ids=ids, use_cache=True)
        agree(first.logits, expected[:, -1:])
        assert compiled(input_ids=ids[:, :1], past_key_values=first.past_key_values).logits.shape[1] == 1
    agree(logits(compiled, input_ids=ids), expected)


def test_a_copy_of_a_patched_model_computes_with_its_own_weights() -> None:
    model = tiny_model("llama")
    with patch_model(model, "dense", mlp_chunk=CHUNK, last_logits=True, **BLOCKS):
        twin = copy.deepcopy(model)
        ours, theirs = (m.model.layers[0].mlp for m in (model, twin))
        assert theirs.forward.args[0].__self__ is theirs
        assert twin.forward.args[0].__self__ is twin
        assert ours.forward.args[0].__self__ is ours


def test_explain_refuses_what_the_patch_would() -> None:
    model = tiny_model("gpt_oss")
    assert "routes its tokens to experts" in (explain(model, "dense", mlp_chunk=64).refused or "")
    assert explain(model, "dense", last_logits=True).refused is None
