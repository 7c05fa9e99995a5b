"""Tasks of lm-evaluation-harness for several methods on the same items.

`LmEvalRuler` is the harness' version of RULER as a task of this package: its prompts, its scoring, our generation, our
paired report. `run_lm_eval` runs any of its tasks through the harness itself and keeps the score of every document.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import logging
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from sparseprefill.evals.generation import generate
from sparseprefill.evals.lm_eval import model_class, require_harness
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.evals.tasks import Answer, Attempt, Item, Metric, Prompt, Total, mean_totals
from sparseprefill.reports import PatchReport

RULER_TASKS = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "ruler_vt", "ruler_cwe", "ruler_fwe", "ruler_qa_squad", "ruler_qa_hotpot",
)  # fmt: skip
"""The 13, as the harness calls them."""

NEEDS_ESSAYS = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
NEEDS_QUESTIONS = {"ruler_qa_squad": "read_squad", "ruler_qa_hotpot": "read_hotpotqa"}
OFFLINE_TASKS = tuple(task for task in RULER_TASKS if task not in (*NEEDS_ESSAYS, *NEEDS_QUESTIONS))
"""Those that make all of their text themselves."""

MADE = 500
"""Documents the harness makes for each task and length, however few are asked for."""

LEAST = 1024
"""The shortest length: every task fits, with a tokenizer that takes up to some seven tokens a word."""

NOTES = (
    "lm-evaluation-harness' version of RULER: compare it with numbers from that harness, not with published RULER",
    "haystacks are sized by the 2024 rule, in steps, without the answer's first words: a prompt can exceed its length "
    "by some 15 to 40 tokens, and often stays well below it",
    "cwe comes without its worked example; fwe leaves no room for the answer in its length",
    "qa counts the share of the references that the answer contains, where RULER asks for any of them",
    "essays come from another collection, joined by blanks; scores are shown times 100, which the harness does not",
    "each task and length is drawn by itself, so samples do not depend on what else was chosen; the harness' own "
    "command line draws all after one another from one seed, so its samples are others",
)
"""How these numbers differ from RULER's, and from the harness' command line."""


class LmEvalRuler:
    """RULER as lm-evaluation-harness makes and scores it.

    A prompt is one document: its id is task/length/number. Texts come from the harness' own task objects, and what a
    method wrote is graded by the task's own `process_results`.

    Args:
        tokenizer: of the model; it decides how much text makes a length.
        tasks: of `RULER_TASKS`. `OFFLINE_TASKS` need no data; others fetch essays or questions on first use.
        lengths: in tokens, as the harness understands them (see `NOTES`).
        samples: documents of each task and length, at most `MADE`.
        seed: of the documents.
        chat_template: put each prompt into the tokenizer's chat template, the answer's first words after it.
        window: the model's, in tokens; with it a prompt that will not fit is refused when it is prepared.

    Raises:
        ImportError: the harness, or a package its RULER needs, is missing; the message says what to install.
        ValueError: unknown tasks, sizes that are not positive.
    """

    name = "lm_eval_ruler"
    axes = ("task", "length")
    notes = NOTES

    def __init__(
        self,
        tokenizer: Any,
        tasks: Sequence[str] = OFFLINE_TASKS,
        lengths: Sequence[int] = (4096, 8192, 16384, 32768),
        samples: int = 25,
        *,
        seed: int = 0,
        chat_template: bool = False,
        window: int | None = None,
    ) -> None:
        require_harness()
        _require_ruler()
        unknown = [task for task in tasks if task not in RULER_TASKS]
        if unknown or not tasks:
            raise ValueError(
                f"no RULER task of lm_eval: {', '.join(unknown) or 'none given'}; {', '.join(RULER_TASKS)}"
            )
        if len({*tasks}) < len(tasks) or len({*lengths}) < len(lengths):
            raise ValueError("tasks and lengths are named once each")
        if not lengths or min(lengths) < LEAST:
            raise ValueError(
                f"lengths must be at least {LEAST} tokens, got {list(lengths)}: where a task does not fit, generators "
                "of the harness look for a smaller one without end"
            )
        if not 1 <= samples <= MADE:
            raise ValueError(f"samples must be 1 to {MADE}, which is what the harness makes of each, got {samples}")
        if chat_template and not getattr(tokenizer, "chat_template", None):
            raise ValueError("this tokenizer has no chat template: leave chat_template out")
        self.tokenizer = tokenizer
        self.tasks, self.lengths = tuple(tasks), tuple(lengths)
        self.samples, self.seed, self.chat_template, self.window = samples, seed, chat_template, window
        one_reference = all(task.startswith(("niah_single", "niah_multikey")) for task in tasks)
        self.metrics = (Metric("found", "share of the references that the answer contains", binary=one_reference),)
        self._made: tuple[str, int] | None = None  # what the next two belong to: one task and length at a time
        self._task: Any = None
        self._documents: list[dict[str, Any]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def settings(self) -> dict[str, Any]:
        versions = {package: metadata.version(package) for package in ("lm_eval", "wonderwords", "nltk", "numpy")}
        return {
            "tasks": list(self.tasks), "lengths": list(self.lengths), "samples": self.samples, "seed": self.seed,
            "chat_template": self.chat_template, "tokenizer": _fingerprint(self.tokenizer), "versions": versions,
        }  # fmt: skip

    def plan(self) -> list[str]:
        """All ids. ValueError where a task's data cannot be had, which names all such tasks."""
        _check_data(self.tasks)
        return [
            f"{task}/{length}/{number}"
            for task in self.tasks
            for length in self.lengths
            for number in range(self.samples)
        ]

    def prepare(self, prompt: str) -> Prompt:
        task, length, number = _parts(prompt)
        made, documents = self._make(task, length)
        if number >= len(documents):
            raise ValueError(
                f"{prompt}: the harness could make only {len(documents)} documents of {task} at {length} tokens: "
                "choose a longer length or fewer samples"
            )
        document = documents[number]
        text = made.fewshot_context(
            document, 0, gen_prefix=made.doc_to_prefix(document), apply_chat_template=self.chat_template,
            chat_template=self._in_template if self.chat_template else None,
        )  # fmt: skip
        ids = self._encode(text)
        most = _most_tokens(made)
        if self.window is not None and len(ids) + most > self.window:
            raise ValueError(
                f"{prompt}: prompt and answer take {len(ids) + most} tokens, and the model's window is {self.window}. "
                "The harness sizes prompts without the answer's first words: choose a length somewhat below the window"
            )
        item = Item(prompt, {"task": task, "length": length}, tuple(map(str, document["outputs"])))
        return Prompt(prompt, ids, (item,), {"tokens": len(ids)}, (made, document))

    def run(self, attempt: Attempt) -> list[Answer]:
        made, document = attempt.prompt.data
        new = generate(attempt, _most_tokens(made))
        text = attempt.tokenizer.decode(new, skip_special_tokens=True)
        for stop in made.config.generation_kwargs.get("until") or ():
            text = text.split(stop)[0] if stop else text
        (item,) = attempt.prompt.items
        score = float(made.process_results(document, [text])[str(item.group["length"])])
        return [Answer(item.id, {"found": score}, text)]

    def totals(self, answers: dict[str, list[tuple[Item, Answer]]]) -> list[Total]:
        """For each length the mean of its tasks, and the plain mean of all."""
        totals = []
        for length in self.lengths:
            for method, pairs in answers.items():
                means = []
                for task in self.tasks:
                    group = {"task": task, "length": length}
                    values = [answer.values["found"] for item, answer in pairs if item.group == group]
                    if values:
                        means.append(sum(values) / len(values))
                value = 100 * sum(means) / len(means) if means else None
                totals.append(Total(f"tasks at {length}", method, value, "mean over tasks of their means"))
        return totals + mean_totals(answers, "found")

    def _make(self, name: str, length: int) -> tuple[Any, list[dict[str, Any]]]:
        if self._made != (name, length):
            self._made = None
            self._task = _load(name, length, self._tokenizer_folder(), self.seed)
            self._documents = [dict(document) for document in self._task.eval_docs.select(range(self._kept()))]
            self._made = name, length
        return self._task, self._documents

    def _kept(self) -> int:
        return min(self.samples, len(self._task.eval_docs))

    def _tokenizer_folder(self) -> str:
        """The harness takes a tokenizer by its name alone, and would run code that comes with it: a plain copy."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="sparseprefill-tokenizer-")
            self.tokenizer.save_pretrained(self._folder.name)
            path = Path(self._folder.name) / "tokenizer_config.json"
            config = json.loads(path.read_text(encoding="utf-8"))
            if config.pop("auto_map", None) is not None:
                path.write_text(json.dumps(config), encoding="utf-8")
        return self._folder.name

    def _in_template(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )  # fmt: skip

    def _encode(self, text: str) -> list[int]:
        """With special tokens, but no second one where a template has begun the text with it."""
        begin = getattr(self.tokenizer, "bos_token", None)
        add = not (begin and text.startswith(begin))
        return list(self.tokenizer(text, add_special_tokens=add).input_ids)


def _parts(prompt: str) -> tuple[str, int, int]:
    task, length, number = prompt.split("/")
    return task, int(length), int(number)


def _most_tokens(task: Any) -> int:
    return int(task.config.generation_kwargs["max_gen_toks"])


def _fingerprint(tokenizer: Any) -> str:
    """sha256 of what a tokenizer does, as far as it tells; it decides the samples."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _require_ruler() -> None:
    for package in ("nltk", "wonderwords", "scipy"):
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            raise ImportError(f'lm_eval\'s RULER needs {package}: pip install "sparseprefill[evals]"') from None


