"""What LongBench consists of: its data sets, their rows and their prompts, versions 1, E and 2.

Neither rows nor prompt texts are part of this package. Rows come from files that the user names, from the folder in
$SPARSEPREFILL_DATA or from the hub; prompts from the installed lm-eval or from the official file, and are held to the
sha256 of the official ones. The rows made up here (`fixture_rows`) try out the machinery and measure nothing.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import json
import os
import re
import string
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from sparseprefill.evals.longbench_fixture import fixture_rows
from sparseprefill.files import MOST_JSON_BYTES, opened, parse_json, read_json, read_text, shown

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class LongBenchSet:
    """One data set of LongBench and its protocol."""

    name: str
    category: str
    language: str  # en, zh, or code, which counts in the averages of both
    metric: str
    max_new_tokens: int
    template_free: bool = False  # its prompt is a few-shot text or code, and never put into a chat template
    first_line: bool = False  # scored on the first line of the answer
    extended: bool = False  # also in LongBench-E

    @property
    def stop_at_newline(self) -> bool:
        """The one set whose answer ends with its first line, and has a token at least."""
        return self.name == "samsum"


def _sets() -> Iterator[LongBenchSet]:
    single, several, summary = "single-document QA", "multi-document QA", "summarization"
    few, synthetic, code = "few-shot", "synthetic", "code"
    shots = {"template_free": True, "first_line": True}
    yield LongBenchSet("narrativeqa", single, "en", "qa_f1", 128)
    yield LongBenchSet("qasper", single, "en", "qa_f1", 128, extended=True)
    yield LongBenchSet("multifieldqa_en", single, "en", "qa_f1", 64, extended=True)
    yield LongBenchSet("multifieldqa_zh", single, "zh", "qa_f1_zh", 64)
    yield LongBenchSet("hotpotqa", several, "en", "qa_f1", 32, extended=True)
    yield LongBenchSet("2wikimqa", several, "en", "qa_f1", 32, extended=True)
    yield LongBenchSet("musique", several, "en", "qa_f1", 32)
    yield LongBenchSet("dureader", several, "zh", "rouge_zh", 128)
    yield LongBenchSet("gov_report", summary, "en", "rouge_l", 512, extended=True)
    yield LongBenchSet("qmsum", summary, "en", "rouge_l", 512)
    yield LongBenchSet("multi_news", summary, "en", "rouge_l", 512, extended=True)
    yield LongBenchSet("vcsum", summary, "zh", "rouge_zh", 512)
    yield LongBenchSet("trec", few, "en", "classification", 64, **shots, extended=True)
    yield LongBenchSet("triviaqa", few, "en", "qa_f1", 32, **shots, extended=True)
    yield LongBenchSet("samsum", few, "en", "rouge_l", 128, **shots, extended=True)
    yield LongBenchSet("lsht", few, "zh", "classification", 64, **shots)
    yield LongBenchSet("passage_count", synthetic, "en", "count", 32, extended=True)
    yield LongBenchSet("passage_retrieval_en", synthetic, "en", "retrieval", 32, extended=True)
    yield LongBenchSet("passage_retrieval_zh", synthetic, "zh", "retrieval_zh", 32)
    yield LongBenchSet("lcc", code, "code", "code_sim", 64, template_free=True, extended=True)
    yield LongBenchSet("repobench-p", code, "code", "code_sim", 64, template_free=True, extended=True)


SETS: dict[str, LongBenchSet] = {entry.name: entry for entry in _sets()}
"""The 21 data sets of version 1, in the order of its paper."""

EXTENDED: tuple[str, ...] = tuple(name for name, entry in SETS.items() if entry.extended)
"""The 13 sets of LongBench-E."""

BUCKETS: tuple[tuple[str, float], ...] = (("0-4k", 4000), ("4-8k", 8000), ("8k+", float("inf")))
"""E's buckets of stored length and where each ends."""

V2 = "longbench-v2"
SPLITS = ("easy", "hard", "short", "medium", "long")
"""What version 2 is averaged by: two difficulties and three lengths."""

_V1_HUB, _V2_HUB = "THUDM/LongBench", "THUDM/LongBench-v2"
DATA_VARIABLE = "SPARSEPREFILL_DATA"
_MOST_ROWS_BYTES = 2 << 30  # version 2 takes about 500 MB as one file, the largest set of version 1 some 30
_SUFFIXES = (".jsonl", ".json", ".parquet")


def base_name(name: str) -> str:
    """The set that a name stands for: `hotpotqa_e`, of LongBench-E, has the protocol of `hotpotqa`."""
    short = name.removesuffix("_e")
    return short if short in EXTENDED else name


