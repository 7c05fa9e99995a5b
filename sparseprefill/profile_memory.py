"""How much memory is left for profiling, and which prompt length that is enough for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated where a model computes; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines() if ":" in line)
    free = int(lines["MemAvailable"].split()[0]) * 1024
    for most, used in _LIMITS:  # of the container, if it has one
        if most.is_file() and used.is_file():
            limit = most.read_text(encoding="ascii").strip()
            if limit.isdigit():
                free = min(free, max(0, int(limit) - int(used.read_text(encoding="ascii"))))
    return free


_GROUPS = Path("/sys/fs/cgroup")
_LIMITS = (
    (_GROUPS / "memory.max", _GROUPS / "memory.current"),
    (_GROUPS / "memory/memory.limit_in_bytes", _GROUPS / "memory/memory.usage_in_bytes"),
)


def longest_that_fits(need: Callable[[int], int], free: int, below: int) -> int | None:
    """The largest multiple of 256 tokens below `below` with need(tokens) <= free; None where not even 256 do.

    `need` must not fall.
    """
    low, high = 0, (below - 1) // 256
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if need(middle * 256) <= free else (low, middle - 1)
    return low * 256 or None


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception is an allocation that failed, on a GPU or on the CPU."""
    text = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text
