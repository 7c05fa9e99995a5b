"""Fidelity without a task: every number against the direct formula over full logits, and against what must hold."""

from __future__ import annotations

import functools
import gc
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM, PreTrainedModel

from sparseprefill.evals import logits as chunked
from sparseprefill.evals.fidelity import Fidelity
from sparseprefill.evals.layer_errors import decoder_layers, hidden_errors, hidden_rows, own_errors, sampled_places
from sparseprefill.evals.loading import load_model
from sparseprefill.evals.logits import OutputHead, compare_next_tokens
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.evals.tasks import Answer, Attempt, peak_memory, reset_peak_memory
from sparseprefill.huggingface import patch_model
from sparseprefill.huggingface_modules import attention_modules, text_config

DENSE = MethodSpec("dense")
A_SHAPE = MethodSpec("a_shape", {"sink": 32, "window": 64})
EVERYTHING = MethodSpec("block_sparse", {"keep": 1.0})
RANDOM = MethodSpec("random", {"keep": 0.3})
LENGTH = 320


class Letters:
    """A tokenizer with a token a character, and one before a text where there is a beginning."""

    def __init__(self, vocabulary: int = 90, beginning: int | None = None) -> None:
        self.vocabulary, self.beginning = vocabulary, beginning

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        ids = [3 + ord(letter) % self.vocabulary for letter in text]
        return {"input_ids": [self.beginning, *ids] if add_special_tokens and self.beginning is not None else ids}


def attempted(
    model: PreTrainedModel, task: Fidelity, spec: MethodSpec, shared: dict[str, Any] | None = None, **fields: Any
) -> tuple[Attempt, list[Answer]]:
    prompt = task.prepare(task.plan()[0])
    attempt = Attempt(model, task.tokenizer, prompt, spec, shared={} if shared is None else shared, **fields)
    return attempt, task.run(attempt)


def mean(answers: list[Answer], metric: str) -> float:
    counts = [stop - start for start, stop in (answer.details["positions"] for answer in answers)]
    return sum(a.values[metric] * n for a, n in zip(answers, counts, strict=True)) / sum(counts)


def full_logits(model: PreTrainedModel, ids: Tensor, spec: MethodSpec) -> Tensor:
    with torch.no_grad(), spec.applied(model, min_length=0):
        return model(input_ids=ids).logits[0].double()


# family: what its forward does behind the body, with values at which leaving it out would show
HEADS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 0.05},
    "cohere2": {"logit_scale": 7.0},
    "granite": {"logits_scaling": 0.1},
    "gpt_oss": {},
    "deepseek_v3": {},
    "qwen3_next": {},
    "llama4_text": {},
    "gemma3": {},
    "qwen2_5_vl": {},
}


