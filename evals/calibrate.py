"""Measures what attention costs on this machine, for the layers of one model, and fits the cost model to it.

Dense attention, whole sparse calls as a patch makes them, and finding the blocks alone are timed interleaved on the
same random queries and keys; a call whose result is not attention over the blocks it chose is an error, not a time. The
two numbers of `CostModel` are fitted to all but the finding, for each selector on its own, and the more cautious of
each is kept; the three of `Overhead` to the finding, for each method, so that none of its times is above them.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from sparseprefill.calibration import Calibration, CalibrationCell, CalibrationEntry, Machine
from sparseprefill.contracts import BlockGrid
from sparseprefill.evals.bench import checked_parts, dense_attention, median_seconds, random_inputs
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.evals.profile_time import RATE, tile_seconds
from sparseprefill.huggingface import tried_pattern
from sparseprefill.huggingface_layers import Settings
from sparseprefill.huggingface_modules import (
    LayerShape,
    attention_modules,
    kernel_for,
    layer_shapes,
    tensor_parallel,
    text_config,
)
from sparseprefill.patterns import ModelPatterns, Pattern
from sparseprefill.patterns.expected_overhead import Overhead, estimator_name
from sparseprefill.patterns.methods import DEFAULT, METHODS
from sparseprefill.patterns.parts import parts_of
from sparseprefill.prefill import CostModel, Prefill, resolve_method, sparse_prefill
from sparseprefill.reports import number, ranges, table

SELECTORS = ("vertical_slash", "block_sparse", DEFAULT)
"""The methods that are timed unless some are named."""
LENGTHS = {"cpu": (1024, 2048, 4096, 8192), "cuda": (4096, 8192, 16384, 32768)}
"""By kind of device, from about where sparse attention begins to pay to where it pays well."""
DENSITIES = (0.1, 0.2, 0.5)
"""What is timed unless densities are given."""
WORST = 0.6
"""A fit that is further off than this share of a measured time says more of what else ran than of attention."""
_TOLD = (0.1, 0.2, 0.5)  # break-even is printed at these densities


@dataclass(frozen=True, slots=True)
class Measured:
    """A new entry of the calibration, and which layers of the model it is for."""

    entry: CalibrationEntry
    layers: tuple[int, ...]  # their numbers
    worst: float  # largest relative error of a selector's own fit, over its cells


@dataclass(frozen=True, slots=True)
class Fit:
    """The cost model that describes some cells best, and how well it does."""

    tile_factor: float
    fixed_seconds: float
    worst: float  # largest relative error over the cells


def lengths_for(device: str) -> tuple[int, ...]:
    """What is timed unless lengths are given."""
    return LENGTHS.get(torch.device(device).type, LENGTHS["cuda"])


def shapes_of(model: PreTrainedModel) -> dict[LayerShape, tuple[int, ...]]:
    """The distinct shapes of a model's attention layers, and the numbers of the layers of each.

    Weights are not looked at, they may be on the meta device. Raises NotImplementedError for a model that
    `patch_model` refuses for its kind.
    """
    config = text_config(model)
    found: dict[LayerShape, tuple[int, ...]] = {}
    for layer, shape in sorted(layer_shapes(attention_modules(model, config), config, tensor_parallel(model)).items()):
        found[shape] = (*found.get(shape, ()), layer)
    return found


def calibrate(
    shapes: Mapping[LayerShape, tuple[int, ...]],
    *,
    device: str,
    dtype: torch.dtype,
    lengths: Sequence[int] | None = None,
    densities: Sequence[float] = DENSITIES,
    methods: Sequence[str] = SELECTORS,
    repeats: int = 5,
    impl: str = "auto",
    block_q: int = 64,
    block_k: int = 64,
    seed: int = 0,
    progress: Callable[[int], Any] = lambda steps: None,
) -> list[Measured]:
    """Measure and fit one entry for each shape; nothing is written.

    Args:
        shapes: see `shapes_of`.
        device: "cpu", "cuda", ...: where the model will run.
        dtype: of queries, keys and values.
        lengths: tokens of the timed prefills, multiples of 128 and of both tiles; None: those of `LENGTHS`.
        densities: budgets of the methods that are named without options.
        methods: as on the command line; of one with options of its own, or that goes around another, only what finding
            takes is fitted.
        repeats: timed calls; medians are taken.
        impl, block_q, block_k: as for `patch_model`.
        seed: of queries, keys and values.
        progress: called with the number of lengths done.

    Raises:
        ValueError: lengths, densities or tiles that cannot be measured, a wrong result, or times too noisy to fit.
        NotImplementedError: no kernel serves a shape; the message says why.
    """
    place = torch.zeros(1, device=device).device  # "cuda" has become "cuda:0"
    lengths = tuple(lengths or lengths_for(device))
    for length in lengths:
        if length < 2 * max(block_q, block_k) or length % math.lcm(128, block_q, block_k):
            raise ValueError(f"calibration times multiples of {math.lcm(128, block_q, block_k)} tokens, got {length}")
    if len(set(lengths)) < 2:
        raise ValueError("calibration needs at least two lengths, to tell what is fixed from what grows")
    if not densities:
        raise ValueError("calibration needs at least one density")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    patterns = patterns_at(methods, densities)
    swept = [name for name in patterns if name in METHODS and not METHODS[name].wraps]
    if not swept:
        raise ValueError(
            "calibration fits what attention costs to methods named without options, and to none that goes around "
            "another: name one of these too"
        )
    nothing = Calibration((), Machine.here())
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    done = []
    for shape, layers in shapes.items():
        kernel, reasons = kernel_for(shape, place, dtype, impl, block_q, block_k)
        if kernel is None:
            why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
            raise NotImplementedError(f"layers {ranges(layers)} cannot be served: {why}")
        settings = Settings(block_q, block_k, impl)
        for words, pattern in (one for each in patterns.values() for one in each):
            if not tried_pattern(pattern, shape, place, settings):
                continue
            if kernel_for(shape, place, dtype, impl, block_q, block_k, skips=True)[0] != kernel:
                raise ValueError(
                    f"{words} lets its kernel skip tiles, which {kernel} does not at block_q={block_q}: leave it out, "
                    "or calibrate another block_q"
                )
        cells: list[CalibrationCell] = []
        for length in lengths:
            cells += _measured(shape, length, patterns, dtype, place, kernel, block_q, block_k, repeats, seed)
            progress(1)
        key = nothing.key(place, dtype, kernel, **dataclasses.asdict(shape), block_q=block_q, block_k=block_k)
        cost, pair, worst = fit_cost([cell for cell in cells if cell.selector in swept])
        finders: dict[str, list[CalibrationCell]] = {}  # a method named twice may find its blocks in one way
        for name, each in patterns.items():
            own = [cell for cell in cells if cell.selector == name]
            if METHODS[MethodSpec.parse(name).name].wraps:
                own = [_beyond(cell, cost, pair) for cell in own]
            finders.setdefault(estimator_name(each[0][1]), []).extend(own)
        overheads = {name: fit_overhead(own, pair) for name, own in finders.items()}
        rates = {}
        if block_q == block_k:  # tiles of the profiler are square
            inputs = random_inputs(
                shape.query_heads, shape.kv_heads, max(lengths), shape.head_dim, dtype, place, seed,
                value_dim=shape.value_dim,
            )  # fmt: skip
            rates[RATE] = tile_seconds(inputs, block_q, min(repeats, 3))
        done.append(Measured(CalibrationEntry(key, cost, pair, tuple(cells), today, rates, overheads), layers, worst))
    return done


def patterns_at(methods: Sequence[str], densities: Sequence[float]) -> dict[str, list[tuple[str, Pattern]]]:
    """What is timed of each method: (words, pattern) at each density, or once with the options it is named with.

    Raises ValueError for a method that is none, needs a model, or finds nothing.
    """
    found: dict[str, list[tuple[str, Pattern]]] = {}
    for text in methods:
        named = MethodSpec.parse(text)
        if named.name == "dense":
            raise ValueError("dense finds no blocks: name another method")
        if named.options:
            specs = {text: named}
        else:
            specs = {f"{text} at density {each:g}": MethodSpec.about_density(text, each) for each in densities}
        for words, spec in specs.items():
            pattern = resolve_method(spec.name, **spec.options)
            if isinstance(pattern, ModelPatterns):
                raise ValueError(f"{text} is the profile of a model: name a method that needs none")
            found.setdefault(text, []).append((words, pattern))
    return found


def _measured(
    shape: LayerShape, length: int, patterns: Mapping[str, Sequence[tuple[str, Pattern]]], dtype: torch.dtype,
    device: torch.device, kernel: str, block_q: int, block_k: int, repeats: int, seed: int,
) -> list[CalibrationCell]:  # fmt: skip
    """The cells of one length, checked and then timed together."""
    inputs = random_inputs(
        shape.query_heads, shape.kv_heads, length, shape.head_dim, dtype, device, seed, value_dim=shape.value_dim
    )
    grid = BlockGrid.of(inputs, block_q, block_k)

    def call(pattern: Pattern) -> Callable[[], Prefill]:
        return lambda: sparse_prefill(inputs, pattern, block_q=block_q, block_k=block_k, impl=kernel, observe=True)

    def find(pattern: Pattern) -> Callable[[], Any]:
        return lambda: parts_of(pattern, inputs, grid)

    contenders: dict[str, Callable[[], Any]] = {"dense": lambda: dense_attention(inputs)}
    timed: list[tuple[str, str, float]] = []  # method, words, density
    for name, each in patterns.items():
        for words, pattern in each:
            what = f"{words}, {length} tokens"
            run = call(pattern)
            done = run()
            assert done.result.output is not None
            assert done.coverage is not None
            checked_parts(what, done.parts, done.result.output)
            timed.append((name, what, float(done.coverage.density.mean())))
            contenders[what], contenders[f"find {what}"] = run, find(pattern)
    seconds = median_seconds(inputs, contenders, repeats)
    return [
        CalibrationCell(name, length, density, seconds["dense"], seconds[what], seconds[f"find {what}"])
        for name, what, density in timed
    ]


def fit_cost(cells: Sequence[CalibrationCell]) -> tuple[CostModel, float, float]:
    """(the more cautious cost model of the selectors, seconds of a dense pair, worst relative error of their fits).

    For each selector, attending = tile_factor * density * dense + fixed is fitted by least squares of relative errors,
    fixed not below 0. Of each number the larger is kept, so that at no density and length is the model less cautious
    than a selector's own. `fixed` becomes tokens by the dense pair's seconds, rounded up.

    Raises ValueError where the cells tell nothing of one of the numbers.
    """
    pair = _dense_pair_seconds(cells)
    selectors = dict.fromkeys(cell.selector for cell in cells)
    fits = [_fit([cell for cell in cells if cell.selector == name]) for name in selectors]
    fixed = max(math.sqrt(2 * fit.fixed_seconds / pair) for fit in fits)
    tokens = math.ceil(fixed - 1e-6 * (1 + fixed))  # what rounding added is no token
    return CostModel(max(fit.tile_factor for fit in fits), tokens), pair, max(fit.worst for fit in fits)


def _beyond(cell: CalibrationCell, cost: CostModel, pair: float) -> CalibrationCell:
    """With all of a wrapper's time that attention over its blocks does not explain, as it may run them otherwise."""
    told = cost.tile_factor * cell.density * cell.dense + cost.fixed_tokens**2 / 2 * pair
    return dataclasses.replace(cell, finding=max(cell.finding, cell.sparse - told))


