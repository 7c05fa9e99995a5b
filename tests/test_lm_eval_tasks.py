"""RULER as lm-evaluation-harness makes it, as a task of ours: its documents, its grades, whatever ran before."""

from __future__ import annotations

import importlib
import random
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy as np
import pytest
import requests
from lm_eval.tasks import TaskManager

from sparseprefill.evals import lm_eval_tasks
from sparseprefill.evals.lm_eval_tasks import MADE, OFFLINE_TASKS, RULER_TASKS, LmEvalRuler, run_lm_eval
from sparseprefill.evals.loading import load_model, model_folder
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.evals.tasks import Answer, Attempt, Item

FOLDER = Path(lm_eval.tasks.__file__).parent / "ruler"
QUICK = ("ruler_fwe", "ruler_cwe", "ruler_vt")  # the others import word lists for seconds


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_model(dtype="float32", device="cpu")


@pytest.fixture
def ruler(loaded: tuple[Any, Any]) -> LmEvalRuler:
    return LmEvalRuler(loaded[1], QUICK[:2], lengths=(1024, 1100), samples=2)


def made_by_the_harness(task: str, length: int) -> list[dict[str, Any]]:
    """As it draws them for this task alone from its default seeds, once its modules are loaded."""
    for module in FOLDER.glob("*_utils.py"):
        importlib.import_module(f"lm_eval.tasks.ruler.{module.stem}")
    sys.modules.pop("lm_eval.tasks.ruler.cwe_utils", None)
    random.seed(0)
    np.random.seed(1234)
    given = {"tokenizer": model_folder(None), "max_seq_lengths": [length]}
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False, metadata=given)
    return list(manager.load([task])["tasks"][task].eval_docs)


def test_thirteen_tasks_and_those_that_need_nothing() -> None:
    known = TaskManager(include_path=str(FOLDER), include_defaults=False)
    assert len(RULER_TASKS) == 13
    assert set(RULER_TASKS) == set(known.all_subtasks)
    assert len(OFFLINE_TASKS) == 6


def test_the_plan_is_task_length_number(ruler: LmEvalRuler) -> None:
    plan = ruler.plan()
    assert plan[:3] == ["ruler_fwe/1024/0", "ruler_fwe/1024/1", "ruler_fwe/1100/0"]
    assert len(plan) == len(set(plan)) == 8


@pytest.mark.slow  # as all that makes documents: importing the generators of the harness takes seconds
@pytest.mark.parametrize("task", QUICK)
def test_documents_are_those_of_the_harness(loaded: Any, task: str) -> None:
    made = LmEvalRuler(loaded[1], [task], lengths=(1024,), samples=3)
    for number, document in enumerate(made_by_the_harness(task, 1024)[:3]):
        prompt = made.prepare(f"{task}/1024/{number}")
        text = loaded[1].decode(prompt.token_ids)
        assert text.startswith(document["input"][:200])
        assert text.endswith(document["gen_prefix"])
        assert prompt.items[0].references == tuple(document["outputs"])
        assert prompt.items[0].group == {"task": task, "length": 1024}


@pytest.mark.slow
def test_a_prompt_is_the_same_whatever_was_made_before(ruler: LmEvalRuler, loaded: Any) -> None:
    first = {prompt: ruler.prepare(prompt).token_ids for prompt in ruler.plan()}
    other = LmEvalRuler(loaded[1], QUICK[1::-1], lengths=(1100, 1024), samples=2)
    random.seed(99)
    np.random.seed(99)
    again = {prompt: other.prepare(prompt).token_ids for prompt in reversed(ruler.plan())}
    assert again == first
    assert len({tuple(ids) for ids in first.values()}) == len(first)


@pytest.mark.slow
def test_another_seed_makes_other_documents(loaded: Any) -> None:
    prompts = [LmEvalRuler(loaded[1], QUICK[:1], (1024,), 1, seed=seed).prepare("ruler_fwe/1024/0") for seed in (0, 1)]
    assert prompts[0].token_ids != prompts[1].token_ids


