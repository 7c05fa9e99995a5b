"""LongBench: the official scores, prompts and protocol, and what is refused."""

from __future__ import annotations

import hashlib
import json
import random
import string
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sparseprefill.evals import longbench, longbench_data, longbench_metrics
from sparseprefill.evals.longbench import LongBench, LongBenchV2, Prompting, halves_v1, halves_v2
from sparseprefill.evals.longbench_data import (
    EXTENDED,
    SETS,
    V2,
    V2_FIELDS,
    load_rows,
    official_hashes,
    v1_templates,
    v2_templates,
)
from sparseprefill.evals.longbench_fixture import fixture_rows
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.evals.tasks import Answer, Attempt, Item
from sparseprefill.huggingface_modules import model_window

CASES = json.loads((Path(__file__).parent / "data" / "longbench_cases.json").read_text(encoding="utf-8"))["cases"]
EXACT = 1e-12
CHAT = "{% for m in messages %}<s>[{{ m.role }}]{{ m.content }}{% endfor %}[reply]"
TWO_ARGUMENTS: dict[str, Callable[..., float]] = {
    **{f"{name}_score": metric for name, metric in longbench_metrics.METRICS.items() if "rouge" not in name},
    "rouge_score": longbench_metrics.rouge_l,
    "rouge_zh_score": longbench_metrics.rouge_zh,
    "f1_score": longbench_metrics.token_f1,
}


def cases(suite: str) -> list[Any]:
    found = [case for case in CASES if case["suite"] == suite]
    assert found
    return [pytest.param(case, id=case["id"]) for case in found]


def byte_tokenizer(chat_template: str | None = CHAT, bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, and <s> before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, **{letter: i + 2 for i, letter in enumerate(alphabet)}}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    if bos:
        inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", chat_template=chat_template
    )


def answering(monkeypatch: pytest.MonkeyPatch, reply: Callable[[Attempt], str]) -> None:
    """Every model says what `reply` makes of the attempt."""

    def generate(attempt: Attempt, max_new_tokens: int, **_: Any) -> list[int]:
        ids: list[int] = attempt.tokenizer(reply(attempt), add_special_tokens=False)["input_ids"]
        return ids

    monkeypatch.setattr(longbench, "generate", generate)


def answers_of(task: Any, tokenizer: Any) -> list[tuple[Item, Answer]]:
    pairs = []
    for name in task.plan():
        prompt = task.prepare(name)
        attempt = Attempt(None, tokenizer, prompt, MethodSpec("dense"))  # type: ignore[arg-type]
        pairs += list(zip(prompt.items, task.run(attempt), strict=True))
    return pairs


# scores


@pytest.mark.parametrize("case", cases("metric"))
def test_metrics_are_the_official_ones(case: dict[str, Any]) -> None:
    arguments = [case["prediction"], case["ground_truth"]]
    if case["metric"] == "classification_score":
        score: Callable[..., float] = longbench_metrics.classification
        arguments.append(case["all_classes"])
    else:
        score = TWO_ARGUMENTS[case["metric"]]
    if "expected_error" in case:
        with pytest.raises({"IndexError": IndexError}[case["expected_error"]], match="names no paragraph"):
            score(*arguments)
    elif case.get("platform_dependent"):  # the official recursion overflows its stack
        assert score(*arguments, emulate_recursion_limit=True) == case["expected"]
        assert score(*arguments) == pytest.approx(1.0, abs=1e-8)
    else:
        assert abs(score(*arguments) - case["expected"]) <= EXACT


@pytest.mark.parametrize("case", cases("sample"))
def test_samples_are_scored_officially(case: dict[str, Any]) -> None:
    arguments = (case["dataset"], case["prediction"], case["answers"], case.get("all_classes"))
    assert abs(longbench_metrics.sample_score(*arguments) - case["expected_raw"]) <= EXACT
    one = (case["dataset"], [case["prediction"]], [case["answers"]], case.get("all_classes"))
    assert longbench_metrics.corpus_score(*one) == case["expected_scorer"]


@pytest.mark.parametrize("case", cases("corpus"))
def test_corpora_are_scored_officially(case: dict[str, Any]) -> None:
    arguments = (case["dataset"], case["predictions"], case["answers"])
    if "expected_scorer" in case:
        assert longbench_metrics.corpus_score(*arguments, case.get("all_classes")) == case["expected_scorer"]
    if "expected_scorer_e" in case:
        scores = longbench_metrics.bucket_scores(*arguments, case["lengths"], case.get("all_classes"))
        assert scores == case["expected_scorer_e"]


