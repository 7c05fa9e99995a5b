"""Where a pattern meets a kernel: the table of methods, the choice between sparse and dense, and one attention call."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, AttentionOutput, BlockGrid, BlockIndex
from sparseprefill.coverage import Coverage, coverage
from sparseprefill.guard import Guard, GuardedCall, guarded
from sparseprefill.kernels import block_sparse_attention
from sparseprefill.kernels.row_lse import row_lse
from sparseprefill.patterns import (
    AShape,
    BlockSparse,
    Dense,
    LastRowsDense,
    Pattern,
    PerHead,
    RandomBlocks,
    Sale,
    TriShape,
    VerticalSlash,
)
from sparseprefill.patterns.sale import PUBLISHED as PUBLISHED_THRESHOLD
from sparseprefill.patterns.store import INSIDE, SALE_INSIDE, ModelPatterns, load_patterns
from sparseprefill.patterns.vertical_slash import BAND, PUBLISHED, SINK


def _minference(
    profile: str | Path | None = None, budget: str | None = None, density: float | None = None, probe: int = 64
) -> Pattern | ModelPatterns:
    """Per-head patterns from a profile, else vertical-slash for every head."""
    if profile is not None:
        if budget is not None or density is not None or probe != 64:
            raise ValueError("minference takes a profile, or else budget, density and probe: a profile brings its own")
        return load_patterns(profile)
    if budget is not None and density is not None:
        raise ValueError("minference takes either a budget or a density")
    if budget is None:
        return VerticalSlash(density=0.2 if density is None else density, probe=probe)
    if budget != "paper":
        raise ValueError(f"minference knows budget='paper' (1000 verticals, 6096 slashes), got {budget!r}")
    verticals, slashes = PUBLISHED
    return VerticalSlash(verticals=verticals, slashes=slashes, probe=probe)


def _vertical_slash(**options: Any) -> VerticalSlash:
    if not {"verticals", "slashes", "density"} & options.keys():
        options["density"] = 0.2
    return VerticalSlash(**options)


def _sale(profile: str | Path | None = None, **options: Any) -> Pattern | ModelPatterns:
    """Thresholds of each head from a profile, else one for all heads."""
    if profile is not None:
        if options:
            raise ValueError(f"sale takes a profile, or else {', '.join(options)}: a profile brings its own")
        found = load_patterns(SALE_INSIDE if str(profile) == INSIDE else profile)
        others = {type(each).__name__ for heads in found.layers for each in heads if not isinstance(each, Sale | Dense)}
        if others:
            raise ValueError(
                f"the profile {profile} gives heads {', '.join(sorted(others))}, and method 'sale' takes one of Sale "
                "and Dense alone: use it with method 'minference'"
            )
        return found
    if options.keys().isdisjoint(("threshold", "keep")):
        options["threshold"] = PUBLISHED_THRESHOLD
    return Sale(**options)


@dataclass(frozen=True, slots=True)
class MethodRow:
    """One line of the methods table."""

    make: Callable[..., Pattern | ModelPatterns]  # called with the options
    options: tuple[str, ...]  # their names
    kind: str  # selector: looks at this prompt; static: does not
    summary: str  # what it keeps
    paper: str  # where it was published, or ""
    looks_ahead: bool  # may the blocks of a row depend on later tokens?
    chunked: str  # "identical": the index of a chunk is that part of the one-shot index;
    # "own": it is the method applied to the chunk's own queries and all earlier keys


def _fields(cls: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls))


METHODS: dict[str, MethodRow] = {
    "dense": MethodRow(Dense, (), "static", "every block", "", False, "identical"),
    "a_shape": MethodRow(
        AShape, _fields(AShape), "static", "first tokens and a local window", "arXiv:2309.17453", False, "identical"
    ),
    "tri_shape": MethodRow(
        TriShape, _fields(TriShape), "static", "A-shape, last rows dense", "arXiv:2412.10319", True, "own"
    ),
    "vertical_slash": MethodRow(
        _vertical_slash, _fields(VerticalSlash), "selector", "key columns and distances the last queries attend to",
        "arXiv:2407.02490", True, "own",
    ),
    "block_sparse": MethodRow(
        BlockSparse, _fields(BlockSparse), "selector", "blocks whose mean key fits the mean query",
        "arXiv:2407.02490", False, "own",
    ),
    "random": MethodRow(
        RandomBlocks, _fields(RandomBlocks), "static", "random blocks, sink and window: the control", "", False,
        "identical",
    ),
    "minference": MethodRow(
        _minference, ("profile", "budget", "density", "probe"), "selector",
        "a pattern for each head from a profile, else vertical-slash", "arXiv:2407.02490", True, "own",
    ),
    "sale": MethodRow(
        _sale, ("profile", *_fields(Sale)), "selector", "blocks with a pair whose 4-bit estimate passes a threshold",
        "arXiv:2505.24179", True, "own",
    ),
}  # fmt: skip
"""The methods by name, in the order in which they are listed; an explicit table, nothing registers itself."""


def resolve_method(
    method: str | Pattern | ModelPatterns, *, last_rows_dense: int = 0, **options: Any
) -> Pattern | ModelPatterns:
    """A method by name with its options, or an object of the user's own that has the verb `build_index`.

    `last_rows_dense`: that many last queries of each call attend densely, whatever the method.
    Raises ValueError for an unknown name or option (with the nearest known one), TypeError for other objects.
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}.{_nearest(method, METHODS)} Methods: {', '.join(METHODS)}")
        row = METHODS[method]
        for name in options:
            if name not in row.options:
                known = ", ".join(row.options) or "none"
                raise ValueError(
                    f"method {method!r} has no option {name!r}.{_nearest(name, row.options)} Its options: {known}"
                )
        pattern = row.make(**options)
    elif callable(getattr(method, "build_index", None)) or isinstance(method, ModelPatterns):
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
    return LastRowsDense(pattern, last_rows_dense) if last_rows_dense else pattern  # type: ignore[arg-type]


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f" Did you mean {close[0]!r}?" if close else ""


