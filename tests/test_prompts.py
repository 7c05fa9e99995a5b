"""Seeded prompts: exact lengths, known answers, questions all along."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseprefill.prompts import Prose, draw_needles, needle_prompt, text_sentences


def encode(text: str) -> list[int]:
    """A token a character."""
    return [ord(c) for c in text]


def decode(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def test_prose_is_seeded_plain_and_free_of_digits() -> None:
    first = [Prose(1).sentence() for _ in range(1)]
    a, b, other = Prose(1), Prose(1), Prose(2)
    text = [a.sentence() for _ in range(500)]
    assert text == [b.sentence() for _ in range(500)]
    assert text[0] == first[0]
    assert text != [other.sentence() for _ in range(500)]
    assert all(s.startswith(" ") and s.endswith(".") and s[1].isupper() for s in text)
    assert not any(c.isdigit() for s in text for c in s)
    assert len(set(text)) > 450


def test_sentences_of_a_text_join_to_the_text() -> None:
    text = 'He said: "Go."  She\nwent. What then? Nothing'
    sentences = text_sentences(text)
    assert sentences == [' He said: "Go."', " She went.", " What then?", " Nothing"]
    assert "".join(sentences).split() == text.split()


def test_needles_share_nothing() -> None:
    for seed in range(50):
        needles = draw_needles(12, random.Random(seed))
        words = [word for needle in needles for word in needle.key.split()]
        assert len(set(words)) == 24
        assert len({needle.number for needle in needles}) == 12
        assert all(5 <= len(needle.number) <= 7 for needle in needles)
    with pytest.raises(ValueError, match="needles must be between 1 and"):
        draw_needles(1000, random.Random(0))


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1700, 6000), needles=st.integers(1, 8), seed=st.integers(0, 10**6), prefix=st.integers(0, 2))
def test_prompts(length: int, needles: int, seed: int, prefix: int) -> None:
    prompt = needle_prompt(encode, length, seed=seed, needles=needles, prefix=[7] * prefix)
    assert len(prompt.token_ids) == length
    assert prompt.token_ids[:prefix] == [7] * prefix
    assert len(prompt.answers) == needles
    assert prompt.answers[-1].stop == length, "one question closes the prompt"
    assert len({answer.needle.key for answer in prompt.answers}) == needles
    text = decode(prompt.token_ids)
    for answer in prompt.answers:
        assert decode(prompt.token_ids[answer.start : answer.stop]) == answer.needle.answer
        asked = text[: answer.start]
        assert asked.endswith(answer.needle.question)
        assert asked.count(answer.needle.statement) == 1, "stated once, before it is asked"
        assert text.count(answer.needle.question) == 1
        assert asked.index(answer.needle.statement) == round(answer.depth * length)
        assert answer.depth < answer.asked < 1


def test_needles_stand_in_every_part_and_questions_all_along() -> None:
    depths: list[float] = []
    asked: list[float] = []
    for index in range(40):
        prompt = needle_prompt(encode, 8000, seed=3, index=index)
        by_depth = sorted(prompt.answers, key=lambda answer: answer.depth)
        depths += [answer.depth for answer in by_depth]
        asked += [answer.asked for answer in prompt.answers[:-1]]
        assert [answer.part for answer in by_depth] == [0, 1, 2, 3, 4]
    assert min(depths) < 0.05
    assert max(depths) > 0.85
    assert sum(0.2 < place < 0.8 for place in asked) > len(asked) / 3, "middle rows are asked too"


def test_the_same_prompt_whatever_was_made_before() -> None:
    a = needle_prompt(encode, 3000, seed=5, index=7)
    needle_prompt(encode, 3000, seed=5, index=6)
    assert needle_prompt(encode, 3000, seed=5, index=7) == a
    assert needle_prompt(encode, 3000, seed=5, index=8) != a


def test_haystack_of_the_users_own() -> None:
    prompt = needle_prompt(encode, 3000, seed=1, haystack=[" Alpha beta.", " Gamma."])
    rest = decode(prompt.token_ids)
    for answer in prompt.answers:
        rest = rest.replace(answer.needle.statement, "").replace(answer.needle.question + answer.needle.answer, "")
    assert set(rest.replace(".", "").split()) <= {
        "Alpha",
        "beta",
        "Gamma",
        "Alph",
        "Alp",
        "Al",
        "A",
        "Gamm",
        "Gam",
        "Ga",
        "G",
        "bet",
        "be",
        "b",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 100}, "too short"),
        ({"length": 3000, "haystack": []}, "haystack is empty"),
        ({"length": 3000, "haystack": ["", "  "]}, "haystack is empty"),
        ({"length": 3000, "needles": 0}, "needles must be"),
    ],
)
def test_refusals(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        needle_prompt(encode, seed=1, **arguments)  # type: ignore[arg-type]


def test_an_encoder_that_gives_nothing_does_not_hang() -> None:
    def silent(text: str) -> list[int]:
        return encode(text) if "secret" in text else []

    with pytest.raises(ValueError, match="no tokens at all"):
        needle_prompt(silent, 3000, seed=1)
