"""Many questions about one long context: what context methods lose against dense attention on the same questions.

Facts stand all over a context of prose, outside of sink and local window; each question asks for one of them. Every
method answers every question, and so do dense attention over the same cached context and a control that chooses keys at
random. Times are of one question at a time: with each method, dense on the cached context, and reading it all again.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparseprefill.context import FixedContext, run_context
from sparseprefill.evals.prompt_rendering import plain_ids, prefix_ids
from sparseprefill.evals.report_figures import INK, check_picture, figure_style, to_png
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
from sparseprefill.files import write_bytes
from sparseprefill.patterns.fixed_context import ContextKeys, check_edges, room_left
from sparseprefill.reports import number, table

_SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
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
class EveryKey:
    """Dense attention in the context's own cache: nothing is indexed, and nothing left out."""

    sink: int
    local: int

    def check_length(self, length: int) -> None:
        """See `Squeezed.check_length`."""
        room_left(length, self.sink, self.local)

    def index_layer(self, keys: ContextKeys) -> None:
        """No index."""

    def calibrate(self, indexes: Sequence[None], length: int) -> None:
        """Nothing is calibrated."""

    def load_index(self, *_: Any) -> None:
        """It is not kept in files."""
        raise NotImplementedError("the dense context is not kept in files")


@dataclass(frozen=True, slots=True)
class QuestionCell:
    """One method over all questions."""

    method: str
    wished: float | None  # share of the context's keys that it was to attend to; None for dense
    share: float  # that it attended to, sink and local window included
    asking: float  # the same of the questions' tokens alone
    answering: float  # and of the answers'
    chosen: float  # of all, without sink and local window
    right: float  # share of the questions answered
    lost: int  # questions that dense attention answered, and this did not
    gained: int  # the other way round
    loss: float  # share of right answers, in points: dense - method on the same questions
    low: float  # 95 % interval of the loss
    high: float
    seconds: float  # of one question and its answer, a median
    index_seconds: float  # of indexing one context, a median
    index_bytes: int  # beside keys and values


