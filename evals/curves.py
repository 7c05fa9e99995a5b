"""What came out of a comparison, as plain numbers: a method's sweep on a group of heads, times, refusals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

STATIC = "static"
"""Kind of the methods that do not look at the prompt: the controls."""

MEASURES = ("mass", "error")
"""By which methods are compared: kept mass, more is better; or the error of the output, less is."""

AXES = ("density", "work")
"""At which methods are compared: pairs of computed tiles; or these tiles and the work of finding them."""

_AT_DENSE = {"error": 0.0}  # of dense attention, which closes each curve; all else is 1 there


@dataclass(frozen=True, slots=True)
class Curve:
    """A family on a group: means over its heads, one entry a knob."""

    group: str
    tile: tuple[int, int]  # queries and keys of a tile
    family: str
    knob: tuple[float, ...]  # of `PER_HEAD`: mass that a share of density must bring
    density: tuple[float, ...]
    mass: tuple[float, ...]  # kept, mean over queries
    low_mass: tuple[float, ...]  # kept at least by all but the quantile of the queries
    estimator: tuple[float, ...]  # work of finding the blocks, in the unit of tile_work
    found: tuple[float, ...] | None = None  # share of the queries behind a needle whose list has it
    agreement: tuple[float, ...] | None = None  # with the lists of the exact family: shared over all, by tiles
    drawn: bool = True
    work: tuple[float, ...] | None = None  # tile_work and estimator
    error: tuple[float, ...] | None = None  # of the output: |sparse - dense| / |dense|, over all queries of a head
    kind: str = "selector"  # of the method, see `MethodRow`
    native: bool = False  # this tile is the one of the method's paper
    repeats: str | None = None  # of a wrapper that is swept by the knob of another method: that method

    @property
    def control(self) -> bool:
        """Shown to compare with, and not ranked: what is static, and what is another method once more."""
        return self.kind == STATIC or self.repeats is not None

    def at(self, place: float, what: str = "mass", axis: str = "density") -> float | None:
        """A figure at this density or work; None where the family cannot be so sparse. Dense closes each curve."""
        values, places = getattr(self, what), getattr(self, axis)
        if values is None or places is None or place < min(places):
            return None
        order = sorted(range(len(places)), key=lambda n: (places[n], values[n]))
        end = 1.0 if axis == "density" else max(1.0 + self.estimator[order[-1]], places[order[-1]])
        ordered = [values[n] for n in order]
        return float(np.interp(place, [*(places[n] for n in order), end], [*ordered, _AT_DENSE.get(what, 1.0)]))

    def knob_at(self, density: float) -> float:
        """The knob at this density, on the line between the two of the sweep around it; a whole one where all are.

        Raises ValueError for a density that the sweep does not reach.
        """
        order = sorted(range(len(self.density)), key=lambda n: self.density[n])
        low, high = self.density[order[0]], self.density[order[-1]]
        if not low <= density <= high:
            raise ValueError(
                f"{self.family} has densities of {low:.3g} to {high:.3g} on {self.group!r}, and {density:g} is not "
                "among them"
            )
        found = float(np.interp(density, [self.density[n] for n in order], [self.knob[n] for n in order]))
        return round(found) if all(isinstance(each, int) for each in self.knob) else float(f"{found:.4g}")


@dataclass(frozen=True, slots=True)
class Refusal:
    """A family that cannot be on some tiles, and why."""

    group: str
    tile: tuple[int, int]
    family: str
    reason: str


@dataclass(frozen=True, slots=True)
class SelectorTime:
    """One setting of a method on one of the inputs; all but `dense` over the time of torch's dense attention."""

    group: str
    tile: tuple[int, int]
    family: str
    knob: float
    density: float  # on these inputs
    find: float  # finding the blocks
    attend: float  # attention over them
    dense: float  # seconds of torch's dense causal attention
    kernel: float  # the same kernel over all blocks

    @property
    def total(self) -> float:
        """Finding and attention, over dense attention."""
        return self.find + self.attend
