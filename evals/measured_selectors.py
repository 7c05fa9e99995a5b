"""What methods at their settings keep of some heads' attention, what they compute for it, and how long that takes.

Most methods name blocks, and what those keep is read off one exact pass over all pairs (see
`sparseprefill.patterns.scores`). Of those that lay keys in another order, or skip tiles while the kernel runs, it is
exp(lse_sparse - lse_dense) of the kernel's own results: the same figure.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, AttentionOutput, BlockGrid, BlockIndex
from sparseprefill.evals.bench import dense_attention, median_seconds
from sparseprefill.evals.compared_inputs import NamedInputs
from sparseprefill.evals.curves import Refusal, SelectorTime
from sparseprefill.kernels import block_sparse_attention
from sparseprefill.patterns import Dense, Pattern
from sparseprefill.patterns.nested import estimator_work
from sparseprefill.patterns.parts import attend, attended, corrected, parts_coverage, parts_of
from sparseprefill.patterns.scores import BINS, LayerScores, lost_edges, score, scored_rows, summarise

Tile = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Selector:
    """One method at one setting of its knob."""

    family: str  # whose curve it is a point of
    knob: float
    pattern: Pattern
    like: str | None = None  # family whose lists, at the same knob, these are compared with one by one
    drawn: bool = True  # in the picture
    kind: str = "selector"  # of the method, see `MethodRow`
    native: Tile | None = None  # queries and keys of a tile in its paper; None: it has none
    repeats: str | None = None  # of a wrapper that is swept by the knob of another method: that method


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """Selectors on one of the inputs; float64 [heads, selectors], or [selectors], NaN where there is nothing."""

    chosen: Sequence[Selector]
    density: Tensor
    mass: Tensor
    low_mass: Tensor
    work: Tensor  # tile_work and estimator
    estimator: Tensor
    found: Tensor
    agreement: Tensor
    error: Tensor


def accepted(
    each: NamedInputs, chosen: Sequence[Selector], tile: Tile
) -> tuple[list[Selector], list[Refusal]]:  # fmt: skip
    """Selectors that can be on tiles like these, and families that refuse them: each is tried once, on one head."""
    inputs = each.inputs.select_heads([0])
    grid = BlockGrid.of(inputs, *tile)
    reasons: dict[str, str | None] = {}
    for selector in chosen:
        if selector.family not in reasons:
            try:
                parts_of(selector.pattern, inputs, grid)
                reasons[selector.family] = None
            except (ValueError, NotImplementedError) as error:
                reasons[selector.family] = str(error)
    refused = [Refusal(each.group, tile, family, reason) for family, reason in reasons.items() if reason is not None]
    return [selector for selector in chosen if reasons[selector.family] is None], refused


def measured(
    each: NamedInputs, chosen: Sequence[Selector], tile: Tile, *, quantile: float, every: int, errors: bool
) -> Scored:
    """Look at every selector on all heads of the inputs.

    Args:
        each: what to look at.
        chosen: selectors that can be on these tiles.
        tile: queries and keys.
        quantile: share of the queries that may keep less than `low_mass`.
        every: look at the mass of each n-th row of tiles only.
        errors: also how far outputs are from those of dense attention, over all queries.
    """
    inputs, grid = each.inputs, BlockGrid.of(each.inputs, *tile)
    watch = _Watch(chosen, each.needle)
    listed = [n for n, own in enumerate(chosen) if not getattr(own.pattern, "in_parts", False)]
    watched: list[Any] = [_Watched(chosen[n].pattern, n, watch) for n in listed]
    some = score(inputs, [*watched, Dense()], block=tile[0], block_k=tile[1], every=every)
    running = sorted(set(range(len(chosen))) - set(listed) | watch.skipping)  # what lists alone do not tell
    counts = _spread(some, listed, len(chosen))
    error = torch.full((inputs.query_heads, len(chosen)), torch.nan, dtype=torch.float64)
    if running or errors:
        dense = block_sparse_attention(inputs, BlockIndex.dense(inputs, grid), values=errors)
        for place in range(len(chosen)) if errors else running:
            parts = parts_of(chosen[place].pattern, inputs, grid)
            result = corrected(chosen[place].pattern, inputs, parts, attend(parts, values=errors))
            if place in running:
                _fill(counts, place, inputs, grid, every, parts, result, dense)
            if errors:
                error[:, place] = output_error(result, dense)
    dense_tiles = int(counts.dense_tiles)
    work = [estimator_work(own.pattern, inputs, grid, dense_tiles) for own in chosen]
    counts = dataclasses.replace(counts, estimator=torch.tensor(work, dtype=torch.float64))
    means = summarise([counts], quantile)
    if not bool(means.mass.isfinite().all()) or (errors and not bool(error.isfinite().all())):
        raise ValueError(f"the attention of {each.name!r} overflows: it cannot be compared on, leave it out")
    for place in running:
        watch.forget(place)
    return Scored(
        chosen, means.density, means.mass, means.low_mass, means.work, counts.estimator, watch.found / watch.asked,
        watch.shared.double() / watch.either.double(), error,
    )  # fmt: skip


def output_error(result: AttentionOutput, dense: AttentionOutput) -> Tensor:
    """float64 [query_heads], on the CPU: |result - dense| / |dense|, the norm over all queries and channels of a head.

    0 where both are dense. Raises ValueError for results without outputs.
    """
    if result.output is None or dense.output is None:
        raise ValueError("an error is that of outputs: compute attention with its values")
    own, exact = result.output[0].double(), dense.output[0].double()
    size = exact.norm(dim=(1, 2)).clamp(min=torch.finfo(torch.float64).tiny)  # a head whose values are all 0
    error: Tensor = (own - exact).norm(dim=(1, 2)) / size
    return error.cpu()


def _spread(some: LayerScores, places: Sequence[int], count: int) -> LayerScores:
    """The counts of some candidates, but for a last one, at their places among all; pairs and tiles as numbers that
    can be halved.
    """

    def wide(tensor: Tensor, kind: torch.dtype) -> Tensor:
        made = torch.zeros(tensor.shape[0], count, *tensor.shape[2:], dtype=kind)
        made[:, list(places)] = tensor[:, :-1].to(kind)
        return made

    exact = torch.float64
    return dataclasses.replace(
        some, mass=wide(some.mass, exact), lost=wide(some.lost, torch.int64), kept=wide(some.kept, exact),
        tiles=wide(some.tiles, exact),
    )  # fmt: skip


def _fill(
    counts: LayerScores, place: int, inputs: AttentionInputs, grid: BlockGrid, every: int, parts: Any,
    result: AttentionOutput, dense: AttentionOutput,
) -> None:  # fmt: skip
    """Write what ran, and what its lse says, into the counts of one selector."""
    rows = torch.tensor(scored_rows(grid.rows, every), device=inputs.device)
    looked_at = torch.isin(grid.query_rows()[0], rows)
    share = (result.lse[0].double() - dense.lse[0].double()).exp().clamp(max=1.0)[:, looked_at]
    counts.mass[:, place] = share.sum(1).cpu()
    edges = lost_edges().to(device=share.device, dtype=torch.float32)
    bins = torch.bucketize((1 - share).float().clamp_(0.0, 1.0), edges).clamp_(max=BINS - 1)
    counts.lost[:, place] = torch.stack([torch.bincount(own, minlength=BINS) for own in bins]).cpu()
    cover = parts_coverage(parts, result.skipped)
    # kernels count skipped pairs, not tiles: of the listed tiles the same share is taken to be skipped
    computed = cover.kept.double() - cover.skipped.double() / 2
    counts.kept[:, place] = computed.cpu()
    counts.tiles[:, place] = (cover.tiles.double() * computed / cover.kept.clamp(min=1)).cpu()


class _Watch:
    """What is seen of lists while they are made: a needle in them, what they share with others, tiles to be skipped."""

    def __init__(self, chosen: Sequence[Selector], needle: int | None) -> None:
        self.needle = needle
        places = {(each.family, each.knob): n for n, each in enumerate(chosen)}
        self.like = [None if each.like is None else places.get((each.like, each.knob)) for each in chosen]
        self.kept: dict[int, BlockIndex] = {}
        self.shared, self.either = (torch.zeros(len(chosen), dtype=torch.int64) for _ in range(2))
        self.found, self.asked = (torch.zeros(len(chosen), dtype=torch.float64) for _ in range(2))
        self.skipping: set[int] = set()

    def note(self, place: int, inputs: AttentionInputs, index: BlockIndex) -> None:
        """An index was made. The families that others are like come first."""
        if index.skip is not None:
            self.skipping.add(place)
        if place in self.like:
            self.kept[place] = index
        like = self.like[place]
        if like is not None:
            own, other = index.to_mask(), self.kept[like].to_mask()
            self.shared[place] += (own & other).sum().cpu()
            self.either[place] += (own | other).sum().cpu()
        if self.needle is not None:
            grid = index.grid
            own = index.to_mask()[..., self.needle // grid.block_k]
            behind = grid.row_slots()[0] > self.needle + 4 * max(grid.block_q, grid.block_k)  # beyond local windows
            self.found[place] += (own & behind[:, None]).sum().cpu()
            self.asked[place] += int(behind.sum()) * inputs.query_heads

    def forget(self, place: int) -> None:
        """Lists that do not say what is computed."""
        for counted in (self.found, self.asked, self.shared, self.either):
            counted[place] = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Watched:
    """A pattern whose indexes are looked at when they are made; all else is the pattern's own."""

    pattern: Any
    place: int
    watch: _Watch

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # a wrapper is not taken apart: it has the same pattern for all heads
            raise AttributeError(name)
        return getattr(self.pattern, name)

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        index: BlockIndex = self.pattern.build_index(inputs, grid)
        self.watch.note(self.place, inputs, index)
        return index

    def choose(self, estimate: Any, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        index: BlockIndex = self.pattern.choose(estimate, inputs, grid)
        self.watch.note(self.place, inputs, index)
        return index


def nearest(scored: Scored, densities: Sequence[float]) -> list[int]:
    """Places of the settings of each family but dense that come nearest to these densities, each once."""
    density = scored.density.mean(0).tolist()
    found: dict[int, None] = {}
    for family in dict.fromkeys(each.family for each in scored.chosen if not isinstance(each.pattern, Dense)):
        places = [n for n, each in enumerate(scored.chosen) if each.family == family]
        found |= dict.fromkeys(min(places, key=lambda n: abs(density[n] - wanted)) for wanted in densities)
    return sorted(found)


def timed(
    each: NamedInputs, scored: Scored, tile: Tile, densities: Sequence[float], repeats: int
) -> list[SelectorTime]:  # fmt: skip
    """The settings nearest to some densities, warm and interleaved: finding the blocks, attention over them, dense.

    torch's dense attention is timed without soft-cap and sinks, which it does not know.
    """
    inputs, grid = each.inputs, BlockGrid.of(each.inputs, *tile)
    every = BlockIndex.dense(inputs, grid)
    contenders: dict[str, Callable[[], Any]] = {
        "dense": lambda: dense_attention(inputs), "kernel": lambda: block_sparse_attention(inputs, every)
    }  # fmt: skip
    places = nearest(scored, densities)
    for place in places:
        pattern = scored.chosen[place].pattern
        contenders[f"find {place}"] = functools.partial(parts_of, pattern, inputs, grid)
        contenders[f"attend {place}"] = functools.partial(attended, pattern, inputs, parts_of(pattern, inputs, grid))
    seconds = median_seconds(inputs, contenders, repeats)
    dense = seconds["dense"]
    return [
        SelectorTime(
            each.group, tile, scored.chosen[place].family, scored.chosen[place].knob,
            float(scored.density[:, place].mean()), seconds[f"find {place}"] / dense,
            seconds[f"attend {place}"] / dense, dense, seconds["kernel"] / dense,
        )
        for place in places
    ]  # fmt: skip
