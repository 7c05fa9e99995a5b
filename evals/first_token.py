"""Time to first token and peak memory of a whole model, methods and dense attention in turns on the same prompt.

The first call of each method at each length is reported apart: it compiles, and asks the system for memory. What was
not measured whole, because the model was cut or dense attention would take too long, is marked as extrapolated.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import inspect
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from sparseprefill.evals.loading import load_model, model_folder
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.evals.prefill_parts import Clock
from sparseprefill.evals.random_models import keep_layers, layers_holder, random_model, shape_config
from sparseprefill.evals.tasks import finish_queue, peak_memory, reset_peak_memory
from sparseprefill.huggingface_activations import chunk_mlps, chunkable_mlps
from sparseprefill.huggingface_modules import attention_modules, text_config
from sparseprefill.profile_memory import available_bytes, longest_that_fits, out_of_memory
from sparseprefill.reports import number, table

DENSE_LIMIT = 262144
"""Tokens above which dense attention is timed on one layer, on a GPU."""

_WARM = 256  # tokens of the prefill after which peak memory is watched


@dataclass(frozen=True, slots=True)
class ModelSetup:
    """Which model, where, in what: enough for a process of its own to make the same one."""

    model: str | None = None  # hub name or folder; None for the model inside
    shape: str | None = None  # one of `SHAPES`, with random weights, instead
    layers: int | None = None  # the first so many alone
    device: str = "cpu"
    dtype: str = "auto"
    trust_remote_code: bool = False
    mlp_chunk: int | None = None  # of `patch_model`, for dense too
    offload_cache: bool = False  # keys and values of the other layers lie in the memory of the CPU

    def made(self) -> tuple[PreTrainedModel, int]:
        """(the model, how many layers it has when it is whole).

        Raises ValueError for what does not go together or cannot be loaded, NotImplementedError for an MLP that cannot
        run in chunks.
        """
        if self.model is not None and self.shape is not None:
            raise ValueError("a model has weights and a shape has random ones: give --model or --shape, not both")
        if self.offload_cache and torch.device(self.device).type != "cuda":
            raise ValueError("the cache is offloaded from a GPU: leave --offload-cache out on the CPU")
        if self.shape is not None:
            whole: int = shape_config(self.shape).num_hidden_layers
            name = ("float32" if self.device == "cpu" else "bfloat16") if self.dtype == "auto" else self.dtype
            dtype: torch.dtype = getattr(torch, name)
            model = random_model(self.shape, layers=self.layers, device=self.device, dtype=dtype)
        else:
            model, _ = load_model(
                self.model, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code
            )
            whole = text_config(model).num_hidden_layers
            if self.layers is not None:
                keep_layers(model, self.layers)
        if self.mlp_chunk is not None:
            if self.mlp_chunk < 1:
                raise ValueError(f"--mlp-chunk is a number of tokens, at least 1, got {self.mlp_chunk}")
            attention = attention_modules(model, text_config(model))
            chunk_mlps(chunkable_mlps(model, attention), self.mlp_chunk, [])
        return model, whole


@dataclass(frozen=True, slots=True)
class FirstTokenCell:
    """One method at one length. Seconds and bytes are of the layers that ran, `whole_seconds` of all the model has."""

    method: str  # its label
    length: int  # tokens
    density: float | None  # mean over the heads; None where nothing ran sparsely
    seconds: float  # to the first token, median
    first_seconds: float  # of the first call: it compiles, warms up and allocates
    peak_bytes: int | None  # at most, beside what was there before the prefill; None where it was not measured
    layers: int  # how many ran
    whole_layers: int  # how many the model has
    whole_seconds: float  # with the other layers reckoned in, at the time of one
    speed_up: float | None  # of the whole: median over turns of dense over this; None where dense did not run

    @property
    def extrapolated(self) -> bool:
        """Whether a layer was reckoned with that did not run."""
        return self.layers < self.whole_layers


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """A method that did not fit; it is not tried at longer prompts."""

    method: str  # its label
    length: int  # tokens it was tried at
    tried: bool  # whether it ran out, or was reckoned to
    fits: int | None  # tokens that should fit; None where not even 256 do
    basis: str  # what that was reckoned from

    def __str__(self) -> str:
        what = "ran out of memory" if self.tried else "will not fit into memory"
        fits = "not even 256 tokens fit" if self.fits is None else f"about {self.fits} tokens fit"
        return f"{self.method} {what} at {self.length} tokens: {fits}, by {self.basis}"


@dataclass(frozen=True, slots=True)
class _Run:
    seconds: float
    whole_seconds: float
    layers: int


def first_tokens(
    model: Any,
    methods: Sequence[MethodSpec],
    lengths: Sequence[int],
    *,
    whole_layers: int | None = None,
    repeats: int = 3,
    seed: int = 0,
    dense_limit: int | None = None,
    peak: Callable[[MethodSpec, int], int | None] | None = None,
    offload_cache: bool = False,
    progress: Callable[[int], Any] = lambda steps: None,
) -> Iterator[FirstTokenCell | OutOfMemory]:
    """Time methods on random tokens, at one length after the other; "dense" among them is what the others are held to.

    What does not fit into memory comes as an `OutOfMemory`, and the rest goes on.

    Args:
        model: not patched.
        methods: dense first, if speed-ups are wanted.
        lengths: tokens.
        whole_layers: what the model has when it is whole; None: it is.
        repeats: turns that count, after a first call of each and one that counts its pairs.
        seed: of the tokens.
        dense_limit: above that many tokens dense runs one layer alone.
        peak: peak memory of a method at a length, by a process of its own; None: read from the runs, on a GPU alone.
        offload_cache: keys and values wait in the memory of the CPU.
        progress: called once for each of the `2 + repeats` steps of a method at a length.

    Raises:
        ValueError: repeats below 1, or layers that differ, so that one cannot stand for the others.
        FloatingPointError: logits that are not finite.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if dense_limit is not None and max(lengths) <= dense_limit:
        dense_limit = None
    bench = _Bench(model, whole_layers, dense_limit, offload_cache, peak)
    draw = torch.Generator().manual_seed(seed)
    for length in sorted(lengths):
        ids = torch.randint(1, text_config(model).vocab_size, (1, length), generator=draw).to(model.device)
        started: dict[str, tuple[float, float | None]] = {}
        runs: dict[str, list[_Run]] = {spec.label: [] for spec in methods}
        for spec in methods:
            if bench.may_run(spec, length):
                with bench.surviving(spec, length):
                    started[spec.label] = bench.start(spec, ids, progress)
        for _ in range(repeats):
            for spec in methods:
                if spec.label not in bench.lost:
                    with bench.surviving(spec, length):
                        runs[spec.label].append(bench.run(spec, ids))
                    progress(1)
        dense = runs.get("dense", []) if "dense" not in bench.lost else []
        for spec in methods:
            own = runs[spec.label]
            if spec.label in bench.lost:
                if bench.lost[spec.label].length == length:
                    yield bench.lost_at(spec, length)
                continue
            ratios = [d.whole_seconds / s.whole_seconds for d, s in zip(dense, own, strict=False)]
            first, density = started[spec.label]
            yield FirstTokenCell(
                spec.label, length, density, statistics.median(run.seconds for run in own), first,
                bench.peaks[spec.label].get(length), own[0].layers, bench.whole,
                statistics.median(run.whole_seconds for run in own), statistics.median(ratios) if ratios else None,
            )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Lost:
    length: int
    tried: bool