@pytest.mark.parametrize(
    "family", [name if name in ("llama", "gemma2") else pytest.param(name, marks=pytest.mark.slow) for name in HEADS]
)
def test_every_number_is_the_direct_formula_over_full_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK_NUMBERS", 128 * 37)  # chunks that end nowhere in particular
    model = tiny_model(family, **HEADS[family])
    task = Fidelity(Letters(), [LENGTH], windows=1)
    _, answers = attempted(model, task, A_SHAPE)
    ids = torch.tensor([task.prepare("320/0").token_ids])
    dense, sparse = (full_logits(model, ids, spec)[:-1].log_softmax(-1) for spec in (DENSE, A_SHAPE))
    kl = torch.nn.functional.kl_div(sparse, dense, reduction="none", log_target=True).sum(-1)
    same = (dense.argmax(-1) == sparse.argmax(-1)).double()
    assert kl.mean() > 1e-9, "the method changes nothing, so nothing is compared"
    for part, answer in enumerate(answers):
        where = slice(319 * part // 4, 319 * (part + 1) // 4)
        loss = [torch.nn.functional.nll_loss(each[where], ids[0, 1:][where]).item() for each in (sparse, dense)]
        got = answer.values
        assert got["kl"] == pytest.approx(kl[where].mean().item(), rel=1e-3, abs=1e-9)
        assert got["agreement"] == pytest.approx(same[where].mean().item(), abs=0.02)
        assert [got["nll"], got["dense_nll"]] == pytest.approx(loss, abs=1e-6)
        assert got["perplexity_ratio"] == pytest.approx(math.exp(loss[0] - loss[1]), abs=1e-5)
    assert mean(answers, "nll") == pytest.approx(
        torch.nn.functional.cross_entropy(full_logits(model, ids, A_SHAPE)[:-1], ids[0, 1:]).item(), abs=1e-6
    )


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "lfm2", "qwen3_moe", "mistral"])
def test_everything_kept_is_dense(family: str) -> None:
    _, answers = attempted(tiny_model(family), Fidelity(Letters(), [LENGTH], windows=1), EVERYTHING)
    for answer in answers:
        got = answer.values
        assert got["kl"] < 1e-6
        assert got["agreement"] == 1
        assert got["perplexity_ratio"] == pytest.approx(1, abs=1e-5)
        assert got["kept_mass"] == pytest.approx(1, abs=1e-5)
        assert max(*answer.details["layer_errors"].values(), *answer.details["hidden_errors"]) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_is_not_different_from_itself(dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    _, answers = attempted(model, Fidelity(Letters(), [LENGTH], windows=1), DENSE)
    for answer in answers:
        got = answer.values
        assert (got["kl"], got["agreement"], got["perplexity_ratio"], got["kept_mass"]) == (0, 1, 1, 1)
        assert (got["layer_error"], got["hidden_error"]) == (0, 0)
        assert got["nll"] == got["dense_nll"] > 0
        assert answer.details["looks_ahead"] is False


def test_bfloat16_models_are_compared_in_float64() -> None:
    model = tiny_model("gemma2", final_logit_softcapping=0.05).to(torch.bfloat16)
    task = Fidelity(Letters(), [LENGTH], windows=1)
    _, answers = attempted(model, task, A_SHAPE)
    ids = torch.tensor([task.prepare("320/0").token_ids])
    dense, sparse = (full_logits(model, ids, spec)[:-1].log_softmax(-1) for spec in (DENSE, A_SHAPE))
    kl = (dense.exp() * (dense - sparse)).sum(-1).mean().item()
    assert mean(answers, "kl") == pytest.approx(kl, rel=0.02)
    assert 0 < mean(answers, "layer_error") < 2


def test_parts_that_the_window_covers_do_not_diverge() -> None:
    """An A-shape of 32 + 64 tokens, in blocks of 64, is dense for the first 128 tokens of 640: one part of five."""
    task = Fidelity(Letters(), [640], windows=1, buckets=5)
    _, answers = attempted(tiny_model("llama"), task, A_SHAPE)
    first, *others = answers
    assert first.values["kl"] < 1e-9
    assert max(first.details["layer_errors"].values()) < 1e-5
    assert all(answer.values["kl"] > 1e-7 and answer.values["layer_error"] > 0.01 for answer in others)
    assert all(answer.values["hidden_error"] > 0 for answer in others)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_next", "deepseek_v3"])
def test_own_errors_are_those_of_single_layers_patched_alone(family: str) -> None:
    """With only layer n sparse, every layer up to it has dense inputs: its output against dense is its own error."""
    model = tiny_model(family)
    ids = torch.randint(3, 100, (1, LENGTH), generator=torch.Generator().manual_seed(5))
    edges = [0, 100, LENGTH]
    modules = attention_modules(model, text_config(model))
    outputs: dict[int, Tensor] = {}

    def caught(number: int) -> Any:
        return lambda module, arguments, output: outputs.__setitem__(number, output[0][0].double())

    hooks = [module.register_forward_hook(caught(number)) for number, module in modules.items()]
    with torch.no_grad():
        model(input_ids=ids)
        dense = dict(outputs)
        alone = {}
        for number in modules:
            with patch_model(
                model, "a_shape", sink=32, window=64, min_length=0, dense_layers=[n for n in modules if n != number]
            ):
                model(input_ids=ids)
            alone[number] = outputs[number]
    for hook in hooks:
        hook.remove()
    head = OutputHead(model)
    found = own_errors(head, A_SHAPE, ids, edges, min_length=0)
    assert list(found.errors) == sorted(modules)
    for number, errors in found.errors.items():
        for part, error in enumerate(errors):
            rows = slice(edges[part], edges[part + 1])
            apart, size = (alone[number] - dense[number])[rows].norm(), dense[number][rows].norm()
            assert error == pytest.approx((apart / size).item(), rel=1e-3, abs=1e-5)
    assert max(max(errors) for errors in found.errors.values()) > 0.01
    assert found.report.kept_mass is not None
    assert torch.allclose(found.final.states, head.run(ids).states, atol=1e-3)


def test_hidden_errors_are_those_of_all_hidden_states() -> None:
    model = tiny_model("llama")
    ids = torch.randint(3, 100, (1, LENGTH), generator=torch.Generator().manual_seed(5))
    places = sampled_places([0, 10, LENGTH], 10_000)
    assert [len(each) for each in places] == [10, LENGTH - 10]
    kept, states = [], []
    for spec in (DENSE, A_SHAPE):
        with torch.no_grad(), hidden_rows(decoder_layers(model), places) as rows, spec.applied(model, min_length=0):
            out = model.model(input_ids=ids, output_hidden_states=True)
        kept.append(rows)
        states.append(out.hidden_states)
    errors = hidden_errors(*kept)
    assert [len(each) for each in errors] == [3, 3]
    for layer in (0, 1):  # transformers gives the last one behind the final norm
        dense, sparse = (each[layer + 1][0] for each in states)
        for part, where in enumerate(places):
            want = (sparse[where] - dense[where]).norm() / dense[where].norm()
            assert errors[part][layer] == pytest.approx(want.item(), rel=1e-4, abs=1e-7)


def test_kept_mass_is_the_reports_on_dense_inputs() -> None:
    """One attention layer has dense inputs in either pass, so there the report of the run itself says the same."""
    model = tiny_model("lfm2")
    attempt, answers = attempted(model, Fidelity(Letters(), [LENGTH], windows=1), A_SHAPE, observe=True)
    assert attempt.report is not None
    assert 0 < attempt.report.kept_mass < 1
    assert answers[0].values["kept_mass"] == pytest.approx(attempt.report.kept_mass, abs=1e-6)


def test_the_dense_run_is_made_once_and_kept_by_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    runs = []
    run = OutputHead.run
    monkeypatch.setattr(OutputHead, "run", lambda head, ids: runs.append(head) or run(head, ids))
    task = Fidelity(Letters(), [LENGTH], windows=1)
    shared: dict[str, Any] = {}
    attempted(model, task, DENSE, shared)
    assert len(runs) == 1
    _, first = attempted(model, task, A_SHAPE, shared)
    assert len(runs) == 3  # itself, and its layers on dense inputs
    _, again = attempted(model, task, A_SHAPE)  # dense was not run before
    assert len(runs) == 6
    assert [a.values for a in first] == [a.values for a in again]
    kept = weakref.ref(next(iter(shared.values())).final.states)
    runs.clear()
    shared.clear()
    gc.collect()
    assert kept() is None


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama")
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    attempted(model, Fidelity(Letters(), [LENGTH], windows=1), A_SHAPE)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks


@pytest.mark.slow
def test_logits_of_all_positions_are_never_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full float32 logits would take 410 MB here, and their comparison in float64 several times as much."""
    monkeypatch.setattr(chunked, "CHUNK_NUMBERS", 1 << 19)
    model = tiny_model("llama", vocab_size=100_000, num_hidden_layers=1)
    task = Fidelity(Letters(), [1024], windows=1)
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = function(*args, **(kwargs or {}))
            if isinstance(output, Tensor):
                largest[0] = max(largest[0], output.numel())
            return output

    with Watch():
        attempted(model, Fidelity(Letters(), [256], windows=1), A_SHAPE)
    assert largest[0] == 64 * 100_000, "nothing but the weights of the head itself is larger than a chunk"
    gc.collect()
    reset_peak_memory(model.device)
    before = peak_memory(model.device)
    attempted(model, task, A_SHAPE)
    after = peak_memory(model.device)
    if before is not None and after is not None:
        assert after - before < 200e6


@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_what_the_forward_does_behind_the_head_is_not_guessed(family: str) -> None:
    model = tiny_model(family, **HEADS[family])
    head = OutputHead(model)
    final = head.run(torch.arange(3, 67)[None])
    head.check(final)
    with torch.no_grad():
        bare = model.lm_head(final.states[final.places])
    assert not torch.allclose(bare, final.logits, rtol=0.1)


class _Mixing(LlamaForCausalLM):
    """Its logits are more than a function of one position's hidden states."""

    def forward(self, input_ids: Tensor, logits_to_keep: Any = 0, **options: Any) -> Any:
        output = super().forward(input_ids=input_ids, logits_to_keep=logits_to_keep, **options)
        output.logits = output.logits + 0.1 * input_ids.shape[1]
        return output


def test_a_model_whose_logits_cannot_be_made_in_chunks_is_refused() -> None:
    model = tiny_model("llama")
    model.__class__ = _Mixing
    with pytest.raises(NotImplementedError, match="logits of some positions alone differ"):
        attempted(model, Fidelity(Letters(), [LENGTH], windows=1), DENSE)


def test_models_that_return_tuples_are_compared_too() -> None:
    task = Fidelity(Letters(), [LENGTH], windows=1)
    model = tiny_model("granite", **HEADS["granite"])
    _, want = attempted(model, task, A_SHAPE)
    model.forward = functools.partial(_as_tuple, model)
    _, got = attempted(model, task, A_SHAPE)
    assert [answer.values for answer in got] == [answer.values for answer in want]


def _as_tuple(model: PreTrainedModel, input_ids: Tensor, logits_to_keep: Any = 0, **options: Any) -> Any:
    return type(model).forward(model, input_ids=input_ids, logits_to_keep=logits_to_keep, return_dict=False, **options)


def test_models_without_an_output_head_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="load it as a causal LM"):
        OutputHead(tiny_model("llama").model)