def _check_data(tasks: Sequence[str]) -> None:
    """ValueError that names every task whose data cannot be had here, and how to get them."""
    missing: dict[str, list[str]] = {}
    essays, questions = [t for t in tasks if t in NEEDS_ESSAYS], [t for t in tasks if t in NEEDS_QUESTIONS]
    if essays:
        problem = _why_no_essays()
        if problem:
            missing[problem] = essays
    for task in questions:
        problem = _why_no_questions(task)
        if problem:
            missing.setdefault(problem, []).append(task)
    if missing:
        raise ValueError(
            "the data of some tasks cannot be had here: "
            + "; ".join(f"{', '.join(names)}: {problem}" for problem, names in missing.items())
            + f". Run where there is a network, or choose of {', '.join(OFFLINE_TASKS)}, which need none"
        )


def _why_no_essays() -> str | None:
    with _quiet_making():
        from lm_eval.tasks.ruler import prepare_niah

        try:
            prepare_niah.nltk.data.find("tokenizers/punkt_tab")
        except LookupError:
            return "NLTK's punkt_tab is not installed (python -m nltk.downloader punkt_tab)"
        try:
            prepare_niah.get_haystack("essay")
        except Exception as error:  # whatever a hub client raises
            return f"the data set baber/paul_graham_essays: {type(error).__name__}"
    return None