def fit_overhead(cells: Sequence[CalibrationCell], pair: float) -> Overhead:
    """What one method takes to find its blocks, from the seconds of a dense pair.

    The three numbers, none below 0, are fitted by least squares of relative errors, as many of them as there are
    lengths; then all are raised by the one factor at which no measured time is above what they say.
    """
    rows = [(cell.length * (cell.length + 1) / 2, float(cell.length), 1.0) for cell in cells]
    wanted = [cell.finding / pair for cell in cells]
    if not any(wanted):
        return Overhead()
    least = max(wanted) * 1e-9  # what took no time at all is met well enough by anything
    weight = torch.tensor([1 / max(own, least) for own in wanted], dtype=torch.float64)
    terms = torch.tensor(rows, dtype=torch.float64) * weight[:, None]
    target = torch.tensor(wanted, dtype=torch.float64) * weight
    scale = terms.norm(dim=0)
    best, error = torch.zeros(3, dtype=torch.float64), math.inf
    for count in range(1, min(3, len({cell.length for cell in cells})) + 1):
        for some in itertools.combinations(range(3), count):
            part = (terms / scale)[:, list(some)]
            solution = torch.linalg.lstsq(part, target[:, None], driver="gelsd").solution[:, 0]
            off = float((part @ solution - target).norm())
            if bool((solution >= 0).all()) and off < error * (1 - 1e-9):
                best, error = torch.zeros(3, dtype=torch.float64), off
                best[list(some)] = solution / scale[list(some)]
    raised = (best * (target / (terms @ best)).max().clamp(min=1.0)).tolist()
    return Overhead(raised[0], raised[1], math.ceil(math.sqrt(2 * raised[2]) - 1e-6))