def bucket_of(length: int) -> str:
    """E's bucket of a stored length."""
    return next(name for name, end in BUCKETS if length < end)


# rows


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a data set, checked."""

    name: str
    rows: tuple[Row, ...]
    source: str  # where they are from, without the path of a machine
    sha256: str  # of their fields, the same whatever file format they came in


def load_rows(name: str, *, data: str | Path | None = None, fixture: bool = False) -> Rows:
    """The rows of a set of LongBench (`hotpotqa`), of E (`hotpotqa_e`) or of version 2 (`longbench-v2`), checked.

    Args:
        data: a folder with `<name>.jsonl` (or .json, .parquet; also in a folder `data` below it, or in a `data.zip`),
            or one such file. None: the folder in $SPARSEPREFILL_DATA; where that is not set, the hub.
        fixture: the rows made up here instead.

    Raises:
        ValueError: an unknown set, a file that is not what it should be, or a broken row, with its line and field.
        FileNotFoundError: no file for the set, or no hub within reach.
    """
    _check_name(name)
    if fixture:
        if data is not None:
            raise ValueError("fixture rows and a data path exclude each other: give one")
        return _checked(name, _placed(fixture_rows(name), "the fixture"), "the fixture", "fixture")
    if data is None and os.environ.get(DATA_VARIABLE):
        data = os.environ[DATA_VARIABLE]
    if data is None:
        return _from_hub(name)
    path = Path(data)
    found = _find(path, name) if path.is_dir() else path
    rows = _read(found, name)
    return _checked(name, rows, f"the data set file {found}", f"file {found.name}")


def _check_name(name: str) -> None:
    if base_name(name) not in SETS and name != V2:
        raise ValueError(f"LongBench has no set {name!r}: choose from {', '.join(SETS)}, {V2}; E's end in _e")


def _file_names(name: str) -> list[str]:
    """What a set's file may be called in a folder or an archive, the likeliest first."""
    stems = [name, "LongBench-v2", "data"] if name == V2 else [name]
    return [folder + stem + suffix for folder in ("", "data/") for suffix in _SUFFIXES for stem in stems]


def _find(folder: Path, name: str) -> Path:
    for each in (*_file_names(name), "data.zip"):
        if (folder / each).is_file():
            return folder / each
    raise FileNotFoundError(
        f"the folder {folder} has no rows of {name}: it wants {name}.jsonl, .json or .parquet, in it or in a folder "
        f"data below it{'' if name == V2 else f', or the data.zip of {_V1_HUB}'}"
    )


def _from_hub(name: str) -> Rows:
    if name == V2:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ImportError('rows from the hub need datasets: pip install "sparseprefill[evals]"') from error
        try:
            rows = [dict(row) for row in load_dataset(_V2_HUB, split="train")]
        except Exception as error:  # whatever the hub, the network and the cache make it raise
            raise _nothing_found(name, error) from error
        said = f"{_V2_HUB} on the hub"
        return _checked(name, _placed(rows, said), said, f"hub {_V2_HUB}")
    from huggingface_hub import hf_hub_download

    try:
        archive = Path(hf_hub_download(_V1_HUB, "data.zip", repo_type="dataset"))
    except Exception as error:
        raise _nothing_found(name, error) from error
    return _checked(name, _read(archive, name), f"the data set file {archive}", f"hub {_V1_HUB}")


def _nothing_found(name: str, error: Exception) -> FileNotFoundError:
    wanted = f"{name}.jsonl or data.json of {_V2_HUB}" if name == V2 else f"{name}.jsonl or the data.zip of {_V1_HUB}"
    return FileNotFoundError(
        f"no rows of {name}: the hub is out of reach ({type(error).__name__}). Name a folder with {wanted} by data= "
        f"(--data) or in ${DATA_VARIABLE}; fixture=True (--fixture) runs on a few made-up rows, which measure nothing"
    )


_Placed = list[tuple[str, Any]]  # where a row stands, for messages, and the row


def _placed(rows: Sequence[Any], said: str) -> _Placed:
    return [(f"row {number} of {said}", row) for number, row in enumerate(rows, 1)]


def _read(path: Path, name: str) -> _Placed:
    """The rows of a file, unchecked."""
    said = f"the data set file {path}"
    if path.suffix == ".zip":
        return _read_zip(path, name)
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise ImportError(f'{said} needs pyarrow: pip install "sparseprefill[evals]"') from error
        with opened(path, "data set file") as file:
            try:
                rows = pyarrow.parquet.read_table(file).to_pylist()
            except (pyarrow.ArrowException, OSError) as error:
                raise ValueError(f"{said} is not a parquet file that can be read: {error}") from error
        return _placed(rows, said)
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"{said} is none of .jsonl, .json, .parquet and .zip: name another file, or its folder")
    return _parse(read_text(path, "data set file", _MOST_ROWS_BYTES), path.suffix, said)


