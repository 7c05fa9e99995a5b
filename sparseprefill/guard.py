"""The run-time guard: heads that lose too much of the true attention mass are found while they run, and run again.

On some query rows of each call the kept mass is computed exactly, as exp(lse of the sparse result - lse of dense
attention): always on the last rows, and on a seeded draw of one row from each of equally many strata. A head whose
sampled mass is too low is computed once more with full rows. All of it is decided on the device.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, AttentionOutput, BlockIndex
from sparseprefill.kernels import block_sparse_attention
from sparseprefill.kernels.row_lse import row_lse


@dataclass(frozen=True, slots=True)
class Guard:
    """What is looked at, and what is too low.

    A head fails a check where the mean kept mass of the last rows, or that of the drawn rows, is below `min_mass`. With
    `min_mass` 1.0 every checked head fails: dense attention.
    """

    min_mass: float
    rows: int = 128  # drawn query rows, one from each of as many equal parts of a batch row's valid queries
    last: int = 16  # a batch row's last valid queries, looked at in every call
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.min_mass, bool) or not isinstance(self.min_mass, (int, float)):
            raise TypeError(f"min_mass must be a number in (0, 1], got {self.min_mass!r}")
        if not 0 < self.min_mass <= 1:  # NaN is refused too
            raise ValueError(f"min_mass must be in (0, 1], got {self.min_mass}: it is a share of the attention mass")
        for name in ("rows", "last"):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int):
                raise TypeError(f"guard {name} must be a number of query rows, got {count!r}")
            if count < 1:
                raise ValueError(f"guard {name} must be at least 1, got {count}")


@dataclass(frozen=True, slots=True, eq=False)
class GuardCheck:
    """What one check saw, on the device of the inputs."""

    failed: Tensor  # bool [batch, query_heads]
    checked: Tensor  # bool [batch]: the batch row had a valid query
    mass: Tensor  # float32 [batch, query_heads, rows + last], kept by the sparse result, at most 1
    real: Tensor  # bool, the same shape: such a query exists and sees a key
    place: Tensor  # int64 [batch, rows + last] the queries: drawn ones in rising order, then the last ones


def sampled_rows(inputs: AttentionInputs, guard: Guard, draw: str = "") -> tuple[Tensor, Tensor]:
    """int64 and bool [batch, rows + last]: queries to look at, and whether there is such a query.

    Both follow each batch row's own valid queries, so padding and neighbours do not matter. The draw depends on the
    seed and on `draw` alone. Up to `rows` valid queries are all taken, some of them twice.
    """
    generator = random.Random(f"guard/{guard.seed}/{draw}")
    step = torch.tensor([generator.random() for _ in range(guard.rows)], dtype=torch.float64)
    stratum = torch.arange(guard.rows, device=inputs.device)
    drawn = stratum + step.to(inputs.device, non_blocking=True)
    before_end = torch.arange(-guard.last, 0, device=inputs.device)
    if inputs.key_valid is None:
        valid = torch.full((inputs.batch, 1), inputs.queries, device=inputs.device)
        until = None
    else:
        until = inputs.key_valid[:, inputs.query_start : inputs.query_start + inputs.queries].cumsum(1)
        valid = until[:, -1:]
    drawn = (drawn * valid / guard.rows).to(torch.int64)
    stratified = torch.where(valid > guard.rows, torch.minimum(drawn, valid - 1), stratum * valid // guard.rows)
    rank = torch.cat([stratified, valid + before_end], 1)
    real = (rank >= 0) & (valid > 0)
    place = rank.clamp(min=0)
    if until is not None:  # the query of a rank is the first with that many valid ones before it
        place = torch.searchsorted(until.contiguous(), place + 1).clamp(max=inputs.queries - 1)
    return place, real


def check(inputs: AttentionInputs, lse: Tensor, guard: Guard, draw: str = "", impl: str = "auto") -> GuardCheck:
    """Kept mass on the sampled rows of a sparse result with this lse [batch, query_heads, queries], and who failed."""
    place, exists = sampled_rows(inputs, guard, draw)
    dense = row_lse(inputs, place, impl)
    own = lse.gather(2, place[:, None].expand(-1, inputs.query_heads, -1))
    real = exists[:, None] & (dense != -torch.inf)
    mass = torch.where(real, (own - dense).exp().clamp(max=1.0), 1.0)  # rounding must not make up for another row
    return GuardCheck(fails(mass, real, guard), real.any(2).any(1), mass, real, place)


def fails(mass: Tensor, real: Tensor, guard: Guard) -> Tensor:
    """bool [...]: the rule, for mass and real [..., rows + last]. A head with nothing to look at does not fail."""
    low = torch.zeros(mass.shape[:-1], dtype=torch.bool, device=mass.device)
    for part in (slice(0, guard.rows), slice(guard.rows, None)):
        some = real[..., part].any(-1)
        mean = torch.where(real[..., part], mass[..., part], 0.0).sum(-1) / real[..., part].sum(-1).clamp(min=1)
        low |= some & ~(mean >= guard.min_mass)  # a NaN fails
        if guard.min_mass == 1:  # what a head lost may be less than rounding shows
            low |= some
    return low


def run_again(
    inputs: AttentionInputs, index: BlockIndex, result: AttentionOutput, failed: Tensor, impl: str
) -> BlockIndex:
    """Compute the failed heads (bool [batch, query_heads]) with full rows, of which nothing is skipped, into `result`.

    Returns the index of what then has run: every visible block for those heads, `index` for the others.
    """
    if inputs.device.type == "cpu" and not failed.any():
        return index
    dense = BlockIndex.dense(inputs, index.grid)
    block_sparse_attention(inputs, dense, impl, values=result.output is not None, only=failed, into=result)
    again = failed[..., None]
    return BlockIndex(
        index.grid,
        torch.cat([dense.columns, index.columns]),
        torch.where(again, dense.start, index.start + dense.columns.numel()),
        torch.where(again, dense.count, index.count),
        index.unjudged,
        None if index.visit is None else torch.cat([dense.columns, index.visit]),
        None if index.skip is None else index.skip.masked_fill(again, -torch.inf),
    )


@dataclass(frozen=True, slots=True, eq=False)
class GuardedCall:
    """A check, and what it cost; what running heads again cost is counted apart."""

    check: GuardCheck
    seconds: tuple[float, float] | None  # check, running again; on the CPU
    events: tuple[torch.cuda.Event, ...] | None  # before, between, after; on a GPU


def guarded(
    inputs: AttentionInputs,
    index: BlockIndex,
    result: AttentionOutput,
    guard: Guard,
    *,
    draw: str = "",
    impl: str = "auto",
    timed: bool = False,
) -> tuple[BlockIndex, GuardedCall]:
    """Check a sparse result and run the heads that fail again, in place. Nothing is read back from a GPU.

    Returns the index of what has run in the end, and what was seen. `timed` also takes the times of both steps.
    """
    on_gpu = inputs.device.type == "cuda"
    events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(3)) if on_gpu and timed else None
    times = []

    def mark(step: int) -> None:
        if events is not None:
            events[step].record()
        times.append(time.perf_counter())

    mark(0)
    found = check(inputs, result.lse, guard, draw, impl)
    mark(1)
    index = run_again(inputs, index, result, found.failed, impl)
    mark(2)
    seconds = None if on_gpu or not timed else (times[1] - times[0], times[2] - times[1])
    return index, GuardedCall(found, seconds, events)


@dataclass(eq=False)
class GuardLog:
    """Sums over the calls of one layer; on the device until they are read."""

    checks: Tensor | None = None  # int64 []
    reruns: Tensor | None = None  # int64 [query_heads]
    lowest: Tensor | None = None  # [query_heads]
    timings: list[tuple[torch.cuda.Event, ...]] = field(default_factory=list)  # not yet summed
    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])  # check, running again

    def note(self, call: GuardedCall) -> None:
        """Add one call. Reads nothing back."""
        seen = call.check
        checks, reruns, lowest = seen.checked.sum(), seen.failed.sum(0), seen.mass.amin((0, 2))
        if self.checks is None or self.reruns is None or self.lowest is None:
            self.checks, self.reruns, self.lowest = checks, reruns, lowest
        else:
            self.checks, self.reruns = self.checks + checks, self.reruns + reruns
            self.lowest = torch.minimum(self.lowest, lowest)
        if call.seconds is not None:
            self._spent(*call.seconds)
        if call.events is not None:
            self.timings.append(call.events)
            if len(self.timings) > 256:  # these ended long ago
                self._read_timing(self.timings.pop(0))

    def _spent(self, checking: float, running: float) -> None:
        self.seconds = [self.seconds[0] + checking, self.seconds[1] + running]

    def _read_timing(self, events: tuple[torch.cuda.Event, ...]) -> None:
        before, between, after = events
        after.synchronize()
        self._spent(before.elapsed_time(between) / 1e3, between.elapsed_time(after) / 1e3)

    def read(self) -> tuple[int, list[int] | None, list[float] | None, float, float]:
        """Checks, re-runs and lowest sampled mass of each query head, seconds of checks and of re-runs: as reported.

        A check is one batch row of one call; each looks at every head.
        """
        while self.timings:
            self._read_timing(self.timings.pop())
        if self.checks is None or self.reruns is None or self.lowest is None:
            return 0, None, None, 0.0, 0.0
        checking, running = self.seconds
        return int(self.checks), self.reruns.tolist(), self.lowest.tolist(), checking, running
