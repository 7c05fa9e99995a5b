"""The model type for lm-evaluation-harness: as right as the harness on the stock model, and batches as right as one."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

from sparseprefill.evals.lm_eval import MODEL_TYPE, model_class, register
from sparseprefill.evals.loading import load_model, model_folder
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.huggingface import patch_model
from sparseprefill.lm_eval import complete, main
from sparseprefill.patterns.methods import METHODS
from sparseprefill.prompts import needle_prompt

WAYS: dict[str, dict[str, Any]] = {
    **{name: MethodSpec.at_density(name, 0.3).options if row.share else {} for name, row in METHODS.items()},
    "a_shape, last rows dense": {"sink": 64, "window": 128, "last_rows_dense": 70},
    "block_sparse, everything kept": {"keep": 1.0},
}
CLOSE = 1e-4  # of log-probabilities in float32


def way(name: str) -> dict[str, Any]:
    return {"method": name.partition(",")[0], **WAYS[name]}


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_model(dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def asked(loaded: tuple[Any, Any]) -> list[tuple[str, str]]:
    """Prompts of three lengths, two of one, each with a question that the model inside can answer, and its answer."""
    return [question(loaded[1], index, length) for index, length in enumerate((300, 460, 300, 390))]


def question(tokenizer: Any, index: int, length: int) -> tuple[str, str]:
    prompt = needle_prompt(lambda text: tokenizer.encode(text), length, seed=7, index=index, needles=3)
    last = prompt.answers[-1]
    return tokenizer.decode(prompt.token_ids[: last.start]), last.needle.answer


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


def likelihoods(lm: Any, asked: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    """Of the answer, of a longer text, and of two single tokens after one context."""
    texts = [(c, t) for c, answer in asked for t in (answer, answer + ". Then nothing", " a", " the")]
    return list(lm.loglikelihood(requests("loglikelihood", texts), disable_tqdm=True))


def generated(lm: Any, asked: list[tuple[str, str]]) -> list[str]:
    settings = {"until": ["."], "max_gen_toks": 5, "do_sample": False}
    return list(lm.generate_until(requests("generate_until", [(c, settings) for c, _ in asked[:3]]), disable_tqdm=True))


def assert_same(got: list[tuple[float, bool]], want: list[tuple[float, bool]]) -> None:
    assert [greedy for _, greedy in got] == [greedy for _, greedy in want]
    assert [value for value, _ in got] == pytest.approx([value for value, _ in want], abs=CLOSE)


@pytest.fixture(scope="module")
def stock(loaded: tuple[Any, Any], asked: list[tuple[str, str]]) -> tuple[list[tuple[float, bool]], list[str]]:
    """What the harness' own class says of the unpatched model."""
    lm = HFLM(pretrained=loaded[0], tokenizer=loaded[1], batch_size=1)
    return likelihoods(lm, asked), generated(lm, asked)


def test_the_model_type_is_registered_beside_the_harness_own() -> None:
    register()
    register()
    assert get_model(MODEL_TYPE) is model_class()
    assert get_model("hf") is HFLM


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("name", ["dense", pytest.param("block_sparse, everything kept", marks=pytest.mark.slow)])
def test_dense_is_what_the_harness_says(loaded: Any, asked: Any, stock: Any, name: str, rows: int) -> None:
    lm = model_class()(loaded[0], tokenizer=loaded[1], batch_size=rows, **way(name))
    try:
        assert_same(likelihoods(lm, asked), stock[0])
        assert generated(lm, asked) == stock[1]
    finally:
        lm.remove()
    found = [text[:5] == answer[:5] for text, (_, answer) in zip(stock[1], asked[:3], strict=True)]
    assert all(found), "the model inside does not answer, so that texts say little"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in WAYS if name != "dense"])
def test_a_batch_says_what_each_says_alone(loaded: Any, asked: Any, name: str) -> None:
    found = []
    for rows in (1, 3):
        lm = model_class()(loaded[0], tokenizer=loaded[1], batch_size=rows, **way(name))
        try:
            found.append((likelihoods(lm, asked), generated(lm, asked)))
            assert lm.report().sparse_calls > 0
        finally:
            lm.remove()
    assert_same(found[1][0], found[0][0])
    assert found[1][1] == found[0][1]