@dataclass(frozen=True, slots=True)
class CostModel:
    """When sparse is expected to be cheaper: stated in `COST_MODELS`, measured where a machine has been calibrated.

    A sparse call costs (tile_factor * density + overhead) * dense + fixed: `dense` are the dense call's (query, key)
    pairs, `overhead` is what an estimator takes that looks at all of them (see `expected_overhead`), and `fixed` are
    the pairs of a dense causal prefill of `fixed_tokens`.
    """

    tile_factor: float  # time of a computed tile over that of a tile of dense attention
    fixed_tokens: int  # what a sparse call costs at any density, as the length of a dense causal prefill

    def sparse_is_cheaper(self, queries: int, keys: int, density: float, overhead: float = 0.0) -> bool:
        """For `queries` that are the last of `keys`, at an expected density and overhead."""
        dense = queries * (keys - queries) + queries * (queries + 1) / 2
        return dense * (1 - self.tile_factor * density - overhead) > self.fixed_tokens**2 / 2

    def break_even(self, density: float) -> int | None:
        """The shortest prefill, in one call, that is cheaper sparsely at this density; None where none ever is."""
        gain = 1 - self.tile_factor * density
        if gain <= 0:
            return None
        tokens = max(1, int(self.fixed_tokens / math.sqrt(gain)) - 1)  # n (n + 1) / 2 pairs, so this is just below
        while not self.sparse_is_cheaper(tokens, tokens, density):
            tokens += 1
        return tokens

    def describe(self) -> str:
        """In words."""
        return f"sparse costs {self.tile_factor:.3g} x density x dense + a dense prefill of {self.fixed_tokens} tokens"


COST_MODELS = {"cpu": CostModel(2.5, 512), "cuda": CostModel(1.6, 4096)}
"""By kind of device, where no calibration fits. The CPU's is what `sparseprefill bench` measured once, rounded towards
caution; the GPU's is an assumption.
"""


SALE_DENSITY = 0.5
"""What is reckoned with where a threshold decides what a prompt keeps, and no profile says what it came to."""


def expected_density(pattern: Any, keys: int) -> float:
    """What share of a one-shot prefill's pairs a pattern will keep, at most, before anything was looked at.

    What a pattern keeps in any case counts, in blocks of 64: in a short prompt that is more than its budget. A user's
    object may have `expected_density(keys) -> float`; one without is taken for 0.5.
    """
    if isinstance(pattern, PerHead):
        return math.fsum(expected_density(each, keys) for each in pattern.patterns) / len(pattern.patterns)
    if isinstance(pattern, LastRowsDense):
        return min(1.0, expected_density(pattern.pattern, keys) + 2 * pattern.rows / keys)
    match pattern:
        case Dense():
            return 1.0
        case AShape(sink, window):
            return _kept_share((sink if isinstance(window, int) else 0), window, keys)
        case TriShape(sink, window, last):
            return min(1.0, _kept_share((sink if isinstance(window, int) else 0), window, keys) + 2 * last / keys)
        case BlockSparse(keep=keep, sink=sink, local=local) | RandomBlocks(keep=keep, sink=sink, local=local):
            return max(_kept_share(0, keep, keys), _kept_share(0, _in_blocks(sink) + _in_blocks(local), keys))
        case VerticalSlash(verticals=verticals, slashes=slashes, density=density):
            forced = _kept_share(_in_blocks(SINK), _in_blocks(BAND) + 64, keys)  # a distance lies in two block slashes
            if density is not None:
                return max(density, forced)
            assert verticals is not None
            assert slashes is not None
            return max(_kept_share(verticals, slashes, keys), forced)
        case Sale(keep=keep, window=window, segment=segment, expected=expected):
            # whole segments are tested, and what is left of the last one is window
            forced = _kept_share(0, 64 + _in_blocks(window + segment), keys)
            return max((expected or SALE_DENSITY) if keep is None else _kept_share(0, keep, keys), forced)
    own = getattr(pattern, "expected_density", None)
    return float(own(keys)) if callable(own) else 0.5