@pytest.mark.parametrize("case", cases("v2_extract"))
def test_choices_are_extracted_officially(case: dict[str, Any]) -> None:
    choice = longbench_metrics.extract_choice(case["response"])
    assert choice == case["expected_pred"]
    assert (choice == case["answer"]) == case["expected_judge"]


@pytest.mark.parametrize("case", cases("v2_aggregate"))
def test_accuracies_of_version_2(case: dict[str, Any]) -> None:
    rows = [(row["judge"], row["difficulty"], row["length"]) for row in case["rows"]]
    assert longbench_metrics.v2_scores(rows) == case["expected"]


@pytest.mark.parametrize(("version", "halves"), [("expected_v1", halves_v1), ("expected_v2", halves_v2)])
@pytest.mark.parametrize("case", cases("truncation"))
def test_prompts_are_cut_officially(case: dict[str, Any], version: str, halves: Callable[..., Any]) -> None:
    ids, wanted = list(range(case["n_tokens"])), case[version]
    found = halves(ids, case["max_length"])
    if wanted is None:
        assert found is None
        return
    kept = ids if found is None else [*found[0], *found[1]]
    assert len(kept) == wanted["kept"]
    assert kept[:2] == wanted["first_ids"] or kept[: len(wanted["first_ids"])] == wanted["first_ids"]
    assert kept[-len(wanted["last_ids"]) :] == wanted["last_ids"]
    if wanted["head"] is not None:
        assert found is not None
        assert len(found[0]) == wanted["head"]


def test_rounding_is_python_s_for_sets_and_numpy_s_for_buckets() -> None:
    scores = [0.01115]
    assert longbench_metrics.official_mean(scores) == round(1.115, 2) == 1.11
    assert longbench_metrics.official_bucket_mean(scores) == 1.12
    assert longbench_metrics.official_bucket_mean([]) is None
    with pytest.raises(ValueError, match="no score"):
        longbench_metrics.official_mean([])


TEXTS = st.text(max_size=60) | st.text(alphabet="ab .\n`#/ 12Paragraph段落《》，", max_size=60)


@pytest.mark.parametrize("name", [*longbench_metrics.METRICS, "classification"])
@settings(max_examples=60)
@given(prediction=TEXTS, reference=TEXTS, number=st.integers(0, 99))
def test_metrics_are_total(name: str, prediction: str, reference: str, number: int) -> None:
    if name == "classification":
        classes = [*reference.split(), reference, reference[:2]]
        score = longbench_metrics.classification(prediction, reference, classes)
    elif name.startswith("retrieval"):
        paragraph = f"Paragraph {number}" if name == "retrieval" else f"段落{number}"
        score = longbench_metrics.METRICS[name](prediction, paragraph + reference)
    else:
        score = longbench_metrics.METRICS[name](prediction, reference)
    assert 0.0 <= score <= 1.0


def longest_common_subsequence(first: list[str], second: list[str]) -> int:
    """By its definition, over all subsequences of the shorter one."""
    best = 0
    for chosen in range(1 << len(first)):
        words = [word for i, word in enumerate(first) if chosen >> i & 1]
        rest = iter(second)
        if len(words) > best and all(word in rest for word in words):
            best = len(words)
    return best


@settings(max_examples=60)
@given(draw=st.randoms(use_true_random=False))
def test_rouge_l_of_one_sentence_without_repeats_is_the_lcs(draw: random.Random) -> None:
    first, second = (draw.sample("abcdefghij", draw.randint(1, 7)) for _ in range(2))
    common = longest_common_subsequence(first, second)
    recall, precision = common / len(second), common / len(first)
    wanted = 2 * recall * precision / (precision + recall + 1e-8)
    assert longbench_metrics.rouge_l(" ".join(first), " ".join(second)) == pytest.approx(wanted, abs=EXACT)


def test_averages_are_means_of_categories() -> None:
    """The published categories and averages of ChatGLM3-6B-32k, a single set for each category."""
    english = {
        "qasper": 40.33, "hotpotqa": 46.57, "gov_report": 29.53, "trec": 68.10, "passage_count": 50.50, "lcc": 56.21,
    }  # fmt: skip
    assert round(longbench_metrics.category_average(english, "en") or 0, 2) == 48.54
    chinese = {
        "multifieldqa_zh": 62.3, "dureader": 44.78, "vcsum": 17.8, "lsht": 42.0, "passage_retrieval_zh": 94.0,
        "lcc": 56.21,
    }  # fmt: skip
    assert round(longbench_metrics.category_average(chinese, "zh") or 0, 2) == 52.85
    uneven = {"qasper": 0.0, "narrativeqa": 50.0, "trec": 100.0}
    assert longbench_metrics.category_average(uneven, "en") == 62.5
    assert longbench_metrics.dataset_average(uneven) == 50.0
    assert longbench_metrics.category_average({"qasper": 1.0}, "zh") is None
    with pytest.raises(ValueError, match="en or zh"):
        longbench_metrics.category_average(uneven, "de")