def _dense_pair_seconds(cells: Sequence[CalibrationCell]) -> float:
    """Of the line through the origin that fits dense times best, by relative errors."""
    if not cells:
        raise ValueError("there is nothing to fit: no cell was measured")
    rates = [cell.length * (cell.length + 1) / 2 / cell.dense for cell in cells]  # pairs a second
    return math.fsum(rates) / math.fsum(rate * rate for rate in rates)


def _fit(cells: Sequence[CalibrationCell]) -> Fit:
    if any(cell.attending <= 0 for cell in cells):
        raise ValueError(
            "finding the blocks took longer than the whole sparse call: the machine was too busy to be measured; try "
            "again with more repeats"
        )
    tiles = [cell.density * cell.dense / cell.attending for cell in cells]  # of 1, the measured time
    fixed = [1 / cell.attending for cell in cells]
    tt, tf, ff = _dot(tiles, tiles), _dot(tiles, fixed), _dot(fixed, fixed)
    determinant = tt * ff - tf * tf
    if determinant <= 1e-9 * tt * ff:
        raise ValueError("the cells are too much alike to tell what is fixed from what grows: measure more lengths")
    factor = (ff * math.fsum(tiles) - tf * math.fsum(fixed)) / determinant
    seconds = (tt * math.fsum(fixed) - tf * math.fsum(tiles)) / determinant
    if seconds < 0:  # a fixed gain is noise
        factor, seconds = math.fsum(tiles) / tt, 0.0
    if factor <= 0:
        raise ValueError(
            "sparse calls did not take longer at higher densities: the machine was too busy to be measured, or the "
            "lengths are too short; try again with more repeats or longer lengths"
        )
    return Fit(factor, seconds, max(abs(factor * t + seconds * f - 1) for t, f in zip(tiles, fixed, strict=True)))


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return math.fsum(a * b for a, b in zip(left, right, strict=True))