class _Bench:
    """One model, how it is run, and what that held."""

    def __init__(
        self, model: Any, whole: int | None = None, dense_limit: int | None = None, offload_cache: bool = False,
        peak: Callable[[MethodSpec, int], int | None] | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        self.parent, self.name, self.layers = layers_holder(model)
        self.whole = len(self.layers) if whole is None else whole
        self.dense_limit, self.offload_cache, self.peak = dense_limit, offload_cache, peak
        self.peaks: dict[str, dict[int, int]] = collections.defaultdict(dict)  # by label, then tokens: bytes
        self.lost: dict[str, _Lost] = {}
        self.keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        if self.whole > len(self.layers) or dense_limit is not None:
            self._check_alike()

    def _check_alike(self) -> None:
        kinds = {tuple(type(inner).__name__ for inner in layer.modules()) for layer in self.layers}
        types = set(getattr(text_config(self.model), "layer_types", None) or ())
        if max(len(kinds), len(types)) > 1:
            raise ValueError(
                f"the layers of {type(self.model).__name__} are not all alike, so one cannot stand for the others: run "
                "the whole model, without --layers and --dense-limit"
            )

    def start(
        self, spec: MethodSpec, ids: Tensor, progress: Callable[[int], Any]
    ) -> tuple[float, float | None]:  # fmt: skip
        """(seconds of the first call, density); the peak, where a process of its own measures it, comes before.

        That process runs all layers: where one stands for them, as dense takes too long, no peak is measured.
        """
        length = ids.shape[1]
        if self.peak is not None and not self._runs_one(spec, length):
            held = self.peak(spec, length)
            if held is not None:
                self.peaks[spec.label][length] = held
        first = self.run(spec, ids).seconds
        progress(1)
        with spec.applied(self.model, min_length=0, observe=True, sample_rows=0) as patch:
            density: float | None = 1.0
            if patch is not None:
                self.prefill(self.model, ids)
                density = patch.report().density
        progress(1)
        return first, density

    def run(self, spec: MethodSpec, ids: Tensor) -> _Run:
        """One prefill, up to the first token."""
        device, length = self.model.device, ids.shape[1]
        with contextlib.ExitStack() as stack:
            clock: Clock | None = None
            if self._runs_one(spec, length):
                stack.enter_context(self._one_layer())
            running = getattr(self.parent, self.name)
            if len(running) < self.whole:
                clock = Clock(device)
                stack.callback(clock.remove)
                for layer in running:
                    clock.watch(layer, "layers")
            stack.enter_context(spec.applied(self.model, min_length=0, observe=False))
            on_gpu = device.type == "cuda"
            held = torch.cuda.memory_allocated(device) if on_gpu else 0
            if on_gpu:
                reset_peak_memory(device)
            seconds = self.prefill(self.model, ids)
            if on_gpu:
                used = (peak_memory(device) or 0) - held
                self.peaks[spec.label][length] = max(used, self.peaks[spec.label].get(length, 0))
            layer_seconds = clock.seconds()["layers"] / len(running) if clock is not None else 0.0
        return _Run(seconds, seconds + (self.whole - len(running)) * layer_seconds, len(running))

    @torch.no_grad()
    def prefill(self, model: Any, ids: Tensor) -> float:
        """Seconds up to the first token, the cache kept until then. FloatingPointError where logits are not finite."""
        options: dict[str, Any] = {"logits_to_keep": 1} if self.keeps else {}
        if self.offload_cache:
            options["past_key_values"] = DynamicCache(config=model.config, offloading=True)
        finish_queue(model.device)
        began = time.perf_counter()
        result = model(input_ids=ids, use_cache=True, **options)
        result.logits[:, -1].argmax(-1).tolist()
        seconds = time.perf_counter() - began
        if not bool(result.logits[:, -1].isfinite().all()):
            raise FloatingPointError(
                f"the logits after {ids.shape[1]} tokens are not finite, so nothing is timed: check the model's dtype"
            )
        return seconds

    def _runs_one(self, spec: MethodSpec, length: int) -> bool:
        """Whether one layer stands for all."""
        return spec.label == "dense" and self.dense_limit is not None and length > self.dense_limit

    @contextlib.contextmanager
    def _one_layer(self) -> Iterator[None]:
        setattr(self.parent, self.name, nn.ModuleList([self.layers[0]]))
        try:
            yield
        finally:
            setattr(self.parent, self.name, self.layers)

    @contextlib.contextmanager
    def surviving(self, spec: MethodSpec, length: int) -> Iterator[None]:
        """Notes that there was not enough memory, and goes on; any other error is raised."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            self.lost[spec.label] = _Lost(length, tried=True)

    def may_run(self, spec: MethodSpec, length: int) -> bool:
        """Whether it may fit. On a CPU a process that takes too much is killed and says nothing, so ask before."""
        free = available_bytes(self.model.device)
        if spec.label not in self.lost and free is not None and not self._runs_one(spec, length):
            need, _ = self._need(self.peaks[spec.label])
            if need(length) > free:
                self.lost[spec.label] = _Lost(length, tried=False)
        return spec.label not in self.lost

    def lost_at(self, spec: MethodSpec, length: int) -> OutOfMemory:
        """What is said of a method that was lost, and how long a prompt should fit."""
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        tried = self.lost[spec.label].tried
        shorter = {tokens: held for tokens, held in self.peaks[spec.label].items() if tokens < length}
        need, basis = self._need(shorter)
        free = available_bytes(self.model.device)
        if free is None:
            return OutOfMemory(spec.label, length, tried, max(shorter, default=None), "what ran before")
        return OutOfMemory(spec.label, length, tried, longest_that_fits(need, free, length), basis)

    def _need(self, peaks: dict[int, int]) -> tuple[Callable[[int], int], str]:
        """(bytes for a number of tokens, what that is reckoned from); memory is linear in the tokens."""
        weights = 0  # a process of its own loads them once more
        if self.peak is not None:
            weights = sum(each.numel() * each.itemsize for each in self.model.parameters())
        if not peaks:
            return lambda tokens: weights + self._counted_bytes(tokens), "what the cache and the hidden states take"
        length = max(peaks)
        held = peaks[length]
        return (
            lambda tokens: weights + held * tokens // length,
            f"the {held / 2**20:.0f} MiB that {length} tokens took",
        )

    def _counted_bytes(self, length: int) -> int:
        """The least that a prefill holds: the cache, and what goes into a layer, comes out of it and lies between."""
        config = text_config(self.model)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        cached = 0 if self.offload_cache else 2 * heads * head_dim * len(self.layers)
        return int(length * (cached + 3 * config.hidden_size) * self.model.dtype.itemsize)


def own_process_peak(setup: ModelSetup, spec: MethodSpec, length: int) -> int | None:
    """Peak resident memory of one prefill on the CPU, in a process of its own, beside what it held before.

    None on systems that do not tell. Raises MemoryError where the process ran out of memory or was killed for it, and
    ValueError for whatever else went wrong there.
    """
    asked = {
        "setup": dataclasses.asdict(setup), "method": spec.label, "length": length, "threads": torch.get_num_threads(),
    }  # fmt: skip
    # the folder that it starts in may hold a package called `kernels`, which transformers looks for
    code = "import sys; sys.path[:] = filter(None, sys.path); from sparseprefill.evals import first_token as bench; "
    done = subprocess.run(
        [sys.executable, "-c", code + "print(bench.answer(sys.argv[1]))", json.dumps(asked)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False,
    )  # fmt: skip
    if done.returncode < 0:
        raise MemoryError(f"the process that measured {spec.label} at {length} tokens was killed")
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise ValueError(f"memory of {spec.label} at {length} tokens could not be measured: {said[0][:400]}")
    answer = json.loads(lines[-1])
    if answer["out_of_memory"]:
        raise MemoryError(f"{spec.label} ran out of memory at {length} tokens")
    return None if answer["bytes"] is None else int(answer["bytes"])


def answer(asked: str) -> str:
    """What `own_process_peak` is told: JSON for JSON."""
    told = json.loads(asked)
    torch.set_num_threads(told["threads"])
    model, _ = ModelSetup(**told["setup"]).made()
    try:
        held = prefill_peak(model, MethodSpec.parse(told["method"]), told["length"])
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return json.dumps({"out_of_memory": True})
    return json.dumps({"out_of_memory": False, "bytes": held})


def prefill_peak(model: Any, spec: MethodSpec, length: int, seed: int = 0) -> int | None:
    """Bytes at the peak of one prefill, beside what was there after a short one; None where the system cannot say."""
    bench = _Bench(model)
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, text_config(model).vocab_size, (1, length), generator=draw).to(model.device)
    with spec.applied(model, min_length=0, observe=False):
        bench.prefill(model, ids[:, :_WARM])  # weights are read from the disk, buffers are made
        if not reset_peak_memory(model.device):
            return None
        before = peak_memory(model.device)
        bench.prefill(model, ids)
        after = peak_memory(model.device)
    return None if before is None or after is None else after - before


def resolved_setup(setup: ModelSetup) -> ModelSetup:
    """The same where a process of its own finds it: the folder of the model inside by its whole path."""
    return setup if setup.shape is not None else dataclasses.replace(setup, model=model_folder(setup.model))


def first_token_table(
    cells: Sequence[FirstTokenCell], *, first: bool = True, markdown: bool = False
) -> str:  # fmt: skip
    """One line a method and length; `first` with what the first call took."""
    cut = any(cell.extrapolated for cell in cells)
    head = ["length", "method", "density", "TTFT s", "speed-up", *(["first call s"] if first else []), "peak MiB"]
    if cut:
        head[3:4] = ["layers that ran", "these s", "whole model s"]
    rows = []
    for cell in cells:
        mark = " (extrapolated)" if cell.extrapolated else ""
        times = [number(cell.seconds)]
        if cut:
            times = [f"{cell.layers} of {cell.whole_layers}", *times, number(cell.whole_seconds) + mark]
        rows.append([
            str(cell.length), cell.method, number(cell.density), *times,
            "-" if cell.speed_up is None else f"{cell.speed_up:.2f}x", *([number(cell.first_seconds)] if first else []),
            "-" if cell.peak_bytes is None else f"{cell.peak_bytes / 2**20:.0f}",
        ])  # fmt: skip
    text = table(head, rows, markdown=markdown)
    if cut:
        text += "\nextrapolated: layers that did not run take as long as one that did; peaks are of those that ran"
    return text


def seconds_of(model: Any, offload_cache: bool = False) -> Callable[[Any, Tensor], float]:
    """What `prefill_parts` times: one prefill up to the first token, logits of the last token alone."""
    return _Bench(model, offload_cache=offload_cache).prefill
