"""Where a pattern meets a kernel: the table of methods, the choice between sparse and dense, and one attention call."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, AttentionOutput, BlockGrid, BlockIndex
from sparseprefill.coverage import Coverage
from sparseprefill.guard import Guard, GuardedCall, guarded
from sparseprefill.kernels.row_lse import row_lse
from sparseprefill.patterns import LastRowsDense, Pattern, PerHead
from sparseprefill.patterns.context_methods import CONTEXT_METHODS, ContextRow
from sparseprefill.patterns.expected_overhead import NOTHING, Overhead
from sparseprefill.patterns.methods import DEFAULT, DEFAULT_OPTIONS, METHODS, MethodRow
from sparseprefill.patterns.names import nearest_name
from sparseprefill.patterns.parts import Part, attended, estimates, parts_coverage, parts_of, without_heads
from sparseprefill.patterns.store import INSIDE, SALE_INSIDE, ModelPatterns, load_patterns
from sparseprefill.patterns.wrapping import keeps_everything as keeps_everything


def resolve_method(
    method: str | Pattern | ModelPatterns, *, last_rows_dense: int = 0, **options: Any
) -> Pattern | ModelPatterns:
    """A method by name with its options, or an object of the user's own that has the verb `build_index`.

    `last_rows_dense`: that many last queries of each call attend densely, whatever the method.
    Raises ValueError for an unknown name or option (with the nearest known one), TypeError for other objects.
    """
    pattern: Any
    if isinstance(method, str):
        pattern = _by_name(method, options)
    elif any(callable(getattr(method, verb, None)) for verb in ("build_index", "build_parts")) or isinstance(
        method, ModelPatterns
    ):
        if options:
            raise ValueError(f"options go with a method's name; {type(method).__name__} got {', '.join(options)}")
        pattern = method
    else:
        raise TypeError(
            f"a method is a name ({', '.join(METHODS)}) or an object with build_index(inputs, grid), "
            f"got {type(method).__name__}"
        )
    if last_rows_dense and isinstance(pattern, ModelPatterns):
        return pattern.map(lambda each: LastRowsDense(each, last_rows_dense))
    return LastRowsDense(pattern, last_rows_dense) if last_rows_dense else pattern


def named_method(method: Any, profile: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The method that is meant and its options, where `method` may be None: a profile's, or else the default one."""
    if method is not None:
        return method, options
    if profile is not None:
        return "minference", options
    return DEFAULT, options or dict(DEFAULT_OPTIONS)


def _by_name(method: str, options: dict[str, Any]) -> Pattern | ModelPatterns:
    if method in CONTEXT_METHODS:
        raise ValueError(
            f"method {method!r} serves a fixed context: prepare one with prepare_context(model, input_ids, "
            f"method={method!r}), and give it as context="
        )
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}.{nearest_name(method, METHODS)} Methods: {', '.join(METHODS)}")
    row = METHODS[method]
    others = {name: value for name, value in options.items() if name not in row.options}
    if row.wraps:  # what is not its own belongs to the method that it goes around
        own = {name: value for name, value in options.items() if name not in others and name != "inner"}
        around = options.get("inner", row.inner)
        served = options_of(method, around)
        for name in others:
            if name not in served and isinstance(around, str) and around in METHODS:
                raise ValueError(
                    f"neither {method!r} nor {around!r:.80}, around which it goes, has an option {name!r}."
                    f"{nearest_name(name, served)} Their options: {', '.join(served)}"
                )
        inner = resolve_method(around, **(row.around(others) if around == row.inner else others))
        if isinstance(inner, ModelPatterns):
            raise ValueError(f"{method} goes around one method, and a profile is a pattern for each head: name another")
        return row.build(inner=inner, **own)
    for name in others:
        known = ", ".join(row.options) or "none"
        raise ValueError(
            f"method {method!r} has no option {name!r}.{nearest_name(name, row.options)} Its options: {known}"
        )
    if options.get("profile") is not None:
        return _from_profile(method, row, options)
    return row.build(**{name: value for name, value in options.items() if name != "profile"})


def options_of(method: Any, inner: Any = None) -> tuple[str, ...]:
    """Names of the options that go with a method's name; for a wrapper also those of what it goes around.

    `inner`: that method, None for the usual one. Objects and unknown names have no options.
    """
    row = METHODS.get(method) if isinstance(method, str) else None
    if row is None:
        return ()
    around = options_of(row.inner if inner is None else inner) if row.wraps else ()
    return tuple(dict.fromkeys((*row.options, *around)))