def test_the_table_of_sets() -> None:
    assert len(SETS) == 21
    assert len(EXTENDED) == 13
    free = {name for name, entry in SETS.items() if entry.template_free}
    assert free == {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    assert {name for name in free if SETS[name].first_line} == free - {"lcc", "repobench-p"}
    assert [name for name, entry in SETS.items() if entry.stop_at_newline] == ["samsum"]
    assert {entry.language for entry in SETS.values()} == {"en", "zh", "code"}
    assert sum(entry.language == "zh" for entry in SETS.values()) == 5
    assert len({entry.category for entry in SETS.values()}) == 6
    assert {name: entry.max_new_tokens for name, entry in SETS.items() if entry.max_new_tokens == 512} == dict.fromkeys(
        ("gov_report", "qmsum", "multi_news", "vcsum"), 512
    )


# prompts


def test_prompts_from_lm_eval_are_the_official_ones() -> None:
    templates = v1_templates(list(SETS))
    hashes = official_hashes()["longbench"]
    assert set(hashes) == set(SETS)
    for name, text in templates.texts.items():
        assert hashlib.sha256(text.encode()).hexdigest() == hashes[name], name
    assert templates.settings() == {"source": "lm-eval, white space corrected", "official": True}


def test_a_prompts_file_is_held_to_the_hashes(tmp_path: Path) -> None:
    texts = v1_templates(["hotpotqa", "lcc"]).texts
    path = tmp_path / "dataset2prompt.json"
    path.write_text(json.dumps(texts), encoding="utf-8")
    assert v1_templates(["hotpotqa", "lcc"], path).texts == texts
    path.write_text(json.dumps({**texts, "lcc": texts["lcc"].rstrip("\n")}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"prompts of lcc .* not the official"):
        v1_templates(["hotpotqa", "lcc"], path)
    accepted = v1_templates(["hotpotqa", "lcc"], path, verify=False)
    assert accepted.unverified == ("lcc",)
    assert accepted.settings()["official"] is False
    assert list(accepted.settings()["not_official"]) == ["lcc"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "no object"),
        ({}, "no text for hotpotqa"),
        ({"hotpotqa": 3}, "no text for hotpotqa"),
        ({"hotpotqa": "{context} {question}"}, "fields besides"),
        ({"hotpotqa": "{context} {input!r}"}, "fields besides"),
        ({"hotpotqa": "{context} {input.__class__}"}, "fields besides"),
        ({"hotpotqa": "{context} {"}, "no format string"),
        ({"hotpotqa": "{input}"}, "has no {context}"),
    ],
)
def test_broken_prompts_files_are_refused(given: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(given), encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        v1_templates(["hotpotqa"], path, verify=False)


def test_without_lm_eval_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(longbench_data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"sparseprefill\[evals\].*dataset2prompt\.json"):
        v1_templates(["hotpotqa"])


def version_2_prompt(folder: Path) -> Path:
    """A prompt with all marks that is not the official one."""
    path = folder / "0shot.txt"
    path.write_text("\n".join(mark for mark, _ in V2_FIELDS) + "\nSay: The correct answer is (", encoding="utf-8")
    return path


def test_the_prompt_of_version_2_must_be_given(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"0shot\.txt"):
        v2_templates()
    path = version_2_prompt(tmp_path)
    with pytest.raises(ValueError, match="not the official"):
        v2_templates(path)
    text = path.read_text(encoding="utf-8")
    (tmp_path / "p.json").write_text(json.dumps({"0shot": text}), encoding="utf-8")
    for each in (path, tmp_path, tmp_path / "p.json"):
        accepted = v2_templates(each, verify=False)
        assert accepted.texts == {"0shot": text}
        assert accepted.unverified == ("0shot",)
    path.write_text(text.replace("$C_D$", ""), encoding="utf-8")
    with pytest.raises(ValueError, match=r"no \$C_D\$"):
        v2_templates(path, verify=False)


# rows


def written(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


ALL_NAMES = [*SETS, *(f"{name}_e" for name in EXTENDED), V2]


@pytest.mark.parametrize("name", ALL_NAMES)
def test_fixture_rows_pass_the_check_of_real_ones(name: str, tmp_path: Path) -> None:
    assert fixture_rows(name) == fixture_rows(name)
    made = load_rows(name, fixture=True)
    assert made.source == "fixture"
    read = load_rows(name, data=written(tmp_path / f"{name}.jsonl", fixture_rows(name)))
    assert (read.rows, read.sha256) == (made.rows, made.sha256)


def test_every_layout_of_files_gives_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    name, rows = "vcsum", fixture_rows("vcsum")
    rows[0]["context"] += "一\u2028二\x85三"  # ends of lines to str.splitlines, but not in JSON lines
    lines = written(tmp_path / "lines" / f"{name}.jsonl", rows)
    written(tmp_path / "below" / "data" / f"{name}.jsonl", rows)
    (tmp_path / "array").mkdir()
    (tmp_path / "array" / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "packed").mkdir()
    with zipfile.ZipFile(tmp_path / "packed" / "data.zip", "w") as archive:
        archive.write(lines, f"data/{name}.jsonl")
    (tmp_path / "table").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "table" / f"{name}.parquet")
    wanted = load_rows(name, data=lines)
    folders = [tmp_path / each for each in ("lines", "below", "array", "packed", "table")]
    for path in [*folders, tmp_path / "packed" / "data.zip"]:
        found = load_rows(name, data=path)
        assert (found.rows, found.sha256) == (wanted.rows, wanted.sha256), path
        assert str(tmp_path) not in found.source
    monkeypatch.setenv(longbench_data.DATA_VARIABLE, str(tmp_path / "packed"))
    assert load_rows(name).sha256 == wanted.sha256
    assert load_rows(name, fixture=True).sha256 != wanted.sha256
    with pytest.raises(FileNotFoundError, match="hotpotqa"):
        load_rows("hotpotqa")


@pytest.mark.parametrize("name", ["hotpotqa", V2])
def test_offline_the_file_and_the_fixture_are_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(longbench_data.DATA_VARIABLE, raising=False)
    # the data may lie in the cache of whoever runs this
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"{name}\.jsonl.*--data.*fixture=True"):
        load_rows(name)


