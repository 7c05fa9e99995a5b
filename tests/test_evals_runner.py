"""Running evaluations: what is written, resuming, several processes, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_tasks import SPECS, Parity, comparable

from sparseprefill import huggingface_identity
from sparseprefill.evals import runner
from sparseprefill.evals.loading import load_model
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.evals.results import EvalResult, schema
from sparseprefill.evals.runner import Workers, load_unfinished, run_eval, unfinished_runs
from sparseprefill.evals.tasks import Answer, Attempt, Prompt, reset_peak_memory
from sparseprefill.patterns import AShape, ModelPatterns, save_patterns

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_model(device="cpu")


@pytest.fixture(scope="module")
def whole(loaded: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    result = run_eval(Parity(), *loaded, SPECS, folder)
    assert result is not None
    assert result.complete
    return folder


def saved(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "parity.json").read_text())
    return data


def test_a_result_holds_every_answer_and_reads_back(whole: Path) -> None:
    assert sorted(path.name for path in whole.iterdir()) == ["parity.json"]
    result = EvalResult.load(whole / "parity.json")
    assert result.to_dict() == EvalResult.from_dict(saved(whole)).to_dict()
    assert [record.prompt for record in result.records] == list(Parity().plan())
    assert [method.label for method in result.methods] == [spec.label for spec in SPECS]
    dense, a_shape, full = (result.answers(spec.label) for spec in SPECS)
    assert len(dense) == 4 + 2 * 4
    assert [answer for _, answer in dense] == [answer for _, answer in full], "all blocks are dense attention"
    assert [answer for _, answer in dense] != [answer for _, answer in a_shape], "a short window is not"
    assert {total.name for total in result.totals} == {"mean of all items"}
    assert result.provenance[0]["versions"]["torch"]


def test_the_first_prompt_of_a_stratum_is_observed_and_the_others_are_timed(whole: Path) -> None:
    result = EvalResult.load(whole / "parity.json")
    for record in result.records:
        first = record.prompt.endswith("/0")
        for label, run in record.runs.items():
            assert (run.cost.first_token_seconds is None) == first
            assert (run.cost.peak_bytes is None) == first or not Path("/proc/self/clear_refs").exists()
            assert (run.observed is not None) == (first and label != "dense")
            assert bool(run.kernels) == (label != "dense")
            if not first:
                assert 0 < run.cost.first_token_seconds <= run.cost.seconds  # type: ignore[operator]
    observed = result.records[0].runs[SPECS[1].label].observed
    assert observed is not None
    assert 0 < observed.density < 1  # type: ignore[operator]
    assert 0 < observed.kept_mass <= 1  # type: ignore[operator]


def test_an_interrupted_run_goes_on_and_gives_the_same_file(
    loaded: tuple[Any, Any], whole: Path, tmp_path: Path
) -> None:  # fmt: skip
    prepared = []

    def stop_at(number: int) -> Any:
        def before(prompt: str) -> None:
            if len(prepared) == number:
                raise KeyboardInterrupt
            prepared.append(prompt)

        return before

    with pytest.raises(KeyboardInterrupt):
        run_eval(Parity(before=stop_at(3)), *loaded, SPECS, tmp_path)
    assert not (tmp_path / "parity.json").exists(), "half a matrix is no result"
    assert unfinished_runs(tmp_path) == ["parity"]
    partial = load_unfinished(tmp_path, "parity")
    assert (partial.complete, len(partial.records), partial.planned, partial.totals) == (False, 3, 8, ())
    with (tmp_path / "parity.parts" / "0.jsonl").open("a") as part:
        part.write('{"prompt": "one/3", "tok')  # the machine died while it wrote
    with pytest.raises(KeyboardInterrupt):
        run_eval(Parity(before=stop_at(5)), *loaded, SPECS, tmp_path)
    result = run_eval(Parity(before=prepared.append), *loaded, SPECS, tmp_path)
    assert result is not None
    assert sorted(prepared) == sorted(Parity().plan()), "every prompt once, none twice"
    assert comparable(saved(tmp_path)) == comparable(saved(whole))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parity.json"]


def test_a_finished_run_is_not_run_again(loaded: tuple[Any, Any], whole: Path) -> None:
    before = (whole / "parity.json").stat().st_mtime_ns

    def never(prompt: str) -> None:
        raise AssertionError(prompt)

    result = run_eval(Parity(before=never), *loaded, SPECS, whole)
    assert result is not None
    assert result.complete
    assert (whole / "parity.json").stat().st_mtime_ns == before


def test_results_of_other_settings_are_refused(loaded: tuple[Any, Any], whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"other settings \(task.prompts: 4 there, 5 now"):
        run_eval(Parity(5), *loaded, SPECS, whole)
    with pytest.raises(ValueError, match=r"other settings .*methods"):
        run_eval(Parity(), *loaded, SPECS[:2], whole)
    with pytest.raises(ValueError, match=r"other settings .*last_rows_dense"):
        run_eval(Parity(), *loaded, SPECS, whole, last_rows_dense=64)

    def stop(prompt: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_eval(Parity(before=stop), *loaded, SPECS, tmp_path)
    with pytest.raises(ValueError, match=r"parity.run.json is of a run with other settings .*prompts"):
        run_eval(Parity(5), *loaded, SPECS, tmp_path)


def test_a_run_can_begin_anew(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    assert run_eval(Parity(1), *loaded, SPECS[:1], tmp_path) is not None
    prepared: list[str] = []
    result = run_eval(Parity(2, before=prepared.append), *loaded, SPECS[:1], tmp_path, again=True)
    assert result is not None
    assert len(prepared) == len(result.records) == 4


def test_other_weights_are_another_model(loaded: tuple[Any, Any], whole: Path) -> None:
    model, tokenizer = loaded
    weight = model.get_input_embeddings().weight
    kept = weight.data.clone()
    try:
        weight.data.mul_(1.01)
        with pytest.raises(ValueError, match=r"other settings .*model.weights"):
            run_eval(Parity(), model, tokenizer, SPECS, whole)
    finally:
        weight.data.copy_(kept)


def test_any_weight_and_any_setting_that_decides_answers_tells_models_apart(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    before = huggingface_identity.model_identity(model), huggingface_identity.tokenizer_identity(tokenizer)
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        for place in (0, 1, 2, weight.numel() - 1):
            kept = weight.view(-1)[place].item()
            weight.view(-1)[place] = kept + 1
            assert huggingface_identity.model_identity(model)["weights"] != before[0]["weights"], place
            weight.view(-1)[place] = kept
    assert huggingface_identity.model_identity(model) == before[0]
    kept = model.generation_config.no_repeat_ngram_size
    model.generation_config.no_repeat_ngram_size = 3
    assert huggingface_identity.model_identity(model) != before[0]
    model.generation_config.no_repeat_ngram_size = kept
    ends = tokenizer.eos_token
    tokenizer.eos_token = "the"
    assert huggingface_identity.tokenizer_identity(tokenizer) != before[1]
    tokenizer.eos_token = ends
    assert (huggingface_identity.model_identity(model), huggingface_identity.tokenizer_identity(tokenizer)) == before


@pytest.mark.slow
def test_a_profile_that_has_changed_is_another_method(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, _ = loaded
    profile = tmp_path / "p.json"
    heads = model.config.num_attention_heads

    def write(window: int) -> None:
        save_patterns(ModelPatterns(((AShape(64, window),) * heads,) * model.config.num_hidden_layers), profile)

    specs = [SPECS[0], MethodSpec("minference", {"profile": str(profile)})]

    def stop(prompt: str) -> None:
        if prompt == "one/1":
            raise KeyboardInterrupt

    write(64)
    with pytest.raises(KeyboardInterrupt):
        run_eval(Parity(before=stop), *loaded, specs, tmp_path / "out")
    write(128)
    with pytest.raises(ValueError, match=r"other settings \(methods.minference"):
        run_eval(Parity(), *loaded, specs, tmp_path / "out")
    write(64)
    assert run_eval(Parity(), *loaded, specs, tmp_path / "out") is not None


@pytest.mark.slow
def test_a_line_that_ends_inside_a_character_is_cut_off(
    loaded: tuple[Any, Any], whole: Path, tmp_path: Path
) -> None:  # fmt: skip
    def stop(prompt: str) -> None:
        if prompt == "one/2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_eval(Parity(before=stop), *loaded, SPECS, tmp_path)
    with (tmp_path / "parity.parts" / "0.jsonl").open("ab") as part:
        part.write('{"prompt": "文'.encode()[:-1])
    assert len(load_unfinished(tmp_path, "parity").records) == 2
    assert run_eval(Parity(), *loaded, SPECS, tmp_path) is not None
    assert comparable(saved(tmp_path)) == comparable(saved(whole))


def test_a_run_that_goes_on_is_not_removed(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    def second(prompt: str) -> None:
        with pytest.raises(ValueError, match="another process writes"):
            run_eval(Parity(1), *loaded, SPECS[:1], tmp_path, again=True)

    result = run_eval(Parity(1, before=second), *loaded, SPECS[:1], tmp_path)
    assert result is not None
    assert len(result.records) == 2


def test_texts_with_half_a_character_are_saved(whole: Path, tmp_path: Path) -> None:
    data = saved(whole)
    data["records"][0]["runs"]["dense"]["answers"][0]["text"] = "\ud83d"
    EvalResult.from_dict(data).save(tmp_path / "x.json")
    assert EvalResult.load(tmp_path / "x.json").to_dict() == EvalResult.from_dict(data).to_dict()


@pytest.mark.parametrize("content", ["[]", '{"schema": "sparseprefill-eval-1", "plan": ["a"]}', "{"])
def test_a_broken_header_is_named(loaded: tuple[Any, Any], tmp_path: Path, content: str) -> None:
    (tmp_path / "parity.run.json").write_text(content)
    with pytest.raises(ValueError, match=r"parity\.run\.json"):
        run_eval(Parity(1), *loaded, SPECS[:1], tmp_path)


def test_observe_is_a_number_of_prompts(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="observe is a number of prompts"):
        run_eval(Parity(1), *loaded, SPECS[:1], tmp_path, observe=-1)
    result = run_eval(Parity(2), *loaded, SPECS[:2], tmp_path, observe=0)
    assert result is not None
    timed = [record.runs["dense"].cost.seconds is not None for record in result.records]
    assert timed == [False, True, True, True], "the first one warms up"
    assert all(run.observed is None for record in result.records for run in record.runs.values())


def test_peaks_are_not_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **settings: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    assert not reset_peak_memory(torch.device("cpu"))


@pytest.mark.slow
def test_a_full_disk_loses_nothing(
    loaded: tuple[Any, Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync
    written = []

    def full(handle: int) -> None:
        written.append(handle)
        if len(written) == 5:  # the header, a session and two records fit
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device; what was answered before is kept.*0.jsonl"):
        run_eval(Parity(), *loaded, SPECS, tmp_path)
    assert len(load_unfinished(tmp_path, "parity").records) >= 2
    assert run_eval(Parity(), *loaded, SPECS, tmp_path) is not None
    assert comparable(saved(tmp_path)) == comparable(saved(whole))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_disk_that_is_really_full_says_what_to_do(tmp_path: Path) -> None:
    with Path("/dev/full").open("ab", buffering=0) as file:
        part = runner._Part(file, tmp_path / "0.jsonl")
        with pytest.raises(OSError, match="No space left on device; what was answered before is kept"):
            part.session({})


@pytest.mark.slow
def test_two_processes_give_what_one_gives(whole: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = Path(__file__).with_name("evals_worker.py")
    done = subprocess.run(
        [*launch, str(worker), str(tmp_path)], capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert comparable(saved(tmp_path)) == comparable(saved(whole))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parity.json"]


def test_processes_take_turns(loaded: tuple[Any, Any], whole: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The prompts are dealt out; whoever comes last finds all of them."""
    monkeypatch.setattr(Workers, "wait", lambda self: None)
    seen: dict[int, list[str]] = {0: [], 1: []}
    with pytest.raises(ValueError, match="4 of 8 prompts have no answer"):
        run_eval(Parity(before=seen[0].append), *loaded, SPECS, tmp_path, workers=Workers(0, 2))
    assert run_eval(Parity(before=seen[1].append), *loaded, SPECS, tmp_path, workers=Workers(1, 2)) is None
    assert (len(seen[0]), len(seen[1])) == (4, 4)
    assert not set(seen[0]) & set(seen[1])
    again: list[str] = []
    assert run_eval(Parity(before=again.append), *loaded, SPECS, tmp_path) is not None
    assert not again, "another number of processes finds what the two have answered"
    assert comparable(saved(tmp_path)) == comparable(saved(whole))


