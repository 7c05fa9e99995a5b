"""Whether a patched model is ever slower than the stock one, length by length, and where it begins to be faster.

The stock model and a twin that shares its weights, patched as a user would patch it, take the same prompt in turn; the
order inside a pair alternates, so that what drifts favours neither. The slowdown is the median of the paired
differences: one call that waited for another process moves a mean, and not this. Its bounds, 95 % each, are the
percentile bootstrap's over the pairs, from a seed, as times have long tails that no normal law describes.

A length fails where a slowdown that matters is sure: where the lower bound is above the larger of 3 % of dense and 30
microseconds a layer, which is what the choice itself may take.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparseprefill.evals.methods import MethodSpec
from sparseprefill.huggingface import Patch, patch_model
from sparseprefill.huggingface_layers import PatchedLayer
from sparseprefill.huggingface_masks import NAME, mask_of_layer, masks_of
from sparseprefill.huggingface_modules import (
    STATE,
    attention_modules,
    implementations_of,
    layer_shapes,
    tensor_parallel,
    text_config,
)
from sparseprefill.reports import number, table

LENGTHS = (128, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768)
"""Tokens of the prompts, unless they are given."""
SHARE, SECONDS = 0.03, 30e-6
"""A slowdown is allowed up to this share of dense, or so many seconds a layer, whichever is more."""
_SHORT, _PAIRS, _LONG_PAIRS = 2048, 30, 7  # prompts up to this length get at least so many pairs, others the last
_DRAWS = 2000  # of the bootstrap
_WARM = 20  # calls that are left out


@dataclass(frozen=True, slots=True)
class Slowdown:
    """One method, dtype and length; seconds are medians of whole prefills up to the first token."""

    method: str  # its label, "default" where none was named
    dtype: str  # of the model
    length: int  # tokens
    pairs: int  # timed pairs
    layers: int  # of the patch
    dense: float  # seconds of the stock model
    patched: float  # seconds of the patched one
    difference: float  # seconds, median of patched - dense in pairs
    low: float  # seconds, lower 95 % bound
    high: float  # seconds, upper 95 % bound
    sparse_calls: int  # layers that ran sparsely, of a prefill
    reasons: dict[str, int]  # why the others did not, by reason, of a prefill
    decision: str  # what decided, in words

    @property
    def allowed(self) -> float:
        """Seconds that the lower bound may reach."""
        return max(SHARE * self.dense, SECONDS * self.layers)

    @property
    def passes(self) -> bool:
        """Whether no slowdown beyond `allowed` is sure."""
        return self.low <= self.allowed


@dataclass(frozen=True, slots=True)
class Crossing:
    """Where a method begins to run sparsely, by the lengths that were timed."""

    method: str
    dtype: str
    stays: int | None  # the longest below `runs`, at which some or all of them ran dense; None where there is none
    runs: int | None  # the shortest from which on every layer that can ran sparsely, None where none did


@dataclass(frozen=True, slots=True)
class PassThrough:
    """What the patch itself takes in a call that stays dense."""

    dtype: str
    layer: float  # seconds a layer, median of interleaved calls
    stock: float  # seconds of the stock call of that layer


def never_slower(
    model: PreTrainedModel,
    methods: Sequence[MethodSpec | None] = (None,),
    *,
    lengths: Sequence[int] = LENGTHS,
    pairs: int | None = None,
    seed: int = 0,
    progress: Callable[[int], Any] = lambda steps: None,
    **settings: Any,
) -> list[Slowdown]:
    """Time pairs of prefills of a stock model and its patched twin.

    Args:
        model: unpatched; it is not changed.
        methods: what to patch with; None: as `patch_model(model)` does.
        lengths: tokens of the prompts.
        pairs: timed pairs a length; None: 30 up to 2048 tokens, 7 above. Longer ones wander less.
        seed: of the prompts and of the bootstrap.
        progress: called with the number of lengths done.
        settings: further arguments of `patch_model`, such as `calibration`.

    Raises ValueError for no lengths or fewer than two pairs, and what `patch_model` raises.
    """
    if not lengths:
        raise ValueError("name at least one length")
    if pairs is not None and pairs < 2:
        raise ValueError(f"bounds need at least 2 pairs, got {pairs}")
    found = []
    for spec in methods:
        with patched_twin(model, spec, **settings) as patch:
            for length in sorted(set(lengths)):
                wanted = pairs or (_PAIRS if length <= _SHORT else _LONG_PAIRS)
                found.append(_timed(model, patch, spec, length, wanted, seed))
                progress(1)
    return found


@contextlib.contextmanager
def patched_twin(model: PreTrainedModel, spec: MethodSpec | None, **settings: Any) -> Iterator[Patch]:
    """A patch on a second model of the same weights: neither has to be patched anew between calls, and no cache of the
    one is that of the other. Buffers and parameters are shared, modules are not.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    name, options = (None, {}) if spec is None else (spec.name, spec.options)
    with patch_model(twin, name, **{**settings, **options}) as patch:
        yield patch