DENSE = ("dense, transformers' cache", "dense, this cache")
"""Labels of the two rows of dense attention: what a stock model does, and the context with every key attended to."""


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
        timed: questions of the first context whose answers are timed, each with every method in turn.
        seed: of contexts and questions.
        progress: called with 1 for each method, share and context.
    """
    made = [
        make_questions(tokenizer, length, questions, margin=(sink + 64, local + 64), seed=f"{seed}/{n}")
        for n in range(contexts)
    ]
    right: dict[tuple[str, float | None], list[list[float]]] = {}
    kept: dict[tuple[str, float | None], list[tuple[float, ...]]] = {}
    built: dict[tuple[str, float | None], list[tuple[float, int]]] = {}
    seconds: dict[tuple[str, float | None], float] = {}
    again = 0.0
    for n, each in enumerate(made):
        planned: list[tuple[str, float | None, Any, str]] = [(DENSE[1], None, EveryKey(sink, local), "tokens")]
        planned += [(label, share, make(density=share, sink=sink, local=local), access)
                    for label, make, access in methods for share in shares]  # fmt: skip
        run = run_context(model, each.context, methods=[method for _, _, method, _ in planned])
        ready: dict[tuple[str, float | None], tuple[FixedContext, str | None]] = {}
        for label, share, method, access in planned:
            key = label, share
            context = run.index(method, label)
            built.setdefault(key, []).append((context.made["seconds"]["indexing"], context.bytes["index"]))
            answers, shown = _answered(model, tokenizer, context, each, access)
            right.setdefault(key, []).append(answers)
            kept.setdefault(key, []).append((*shown, shown[0] - (sink + local) / len(context)))
            if n == 0:
                ready[key] = context, access
                if share is None:
                    ready[DENSE[0], None] = context, None
            if share is None:
                right.setdefault((DENSE[0], None), []).append(_answered(model, tokenizer, context, each, None)[0])
            else:
                progress(1)
        if n == 0:
            seconds = _timed(model, ready, each.asked[:timed])
            again = _read_again(model, each)
    dense = np.array(right[DENSE[0], None])
    cells = []
    for key, found in right.items():
        values = np.array(found)
        share, asking, answering, chosen = map(float, np.mean(kept.get(key, [(1.0,) * 4]), axis=0))
        index = [(0.0, 0)] if key[1] is None else built[key]
        low, high = paired_interval(dense - values)
        cells.append(QuestionCell(
            *key, share, asking, answering, chosen, float(values.mean()), int((dense > values).sum()),
            int((values > dense).sum()), float(100 * (dense - values).mean()), low, high, seconds[key],
            statistics.median(one[0] for one in index), index[0][1],
        ))  # fmt: skip
    return cells, again


def paired_interval(difference: np.ndarray, resamples: int = 5000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of [contexts, questions], in points: contexts are drawn, and questions within them.

    Where no question differs there is nothing to draw from, and it is the exact interval of a share that was not seen
    once, to both sides.
    """
    contexts, questions = difference.shape
    if not difference.any():
        bound = 100 * (1 - 0.025 ** (1 / difference.size))
        return -bound, bound
    draw = np.random.default_rng(seed)
    outer = draw.integers(contexts, size=(resamples, contexts, 1))
    inner = draw.integers(questions, size=(resamples, contexts, questions))
    means = 100 * difference[outer, inner].mean((1, 2))
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _settings() -> dict[str, Any]:
    return {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@torch.no_grad()
def _answered(
    model: PreTrainedModel, tokenizer: Any, context: FixedContext, made: Questions, access: str | None, batch: int = 20
) -> tuple[list[float], tuple[float, float, float]]:
    """1 for every question that was answered right; the share of the context attended to, by questions and by answers.

    Without `access`, dense attention as transformers has it.
    """

    def answers(new: int) -> tuple[list[float], float]:
        found: list[float] = []
        patched = nullcontext() if access is None else context.patch(model, sample_rows=0, access=access)
        with patched as patch:
            for start in range(0, len(made.asked), batch):
                inputs = context.inputs(list(made.asked[start : start + batch]))
                given: dict[str, Any] = {**inputs, **_settings(), "max_new_tokens": new}
                generate: Any = model.generate
                written = generate(**given)[:, inputs["input_ids"].shape[1] :]
                for row, answer in zip(written, made.answers[start : start + batch], strict=True):
                    text = postprocess(tokenizer.decode(row, skip_special_tokens=True))
                    found.append(share_found(text, [answer]))
            share = 1.0 if patch is None else patch.report().context_share
        return found, 1.0 if share is None else share

    found, whole = answers(NEW_TOKENS)
    if access is None or whole == 1.0:
        return found, (1.0, 1.0, 1.0)
    _, asking = answers(1)
    asked = sum(map(len, made.asked))
    written = (NEW_TOKENS - 1) * len(made.asked)  # the first token of an answer comes with the question
    return found, (whole, asking, (whole * (asked + written) - asking * asked) / written)


@torch.no_grad()
def _timed(
    model: PreTrainedModel, ready: Mapping[tuple[str, float | None], tuple[FixedContext, str | None]],
    asked: Sequence[Tensor],
) -> dict[tuple[str, float | None], float]:  # fmt: skip
    """Median seconds of a question with its answer, each method in turn for each question, after one for warmth."""
    generate: Any = model.generate
    found: dict[tuple[str, float | None], list[float]] = {key: [] for key in ready}
    for row in (asked[0], *asked):
        for key, (context, access) in ready.items():
            inputs = context.inputs(row)
            if access is None:
                inputs["past_key_values"] = dense_cache(context)
            with nullcontext() if access is None else context.patch(model, observe=False, access=access):
                began = time.perf_counter()
                generate(**inputs, **_settings())
            found[key].append(time.perf_counter() - began)
    return {key: statistics.median(each[1:]) for key, each in found.items()}


def dense_cache(context: FixedContext) -> DynamicCache:
    """What a stock model would have after reading the context: keys and values in the order of the tokens."""
    cache = DynamicCache()
    for layer in sorted(context.layers):
        key, value = (each[None].clone() for each in context.layers[layer].plain())
        cache.update(key, value, layer)
    return cache


@torch.no_grad()
def _read_again(model: PreTrainedModel, made: Questions) -> float:
    """Median seconds of reading context and question, and answering, without anything kept: of three, after one."""
    generate: Any = model.generate
    found = []
    for turn in range(4):
        ids = torch.cat([made.context, made.asked[turn % len(made.asked)]])[None].to(model.device)
        began = time.perf_counter()
        generate(ids, attention_mask=torch.ones_like(ids), **_settings())
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


def question_table(cells: Sequence[QuestionCell], again: float, *, markdown: bool = False) -> str:
    """One line a method and share, dense first. Ratios of time are to the faster of the two dense ones."""
    dense = min(cell.seconds for cell in cells if cell.wished is None)
    head = [
        "method", "wished", "attended", "by questions", "by answers", "without sink and local", "right", "lost",
        "gained", "loss in points", "95 % interval", "s a question", "dense / method", "reading again / method",
        "indexing s", "index MiB",
    ]  # fmt: skip
    rows = [
        [
            cell.method, "-" if cell.wished is None else f"{cell.wished:.0%}", f"{cell.share:.1%}",
            f"{cell.asking:.1%}", f"{cell.answering:.1%}", f"{cell.chosen:.1%}", f"{cell.right:.1%}",
            str(cell.lost), str(cell.gained), f"{cell.loss:.1f}", f"{cell.low:.1f} to {cell.high:.1f}",
            number(cell.seconds), number(dense / cell.seconds, 2), number(again / cell.seconds, 1),
            number(cell.index_seconds, 1), number(cell.index_bytes / 2**20, 1),
        ]
        for cell in sorted(cells, key=lambda cell: cell.wished is not None)
    ]  # fmt: skip
    return table(head, rows, markdown=markdown)


def question_plot(cells: Sequence[QuestionCell], path: Path) -> None:
    """Loss against dense attention, with its interval, against the share of the context that is attended to, as PNG.

    Losses above 10 points are drawn on a logarithmic scale. Raises ValueError for a name that does not end in .png.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    check_picture(path)
    sparse = [cell for cell in cells if cell.wished is not None]
    with figure_style(INK):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained", dpi=150)
        axes = figure.subplots()
        for place, method in enumerate(dict.fromkeys(cell.method for cell in sparse)):
            own = sorted((cell for cell in sparse if cell.method == method), key=lambda cell: cell.share)
            below, above = ([max(0.0, each) for each in side] for side in (
                [cell.loss - cell.low for cell in own], [cell.high - cell.loss for cell in own]))  # fmt: skip
            axes.errorbar(
                [cell.share for cell in own], [cell.loss for cell in own], yerr=[below, above], label=method,
                marker="o^sDvP"[place % 6], ms=4.5, lw=1.2, capsize=2, elinewidth=0.8,
            )  # fmt: skip
        axes.axhline(0.0, color=INK, lw=1.0, ls="--", label="dense attention")
        axes.set_xscale("log")
        shares = [cell.share for cell in sparse]
        axes.set_xlim(0.8 * min(shares), 1.25 * max(shares))
        axes.set_xticks([each for each in _SHARES if 0.8 * min(shares) <= each <= 1.25 * max(shares)])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
        axes.set_yscale("symlog", linthresh=10.0)
        axes.set_yticks([-10, -5, 0, 5, 10, 20, 50, 100])
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda points, _: f"{points:g}"))
        axes.set_xlabel("keys of the context that are attended to")
        axes.set_ylabel("right answers lost, in points")
        axes.grid(color=INK, alpha=0.1, lw=0.6)
        axes.legend(frameon=False, fontsize=8)
    write_bytes(path, to_png(figure))