def _read_zip(path: Path, name: str) -> _Placed:
    said = f"the data set file {path}"
    data, member = b"", None
    with opened(path, "data set file") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = set(archive.namelist())
                member = next((n for n in _file_names(name) if n in members and not n.endswith(".parquet")), None)
                if member is not None:
                    with archive.open(member) as packed:
                        data = packed.read(_MOST_ROWS_BYTES + 1)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
            raise ValueError(f"{said} is not a zip archive that can be read: {error}") from error
    if member is None:
        raise FileNotFoundError(f"{said} has no rows of {name}: it wants data/{name}.jsonl in it")
    if len(data) > _MOST_ROWS_BYTES:
        raise ValueError(f"{member} in {said} is larger than {_MOST_ROWS_BYTES} bytes, the most that is read")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{member} in {said} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    return _parse(text, Path(member).suffix, f"{member} in {said}")


def _parse(text: str, suffix: str, said: str) -> _Placed:
    if suffix == ".jsonl":
        # by newline alone: texts hold other characters that str.splitlines takes for the end of a line
        lines = io.StringIO(text, newline="\n")
        named = ((f"line {number} of {said}", line) for number, line in enumerate(lines, 1) if line.strip())
        return [(where, parse_json(line, where, "row")) for where, line in named]
    rows = parse_json(text, said, "data set")
    if not isinstance(rows, list):
        raise ValueError(f"{said} holds {type(rows).__name__} where a list of rows is wanted")
    return _placed(rows, said)


# the schema

_V1_FIELDS = ("_id", "input", "context", "answers", "length", "dataset", "language", "all_classes")
_V2_FIELDS = (
    "_id", "domain", "sub_domain", "difficulty", "length", "question", "choice_A", "choice_B", "choice_C", "choice_D",
    "answer", "context",
)  # fmt: skip
_LABELS = {
    "passage_count": (r"\d+", "a number"),
    "passage_retrieval_en": (r"Paragraph \d+", "Paragraph and a number"),
    "passage_retrieval_zh": (r"段落\d+", "段落 and a number"),
}


def _checked(name: str, rows: _Placed, said: str, source: str) -> Rows:
    """The rows, with the fields of the schema alone. ValueError that names the row and the field otherwise."""
    if not rows:
        raise ValueError(f"{said} holds no row: is it whole?")
    check = _check_v2 if name == V2 else functools.partial(_check_v1, name)
    fields = _V2_FIELDS if name == V2 else _V1_FIELDS
    seen: dict[str, str] = {}
    kept: list[Row] = []
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where} is {shown(row)} where an object is wanted")
        if name != V2 and "input" not in row and "question" in row:
            raise ValueError(
                f"{where} has a question where LongBench has an input: it is from a copy on the hub whose contexts "
                "already hold the instruction and whose few-shot inputs lack their cue, so that official prompts "
                f"cannot be made of it: take the data.zip of {_V1_HUB}"
            )
        missing = [field for field in fields if field not in row]
        if missing:
            raise ValueError(f"{where} has no field {missing[0]!r}: it wants {', '.join(fields)}")
        row = {field: row[field] for field in fields}
        try:
            json.dumps(row, ensure_ascii=False).encode()
            check(row)
        except UnicodeEncodeError:
            raise ValueError(f"{where}: a text in it holds half of a surrogate pair, which is no character") from None
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if row["_id"] in seen:
            raise ValueError(f"{where}: _id {shown(row['_id'])} is also that of {seen[row['_id']]}")
        seen[row["_id"]] = where
        if kept and name != V2 and row["all_classes"] != kept[0]["all_classes"]:
            raise ValueError(f"{where}: all_classes differs from that of the first row: a set has one list of classes")
        kept.append(row)
    digest = hashlib.sha256()
    for row in kept:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return Rows(name, tuple(kept), source, digest.hexdigest())


def _text(row: Row, field: str, *, empty: bool = False) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise ValueError(f"{field} is {shown(value)} where text is wanted")
    if not empty and not value.strip():
        raise ValueError(f"{field} is empty")
    return value


def _texts(row: Row, field: str) -> list[str]:
    value = row[field]
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError(f"{field} is {shown(value)} where a list of texts is wanted")
    if not value:
        raise ValueError(f"{field} is an empty list")
    return value