def check_fits(measured: Sequence[Measured]) -> None:
    """Raise ValueError where a fit is too far off to decide anything: a busy machine, or cells too short."""
    for each in measured:
        if each.worst > WORST:
            raise ValueError(
                f"the times of layers {ranges(each.layers)} do not fit together, one is off by {each.worst:.0%}: "
                "nothing was written. Measure when nothing else runs, with more --repeats or other --lengths"
            )


def calibration_report(measured: Measured, *, markdown: bool = False) -> str:
    """The cells of an entry beside what its cost model says of them, then what follows from it."""
    entry, key = measured.entry, measured.entry.key
    fixed = entry.cost.fixed_tokens**2 / 2 * entry.dense_pair_seconds
    names = {cell.selector: estimator_name(patterns_at([cell.selector], DENSITIES)[cell.selector][0][1])
             for cell in entry.cells}  # fmt: skip
    rows = []
    for cell in entry.cells:
        finding = entry.overheads[names[cell.selector]].pairs(cell.length * (cell.length + 1) / 2, cell.length)
        told = entry.cost.tile_factor * cell.density * cell.dense + fixed + finding * entry.dense_pair_seconds
        rows.append([
            cell.selector, str(cell.length), number(cell.density), number(cell.dense, 4), number(cell.finding, 4),
            number(cell.sparse, 4), number(told, 4), f"{100 * (told / cell.sparse - 1):+.0f}%",
            number(cell.dense / cell.sparse, 2),
        ])  # fmt: skip
    head = ["selector", "length", "density", "dense s", "finding s", "sparse s", "model s", "model", "dense / sparse"]
    lines = []
    for selector, name in names.items():
        overhead = entry.overheads[name]
        even = {density: entry.cost.break_even(density, overhead) for density in _TOLD}
        told_even = ", ".join(
            f"{'never' if tokens is None else f'{tokens} tokens'} at {density:g}" for density, tokens in even.items()
        )
        lines.append(f"{selector}: finding the blocks costs {overhead.describe()}; break-even: {told_even}")
    dims = f"{key.head_dim}" if key.head_dim == key.value_dim else f"{key.head_dim}/{key.value_dim}"
    return "\n".join([
        f"layers {ranges(measured.layers)}: {key.query_heads} query heads, {key.kv_heads} KV heads, head_dim {dims}, "
        f"kernel {key.kernel}, tiles of {key.block_q} x {key.block_k}",
        table(head, rows, markdown=markdown),
        entry.describe(),
        *lines,
        f"largest relative error of a selector's own fit: {100 * measured.worst:.0f}%",
    ])  # fmt: skip