@pytest.mark.parametrize(("method", "options"), [("tri_shape", {"window": 64}), ("vertical_slash", {"density": 0.6})])
@pytest.mark.slow
def test_padding_on_the_right_would_be_wrong(loaded: Any, method: str, options: dict[str, Any]) -> None:
    """Why prompts are batched by length: the harness pads them, and what a method takes for the last queries is not."""
    wanted = requests("loglikelihood", [question(loaded[1], index, length) for index, length in enumerate((700, 1300))])
    with patch_model(loaded[0], method, min_length=0, **options):
        alone, padded = (
            HFLM(pretrained=loaded[0], tokenizer=loaded[1], batch_size=rows).loglikelihood(wanted, disable_tqdm=True)
            for rows in (1, 2)
        )
    ours = model_class()(loaded[0], tokenizer=loaded[1], method=method, batch_size=2, **options)
    assert_same(ours.loglikelihood(wanted, disable_tqdm=True), alone)
    ours.remove()
    assert abs(padded[0][0] - alone[0][0]) > 1


@pytest.mark.parametrize("name", [name for name in WAYS if name != "dense"])
@pytest.mark.slow
def test_left_padding_with_its_mask_changes_no_logit(loaded: Any, asked: Any, name: str) -> None:
    lm = model_class()(loaded[0], tokenizer=loaded[1], batch_size=3, **way(name))
    try:
        ids, mask = lm.tok_batch_encode([context for context, _ in asked])
        assert bool((mask[:, 0] == 0).any()), "nothing was padded"
        together = last_logits(loaded[0], ids, mask)
        for row, (context, _) in enumerate(asked):
            one = last_logits(loaded[0], *lm.tok_batch_encode([context]))
            assert (together[row] - one[0]).abs().max() < 10 * CLOSE
    finally:
        lm.remove()


@torch.no_grad()
def last_logits(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    place = (mask.cumsum(1) - 1).clamp(min=0)
    return model(ids, attention_mask=mask, position_ids=place, logits_to_keep=1).logits[:, 0]


def test_perplexity_windows_are_those_of_the_harness(loaded: Any, asked: Any) -> None:
    rolling = requests("loglikelihood_rolling", [(context,) for context, _ in asked[:2]])
    want = HFLM(pretrained=loaded[0], tokenizer=loaded[1], batch_size=1, max_length=200)
    lm = model_class()(loaded[0], tokenizer=loaded[1], batch_size=2, max_length=200, method="dense")
    got = lm.loglikelihood_rolling(rolling, disable_tqdm=True)
    assert got == pytest.approx(want.loglikelihood_rolling(rolling, disable_tqdm=True), rel=1e-5)


@pytest.mark.slow
def test_a_prompt_longer_than_the_model_loses_its_start_as_in_the_harness(loaded: Any, asked: Any) -> None:
    want = likelihoods(HFLM(pretrained=loaded[0], tokenizer=loaded[1], max_length=280), asked)
    lm = model_class()(loaded[0], tokenizer=loaded[1], batch_size=3, max_length=280, method="dense")
    assert_same(likelihoods(lm, asked), want)


def test_only_scored_tokens_get_logits(loaded: Any, asked: Any) -> None:
    sizes = []
    hook = loaded[0].register_forward_hook(lambda module, inputs, output: sizes.append(output.logits.shape[1]))
    try:
        likelihoods(model_class()(loaded[0], tokenizer=loaded[1], method="dense"), asked)
    finally:
        hook.remove()
    assert max(sizes) < 20


@pytest.mark.slow
def test_logits_beyond_the_stated_size_are_refused_before_anything_runs(loaded: Any, asked: Any) -> None:
    lm = model_class()(loaded[0], tokenizer=loaded[1], method="dense", max_logits_gib=2**-10)
    likelihoods(lm, asked)  # few tokens are scored
    calls: list[int] = []
    hook = loaded[0].register_forward_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(ValueError, match=r"max_logits_gib is 0.000976562: choose a smaller batch_size"):
            lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(asked[0][0],)]), disable_tqdm=True)
    finally:
        hook.remove()
    assert not calls


def test_the_model_is_given_back_as_it_was(loaded: Any) -> None:
    model, config, before = loaded[0], loaded[0].config, loaded[0].config._attn_implementation
    lm = model_class()(model, tokenizer=loaded[1], method="a_shape:sink=64", window=128)
    assert lm.spec.label == "a_shape:sink=64,window=128"
    assert lm.patch.active
    lm.remove()
    around = model_class()(model, tokenizer=loaded[1], method="pbs:inner=flashprefill", alpha=0.3, segment=128)
    assert around.spec.label == "pbs:inner=flashprefill,alpha=0.3,segment=128"
    around.remove()
    assert model.config is config
    assert config._attn_implementation == before


