"""Many questions about one long context: what context methods lose against dense attention on the same questions.

Facts stand all over a context of prose, outside of sink and local window; each question asks for one of them. Every
method answers every question, and so do dense attention over the same cached context and a control that chooses keys at
random. Times are of one question at a time: with each method, dense on the cached context, and reading it all again.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparseprefill.context import FixedContext, run_context
from sparseprefill.evals.compare import bootstrap_interval
from sparseprefill.evals.prompt_rendering import plain_ids, prefix_ids
from sparseprefill.evals.retrieval_prompts import (
    INTRO_SOME,
    draw_keys,
    draw_numbers,
    fact_cue,
    fact_question,
    largest,
    prose,
    statement,
)
from sparseprefill.evals.ruler_metrics import postprocess, share_found
from sparseprefill.patterns.fixed_context import ContextKeys, check_edges, room_left
from sparseprefill.reports import number, table

NEW_TOKENS = 12
"""Of an answer: seven digits and what follows."""


@dataclass(frozen=True, slots=True)
class Questions:
    """A context and what is asked about it."""

    context: Tensor  # int64 [tokens]
    asked: tuple[Tensor, ...]  # int64 [tokens] each: a question, up to where its answer begins
    answers: tuple[str, ...]


def make_questions(tokenizer: Any, length: int, count: int, *, margin: tuple[int, int], seed: str) -> Questions:
    """`count` facts in a context of at most `length` tokens, none in the first or the last `margin` tokens.

    Raises ValueError where the context is too short for them.
    """
    draw = random.Random(f"context/{seed}")
    keys, values = draw_keys(count, draw), draw_numbers(count, draw)
    haystack = prose(draw, None)
    first, last = (each / length for each in margin)
    depths = [1.15 * first + (1 - 1.15 * (first + last)) * (k + 0.5) / count for k in range(count)]
    draw.shuffle(depths)
    needles = [(depth, statement(key, value)) for depth, key, value in zip(depths, keys, values, strict=True)]
    special = prefix_ids(tokenizer)

    def pieces(size: int) -> tuple[list[list[int]], tuple[int, ...]]:
        context, places = haystack.around(size, needles)
        return [
            [*special, *plain_ids(tokenizer, INTRO_SOME)],
            *(plain_ids(tokenizer, each) for each in context),
        ], places

    if sum(map(len, pieces(count)[0])) > length:
        raise ValueError(f"{count} facts do not fit a context of {length} tokens: ask for fewer")
    size = largest(lambda n: sum(map(len, pieces(n)[0])), length, count, f"a context of {length} tokens")
    made, places = pieces(size)
    edges = np.cumsum([0, *map(len, made)])
    total = int(edges[-1])
    for place in places:
        if edges[place + 1] < margin[0] or edges[place + 2] > total - margin[1]:
            raise ValueError(
                f"{count} facts do not fit between the edges of a context of {length} tokens: ask for fewer"
            )
    asked = tuple(torch.tensor(plain_ids(tokenizer, fact_question([key]) + fact_cue(key))) for key in keys)
    return Questions(torch.tensor([each for piece in made for each in piece]), asked, tuple(values))


@dataclass(frozen=True, slots=True)
class RandomKeys:
    """The control: keys drawn at random, for each KV head and block of queries."""

    density: float
    sink: int
    local: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_edges(self.sink, self.local)

    def check_length(self, length: int) -> None:
        """See `Squeezed.check_length`."""
        room_left(length, self.sink, self.local)

    def index_layer(self, keys: ContextKeys) -> RandomIndex:
        """Nothing is learnt."""
        kv_heads, middle = keys.key.shape[:2]
        length = middle + self.sink + self.local
        share = max(0.0, (self.density * length - self.sink - self.local) / middle)
        return RandomIndex(torch.arange(middle).expand(kv_heads, -1), share, torch.Generator().manual_seed(self.seed))

    def calibrate(self, indexes: Sequence[RandomIndex], length: int) -> None:
        """Nothing is calibrated."""

    def load_index(self, *_: Any) -> RandomIndex:
        """It is not kept in files."""
        raise NotImplementedError("the control is not kept in files")


@dataclass(frozen=True, slots=True, eq=False)
class RandomIndex:
    """See `RandomKeys`."""

    order: Tensor
    share: float
    draw: torch.Generator

    def choose(self, query: Tensor, real: Tensor, queries: Tensor, edge_lse: Tensor) -> Tensor:
        """See `ContextIndex.choose`."""
        shape = (*query.shape[:2], self.order.shape[1])
        return (torch.rand(shape, generator=self.draw) < self.share).to(query.device)

    def tensors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def to(self, device: torch.device) -> RandomIndex:
        """It has nothing to move but the order."""
        return RandomIndex(self.order.to(device), self.share, self.draw)


@dataclass(frozen=True, slots=True)
class QuestionCell:
    """One method over all questions."""

    method: str
    wished: float | None  # share of the context's keys that it was to attend to; None for dense
    share: float  # that it attended to, sink and local window included
    chosen: float  # the same without them
    right: float  # share of the questions answered
    loss: float  # of dense attention's right answers, in points: dense - method on the same questions
    low: float | None  # 95 % interval of the loss
    high: float | None
    seconds: float  # of one question and its answer, a median
    index_seconds: float  # of indexing one context, a median
    index_bytes: int  # beside keys and values


def ask_all(
    model: PreTrainedModel,
    tokenizer: Any,
    methods: Sequence[tuple[str, Any, str]],
    *,
    length: int = 16384,
    contexts: int = 5,
    questions: int = 40,
    shares: Sequence[float] = (0.15, 0.05, 0.02),
    sink: int = 16,
    local: int = 128,
    timed: int = 8,
    seed: int = 1,
    progress: Callable[[int], Any] = lambda steps: None,
) -> tuple[list[QuestionCell], float]:
    """Ask every method every question; also the median time of reading context and question again, in seconds.

    Args:
        methods: labels, what makes a context method from `density`, `sink` and `local`, and how chosen keys are read
            (see `fixed_context.ACCESS`).
        length: tokens of a context at most.
        contexts, questions: so many contexts, each with so many questions.
        shares: of the context's keys, sink and local window included.
        sink, local: tokens.
        timed: questions whose answers are timed one by one, of the first context.
        seed: of contexts and questions.
        progress: called with 1 for each method, share and context.
    """
    made = [
        make_questions(tokenizer, length, questions, margin=(sink + 64, local + 64), seed=f"{seed}/{n}")
        for n in range(contexts)
    ]
    right: dict[tuple[str, float | None], list[list[float]]] = {}
    kept: dict[tuple[str, float | None], list[tuple[float, float]]] = {}
    seconds: dict[tuple[str, float | None], list[float]] = {}
    built: dict[tuple[str, float | None], list[tuple[float, int]]] = {}
    again: list[float] = []
    for n, each in enumerate(made):
        planned = [(label, share, make(density=share, sink=sink, local=local), access)
                   for label, make, access in methods for share in shares]  # fmt: skip
        run = run_context(model, each.context, methods=[method for _, _, method, _ in planned])
        for label, share, method, access in planned:
            key: tuple[str, float | None] = (label, share)
            context = run.index(method, label)
            built.setdefault(key, []).append((context.made["seconds"]["indexing"], context.bytes["index"]))
            with context.patch(model, sample_rows=0, access=access) as patch:
                right.setdefault(key, []).append(_answered(model, tokenizer, context, each))
                attended = patch.report().context_share or 1.0
            kept.setdefault(key, []).append((attended, attended - (sink + local) / len(context)))
            if n == 0:
                seconds[key] = _timed(model, context, each.asked[:timed], access)
            progress(1)
        key = ("dense", None)
        right.setdefault(key, []).append(_answered(model, tokenizer, context, each))
        if n == 0:
            seconds[key] = _timed(model, context, each.asked[:timed])
            again = _read_again(model, each, timed)
    cells = []
    dense = np.array(right["dense", None])
    for (label, wished), found in right.items():
        values = np.array(found)
        low, high = bootstrap_interval(
            100 * (dense - values).reshape(-1, 1),
            np.ones((dense.size, 1)),
            [n for n in range(contexts) for _ in range(questions)],
        )
        attended, chosen = np.mean(kept.get((label, wished), [(1.0, 1.0)]), axis=0)
        index = built.get((label, wished), [(0.0, 0)])
        cells.append(QuestionCell(
            label, wished, float(attended), float(chosen), float(values.mean()), float(100 * (dense - values).mean()),
            low, high, statistics.median(seconds[label, wished]), statistics.median(each[0] for each in index),
            index[0][1],
        ))  # fmt: skip
    return cells, statistics.median(again)


def _settings() -> dict[str, Any]:
    return {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@torch.no_grad()
def _answered(
    model: PreTrainedModel, tokenizer: Any, context: FixedContext, made: Questions, batch: int = 20
) -> list[float]:
    """1 for every question that was answered right; the model attends as it is patched."""
    generate: Any = model.generate
    found: list[float] = []
    for start in range(0, len(made.asked), batch):
        rows = list(made.asked[start : start + batch])
        inputs = context.inputs(rows)
        written = generate(**inputs, **_settings())[:, inputs["input_ids"].shape[1] :]
        for new, answer in zip(written, made.answers[start : start + batch], strict=True):
            found.append(share_found(postprocess(tokenizer.decode(new, skip_special_tokens=True)), [answer]))
    return found


@torch.no_grad()
def _timed(
    model: PreTrainedModel, context: FixedContext, asked: Sequence[Tensor], access: str | None = None
) -> list[float]:
    """Seconds of each question with its answer, the first one left out; without `access`, dense."""
    generate: Any = model.generate
    found = []
    for row in (asked[0], *asked):
        inputs = context.inputs(row)
        if access is None:
            inputs["past_key_values"] = dense_cache(context)
            began = time.perf_counter()
            generate(**inputs, **_settings())
        else:
            with context.patch(model, observe=False, access=access):
                began = time.perf_counter()
                generate(**inputs, **_settings())
        found.append(time.perf_counter() - began)
    return found[1:]


def dense_cache(context: FixedContext) -> DynamicCache:
    """What a stock model would have after reading the context: keys and values in the order of the tokens."""
    cache = DynamicCache()
    for layer in sorted(context.layers):
        key, value = (each[None].clone() for each in context.layers[layer].plain())
        cache.update(key, value, layer)
    return cache


@torch.no_grad()
def _read_again(model: PreTrainedModel, made: Questions, timed: int) -> list[float]:
    """Seconds of reading context and question, and answering: without anything kept."""
    generate: Any = model.generate
    found = []
    for row in made.asked[: max(1, timed // 4)]:
        ids = torch.cat([made.context, row])[None].to(model.device)
        began = time.perf_counter()
        generate(ids, attention_mask=torch.ones_like(ids), **_settings())
        found.append(time.perf_counter() - began)
    return found


def question_table(cells: Sequence[QuestionCell], again: float, *, markdown: bool = False) -> str:
    """One line a method and share, dense last."""
    dense = next(cell for cell in cells if cell.wished is None)
    head = [
        "method", "wished", "attended", "without sink and local", "right", "loss in points", "95 % interval",
        "seconds a question", "dense / method", "reading again / method", "indexing s", "index MiB",
    ]  # fmt: skip
    rows = [
        [
            cell.method, "-" if cell.wished is None else f"{cell.wished:.0%}", f"{cell.share:.1%}",
            f"{cell.chosen:.1%}",
            f"{cell.right:.1%}", f"{cell.loss:.1f}",
            "-" if cell.low is None or cell.high is None else f"{cell.low:.1f} to {cell.high:.1f}",
            number(cell.seconds), number(dense.seconds / cell.seconds, 2), number(again / cell.seconds, 1),
            number(cell.index_seconds, 1), number(cell.index_bytes / 2**20, 1),
        ]
        for cell in cells
    ]  # fmt: skip
    return table(head, rows, markdown=markdown)
