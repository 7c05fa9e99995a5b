"""What a patched attention module does and has done: the state that the seam hangs on it."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseprefill.calibration import Calibration, CalibrationEntry, load_calibration
from sparseprefill.guard import Guard, GuardLog
from sparseprefill.huggingface_masks import MaskInfo
from sparseprefill.huggingface_modules import LayerShape, kernel_for
from sparseprefill.kernels import IMPLEMENTATIONS
from sparseprefill.patterns import Dense, Pattern
from sparseprefill.patterns.expected_density import expected_density
from sparseprefill.patterns.expected_overhead import Overhead, expected_overhead
from sparseprefill.prefill import CostModel, Prefill, check_guarded, describe_pattern, stated_cost
from sparseprefill.reports import LayerReport, ranges

COUNTING = threading.Lock()  # a model may be called from several threads at once
_MOST_CHOICES = 1024  # that a layer remembers; a serving process meets prompts of any length


@dataclass(frozen=True, slots=True)
class Settings:
    """How a patched model computes; the keyword arguments of `patch_model` that are not the method's own."""

    block_q: int = 64
    block_k: int = 64
    impl: str = "auto"
    min_length: int | None = None
    observe: bool = True
    sample_rows: int = 16
    min_mass: float | None = None

    @property
    def guard(self) -> Guard | None:
        """What watches over the kept mass, if anything does."""
        return None if self.min_mass is None else Guard(self.min_mass)

    def calibration(self, path: str | Path | None) -> Calibration | None:
        """What `patch_model(calibration=path)` goes by; None where the default file has nothing to decide."""
        return None if path is None and self.min_length is not None else load_calibration(path)

    def __post_init__(self) -> None:
        _ = self.guard  # refuses a bad floor
        for name, least in (("block_q", 1), ("block_k", 1), ("min_length", 0), ("sample_rows", 0)):
            value = getattr(self, name)
            if name == "min_length" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be a whole number of tokens, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not isinstance(self.observe, bool):
            raise TypeError(f"observe must be True or False, got {self.observe!r}")
        if self.impl not in ("auto", *IMPLEMENTATIONS):
            raise ValueError(f"unknown implementation {self.impl!r}: choose auto, {', '.join(IMPLEMENTATIONS)}")


@dataclass(frozen=True, slots=True)
class LayerCost:
    """What a calibration says of one layer, where and in what it was asked about."""

    device: torch.device
    dtype: torch.dtype
    entry: CalibrationEntry | None
    missing: str  # why there is no entry, or ""
    kernel: str | None = None  # the implementation that serves the layer there


