"""Needles in a haystack, scored in the prefill: does a sparse method still find what dense attention finds?

A prompt states several facts and asks for each of them somewhere behind it, not only at its end, so that middle rows
matter too (see `sparseprefill.prompts`). Prompt and answers go through the model in one forward pass. An answer is
right only if the most likely token is right at every one of its positions. As a second column, the closing question is
answered by the model's own `generate` from a prompt without the answer.
"""

from __future__ import annotations

import io
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sparseprefill.evals.loading import provenance
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.files import write_bytes, write_text
from sparseprefill.prefill import METHODS
from sparseprefill.prompts import NeedlePrompt, needle_prompt
from sparseprefill.reports import number, table


@dataclass(frozen=True, slots=True)
class NeedleScore:
    """One method at one length."""

    method: str  # its label, see `MethodSpec`
    length: int  # tokens
    right: list[int]  # questions answered right, by depth, shallow first
    asked: list[int]  # questions, by depth
    generated_right: int  # closing questions that `generate` answered right
    generated_asked: int  # closing questions that it was asked
    seconds: list[float]  # time to first token, of all prompts but the first
    density: float | None  # on the first prompt, as all that follows; None for the stock model
    tile_work: float | None  # None for the stock model
    kept_mass: float | None  # None for the stock model
    kernels: dict[str, int]  # implementation: attention calls
    previous_calls: dict[str, int]  # reason: attention calls that did not run sparsely

    @property
    def rate(self) -> float:
        """Share of all questions answered right."""
        return sum(self.right) / max(1, sum(self.asked))


@dataclass(frozen=True, slots=True)
class NeedleResult:
    """Every cell of a run, and what it depends on."""

    settings: dict[str, Any]  # the arguments of the run
    provenance: dict[str, Any]  # versions, processor, threads, model
    scores: list[NeedleScore]  # one a method and length

    def score(self, method: str, length: int) -> NeedleScore:
        """The score of one method (its label) at one length."""
        return next(s for s in self.scores if (s.method, s.length) == (method, length))

    def speed_up(self, score: NeedleScore) -> float | None:
        """Median over prompts of dense time over this method's time; None where one was not timed."""
        dense = next((s for s in self.scores if s.method == "dense" and s.length == score.length), None)
        if dense is None or not score.seconds:
            return None
        return statistics.median(d / s for d, s in zip(dense.seconds, score.seconds, strict=True))

    def table(self, *, markdown: bool = False) -> str:
        """One line a method and length."""
        head = [
            "length", "method", "retrieved", "generated", "TTFT s", "speed-up", "density", "tile work", "kept mass",
        ]  # fmt: skip
        rows = []
        for s in self.scores:
            speed = self.speed_up(s)
            generated = f"{s.generated_right}/{s.generated_asked}" if s.generated_asked else "-"
            rows.append([
                str(s.length), s.method, f"{100 * s.rate:.0f}%", generated,
                number(statistics.median(s.seconds), 2) if s.seconds else "-",
                "-" if speed is None else f"{speed:.2f}x",
                number(1.0 if s.density is None else s.density), number(1.0 if s.tile_work is None else s.tile_work),
                number(1.0 if s.kept_mass is None else s.kept_mass),
            ])  # fmt: skip
        return table(head, rows, markdown=markdown)

    def save(self, path: Path) -> None:
        """JSON with every cell, written whole or not at all."""
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")


