"""Prompts that heads are profiled on: as long as asked, the same each time, and nothing of one list in the other."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from eval_tokenizers import TOKENIZERS, ByteTokenizer, inside
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparseprefill.evals.needle_tasks import NeedlesAlong
from sparseprefill.evals.profile_prompts import (
    KINDS,
    ProfilePrompts,
    builtin_prompts,
    dataset_prompts,
    jsonl_prompts,
    profile_prompts,
    text_prompts,
)
from sparseprefill.evals.prompt_rendering import first_ids, last_ids, plain_ids, prefix_ids
from sparseprefill.prompts import ProfilePrompt, Prose, prose_ids

BOS = ByteTokenizer.bos_token_id
NUMBERED = "".join(f"<{n:06}>" for n in range(20000))  # no eight letters stand in it twice


def everything(made: ProfilePrompts) -> tuple[ProfilePrompt, ...]:
    return made.tuning + made.held_out


def ids_of(made: ProfilePrompts) -> dict[str, tuple[int, ...]]:
    return {prompt.name: tuple(prompt.token_ids) for prompt in everything(made)}


def jsonl(path: Path, *documents: Any) -> Path:
    lines = [each if isinstance(each, str) else json.dumps(each) for each in documents]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def document(number: int, letters: int) -> str:
    """A text of its own, a token a letter."""
    return NUMBERED[4000 * number :][:letters]


# ---- built in


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_built_in_prompts_of_every_kind(tokenizer: str) -> None:
    made = TOKENIZERS[tokenizer]()
    lengths = [4000, 2900] if "bytes" in tokenizer else [1500, 900]
    found = builtin_prompts(made, lengths, 5, 4)
    expected = [f"{KINDS[i % 4]}/{length}/{i // 4}" for length in lengths for i in range(5)]
    assert [prompt.name for prompt in found.tuning] == expected
    expected = [f"{kind}/{length}/held-out-0" for length in lengths for kind in KINDS]
    assert [prompt.name for prompt in found.held_out] == expected
    prefix = prefix_ids(made)
    longest_unit = 150 if "bytes" in tokenizer else 40
    for prompt in everything(found):
        kind, length, _ = prompt.name.split("/")
        ids = list(prompt.token_ids)
        assert ids[: len(prefix)] == prefix
        if kind in ("needle", "prose"):
            assert len(ids) == int(length)
        else:
            assert int(length) - longest_unit < len(ids) <= int(length), "no unit more would fit"
        if tokenizer != "words":
            assert made.eos_token_id not in ids
            assert BOS not in ids[1:]
        text = made.decode(ids[len(prefix) :])
        facts = re.findall(r"The secret code of the ([a-z]+ [a-z]+) is (\d+)\.", text)
        asked = re.findall(r"What is the secret code of the ([a-z]+ [a-z]+)\?", text)
        assert len(facts) == {"needle": 5, "multi_key": 4}.get(kind, 0)
        assert len(asked) == {"needle": 5, "multi_key": 1}.get(kind, 0)
        assert set(asked) <= dict(facts).keys()
        assert ("Which variables are" in text) == (kind == "variable_tracking")
    assert len(set(ids_of(found).values())) == 2 * 9


def test_a_prompt_is_the_same_whatever_else_is_made_and_another_with_another_seed() -> None:
    few, many = builtin_prompts(inside(), [900], 2, 1), builtin_prompts(inside(), [1200, 900], 7, 3)
    assert ids_of(few).items() <= ids_of(many).items()
    assert builtin_prompts(inside(), [900], 2, 1) == few
    others = builtin_prompts(inside(), [900], 2, 1, seed=2)
    assert not set(ids_of(others).values()) & set(ids_of(few).values())
    assert others.source != few.source
    assert everything(builtin_prompts(inside(), [900], 1, 0)) == few.tuning[:1]


def test_no_evaluation_asks_about_a_tuning_prompt() -> None:
    """The same seed, length and number of an evaluation: another prompt."""
    found = builtin_prompts(inside(), [900], 1, 1, seed=1)
    task = NeedlesAlong(inside(), [900], samples=3, seed=1)
    asked = {tuple(task.prepare(prompt).token_ids) for prompt in task.plan()}
    assert not asked & set(ids_of(found).values())


def test_prose_by_tokens_is_prose() -> None:
    whole = "".join(itertools.islice(Prose("x"), 60)).encode()
    for length in (0, 1, 500, 2000):
        assert bytes(prose_ids(lambda text: list(text.encode()), length, "x")) == whole[:length]
    with pytest.raises(ValueError, match="no tokens at all"):
        prose_ids(lambda text: [], 5, 1)


@pytest.mark.parametrize("length", [4, 100, 500])
def test_lengths_that_are_too_short_for_a_kind_are_refused(length: int) -> None:
    with pytest.raises(ValueError, match="too short"):
        builtin_prompts(inside(), [length], 4, 1)


# ---- a text


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 4000),
    st.lists(st.integers(9, 400), min_size=1, max_size=3, unique=True),
    st.integers(1, 3),
    st.integers(0, 3),
)
def test_windows_of_a_text_are_of_its_two_ends(
    tmp_path: Path, size: int, lengths: list[int], samples: int, held_out: int
) -> None:
    file = tmp_path / "text.txt"
    text = NUMBERED[:size]
    file.write_text(text, encoding="utf-8")
    needed = (samples + held_out) * sum(length - 1 for length in lengths)
    if size < needed:
        with pytest.raises(ValueError, match=f"has {size} tokens, and {needed} are needed"):
            text_prompts(file, ByteTokenizer(), lengths, samples, held_out)
        return
    made = text_prompts(file, ByteTokenizer(), lengths, samples, held_out)
    for prompts, count in ((made.tuning, samples), (made.held_out, held_out)):
        assert [len(prompt.token_ids) for prompt in prompts] == [n for n in lengths for _ in range(count)]
        assert all(prompt.token_ids[0] == BOS for prompt in prompts)
    front, back = ("".join(bytes(p.token_ids[1:]).decode() for p in part) for part in (made.tuning, made.held_out))
    assert text.startswith(front)
    assert text.endswith(back)
    assert len(front) + len(back) == needed <= len(text), "no overlap"
    assert len(ids_of(made)) == (samples + held_out) * len(lengths)


@pytest.mark.parametrize("tokenizer", ["inside", "words"])
def test_tokens_of_a_long_text_are_those_of_the_whole(tokenizer: str, tmp_path: Path) -> None:
    text = "".join(itertools.islice(Prose(5), 4000))
    made = TOKENIZERS[tokenizer]()
    whole = plain_ids(made, text)
    for count in (0, 1, 7, 1000, len(whole) - 3, len(whole), len(whole) + 5):
        assert first_ids(made, text, count) == whole[:count]
        assert last_ids(made, text, count) == whole[max(0, len(whole) - count) :]
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    room = 300 - len(prefix_ids(made))
    found = text_prompts(file, made, [300], 2, 2)
    own = [[*prompt.token_ids][-room:] for prompt in everything(found)]
    assert own == [whole[:room], whole[room : 2 * room], whole[-2 * room : -room], whole[-room:]]
    assert [p.name for p in everything(found)] == [
        "text/300/0",
        "text/300/1",
        "text/300/held-out-0",
        "text/300/held-out-1",
    ]
    assert found.source == "text text.txt"


def test_a_long_text_is_not_encoded_whole(tmp_path: Path) -> None:
    class Counting(ByteTokenizer):
        seen = 0

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            self.seen += len(text)
            return super().__call__(text, add_special_tokens)

    file = tmp_path / "text.txt"
    file.write_text(NUMBERED, encoding="utf-8")
    tokenizer = Counting()
    text_prompts(file, tokenizer, [101], 1, 1)
    assert tokenizer.seen < 2000 < len(NUMBERED)


def test_a_text_that_repeats_itself_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(NUMBERED[:100] * 3, encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"text text.txt: the first 51 tokens of text/51/0 and text/101/held-out-0 are"
    ):
        text_prompts(file, ByteTokenizer(), [51, 101], 1, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 tokens, and 8 are needed"),
        (b"\xff\xfea\x00b\x00", "is not UTF-8 text"),
        (b"abc", "has 3 tokens, and 8 are needed: 1 windows to tune on and 1 held out, of 5 tokens each"),
    ],
)
def test_texts_that_are_none(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        profile_prompts(file, ByteTokenizer(), [5], 1, 1)
    assert str(file) in str(caught.value)


# ---- documents


def test_documents_go_where_they_are_needed_most(tmp_path: Path) -> None:
    sizes = [50, 99, 500, 100, 120, 90, 260, 30, 300, 90, 1000, 1000]
    file = jsonl(tmp_path / "d.jsonl", *({"text": document(n, size), "other": 1} for n, size in enumerate(sizes)))
    made = jsonl_prompts(file, ByteTokenizer(), [100, 201], 1, 2)
    taken = {name: bytes(ids[1:]).decode() for name, ids in ids_of(made).items()}
    assert taken == {
        "jsonl/100/0": document(1, 99), "jsonl/100/held-out-0": document(3, 99),
        "jsonl/100/held-out-1": document(4, 99), "jsonl/201/0": document(2, 200),
        "jsonl/201/held-out-0": document(6, 200), "jsonl/201/held-out-1": document(8, 200),
    }  # fmt: skip
    assert [prompt.name for prompt in made.tuning] == ["jsonl/100/0", "jsonl/201/0"]
    assert made.notes == (
        "9 documents read, 3 left out as too short, 0 as beginning like another", "fields that were read: 'text' (9)",
    )  # fmt: skip
    assert made.source == "prompt file d.jsonl"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 90), max_size=14),
    st.lists(st.integers(20, 80), min_size=1, max_size=3, unique=True),
    st.integers(1, 2),
    st.integers(0, 2),
)
def test_enough_documents_are_found_where_there_are_enough(
    tmp_path: Path, sizes: list[int], lengths: list[int], samples: int, held_out: int
) -> None:
    """No document is wasted on a length that another could have served: as Hall's theorem has it."""
    file = jsonl(tmp_path / "d.jsonl", *({"text": document(n % 40, size)} for n, size in enumerate(sizes)))
    wanted = samples + held_out
    enough = all(
        sum(size + 1 >= length for size in sizes) >= wanted * sum(each >= length for each in lengths)
        for length in lengths
    )
    if not enough:
        with pytest.raises(ValueError, match=r"too few documents|holds no document"):
            jsonl_prompts(file, ByteTokenizer(), lengths, samples, held_out)
        return
    made = jsonl_prompts(file, ByteTokenizer(), lengths, samples, held_out)
    assert [len(prompt.token_ids) for prompt in made.tuning] == [n for n in lengths for _ in range(samples)]
    assert [len(prompt.token_ids) for prompt in made.held_out] == [n for n in lengths for _ in range(held_out)]
    begins = [prompt.token_ids[:20] for prompt in everything(made)]
    assert len(set(begins)) == len(begins), "each document once"


