"""RULER's tasks as an evaluation: lengths kept to, oracles that score 1, official averages, the model inside."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
from eval_tokenizers import TOKENIZERS, ByteTokenizer, WordTokenizer, inside

from sparseprefill.evals import ruler
from sparseprefill.evals.loading import load_model
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.evals.prompt_rendering import Renderer, plain_ids, prefix_ids
from sparseprefill.evals.retrieval_prompts import TASKS, Sample, draft
from sparseprefill.evals.ruler import Ruler
from sparseprefill.evals.tasks import Answer, Attempt, Item
from sparseprefill.huggingface_modules import model_window


@functools.cache
def model_inside() -> tuple[Any, Any]:
    return load_model(None)


def with_replies(monkeypatch: pytest.MonkeyPatch, module: Any, tokenizer: Any, reply: Any) -> None:
    """Generation that writes `reply(sample)`."""

    def generate(attempt: Attempt, max_new_tokens: int) -> list[int]:
        ids = plain_ids(tokenizer, reply(attempt.prompt.data))
        assert len(ids) <= max_new_tokens, "there is room for a right answer"
        return ids

    monkeypatch.setattr(module, "generate", generate)


def score(task: Any, prompt: str) -> dict[str, float]:
    made = task.prepare(prompt)
    (answer,) = task.run(Attempt(None, task.tokenizer, made, MethodSpec("dense")))  # type: ignore[arg-type]
    assert answer.item == made.items[0].id
    return answer.values


# room for the least of every task
LENGTHS = {"inside": 2500, "words": 1300}


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", TASKS)
def test_prompts_fill_their_length_to_a_unit(name: str, tokenizer: str) -> None:
    tokens = TOKENIZERS[tokenizer]()
    length = LENGTHS.get(tokenizer, 4000)
    task = Ruler(tokens, [length], tasks=[name], samples=1, seed=5)
    prompt = task.prepare(f"{name}/{length}/0")
    sample: Sample = prompt.data
    budget = prompt.details["new_tokens"]
    assert prompt.details["tokens"] == len(prompt.token_ids)
    assert len(prompt.token_ids) + budget <= length
    larger = draft(name, length, seed=5).make(sample.size + 1)
    assert len(task.renderer.token_ids(larger.text(), larger.cue)) + budget > length
    text = tokens.decode(prompt.token_ids)
    if tokenizer != "words":
        assert text.endswith(sample.cue.strip())
        assert sample.question in text
    if tokenizer.startswith("bytes"):
        assert prompt.token_ids.count(tokens.bos_token_id) == 1
        assert prompt.token_ids[0] == tokens.bos_token_id
        assert prompt.token_ids[-1] != tokens.eos_token_id, "a closed text has no answer"
    if "chat" in tokenizer:
        assert text.startswith(f"[user]{sample.intro}")
        assert text.endswith(f"[/][assistant]{sample.cue.lstrip()}"), "the cue pre-fills the reply"


@pytest.mark.parametrize("tokenizer", ["inside", "bytes, chat", "words"])
@pytest.mark.parametrize("name", TASKS)
def test_oracles(name: str, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = TOKENIZERS[tokenizer]()
    length = LENGTHS.get(tokenizer, 4000)
    task = Ruler(tokens, [length], tasks=[name], samples=2)
    for prompt in task.plan():
        for reply, wanted in (
            (lambda sample: sample.reply, 1.0),
            (lambda sample: " and ".join(sample.references).upper(), 1.0),
            (lambda sample: "", 0.0),
            (lambda sample: " I do not know 1234 what it is", 0.0),
            (lambda sample: f" {sample.references[-1]}", None),
        ):
            with_replies(monkeypatch, ruler, tokens, reply)
            if wanted is None:
                wanted = 1 / len(task.prepare(prompt).items[0].references)
            assert score(task, prompt) == {"string_match_all": wanted}


def test_replies_are_cleaned_before_they_are_scored() -> None:
    task = Ruler(inside(), [1000], tasks=["single_noise"], samples=1)
    prompt = task.prepare("single_noise/1000/0")
    (number,) = prompt.items[0].references
    assert task.grade(prompt, f"12{number}34").values == {"string_match_all": 1.0}
    assert task.grade(prompt, f"{number[:3]}\t{number[3:]}").values == {"string_match_all": 0.0}
    assert task.grade(prompt, " \x00\n").details == {"null": True}
    assert prompt.items[0].chance == 0.0


def test_plan_and_settings() -> None:
    task = Ruler(inside(), [1024, 2048], samples=3)
    plan = task.plan()
    assert len(set(plan)) == len(plan) == len(TASKS) * 2 * 3
    first = task.settings()
    assert json.loads(json.dumps(first)) == first
    same = Ruler(inside(), [1024, 2048], samples=3, chat="none")
    assert same.settings() == first, "a choice that changes no prompt is no other setting"
    others: list[Ruler] = [
        Ruler(inside(), [1024, 2048], samples=3, seed=2),
        Ruler(inside(), [1024, 2048], samples=3, haystack=[" One."]),
        Ruler(inside(), [1024, 2048], samples=3, haystack=[" Two."]),
        Ruler(inside(), [1024, 2048], samples=3, new_tokens={"single_hex": 60}),
        Ruler(ByteTokenizer(), [1024, 2048], samples=3),
        Ruler(ByteTokenizer(chat=True), [1024, 2048], samples=3),
        Ruler(ByteTokenizer(chat=True), [1024, 2048], samples=3, chat="none", seed=3),
    ]
    seen = [json.dumps(first), *(json.dumps(each.settings()) for each in others)]
    assert len(set(seen)) == len(seen)


def test_a_prompt_is_the_same_in_every_plan() -> None:
    wide = Ruler(inside(), [900, 1800], samples=4)
    narrow = Ruler(inside(), [1800], tasks=["multi_value"], samples=2)
    for prompt in narrow.plan():
        assert narrow.prepare(prompt) == wide.prepare(prompt)


def test_totals_are_the_official_averages() -> None:
    task = Ruler(inside(), [4096, 8192], tasks=["single_noise", "multi_key"], samples=3)
    scores = {("single_noise", 4096): [1, 1, 1], ("multi_key", 4096): [1, 1, 0.25],
              ("single_noise", 8192): [1, 0, 0], ("multi_key", 8192): [0, 0, 0]}  # fmt: skip
    pairs = [
        (Item(f"{name}/{length}/{i}", {"task": name, "length": length}), Answer("", {"string_match_all": value}))
        for (name, length), values in scores.items()
        for i, value in enumerate(values)
    ]
    totals = {(t.name, t.method): t.value for t in task.totals({"dense": pairs, "none": []})}
    assert totals["4096 tokens", "dense"] == (100 + 75) / 2
    assert totals["8192 tokens", "dense"] == (33.33 + 0) / 2, "rounded by task, as officially"
    assert totals["Avg", "dense"] == (87.5 + 16.665) / 2
    assert totals["wAvg (inc)", "dense"] == pytest.approx((87.5 + 2 * 16.665) / 3)
    assert totals["wAvg (dec)", "dense"] == pytest.approx((2 * 87.5 + 16.665) / 3)
    assert totals["effective length", "dense"] == 4096
    assert totals["Avg", "none"] is None
    assert totals["effective length", "none"] is None


def test_refusals() -> None:
    for arguments, message in (
        ({"lengths": []}, "no length to run"),
        ({"lengths": [512, 512]}, "a length stands twice"),
        ({"lengths": [-1]}, "numbers of tokens"),
        ({"lengths": [512, 70000], "window": 32768}, "70000 tokens exceed the model's window of 32768"),
        ({"tasks": []}, "no task to run"),
        ({"tasks": ["qa"]}, "unknown task 'qa': choose from single_noise"),
        ({"tasks": ["multi_key", "multi_key"]}, "a task stands twice"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"chat": "maybe"}, "choose one of auto, none, always"),
        ({"chat": "always"}, "the tokenizer has no chat template"),
        ({"haystack": [" "]}, "the haystack is empty"),
        ({"haystack": [" A."], "tasks": ["common_words"]}, "no task here hides anything in a text"),
        ({"new_tokens": {"single_noise": 0}}, "at least 1 new token"),
        ({"new_tokens": {"qa": 5}}, "new tokens for 'qa', which is not run"),
    ):
        with pytest.raises(ValueError, match=message):
            Ruler(inside(), **{"lengths": [512], **arguments})  # type: ignore[arg-type]
    task = Ruler(inside(), [100], tasks=["single_noise"], samples=1)
    with pytest.raises(ValueError, match=r"single_noise/100/0: 100 tokens are too short.* is the smallest length"):
        task.prepare("single_noise/100/0")
    for unknown in ("single_noise/100/1", "single_noise/100/00", "multi_key/100/0", "single_noise/200/0", "x"):
        with pytest.raises(ValueError, match="is no prompt of this plan"):
            task.prepare(unknown)


def test_special_tokens() -> None:
    assert prefix_ids(inside()) == []
    assert prefix_ids(ByteTokenizer()) == prefix_ids(ByteTokenizer(closes=True)) == [256]
    assert prefix_ids(WordTokenizer()) == []
    assert Renderer.of(ByteTokenizer(chat=True), "none").token_ids("a", "b") == [256, 97, 98]
    assert not Renderer.of(inside()).template


@pytest.mark.slow
def test_the_model_inside_finds_single_needles() -> None:
    model, tokenizer = model_inside()
    task = Ruler(
        tokenizer, [1500], tasks=["single_noise", "single_text"], samples=2, window=model_window(model),
        new_tokens={"single_noise": 9, "single_text": 9},
    )  # fmt: skip
    for prompt in task.plan():
        made = task.prepare(prompt)
        attempt = Attempt(model, tokenizer, made, MethodSpec("dense"))
        (answer,) = task.run(attempt)
        assert answer.values == {"string_match_all": 1.0}, answer.text
        assert attempt.first_token_seconds is not None
        assert 0 < attempt.new_tokens <= made.details["new_tokens"] < 16
    # the same prompt through a patch
    sparse = Attempt(model, tokenizer, made, MethodSpec("a_shape"))
    task.run(sparse)
    assert sparse.report is not None
