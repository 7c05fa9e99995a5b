"""What an evaluation is made of: prompts, the items asked of each, and what a method answered.

A task plans prompts by id, prepares one at a time (the prompts of LongBench at 128k would not fit in memory together),
runs a method on it and grades what came out, item by item. Everything else, files, resuming, several processes, pairs
and reports, is `sparseprefill.evals.runner`'s and `sparseprefill.evals.compare`'s.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from sparseprefill.evals.methods import MethodSpec
from sparseprefill.huggingface import Patch
from sparseprefill.reports import PatchReport

Group = dict[str, str | int | float]
"""What an item is averaged by, as in {"task": "single", "length": 4096}."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One number that every answer of a task has."""

    name: str  # its key in `Answer.values`
    what: str  # one line for readers
    higher_is_better: bool = True
    percent: bool = True  # in [0, 1] and shown times 100
    binary: bool = False  # each value is 0 or 1, so that flips and McNemar's test mean something


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that is graded, the same for every method."""

    id: str  # unique in the run
    group: Group  # the same keys for all items of a task
    references: tuple[str, ...] = ()  # what would be right, for readers
    chance: float | None = None  # expected headline score of a guess that has not read the prompt; None: not known


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is given, with all the items that one prefill of it answers."""

    id: str  # as planned
    token_ids: Sequence[int]  # special tokens included
    items: tuple[Item, ...]
    details: dict[str, Any] = field(default_factory=dict)  # JSON for the result, as in {"truncated": True}
    data: Any = None  # what the task needs to grade it; not saved


@dataclass(frozen=True, slots=True)
class Answer:
    """What one method got on one item."""

    item: str  # its id
    values: dict[str, float]  # by metric
    text: str | None = None  # what was generated, special tokens skipped
    details: dict[str, Any] = field(default_factory=dict)  # JSON for the result


class Task(Protocol):
    """An evaluation. Preparing and grading are deterministic: a prompt is the same whatever ran before it.

    One that cannot judge every method has `check_method(spec)` too, which raises ValueError before anything runs.
    """

    name: str  # of the task and of its files
    metrics: tuple[Metric, ...]  # the first is the headline
    axes: tuple[str, ...]  # keys of the groups: rows of the tables and, if there are two, columns
    notes: tuple[str, ...]  # what a reader must know of these numbers

    def settings(self) -> dict[str, Any]:
        """Everything that decides prompts and grades, as JSON; a run is resumed only where it is the same."""
        ...

    def plan(self) -> Sequence[str]:
        """The ids of all prompts, unique, in order. Cheap."""
        ...

    def prepare(self, prompt: str) -> Prompt:
        """The prompt of an id. ValueError where it does not fit the model."""
        ...

    def run(self, attempt: Attempt) -> list[Answer]:
        """One answer for each item of `attempt.prompt`, in their order."""
        ...

    def totals(self, answers: dict[str, list[tuple[Item, Answer]]]) -> list[Total]:
        """Aggregates with rules of their own (official averages), from every answer of every method by its label."""
        ...


@dataclass(frozen=True, slots=True)
class Total:
    """One aggregate of one method."""

    name: str
    method: str  # its label
    value: float | None  # on the scale it is published on; None where there was nothing to average
    what: str = ""  # how it is averaged


@dataclass(slots=True)
class Attempt:
    """One method on one prompt: what `Task.run` works with, and what it cost."""

    model: PreTrainedModel
    tokenizer: Any
    prompt: Prompt
    spec: MethodSpec
    observe: bool = False  # count density and kept mass, which takes time: such an attempt is not timed
    last_rows_dense: int = 0  # see `patch_model`
    min_length: int | None = 0  # see `patch_model`
    shared: dict[str, Any] = field(default_factory=dict)  # kept between the methods of one prompt, dense first

    first_token_seconds: float | None = None  # set by the task, see `prefilled`
    seconds: float | None = None  # inside `patched`
    new_tokens: int = 0  # set by the task
    peak_bytes: int | None = None  # see `peak_memory`
    report: PatchReport | None = None  # None for the stock model
    _began: float = 0.0

    @contextlib.contextmanager
    def patched(self) -> Iterator[Patch | None]:
        """The model with this method; what runs inside is counted. None for the stock model."""
        settings: dict[str, Any] = {"observe": self.observe, "min_length": self.min_length}
        if self.last_rows_dense:
            settings["last_rows_dense"] = self.last_rows_dense
        with self.spec.applied(self.model, **settings) as patch:
            device = self.model.device
            forgotten = reset_peak_memory(device)
            finish_queue(device)
            self._began = time.perf_counter()
            yield patch
            finish_queue(device)
            self.seconds = time.perf_counter() - self._began
            self.peak_bytes = peak_memory(device) if forgotten else None
            self.report = None if patch is None else patch.report()

    def prefilled(self) -> None:
        """Call inside `patched` when the first token is known: its time is taken."""
        finish_queue(self.model.device)
        self.first_token_seconds = time.perf_counter() - self._began


def finish_queue(device: torch.device) -> None:
    """Wait for what was queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> bool:
    """Forget the peak so far. False where the system cannot: then there is no peak of what follows."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_memory(device: torch.device) -> int | None:
    """Bytes at the peak since `reset_peak_memory`: allocated by torch on a GPU, else resident in this process.

    None on systems that do not tell.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def mean_totals(
    answers: dict[str, list[tuple[Item, Answer]]], metric: str, name: str = "mean of all items", scale: float = 100.0
) -> list[Total]:
    """The plain mean over items, for tasks that have no official average."""
    totals = []
    for method, pairs in answers.items():
        values = [answer.values[metric] for _, answer in pairs]
        mean = scale * sum(values) / len(values) if values else None
        totals.append(Total(name, method, mean, "plain mean over items"))
    return totals
