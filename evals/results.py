"""What every evaluation writes: one JSON layout for all tasks, checked against one schema when it is read.

A record is one prompt with what every method made of it, so a file holds whole pairs or nothing.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from sparseprefill.evals.tasks import Answer, Item, Metric, Total
from sparseprefill.files import parse_json, read_text, write_text

SCHEMA = "sparseprefill-eval-1"
"""Name of the layout; it changes when the layout does."""

# LongBench at 4750 prompts and ten methods takes about 60 MiB
MOST_RESULT_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class MethodRecord:
    """One method of a run."""

    label: str  # as it is typed on the command line
    name: str
    options: dict[str, Any]
    looks_ahead: bool  # the blocks of a row may depend on later tokens, which flatters its perplexity


@dataclass(frozen=True, slots=True)
class Cost:
    """What differs from run to run. All None for prompts that warm up or are observed."""

    first_token_seconds: float | None = None  # whole model, from the prompt's ids to the first token
    seconds: float | None = None  # with all new tokens
    peak_bytes: int | None = None  # torch's on a GPU, else resident in the process


@dataclass(frozen=True, slots=True)
class Observed:
    """What the method computed and kept, over layers and heads; on few prompts, since it takes time."""

    density: float | None  # the words are defined in `sparseprefill.coverage`
    tile_work: float | None
    kept_mass: float | None


@dataclass(frozen=True, slots=True)
class Run:
    """One method on one prompt."""

    answers: tuple[Answer, ...]  # one an item, in order
    new_tokens: int = 0
    kernels: dict[str, int] = field(default_factory=dict)  # implementation: attention calls; empty for the stock model
    previous_calls: dict[str, int] = field(default_factory=dict)  # reason: calls that did not run sparsely
    observed: Observed | None = None
    cost: Cost = Cost()


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt and every method's run on it."""

    prompt: str  # its id
    tokens: int
    sha256: str  # of its token ids, little-endian 64-bit
    items: tuple[Item, ...]
    details: dict[str, Any]
    runs: dict[str, Run]  # by label

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Record:
        """From what `dataclasses.asdict` made, checked by the caller against the schema."""
        items = tuple(
            Item(each["id"], each["group"], tuple(each["references"]), each["chance"]) for each in data["items"]
        )
        runs = {
            label: Run(
                tuple(Answer(a["item"], a["values"], a["text"], a["details"]) for a in run["answers"]),
                run["new_tokens"], run["kernels"], run["previous_calls"],
                None if run["observed"] is None else Observed(**run["observed"]), Cost(**run["cost"]),
            )
            for label, run in data["runs"].items()
        }  # fmt: skip
        return Record(data["prompt"], data["tokens"], data["sha256"], items, data["details"], runs)


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Every answer of a run, and what it depends on."""

    task: str  # its name
    settings: dict[str, Any]  # what decides prompts, grades and answers; equal settings may be resumed
    methods: tuple[MethodRecord, ...]  # dense first
    metrics: tuple[Metric, ...]  # the headline first
    axes: tuple[str, ...]  # keys of the items' groups: rows and columns
    notes: tuple[str, ...]  # what a reader must know of these numbers
    provenance: tuple[dict[str, Any], ...]  # of each process that took part, without repetition
    planned: int  # prompts
    records: tuple[Record, ...]  # in the order of the plan
    totals: tuple[Total, ...] = ()  # averages with rules of their own, of a complete run

    @property
    def complete(self) -> bool:
        """Has every planned prompt been answered by every method?"""
        return len(self.records) == self.planned

    def answers(self, method: str) -> list[tuple[Item, Answer]]:
        """Every item with what a method (its label) answered."""
        return [
            (item, answer)
            for record in self.records
            for item, answer in zip(record.items, record.runs[method].answers, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as they are saved."""
        data = asdict(self)
        return {"schema": SCHEMA, "complete": self.complete, **data}

    def save(self, path: Path) -> None:
        """JSON, written whole or not at all. ValueError where a number is not finite."""
        text = json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False, indent=1)
        if any("\ud800" <= character <= "\udfff" for character in text):  # half a character, which UTF-8 has not
            text = json.dumps(self.to_dict(), allow_nan=False, indent=1)
        write_text(path, text + "\n")

    @staticmethod
    def load(path: Path) -> EvalResult:
        """What `save` wrote. Raises ValueError where a file is not of this layout, saying where."""
        return EvalResult.from_dict(
            parse_json(read_text(path, "result", MOST_RESULT_BYTES), f"the result {path}"), path
        )

    @staticmethod
    def from_dict(data: Any, path: Path | str = "") -> EvalResult:
        """From plain types; `path` is for messages. Raises ValueError as `load`."""
        check_schema(data, f"the result {path}".rstrip())
        result = EvalResult(
            data["task"], data["settings"], tuple(MethodRecord(**each) for each in data["methods"]),
            tuple(Metric(**each) for each in data["metrics"]), tuple(data["axes"]), tuple(data["notes"]),
            tuple(data["provenance"]), data["planned"], tuple(map(Record.from_dict, data["records"])),
            tuple(Total(**each) for each in data["totals"]),
        )  # fmt: skip
        if result.complete != data["complete"]:
            raise ValueError(f"the result {path} says complete={data['complete']} and holds {len(result.records)} of "
                             f"{result.planned} prompts: it was edited; run the evaluation again")  # fmt: skip
        check_records(result, path)
        return result


def check_records(result: EvalResult, path: Path | str = "") -> None:
    """Raise ValueError where a prompt or an item comes twice, or a method has not answered all of them."""
    labels = [method.label for method in result.methods]
    names = {metric.name for metric in result.metrics}
    prompts: set[str] = set()
    items: set[str] = set()
    for record in result.records:
        where = f"the result {path}, prompt {record.prompt!r}"
        if record.prompt in prompts:
            raise ValueError(f"{where} comes twice")
        prompts.add(record.prompt)
        if sorted(record.runs) != sorted(labels):
            raise ValueError(f"{where}: runs of {', '.join(record.runs)}, but the methods are {', '.join(labels)}")
        for item in record.items:
            if item.id in items:
                raise ValueError(f"{where}: the item {item.id!r} comes twice")
            items.add(item.id)
            missing = set(result.axes) - set(item.group)
            if missing:
                raise ValueError(f"{where}: the item {item.id!r} has no {', '.join(sorted(missing))} in its group")
        for label, run in record.runs.items():
            if [answer.item for answer in run.answers] != [item.id for item in record.items]:
                raise ValueError(f"{where}: {label} has not answered exactly its items")
            for answer in run.answers:
                if set(answer.values) != names:
                    raise ValueError(f"{where}: {label} has values {', '.join(answer.values)} for {', '.join(names)}")


@functools.cache
def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a result file."""
    text = (resources.files("sparseprefill.evals") / "eval_result.schema.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


@functools.cache
def _validator(part: str) -> Any:
    from jsonschema import Draft202012Validator

    whole = schema()
    return Draft202012Validator(whole if not part else {"$ref": f"#/$defs/{part}", "$defs": whole["$defs"]})


def check_schema(data: Any, name: str, part: str = "") -> None:
    """Raise ValueError with the place of the first fault; `part` is one of the schema's definitions."""
    fault = next(iter(_validator(part).iter_errors(data)), None)
    if fault is not None:
        where = "/".join(map(str, fault.absolute_path)) or "the top"
        message = fault.message if len(fault.message) < 300 else fault.message[:300] + "..."
        raise ValueError(f"{name} is not a {SCHEMA} file: at {where}: {message}")