def test_nan_is_an_error() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    with pytest.raises((FloatingPointError, NotImplementedError)):
        attempted(model, Fidelity(Letters(), [LENGTH], windows=1), DENSE)
    head = OutputHead(tiny_model("llama"))
    ids = torch.arange(3, 67)[None]
    states = head.run(ids).states
    broken = states.clone()
    broken[11] = float("nan")
    with pytest.raises(FloatingPointError, match="position 11"):
        compare_next_tokens(head, ids, states, broken)


def test_tokens_without_any_probability_add_nothing() -> None:
    """A vocabulary padded with -inf, as some models have it."""
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(
        lambda module, arguments, output: output.masked_fill(torch.arange(128) >= 120, float("-inf"))
    )
    _, answers = attempted(model, Fidelity(Letters(), [LENGTH], windows=1), A_SHAPE)
    assert 0 < mean(answers, "kl") < 10


def test_methods_that_look_ahead_are_marked() -> None:
    assert MethodSpec("vertical_slash").looks_ahead()
    assert A_SHAPE.looks_ahead(last_rows_dense=64)
    assert not A_SHAPE.looks_ahead()
    assert not MethodSpec.parse("skip_softmax:inner=block_sparse,scale=3").looks_ahead()
    assert MethodSpec.parse("skip_softmax:inner=vertical_slash,scale=3").looks_ahead()  # through what it goes around
    assert MethodSpec.parse("skip_softmax:inner=skip_softmax").looks_ahead() is False
    task = Fidelity(Letters(), [LENGTH], windows=1, layers=False)
    model = tiny_model("llama")
    for spec, rows, marked in ((MethodSpec("vertical_slash"), 0, True), (A_SHAPE, 0, False), (A_SHAPE, 64, True)):
        _, answers = attempted(model, task, spec, last_rows_dense=rows)
        assert {answer.details["looks_ahead"] for answer in answers} == {marked}
    assert any("vertical_slash" in note and "a_shape" not in note for note in task.notes)


