"""Contexts and their questions as an evaluation and on the command line, with the model inside."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from sparseprefill.cli import main
from sparseprefill.evals.context_heads import question_heads
from sparseprefill.evals.context_prompts import PLAIN, ContextPrompt
from sparseprefill.evals.context_questions import (
    DENSE,
    RandomKeys,
    ask_all,
    make_questions,
    paired_interval,
    question_plot,
    question_table,
)
from sparseprefill.evals.loading import load_model
from sparseprefill.patterns.retrieval import Retrieval
from sparseprefill.patterns.squeezed import Squeezed
from sparseprefill.prompts import Prose


def test_facts_stand_between_the_edges_and_once() -> None:
    _, tokenizer = load_model()
    made = make_questions(tokenizer, 2000, 12, margin=(100, 200), seed="a")
    assert 1800 < len(made.context) <= 2000
    text = tokenizer.decode(made.context)
    inside = tokenizer.decode(made.context[100:-200])
    assert all(text.count(answer) == inside.count(answer) == 1 for answer in made.answers)
    again = make_questions(tokenizer, 2000, 12, margin=(100, 200), seed="a")
    assert torch.equal(again.context, made.context)
    assert made.answers != make_questions(tokenizer, 2000, 12, margin=(100, 200), seed="b").answers
    with pytest.raises(ValueError, match="do not fit"):
        make_questions(tokenizer, 300, 40, margin=(100, 200), seed="a")


def test_methods_are_compared_on_the_same_questions(tmp_path: Path) -> None:
    model, tokenizer = load_model()
    cells, again = ask_all(
        model, tokenizer,
        [("squeezed", Squeezed, "tokens"), ("tiles", Squeezed, "tiles"), ("retrieval", Retrieval, "tokens"),
         ("random", RandomKeys, "tokens")],
        length=1000, contexts=2, questions=4, shares=(0.3,), timed=1,
    )  # fmt: skip
    by = {cell.method: cell for cell in cells}
    assert set(by) == {"squeezed", "tiles", "retrieval", "random", *DENSE}
    assert by[DENSE[0]].right >= 0.75
    assert by[DENSE[0]].loss == by[DENSE[1]].loss == 0
    assert by[DENSE[0]].high == pytest.approx(100 * (1 - 0.025 ** (1 / 8)))
    assert by["squeezed"].right > by["random"].right
    assert by["retrieval"].right > by["random"].right
    for cell in cells:
        assert cell.share == pytest.approx(1.0 if cell.wished is None else cell.share)
        assert cell.chosen < cell.share or cell.wished is None
        assert cell.loss == pytest.approx(100 * (cell.lost - cell.gained) / 8)
        low, high = sorted((cell.asking, cell.answering))
        assert low - 1e-9 <= cell.share <= high + 1e-9
    assert by["retrieval"].share <= 0.301
    assert abs(by["random"].share - 0.3) < 0.02
    assert by["tiles"].share > by["squeezed"].share, "whole tiles hold more than what was chosen"
    assert "random" in question_table(cells, again)
    question_plot(cells, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size > 5000
    with pytest.raises(ValueError, match=r"ends in \.png"):
        question_plot(cells, tmp_path / "losses.pdf")


def test_the_interval_of_a_paired_loss() -> None:
    rare = np.zeros((5, 40))
    assert paired_interval(rare) == pytest.approx((-1.83, 1.83), abs=0.01)
    rare[0, 0] = 1
    low, high = paired_interval(rare)
    assert low == 0
    assert 0.5 < high <= 2.5
    apart = np.zeros((4, 50))
    apart[0] = 1  # one context differs from the others in every question
    low, high = paired_interval(apart)
    assert low == 0
    assert high >= 50, "contexts are drawn too"


def test_heads_are_those_of_all_layers() -> None:
    model, tokenizer = load_model()
    heads = question_heads(model, tokenizer, 1200, questions=3, train=100)
    config = model.config
    assert len(heads) == config.num_hidden_layers * config.num_key_value_heads
    for key, learnt, asked in heads:
        assert len(learnt) == 100
        assert key.shape[1] == learnt.shape[1] == asked.shape[1]
        assert bool(asked.isfinite().all())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("contexts")
    prose = Prose(5)
    pieces = [prose.sentence() for _ in range(60)]
    pieces.insert(20, " The secret code of the amber anchor is 4711042.")
    (place / "text.txt").write_text("".join(pieces), encoding="utf-8")
    done = CliRunner().invoke(
        main,
        ["context", "build", str(place / "text.txt"), "--out", str(place / "made"), "--method", "squeezed:density=0.6"],
    )
    assert done.exit_code == 0, done.output
    return place


def test_the_command_line_builds_asks_and_tells(folder: Path) -> None:
    question = "What is the secret code of the amber anchor?"
    for more in ((), ("--dense",)):
        done = CliRunner().invoke(
            main,
            ["context", "ask", str(folder / "made"), question, "--cue", " The secret code of the amber anchor is",
             "--max-new-tokens", "9", *more],
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        assert "4711042" in done.output
        assert ("all keys" in done.output) == bool(more)
    told = CliRunner().invoke(main, ["context", "info", str(folder / "made")])
    assert told.exit_code == 0, told.output
    assert "squeezed:density=0.6" in told.output
    facts = json.loads(CliRunner().invoke(main, ["context", "info", str(folder / "made"), "--json"]).output)
    assert facts["method"] == "squeezed"
    assert facts["made"]["tokens"] > 500


def test_the_command_line_refuses_with_a_message(folder: Path, tmp_path: Path) -> None:
    text, made = str(folder / "text.txt"), str(folder / "made")
    (tmp_path / "empty.txt").write_text(" \n")
    for arguments, message in (
        (["build", text, "--out", made], "--again replaces it"),
        (["build", text, "--out", str(tmp_path / "no" / "made")], "make it first"),
        (["build", text, "--out", str(tmp_path / "made"), "--method", "squeezd"], "Did you mean 'squeezed'"),
        (["build", text, "--out", str(tmp_path / "made"), "--tokens", "200"], "no longer than its sink"),
        (["build", str(tmp_path / "empty.txt"), "--out", str(tmp_path / "made")], "the text is empty"),
        (["build", str(tmp_path / "none.txt"), "--out", str(tmp_path / "made")], "there is no text"),
        (["ask", made], "nothing is asked"), (["ask", made, "  "], "the question is empty"),
        (["ask", str(tmp_path / "none"), "What?"], "there is no context"),
        (["ask", made, "What?", "--dtype", "bfloat16"], "another model"),
        (["info", str(tmp_path)], "there is no context"),
    ):  # fmt: skip
        done = CliRunner().invoke(main, ["context", *arguments])
        assert done.exit_code == 1, (arguments, done.output)
        assert message in done.output, (arguments, done.output)
        assert "Traceback" not in done.output
    assert sorted(each.name for each in tmp_path.iterdir()) == ["empty.txt"]


def test_a_prompt_is_cut_where_the_text_ends() -> None:
    _, tokenizer = load_model()
    plain = ContextPrompt.of(tokenizer)
    assert (plain.before, plain.after) == PLAIN
    assert ContextPrompt.from_dict(json.loads(json.dumps(plain.to_dict()))) == plain

    class Chatting:
        """A tokenizer with a template of its own."""

        chat_template = "yes"

        def apply_chat_template(self, turns: list[dict[str, str]], **_: object) -> str:
            return f"<s>[user]{turns[0]['content'].strip()}[assistant]"

    chat = ContextPrompt.of(Chatting())
    assert (chat.first, chat.before, chat.after, chat.special) == ("<s>[user]", "\n\n", "[assistant]", ())
    for damaged in ({}, {"first": 1, "before": "", "after": "", "special": []}):
        with pytest.raises(ValueError, match="how its questions are worded"):
            ContextPrompt.from_dict(damaged)
