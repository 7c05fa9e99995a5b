"""What a patched model did, as numbers and as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer, summed over all calls since it was patched. Lists have one entry a query head."""

    layer: int  # its number
    pattern: str  # in words
    sparse_calls: int  # attention calls that ran sparsely
    previous_calls: dict[str, int]  # reason: how many calls ran on the previous implementation for it
    kernels: dict[str, int]  # implementation: calls
    density: list[float] | None  # of the sparse calls; None where there was none
    tile_work: list[float] | None  # as density, in whole tiles; both are defined in `sparseprefill.coverage`
    kept_mass: list[float] | None  # on sampled query rows; None where none was sampled
    estimator_seconds: float  # finding the blocks
    kernel_seconds: float  # attention over them
    guard_checks: int = 0  # batch rows of calls that the guard looked at, with every head
    guard_reruns: list[int] | None = None  # how many of these a head failed, so that it ran again with full rows
    guard_lowest_mass: list[float] | None = None  # the least that any sampled row kept, before anything ran again
    guard_seconds: float = 0.0  # of the checks; in neither of the two above
    rerun_seconds: float = 0.0  # of what ran again; likewise
    first_head: int = 0  # which query head the lists begin with: under tensor parallelism a process has some of them
    overhead: float | None = None  # estimator_seconds over those of dense attention, reckoned from kernel_seconds
    unjudged: int = 0  # queries whose row was kept whole, as the estimator could not judge them
    context_share: list[float] | None = None  # of a fixed context, the keys attended to over all; None without one


@dataclass(frozen=True, slots=True)
class PatchReport:
    """All layers of a patched model. `str()` gives a table, `to_dict()` what JSON can hold."""

    method: str  # its name, or its pattern in words
    decision: str  # what chooses between sparse and dense
    layers: tuple[LayerReport, ...]  # patched layers, in order
    warnings: dict[str, int] = field(default_factory=dict)  # what was warned of when the model was patched: how often

    @property
    def density(self) -> float | None:
        """Mean over the heads of all layers that ran sparsely."""
        return _mean(x for layer in self.layers for x in layer.density or ())

    @property
    def tile_work(self) -> float | None:
        """As `density`."""
        return _mean(x for layer in self.layers for x in layer.tile_work or ())

    @property
    def kept_mass(self) -> float | None:
        """As `density`."""
        return _mean(x for layer in self.layers for x in layer.kept_mass or ())

    @property
    def context_share(self) -> float | None:
        """As `density`."""
        return _mean(x for layer in self.layers for x in layer.context_share or ())

    @property
    def sparse_calls(self) -> int:
        """Attention calls that ran sparsely, over all layers."""
        return sum(layer.sparse_calls for layer in self.layers)

    @property
    def previous_calls(self) -> dict[str, int]:
        """Attention calls left to the previous implementation, over all layers, by reason."""
        return summed(layer.previous_calls for layer in self.layers)

    @property
    def kernels(self) -> dict[str, int]:
        """Sparse attention calls by the implementation that computed them."""
        return summed(layer.kernels for layer in self.layers)

    @property
    def guard_checks(self) -> int:
        """How often the guard looked at a head, over all layers."""
        return sum(layer.guard_checks * len(layer.guard_reruns or ()) for layer in self.layers)

    @property
    def guard_reruns(self) -> int:
        """How often a head failed and ran again, over all layers."""
        return sum(sum(layer.guard_reruns or ()) for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [
            [
                str(layer.layer), layer.pattern, str(layer.sparse_calls), str(sum(layer.previous_calls.values())),
                number(_mean(layer.density or ())), number(_mean(layer.tile_work or ())),
                number(_mean(layer.kept_mass or ())), number(min(layer.kept_mass or (math.nan,))),
                f"{layer.estimator_seconds:.3f}", number(layer.overhead), f"{layer.kernel_seconds:.3f}",
                *self._guard_cells(layer),
            ]
            for layer in self.layers
        ]  # fmt: skip
        head = [
            "layer", "pattern", "sparse calls", "other calls", "density", "tile work", "kept mass", "worst head",
            "estimator s", "overhead", "kernel s", *(_GUARD_HEAD if self.guard_checks else ()),
        ]  # fmt: skip
        lines = [f"method {self.method}; {self.decision}", table(head, rows)]
        lines += [f"on the previous implementation: {n} calls, {why}" for why, n in self.previous_calls.items()]
        if self.guard_checks:
            lines.append(f"guard: {self.guard_reruns} of {self.guard_checks} checked heads ran again with full rows")
        if self.context_share is not None:
            lines.append(f"of the context, {self.context_share:.3f} of the keys were attended to")
        unjudged = sum(layer.unjudged for layer in self.layers)
        if unjudged:
            lines.append(f"{unjudged} queries could not be judged by the estimator, so that their rows were kept whole")
        lines += [f"warning: {text} ({count} x)" for text, count in self.warnings.items()]
        return "\n".join(lines)

    def _guard_cells(self, layer: LayerReport) -> list[str]:
        if not self.guard_checks:
            return []
        return [
            str(sum(layer.guard_reruns or ())), number(min(layer.guard_lowest_mass or (math.nan,))),
            f"{layer.guard_seconds:.3f}", f"{layer.rerun_seconds:.3f}",
        ]  # fmt: skip


_GUARD_HEAD = ("re-runs", "lowest row", "guard s", "re-run s")


def summed(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """Counts added by name."""
    total: dict[str, int] = {}
    for each in counts:
        for name, count in each.items():
            total[name] = total.get(name, 0) + count
    return total


def _mean(values: Iterable[float]) -> float | None:
    kept = [value for value in values if not math.isnan(value)]
    return math.fsum(kept) / len(kept) if kept else None


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table; a dash where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers in words: [0, 1, 2, 5] is "0-2, 5"."""
    parts: list[list[int]] = []
    for each in numbers:
        if parts and each == parts[-1][-1] + 1:
            parts[-1].append(each)
        else:
            parts.append([each])
    return ", ".join(f"{part[0]}" if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool = False) -> str:
    """Columns in line, the first left, the others right where every entry is a number."""
    widths = [max(len(str(row[c])) for row in [head, *rows]) for c in range(len(head))]
    right = [bool(rows) and all(_is_number(row[c]) for row in rows) for c in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [str(x).rjust(w) if r else str(x).ljust(w) for x, w, r in zip(row, widths, right, strict=True)]
        return ("| " + " | ".join(cells) + " |") if markdown else "  ".join(cells).rstrip()

    rule = [("-" * (w - 1) + ":") if r else "-" * w for w, r in zip(widths, right, strict=True)]
    middle = "| " + " | ".join(rule) + " |" if markdown else "  ".join("-" * w for w in widths)
    return "\n".join([line(head), middle, *map(line, rows)])


def _is_number(text: str) -> bool:
    return text == "-" or text.lstrip("-+").replace(".", "", 1).rstrip("%x s").isdigit()