def test_a_method_that_estimates_has_no_layers_to_compare() -> None:
    model, spec = tiny_model("llama"), MethodSpec.parse("hyperattention:segment=128,block=64")
    with pytest.raises(ValueError, match=r"estimates what it leaves out.*--no-layers"):
        attempted(model, Fidelity(Letters(), [LENGTH], windows=1), spec)
    _, answers = attempted(model, Fidelity(Letters(), [LENGTH], windows=1, layers=False), spec)
    assert "kept_mass" not in answers[0].values


def test_last_rows_dense_reach_the_second_pass_too() -> None:
    model = tiny_model("llama")
    task = Fidelity(Letters(), [640], windows=1, buckets=5)
    plain, helped = (attempted(model, task, A_SHAPE, last_rows_dense=rows)[1] for rows in (0, 192))
    assert helped[-1].values["layer_error"] < 1e-5 < plain[-1].values["layer_error"]
    assert helped[2].values["layer_error"] == pytest.approx(plain[2].values["layer_error"], rel=1e-5)


def test_what_ran_densely_counts_as_dense() -> None:
    _, answers = attempted(tiny_model("llama"), Fidelity(Letters(), [LENGTH], windows=1), A_SHAPE, min_length=1000)
    assert {answer.values["kept_mass"] for answer in answers} == {1.0}
    assert max(answer.values["kl"] for answer in answers) < 1e-6