@pytest.mark.parametrize("archived", [False, True])
def test_rows_from_the_hub_are_checked_too(archived: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.delenv(longbench_data.DATA_VARIABLE, raising=False)
    if archived:
        archive = tmp_path / "data.zip"
        with zipfile.ZipFile(archive, "w") as packed:
            packed.write(written(tmp_path / "qasper_e.jsonl", fixture_rows("qasper_e")), "data/qasper_e.jsonl")
        asked: list[Any] = []
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: (asked.append((a, k)), str(archive))[1])
        assert load_rows("qasper_e").sha256 == load_rows("qasper_e", fixture=True).sha256
        assert asked == [(("THUDM/LongBench", "data.zip"), {"repo_type": "dataset"})]
        with pytest.raises(FileNotFoundError, match=r"data/lcc\.jsonl"):
            load_rows("lcc")
    else:
        rows = fixture_rows(V2)
        monkeypatch.setattr(
            datasets, "load_dataset", lambda name, split: {("THUDM/LongBench-v2", "train"): rows}[name, split]
        )
        assert load_rows(V2).source == "hub THUDM/LongBench-v2"
        rows[2]["answer"] = "E"
        with pytest.raises(ValueError, match=r"row 3 .*answer is 'E'"):
            load_rows(V2)


@pytest.mark.parametrize(("package", "name"), [("datasets", V2), ("pyarrow.parquet", "lcc")])
def test_a_missing_reader_is_named(package: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(longbench_data.DATA_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "lcc.parquet").write_bytes(b"")
    with pytest.raises(ImportError, match=r"sparseprefill\[evals\]"):
        load_rows(name, data=tmp_path if name == "lcc" else None)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "hotpotqa.csv").write_text("a,b", encoding="utf-8")
    (tmp_path / "broken.zip").write_bytes(b"PK no archive")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing PAR1")
    (tmp_path / "object.json").write_text("{}", encoding="utf-8")
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    (tmp_path / "half.jsonl").write_text(json.dumps(fixture_rows("hotpotqa")[0]) + '\n\n{"_id": ', encoding="utf-8")
    for name, said in (
        ("hotpotqa.csv", "none of .jsonl"), ("broken.zip", "not a zip"), ("broken.parquet", "not a parquet"),
        ("object.json", "list of rows"), ("empty.jsonl", "no row"), ("half.jsonl", "line 3 of"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            load_rows("hotpotqa", data=tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no data set file"):
        load_rows("hotpotqa", data=tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match=r"wants lcc\.jsonl"):
        load_rows("lcc", data=tmp_path)
    with pytest.raises(ValueError, match="no set 'hotpot'"):
        load_rows("hotpot", fixture=True)
    with pytest.raises(ValueError, match="no set 'vcsum_e'"):  # E has no such set
        load_rows("vcsum_e", fixture=True)
    with pytest.raises(ValueError, match="exclude each other"):
        load_rows("lcc", data=tmp_path, fixture=True)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("hotpotqa", {"context": None}, "context is None"),
        ("hotpotqa", {"context": " "}, "context is empty"),
        ("hotpotqa", {"input": 3}, "input is 3"),
        ("hotpotqa", {"answers": []}, "answers is an empty list"),
        ("hotpotqa", {"answers": "Paris"}, "answers is 'Paris'"),
        ("hotpotqa", {"answers": [1]}, "answers is"),
        ("hotpotqa", {"length": "9"}, "length is '9'"),
        ("hotpotqa", {"length": -1}, "length is -1"),
        ("hotpotqa", {"length": True}, "length is True"),
        ("hotpotqa", {"dataset": "qasper"}, "another set's row"),
        ("hotpotqa", {"_id": "fixture-0"}, "also that of line 1"),
        ("hotpotqa", {"_id": ""}, "_id is empty"),
        ("hotpotqa", {"all_classes": ["a"]}, "only trec and lsht"),
        ("hotpotqa", {"input": "\ud800"}, "surrogate"),
        ("trec", {"all_classes": None}, "all_classes is None"),
        ("trec", {"all_classes": ["Person"]}, "one list of classes"),
        ("passage_count", {"answers": ["seven"]}, "a number is wanted"),
        ("passage_count", {"answers": ["７"]}, "a number is wanted"),
        ("passage_retrieval_en", {"answers": ["7"]}, "Paragraph and a number"),
        ("passage_retrieval_en", {"answers": ["Paragraph 7 or 8"]}, "Paragraph and a number"),
        ("passage_retrieval_zh", {"answers": ["Paragraph 7"]}, "段落 and a number"),
        (V2, {"difficulty": "normal"}, "difficulty is 'normal'"),
        (V2, {"length": 3}, "length is 3"),
        (V2, {"answer": "(A)"}, "answer is"),
        (V2, {"choice_C": ""}, "choice_C is empty"),
    ],
)
def test_broken_rows_are_refused_with_their_line(name: str, change: dict[str, Any], said: str, tmp_path: Path) -> None:
    rows = fixture_rows(name)
    rows[1].update(change)
    path = tmp_path / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"line 2 of .*{name}\.jsonl: .*{said}"):
        load_rows(name, data=path)