@dataclass(eq=False)
class PatchedLayer:
    """What one attention module does, and what it has done."""

    number: int
    pattern: Pattern
    always_dense: bool
    settings: Settings
    previous: str
    method: str
    head_dim: int
    registered: bool = False  # made by `register`, not by a patch
    local: str | None = None  # the mask's own window or chunks, in which the layer runs exactly
    first_head: int = 0  # of the heads in this process
    skips: bool = False  # the pattern's lists let the kernel skip tiles
    cost: LayerCost | None = None  # None where no calibration was read
    decided: tuple[torch.device, torch.dtype] | None = None  # the last call that could have run sparsely
    key: int = field(default_factory=itertools.count().__next__)  # in LAYERS
    sparse_calls: int = 0
    previous_calls: dict[str, int] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    timings: list[tuple[Any, ...]] = field(default_factory=list)  # CUDA events, not yet summed
    sums: dict[str, Any] = field(default_factory=dict)
    guard: GuardLog = field(default_factory=GuardLog)
    nan: Tensor | None = None  # bool [] on the device: a query or key was NaN
    copied: bool = False  # belongs to a copy of a patched model
    context: Any = None  # what attends instead, where the model is patched for a fixed context: has `attend`
    choices: dict[tuple[Any, ...], str | None] = field(default_factory=dict)  # of `choice`, by what it depends on

    def __post_init__(self) -> None:
        check_guarded(self.pattern, None if self.always_dense else self.settings.guard)
        LAYERS[self.key] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> PatchedLayer:
        twin = PatchedLayer(
            self.number, self.pattern, self.always_dense, self.settings, self.previous, self.method,
            self.head_dim, registered=self.registered, first_head=self.first_head, cost=self.cost, skips=self.skips,
            copied=not self.registered,
        )  # fmt: skip
        memo[id(self)] = twin
        return twin

    def decision(self, device: torch.device, dtype: torch.dtype) -> tuple[CostModel, str]:
        """What chooses between sparse and dense for calls there, and in words."""
        here = self._cost_at(device, dtype)
        if self.context is not None:
            return stated_cost(device.type, None), "every call attends to the context it was patched for"
        stated = stated_cost(device.type, None if here is None else here.kernel)
        if self.settings.min_length is not None:
            return stated, f"sparse from {self.settings.min_length} keys on (min_length)"
        if self.cost is None:
            why = "no calibration was looked for"
        elif (self.cost.device, self.cost.dtype) != (device, dtype):
            asked = self.cost
            why = f"the model was patched for {asked.dtype} on {asked.device}, and runs in {dtype} on {device}"
            why = why.replace("torch.", "")
        elif self.cost.entry is not None:
            return self.cost.entry.cost, self.cost.entry.describe()
        else:
            why = self.cost.missing
        return stated, f"uncalibrated cost model: {stated.describe()} ({why})"

    def overhead(self, device: torch.device, dtype: torch.dtype) -> Overhead:
        """What finding the blocks is reckoned to take there: measured where the calibration knows the estimator."""
        cost = self._cost_at(device, dtype)
        return expected_overhead(
            self.pattern, device, self.head_dim, self.settings.block_q, self.settings.block_k,
            None if cost is None or cost.entry is None else cost.entry.overheads,
        )  # fmt: skip

    def _cost_at(self, device: torch.device, dtype: torch.dtype) -> LayerCost | None:
        """What was looked up, where it was looked up for this."""
        cost = self.cost
        return cost if cost is not None and (cost.device, cost.dtype) == (device, dtype) else None

    def choice(self, queries: int, keys: int, mask: MaskInfo, device: torch.device, dtype: torch.dtype) -> str | None:
        """`why_dense`, remembered: it is asked for each layer of each call, most of which are of one length."""
        asked = (self.always_dense, queries, keys, mask.window, mask.chunk, device, dtype)
        try:
            return self.choices[asked]
        except KeyError:
            if len(self.choices) >= _MOST_CHOICES:
                self.choices.clear()
            reason = self.choices[asked] = self.why_dense(queries, keys, mask, device, dtype)
            return reason

    def pattern_under(self, mask: MaskInfo) -> Pattern:
        """Selection is for layers that see everything; a local layer keeps its whole window or chunk."""
        self.local = None if mask.local is None else "in its chunks" if mask.chunk else "in its sliding window"
        return self.pattern if self.local is None else Dense()

    def why_dense(
        self, queries: int, keys: int, mask: MaskInfo, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        """Why this call is better left to the dense kernel, or None."""
        if self.always_dense:
            return "dense layer"
        if self.settings.min_length is not None:
            below = keys < self.settings.min_length
            return f"fewer keys than min_length={self.settings.min_length}" if below else None
        cost = self.decision(device, dtype)[0]
        if mask.local is not None:
            return None if cost.sparse_is_cheaper(queries, keys, mask.density(keys)) else "below break-even"
        density, overhead = expected_density(self.pattern, keys), self.overhead(device, dtype)
        if cost.sparse_is_cheaper(queries, keys, density, overhead):
            return None
        left = 1 - cost.tile_factor * density  # of dense; what grows with it no length makes up for
        return "finding the blocks would cost more than it saves" if 0 < left <= overhead.share else "below break-even"

    def break_even(self, mask: MaskInfo, device: torch.device, dtype: torch.dtype, limit: int) -> int | None:
        """The shortest prompt, in one call, that runs sparsely; None where not even one of `limit` tokens does."""

        def sparse(tokens: int) -> bool:
            return tokens >= self.settings.block_q and self.why_dense(tokens, tokens, mask, device, dtype) is None

        if not sparse(limit):
            return None
        low, high = 0, limit
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if sparse(middle) else (middle, high)
        return high

    def note_previous(self, reason: str) -> None:
        with COUNTING:
            self.previous_calls[reason] = self.previous_calls.get(reason, 0) + 1

    def note(self, prefill: Prefill, impl: str) -> None:
        with COUNTING:
            self._note(prefill, impl)

    def _note(self, prefill: Prefill, impl: str) -> None:
        self.sparse_calls += 1
        self.kernels[impl] = self.kernels.get(impl, 0) + 1
        if prefill.guarded is not None:
            self.guard.note(prefill.guarded)
        if prefill.index.unjudged is not None:
            self.sums["unjudged"] = self.sums.get("unjudged", 0) + prefill.index.unjudged.sum()
        counted = prefill.coverage
        if counted is None:
            return
        add = {
            "kept": counted.kept, "visible": counted.visible, "tiles": counted.tiles,
            "dense_tiles": counted.dense_tiles, "skipped": counted.skipped, "mass": prefill.sampled_mass,
        }  # fmt: skip
        for name, value in add.items():
            if value is not None:  # on the device; nothing is read here
                self.sums[name] = self.sums[name] + value if name in self.sums else value
        if prefill.seconds is not None:
            self._spent(*prefill.seconds)
        if prefill.events is not None:
            self.timings.append(prefill.events)
            if len(self.timings) > 256:  # these ended long ago
                self._read_timing(self.timings.pop(0))

    def note_context(self, counted: Mapping[str, Tensor] | None, mass: Tensor | None, seconds: float) -> None:
        """A call that attended to a fixed context; `counted` are pairs, None where a local layer ran exactly."""
        with COUNTING:
            self.sparse_calls += 1
            self.kernels["context"] = self.kernels.get("context", 0) + 1
            for name, value in {**(counted or {}), "mass": mass}.items():
                if value is not None:
                    self.sums[name] = self.sums[name] + value if name in self.sums else value
            self._spent(0.0, seconds)

    def _spent(self, estimator: float, kernel: float) -> None:
        self.sums["estimator"] = self.sums.get("estimator", 0.0) + estimator
        self.sums["kernel"] = self.sums.get("kernel", 0.0) + kernel

    def _read_timing(self, events: tuple[Any, ...]) -> None:
        before, between, after = events
        after.synchronize()
        self._spent(before.elapsed_time(between) / 1e3, between.elapsed_time(after) / 1e3)

    def report(self) -> LayerReport:
        """The sums. The only place that reads observations back to the host."""
        with COUNTING:
            return self._report()

    def _report(self) -> LayerReport:
        while self.timings:
            self._read_timing(self.timings.pop())
        sums = self.sums
        density = tile_work = mass = share = None
        if "context_kept" in sums:
            density = (sums["kept"].double() / sums["visible"]).tolist()
            share = (sums["context_kept"].double() / sums["context_visible"]).tolist()
        elif "kept" in sums:
            computed = sums["kept"].double() - sums["skipped"].double() / 2
            density = (computed / sums["visible"]).tolist()
            tile_work = (sums["tiles"].double() / sums["dense_tiles"]).tolist()
        if "mass" in sums:
            mass = (sums["mass"][:, 0] / sums["mass"][:, 1]).tolist()
        return LayerReport(
            self.number, self._described(), self.sparse_calls,
            dict(self.previous_calls), dict(self.kernels), density, tile_work, mass,
            sums.get("estimator", 0.0), sums.get("kernel", 0.0), *self.guard.read(), self.first_head,
            self._overhead(tile_work), int(sums.get("unjudged", 0)), share,
        )  # fmt: skip

    def _overhead(self, tile_work: list[float] | None) -> float | None:
        """Estimator time over that of dense attention, as the cost model reckons it from the kernel's."""
        kernel = self.sums.get("kernel", 0.0)
        if tile_work is None or self.decided is None or not kernel:
            return None
        cost = self.decision(*self.decided)[0]
        dense = kernel / (cost.tile_factor * sum(tile_work) / len(tile_work))
        return float(self.sums["estimator"] / dense)

    def _described(self) -> str:
        if self.context is not None and self.local is None:
            return describe_pattern(self.context.method)
        if self.always_dense:
            return "dense"
        return describe_pattern(self.pattern) if self.local is None else f"Dense() {self.local}"


LAYERS: weakref.WeakValueDictionary[int, PatchedLayer] = weakref.WeakValueDictionary()  # by key, for compiled graphs


def calibrate_layers(
    known: Calibration, layers: Mapping[int, PatchedLayer], shapes: Mapping[int, LayerShape],
    places: Mapping[int, torch.device | None], dtype: torch.dtype,
) -> None:  # fmt: skip
    """Look each layer up, by number; one whose device is None has no weights yet, and is not looked up."""
    found: dict[tuple[LayerShape, torch.device, bool], LayerCost] = {}  # layers of one shape are asked for once
    for number, layer in layers.items():
        shape, device = shapes[number], places[number]
        if device is None:
            continue
        asked = shape, device, layer.skips
        if asked not in found:
            found[asked] = layer_cost(known, layer.settings, shape, device, dtype, skips=layer.skips)
        layer.cost = found[asked]


def layer_cost(
    known: Calibration, settings: Settings, shape: LayerShape, device: torch.device, dtype: torch.dtype,
    *, skips: bool = False,
) -> LayerCost:  # fmt: skip
    """What a calibration says of a layer of this shape, `skips` as for `kernel_for`. Reads no file."""
    blocks = {"block_q": settings.block_q, "block_k": settings.block_k}
    kernel, _ = kernel_for(shape, device, dtype, settings.impl, **blocks, skips=skips)
    if kernel is None:
        return LayerCost(device, dtype, None, "no kernel serves this layer")
    key = known.key(device, dtype, kernel, **dataclasses.asdict(shape), **blocks)
    return LayerCost(device, dtype, *known.lookup(key), kernel)


def decision_of(layers: Iterable[tuple[PatchedLayer, torch.device, torch.dtype]]) -> str:
    """What chooses between sparse and dense, in words; by layer where layers differ. Dense layers have no choice."""
    said: dict[str, list[int]] = {}
    for layer, device, dtype in layers:
        if not layer.always_dense:
            said.setdefault(layer.decision(device, dtype)[1], []).append(layer.number)
    if not said:
        return "every layer stays dense"
    if len(said) == 1:
        return next(iter(said))
    return "; ".join(f"layer{'s' * (len(numbers) > 1)} {ranges(numbers)}: {words}" for words, numbers in said.items())
