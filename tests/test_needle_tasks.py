"""Needles as evaluations: oracles, whole answers, every question place, and answers graded in the prefill."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from eval_tokenizers import TOKENIZERS, ByteTokenizer, inside
from hypothesis import given
from hypothesis import strategies as st
from test_ruler import LENGTHS, model_inside, score, with_replies

from sparseprefill.evals import needle_tasks
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.evals.needle_prompts import KINDS, NEW_TOKENS, TEXT_KINDS, needle_draft
from sparseprefill.evals.needle_tasks import ALL_KINDS, Needles, NeedlesAlong, depth_grid, needle_task, stands_alone
from sparseprefill.evals.tasks import Answer, Attempt, Item
from sparseprefill.huggingface_modules import model_window
from sparseprefill.prompts import needle_prompt


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("question_at", ["start", "middle", "end"])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_fill_their_length_to_a_unit(kind: str, question_at: str, tokenizer: str) -> None:
    tokens = TOKENIZERS[tokenizer]()
    length = LENGTHS.get(tokenizer, 2500)
    task = Needles(tokens, [length], kind=kind, depths=[40], samples=1, question_at=question_at, seed=3)
    (name,) = task.plan()
    prompt = task.prepare(name)
    budget = prompt.details["new_tokens"]
    assert len(prompt.token_ids) + budget <= length
    larger = needle_draft(kind, length, 0.4, seed=3).make(prompt.data.size + 1)
    assert len(task.renderer.token_ids(larger.text(question_at), larger.cue)) + budget > length
    assert prompt.items[0].group == {"depth": 40, "length": length}
    text = tokens.decode(prompt.token_ids)
    if tokenizer != "words":
        assert text.endswith(prompt.data.cue.strip())
        place = text.index(prompt.data.question.strip()) / len(text)
        low, high = {"start": (0, 0.25), "middle": (0.35, 0.65), "end": (0.75, 1)}[question_at]
        assert low <= place <= high
        for reference in prompt.items[0].references:
            assert text.count(reference) == 1
            assert abs(text.index(reference) / len(text) - 0.4) < (0.6 if kind == "multi" else 0.2)


@pytest.mark.parametrize("tokenizer", ["inside", "bytes, chat"])
@pytest.mark.parametrize("kind", KINDS)
def test_oracles(kind: str, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = TOKENIZERS[tokenizer]()
    task = Needles(tokens, [2500], kind=kind, depths=[0, 100], samples=1)
    for prompt in task.plan():
        for reply, found, contained in (
            (lambda sample: sample.reply, 1.0, 1.0),
            (lambda sample: " They are " + ", ".join(sample.references), 1.0, 1.0),
            (lambda sample: "", 0.0, 0.0),
            (lambda sample: " 9" + "6 9".join(sample.references) + "6", 0.0, 1.0),
            (lambda sample: " No." + "x".join(sample.references[:0]), 0.0, 0.0),
        ):
            with_replies(monkeypatch, needle_tasks, tokens, reply)
            assert score(task, prompt) == {"found": found, "contained": contained}


def test_half_of_several_needles() -> None:
    task = Needles(inside(), [1000], kind="multi", needles=4, depths=1, samples=1)
    prompt = task.prepare(task.plan()[0])
    first, second, third, _ = prompt.items[0].references
    answer = task.grade(prompt, f"{first}, {third} and {second}5")
    assert answer.values == {"found": 0.5, "contained": 0.75}
    assert not task.metrics[0].binary
    assert Needles(inside(), [1000]).metrics[0].binary


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("12345", True), (" 12345.", True), ("It is 12345, I think", True), ("number:12345\n", True), ('"12345"', True),
        ("番号は12345です", True), ("code-12345", True), ("123456", False), ("012345", False), ("x12345", False),
        ("12345th", False), ("12,345", False), ("1234 5", False), ("", False), ("123456 and 12345", True),
        ("١12345", False), ("12345_", False),
    ],
)  # fmt: skip
def test_answers_stand_alone(text: str, found: bool) -> None:
    assert stands_alone("12345", text) is found


def test_ids_stand_alone() -> None:
    assert stands_alone("ab-12", '"ab-12",')
    assert not stands_alone("ab-12", "ab-12-34")
    assert not stands_alone("ab-12", "00-ab-12")


@given(st.text("12 x-.", max_size=12), st.integers(1, 222))
def test_answers_stand_alone_as_words_do(text: str, number: int) -> None:
    assert stands_alone(str(number), text) is (str(number) in re.split(r"[^0-9A-Za-z]+", text))


def test_depths() -> None:
    assert depth_grid(10) == (0, 11, 22, 33, 44, 56, 67, 78, 89, 100)
    assert depth_grid(1) == (50,)
    assert len(depth_grid(101)) == len(set(depth_grid(101))) == 101
    assert depth_grid([12.5, 0]) == (12.5, 0)
    for wrong, message in ((0, "between 1 and 101"), ([], "no depth"), ([101], "percentages"), ([5, 5.0], "twice")):
        with pytest.raises(ValueError, match=message):
            depth_grid(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_plans_and_settings(kind: str) -> None:
    task = needle_task(kind, inside(), [900, 1500], samples=2)
    plan = task.plan()
    assert len(set(plan)) == len(plan) == (4 if kind == "along" else 40)
    prompts = [task.prepare(name) for name in plan[:: max(1, len(plan) // 4)]]
    items = [item for prompt in prompts for item in prompt.items]
    assert len({item.id for item in items}) == len(items)
    assert all(set(item.group) == set(task.axes) for item in items)
    settings = task.settings()
    assert json.loads(json.dumps(settings)) == settings
    changes: list[dict[str, Any]] = [{"seed": 2}, {"samples": 3}]
    changes += [{"haystack": [" A."]}, {"haystack": [" B."]}] if kind in (*TEXT_KINDS, "along") else []
    changes += [{"needles": 4}] if kind in ("multi", "two_hop", "along") else []
    changes += [{"question_at": "start"}, {"depths": 9}, {"new_tokens": 200}] if kind != "along" else []
    seen = [json.dumps(settings)]
    seen += [json.dumps(needle_task(kind, inside(), [900, 1500], **{"samples": 2, **c}).settings()) for c in changes]
    assert len(set(seen)) == len(seen), "what changes prompts or grades is a setting"
    narrow = needle_task(kind, inside(), [1500], samples=1)
    name = narrow.plan()[-1]
    assert narrow.prepare(name) == task.prepare(name), "the same whatever else is planned"


def test_refusals() -> None:
    for arguments, message in (
        ({"kind": "haystack"}, "choose from classic, multi, passkey, kv, two_hop, along"),
        ({"question_at": "top"}, "choose one of start, middle, end"),
        ({"lengths": [40000], "window": 32768}, "exceed the model's window"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"needles": 2}, "'classic' has one needle"),
        ({"kind": "multi", "needles": 99}, "needles must be between 1 and"),
        ({"kind": "kv", "haystack": [" A."]}, "'kv' makes its own haystack"),
        ({"haystack": [""]}, "the haystack is empty"),
        ({"new_tokens": 0}, "at least 1 new token"),
        ({"chat": "always"}, "no chat template"),
        ({"kind": "along", "chat": "auto"}, "'along' has no chat"),
        ({"kind": "along", "question_at": "end"}, "'along' has no question_at"),
        ({"kind": "along", "needles": 0}, "needles must be at least 1"),
        ({"kind": "along", "samples": 0}, "samples must be at least 1"),
        ({"kind": "along", "lengths": [40000], "window": 32768}, "exceed the model's window"),
        ({"kind": "along", "haystack": [" "]}, "the haystack is empty"),
    ):
        options = {"kind": "classic", "lengths": [512], **arguments}
        with pytest.raises(ValueError, match=message):
            needle_task(options.pop("kind"), inside(), options.pop("lengths"), **options)  # type: ignore[arg-type]
    for kind in ALL_KINDS:
        task = needle_task(kind, inside(), [60])
        with pytest.raises(ValueError, match="too short"):
            task.prepare(task.plan()[0])
        with pytest.raises(ValueError, match="is no prompt of this plan"):
            task.prepare("classic/61/0/0")
    with pytest.raises(ValueError, match="unknown kind"):
        Needles(inside(), [512], kind="along")
    assert set(NEW_TOKENS) == set(KINDS)


def test_totals_are_means() -> None:
    task = Needles(inside(), [500, 600])
    pairs = [
        (Item(f"{i}", {"length": length}), Answer(f"{i}", {"found": value, "contained": 1.0}))
        for i, (length, value) in enumerate([(500, 0.0), (500, 1.0), (600, 1.0), (600, 1.0)])
    ]
    totals = {total.name: total.value for total in task.totals({"dense": pairs})}
    assert list(totals) == ["500 tokens", "600 tokens", "mean of all items", "mean of all items, contained"]
    assert list(totals.values()) == [50.0, 100.0, 75.0, 100.0]


# ---- all along the prompt


def test_along_grades_token_for_token() -> None:
    task = NeedlesAlong(ByteTokenizer(), [3000], samples=2, needles=4)
    prompt = task.prepare("along/3000/1")
    assert len(prompt.token_ids) == 3000
    assert prompt.token_ids[0] == 256, "a text begins with what the tokenizer puts there"
    assert (
        prompt.token_ids
        == needle_prompt(lambda text: list(text.encode()), 3000, seed=1, index=1, needles=4, prefix=[256]).token_ids
    )
    made = prompt.data
    right = [prompt.token_ids[p] for answer in made.answers for p in range(answer.start, answer.stop)]
    assert [a.values["found"] for a in task.grade(prompt, right)] == [1.0] * 4
    assert [a.values["found"] for a in task.grade(prompt, [0] * len(right))] == [0.0] * 4
    for wrong in range(len(right)):
        got = [a.values["found"] for a in task.grade(prompt, [*right[:wrong], 1, *right[wrong + 1 :]])]
        assert sorted(got) == [0.0, 1.0, 1.0, 1.0], "one token wrong, one answer wrong"
    assert sorted(item.group["depth"] for item in prompt.items) == [12.5, 37.5, 62.5, 87.5]
    for item, answer in zip(prompt.items, task.grade(prompt, right), strict=True):
        assert item.id == answer.item
        low = float(item.group["depth"]) - 12.5
        assert low - 5 < answer.details["needle_at"] < low + 30
        assert answer.details["needle_at"] < answer.details["asked_at"]


@pytest.mark.parametrize("method", ["dense", "a_shape:window=128"])
@torch.no_grad()
def test_along_grades_the_most_likely_tokens_of_all_logits(method: str) -> None:
    model, tokenizer = model_inside()
    spec = MethodSpec.parse(method)
    task = NeedlesAlong(tokenizer, [1024], samples=2, window=model_window(model))
    right = 0.0
    for name in task.plan():
        prompt = task.prepare(name)
        attempt = Attempt(model, tokenizer, prompt, spec, observe=True)
        found = [answer.values["found"] for answer in task.run(attempt)]
        right += sum(found)
        with spec.applied(model, min_length=0):
            guesses = model(input_ids=torch.tensor([prompt.token_ids])).logits[0].argmax(-1).tolist()
        spans = [(each.start, each.stop) for each in prompt.data.answers]
        assert found == [guesses[a - 1 : b - 1] == list(prompt.token_ids[a:b]) for a, b in spans]
        assert attempt.first_token_seconds is not None
        assert attempt.new_tokens == 0
        assert (attempt.report is None) == (method == "dense")
    if method == "dense":
        assert right == 10, "the model inside answers all of them"
    else:
        assert right < 10
        assert attempt.report is not None
        assert attempt.report.density is not None
        assert attempt.report.density < 0.5


def test_along_refuses_what_the_model_cannot_take() -> None:
    model, tokenizer = model_inside()
    task = NeedlesAlong(tokenizer, [33000], samples=1)
    with pytest.raises(ValueError, match="the model's window is 32768"):
        task.run(Attempt(model, tokenizer, task.prepare("along/33000/0"), MethodSpec("dense")))


@pytest.mark.slow
def test_the_model_inside_finds_needles_wherever_the_question_stands() -> None:
    model, tokenizer = model_inside()
    for question_at in ("start", "middle", "end"):
        task = Needles(tokenizer, [1200], depths=[0, 100], samples=2, question_at=question_at, new_tokens=9)
        answers = [
            task.run(Attempt(model, tokenizer, task.prepare(name), MethodSpec("dense")))[0] for name in task.plan()
        ]
        assert all(answer.values["found"] for answer in answers), [answer.text for answer in answers]
    assert torch.is_grad_enabled()