def _from_profile(method: str, row: MethodRow, options: dict[str, Any]) -> ModelPatterns:
    others = [name for name in options if name != "profile"]
    if others:
        raise ValueError(f"{method} takes a profile, or else {', '.join(others)}: a profile brings its own")
    path = options["profile"]
    found = load_patterns(SALE_INSIDE if method == "sale" and str(path) == INSIDE else path)
    if row.profile:
        strangers = {type(own).__name__ for heads in found.layers for own in heads if not isinstance(own, row.profile)}
        if strangers:
            raise ValueError(
                f"the profile {path} gives heads {', '.join(sorted(strangers))}, and method {method!r} takes one of "
                f"{' and '.join(each.__name__ for each in row.profile)} alone: use it with method 'minference'"
            )
    return found


@dataclass(frozen=True, slots=True)
class CostModel:
    """When sparse is expected to be cheaper: stated in `COST_MODELS`, measured where a machine has been calibrated.

    A sparse call costs, in (query, key) pairs of dense attention, tile_factor * density * dense for its kernel, the
    pairs of a dense causal prefill of `fixed_tokens` at any density, and what finding the blocks takes (`Overhead`).
    """

    tile_factor: float  # time of a computed tile over that of a tile of dense attention
    fixed_tokens: int  # what a sparse call costs at any density, as the length of a dense causal prefill

    def sparse_is_cheaper(self, queries: int, keys: int, density: float, overhead: Overhead | float = NOTHING) -> bool:
        """For `queries` that are the last of `keys`, at an expected density and overhead; a number is a share alone."""
        found = overhead if isinstance(overhead, Overhead) else Overhead(share=overhead)
        dense = queries * (keys - queries) + queries * (queries + 1) / 2
        return dense * (1 - self.tile_factor * density) - found.pairs(dense, keys) > self.fixed_tokens**2 / 2

    def break_even(self, density: float, overhead: Overhead = NOTHING) -> int | None:
        """The shortest prefill, in one call, that is cheaper sparsely at this density; None where none ever is."""
        gain = 1 - self.tile_factor * density - overhead.share
        if gain <= 0:
            return None
        fixed = self.fixed_tokens**2 + overhead.fixed_tokens**2
        linear = overhead.per_key - gain / 2  # there are n (n + 1) / 2 pairs
        tokens = max(1, int((linear + math.sqrt(linear**2 + gain * fixed)) / gain) - 1)
        while not self.sparse_is_cheaper(tokens, tokens, density, overhead):
            tokens += 1
        return tokens

    def describe(self) -> str:
        """In words."""
        return f"sparse costs {self.tile_factor:.3g} x density x dense + a dense prefill of {self.fixed_tokens} tokens"


COST_MODELS = {
    ("cpu", "native"): CostModel(1.4, 512),
    ("cpu", "cpu"): CostModel(3.0, 512),
    ("cuda", "triton"): CostModel(1.6, 4096),
}
"""By kind of device and implementation, where no calibration fits. Those of the CPU are what was measured once, rounded
towards caution; the GPU's is an assumption.
"""


def stated_cost(device: str, kernel: str | None) -> CostModel:
    """That of a kind of device; of a kernel that has none there, that of the device's last one."""
    general = ("cpu", "cpu") if device == "cpu" else ("cuda", "triton")
    return COST_MODELS.get((device, kernel or ""), COST_MODELS[general])


@dataclass(frozen=True, slots=True, eq=False)
class Prefill:
    """One attention call and what was seen of it; tensors stay on their device until someone reads them."""

    result: AttentionOutput  # output and lse
    parts: tuple[Part, ...]  # the blocks that were computed; one part, but for patterns that move keys
    coverage: Coverage | None  # None unless observed, as all that follows
    sampled_mass: Tensor | None  # float64 [query_heads, 2]: sum of kept mass over sampled rows, and their number
    seconds: tuple[float, float] | None  # estimator, kernel; on the CPU, None on a GPU
    events: tuple[torch.cuda.Event, ...] | None  # before, between, after; on a GPU, None on the CPU
    guarded: GuardedCall | None = None  # None without a guard, and where the pattern computes everything

    @property
    def index(self) -> BlockIndex:
        """The blocks of the keys as they lie."""
        return self.parts[0].index


def sparse_prefill(
    inputs: AttentionInputs,
    pattern: Pattern,
    *,
    block_q: int = 64,
    block_k: int = 64,
    impl: str = "auto",
    observe: bool = False,
    sample_rows: int = 16,
    guard: Guard | None = None,
    draw: str = "",
) -> Prefill:
    """Build the index once and use it once; a `guard` runs heads that lost too much again, with full rows.

    Result, index and what is observed are those of what has run in the end.

    Args:
        inputs: see `AttentionInputs`.
        pattern: anything with `build_index(inputs, grid) -> BlockIndex`.
        block_q, block_k: tokens a tile.
        impl: see `block_sparse_attention`.
        observe: also count coverage, times and kept mass.
        sample_rows: evenly spaced queries on which the kept share of attention mass is measured; 0 for none. Of a
            pattern that estimates what it leaves out none is known.
        guard: what watches over the kept mass; None for nothing.
        draw: names this call to the guard's random draw.

    Raises:
        ValueError: what the pattern or `block_sparse_attention` refuses; a guard over a pattern that estimates.
        NotImplementedError: no kernel serves these inputs; the message says why.
    """
    on_gpu = inputs.device.type == "cuda"
    device = torch.cuda.device(inputs.device) if on_gpu else contextlib.nullcontext()  # events belong to a device
    with device, torch.autocast(inputs.device.type, enabled=False):  # scores and kept mass are float32 in any model
        return _prefill(inputs, pattern, block_q, block_k, impl, observe, sample_rows, guard, draw)