def test_missing_fields_and_the_other_copy_s_columns_are_refused(tmp_path: Path) -> None:
    rows = fixture_rows("trec")
    for field in rows[0]:
        broken = [*rows[:2], {k: v for k, v in rows[2].items() if k != field}]
        with pytest.raises(ValueError, match=rf"line 3 of .* no field '{field}'"):
            load_rows("trec", data=written(tmp_path / "trec.jsonl", broken))
    for row in rows:
        row["question"] = row.pop("input")
    with pytest.raises(ValueError, match=r"question where LongBench has an input.*already hold the instruction"):
        load_rows("trec", data=written(tmp_path / "trec.jsonl", rows))
    with pytest.raises(ValueError, match="an object is wanted"):
        load_rows("trec", data=written(tmp_path / "trec.jsonl", [3]))


def test_counts_may_be_numbers(tmp_path: Path) -> None:
    rows = fixture_rows("passage_count")
    wanted = load_rows("passage_count", fixture=True)
    for row in rows:
        row["answers"] = [int(each) for each in row["answers"]]
    assert load_rows("passage_count", data=written(tmp_path / "passage_count.jsonl", rows)).sha256 == wanted.sha256


# the tasks


def test_an_oracle_gets_everything_and_silence_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    task = LongBench(tokenizer, 8192, fixture=True)
    assert len(task.plan()) == 4 * 21
    assert len(set(task.plan())) == len(task.plan())
    answering(monkeypatch, lambda attempt: attempt.prompt.items[0].references[-1])
    oracle = answers_of(task, tokenizer)
    answering(monkeypatch, lambda attempt: "")
    silent = answers_of(task, tokenizer)
    totals = {(t.method, t.name): t for t in task.totals({"oracle": oracle, "silent": silent})}
    averages = {"English, mean of categories", "Chinese, mean of categories", "mean of data sets"}
    assert {name for _, name in totals} == {*SETS, *averages}
    for (method, name), total in totals.items():
        assert total.value == (100.0 if method == "oracle" else 0.0), (method, name)
    for item, answer in oracle:
        assert answer.item == item.id
        assert set(answer.values) == {metric.name for metric in task.metrics}
        assert set(item.group) == {"dataset", "category", "language"}
    assert "made up" in " ".join(task.notes)


