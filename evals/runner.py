"""Run an evaluation: every method on every prompt, resumable prompt by prompt, alone or shared by several processes.

While a run lasts, `OUT/TASK.run.json` says what it depends on, and `OUT/TASK.parts/` holds one file of JSON lines for
each process, a line a prompt. When every prompt has been answered by every method, they become `OUT/TASK.json`, and
are removed. A run that was interrupted goes on where it stopped; one with other settings is refused.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from io import RawIOBase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from sparseprefill import __version__
from sparseprefill.evals.loading import provenance
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.evals.results import (
    SCHEMA,
    Cost,
    EvalResult,
    MethodRecord,
    Observed,
    Record,
    Run,
    check_schema,
)
from sparseprefill.evals.tasks import Answer, Attempt, Prompt, Task
from sparseprefill.files import check_same, lock, parse_json, read_json, write_text
from sparseprefill.huggingface import patch_model
from sparseprefill.huggingface_identity import model_identity, tokenizer_identity

_MOST_PART_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Workers:
    """Which of several processes this one is; they share a run over its prompts."""

    rank: int = 0
    world: int = 1

    @staticmethod
    def from_environment() -> Workers:
        """As `torchrun` and `accelerate launch` say it (RANK, WORLD_SIZE); alone without them.

        Raises ValueError where they say what cannot be.
        """
        try:
            rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        except ValueError as error:
            raise ValueError("RANK and WORLD_SIZE must be numbers: unset them, or use torchrun") from error
        if not 0 <= rank < world:
            raise ValueError(f"RANK={rank} is none of {world} processes (WORLD_SIZE): unset them, or use torchrun")
        return Workers(rank, world)

    def wait(self) -> None:
        """Until all processes have come here."""
        if self.world > 1:
            if not torch.distributed.is_initialized():
                # a long prompt on a slow machine takes hours, and the others must not give up
                torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))
            torch.distributed.barrier()


def run_eval(
    task: Task,
    model: PreTrainedModel,
    tokenizer: Any,
    methods: Sequence[MethodSpec],
    out: str | Path,
    *,
    last_rows_dense: int = 0,
    min_length: int | None = 0,
    observe: int = 1,
    again: bool = False,
    workers: Workers | None = None,
    progress: bool = False,
) -> EvalResult | None:
    """Answer every prompt of a task with every method, dense first, and write `OUT/TASK.json`.

    Prompts are dealt out to the processes in turn; each is prepared once and answered by all methods one after the
    other, so that what is compared was measured in the same minutes.

    Args:
        methods: "dense" without options must be among them: everything is compared with it.
        out: folder of the results, made where it is missing.
        last_rows_dense, min_length: see `patch_model`; with `min_length` 0, methods run sparsely at every length.
        observe: so many prompts of each stratum (the part of a prompt's id before its last slash) are observed: density
            and kept mass are counted, and no time is taken. 0 observes none. The first prompt of each process warms up,
            and is not timed either.
        again: remove what an earlier run of this task left in `out`, finished or not, and begin anew.
        workers: which process this is; None: as the environment says.
        progress: show a bar with the remaining time on standard error.

    Returns:
        The complete result; None in all processes but the first.

    Raises:
        ValueError: unknown or repeated methods, no dense among them, a plan with repeated ids or none, results of other
            settings in `out`, another process writing there.
        OSError: the disk refuses; what was answered before stays, and the same call goes on from there.
    """
    workers = workers or Workers.from_environment()
    if observe < 0:
        raise ValueError(f"observe is a number of prompts, got {observe}")
    resolved = _checked_methods(model, methods, last_rows_dense)
    refuse = getattr(task, "check_method", None)
    if refuse is not None:
        for spec in methods:
            refuse(spec)
    methods = [spec for spec, _ in resolved]
    plan = list(task.plan())
    if not plan:
        raise ValueError(f"the task {task.name} plans no prompt: give it lengths, data sets or samples")
    if len(set(plan)) < len(plan):
        twice = next(each for each in plan if plan.count(each) > 1)
        raise ValueError(f"the task {task.name} plans the prompt {twice!r} twice: ids must be unique")
    # as JSON gives it back, so that it can be compared with what a file holds
    settings: dict[str, Any] = json.loads(
        json.dumps(
            {
                "version": __version__, "task": task.settings(),
                "methods": {spec.label: digest for spec, digest in resolved},
                "last_rows_dense": last_rows_dense, "min_length": min_length, "observe": observe,
                "model": model_identity(model), "tokenizer": tokenizer_identity(tokenizer),
            },
            allow_nan=False,
        )
    )  # fmt: skip
    files = _RunFiles(Path(out), task.name)
    if again:
        if workers.rank == 0:
            files.discard()
        workers.wait()
    finished = files.finished(settings)
    if workers.rank == 0:
        if finished is None:
            files.begin(_header(task, settings, methods, plan))
        else:
            files.clear()
    workers.wait()
    if finished is not None:
        return finished if workers.rank == 0 else None
    files.check(settings)
    done, _ = files.records()
    observed = _observed(plan, observe)
    pending = [each for each in plan[workers.rank :: workers.world] if each not in done]
    total = len(plan[workers.rank :: workers.world])
    with (
        files.part(workers.rank, provenance(model)) as part,
        tqdm(
            total=total * len(methods), initial=(total - len(pending)) * len(methods), desc=task.name, unit="prefill",
            disable=not progress or workers.rank > 0, dynamic_ncols=True,
        ) as bar,
    ):  # fmt: skip
        for number, prompt_id in enumerate(pending):
            prompt = task.prepare(prompt_id)
            shared: dict[str, Any] = {}
            runs = {}
            for spec in methods:
                attempt = Attempt(
                    model, tokenizer, prompt, spec, prompt_id in observed, last_rows_dense, min_length, shared
                )
                answers = task.run(attempt)
                runs[spec.label] = _run(attempt, answers, timed=number > 0)
                bar.update(1)
            part.add(Record(prompt.id, len(prompt.token_ids), _sha256(prompt), prompt.items, prompt.details, runs))
    workers.wait()
    if workers.rank > 0:
        workers.wait()  # until the result stands
        return None
    result = files.finish(task)
    workers.wait()
    return result


def load_unfinished(folder: str | Path, task: str) -> EvalResult:
    """What an unended run has answered so far, marked as incomplete. FileNotFoundError where there is none."""
    files = _RunFiles(Path(folder), task)
    return files.assemble(files.header())


def unfinished_runs(folder: str | Path) -> list[str]:
    """Names of the tasks that have begun in a folder and whose result does not stand yet."""
    names = sorted(path.name.removesuffix(".run.json") for path in Path(folder).glob("*.run.json"))
    return [name for name in names if not (Path(folder) / f"{name}.json").exists()]


def _header(
    task: Task, settings: dict[str, Any], methods: Sequence[MethodSpec], plan: Sequence[str]
) -> dict[str, Any]:  # fmt: skip
    return {
        "schema": SCHEMA, "task": task.name, "settings": settings,
        "methods": [asdict(_method_record(spec, settings["last_rows_dense"])) for spec in methods],
        "metrics": [asdict(metric) for metric in task.metrics], "axes": list(task.axes), "notes": list(task.notes),
        "plan": list(plan),
    }  # fmt: skip


def _checked_methods(
    model: PreTrainedModel, methods: Sequence[MethodSpec], last_rows_dense: int
) -> list[tuple[MethodSpec, str]]:  # fmt: skip
    """Dense first, and what tells each from another of the same label: a profile may be another by now."""
    labels = [spec.label for spec in methods]
    if "dense" not in labels:
        raise ValueError("dense must be among the methods: what a method keeps is only known beside it")
    if len(set(labels)) < len(labels):
        raise ValueError(f"a method is named twice: {', '.join(labels)}")
    found = []
    for spec in sorted(methods, key=lambda spec: spec.label != "dense"):
        patterns = ""
        if spec.label != "dense":  # options are refused before hours of work
            with patch_model(model, spec.name, **{"last_rows_dense": last_rows_dense, **spec.options}) as patch:
                patterns = repr(patch.patterns)
        found.append((spec, hashlib.sha256(patterns.encode()).hexdigest()[:16]))
    return found


def _observed(plan: Sequence[str], observe: int) -> set[str]:
    seen: dict[str, int] = {}
    chosen = set()
    for each in plan:
        stratum = each.rpartition("/")[0]
        seen[stratum] = seen.get(stratum, 0) + 1
        if seen[stratum] <= observe:
            chosen.add(each)
    return chosen


def _run(attempt: Attempt, answers: Sequence[Answer], *, timed: bool) -> Run:
    items = [item.id for item in attempt.prompt.items]
    if [answer.item for answer in answers] != items:
        raise ValueError(f"{attempt.prompt.id}: the task answered {[a.item for a in answers]} for the items {items}")
    report = attempt.report
    observed = None
    cost = Cost()
    if attempt.observe and report is not None:
        observed = Observed(report.density, report.tile_work, report.kept_mass)
    if timed and not attempt.observe:
        cost = Cost(attempt.first_token_seconds, attempt.seconds, attempt.peak_bytes)
    return Run(
        tuple(answers), attempt.new_tokens, dict(report.kernels) if report else {},
        dict(report.previous_calls) if report else {}, observed, cost,
    )  # fmt: skip


def _sha256(prompt: Prompt) -> str:
    return hashlib.sha256(np.asarray(prompt.token_ids, dtype="<i8").tobytes()).hexdigest()


class _Part:
    """A file of JSON lines that records are added to, each on the disk before the next begins."""

    def __init__(self, file: RawIOBase, path: Path) -> None:
        self.file, self.path = file, path

    def add(self, record: Record) -> None:
        self._write(json.dumps(asdict(record), allow_nan=False))

    def session(self, found: dict[str, Any]) -> None:
        self._write(json.dumps({"session": found}))

    def _write(self, line: str) -> None:
        try:
            data = memoryview((line + "\n").encode("ascii"))
            while data:
                data = data[self.file.write(data) or 0 :]
            os.fsync(self.file.fileno())
        except OSError as error:
            raise type(error)(
                error.errno, f"{error.strerror}; what was answered before is kept, and the same command goes on from "
                "there", str(self.path),
            ) from error  # fmt: skip


class _RunFiles:
    """The files of one run."""

    def __init__(self, folder: Path, task: str) -> None:
        self.folder = folder
        self.result, self.run, self.parts = (folder / f"{task}{end}" for end in (".json", ".run.json", ".parts"))

    def finished(self, settings: dict[str, Any]) -> EvalResult | None:
        """The result, if it stands; ValueError where it is of other settings."""
        if not self.result.exists():
            return None
        result = EvalResult.load(self.result)
        check_same(result.settings, settings, self.result)
        return result

    def begin(self, header: dict[str, Any]) -> None:
        """Say what the run depends on, unless it was said before."""
        if self.run.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.parts.exists():
            raise ValueError(f"{self.parts} holds answers, but {self.run} is gone: remove that folder, or name another")
        write_text(self.run, json.dumps(header, ensure_ascii=False, indent=1) + "\n")

    def header(self) -> dict[str, Any]:
        """What `begin` wrote."""
        header: dict[str, Any] = read_json(self.run, "run", _MOST_PART_BYTES)
        lists = isinstance(header, dict) and all(isinstance(header.get(key), list) for key in ("plan", "methods"))
        if not lists or header.get("schema") != SCHEMA or not isinstance(header.get("settings"), dict):
            raise ValueError(f"the run {self.run} is not a {SCHEMA} run: remove it and {self.parts}, or name another")
        return header

    def check(self, settings: dict[str, Any]) -> None:
        """ValueError where the run that stands is of other settings."""
        check_same(self.header()["settings"], settings, self.run)

    def discard(self) -> None:
        """Remove all that a run left. ValueError where a process is still at it."""
        with contextlib.ExitStack() as locked:
            for path in self.parts.glob("*.jsonl"):
                lock(locked.enter_context(path.open("rb")), path)
            self.result.unlink(missing_ok=True)
            self.clear()

    def clear(self) -> None:
        """Remove what a result was made of."""
        if self.parts.exists():
            shutil.rmtree(self.parts)
        self.run.unlink(missing_ok=True)

    @contextlib.contextmanager
    def part(self, rank: int, found: dict[str, Any]) -> Iterator[_Part]:
        """This process's part, locked; a last line that a crash cut off is taken away."""
        self.parts.mkdir(exist_ok=True)
        path = self.parts / f"{rank}.jsonl"
        with path.open("ab", buffering=0) as file:  # nothing is left to be written when it is closed
            lock(file, path)
            _drop_torn_line(path)
            part = _Part(file, path)
            part.session(found)
            yield part

    def records(self) -> tuple[dict[str, Record], list[dict[str, Any]]]:
        """What all parts hold: records by prompt, and the sessions without repetition."""
        records: dict[str, Record] = {}
        sessions: list[dict[str, Any]] = []
        for path in sorted(self.parts.glob("*.jsonl")):
            for number, line in enumerate(_whole_lines(path), 1):
                name = f"the part {path}, line {number},"
                data = parse_json(line, name, "part")
                if isinstance(data, dict) and set(data) == {"session"}:
                    if data["session"] not in sessions:
                        sessions.append(data["session"])
                    continue
                check_schema(data, name, "record")
                record = Record.from_dict(data)
                records.setdefault(record.prompt, record)
        return records, sessions

    def assemble(self, header: dict[str, Any]) -> EvalResult:
        """What there is, complete or not. ValueError where an answer is to no planned prompt."""
        found, sessions = self.records()
        plan = header["plan"]
        strangers = sorted(set(found) - set(plan))
        if strangers:
            raise ValueError(
                f"{self.parts} holds the prompt {strangers[0]!r}, which was not planned: name another folder"
            )
        records = [asdict(found[each]) for each in plan if each in found]
        data = {
            "schema": SCHEMA, "complete": len(records) == len(plan), "task": header.get("task"),
            "settings": header.get("settings"), "methods": header.get("methods"), "metrics": header.get("metrics"),
            "axes": header.get("axes"), "notes": header.get("notes"), "provenance": sessions, "planned": len(plan),
            "records": records, "totals": [],
        }  # fmt: skip
        return EvalResult.from_dict(json.loads(json.dumps(data)), self.run)

    def finish(self, task: Task) -> EvalResult:
        """Write the result, then remove what it was made of."""
        result = self.assemble(self.header())
        if not result.complete:
            missing = result.planned - len(result.records)
            raise ValueError(f"{missing} of {result.planned} prompts have no answer: run the same command again")
        answers = {method.label: result.answers(method.label) for method in result.methods}
        result = replace(result, totals=tuple(task.totals(answers)))
        result.save(self.result)
        self.clear()
        return result


def _method_record(spec: MethodSpec, last_rows_dense: int) -> MethodRecord:
    plain = {key: x if isinstance(x, (str, int, float)) else repr(x) for key, x in spec.options.items()}
    return MethodRecord(spec.label, spec.name, plain, spec.looks_ahead(last_rows_dense))


def _whole_lines(path: Path) -> list[str]:
    """The lines of a part; what a crash cut off, perhaps inside of a character, is none."""
    if path.stat().st_size > _MOST_PART_BYTES:
        raise ValueError(f"the part {path} is larger than {_MOST_PART_BYTES} bytes: it was not written by a run")
    data = path.read_bytes()
    try:
        text = data[: data.rfind(b"\n") + 1].decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the part {path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    return text.split("\n")[:-1]


def _drop_torn_line(path: Path) -> None:
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