def _prefill(
    inputs: AttentionInputs,
    pattern: Pattern,
    block_q: int,
    block_k: int,
    impl: str,
    observe: bool,
    sample_rows: int,
    guard: Guard | None,
    draw: str,
) -> Prefill:
    check_guarded(pattern, guard)
    on_gpu = inputs.device.type == "cuda"
    events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(3)) if on_gpu and observe else None
    began = time.perf_counter()
    if events:
        events[0].record()
    parts = parts_of(pattern, inputs, BlockGrid.of(inputs, block_q, block_k))
    built = time.perf_counter()
    if events:
        events[1].record()
    result = attended(pattern, inputs, parts, impl)
    done = time.perf_counter()
    if events:
        events[2].record()
    call = None
    if guard is not None and not keeps_everything(pattern):
        index, call = guarded(inputs, parts[0].index, result, guard, draw=draw, impl=impl, timed=observe)
        others = (Part(part.inputs, without_heads(part.index, call.check.failed)) for part in parts[1:])
        parts = (Part(inputs, index), *others)
    if not observe:
        return Prefill(result, parts, None, None, None, None, call)
    mass = kept_mass_sample(inputs, result.lse, sample_rows) if sample_rows and not estimates(pattern) else None
    seconds = None if on_gpu else (built - began, done - built)
    return Prefill(result, parts, parts_coverage(parts, result.skipped), mass, seconds, events, call)


def check_guarded(pattern: Any, guard: Guard | None) -> None:
    """Raise ValueError where a guard would look at what is no kept mass."""
    if guard is not None and estimates(pattern):
        raise ValueError(
            f"{describe_pattern(pattern)} estimates what it leaves out, so that no mass is known to be kept, and "
            "nothing can be guarded: leave out min_mass, or choose a method that names blocks"
        )


def kept_mass_sample(inputs: AttentionInputs, lse: Tensor, rows: int) -> Tensor:
    """float64 [query_heads, 2]: the sum of exp(lse - dense lse) over evenly spaced queries, and how many there were.

    Queries that see no key are left out.
    """
    count = min(rows, inputs.queries)
    place = torch.linspace(0, inputs.queries - 1, count, device=inputs.device).round().to(torch.int64)
    dense = row_lse(inputs, place.expand(inputs.batch, -1))
    share = (lse[:, :, place].double() - dense.double()).exp()
    real = dense > -torch.inf
    if inputs.key_valid is not None:
        real = real & inputs.key_valid[:, inputs.query_start + place][:, None]
    share = torch.where(real, share, 0.0)
    return torch.stack([share.sum((0, 2)), real.double().sum((0, 2))], -1)


def describe_pattern(pattern: Any) -> str:
    """A short, stable text for reports."""
    if isinstance(pattern, PerHead):
        kinds = sorted({type(each).__name__ for each in pattern.patterns})
        return f"PerHead({', '.join(kinds)})"
    if dataclasses.is_dataclass(pattern) and not isinstance(pattern, type):
        shown = []
        for field in dataclasses.fields(pattern):
            value = getattr(pattern, field.name)
            if value is not None and field.repr:
                shown.append(f"{field.name}={describe_pattern(value) if dataclasses.is_dataclass(value) else value}")
        return f"{type(pattern).__name__}({', '.join(shown)})"
    return type(pattern).__name__


def methods_table() -> list[dict[str, str]]:
    """The rows of `sparseprefill methods`."""
    rows: dict[str, MethodRow | ContextRow] = {**METHODS, **CONTEXT_METHODS}
    return [
        {
            "method": name, "kind": row.kind, "what it keeps": row.summary, "options": ", ".join(row.options) or "-",
            "knob": row.knob or "-", "finding costs": row.cost,
            "looks ahead": "yes" if row.looks_ahead else "no", "chunked prefill": row.chunked,
            "paper": row.paper or "-", "page": method_page(name),
        }
        for name, row in rows.items()
    ]  # fmt: skip


def method_page(method: str) -> str:
    """Where a method is explained, from the top of the project."""
    return f"docs/methods/{method}.md"