def test_which_field_is_read(tmp_path: Path) -> None:
    texts = [document(n, 60) for n in range(6)]
    file = jsonl(
        tmp_path / "d.jsonl",
        {"content": "x" * 60, "context": "y" * 60, "text": texts[0]},
        {"context": texts[1], "prompt": None, "content": "z" * 60},
        {"token_ids": [7, 8, 9] * 20, "text": texts[2]},
        {"answer": 3, "token_ids": list(range(50))},
        "   ",
    )
    made = jsonl_prompts(file, ByteTokenizer(), [50], 3, 1)
    ids = [prompt.token_ids for prompt in everything(made)]
    assert [bytes(each[1:]).decode() for each in ids[:3]] == [text[:49] for text in texts[:3]]
    assert ids[3] == tuple(range(50)), "ids are taken as they stand"
    assert made.notes[1] == "fields that were read: 'text' (2), 'context' (1), 'token_ids' (1)"

    named = jsonl(tmp_path / "n.jsonl", *({"text": "no", "body": text} for text in texts))
    made = profile_prompts(named, ByteTokenizer(), [50], 1, 1, field="body")
    assert [bytes(p.token_ids[1:]).decode() for p in everything(made)] == [text[:49] for text in texts[:2]]
    assert made.notes[1] == "fields that were read: 'body' (2)"