def _why_no_questions(task: str) -> str | None:
    with _quiet_making():
        from lm_eval.tasks.ruler import qa_utils

        try:
            getattr(qa_utils, NEEDS_QUESTIONS[task])()
        except Exception as error:  # likewise
            source = "SQuAD from rajpurkar.github.io" if task == "ruler_qa_squad" else "HotpotQA from huggingface.co"
            return f"{source}, which is fetched on every run: {type(error).__name__}"
    return None


def _load(name: str, length: int, tokenizer: str, seed: int) -> Any:
    """A task of the harness with its documents, drawn by themselves whatever ran before."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / "ruler"
    with _quiet_making():
        for module in sorted(folder.glob("*_utils.py")):  # a first import draws numbers, a second does not
            importlib.import_module(f"lm_eval.tasks.ruler.{module.stem}")
    sys.modules.pop("lm_eval.tasks.ruler.cwe_utils", None)  # it has a generator of its own, which would go on
    with _quiet_making(), _seeded(seed):
        manager = lm_eval.tasks.TaskManager(
            include_path=str(folder), include_defaults=False,
            metadata={"tokenizer": tokenizer, "max_seq_lengths": [length]},
        )  # fmt: skip
        task = manager.load([name])["tasks"][name]
    return task


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global generators as the harness seeds them, and afterwards as they were."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(1234 + seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextlib.contextmanager
def _quiet_making() -> Iterator[None]:
    """Progress of the harness' generators goes to the terminal, never into what a command prints."""
    logger = logging.getLogger("lm_eval.api.task")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it explains its --metadata at each load
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True, slots=True)
class LmEvalRun:
    """What one method got in tasks of the harness."""

    method: str  # its label
    results: dict[str, dict[str, Any]]  # task or group: the harness' aggregates
    scores: dict[tuple[str, str], dict[int, float]]  # (task, "metric,filter"): the score of each document by number
    documents: dict[tuple[str, int], str]  # (task, number): hash of the document, the same for all methods
    report: PatchReport | None  # None for the stock model