@pytest.mark.slow
def test_the_global_generators_are_left_alone(ruler: LmEvalRuler) -> None:
    random.seed(5)
    np.random.seed(5)
    want = random.random(), np.random.random()
    random.seed(5)
    np.random.seed(5)
    ruler.prepare("ruler_cwe/1024/0")
    assert (random.random(), np.random.random()) == want


class Writer:
    """Stands for a model: what it writes is known before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokenizer: Any, text: str) -> None:
        self.asked: list[int] = []
        monkeypatch.setattr(lm_eval_tasks, "generate", lambda attempt, most: self._write(most))
        self.ids = tokenizer.encode(text, add_special_tokens=False)

    def _write(self, most: int) -> list[int]:
        self.asked.append(most)
        return list(self.ids)


@pytest.mark.slow
@pytest.mark.parametrize(("share", "want"), [(1.0, 1.0), (0.5, 0.5), (0.0, 0.0)])
def test_grades_are_those_of_the_harness(
    ruler: LmEvalRuler, loaded: Any, monkeypatch: pytest.MonkeyPatch, share: float, want: float
) -> None:
    prompt = ruler.prepare("ruler_cwe/1100/1")
    references = prompt.items[0].references
    assert len(references) == 10
    text = " and ".join(word.upper() for word in references[: int(share * 10)]) or "nothing\x00 of it"
    writer = Writer(monkeypatch, loaded[1], text)
    (answer,) = ruler.run(Attempt(*loaded, prompt, MethodSpec("dense")))
    assert answer.values == {"found": pytest.approx(want)}
    assert answer.item == "ruler_cwe/1100/1"
    assert writer.asked == [120], "the task's own number of new tokens"


@pytest.mark.slow
def test_methods_answer_the_same_prompt(ruler: LmEvalRuler, loaded: Any) -> None:
    prompt = ruler.prepare("ruler_fwe/1100/0")
    texts = {}
    for spec in (MethodSpec("dense"), MethodSpec("block_sparse", {"keep": 1.0}), MethodSpec("a_shape", {"window": 64})):
        attempt = Attempt(*loaded, prompt, spec)
        (answer,) = ruler.run(attempt)
        texts[spec.name] = answer.text
        assert 0 < attempt.new_tokens <= 50
        assert (attempt.report is None) == (spec.name == "dense")
        assert attempt.report is None or attempt.report.sparse_calls == 4
    assert texts["dense"] == texts["block_sparse"] != texts["a_shape"]


def test_totals_are_means_of_tasks(ruler: LmEvalRuler) -> None:
    pairs = []
    for task, length, value in [("ruler_fwe", 1024, 1.0), ("ruler_fwe", 1024, 0.0), ("ruler_cwe", 1024, 1.0)]:
        item = Item(f"{task}/{length}/{len(pairs)}", {"task": task, "length": length})
        pairs.append((item, Answer(item.id, {"found": value})))
    totals = {(t.name, t.method): t.value for t in ruler.totals({"dense": pairs})}
    assert totals["tasks at 1024", "dense"] == 75.0
    assert totals["tasks at 1100", "dense"] is None
    assert totals["mean of all items", "dense"] == pytest.approx(200 / 3)


def test_settings_name_what_decides_the_samples(ruler: LmEvalRuler, loaded: Any) -> None:
    settings = ruler.settings()
    assert settings["versions"]["lm_eval"] == metadata.version("lm_eval")
    assert settings == LmEvalRuler(loaded[1], QUICK[:2], lengths=(1024, 1100), samples=2, window=1000).settings()
    assert settings != LmEvalRuler(loaded[1], QUICK[:2], lengths=(1024, 1100), samples=3).settings()
    assert any("2024" in note for note in ruler.notes)


@pytest.mark.slow
def test_a_chat_template_is_put_round_the_prompt(loaded: Any) -> None:
    _, tokenizer = load_model(dtype="float32", device="cpu")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if not loop.last %}</{{ m.role }}>"
    )
    tokenizer.chat_template += "{% endif %}{% endfor %}"
    made = LmEvalRuler(tokenizer, QUICK[:1], (1024,), 1, chat_template=True)
    text = tokenizer.decode(made.prepare("ruler_fwe/1024/0").token_ids)
    assert text.startswith("<user>Read the following")
    assert "</user><assistant>" in text
    assert text.endswith("words are:")


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown task": ({"tasks": ["ruler_fwe", "ruler_few"]}, "no RULER task of lm_eval: ruler_few"),
    "no task": ({"tasks": []}, "none given"),
    "twice": ({"tasks": ["ruler_fwe", "ruler_fwe"]}, "once each"),
    "too short": ({"lengths": [1023]}, "without end"),
    "too many": ({"samples": MADE + 1}, "what the harness makes"),
    "no template": ({"chat_template": True}, "no chat template"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_done_is_refused(loaded: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LmEvalRuler(loaded[1], **arguments)


@pytest.mark.slow
def test_a_prompt_beyond_the_window_is_refused(loaded: Any) -> None:
    made = LmEvalRuler(loaded[1], QUICK[:1], (1024,), 1, window=960)
    with pytest.raises(ValueError, match="choose a length somewhat below the window"):
        made.prepare("ruler_fwe/1024/0")


@pytest.mark.parametrize("package", ["wonderwords", "nltk"])
def test_a_missing_package_is_named(loaded: Any, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == package:
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(ImportError, match=rf'{package}: pip install "sparseprefill\[evals\]"'):
        LmEvalRuler(loaded[1], QUICK[:1])


def test_questions_that_cannot_be_fetched_are_named_before_anything_runs(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise requests.exceptions.ConnectionError

    monkeypatch.setattr(requests, "get", no_network)
    with pytest.raises(ValueError, match="ruler_qa_squad: SQuAD from rajpurkar"):
        LmEvalRuler(loaded[1], ["ruler_fwe", "ruler_qa_squad"]).plan()


@pytest.mark.slow
def test_essays_that_cannot_be_had_are_named(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks.ruler import prepare_niah

    def nowhere(*_: Any) -> None:
        raise LookupError

    monkeypatch.setattr(prepare_niah.nltk.data, "find", nowhere)
    with pytest.raises(ValueError, match="niah_single_2, niah_multivalue: NLTK's punkt_tab is not installed"):
        LmEvalRuler(loaded[1], ["niah_single_2", "niah_single_1", "niah_multivalue"]).plan()


@pytest.mark.slow
@pytest.mark.parametrize("task", OFFLINE_TASKS)
def test_every_task_that_needs_nothing_runs(loaded: Any, task: str) -> None:
    made = LmEvalRuler(loaded[1], [task], (1024,), 1, window=32768)
    prompt = made.prepare(f"{task}/1024/0")
    assert 300 < len(prompt.token_ids) < 1064
    (answer,) = made.run(Attempt(*loaded, prompt, MethodSpec("block_sparse", {"keep": 0.3})))
    assert 0 <= answer.values["found"] <= 1


@pytest.mark.slow
def test_any_task_runs_with_several_methods_on_the_same_documents(loaded: Any) -> None:
    specs = [MethodSpec("dense"), MethodSpec("block_sparse", {"keep": 1.0}), MethodSpec("a_shape", {"window": 64})]
    runs = run_lm_eval(
        ["ruler_fwe"], *loaded, specs, limit=3, batch_size=3, metadata={"max_seq_lengths": [1024]}, observe=True
    )
    assert [run.method for run in runs] == [spec.label for spec in specs]
    assert runs[0].documents == runs[1].documents == runs[2].documents
    assert len(runs[0].documents) == 3
    assert set(runs[0].scores) == {("ruler_fwe", "1024,none")}
    assert runs[0].scores == runs[1].scores
    assert runs[0].report is None
    assert runs[2].report is not None
    assert runs[2].report.sparse_calls == 4
    with pytest.raises(ValueError, match="no task of lm_eval: ruler_few"):
        run_lm_eval(["ruler_few"], *loaded, specs)
    with pytest.raises(ValueError, match="each of them once"):
        run_lm_eval(["ruler_fwe"], *loaded, [specs[0], specs[0]])