def test_a_task_answers_each_item_with_every_metric_and_nothing_else() -> None:
    for layers in (True, False):
        task = Fidelity(Letters(), [128, LENGTH], windows=2, layers=layers)
        assert task.plan() == ["128/0", "128/1", "320/0", "320/1"]
        _, answers = attempted(tiny_model("llama"), task, RANDOM)
        prompt = task.prepare("128/0")
        assert [answer.item for answer in answers] == [item.id for item in prompt.items]
        assert [list(answer.values) for answer in answers] == [[metric.name for metric in task.metrics]] * 4
        assert [item.group["position"] for item in prompt.items] == ["0-25%", "25-50%", "50-75%", "75-100%"]
        assert set(task.axes) == set(prompt.items[0].group)
        assert not task.metrics[0].higher_is_better
        assert not task.metrics[0].percent


def test_perplexity_is_the_exponential_of_the_mean_over_tokens() -> None:
    task = Fidelity(Letters(), [LENGTH], windows=2, layers=False)
    model = tiny_model("llama")
    pairs, losses = [], []
    for name in task.plan():
        prompt = task.prepare(name)
        pairs += list(zip(prompt.items, task.run(Attempt(model, task.tokenizer, prompt, A_SHAPE)), strict=True))
        ids = torch.tensor([prompt.token_ids])
        losses.append(torch.nn.functional.cross_entropy(full_logits(model, ids, A_SHAPE)[:-1], ids[0, 1:]).item())
    totals = {total.name: total.value for total in task.totals({A_SHAPE.label: pairs})}
    assert totals["perplexity at 320"] == pytest.approx(math.exp(sum(losses) / 2), rel=1e-5)
    assert totals["worst KL at 320"] == max(answer.values["kl"] for _, answer in pairs)
    assert len(totals) == 4