def run_lm_eval(
    tasks: Sequence[str],
    model: PreTrainedModel,
    tokenizer: Any,
    specs: Sequence[MethodSpec],
    *,
    limit: int | None = None,
    batch_size: int = 1,
    num_fewshot: int | None = None,
    metadata: dict[str, Any] | None = None,
    include_path: str | None = None,
    apply_chat_template: bool = False,
    max_length: int | None = None,
    max_logits_gib: float = 8.0,
    min_length: int | None = 0,
    last_rows_dense: int = 0,
    observe: bool = False,
) -> list[LmEvalRun]:
    """Any tasks of lm-evaluation-harness with each method, on the same documents, in one process.

    Tasks are loaded once, under the harness' default seeds, so that every method answers the same requests. Scores
    that are numbers are kept for each document, ready for paired comparison.

    Args:
        tasks: names of tasks, groups or tags of the harness.
        specs: methods; `MethodSpec("dense")` is the stock model.
        limit: documents of each task, the first ones (of a RULER task: of its first length).
        num_fewshot: examples before each document; None: as the task says.
        metadata: what tasks that make their own documents need, as in {"max_seq_lengths": [4096]}; its "tokenizer"
            is the model's where it is not given.
        include_path: folder with task files of one's own.
        max_length, max_logits_gib: see `model_class`.
        min_length, last_rows_dense, observe: see `patch_model`.

    Raises:
        ImportError: the harness is missing.
        ValueError: no such task, no methods or the same twice, or what a task or `model_class` refuses.
    """
    require_harness()
    if not specs or len({spec.label for spec in specs}) < len(specs):
        raise ValueError("give at least one method, and each of them once")
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    given = {"tokenizer": str(tokenizer.name_or_path), **(metadata or {})}
    with _quiet_making(), _seeded(0):
        manager = TaskManager(include_path=include_path, metadata=given)
        unknown = [name for name in tasks if not manager.match_tasks([name])]
        if unknown or not tasks:
            raise ValueError(f"no task of lm_eval: {', '.join(unknown) or 'none given'} (see lm_eval ls tasks)")
        loaded = manager.load(list(tasks))
    if num_fewshot is not None:
        for task in loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=num_fewshot)
    runs = []
    settings = {"min_length": min_length, "last_rows_dense": last_rows_dense, "observe": observe}
    for spec in specs:
        # a fresh one for each method: nothing that one wrote can be taken for another's
        adapter = model_class()(
            model, method="dense", tokenizer=tokenizer, batch_size=batch_size, max_length=max_length,
            max_logits_gib=max_logits_gib,
        )  # fmt: skip
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=1234)
        with spec.applied(model, **settings) as patch, _seeded(0), torch.random.fork_rng():
            torch.manual_seed(1234)
            found = evaluate(
                adapter, loaded, limit=limit, bootstrap_iters=0, log_samples=True,
                apply_chat_template=apply_chat_template, fewshot_as_multiturn=apply_chat_template,
            )  # fmt: skip
            report = None if patch is None else patch.report()
        runs.append(_run_of(spec, found, report))
    return runs


def _run_of(spec: MethodSpec, found: dict[str, Any], report: PatchReport | None) -> LmEvalRun:
    scores: dict[tuple[str, str], dict[int, float]] = {}
    documents: dict[tuple[str, int], str] = {}
    for task, samples in found["samples"].items():
        for sample in samples:
            number = int(sample["doc_id"])
            documents[task, number] = sample["doc_hash"]
            for metric in sample["metrics"]:
                value = sample[metric]
                absent = task in RULER_TASKS and value == -1  # its mark for lengths that a document has not
                if isinstance(value, bool | int | float) and not absent:
                    scores.setdefault((task, f"{metric},{sample['filter']}"), {})[number] = float(value)
    return LmEvalRun(spec.label, {**found["results"], **found.get("groups", {})}, scores, documents, report)