def expected_overhead(pattern: Any, device: torch.device, head_dim: int, block_q: int, block_k: int) -> float:
    """Time of finding the blocks over that of dense attention, where it grows with the pairs; 0 where it does not.

    A user's object may have `expected_overhead(device, head_dim, block_q, block_k) -> float`.
    """
    if isinstance(pattern, PerHead):
        each = [expected_overhead(own, device, head_dim, block_q, block_k) for own in pattern.patterns]
        return math.fsum(each) / len(each)
    if isinstance(pattern, LastRowsDense):
        return expected_overhead(pattern.pattern, device, head_dim, block_q, block_k)
    own = getattr(pattern, "expected_overhead", None)
    return float(own(device, head_dim, block_q, block_k)) if callable(own) else 0.0


def _in_blocks(tokens: int) -> int:
    return -(-tokens // 64) * 64


def _kept_share(extra: int, budget: int | float, keys: int) -> float:
    """Share of causal pairs when every query keeps a budget (and `extra` tokens)."""
    if isinstance(budget, float):
        return budget
    kept = min(budget + extra, keys)
    return (kept * keys - kept * (kept - 1) / 2) / (keys * (keys + 1) / 2)


@dataclass(frozen=True, slots=True, eq=False)
class Prefill:
    """One attention call and what was seen of it; tensors stay on their device until someone reads them."""

    result: AttentionOutput  # output and lse
    index: BlockIndex  # the blocks that were computed
    coverage: Coverage | None  # None unless observed, as all that follows
    sampled_mass: Tensor | None  # float64 [query_heads, 2]: sum of kept mass over sampled rows, and their number
    seconds: tuple[float, float] | None  # estimator, kernel; on the CPU, None on a GPU
    events: tuple[torch.cuda.Event, ...] | None  # before, between, after; on a GPU, None on the CPU
    guarded: GuardedCall | None = None  # None without a guard, and where the pattern computes everything


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
        sample_rows: evenly spaced queries on which the kept share of attention mass is measured; 0 for none.
        guard: what watches over the kept mass; None for nothing.
        draw: names this call to the guard's random draw.

    Raises:
        ValueError: what the pattern or `block_sparse_attention` refuses.
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
    on_gpu = inputs.device.type == "cuda"
    events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(3)) if on_gpu and observe else None
    began = time.perf_counter()
    if events:
        events[0].record()
    index = pattern.build_index(inputs, BlockGrid.of(inputs, block_q, block_k))
    built = time.perf_counter()
    if events:
        events[1].record()
    result = block_sparse_attention(inputs, index, impl)
    done = time.perf_counter()
    if events:
        events[2].record()
    call = None
    if guard is not None and not keeps_everything(pattern):
        index, call = guarded(inputs, index, result, guard, draw=draw, impl=impl, timed=observe)
    if not observe:
        return Prefill(result, index, None, None, None, None, call)
    mass = kept_mass_sample(inputs, result.lse, sample_rows) if sample_rows else None
    seconds = None if on_gpu else (built - began, done - built)
    return Prefill(result, index, coverage(inputs, index, result.skipped), mass, seconds, events, call)


def keeps_everything(pattern: Any) -> bool:
    """Whether a pattern is dense by its kind, so that there is nothing to guard."""
    if isinstance(pattern, PerHead):
        return all(map(keeps_everything, pattern.patterns))
    return isinstance(pattern, Dense) or (isinstance(pattern, LastRowsDense) and keeps_everything(pattern.pattern))


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
            if value is not None:
                shown.append(f"{field.name}={describe_pattern(value) if dataclasses.is_dataclass(value) else value}")
        return f"{type(pattern).__name__}({', '.join(shown)})"
    return type(pattern).__name__


def methods_table() -> list[dict[str, str]]:
    """The rows of `sparseprefill methods`."""
    return [
        {
            "method": name, "kind": row.kind, "what it keeps": row.summary, "options": ", ".join(row.options) or "-",
            "looks ahead": "yes" if row.looks_ahead else "no", "chunked prefill": row.chunked,
            "paper": row.paper or "-",
        }
        for name, row in METHODS.items()
    ]  # fmt: skip


def parse_options(text: str) -> dict[str, Any]:
    """`keep=0.2,sink=64` as a dictionary: numbers where they are numbers, text elsewhere."""
    options: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"an option is written name=value, got {part!r}")
        try:
            options[name.strip()] = json.loads(value)
        except (ValueError, RecursionError):  # no JSON, or numbers of thousands of digits
            options[name.strip()] = value.strip()
    return options