def test_documents_that_begin_alike_make_one_prompt(tmp_path: Path) -> None:
    file = jsonl(
        tmp_path / "d.jsonl",
        *({"text": document(n, 300)} for n in (0, 0, 0, 1)),
        {"text": document(0, 100) + "another end" * 30},
        {"text": document(2, 300)},
        {"text": document(3, 300)},
    )
    made = jsonl_prompts(file, ByteTokenizer(), [50, 200], 1, 1)
    starts = {bytes(prompt.token_ids[1:9]).decode() for prompt in everything(made)}
    assert starts == {document(n, 8) for n in range(4)}
    assert made.notes[0] == "7 documents read, 0 left out as too short, 3 as beginning like another"
    with pytest.raises(
        ValueError, match=r"0 of 3 with 400 tokens, 3 of 3 with 50 tokens; 7 documents read, 1 left out"
    ):
        jsonl_prompts(file, ByteTokenizer(), [400, 50], 2, 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not a JSON document"),
        ('{"text": NaN}', "NaN is no number"),
        ('{"text": "a", "text": "b"}', "'text' comes twice"),
        ("[" * 100 + "]" * 100, "nests deeper"),
        ('["text"]', "is list"),
        ('"text"', "is 'text' where an object is wanted"),
        ("{}", "has no field prompt or text or context or content or token_ids, it has no field"),
        ('{"body": "a", "id": 3}', "it has 'body', 'id': name the field"),
        ('{"text": null}', "it has 'text'"),
        ('{"text": 3}', "its field 'text' holds 3 where"),
        ('{"prompt": [{"role": "user"}]}', "its field 'prompt' holds"),
        ('{"token_ids": [1, -2]}', "its field 'token_ids' holds"),
        ('{"token_ids": [1, 2.0]}', "its field 'token_ids' holds"),
        ('{"token_ids": [1, true]}', "its field 'token_ids' holds"),
        ('{"text": "abc\\ud800"}', "half a character at place 3"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    good = {"text": document(0, 60)}
    file = jsonl(tmp_path / "d.jsonl", good, "", line.replace('["text"]', '["text", "is list"]'), good)
    with pytest.raises(ValueError, match=message) as caught:
        jsonl_prompts(file, ByteTokenizer(), [50], 1, 1)
    assert f"{file}, line 3" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_bad_line_behind_the_last_that_is_needed_is_not_read(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "d.jsonl", {"text": document(0, 60)}, {"text": document(1, 60)}, "{")
    assert len(everything(jsonl_prompts(file, ByteTokenizer(), [50], 1, 1))) == 2


def test_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "d.jsonl"
    with pytest.raises(FileNotFoundError, match="there is no prompt file at"):
        profile_prompts(file, ByteTokenizer(), [50], 1, 1)
    with pytest.raises(FileNotFoundError, match="there is no text at"):
        profile_prompts(tmp_path / "none.txt", ByteTokenizer(), [50], 1, 1)
    with pytest.raises(ValueError, match="is a folder"):
        profile_prompts(tmp_path, ByteTokenizer(), [50], 1, 1)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="holds no document"):
        profile_prompts(file, ByteTokenizer(), [50], 1, 1)
    file.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match="line 2 is not UTF-8 text: invalid start byte at byte 10"):
        profile_prompts(file, ByteTokenizer(), [50], 1, 1)
    monkeypatch.setattr("sparseprefill.evals.profile_prompts._MOST_LINE_BYTES", 100)
    jsonl(file, {"text": "a" * 50}, {"text": "a" * 100})
    with pytest.raises(ValueError, match="line 2 is longer than 100 bytes"):
        profile_prompts(file, ByteTokenizer(), [90], 1, 1)