def test_the_result_says_what_ran(loaded: Any, asked: Any) -> None:
    lm = model_class()(loaded[0], tokenizer=loaded[1], observe=True, **way("block_sparse"))
    try:
        likelihoods(lm, asked[:1])
        info = json.loads(json.dumps(lm.get_model_info()))
    finally:
        lm.remove()
    assert info["method"] == "block_sparse:keep=0.3"
    assert info["sparse_calls"] > 0
    assert 0.2 < info["density"] < 0.9
    assert info["method_settings"]["min_length"] == 0


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown method": ({"method": "block_spares"}, "Did you mean 'block_sparse'"),
    "unknown argument": ({"method": "a_shape", "parallelize": True}, "'parallelize' is neither an argument of the mo"),
    "option of another method": (
        {"method": "a_shape", "keep": 0.2},
        "nor an option of the method a_shape \\(sink, win",
    ),
    "option of neither": (
        {"method": "pbs:inner=flashprefill", "threshold": 0.2},
        r"nor an option of the method pbs \(inner, .*alpha",
    ),
    "bad option": ({"method": "block_sparse", "keep": 2.0}, "keep"),
    "given twice": ({"method": "block_sparse:keep=0.2", "keep": 0.3}, "given twice"),
    "automatic batches": ({"batch_size": "auto"}, "no auto here"),
    "no batch": ({"batch_size": 0}, "above 0"),
    "most of an automatic batch": ({"max_batch_size": 4}, "not offered here"),
    "no logits": ({"max_logits_gib": 0}, "above 0"),
    "no such model": ({"pretrained": "no/such/folder"}, "no/such/folder"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_done_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_class()(**arguments)


def test_a_loaded_model_comes_with_its_tokenizer(loaded: Any) -> None:
    with pytest.raises(ValueError, match="give both"):
        model_class()(loaded[0])
    with pytest.raises(ValueError, match="a loaded model has them"):
        model_class()(loaded[0], tokenizer=loaded[1], dtype="bfloat16")


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no GPU that torch can use"):
        model_class()(device="cuda:0")


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        model_class()()


def test_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit, match=r'pip install "sparseprefill\[evals\]"'):
        main()


def arguments(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(**({"config": None, "model": None, "model_args": None, "metadata": None} | given))


def test_the_command_fills_in_the_model_inside(tmp_path: Path) -> None:
    plain = arguments(device=None, metadata={"max_seq_lengths": [1024]})
    complete(plain)
    assert plain.model == MODEL_TYPE
    assert plain.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert plain.metadata == {"tokenizer": model_folder(None), "max_seq_lengths": [1024]}

    own = arguments(device="cpu", model_args={"pretrained": "somebody/model"})
    complete(own)
    assert (own.device, own.metadata) == ("cpu", None)

    stock = arguments(device=None, model="hf")
    complete(stock)
    assert (stock.model, stock.device, stock.metadata) == ("hf", None, None)

    written = tmp_path / "run.yaml"
    written.write_text("model: sparseprefill\nmodel_args: {pretrained: somebody/model}\nmetadata: {tokenizer: mine}\n")
    file = arguments(device=None, config=str(written))
    complete(file)
    assert (file.model, file.model_args, file.metadata) == (MODEL_TYPE, None, None)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dense", "block_sparse keep=0.2"])
def test_the_command_runs_a_task_of_the_harness(method: str, tmp_path: Path) -> None:
    command = ["-m", "sparseprefill.lm_eval", "run", "--tasks", "niah_single_1", "--limit", "2", "--batch_size", "2"]
    command += [
        "--metadata",
        "max_seq_lengths=[1024]",
        "--output_path",
        str(tmp_path),
        "--gen_kwargs",
        "max_gen_toks=4",
    ]
    command += ["--model_args", "pretrained=inside", *f"method={method}".split()]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = tmp_path.rglob("results*.json")
    found = json.loads(path.read_text())
    assert found["results"]["niah_single_1"]["1024,none"] in (0.0, 0.5, 1.0)
    assert found["config"]["method"] == method.replace(" ", ":")
    assert method == "dense" or found["config"]["sparse_calls"] == 4, "one prefill of four layers"