def _timed(
    model: PreTrainedModel, patch: Patch, spec: MethodSpec | None, length: int, pairs: int, seed: int
) -> Slowdown:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, model.config.get_text_config().vocab_size, (1, length), generator=draw).to(model.device)
    for each in (model, patch.model):
        prefill_seconds(each, ids)  # compiles, asks for memory, decides
    patch.reset()
    prefill_seconds(patch.model, ids)
    report = patch.report()
    reasons: dict[str, int] = {}
    for layer in report.layers:
        for reason, calls in layer.previous_calls.items():
            reasons[reason] = reasons.get(reason, 0) + calls
    times = []
    gc.collect()
    for turn in range(pairs):
        order = (model, patch.model) if turn % 2 else (patch.model, model)
        first, second = (prefill_seconds(each, ids) for each in order)
        times.append((first, second) if turn % 2 else (second, first))
    differences = [patched - dense for dense, patched in times]
    low, high = median_bounds(differences, seed)
    return Slowdown(
        spec.label if spec else "default", str(model.dtype).removeprefix("torch."), length, pairs, len(report.layers),
        statistics.median(dense for dense, _ in times), statistics.median(patched for _, patched in times),
        statistics.median(differences), low, high, report.sparse_calls, reasons, report.decision,
    )  # fmt: skip


@torch.no_grad()
def prefill_seconds(model: PreTrainedModel, ids: Tensor) -> float:
    """Seconds from a prompt to its first token."""
    _finish(model)
    began = time.perf_counter()
    model(input_ids=ids, use_cache=True, logits_to_keep=1).logits.argmax(-1).tolist()
    return time.perf_counter() - began


def _finish(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def median_bounds(values: Sequence[float], seed: int) -> tuple[float, float]:
    """The lower and the upper 95 % bound of a median, each by itself, of the percentile bootstrap from a seed."""
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(_DRAWS))
    cut = _DRAWS // 20
    return medians[cut], medians[-1 - cut]


def crossings(found: Sequence[Slowdown]) -> list[Crossing]:
    """For each method and dtype, between which of its lengths it begins to run sparsely."""
    groups: dict[tuple[str, str], list[Slowdown]] = {}
    for each in found:
        groups.setdefault((each.method, each.dtype), []).append(each)
    made = []
    for (method, dtype), own in groups.items():
        own = sorted(own, key=lambda each: each.length)
        most = max(each.sparse_calls for each in own)
        from_here = len(own)
        while from_here and most and own[from_here - 1].sparse_calls == most:
            from_here -= 1
        runs = own[from_here].length if from_here < len(own) else None
        made.append(Crossing(method, dtype, own[from_here - 1].length if runs and from_here else None, runs))
    return made


