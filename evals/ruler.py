"""RULER's tasks that need no data, as an evaluation: retrieval, variable tracking, and counting words, by length.

Prompts have the structure of the official ones (arXiv:2404.06654) in words of their own, the metric is the official
one. Scores therefore say how methods compare on one model; they are not the published numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sparseprefill.evals.generation import generate
from sparseprefill.evals.prompt_rendering import Renderer, haystack_settings
from sparseprefill.evals.retrieval_prompts import (
    GENERATOR_VERSION,
    NEW_TOKENS,
    TASKS,
    TEXT_TASKS,
    Difficulty,
    Draft,
    Sample,
    UserText,
    draft,
    fitted,
)
from sparseprefill.evals.ruler_metrics import (
    average,
    effective_length,
    length_score,
    official_mean,
    postprocess,
    share_found,
)
from sparseprefill.evals.tasks import Answer, Attempt, Item, Metric, Prompt, Total

FOUND = Metric("string_match_all", "share of the references that the answer contains, upper and lower case alike")


class Ruler:
    """Tasks by lengths by samples: a `sparseprefill.evals.tasks.Task`."""

    def __init__(
        self,
        tokenizer: Any,
        lengths: Sequence[int],
        *,
        tasks: Sequence[str] = tuple(TASKS),
        samples: int = 25,
        seed: int = 1,
        chat: str = "auto",
        haystack: Sequence[str] | None = None,
        difficulty: Difficulty | None = None,
        new_tokens: dict[str, int] | None = None,
        window: int | None = None,
    ) -> None:
        """Plan a suite.

        Args:
            tokenizer: of the model.
            lengths: tokens of prompt and answer together.
            tasks: names in `TASKS`.
            samples: a task and length.
            seed: of the samples; sample i of a task and length is the same whatever else is run.
            chat: chat template, "auto" (if there is one), "none" or "always".
            haystack: sentences for the tasks in `TEXT_TASKS`; None: seeded prose.
            difficulty: the numbers of the tasks; None: RULER's.
            new_tokens: budgets by task in place of `NEW_TOKENS`; see `Renderer.room` for tokenizers that need more.
            window: of the model: longer lengths are refused; None: not known here, and refused when they are run.

        Raises:
            ValueError: nothing to run, an unknown or repeated name, a length beyond the window, a haystack that is
                empty or that no task uses, or "always" for a tokenizer without template.
        """
        _check_names(tasks, new_tokens)
        check_lengths(lengths, window)
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        text = None if haystack is None else UserText.of(haystack)
        if haystack is not None and not set(tasks) & set(TEXT_TASKS):
            raise ValueError(f"no task here hides anything in a text: one of {', '.join(TEXT_TASKS)} would")
        self.name = "ruler"
        self.metrics: tuple[Metric, ...] = (FOUND,)
        self.axes: tuple[str, ...] = ("task", "length")
        self.notes: tuple[str, ...] = (
            "RULER's structure in words of our own, without its two QA tasks: compare methods, not published scores",
            "string_match_all knows no boundaries: a reference inside a longer number or word counts, as officially",
        )
        self.tokenizer = tokenizer
        self.tasks = tuple(tasks)
        self.lengths = tuple(lengths)
        self.samples = samples
        self.seed = seed
        self.haystack = haystack
        self._text = text
        self.difficulty = difficulty or Difficulty()
        self.new_tokens = {task: (new_tokens or {}).get(task, NEW_TOKENS[task]) for task in self.tasks}
        self.renderer = Renderer.of(tokenizer, chat)
        self._cells = {
            f"{task}/{length}/{i}": (task, length, i)
            for length in self.lengths for task in self.tasks for i in range(samples)
        }  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """Everything that decides prompts and grades."""
        return {
            "generator": GENERATOR_VERSION, "tasks": list(self.tasks), "lengths": list(self.lengths),
            "samples": self.samples, "seed": self.seed, "difficulty": asdict(self.difficulty),
            "new_tokens": dict(self.new_tokens), **haystack_settings(self.haystack), **self.renderer.settings(),
        }  # fmt: skip

    def plan(self) -> list[str]:
        """task/length/index."""
        return list(self._cells)

    def prepare(self, prompt: str) -> Prompt:
        """The prompt of an id of the plan. ValueError where the length is too short for the task."""
        if prompt not in self._cells:
            raise ValueError(f"{prompt!r} is no prompt of this plan")
        task, length, index = self._cells[prompt]

        def need(sample: Sample) -> int:
            return len(self._ids(sample)) + self._budget(task, sample)

        def make(tokens: int) -> Draft:
            return draft(
                task, tokens, seed=self.seed, index=index, difficulty=self.difficulty,
                text=self._text if task in TEXT_TASKS else None,
            )  # fmt: skip

        sample = fitted(make, length, need, prompt)
        ids = self._ids(sample)
        item = Item(prompt, {"task": task, "length": length}, sample.references, chance=0.0)
        return Prompt(prompt, ids, (item,), sample_details(sample, ids, self._budget(task, sample)), sample)

    def run(self, attempt: Attempt) -> list[Answer]:
        """Generate greedily and grade."""
        prompt = attempt.prompt
        new = generate(attempt, prompt.details["new_tokens"])
        return [self.grade(prompt, self.tokenizer.decode(new, skip_special_tokens=True))]

    def grade(self, prompt: Prompt, text: str) -> Answer:
        """What a reply is worth."""
        (item,) = prompt.items
        cleaned = postprocess(text)
        return Answer(item.id, {FOUND.name: share_found(cleaned, item.references)}, text, {"null": not cleaned})

    def totals(self, answers: dict[str, list[tuple[Item, Answer]]]) -> list[Total]:
        """The official averages: tasks into lengths, lengths into one number; and the effective length."""
        found = []
        for method, pairs in answers.items():
            cells: dict[int, dict[str, list[float]]] = {}
            for item, answer in pairs:
                tasks = cells.setdefault(int(item.group["length"]), {})
                tasks.setdefault(str(item.group["task"]), []).append(answer.values[FOUND.name])
            scores = {
                length: length_score([official_mean(values) for values in tasks.values()])
                for length, tasks in sorted(cells.items())
            }
            for length, score in scores.items():
                found.append(Total(f"{length} tokens", method, score, f"mean over {len(cells[length])} tasks"))
            for name, weights, what in (
                ("Avg", "equal", "mean over lengths"),
                ("wAvg (inc)", "increasing", "mean over lengths, weights 1, 2, ... from the shortest"),
                ("wAvg (dec)", "decreasing", "mean over lengths, weights 1, 2, ... from the longest"),
            ):
                found.append(Total(name, method, average(scores, weights) if scores else None, what))
            longest = effective_length(scores)
            found.append(
                Total("effective length", method, longest, "tokens: the longest length that scores 85.6 or more")
            )
        return found

    def _ids(self, sample: Sample) -> list[int]:
        return self.renderer.token_ids(sample.text(), sample.cue)

    def _budget(self, task: str, sample: Sample) -> int:
        return self.renderer.room(sample.reply, self.new_tokens[task])


def sample_details(sample: Sample, ids: Sequence[int], new_tokens: int) -> dict[str, Any]:
    """What a result keeps of a sample."""
    return {
        "tokens": len(ids), "new_tokens": new_tokens, "size": sample.size,
        "depths": [round(depth, 4) for depth in sample.depths],
    }  # fmt: skip


def check_lengths(lengths: Sequence[int], window: int | None) -> None:
    """Raise ValueError for no lengths, a length twice, one that is no number of tokens, or one beyond the window."""
    if not lengths:
        raise ValueError("there is no length to run: give at least one")
    if len(set(lengths)) < len(lengths):
        raise ValueError(f"a length stands twice in {list(lengths)}")
    for length in lengths:
        if length < 1:
            raise ValueError(f"lengths are numbers of tokens, got {length}")
        if window is not None and length > window:
            raise ValueError(f"{length} tokens exceed the model's window of {window}: choose shorter lengths")


def _check_names(tasks: Sequence[str], new_tokens: dict[str, int] | None) -> None:
    if not tasks:
        raise ValueError(f"there is no task to run: choose from {', '.join(TASKS)}")
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"a task stands twice in {list(tasks)}")
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}: choose from {', '.join(TASKS)}")
    for task, tokens in (new_tokens or {}).items():
        if task not in tasks:
            raise ValueError(f"new tokens for {task!r}, which is not run: choose from {', '.join(tasks)}")
        if tokens < 1:
            raise ValueError(f"an answer needs at least 1 new token, got {tokens} for {task!r}")
