"""How far a method's model is from the same model dense, over long text and without any task.

Nothing is generated and nothing has to be known of the text: one forward pass of each, and next-token distributions,
the likelihood of the text, attention and hidden states are compared at every position.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseprefill.evals.generation import check_window
from sparseprefill.evals.layer_errors import (
    OwnErrors,
    check_dense,
    decoder_layers,
    hidden_errors,
    hidden_rows,
    own_errors,
    sampled_places,
)
from sparseprefill.evals.logits import FinalStates, NextTokens, OutputHead, compare_next_tokens
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.evals.prompt_rendering import first_ids, plain_ids, prefix_ids
from sparseprefill.evals.tasks import Answer, Attempt, Item, Metric, Prompt, Total
from sparseprefill.files import read_text
from sparseprefill.patterns.methods import METHODS
from sparseprefill.prompts import prose_ids

_SHARED = "fidelity/dense"  # in `Attempt.shared`

_METRICS = (
    Metric("kl", "KL(dense || method) of the next-token distributions, nats, mean over positions", False, False),
    Metric("agreement", "positions at which both hold the same token for the likeliest"),
    Metric("nll", "-log probability of the text, nats a token", False, False),
    Metric("dense_nll", "the same of the dense model", False, False),
    Metric("perplexity_ratio", "perplexity of the text over that of the dense model", False, False),
)
_LAYER_METRICS = (
    Metric("kept_mass", "share of dense attention's mass that the method keeps, on dense inputs, whole prompt"),
    Metric("layer_error", "relative L2 error of an attention layer's output on dense inputs, mean of layers",
           False, False),
    Metric("hidden_error", "relative L2 error of the hidden states behind the last decoder layer", False, False),
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class _Dense:
    """What is kept of the dense model for the other methods of a prompt."""

    final: FinalStates
    hidden: dict[int, list[Tensor]]  # see `hidden_rows`


class Fidelity:
    """A `Task`: windows of a text, each compared position by position and averaged in parts by position.

    A prompt of `length` tokens has length - 1 positions with a next token. They are cut into `buckets` parts of equal
    length, each an item:

    - kl, agreement, nll, dense_nll, perplexity_ratio: of the distributions over the vocabulary, float64, at every
      position of the part. The ratio is exp(nll - dense_nll).
    - layer_error: for each attention layer |sparse - dense| / |dense| over its outputs [positions, hidden], behind its
      output projection, at every position of the part, every layer being given what the dense model gives it; the mean
      of layers here, each of them in the answer's details ("layer_errors").
    - hidden_error: the same ratio of the hidden states [positions, hidden] behind a decoder layer as the two models
      run, so that errors add up, at `rows` evenly spaced positions of the part; the last layer's here, all of them
      in details ("hidden_errors").
    - kept_mass: exp(lse_sparse - lse_dense), the mean of heads, layers that ran sparsely and sampled queries of the
      whole prompt, on dense inputs; 1 where nothing ran sparsely.

    Everything kept gives KL 0, agreement 1, ratio 1, kept mass 1 and errors 0, up to rounding.

    Args:
        tokenizer: of the model.
        lengths: tokens of the windows, special tokens before them included.
        windows: how many of each length. Window i begins at the same place for every length; no two share text.
        text: a UTF-8 file; None: seeded prose.
        seed: of the prose.
        buckets: parts by position.
        layers: also run each prompt a second time for `layer_error` and `kept_mass`, and note `hidden_error`.
        rows: positions of a part at which hidden states are compared.
        window: tokens the model takes, see `model_window`; None: it is asked when it runs.

    Raises:
        ValueError: settings that make no sense, lengths beyond the window, an empty text.
        FileNotFoundError: there is no such file.
    """

    name = "fidelity"
    axes = ("length", "position")

    def __init__(
        self,
        tokenizer: Any,
        lengths: Sequence[int],
        *,
        windows: int = 2,
        text: str | Path | None = None,
        seed: int = 0,
        buckets: int = 4,
        layers: bool = True,
        rows: int = 64,
        window: int | None = None,
    ) -> None:
        for what, value in (("windows", windows), ("buckets", buckets), ("rows", rows)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{what} must be a whole number of at least 1, got {value!r}")
        if not lengths or len(set(lengths)) < len(lengths):
            raise ValueError(f"lengths must be at least one, none of them twice, got {list(lengths)}")
        for length in lengths:
            if length < 2 * buckets or length < 2:
                raise ValueError(
                    f"a window of {length} tokens is too short for {buckets} parts: at least two tokens each"
                )
            if window is not None and length > window:
                raise ValueError(f"{length} tokens exceed the model's window of {window}: choose a shorter length")
        self.tokenizer = tokenizer
        self.lengths = tuple(lengths)
        self.windows, self.seed, self.buckets, self.layers, self.rows = windows, seed, buckets, layers, rows
        self.metrics: tuple[Metric, ...] = (*_METRICS, *(_LAYER_METRICS if layers else ()))
        self._file = None if text is None else Path(text).name
        self._text = None if text is None else read_text(text, "text")
        if self._text is not None and not self._text.strip():
            raise ValueError(f"the text {text} is empty: name a file with long text in it")
        self._before = prefix_ids(tokenizer)
        self._prompts = {f"{length}/{i}": (length, i) for length in self.lengths for i in range(windows)}

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know of these numbers."""
        ahead = ", ".join(name for name, row in METHODS.items() if row.looks_ahead)
        return (
            "KL and agreement compare with the same model dense, not with the truth; perplexity is of the text",
            f"methods that look ahead ({ahead}; what goes around one of them; any method with last rows dense) choose "
            "what a token attends to by tokens that follow, which flatters their perplexity; their answers are marked",
            "every method chooses for a block of queries at a time, so up to a block less one token ahead plays in",
            "peak memory of the methods holds the dense model's hidden states too, which they are compared with",
            *(("kept mass is measured on sampled queries of the whole prompt, the same for all of its parts",)
              if self.layers else ()),
        )  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """Everything that decides prompts and grades."""
        return {
            "lengths": list(self.lengths), "windows": self.windows, "seed": self.seed, "buckets": self.buckets,
            "layers": self.layers, "rows": self.rows, "text": self._file,
            "text_sha256": None if self._text is None else hashlib.sha256(self._text.encode("utf-8")).hexdigest(),
        }  # fmt: skip

    def plan(self) -> Sequence[str]:
        """One id a window: its length and number."""
        return list(self._prompts)

    def prepare(self, prompt: str) -> Prompt:
        """The window of an id. ValueError for ids that were not planned, and where the text is too short for it."""
        if prompt not in self._prompts:
            raise ValueError(f"no prompt {prompt!r} is planned: they are called {', '.join(self._prompts)}")
        length, index = self._prompts[prompt]
        room = length - len(self._before)
        ids = self._prose(index, room) if self._text is None else self._window(self._text, index, room)
        items = tuple(
            Item(f"{prompt}/{part + 1}", {"length": length, "position": self._position(part)})
            for part in range(self.buckets)
        )
        return Prompt(prompt, [*self._before, *ids], items, {"window": index})

    def _position(self, part: int) -> str:
        return f"{100 * part / self.buckets:.4g}-{100 * (part + 1) / self.buckets:.4g}%"

    def _prose(self, index: int, room: int) -> list[int]:
        return prose_ids(lambda text: plain_ids(self.tokenizer, text), room, f"fidelity/{self.seed}/{index}")

    def _window(self, text: str, index: int, room: int) -> list[int]:
        """The first tokens of one of as many equal parts of the text as there are windows, from a word's beginning."""
        start, end = (len(text) * i // self.windows for i in (index, index + 1))
        if index:
            blank = re.compile(r"\s").search(text, start, min(start + 1000, end))  # some languages write none
            start = blank.start() if blank else start
        ids = first_ids(self.tokenizer, text[start:end], room)
        if len(ids) < room:
            raise ValueError(
                f"the text {self._file} is too short for {self.windows} windows of {room + len(self._before)} tokens: "
                f"part {index + 1} of {self.windows} has {len(ids)}; take a longer text, or fewer or shorter windows"
            )
        return ids

    def edges(self, length: int) -> list[int]:
        """Positions at which the parts begin, and length - 1, where the last one ends."""
        return [(length - 1) * part // self.buckets for part in range(self.buckets + 1)]

    def check_method(self, spec: MethodSpec) -> None:
        """Raise ValueError for a method of which there is no kept mass, where layers are compared."""
        if self.layers and spec.estimates:
            raise ValueError(
                f"{spec.label} estimates what it leaves out, so that no kept mass is known: compare without layers "
                "(--no-layers)"
            )

    @torch.no_grad()
    def run(self, attempt: Attempt) -> list[Answer]:
        """Compare with the dense model, which is run too where it was not before.

        Raises ValueError for a prompt beyond the model's window and an unknown method, NotImplementedError for models
        that cannot be compared, FloatingPointError for logits that are NaN.
        """
        model, spec = attempt.model, attempt.spec
        if spec.name not in METHODS:
            raise ValueError(f"unknown method {spec.name!r}: choose from {', '.join(METHODS)}")
        self.check_method(spec)
        length = len(attempt.prompt.token_ids)
        check_window(model, length, attempt.prompt.id)
        ids = torch.tensor([list(attempt.prompt.token_ids)], device=model.device)
        head = OutputHead(model)
        edges = self.edges(length)
        layers = decoder_layers(model) if self.layers else []
        places = sampled_places(edges, self.rows)
        stock = spec.name == "dense" and not spec.options
        dense: _Dense | None = None if stock else attempt.shared.get(_SHARED)
        if dense is None and not stock:
            with hidden_rows(layers, places) as hidden:
                dense = _Dense(head.run(ids), hidden)
            attempt.shared[_SHARED] = dense
        with hidden_rows(layers, places) as hidden, attempt.patched():
            final = head.run(ids)
            attempt.prefilled()
        head.check(final)
        if dense is None:
            attempt.shared[_SHARED] = dense = _Dense(final, hidden)
        tokens = compare_next_tokens(head, ids, dense.final.states, final.states)
        errors = hidden_errors(dense.hidden, hidden) if self.layers else None
        own = None
        if self.layers and not stock:
            # the last token predicts nothing, but it is there to be attended to
            own = own_errors(
                head, spec, ids, edges, min_length=attempt.min_length, **self._last_rows(attempt)
            )  # fmt: skip
            check_dense(own, dense.final)
        return [self._answer(attempt, tokens, part, edges, errors, own) for part in range(self.buckets)]

    @staticmethod
    def _last_rows(attempt: Attempt) -> dict[str, int]:
        return {"last_rows_dense": attempt.last_rows_dense} if attempt.last_rows_dense else {}

    def _answer(
        self, attempt: Attempt, tokens: NextTokens, part: int, edges: Sequence[int],
        errors: list[list[float]] | None, own: OwnErrors | None,
    ) -> Answer:  # fmt: skip
        start, stop = edges[part], edges[part + 1]
        nll, dense_nll = (float(each[start:stop].mean()) for each in (tokens.nll, tokens.first_nll))
        values = {
            "kl": float(tokens.kl[start:stop].mean()), "agreement": float(tokens.agreement[start:stop].mean()),
            "nll": nll, "dense_nll": dense_nll, "perplexity_ratio": _exp(nll - dense_nll),
        }  # fmt: skip
        details: dict[str, Any] = {
            "positions": [start, stop], "perplexity": _exp(nll), "dense_perplexity": _exp(dense_nll),
            "looks_ahead": attempt.spec.looks_ahead(attempt.last_rows_dense),
        }  # fmt: skip
        if errors is not None:
            each = {} if own is None else {str(layer): found[part] for layer, found in own.errors.items()}
            mass = None if own is None else own.report.kept_mass
            values["kept_mass"] = 1.0 if mass is None else mass
            values["layer_error"] = math.fsum(each.values()) / len(each) if each else 0.0
            values["hidden_error"] = errors[part][-1]
            details["layer_errors"], details["hidden_errors"] = each, errors[part]
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(
                f"{', '.join(bad)} of {attempt.spec.label} on {attempt.prompt.id} is not finite: the model or the "
                "method gives no probability to what the dense model, or the text, has there"
            )
        return Answer(attempt.prompt.items[part].id, values, None, details)

    def totals(self, answers: dict[str, list[tuple[Item, Answer]]]) -> list[Total]:
        """Means over all tokens of a length, and the worst part: perplexities are no means of perplexities."""
        totals = []
        for length, (method, pairs) in itertools.product(self.lengths, answers.items()):
            own = [answer for item, answer in pairs if item.group["length"] == length]
            if not own:
                continue
            counts = [stop - start for start, stop in (answer.details["positions"] for answer in own)]

            def mean(metric: str, own: list[Answer] = own, counts: list[int] = counts) -> float:
                weighted = (answer.values[metric] * count for answer, count in zip(own, counts, strict=True))
                return math.fsum(weighted) / sum(counts)

            perplexity, dense = mean("nll"), mean("dense_nll")
            worst = max(answer.values["kl"] for answer in own)
            totals += [
                Total(f"KL at {length}", method, mean("kl"), "nats, mean over all tokens"),
                Total(f"worst KL at {length}", method, worst, "nats, the part of a prompt that is furthest from dense"),
                Total(f"perplexity at {length}", method, _exp(perplexity), "exp of the mean over all tokens"),
                Total(f"perplexity ratio at {length}", method, _exp(perplexity - dense), "over that of dense"),
            ]
        return totals


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
