"""Needles in a haystack as evaluations: generated answers on a grid of depths, or answers all along a prompt.

`Needles` hides facts at given depths and asks for them in one reply. `NeedlesAlong` asks for several facts at places
all along one prompt and grades the answers in the prefill itself, so that middle rows matter too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from sparseprefill.evals.generation import check_window, generate
from sparseprefill.evals.needle_prompts import KINDS, MANY_KINDS, MOST_NEEDLES, NEW_TOKENS, TEXT_KINDS, needle_draft
from sparseprefill.evals.prompt_rendering import Renderer, haystack_settings, plain_ids, prefix_ids
from sparseprefill.evals.retrieval_prompts import (
    GENERATOR_VERSION,
    QUESTION_PLACES,
    Draft,
    Sample,
    UserText,
    fitted,
)
from sparseprefill.evals.ruler import check_lengths, sample_details
from sparseprefill.evals.ruler_metrics import postprocess, share_found
from sparseprefill.evals.tasks import Answer, Attempt, Item, Metric, Prompt, Total, mean_totals
from sparseprefill.prompts import NeedlePrompt, needle_prompt

ALL_KINDS = (*KINDS, "along")
"""What `needle_task` makes."""


class Needles:
    """Depths by lengths by samples, each with one question and a generated answer: a `tasks.Task`."""

    def __init__(
        self,
        tokenizer: Any,
        lengths: Sequence[int],
        *,
        kind: str = "classic",
        depths: int | Sequence[float] = 10,
        samples: int = 3,
        needles: int | None = None,
        question_at: str = "end",
        seed: int = 1,
        chat: str = "auto",
        haystack: Sequence[str] | None = None,
        new_tokens: int | None = None,
        window: int | None = None,
    ) -> None:
        """Plan a grid.

        Args:
            tokenizer: of the model.
            lengths: tokens of prompt and answer together.
            kind: "classic": one fact in prose. "multi": several, all asked for. "passkey": one in a repeated line.
                "kv": an entry of a JSON object. "two_hop": a fact names the key of another.
            depths: where the answer stands, in percent of the haystack (0: before it, 100: behind it); or how many
                depths, evenly from 0 to 100.
            samples: a depth and length.
            needles: facts of "multi" and "two_hop"; None: 3 of them.
            question_at: "start", "middle" or "end" of the text. The start of the answer ends the prompt in any case.
            seed: of the samples; sample i of a length and depth is the same whatever else is run.
            chat: chat template, "auto" (if there is one), "none" or "always".
            haystack: sentences; None: seeded prose.
            new_tokens: budget of an answer; None: by kind; see `Renderer.room` for tokenizers that need more.
            window: of the model: longer lengths are refused; None: not known here, and refused when they are run.

        Raises:
            ValueError: nothing to run, an unknown name, a length beyond the window, a depth out of range, a haystack
                that is empty or that the kind does not use, or "always" for a tokenizer without template.
        """
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}: choose from {', '.join(KINDS)}")
        if question_at not in QUESTION_PLACES:
            raise ValueError(f"unknown question place {question_at!r}: choose one of {', '.join(QUESTION_PLACES)}")
        check_lengths(lengths, window)
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        if needles is not None and kind not in MANY_KINDS:
            raise ValueError(f"{kind!r} has one needle: a number of them is for {' and '.join(MANY_KINDS)}")
        if needles is not None and not 1 <= needles <= MOST_NEEDLES:
            raise ValueError(f"needles must be between 1 and {MOST_NEEDLES}, got {needles}")
        if new_tokens is not None and new_tokens < 1:
            raise ValueError(f"an answer needs at least 1 new token, got {new_tokens}")
        text = None if haystack is None else UserText.of(haystack)
        if haystack is not None and kind not in TEXT_KINDS:
            raise ValueError(f"{kind!r} makes its own haystack: a text is for {', '.join(TEXT_KINDS)}")
        self.kind = kind
        self.name = f"needle_{kind}"
        single = kind != "multi"
        self.metrics: tuple[Metric, ...] = (
            Metric("found", "share of the answers that the reply contains, whole and alone", binary=single),
            Metric("contained", "the same, also inside longer numbers and words, as RULER counts", binary=single),
        )
        self.axes: tuple[str, ...] = ("depth", "length")
        self.notes: tuple[str, ...] = ("every prompt has facts and a haystack of its own",)
        self.tokenizer = tokenizer
        self.lengths = tuple(lengths)
        self.depths = depth_grid(depths)
        self.samples = samples
        self.needles = needles or 3
        self.question_at = question_at
        self.seed = seed
        self.haystack = haystack
        self._text = text
        self.new_tokens = new_tokens or NEW_TOKENS[kind]
        self.renderer = Renderer.of(tokenizer, chat)
        self._cells = {
            f"{kind}/{length}/{depth:g}-{i}": (length, depth, i)
            for length in self.lengths for depth in self.depths for i in range(samples)
        }  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """Everything that decides prompts and grades."""
        found: dict[str, Any] = {
            "generator": GENERATOR_VERSION, "kind": self.kind, "lengths": list(self.lengths),
            "depths": list(self.depths), "samples": self.samples, "question_at": self.question_at, "seed": self.seed,
            "new_tokens": self.new_tokens, **self.renderer.settings(),
        }  # fmt: skip
        if self.kind in MANY_KINDS:
            found["needles"] = self.needles
        if self.kind in TEXT_KINDS:
            found |= haystack_settings(self.haystack)
        return found

    def plan(self) -> list[str]:
        """kind/length/depth-index."""
        return list(self._cells)

    def prepare(self, prompt: str) -> Prompt:
        """The prompt of an id of the plan. ValueError where the length is too short."""
        if prompt not in self._cells:
            raise ValueError(f"{prompt!r} is no prompt of this plan")
        length, depth, index = self._cells[prompt]

        def make(tokens: int) -> Draft:
            return needle_draft(
                self.kind, tokens, depth / 100, seed=self.seed, index=index, needles=self.needles,
                text=self._text,
            )  # fmt: skip

        sample = fitted(make, length, lambda each: len(self._ids(each)) + self._budget(each), prompt)
        ids = self._ids(sample)
        item = Item(prompt, {"depth": depth, "length": length}, sample.references, chance=0.0)
        return Prompt(prompt, ids, (item,), sample_details(sample, ids, self._budget(sample)), sample)

    def run(self, attempt: Attempt) -> list[Answer]:
        """Generate greedily and grade."""
        prompt = attempt.prompt
        new = generate(attempt, prompt.details["new_tokens"])
        return [self.grade(prompt, self.tokenizer.decode(new, skip_special_tokens=True))]

    def grade(self, prompt: Prompt, text: str) -> Answer:
        """What a reply is worth."""
        (item,) = prompt.items
        whole = sum(stands_alone(reference, text) for reference in item.references) / len(item.references)
        values = {"found": whole, "contained": share_found(postprocess(text), item.references)}
        return Answer(item.id, values, text)

    def totals(self, answers: dict[str, list[tuple[Item, Answer]]]) -> list[Total]:
        """Means over all items, of both metrics, and of the first by length."""
        return (
            length_totals(self.lengths, answers)
            + mean_totals(answers, "found")
            + mean_totals(answers, "contained", "mean of all items, contained")
        )

    def _ids(self, sample: Sample) -> list[int]:
        return self.renderer.token_ids(sample.text(self.question_at), sample.cue)

    def _budget(self, sample: Sample) -> int:
        return self.renderer.room(sample.reply, self.new_tokens)


class NeedlesAlong:
    """Prompts that state several facts and ask for each somewhere behind it: a `tasks.Task` without generation.

    An answer is right if the most likely token is right at every one of its positions, given those before it. Prompts
    are those of `sparseprefill.prompts.needle_prompt`, exactly as long as their length says.
    """

    def __init__(
        self,
        tokenizer: Any,
        lengths: Sequence[int],
        *,
        needles: int = 5,
        samples: int = 10,
        seed: int = 1,
        haystack: Sequence[str] | None = None,
        window: int | None = None,
    ) -> None:
        """Plan prompts.

        Args:
            tokenizer: of the model.
            lengths: tokens of a prompt, its answers included.
            needles: facts a prompt, one in each of as many equal parts of it: the depths of the grid.
            samples: prompts a length.
            seed: of the prompts; prompt i of a length is the same whatever else is run.
            haystack: sentences; None: seeded prose.
            window: of the model: longer lengths are refused; None: not known here, and refused when they are run.

        Raises:
            ValueError: nothing to run, a length beyond the window, a haystack without text.
        """
        check_lengths(lengths, window)
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        if needles < 1:
            raise ValueError(f"needles must be at least 1, got {needles}")
        if haystack is not None:
            UserText.of(haystack)  # refuses one that is empty
        self.name = "needle_along"
        self.metrics: tuple[Metric, ...] = (
            Metric("found", "the most likely token is right at every position of the answer", binary=True),
        )
        self.axes: tuple[str, ...] = ("depth", "length")
        self.notes: tuple[str, ...] = (
            "several questions all along one prompt, graded in its prefill; depths are the middles of equal parts",
        )
        self.tokenizer = tokenizer
        self.lengths = tuple(lengths)
        self.needles = needles
        self.samples = samples
        self.seed = seed
        self.haystack = haystack
        self._prefix = prefix_ids(tokenizer)
        self._cells = {f"along/{length}/{i}": (length, i) for length in self.lengths for i in range(samples)}

    def settings(self) -> dict[str, Any]:
        """Everything that decides prompts and grades."""
        return {
            "generator": GENERATOR_VERSION, "kind": "along", "lengths": list(self.lengths), "needles": self.needles,
            "samples": self.samples, "seed": self.seed, **haystack_settings(self.haystack),
            **Renderer.of(self.tokenizer, "none").settings(),
        }  # fmt: skip

    def plan(self) -> list[str]:
        """along/length/index."""
        return list(self._cells)

    def prepare(self, prompt: str) -> Prompt:
        """The prompt of an id of the plan. ValueError where the length is too short."""
        if prompt not in self._cells:
            raise ValueError(f"{prompt!r} is no prompt of this plan")
        length, index = self._cells[prompt]
        made = needle_prompt(
            lambda text: plain_ids(self.tokenizer, text), length, seed=self.seed, index=index, needles=self.needles,
            haystack=self.haystack, prefix=self._prefix,
        )  # fmt: skip
        items = tuple(
            Item(
                f"{prompt}/{answer.part}",
                {"depth": round(100 * (answer.part + 0.5) / self.needles, 2), "length": length},
                (answer.needle.number,), chance=0.0,
            )
            for answer in made.answers
        )  # fmt: skip
        return Prompt(prompt, made.token_ids, items, {"tokens": length}, made)

    @torch.no_grad()
    def run(self, attempt: Attempt) -> list[Answer]:
        """One forward pass over prompt and answers."""
        prompt, model = attempt.prompt, attempt.model
        made: NeedlePrompt = prompt.data
        check_window(model, len(made.token_ids), prompt.id)
        ids = torch.tensor([made.token_ids], device=model.device)
        places = torch.tensor([p - 1 for a in made.answers for p in range(a.start, a.stop)], device=model.device)
        with attempt.patched():
            guesses = model(input_ids=ids, use_cache=True, logits_to_keep=places).logits[0].argmax(-1)
            attempt.prefilled()
        return self.grade(prompt, guesses.tolist())

    def grade(self, prompt: Prompt, guesses: Sequence[int]) -> list[Answer]:
        """What the most likely tokens at all positions of the answers, in order, are worth."""
        made: NeedlePrompt = prompt.data
        graded, done = [], 0
        for item, answer in zip(prompt.items, made.answers, strict=True):
            size = answer.stop - answer.start
            right = list(guesses[done : done + size]) == list(made.token_ids[answer.start : answer.stop])
            done += size
            where = {"needle_at": round(100 * answer.depth, 2), "asked_at": round(100 * answer.asked, 2)}
            graded.append(Answer(item.id, {"found": float(right)}, details=where))
        return graded

    def totals(self, answers: dict[str, list[tuple[Item, Answer]]]) -> list[Total]:
        """Means by length and over all items."""
        return length_totals(self.lengths, answers) + mean_totals(answers, "found")


def length_totals(lengths: Sequence[int], answers: dict[str, list[tuple[Item, Answer]]]) -> list[Total]:
    """What was found at each length, over all depths."""
    found: list[Total] = []
    for length in lengths:
        own = {method: [p for p in pairs if p[0].group["length"] == length] for method, pairs in answers.items()}
        found += mean_totals(own, "found", f"{length} tokens")
    return found


def needle_task(kind: str, tokenizer: Any, lengths: Sequence[int], **options: Any) -> Needles | NeedlesAlong:
    """The task of a kind in `ALL_KINDS`; `options` are the arguments of `Needles`, or of `NeedlesAlong` for "along".

    Raises ValueError for an unknown kind, and for an option that "along" does not have.
    """
    if kind not in ALL_KINDS:
        raise ValueError(f"unknown kind {kind!r}: choose from {', '.join(ALL_KINDS)}")
    if kind != "along":
        return Needles(tokenizer, lengths, kind=kind, **options)
    for name in ("depths", "question_at", "chat", "new_tokens"):
        if name in options:
            raise ValueError(f"'along' has no {name}: it asks all along a prompt of plain text and generates nothing")
    return NeedlesAlong(tokenizer, lengths, **options)


def depth_grid(depths: int | Sequence[float]) -> tuple[float, ...]:
    """Percentages: so many of them evenly from 0 to 100 (one alone: 50), rounded as the field does; or those given.

    Raises ValueError for a number of them not in 1 to 101, and for depths that repeat or are out of range.
    """
    if isinstance(depths, int):
        if not 1 <= depths <= 101:
            raise ValueError(f"the number of depths must be between 1 and 101, got {depths}")
        return tuple(round(100 * k / (depths - 1)) for k in range(depths)) if depths > 1 else (50,)
    if not depths:
        raise ValueError("there is no depth to run: give at least one")
    for depth in depths:
        if not 0 <= depth <= 100:
            raise ValueError(f"depths are percentages between 0 and 100, got {depth}")
    if len({f"{depth:g}" for depth in depths}) < len(depths):
        raise ValueError(f"a depth stands twice in {list(depths)}")
    return tuple(depths)


def stands_alone(answer: str, text: str) -> bool:
    """Does a text contain an answer with no letter, digit or (where the answer has hyphens) hyphen next to it?

    Of letters, those of ASCII count: no other script has blanks between all words and numbers.
    """
    edge = r"0-9A-Za-z_\d" + ("-" if "-" in answer else "")
    return re.search(f"(?<![{edge}]){re.escape(answer)}(?![{edge}])", text) is not None
