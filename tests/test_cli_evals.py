"""The commands that evaluate, as a user types them, on the model inside at small lengths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from sparseprefill import cli_evals
from sparseprefill.cli import main
from sparseprefill.evals.longbench_data import SETS
from sparseprefill.evals.needle_tasks import NeedlesAlong
from sparseprefill.evals.results import EvalResult


def invoke(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_needles_are_found_and_reported(tmp_path: Path) -> None:
    output = invoke(
        "needle", "--kind", "along", "--lengths", "1k", "--samples", "2", "--needles", "3", "--out", str(tmp_path),
        "--method", "a_shape:sink=64,window=128", "--method", "random",
    ).stdout  # fmt: skip
    assert "a_shape:sink=64,window=128" in output
    assert written(tmp_path) == [f"needle_along.{end}" for end in ("html", "json", "md", "png")]
    result = EvalResult.load(tmp_path / "needle_along.json")
    assert [method.label for method in result.methods] == ["dense", "a_shape:sink=64,window=128", "random:keep=0.2"]
    assert all(answer.values["found"] == 1 for _, answer in result.answers("dense")), "the model inside retrieves at 1k"
    assert (tmp_path / "needle_along.png").read_bytes().startswith(b"\x89PNG")
    assert "100.0" in (tmp_path / "needle_along.md").read_text()


@pytest.mark.slow
def test_a_text_is_a_haystack(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The rain fell on the hills. " * 50)
    invoke(
        "needle", "--lengths", "600", "--samples", "1", "--depths", "0,50", "--method", "dense", "--question", "start",
        "--haystack", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out"),
    )  # fmt: skip
    result = EvalResult.load(tmp_path / "out" / "needle_classic.json")
    assert result.settings["task"]["haystack"] == "file"
    assert result.settings["task"]["question_at"] == "start"
    assert [item.group for item, _ in result.answers("dense")] == [{"depth": d, "length": 600} for d in (0, 50)]


@pytest.mark.slow
def test_the_suite_of_our_own_words(tmp_path: Path) -> None:
    output = invoke(
        "ruler", "single_noise", "variable_tracking", "--lengths", "1k", "--samples", "1", "--method", "dense",
        "--out", str(tmp_path),
    ).stdout  # fmt: skip
    assert "effective length" in output
    result = EvalResult.load(tmp_path / "ruler.json")
    assert [item.group["task"] for item, _ in result.answers("dense")] == ["single_noise", "variable_tracking"]


@pytest.mark.slow
def test_fidelity(tmp_path: Path) -> None:
    invoke(
        "fidelity", "--lengths", "512", "--windows", "1", "--method", "block_sparse:keep=1.0", "--out", str(tmp_path),
        "--parts", "2",
    )  # fmt: skip
    result = EvalResult.load(tmp_path / "fidelity.json")
    for _, answer in result.answers("block_sparse:keep=1.0"):
        assert abs(answer.values["kl"]) < 1e-6
        assert answer.values["agreement"] == 1


def test_longbench_from_fixture_rows(tmp_path: Path) -> None:
    output = invoke(
        "longbench", "trec", "passage_count", "--fixture", "--samples", "1", "--method", "dense", "--chat-template",
        "none", "--out", str(tmp_path),
    ).stdout  # fmt: skip
    assert "made up" in output
    result = EvalResult.load(tmp_path / "longbench.json")
    assert [item.group["dataset"] for item, _ in result.answers("dense")] == ["trec", "passage_count"]
    assert result.settings["task"]["chat_template"] == "none"


@pytest.mark.parametrize(("reply", "expected"), [("{0}", 100.0), ("", 0.0)], ids=["oracle", "silent"])
def test_an_oracle_scores_all_and_silence_nothing(
    reply: str, expected: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All 21 sets through the whole command; only what a model would generate is put in its place."""

    def generated(attempt: Any, max_new_tokens: int, **settings: Any) -> list[int]:
        with attempt.patched():
            attempt.prefilled()
        text = reply.format(attempt.prompt.items[0].references[0])
        ids: list[int] = attempt.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    monkeypatch.setattr("sparseprefill.evals.longbench.generate", generated)
    invoke("longbench", "--fixture", "--method", "dense", "--chat-template", "none", "--out", str(tmp_path))
    result = EvalResult.load(tmp_path / "longbench.json")
    scores = {total.name: total.value for total in result.totals if total.name in SETS}
    assert len(scores) == 21
    for name, score in scores.items():
        if SETS[name].category == "code" and not reply:
            continue  # two empty lines are alike
        assert score == pytest.approx(expected, abs=0.01), name


def test_the_reference_survives_the_tokenizer_of_the_model_inside() -> None:
    """What the oracle above says must be readable again, or its scores would measure the tokenizer."""
    from sparseprefill.evals.loading import load_model
    from sparseprefill.evals.longbench_data import load_rows

    _, tokenizer = load_model()
    for name in SETS:
        for row in load_rows(name, fixture=True).rows:
            text = str(row["answers"][0])
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(ids, skip_special_tokens=True) == text, name


def test_an_interrupted_run_is_reported_as_incomplete_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    real = NeedlesAlong.prepare
    prepared: list[str] = []

    def stop(self: Any, prompt: str) -> Any:
        if len(prepared) == 2:
            prepared.append("interrupted")
            raise KeyboardInterrupt
        prepared.append(prompt)
        return real(self, prompt)

    monkeypatch.setattr(NeedlesAlong, "prepare", stop)
    command = ("needle", "--kind", "along", "--lengths", "600", "--samples", "3", "--method", "dense")
    command = (*command, "--out", str(tmp_path))
    assert "2 of 3 prompts are answered" in invoke(*command, code=1).stdout
    html = (tmp_path / "needle_along.incomplete.html").read_text()
    assert "INCOMPLETE" in html
    assert "needle_along.json" not in written(tmp_path)
    shown = invoke("report", str(tmp_path), code=1)
    assert "INCOMPLETE" in shown.output
    invoke(*command)
    assert len(prepared) == 4, "two before, one after"
    assert [name for name in written(tmp_path) if "incomplete" in name] == []
    assert "complete" in invoke("report", str(tmp_path)).stdout
    assert invoke("report", str(tmp_path / "needle_along.json"), "--markdown").stdout.startswith("# ")


