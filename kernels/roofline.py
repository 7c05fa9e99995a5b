"""What bounds a step of the attention kernel, reckoned from published rates and counts; nothing here is timed.

A step takes one tile of queries over one tile of keys. Each resource of a multiprocessor needs so many clocks for it:
tensor cores for both products, the special-function units for an exponential a pair, the schedulers for its
instructions, memory for its keys and values. The largest bounds what programs that overlap perfectly can reach; where
one program waits for each product before it goes on, products and the rest add up.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

EXPONENTIALS = 16
"""Results of the special-function units a clock and multiprocessor (CUDA programming guide, arithmetic throughput)."""
ISSUES = 4
"""Instructions of a warp that a multiprocessor issues a clock: one for each scheduler."""


@dataclass(frozen=True, slots=True)
class Accelerator:
    """Published rates of a GPU."""

    name: str
    architecture: int  # 80, 90, 100
    flops: float  # a second, dense bfloat16
    memory: float  # bytes a second
    tensor: int  # FLOPs of the tensor cores a clock and multiprocessor

    @property
    def memory_per_clock(self) -> float:
        """Bytes that memory gives a multiprocessor in one clock of those in which the tensor cores reach `flops`."""
        return self.memory * self.tensor / self.flops

    @property
    def ridge(self) -> float:
        """FLOPs a byte from memory at which products take as long as the loads."""
        return self.flops / self.memory


ACCELERATORS = (
    Accelerator("A100", 80, 312e12, 2.0e12, 2048),
    Accelerator("H100 SXM", 90, 989e12, 3.35e12, 4096),
    Accelerator("H200", 90, 989e12, 4.8e12, 4096),
    Accelerator("B200", 100, 2250e12, 8.0e12, 8192),
)


@dataclass(frozen=True, slots=True)
class Step:
    """One tile of queries over one tile of keys."""

    rows: int  # queries of a tile, of all its heads
    keys: int
    head_dim: int
    value_dim: int
    itemsize: int = 2  # bytes of a number

    @property
    def flops(self) -> int:
        """Of both products."""
        return 2 * self.rows * self.keys * (self.head_dim + self.value_dim)

    @property
    def loaded(self) -> int:
        """Bytes of keys and values."""
        return self.keys * (self.head_dim + self.value_dim) * self.itemsize

    @property
    def exponentials(self) -> int:
        """One a pair, and one a row by which what was summed so far fades."""
        return self.rows * (self.keys + 1)

    @property
    def intensity(self) -> float:
        """FLOPs a byte that a program loads: from L2, whatever comes from memory first."""
        return self.flops / self.loaded


@dataclass(frozen=True, slots=True)
class Bound:
    """Clocks that a step takes of each resource of one multiprocessor."""

    tensor: float
    exponential: float
    issue: float
    memory: float  # where no other program finds the tile in L2

    @property
    def resource(self) -> str:
        """What takes longest, memory left out: see `reuse`."""
        clocks = {"tensor cores": self.tensor, "exponentials": self.exponential, "instructions": self.issue}
        return max(clocks, key=lambda name: clocks[name])

    @property
    def overlapped(self) -> float:
        """Share of the tensor cores' peak where everything overlaps."""
        return self.tensor / max(self.tensor, self.exponential, self.issue)

    @property
    def in_turn(self) -> float:
        """The same where one program is alone and does nothing while it waits for its products."""
        return self.tensor / (self.tensor + max(self.exponential, self.issue))

    @property
    def reuse(self) -> float:
        """Programs that must find a tile in L2 for each that fetches it, so that memory does not bound the step."""
        return self.memory / max(self.tensor, self.exponential, self.issue)


def bound(step: Step, accelerator: Accelerator, instructions: int, warps: int) -> Bound:
    """`instructions`: those that each of `warps` warps issues in a step."""
    return Bound(
        tensor=step.flops / accelerator.tensor,
        exponential=step.exponentials / EXPONENTIALS,
        issue=instructions * warps / ISSUES,
        memory=step.loaded / accelerator.memory_per_clock,
    )


_REGISTERS = 1 << 16
_WARPS = 64
_SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}  # bytes of a multiprocessor
_RESERVED = 1 << 10  # bytes of shared memory that each program takes beside its own


def programs_that_fit(architecture: int, registers: int, warps: int, shared: int) -> int:
    """How many programs a multiprocessor holds at a time: `registers` of a thread, `shared` bytes of a program.

    Limits as in the CUDA programming guide (table of compute capabilities); registers go to warps by 256.
    """
    per_warp = -(-registers * 32 // 256) * 256
    return min(
        _REGISTERS // (per_warp * warps), _WARPS // warps, _SHARED[architecture] // (shared + _RESERVED)
    )  # fmt: skip


def idle_share(steps: Sequence[int], places: int) -> float:
    """Share of the places' time without work, where programs of so many steps each start longest first as places free.

    Longest first is within a third of the best that any order without splitting reaches (Graham, 1969): what idles
    beyond that is one program longer than all others' share.
    """
    ends = [0] * places
    for each in sorted(steps, reverse=True):
        heapq.heapreplace(ends, ends[0] + each)
    return 1 - sum(steps) / (places * max(ends)) if max(ends) else 0.0