def _check_v1(name: str, row: Row) -> None:
    entry = SETS[base_name(name)]
    for field in ("_id", "context", "dataset", "language"):
        _text(row, field)
    _text(row, "input", empty=True)
    if row["dataset"] not in (name, entry.name):
        raise ValueError(f"dataset is {shown(row['dataset'])} where {entry.name} is wanted: it is another set's row")
    if isinstance(row["length"], bool) or not isinstance(row["length"], int) or row["length"] < 0:
        raise ValueError(f"length is {shown(row['length'])} where a number of words or characters is wanted")
    if entry.metric == "count" and isinstance(row["answers"], list):  # numbers are compared as text
        row["answers"] = [str(each) if type(each) is int else each for each in row["answers"]]
    answers = _texts(row, "answers")
    if entry.metric == "classification":
        _texts(row, "all_classes")
    elif row["all_classes"] is not None and row["all_classes"] != []:
        raise ValueError(f"all_classes is {shown(row['all_classes'])}: only trec and lsht have classes")
    if entry.name in _LABELS:
        pattern, wanted = _LABELS[entry.name]
        for answer in answers:
            if not re.fullmatch(pattern, answer, flags=re.ASCII):
                raise ValueError(f"answers holds {shown(answer)} where {wanted} is wanted")


def _check_v2(row: Row) -> None:
    for field in _V2_FIELDS:
        _text(row, field)
    for field, allowed in (("difficulty", SPLITS[:2]), ("length", SPLITS[2:]), ("answer", ("A", "B", "C", "D"))):
        if row[field] not in allowed:
            raise ValueError(f"{field} is {shown(row[field])} where one of {', '.join(allowed)} is wanted")


# prompts


@dataclass(frozen=True, slots=True)
class Templates:
    """The prompt of every set asked for."""

    texts: dict[str, str]
    source: str  # where they are from, without the path of a machine
    unverified: tuple[str, ...] = ()  # sets whose prompt is not the official one, accepted on request

    def settings(self) -> dict[str, Any]:
        """For the settings of a run: which prompts these are."""
        made: dict[str, Any] = {"source": self.source, "official": not self.unverified}
        if self.unverified:
            made["not_official"] = {name: digest(self.texts[name]) for name in self.unverified}
        return made