def test_e_is_scored_by_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    task = LongBench(tokenizer, 8192, extended=True, fixture=True)
    assert task.name == "longbench_e"
    assert len(task.plan()) == 4 * 13
    answering(
        monkeypatch, lambda a: a.prompt.items[0].references[0] if a.prompt.items[0].group["bucket"] != "8k+" else ""
    )
    totals = {t.name: t.value for t in task.totals({"m": answers_of(task, tokenizer)})}
    for bucket, wanted in (("0-4k", 100.0), ("4-8k", 100.0), ("8k+", 0.0)):
        for name in (*EXTENDED, "English, mean of categories", "mean of data sets"):
            assert totals[f"{name} {bucket}"] == wanted, name
    assert len(totals) == 3 * 15
    one_each = LongBench(tokenizer, 8192, ["lcc"], extended=True, fixture=True, samples=1)
    assert [one_each.prepare(p).items[0].group["bucket"] for p in one_each.plan()] == ["0-4k", "4-8k", "8k+"]
    empty = {t.name: t.value for t in one_each.totals({"m": []})}
    assert empty["lcc 0-4k"] is None
    assert empty["mean of data sets 0-4k"] is None


def test_averages_of_some_sets_are_not_called_official(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    task = LongBench(tokenizer, 8192, ["qasper", "hotpotqa", "lcc"], fixture=True)
    answering(monkeypatch, lambda attempt: attempt.prompt.items[0].references[0])
    totals = {t.name: t for t in task.totals({"m": answers_of(task, tokenizer)})}
    assert set(totals) == {
        "qasper",
        "hotpotqa",
        "lcc",
        "English, mean of categories (of some sets)",
        "mean of data sets",
    }
    assert "without narrativeqa" in totals["English, mean of categories (of some sets)"].what


@pytest.mark.parametrize("wrong", [False, True])
def test_version_2(wrong: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    task = LongBenchV2(tokenizer, 8192, fixture=True, prompts=version_2_prompt(tmp_path), verify=False)

    def reply(attempt: Attempt) -> str:
        right = attempt.prompt.items[0].references[0]
        return f"The correct answer is ({'ABCD'['BCDA'.index(right)] if wrong else right})."

    answering(monkeypatch, reply)
    pairs = answers_of(task, tokenizer)
    totals = {t.name: t.value for t in task.totals({"m": pairs})}
    assert totals == dict.fromkeys(("overall", "easy", "hard", "short", "medium", "long"), 0.0 if wrong else 100.0)
    assert all(item.chance == 0.25 and set(item.group) == {"domain", "difficulty", "length"} for item, _ in pairs)
    assert task.settings()["prompts"]["official"] is False
    assert "not the official" in " ".join(task.notes)
    prompt = tokenizer.decode(task.prepare(task.plan()[0]).token_ids)
    row = fixture_rows(V2)[0]
    assert all(row[field] in prompt for _, field in V2_FIELDS)
    assert "$" not in prompt


def test_chances() -> None:
    task = LongBench(byte_tokenizer(), 8192, fixture=True)
    chances = {name: task.prepare(f"{name}/fixture-1").items[0].chance for name in SETS}
    known = {"trec": 1 / 4, "lsht": 1 / 4, "passage_retrieval_en": 1 / 8, "passage_retrieval_zh": 1 / 8}
    assert chances == {**dict.fromkeys(SETS), **known}


@pytest.mark.parametrize("mode", ["auto", "none", "always"])
def test_which_prompts_go_through_the_chat_template(mode: str) -> None:
    tokenizer = byte_tokenizer()
    task = LongBench(tokenizer, 8192, fixture=True, chat_template=mode)
    texts = v1_templates(list(SETS)).texts
    for name, entry in SETS.items():
        row = fixture_rows(name)[0]
        plain = texts[name].format(**row)
        written = tokenizer.decode(task.prepare(f"{name}/fixture-0").token_ids)
        templated = mode == "always" or (mode == "auto" and not entry.template_free)
        assert written == (f"<s>[user]{plain}[reply]" if templated else f"<s>{plain}"), name


def test_the_system_line_and_special_tokens_of_the_template() -> None:
    def first(**switches: Any) -> str:
        tokenizer = byte_tokenizer()
        task = LongBench(tokenizer, 8192, ["qasper"], fixture=True, **switches)
        text: str = tokenizer.decode(task.prepare(task.plan()[0]).token_ids)
        return text

    plain = first()
    assert plain.startswith("<s>[user]")
    assert first(double_bos=True) == "<s>" + plain
    assert first(system="Be brief.") == "<s>[system]Be brief." + plain
    template = "{{ mood }}" + CHAT
    tokenizer = byte_tokenizer(template)
    task = LongBench(tokenizer, 8192, ["qasper"], fixture=True, template_options={"mood": "calm"})
    assert tokenizer.decode(task.prepare(task.plan()[0]).token_ids) == "calm" + plain


def test_long_prompts_lose_their_middle_before_the_template() -> None:
    tokenizer = byte_tokenizer()
    task = LongBench(tokenizer, 8192, ["hotpotqa", "trec"], fixture=True, max_length=201)
    plain = v1_templates(["hotpotqa", "trec"]).texts
    for name in ("hotpotqa", "trec"):
        text = plain[name].format(**fixture_rows(name)[0])
        prompt = task.prepare(f"{name}/fixture-0")
        cut = text[:99] + text[-100:]  # the first half has <s>, the 201st token is lost
        assert tokenizer.decode(prompt.token_ids) == (f"<s>[user]{cut}[reply]" if name == "hotpotqa" else f"<s>{cut}")
        details = {"tokens": len(prompt.token_ids), "tokens_uncut": len(text.encode()) + 1, "truncated": True}
        assert prompt.details == details
    whole = LongBench(tokenizer, 8192, ["hotpotqa"], fixture=True).prepare("hotpotqa/fixture-0")
    assert whole.details["truncated"] is False


@pytest.mark.parametrize(("window", "limit", "of"), [(131072, 120000, "protocol"), (65536, 64512, "window")])
def test_version_2_has_a_longest_prompt_of_its_own(window: int, limit: int, of: str, tmp_path: Path) -> None:
    prompts = version_2_prompt(tmp_path)
    found = LongBenchV2(byte_tokenizer(), window, fixture=True, prompts=prompts, verify=False).settings()
    assert (found["max_length"], found["max_length_from"]) == (limit, of)


def test_version_2_cuts_longer_ends(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    switches: dict[str, Any] = {"fixture": True, "prompts": version_2_prompt(tmp_path), "verify": False}
    whole = LongBenchV2(tokenizer, 8192, chat_template="none", **switches).prepare(f"{V2}/fixture-0")
    cut = LongBenchV2(tokenizer, 8192, chat_template="none", max_length=201, **switches).prepare(f"{V2}/fixture-0")
    assert list(cut.token_ids) == [*whole.token_ids[:100], *whole.token_ids[-101:]]


@pytest.mark.parametrize(
    ("window", "given", "limit"), [(131072, None, 130048), (4096, None, 3072), (1100, None, 550), (4096, 3500, 3500)]
)
def test_the_longest_prompt(window: int, given: int | None, limit: int) -> None:
    mode = Prompting(byte_tokenizer(), window, given).checked(["qasper"], 512)
    assert mode.limit() == limit
    assert mode.settings(limit)["max_length_from"] == ("window" if given is None else "given")


@pytest.mark.parametrize(
    ("switches", "said"),
    [
        ({"window": None}, "max_length"),
        ({"max_length": 1}, "at least 2"),
        ({"max_length": 8000}, r"exceed the model's window of 8192: choose at most 7680"),
        ({"chat_template": "maybe"}, "auto, none, always"),
        ({"tokenizer": byte_tokenizer(None)}, 'chat_template="none"'),
        ({"tokenizer": byte_tokenizer(None), "sets": ["lcc"], "chat_template": "always"}, 'chat_template="none"'),
        ({"chat_template": "none", "system": "Hi"}, "system is of the chat template"),
        ({"sets": ["trec"], "double_bos": True}, "double_bos is of the chat template"),
        ({"chat_template": "none", "template_options": {"a": 1}}, "template_options is of the chat template"),
        ({"sets": ["hotpot"]}, "no set 'hotpot'"),
        ({"sets": []}, "at least one set"),
        ({"sets": ["lcc", "lcc"]}, "each once"),
        ({"sets": ["vcsum"], "extended": True}, "no set 'vcsum'"),
        ({"samples": 0}, "samples must be at least 1"),
    ],
)
def test_what_cannot_be_run_is_refused_at_once(switches: dict[str, Any], said: str) -> None:
    arguments: dict[str, Any] = {"tokenizer": byte_tokenizer(), "window": 8192, "fixture": True, **switches}
    with pytest.raises(ValueError, match=said):
        LongBench(**arguments)


def test_a_prompt_that_outgrows_the_window_is_refused() -> None:
    task = LongBench(byte_tokenizer("<s>" + 300 * "x" + CHAT), 700, ["hotpotqa"], fixture=True, max_length=660)
    with pytest.raises(ValueError, match=r"hotpotqa/fixture-0.*window of 700.*max_length"):
        task.prepare("hotpotqa/fixture-0")
    raising = byte_tokenizer("{{ raise_exception('no such role') }}")
    task = LongBench(raising, 8192, ["hotpotqa"], fixture=True)
    with pytest.raises(ValueError, match="refuses the prompt: no such role"):
        task.prepare("hotpotqa/fixture-0")


def test_settings_tell_runs_apart() -> None:
    def made(**switches: Any) -> str:
        tokenizer = switches.pop("tokenizer", byte_tokenizer())
        return json.dumps(
            LongBench(tokenizer, 8192, fixture=True, **{"sets": ["qasper", "vcsum"], **switches}).settings()
        )

    same = made()
    assert made() == same
    others: list[dict[str, Any]] = [
        {"sets": ["qasper"]}, {"samples": 2}, {"max_length": 4000}, {"max_length": 7168}, {"chat_template": "always"},
        {"system": "Hi"}, {"double_bos": True}, {"template_options": {"a": 1}},
        {"tokenizer": byte_tokenizer("x" + CHAT)},
    ]  # fmt: skip
    assert len({same, *(made(**each) for each in others)}) == len(others) + 1
    assert "jieba" in same


def test_greedy_text_is_the_model_s_own() -> None:
    model = tiny_model("llama", vocab_size=258, eos_token_id=1)
    tokenizer = byte_tokenizer()
    task = LongBench(tokenizer, model_window(model), ["hotpotqa", "samsum"], fixture=True, max_length=150)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    for name in ("hotpotqa/fixture-0", "samsum/fixture-0"):
        prompt = task.prepare(name)
        attempt = Attempt(model, tokenizer, prompt, MethodSpec("dense"))
        (answer,) = task.run(attempt)
        ids = torch.tensor([list(prompt.token_ids)])
        samsum = name.startswith("samsum")
        new = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=128 if samsum else 32,
            eos_token_id=[1, newline] if samsum else 1, pad_token_id=0, min_new_tokens=1 if samsum else None,
        )[0, ids.shape[1] :]  # fmt: skip
        text = tokenizer.decode(new, skip_special_tokens=True)
        assert answer.text == (text.removesuffix("\n") if samsum else text)
        assert attempt.new_tokens == len(new)


def test_samsum_ends_at_a_newline_and_never_begins_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def generate(attempt: Attempt, max_new_tokens: int, **settings: Any) -> list[int]:
        asked[attempt.prompt.id.split("/")[0]] = (max_new_tokens, settings)
        return []

    monkeypatch.setattr(longbench, "generate", generate)
    tokenizer = byte_tokenizer()
    answers_of(LongBench(tokenizer, 8192, fixture=True, samples=1), tokenizer)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    for name, (most, how) in asked.items():
        assert most == SETS[name].max_new_tokens
        stops = (
            {"stop_ids": newline, "min_new_tokens": 1} if name == "samsum" else {"stop_ids": (), "min_new_tokens": 0}
        )
        assert how == stops, name


def test_chinese_sets_without_jieba_are_refused_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    real = longbench.importlib.util.find_spec
    monkeypatch.setattr(longbench.importlib.util, "find_spec", lambda name: None if name == "jieba" else real(name))
    with pytest.raises(ImportError, match=r"sparseprefill\[evals\]"):
        LongBench(byte_tokenizer(), 8192, ["vcsum"], fixture=True)
    LongBench(byte_tokenizer(), 8192, ["lsht", "passage_retrieval_zh"], fixture=True)  # scored without


def test_no_prompt_text_is_in_the_package() -> None:
    folder = Path(longbench.__file__).parent
    texts = " ".join(path.read_text(encoding="utf-8") for path in folder.glob("longbench*"))
    assert texts
    for name, text in v1_templates(list(SETS)).texts.items():
        assert max(text.split("\n"), key=len).strip(string.whitespace) not in texts, name