# ---- data sets

ROWS = [{"id": n, "text": document(n, 80)} for n in range(4)]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": rows, "test": rows.select([3, 2])}).save_to_disk(tmp_path / "parts")
    return tmp_path


def test_data_sets_on_disk_are_read_like_lines(saved: Path) -> None:
    lines = jsonl_prompts(jsonl(saved / "d.jsonl", *ROWS), ByteTokenizer(), [50], 1, 1)
    for spec in (f"hf:{saved}/plain", f"hf:{saved}/parts", f"hf:{saved}/parts::train"):
        made = profile_prompts(spec, ByteTokenizer(), [50], 1, 1, field="text")
        assert list(ids_of(made).values()) == list(ids_of(lines).values())
        assert [prompt.name for prompt in everything(made)] == ["dataset/50/0", "dataset/50/held-out-0"]
        assert made.source == f"data set hf:{spec.removeprefix(f'hf:{saved}/')}"
        assert made.notes == lines.notes
    made = dataset_prompts(f"hf:{saved}/parts::test", ByteTokenizer(), [50], 1, 1)
    assert bytes(made.tuning[0].token_ids[1:]).decode() == document(3, 49)


def test_a_folder_of_files_is_a_data_set_too(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(saved / "cache"))
    (saved / "files").mkdir()
    jsonl(saved / "files" / "train.jsonl", *ROWS)
    made = profile_prompts(f"hf:{saved}/files", ByteTokenizer(), [50], 2, 1)
    assert [bytes(p.token_ids[1:]).decode() for p in everything(made)] == [document(n, 49) for n in range(3)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf:", "a data set is named hf:NAME"),
        ("hf::x", "a data set is named hf:NAME"),
        ("hf:a:b:c:d", "a data set is named hf:NAME"),
        ("hf:{}/parts::valid", r"has no split 'valid': it has train, test"),
        ("hf:{}/plain::valid", r"has no split 'valid': it has none"),
        ("hf:{}/parts:en", "has no configurations"),
        ("hf:{}/broken", "cannot be read"),
        ("hf:{}/empty", "cannot be read"),
    ],
)
def test_data_sets_that_are_none(saved: Path, spec: str, message: str) -> None:
    (saved / "broken").mkdir()
    (saved / "broken" / "state.json").write_text("{", encoding="utf-8")
    (saved / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        profile_prompts(spec.format(saved), ByteTokenizer(), [50], 1, 1)


def test_data_sets_of_the_hub_are_read_as_far_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def rows() -> Iterator[dict[str, Any]]:
        for row in ROWS[:2]:
            asked.append(row["id"])
            yield row
        raise ConnectionError("the network is gone")

    def load(name: str, config: str | None, *, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
        asked.append((name, config, split, streaming))
        return rows()

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    made = profile_prompts("hf:some/corpus:en:validation", ByteTokenizer(), [50], 1, 1)
    assert asked == [("some/corpus", "en", "validation", True), 0, 1]
    assert made.source == "data set hf:some/corpus:en:validation"
    with pytest.raises(
        FileNotFoundError, match=r"some/corpus cannot be read from the hub \(ConnectionError: the network"
    ):
        profile_prompts("hf:some/corpus", ByteTokenizer(), [50], 2, 1)
    assert asked[3] == ("some/corpus", None, "train", True)


def test_data_sets_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "sparseprefill\[evals\]"'):
        profile_prompts("hf:some/corpus", ByteTokenizer(), [50], 1, 1)


# ---- of all


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": []}, "no length"),
        ({"lengths": [50, 50]}, "stands twice"),
        ({"lengths": [0]}, "numbers of tokens, got 0"),
        ({"lengths": [50.0]}, "numbers of tokens"),
        ({"lengths": [1]}, "1 tokens are too short: the tokenizer puts 1 before every text"),
        ({"samples": 0}, "samples must be a whole number of at least 1"),
        ({"samples": True}, "samples must be"),
        ({"held_out": -1}, "held_out must be a whole number of at least 0"),
        ({"held_out": 1.0}, "held_out must be"),
    ],
)
@pytest.mark.parametrize("spec", ["builtin", "no.txt", "no.jsonl", "hf:no"])
def test_numbers_that_make_no_sense_are_refused_before_anything_is_read(
    spec: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        profile_prompts(spec, ByteTokenizer(), **({"lengths": [50], "samples": 1, "held_out": 1} | changes))


def test_options_that_a_source_does_not_have_are_refused() -> None:
    for spec in ("builtin", "a.txt"):
        with pytest.raises(ValueError, match="a field is for documents"):
            profile_prompts(spec, ByteTokenizer(), [50], 1, 1, field="text")
    for spec in ("a.txt", "a.jsonl", "hf:a"):
        with pytest.raises(ValueError, match="a seed is for built-in prompts"):
            profile_prompts(spec, ByteTokenizer(), [50], 1, 1, seed=1)
    assert profile_prompts("builtin", inside(), [900], 1, 0, seed=4) == builtin_prompts(inside(), [900], 1, 0, 4)


def test_a_prompt_has_a_name_and_tokens() -> None:
    for name, ids in (("", [1]), ("a", []), ("a", ())):
        with pytest.raises(ValueError, match="a name and at least one token"):
            ProfilePrompt(name, ids)