@torch.no_grad()
def run_needle(
    model: PreTrainedModel,
    tokenizer: Any,
    methods: Sequence[MethodSpec],
    lengths: Sequence[int],
    *,
    needles: int = 5,
    samples: int = 10,
    generated: int | None = None,
    seed: int = 1,
    haystack: Sequence[str] | None = None,
    last_rows_dense: int = 0,
    min_length: int | None = 0,
    progress: Callable[[int], Any] = lambda steps: None,
) -> NeedleResult:
    """Score every method on the same prompts.

    The first prompt of a length warms up, and on it density and kept mass are observed; time to first token is taken on
    the others (with one prompt, no time is taken).

    Args:
        methods: "dense" first, if speed-ups are wanted.
        lengths: prompt lengths in tokens. ValueError where one exceeds the model's window.
        needles: facts a prompt, one in each of as many equal parts of it: the depths of the grid.
        samples: prompts a length.
        generated: of these, how many also answer their closing question by `generate`; None: all.
        seed: of the prompts; prompt i of a length is the same whatever else is run.
        haystack: sentences; None: seeded prose.
        last_rows_dense, min_length: see `patch_model`; with `min_length` 0, methods run sparsely at every length.
        progress: called with the number of forward passes done.

    Raises:
        ValueError: a length beyond the model's window, an unknown method, no samples, or a prompt too
            short for its needles.
    """
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for length in lengths:
        if window is not None and length > window:
            raise ValueError(f"{length} tokens exceed the model's window of {window}")
    for spec in methods:
        if spec.name not in METHODS:
            raise ValueError(f"unknown method {spec.name!r}: choose from {', '.join(METHODS)}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    generated = samples if generated is None else min(generated, samples)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    prefix = [tokenizer.bos_token_id] if getattr(tokenizer, "add_bos_token", False) else []
    scores = []
    for length in lengths:
        prompts = [
            needle_prompt(encode, length, seed=seed, index=i, needles=needles, haystack=haystack, prefix=prefix)
            for i in range(samples)
        ]
        for spec in methods:
            with spec.applied(model, last_rows_dense=last_rows_dense, min_length=min_length) as patch:
                # the first prompt warms up and is observed; the others are timed and not observed
                first, _ = _answers(model, prompts[0])
                report = patch.report() if patch is not None else None
                progress(1)
                if patch is not None:
                    patch.observe(False)
                right, asked, seconds = [0] * needles, [0] * needles, []
                for i, prompt in enumerate(prompts):
                    correct = first
                    if i:
                        correct, spent = _answers(model, prompt)
                        seconds.append(spent)
                        progress(1)
                    for answer, ok in zip(prompt.answers, correct, strict=True):
                        asked[answer.part] += 1
                        right[answer.part] += ok
                exact = 0
                for prompt in prompts[:generated]:
                    exact += _generated(model, prompt)
                    progress(1)
            scores.append(
                NeedleScore(
                    spec.label, length, right, asked, exact, generated, seconds,
                    report.density if report else None, report.tile_work if report else None,
                    report.kept_mass if report else None,
                    report.kernels if report else {},
                    report.previous_calls if report else {},
                )
            )  # fmt: skip
    settings = {
        "methods": [spec.label for spec in methods], "lengths": list(lengths), "needles": needles, "samples": samples,
        "generated": generated, "seed": seed, "haystack": "prose" if haystack is None else "file",
        "last_rows_dense": last_rows_dense, "min_length": min_length,
    }  # fmt: skip
    return NeedleResult(settings, provenance(model), scores)


def passes(methods: int, lengths: int, samples: int, generated: int) -> int:
    """How often `run_needle` calls its progress function with 1."""
    return methods * lengths * (samples + min(generated, samples))


def _answers(model: PreTrainedModel, prompt: NeedlePrompt) -> tuple[list[bool], float]:
    """Which answers are right at every position, and the seconds the forward pass took."""
    ids = torch.tensor([prompt.token_ids], device=model.device)
    places = torch.tensor([p - 1 for a in prompt.answers for p in range(a.start, a.stop)], device=model.device)
    _finish_queue(model)
    began = time.perf_counter()
    guesses = model(input_ids=ids, use_cache=True, logits_to_keep=places).logits[0].argmax(-1)
    _finish_queue(model)
    spent = time.perf_counter() - began
    hits = (guesses == ids[0, places + 1]).tolist()
    correct, done = [], 0
    for answer in prompt.answers:
        size = answer.stop - answer.start
        correct.append(all(hits[done : done + size]))
        done += size
    return correct, spent


def _generated(model: PreTrainedModel, prompt: NeedlePrompt) -> bool:
    """Does `generate` write the answer to the closing question, token for token?"""
    last = prompt.answers[-1]
    ids = torch.tensor([prompt.token_ids[: last.start]], device=model.device)
    written = model.generate(  # type: ignore[operator]  # a mixin that PreTrainedModel itself does not have
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=last.stop - last.start, do_sample=False
    )
    return bool(written[0, last.start :].tolist() == prompt.token_ids[last.start : last.stop])


def _finish_queue(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def plot_heat_map(result: NeedleResult, path: Path) -> None:
    """One panel a method: depth by length, red at 0 and green at 1, with the share written in each cell."""
    import matplotlib as mpl
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    colours = LinearSegmentedColormap.from_list("retrieval", ["#F0496E", "#EBB839", "#0CD79F"])
    methods, lengths = result.settings["methods"], result.settings["lengths"]
    needles = result.settings["needles"]
    columns = min(3, len(methods))
    rows = -(-len(methods) // columns)
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(3.4 * columns, 0.9 + 2.6 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis, method in zip(axes, methods, strict=False):
            scores = [result.score(method, length) for length in lengths]
            cells = [[s.right[d] / max(1, s.asked[d]) for s in scores] for d in range(needles)]
            image = axis.imshow(cells, cmap=colours, vmin=0, vmax=1, aspect="auto")
            for d, line in enumerate(cells):
                for c, share in enumerate(line):
                    axis.text(c, d, f"{100 * share:.0f}", ha="center", va="center")
            density = scores[-1].density
            axis.set_title(method.split(":")[0] + ("" if density is None else f" (density {density:.2f})"))
            axis.set_xticks(range(len(lengths)), [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
            axis.set_yticks(
                range(needles), [f"{100 * d // needles}-{100 * (d + 1) // needles}%" for d in range(needles)]
            )
            axis.set_xlabel("prompt length (tokens)")
            axis.set_ylabel("depth of the needle")
        for axis in axes[len(methods) :]:
            axis.set_visible(False)
        figure.colorbar(image, ax=axes.tolist(), label="questions answered right", shrink=0.8)
        picture = io.BytesIO()
        figure.savefig(picture, dpi=130, format=path.suffix.removeprefix(".") or "png")
    write_bytes(path, picture.getvalue())
