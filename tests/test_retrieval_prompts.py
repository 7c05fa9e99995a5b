"""Retrieval prompts: right by what they say themselves, filled to a unit, the same whatever else is made."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sparseprefill.evals import retrieval_prompts
from sparseprefill.evals.needle_prompts import KINDS, needle_draft
from sparseprefill.evals.retrieval_prompts import (
    QUESTION_PLACES,
    TASKS,
    TEXT_TASKS,
    Difficulty,
    Haystack,
    Sample,
    UserText,
    draft,
    draw_keys,
    draw_numbers,
    fitted,
    largest,
    prose,
    statement,
    zeta,
)
from sparseprefill.prompts import KEY_ADJECTIVES, KEY_NOUNS

FACT = re.compile(r"(?:The|One of the) secret codes? of the ([\w -]+?) is ([\w-]+)\.")


def needed(sample: Sample) -> int:
    """A token a word, and as many for the answer as it has."""
    return len((sample.text() + sample.cue + sample.reply).split())


def filled(task: str, length: int = 1500, **options: int) -> Sample:
    return fitted(lambda tokens: draft(task, tokens, **options), length, needed, task)


# ---- what a prompt says is what it asks for


@pytest.mark.parametrize("task", [t for t in TASKS if t.startswith(("single", "multi"))])
@pytest.mark.parametrize("index", range(3))
def test_facts(task: str, index: int) -> None:
    sample = filled(task, index=index)
    text = "".join(sample.context)
    stated = FACT.findall(text)
    asked = re.findall(r"secret codes? of the ([\w -]+?)(?=,|\?| and the secret)", sample.question)
    assert len(set(asked)) == len(asked) == (4 if task == "multi_query" else 1)
    assert tuple(value for key in asked for name, value in stated if name == key) == sample.references
    assert len(stated) == {"single": 1, "multi_key": 4, "multi_value": 4, "multi_query": 4}.get(
        task if task in ("multi_key", "multi_value", "multi_query") else task.split("_")[0], sample.size + 1
    )
    if task != "multi_value":
        assert len({name for name, _ in stated}) == len(stated), "every key once"
        assert asked[0] in sample.cue
    values = [value for _, value in stated]
    assert len(set(values)) == len(values)
    everything = sample.text()
    for reference, place in zip(sample.references, sample.places, strict=True):
        assert reference in sample.context[place]
        assert everything.count(reference) == 1
        assert sum(reference in value for value in values) == 1, "no answer inside another"
        assert re.fullmatch(r"\d{7}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", reference)
        assert reference in sample.reply


@pytest.mark.parametrize(("hops", "chains"), [(4, 1), (1, 3), (7, 4)])
def test_variables(hops: int, chains: int) -> None:
    sample = filled("variable_tracking", difficulty=Difficulty(hops=hops, chains=chains))  # type: ignore[arg-type]
    values: dict[str, str] = {}
    # in reading order: a variable is only ever set to one that is set before it
    for name, source in re.findall(r"Let (\w+) be (\w+)\.", "".join(sample.context)):
        assert name not in values
        values[name] = values[source] if source.isalpha() else source
    assert len(values) == chains * (hops + 1)
    assert len(set(values.values())) == chains
    (wanted,) = re.findall(r"are (\d+)", sample.question)
    assert {name for name, value in values.items() if value == wanted} == set(sample.references)
    assert len(sample.references) == hops + 1
    assert wanted in sample.cue
    assert wanted not in sample.intro, "the example has a value of its own"


@pytest.mark.parametrize("length", [1500, 6000])
def test_common_words(length: int) -> None:
    sample = filled("common_words", length)
    entries = re.findall(r" (\d+)\. (\w+)", "".join(sample.context))
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    counts = Counter(word for _, word in entries)
    often, seldom = (30, 3) if length >= 4096 else (6, 1)
    assert {word for word, count in counts.items() if count == often} == set(sample.references)
    assert set(counts.values()) == {often, seldom}
    assert len(counts) == 10 + sample.size
    assert not any(word in sample.intro for word in counts)


@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.0])
@pytest.mark.parametrize("length", [400, 3000])
def test_frequent_words(alpha: float, length: int) -> None:
    sample = filled("frequent_words", length, difficulty=Difficulty(alpha=alpha))  # type: ignore[arg-type]
    (dots, most), *ranked = Counter("".join(sample.context).split()).most_common()
    assert set(dots) == {"."}
    assert tuple(word for word, _ in ranked[:3]) == sample.references
    assert ranked[2][1] > ranked[3][1], "no tie for the third place"
    for rank, count in enumerate([most, *(count for _, count in ranked)], 1):
        assert count == int(sample.size / (rank**alpha * zeta(alpha))) or rank > 4


def test_zeta() -> None:
    for alpha, exact in ((2.0, math.pi**2 / 6), (4.0, math.pi**4 / 90), (1.1, 10.5844484649508)):
        assert zeta(alpha) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [0.0, 0.33, 1.0])
def test_needles_stand_where_they_are_asked_for(kind: str, depth: float) -> None:
    sample = fitted(lambda tokens: needle_draft(kind, tokens, depth), 1500, needed, kind)
    text = "".join(sample.context)
    widest = max(map(len, sample.context)) / len(text)
    assert depth - 3 * widest <= sample.depths[0] <= depth + 3 * widest
    assert sample.references[0] in sample.context[sample.places[0]]
    for reference in sample.references:
        assert sample.text().count(reference) == 1
    if kind == "multi":
        steps = [depth + k * (1 - depth) / 3 for k in range(3)]
        assert sample.depths == pytest.approx(steps, abs=4 * widest)
    if kind == "kv":
        entries = json.loads(text)
        (key,) = re.findall(r'key "([^"]+)"', sample.question)
        assert (entries[key],) == sample.references
        assert len(entries) == sample.size + 1
    if kind == "two_hop":
        owned = dict(re.findall(r"(\w+) owns the ([\w ]+)\.", text))
        codes = dict(FACT.findall(text))
        (owner,) = re.findall(r"what (\w+) owns", sample.question)
        assert (codes[owned[owner]],) == sample.references
        assert len(owned) == len(codes) == 3, "others stand there too"
        assert owned[owner] not in sample.question + sample.cue
        assert owned[owner] in sample.context[sample.places[1]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_its_own_at_every_depth_and_the_same_each_time(kind: str) -> None:
    made = [needle_draft(kind, 2000, depth, index=i).make(40) for depth in (0.1, 0.1001, 0.8) for i in (0, 1)]
    again = [needle_draft(kind, 2000, depth, index=i).make(40) for depth in (0.1, 0.1001, 0.8) for i in (0, 1)]
    assert made == again
    assert len({sample.references for sample in made}) == len(made), "what is asked is another fact each time"
    assert len({sample.text() for sample in made}) == len(made)


# ---- haystacks and questions


@given(
    st.lists(st.text("ab ", min_size=1, max_size=9), min_size=1, max_size=30),
    st.lists(st.floats(0, 1), max_size=6),
    st.data(),
)
def test_needles_between_units(units: list[str], depths: list[float], data: st.DataObject) -> None:
    size = data.draw(st.integers(1, len(units)))
    haystack = Haystack(iter(units))
    needles = [(depth, f"<{k}>") for k, depth in enumerate(depths)]
    pieces, places = haystack.around(size, needles)
    assert [piece for piece in pieces if not piece.startswith("<")] == units[:size]
    assert [pieces[place] for place in places] == [text for _, text in needles]
    total = sum(map(len, units[:size]))
    for (depth, _), place in zip(needles, places, strict=True):
        before = [piece for piece in pieces[:place] if not piece.startswith("<")]
        # the last boundary that is not too deep
        reached = sum(map(len, before))
        assert reached <= depth * total
        assert len(before) == size or reached + len(units[len(before)]) > depth * total
    units_before = [sum(not piece.startswith("<") for piece in pieces[:place]) for place in places]
    assert sorted(range(len(places)), key=places.__getitem__) == sorted(
        range(len(places)), key=lambda k: (units_before[k], k)
    ), "at one boundary, in the order given"
    assert haystack.around(size, needles) == (pieces, places)


@pytest.mark.parametrize("kind", KINDS)
def test_question_places(kind: str) -> None:
    sample = needle_draft(kind, 2000, 0.5).make(60)
    texts = {where: sample.text(where) for where in QUESTION_PLACES}
    whole = "".join(sample.context)
    for where, text in texts.items():
        assert text.count(sample.question) == 1
        rest = text.replace(sample.question, "", 1)
        assert rest == (sample.intro + whole)
        share = (text.index(sample.question) - len(sample.intro)) / len(whole)
        assert {"start": share == 0, "middle": 0.4 < share < 0.6, "end": share == 1}[where]
    with pytest.raises(ValueError, match="unknown question place 'top'"):
        sample.text("top")


def test_haystack_of_the_users_own() -> None:
    own = [" Alpha 1234567 beta.", " Gamma."]
    sample = draft("multi_key", 2000, text=UserText.of(own)).make(50)
    assert set(sample.context) - set(own) == {
        sample.context[k] for k in range(len(sample.context)) if FACT.search(sample.context[k])
    }
    assert len(FACT.findall("".join(sample.context))) == 4
    with pytest.raises(ValueError, match="the haystack is empty"):
        UserText.of([" ", ""])


@given(
    st.lists(st.text("ab. 中", max_size=900), min_size=1, max_size=5).filter(lambda all_: any(s.strip() for s in all_))
)
def test_a_users_text_is_kept_in_units_that_can_be_fitted(sentences: list[str]) -> None:
    kept = [sentence for sentence in sentences if sentence.strip()]
    pieces, _ = prose(random.Random(1), UserText.of(sentences)).around(60, [])
    assert all(len(piece) <= 400 for piece in pieces)
    assert "".join(pieces) in "".join(kept) * 61, "nothing is lost or changed"


def test_numbers_are_not_in_the_users_text() -> None:
    most = [f" {number}" for number in range(10, 100) if number != 42]
    assert draw_numbers(1, random.Random(3), UserText.of(most), digits=2) == ["42"]
    everything = UserText.of([statement(f"{first} {second}", "1") for first in KEY_ADJECTIVES for second in KEY_NOUNS])
    with pytest.raises(ValueError, match="states facts"):
        draw_keys(1, random.Random(3), everything)


# ---- fitting


@given(
    st.lists(st.integers(-3, 12), min_size=1, max_size=40), st.integers(0, 3), st.integers(5, 4000), st.integers(1, 50)
)
@example([12] * 30 + [-3] * 9, 1, 4000, 1)
def test_the_largest_size_that_fits(steps: list[int], slope: int, room: int, least: int) -> None:
    """Also where more text takes fewer tokens now and then: one fits, one more does not."""
    asked = []

    def need(size: int) -> int:
        asked.append(size)
        rounds, rest = divmod(size, len(steps))
        return 1 + rounds * (sum(steps) + slope) + sum(steps[:rest])

    if need(least) > room:
        return
    if sum(steps) + slope <= 0:  # no end of units fits
        with pytest.raises(ValueError, match="no tokens"):
            largest(need, room, least, "x")
    elif sum(steps) + slope >= len(steps):  # a unit takes a token or more
        size = largest(need, room, least, "x")
        assert size >= least
        assert need(size) <= room < need(size + 1)
    assert len(asked) < 80


def test_a_tokenizer_that_swallows_the_haystack() -> None:
    with pytest.raises(ValueError, match="into no tokens"):
        fitted(lambda tokens: draft("single_text", tokens), 1000, lambda sample: 50, "x")


@pytest.mark.parametrize("task", ["multi_key_haystack", "common_words"])
def test_words_that_run_out(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval_prompts, "_MOST_DRAWN", 60)
    with pytest.raises(ValueError, match=r"no more than 60 .* choose a shorter length"):
        filled(task, 5000)


@pytest.mark.parametrize("task", TASKS)
def test_too_short_a_length_names_the_smallest_that_works(task: str) -> None:
    with pytest.raises(ValueError, match=f"{task}: 12 tokens are too short") as refusal:
        filled(task, 12)
    named = int(re.findall(r"(\d+) is the smallest", str(refusal.value))[0])
    assert needed(filled(task, named)) <= named
    with pytest.raises(ValueError, match=f"{named} is the smallest"):
        filled(task, named - 1)


# ---- seeds


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_is_the_same_whatever_else_is_made(task: str) -> None:
    alone = filled(task, index=2)
    filled(task, index=1)
    random.seed(99)
    assert filled(task, index=2) == alone
    one = draft(task, 1500, index=2)
    one.make(alone.size + 500)
    assert one.make(alone.size) == alone, "whatever sizes were tried"
    others = [filled(task, index=3), filled(task, index=2, seed=2), filled(task, 1499, index=2)]
    assert len({alone.text(), *(other.text() for other in others)}) == 4


def test_prompts_of_this_version() -> None:
    """A prompt that changes makes old results incomparable: raise GENERATOR_VERSION with this digest."""
    digest = hashlib.sha256()
    for sample in (
        *(draft(task, length, index=1).make(150) for task in TASKS for length in (2000, 8000)),
        *(needle_draft(kind, 2000, 0.3, index=1).make(50) for kind in KINDS),
    ):
        digest.update(repr((sample.text(), sample.cue, sample.reply, sample.references)).encode())
    assert digest.hexdigest()[:16] == "8438ad7e34e2960b"


# ---- refusals


@pytest.mark.parametrize("field", ["keys", "values", "queries", "hops", "chains", "common"])
def test_difficulties(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be between 1 and"):
        Difficulty(**{field: 0})
    with pytest.raises(ValueError, match=f"{field} must be between 1 and"):
        Difficulty(**{field: 1000})


def test_refusals() -> None:
    with pytest.raises(ValueError, match="alpha must be between"):
        Difficulty(alpha=1.0)
    with pytest.raises(ValueError, match="unknown task 'qa': choose from single_noise"):
        draft("qa", 1000)
    with pytest.raises(ValueError, match="unknown kind 'haystack': choose from classic"):
        needle_draft("haystack", 1000, 0.5)
    with pytest.raises(ValueError, match="between 0 and 1, got 50"):
        needle_draft("classic", 1000, 50)
    with pytest.raises(ValueError, match="needles must be between 1"):
        needle_draft("multi", 1000, 0.5, needles=0)
    assert set(TEXT_TASKS) < set(TASKS)