def test_windows_of_a_file_are_its_text_and_share_none_of_it(tmp_path: Path) -> None:
    text = "".join(f"word{i} " for i in range(2000))
    file = tmp_path / "long.txt"
    file.write_text(text, encoding="utf-8")
    tokenizer = Letters(beginning=1)
    task = Fidelity(tokenizer, [500, 1500], windows=5, text=file)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for i in range(5):
        short, long = (task.prepare(f"{length}/{i}").token_ids for length in (500, 1500))
        assert (len(short), len(long)) == (500, 1500)
        assert short[0] == 1
        assert long[:500] == short
        start = len(text) * i // 5
        if i:
            start = text.index(" ", start)
        assert long[1:] == ids[start : start + 1499]
        assert start + 1499 <= len(text) * (i + 1) // 5
    other = tmp_path / "other.txt"
    other.write_text(text + "x", encoding="utf-8")
    assert Fidelity(tokenizer, [500, 1500], windows=5, text=other).settings() != task.settings()


def test_prose_is_seeded_and_long_windows_begin_as_short_ones() -> None:
    _, tokenizer = load_model(device="cpu")
    tasks = [Fidelity(tokenizer, [300, 900], seed=seed) for seed in (0, 0, 1)]
    prompts = [[task.prepare(name).token_ids for name in task.plan()] for task in tasks]
    assert prompts[0] == prompts[1]
    assert prompts[0] != prompts[2]
    assert [len(ids) for ids in prompts[0]] == [300, 300, 900, 900]
    assert prompts[0][2][:300] == prompts[0][0]
    assert prompts[0][0] != prompts[0][1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": []}, "at least one"),
        ({"lengths": [64, 64]}, "none of them twice"),
        ({"lengths": [7]}, "too short for 4 parts"),
        ({"lengths": [64], "windows": 0}, "windows must be"),
        ({"lengths": [64], "buckets": 0}, "buckets must be"),
        ({"lengths": [64], "rows": True}, "rows must be"),
        ({"lengths": [64], "window": 32}, "exceed the model's window of 32"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fidelity(Letters(), settings.pop("lengths"), **settings)


def test_texts_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="check the path"):
        Fidelity(Letters(), [64], text=tmp_path / "none.txt")
    file = tmp_path / "text.txt"
    file.write_text(" \n", encoding="utf-8")
    with pytest.raises(ValueError, match="is empty"):
        Fidelity(Letters(), [64], text=file)
    file.write_text("a word or two " * 10, encoding="utf-8")
    with pytest.raises(ValueError, match="too short for 2 windows of 100 tokens"):
        Fidelity(Letters(), [100], text=file).prepare("100/1")
    with pytest.raises(ValueError, match="no prompt"):
        Fidelity(Letters(), [100], text=file).prepare("64/0")


def test_prompts_and_methods_that_cannot_be_run_are_refused() -> None:
    model = tiny_model("llama", max_position_embeddings=256)
    with pytest.raises(ValueError, match="window is 256"):
        attempted(model, Fidelity(Letters(), [LENGTH], windows=1), DENSE)
    with pytest.raises(ValueError, match="unknown method"):
        attempted(tiny_model("llama"), Fidelity(Letters(), [LENGTH], windows=1), MethodSpec("none"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_gpu_says_what_the_cpu_says(family: str, dtype: torch.dtype) -> None:
    task = Fidelity(Letters(), [LENGTH], windows=1)
    model = tiny_model(family, **HEADS[family]).to(dtype)
    _, want = attempted(model, task, A_SHAPE)
    attempt, got = attempted(model.to("cuda"), task, A_SHAPE, observe=True)
    assert attempt.peak_bytes
    tolerance = {torch.float32: 1e-2, torch.bfloat16: 0.2}[dtype]
    for name in ("nll", "dense_nll", "kept_mass", "layer_error", "hidden_error"):
        assert mean(got, name) == pytest.approx(mean(want, name), rel=tolerance)