@pytest.mark.slow
def test_reports_of_runs_that_broke_off_at_their_end(tmp_path: Path) -> None:
    def asked(name: str, *more: str) -> tuple[str, ...]:
        start = ("needle", "--kind", "along", "--lengths", "600", "--samples", "1", "--method", "dense")
        return (*start, "--out", str(tmp_path / name), *more)

    invoke(*asked("out"))
    result = json.loads((tmp_path / "out" / "needle_along.json").read_text())
    page = (tmp_path / "out" / "needle_along.md").read_text()
    run = {key: result[key] for key in ("schema", "task", "settings", "methods", "metrics", "axes", "notes")}
    run["plan"] = [record["prompt"] for record in result["records"]]
    lines = [{"session": {}}, *result["records"]]

    def leave(folder: Path) -> None:
        (folder / "needle_along.parts").mkdir(parents=True)
        (folder / "needle_along.run.json").write_text(json.dumps(run))
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "needle_along.parts" / "0.jsonl").write_text(text)

    leave(tmp_path / "out")  # the result stands, and what it was made of was not removed yet
    invoke("report", str(tmp_path / "out"))
    assert (tmp_path / "out" / "needle_along.md").read_text() == page
    invoke(*asked("out"))
    assert "needle_along.run.json" not in written(tmp_path / "out")

    leave(tmp_path / "answered")  # all is answered, and the result was not written
    assert "all of 1 prompts answered, and not ended" in invoke("report", str(tmp_path / "answered"), code=1).output
    assert "needle_along.md" not in written(tmp_path / "answered")
    invoke(*asked("answered"))
    assert (tmp_path / "answered" / "needle_along.md").exists()

    (tmp_path / "out" / "other.run.json").write_text("{}")  # one that is broken keeps no other from being shown
    shown = invoke("report", str(tmp_path / "out"), code=1).output
    assert "needle_along: complete" in shown
    assert "other.run.json" in shown


def test_a_finished_run_is_shown_and_another_refused(tmp_path: Path) -> None:
    command = ("needle", "--kind", "along", "--lengths", "600", "--samples", "1", "--method", "dense")
    command = (*command, "--out", str(tmp_path))
    invoke(*command)
    before = (tmp_path / "needle_along.json").read_bytes()
    invoke(*command)
    assert (tmp_path / "needle_along.json").read_bytes() == before
    refused = invoke(*command, "--seed", "2", code=1).output
    assert "other settings (task.seed: 1 there, 2 now)" in refused
    assert (tmp_path / "needle_along.json").read_bytes() == before
    invoke(*command, "--seed", "2", "--again")
    assert json.loads((tmp_path / "needle_along.json").read_text())["settings"]["task"]["seed"] == 2


def test_what_cannot_be_evaluated_is_a_message(tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "out"))
    assert "version 2 is one set" in invoke("longbench", "trec", "--edition", "2", *out, code=1).output
    assert "has no set 'treck'" in invoke("longbench", "treck", "--fixture", *out, code=1).output
    assert "no chat template" in invoke("longbench", "qasper", "--fixture", *out, code=1).output
    assert "trec.jsonl" in invoke("longbench", "trec", "--data", str(tmp_path), *out, code=1).output
    offline = invoke("longbench", "trec", *out, code=1).output
    assert "trec.jsonl" in offline
    assert "--fixture" in offline
    assert "'along' has no depths" in invoke("needle", "--kind", "along", "--depths", "3", *out, code=1).output
    assert "is neither a number of depths" in invoke("needle", "--depths", "a,b", *out, code=2).output
    assert "unknown" in invoke("ruler", "no_such", *out, code=1).output
    for method in ("block_sparse:keep=0.3", "dense"):
        assert "leave --density out" in invoke("needle", "--density", "0.3", "--method", method, *out, code=1).output
    assert "--observe" in invoke("needle", "--observe", "-2", *out, code=2).output
    assert "No such option" in invoke("longbench", "--seed", "2", *out, code=2).output
    assert "holds no result" in invoke("report", str(tmp_path), code=1).output
    (tmp_path / "x.json").write_text("{}")
    assert "is not a sparseprefill-eval-1 file" in invoke("report", str(tmp_path / "x.json"), code=1).output
    assert not (tmp_path / "out").exists()


def test_a_density_is_for_every_method_that_takes_one() -> None:
    made = cli_evals.specs(("flashprefill", "pbs", "stem:keep=0.3"), 0.4)
    assert [each.label for each in made[1:]] == [
        "flashprefill:sink=64,local=128,keep=0.4",
        "pbs:keep=0.4",
        "stem:keep=0.3",
    ]
    for chosen in (("stem:keep=0.3",), ("flashprefill:alpha=0.3",), ("no_such",)):
        with pytest.raises(ValueError, match="leave --density out"):
            cli_evals.specs(chosen, 0.4)


def test_one_gpu_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("sparseprefill.evals.loading.load_model", lambda name, **given: asked.append(given["device"]))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", asked.append)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    cli_evals.loaded_model(cli_evals.DEMO)
    assert asked == ["cuda:3", "cuda:3"]