def digest(text: str) -> str:
    """The sha256 of a text in UTF-8."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def official_hashes() -> dict[str, dict[str, str]]:
    """The sha256 of every official prompt, by version (`longbench`, `longbench_v2`) and set."""
    text = (resources.files("sparseprefill.evals") / "longbench_prompt_hashes.json").read_text(encoding="utf-8")
    hashes: dict[str, dict[str, str]] = json.loads(text)
    return hashes


# what lm-eval's prompts lack at their end, by the set: it strips prompts, and joins two few-shot texts more tightly
_CORRECTIONS = {
    "triviaqa": ("{context}\n{input}", "{context}\n\n{input}"),
    "samsum": ("{context}\n{input}", "{context}\n\n{input}"),
    "passage_count": (" answer is:", " answer is: "),
    "passage_retrieval_en": (" answer is:", " answer is: "),
    "lcc": ("Next line of code:", "Next line of code:\n"),
    "repobench-p": ("Next line of code:", "Next line of code:\n"),
}


def v1_templates(sets: Sequence[str], prompts: str | Path | None = None, *, verify: bool = True) -> Templates:
    """The prompts of sets of version 1 (and E), with the fields {context} and {input}.

    Args:
        sets: their names, as in `SETS`.
        prompts: the official `dataset2prompt.json`, or a file like it. None: those of the installed lm-eval, with its
            six known differences in white space put right.
        verify: refuse a prompt whose sha256 is not the official one's; False accepts it, and says so.

    Raises:
        ValueError: a prompt is missing, has other fields, or is not the official one.
        ImportError: no file is given and lm-eval is not installed.
    """
    official = official_hashes()["longbench"]
    texts: dict[str, str] = {}
    if prompts is not None:
        given = read_json(prompts, "prompts file")
        if not isinstance(given, dict):
            raise ValueError(f"the prompts file {prompts} holds no object of texts by set, as dataset2prompt.json does")
        for name in sets:
            if not isinstance(given.get(name), str):
                raise ValueError(f"the prompts file {prompts} has no text for {name}: add it, or leave the set out")
            texts[name] = given[name]
        source = f"file {Path(prompts).name}"
    else:
        folder = _lm_eval_folder()
        for name in sets:
            text = _lm_eval_prompt(folder / f"{name}.yaml")
            if digest(text) != official[name] and name in _CORRECTIONS:
                end, right = _CORRECTIONS[name]
                text = text.removesuffix(end) + right if text.endswith(end) else text
            texts[name] = text
        source = "lm-eval, white space corrected"
    for name, text in texts.items():
        _check_fields(name, text)
    return Templates(texts, source, _unverified(texts, official, source, verify))


def _check_fields(name: str, text: str) -> None:
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"the prompt of {name} is no format string: {error}") from error
    fields = {field for _, field, form, conversion in parts if field is not None or form or conversion}
    if not fields <= {"context", "input"} or any(form or conversion for _, _, form, conversion in parts):
        raise ValueError(f"the prompt of {name} has fields besides {{context}} and {{input}}: write other braces twice")
    if "context" not in fields:
        raise ValueError(f"the prompt of {name} has no {{context}}")


def _unverified(texts: dict[str, str], official: dict[str, str], source: str, verify: bool) -> tuple[str, ...]:
    wrong = tuple(name for name, text in texts.items() if digest(text) != official[name])
    if wrong and verify:
        raise ValueError(
            f"the prompts of {', '.join(wrong)} ({source}) are not the official ones, so the scores could not be "
            "compared with published ones: give the official file by prompts= (--prompts), or accept them with "
            "verify=False, which is recorded"
        )
    return wrong


def _lm_eval_folder() -> Path:
    """Where the installed lm-eval keeps its LongBench tasks; lm-eval itself, which takes seconds, is not imported."""
    spec = importlib.util.find_spec("lm_eval")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (Path(place) / "tasks" / "longbench").is_dir():
            return Path(place) / "tasks" / "longbench"
    raise ImportError(
        'the prompts of LongBench are read from lm-eval, which is not installed: pip install "sparseprefill[evals]", '
        "or give the official dataset2prompt.json by prompts= (--prompts)"
    )


def _lm_eval_prompt(path: Path) -> str:
    """The prompt in a task file of lm-eval, with LongBench's own names of the fields."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc,unused-ignore]  # typed or not, by what is installed
        pass

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)  # names of functions, which nobody calls here
    text = read_text(path, "task file of lm-eval", MOST_JSON_BYTES)
    try:
        prompt = yaml.load(text, Loader=Loader)["doc_to_text"]
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise ValueError(f"the task file of lm-eval {path} has no prompt: give prompts= (--prompts)") from error
    if not isinstance(prompt, str):
        raise ValueError(f"the task file of lm-eval {path} has no prompt: give prompts= (--prompts)")
    # its braces are doubled, and so are those of a format string that stand for themselves
    for theirs, ours in (("{{context}}", "{context}"), ("{{question}}", "{input}"), ("{{input}}", "{input}")):
        prompt = prompt.replace(theirs, ours)
    return prompt


V2_FIELDS = (
    ("$DOC$", "context"), ("$Q$", "question"), ("$C_A$", "choice_A"), ("$C_B$", "choice_B"), ("$C_C$", "choice_C"),
    ("$C_D$", "choice_D"),
)  # fmt: skip
"""The marks in a prompt of version 2 and the fields of a row that take their place, in the order of replacing."""


def v2_templates(prompts: str | Path | None = None, *, verify: bool = True) -> Templates:
    """The zero-shot prompt of version 2.

    Args:
        prompts: the official `0shot.txt`, the folder it is in, or a JSON file {"0shot": text}.
        verify: as in `v1_templates`.

    Raises:
        ValueError: no file is given, it lacks a mark, or it is not the official one.
        FileNotFoundError: there is no such file.
    """
    if prompts is None:
        raise ValueError(
            "LongBench v2 wants its official prompt, which no package holds: give prompts/0shot.txt of the LongBench "
            'repository by prompts= (--prompts), or a JSON file {"0shot": text}'
        )
    path = Path(prompts)
    path = path / "0shot.txt" if path.is_dir() else path
    if path.suffix == ".json":
        given = read_json(path, "prompts file")
        if not isinstance(given, dict) or not isinstance(given.get("0shot"), str):
            raise ValueError(f'the prompts file {path} has no text "0shot"')
        text = given["0shot"]
    else:
        text = read_text(path, "prompts file", MOST_JSON_BYTES)
    missing = [mark for mark, _ in V2_FIELDS if mark not in text]
    if missing:
        raise ValueError(f"the prompts file {path} has no {missing[0]}: it is no prompt of LongBench v2")
    source = f"file {path.name}"
    texts = {"0shot": text}
    return Templates(texts, source, _unverified(texts, official_hashes()["longbench_v2"], source, verify))