def test_two_runs_do_not_write_into_one_folder(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    def second(prompt: str) -> None:
        with pytest.raises(ValueError, match="another process writes"):
            run_eval(Parity(1), *loaded, SPECS[:1], tmp_path)

    assert run_eval(Parity(1, before=second), *loaded, SPECS[:1], tmp_path) is not None


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (SPECS[1:], "dense must be among"),
        ([*SPECS, SPECS[1]], "named twice"),
        ([SPECS[0], MethodSpec("vertical")], "unknown method"),
        ([SPECS[0], MethodSpec("block_sparse", {"kept": 0.2})], "kept"),
    ],
)  # fmt: skip
def test_methods_that_cannot_be_compared_are_refused(
    loaded: tuple[Any, Any], tmp_path: Path, specs: Any, message: str
) -> None:  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=message):
        run_eval(Parity(), *loaded, specs, tmp_path)
    assert not list(tmp_path.iterdir())


def test_plans_and_answers_that_do_not_fit_are_refused(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    class Twice(Parity):
        def plan(self) -> list[str]:
            return ["one/0", "one/0"]

    class Empty(Parity):
        def plan(self) -> list[str]:
            return []

    class Silent(Parity):
        def run(self, attempt: Attempt) -> list[Answer]:
            return []

    class Long(Parity):
        def prepare(self, prompt: str) -> Prompt:
            made = super().prepare(prompt)
            return Prompt(made.id, [20] * 40000, made.items)

    for task, message in (
        (Twice(), "twice"),
        (Empty(), "plans no prompt"),
        (Silent(), "the task answered"),
        (Long(), "window"),
    ):
        with pytest.raises(ValueError, match=message):
            run_eval(task, *loaded, SPECS, tmp_path / type(task).__name__)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema="other"), "at schema"),
        (lambda d: d.pop("planned"), "'planned' is a required property"),
        (lambda d: d.update(complete=False), "complete=False"),
        (lambda d: d["records"].pop(), "holds 7 of 8 prompts"),
        (lambda d: d["records"].append(d["records"][0]) or d.update(planned=9), "comes twice"),
        (lambda d: d["records"][0]["runs"].pop("dense"), "but the methods are"),
        (lambda d: d["records"][0]["runs"]["dense"]["answers"][0]["values"].pop("even"), "has values"),
        (lambda d: d["records"][0]["runs"]["dense"]["answers"].clear(), "exactly its items"),
        (lambda d: d["records"][0]["items"][0]["group"].pop("kind"), "no kind in its group"),
        (lambda d: d["records"][0].update(tokens=-1), "at records/0/tokens"),
        (lambda d: d["metrics"][0].update(extra=1), "at metrics/0"),
    ],
)
def test_edited_results_are_refused(whole: Path, tmp_path: Path, change: Any, message: str) -> None:
    data = saved(whole)
    change(data)
    (tmp_path / "x.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        EvalResult.load(tmp_path / "x.json")


def test_a_broken_part_is_named_by_its_line(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    def stop(prompt: str) -> None:
        if prompt == "one/1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_eval(Parity(before=stop), *loaded, SPECS[:1], tmp_path)
    part = tmp_path / "parity.parts" / "0.jsonl"
    lines = part.read_text().splitlines()
    part.write_text("\n".join([lines[0], lines[1].replace('"tokens": 200', '"tokens": "x"'), ""]))
    with pytest.raises(ValueError, match=r"0.jsonl, line 2, .*at tokens"):
        run_eval(Parity(), *loaded, SPECS[:1], tmp_path)
    part.write_text("{\n")
    with pytest.raises(ValueError, match=r"0.jsonl, line 1,"):
        run_eval(Parity(), *loaded, SPECS[:1], tmp_path)


def test_the_environment_says_who_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert Workers.from_environment() == Workers(0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert Workers.from_environment() == Workers(2, 3)
    for rank in ("3", "x"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(ValueError, match="torchrun"):
            Workers.from_environment()


def test_the_schema_is_one_and_names_no_unknown_field() -> None:
    from jsonschema import Draft202012Validator

    Draft202012Validator.check_schema(schema())
    assert schema()["properties"]["schema"]["const"] == runner.SCHEMA