@torch.no_grad()
def pass_through(model: PreTrainedModel, *, calls: int = 300, **settings: Any) -> PassThrough:
    """What `patch_model(model)` adds to the attention call of a layer that stays dense: the choice, the counting, and
    the way back to the previous implementation. Both calls, of two blocks of queries, are made of that layer alone.

    Raises what `patch_model` raises, and NotImplementedError where no layer stays dense.
    """
    config = text_config(model)
    shapes = layer_shapes(attention_modules(model, config), config, tensor_parallel(model))
    with patched_twin(model, None, **settings) as patch:
        module = next(each for each in patch.model.modules() if hasattr(each, STATE))
        layer: PatchedLayer = getattr(module, STATE)
        shape, tokens = shapes[layer.number], 2 * layer.settings.block_q
        mask = mask_of_layer(masks_of(model, tokens), config, layer.number)
        if layer.choice(tokens, tokens, mask, model.device, model.dtype) is None:
            raise NotImplementedError(f"{tokens} tokens run sparsely here, so that no call stays dense")
        query, key, value = (
            torch.randn(1, heads, tokens, dim, device=model.device, dtype=model.dtype)
            for heads, dim in (
                (shape.query_heads, shape.head_dim),
                (shape.kv_heads, shape.head_dim),
                (shape.kv_heads, shape.value_dim),
            )
        )  # fmt: skip
        interface, eager = implementations_of(module)
        previous = eager if layer.previous == "eager" else interface[layer.previous]
        plain, scaling = mask.previous_mask(layer.previous), shape.head_dim**-0.5
        times: dict[str, list[float]] = {"patched": [], "stock": []}
        order = [("patched", interface[NAME], mask), ("stock", previous, plain)]
        for turn in range(calls + _WARM):
            for name, function, given in order if turn % 2 else order[::-1]:
                _finish(model)
                began = time.perf_counter()
                function(module, query, key, value, given, scaling=scaling, dropout=0.0)
                _finish(model)
                if turn >= _WARM:
                    times[name].append(time.perf_counter() - began)
    extra = statistics.median(own - other for own, other in zip(times["patched"], times["stock"], strict=True))
    return PassThrough(str(model.dtype).removeprefix("torch."), extra, statistics.median(times["stock"]))


def never_slower_table(found: Sequence[Slowdown], *, markdown: bool = False) -> str:
    """One line a method, dtype and length, then what decided and where sparse begins to run."""
    head = [
        "method", "dtype", "length", "dense ms", "patched ms", "slowdown", "95 % bounds", "allowed", "verdict",
        "sparse layers",
    ]  # fmt: skip
    rows = [
        [
            each.method, each.dtype, str(each.length), number(1e3 * each.dense), number(1e3 * each.patched),
            _percent(each.difference, each.dense),
            f"{_percent(each.low, each.dense)} to {_percent(each.high, each.dense)}",
            _percent(each.allowed, each.dense), "pass" if each.passes else "SLOWER",
            f"{each.sparse_calls}/{each.layers}",
        ]
        for each in found
    ]  # fmt: skip
    lines = [table(head, rows, markdown=markdown), ""]
    for (method, dtype), decision in {(each.method, each.dtype): each.decision for each in found}.items():
        lines.append(f"{method}, {dtype}: {decision}")
    for each in crossings(found):
        begins = "no length ran sparsely" if each.runs is None else f"sparse from {each.runs} tokens on"
        stays = "" if each.stays is None else f", dense up to {each.stays}"
        lines.append(f"{each.method}, {each.dtype}: {begins}{stays}")
    return "\n".join(lines)


def pass_through_report(found: PassThrough) -> str:
    """In words."""
    return (
        f"{found.dtype}: a call that stays dense takes {1e6 * found.layer:.0f} microseconds a layer more than without "
        f"the patch ({1e6 * found.stock:.0f})"
    )


def _percent(seconds: float, dense: float) -> str:
    return f"{100 * seconds / dense:+.1f}%"
