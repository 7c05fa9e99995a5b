"""What finding the blocks will take before anything was looked at: what the cost model reckons with.

A pattern says it by its method `expected_overhead(device, head_dim, block_q, block_k) -> Overhead`, which is asked
through the function of that name. What patterns state is counted products times a rate that was measured once for this
kind of device, rounded up; `sparseprefill bench --calibrate` measures it on the machine itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sparseprefill.patterns.last_rows import LastRowsDense
from sparseprefill.patterns.per_head import PerHead


@dataclass(frozen=True, slots=True)
class Overhead:
    """Time of finding the blocks of one call, in (query, key) pairs of dense attention: see `pairs`."""

    share: float = 0.0  # of the call's own pairs, for what looks at all of them, or at all tiles
    per_key: float = 0.0  # pairs for each key, for what looks at tokens or at a few queries
    fixed_tokens: int = 0  # at any length, as the length of a dense causal prefill

    def pairs(self, dense: float, keys: int) -> float:
        """share * dense + per_key * keys + fixed_tokens**2 / 2, where dense attention has `dense` pairs."""
        return self.share * dense + self.per_key * keys + self.fixed_tokens**2 / 2

    def __add__(self, other: Overhead) -> Overhead:
        """Of one after the other."""
        fixed = math.hypot(self.fixed_tokens, other.fixed_tokens)
        return Overhead(self.share + other.share, self.per_key + other.per_key, _rounded_up(fixed))

    def describe(self) -> str:
        """In words."""
        said = [
            f"{self.share:.3g} x dense" if self.share else "",
            f"{self.per_key:.3g} pairs a key" if self.per_key else "",
            f"a dense prefill of {self.fixed_tokens} tokens" if self.fixed_tokens else "",
        ]
        return " + ".join(each for each in said if each) or "nothing"


NOTHING = Overhead()


@dataclass(frozen=True, slots=True)
class Rates:
    """What estimators take on one kind of device, in pairs of dense attention of the same head_dim."""

    product: float  # a counted product of a query and a key takes this,
    product_channels: float  # and this over head_dim: masks, exponentials and sums do not grow with it
    tile: float  # over head_dim, a tile: its ranking, and its place in a list
    steps: int  # as the length of a dense causal prefill: the many small calls of an estimator, at any length


RATES = {"cpu": Rates(0.5, 100.0, 5000.0, 500), "cuda": Rates(0.5, 100.0, 5000.0, 4096)}
"""By kind of device. The CPU's are rounded up from `sparseprefill bench --calibrate` with every method; the GPU's are
assumptions.
"""


def stated_overhead(
    device: torch.device, head_dim: int, *, pairs: float = 0.0, keys: float = 0.0, tiles: float = 0.0,
    steps: float = 1.0, share: float = 0.0,
) -> Overhead:  # fmt: skip
    """Counted work times the rates of a kind of device.

    Args:
        device: where it runs.
        head_dim: of queries and keys.
        pairs: products of a query and a key, for each pair of dense attention.
        keys: products for each key.
        tiles: tiles ranked and listed for each pair, 1 / (block_q * block_k) where all are.
        steps: as much time as those of a typical estimator, so often.
        share: of dense attention's time, for what has a measured rate of its own.
    """
    rates = RATES.get(device.type, RATES["cuda"])
    product = rates.product + rates.product_channels / head_dim
    return Overhead(
        share + pairs * product + tiles * rates.tile / head_dim, keys * product, math.ceil(rates.steps * steps**0.5)
    )


def expected_overhead(
    pattern: Any, device: torch.device, head_dim: int, block_q: int, block_k: int,
    measured: Mapping[str, Overhead] | None = None,
) -> Overhead:  # fmt: skip
    """What was measured of a pattern's estimator, by `estimator_name`, else what the pattern states, else nothing.

    A user's object may have `expected_overhead(device, head_dim, block_q, block_k)`, which may give a share alone.
    """
    if isinstance(pattern, PerHead):
        each = {own: expected_overhead(own, device, head_dim, block_q, block_k, measured) for own in pattern.patterns}
        groups = {getattr(own, "together", own): found.fixed_tokens for own, found in each.items()}
        heads = len(pattern.patterns)
        return Overhead(  # what grows is shared out over the heads, each group of heads makes its own calls
            math.fsum(each[own].share for own in pattern.patterns) / heads,
            math.fsum(each[own].per_key for own in pattern.patterns) / heads,
            _rounded_up(math.hypot(*groups.values())),
        )
    if isinstance(pattern, LastRowsDense):
        return expected_overhead(pattern.pattern, device, head_dim, block_q, block_k, measured)
    if measured:
        found = measured.get(estimator_name(pattern))
        if found is not None:
            return found
    own = getattr(pattern, "expected_overhead", None)
    if not callable(own):
        return NOTHING
    told = own(device, head_dim, block_q, block_k)
    return told if isinstance(told, Overhead) else Overhead(share=float(told))


def estimator_name(pattern: Any) -> str:
    """What a measured overhead is kept under: patterns whose budgets alone differ find their blocks in the same way."""
    name = type(pattern).__name__
    if hasattr(pattern, "inner"):  # a wrapper
        own = [
            getattr(pattern, each.name) for each in dataclasses.fields(pattern) if each.name != "inner" and each.repr
        ]
        return f"{name}({', '.join(map(str, own))}) around {estimator_name(pattern.inner)}"
    family: Any = getattr(pattern, "family", None)
    family = getattr(pattern, "estimated_by", ()) if family is None else family
    told = ", ".join(str(each) for each in family if not isinstance(each, type))
    return f"{name}({told})" if told else name


def _rounded_up(tokens: float) -> int:
    return math.ceil(tokens - 1e-6)  # what rounding added is no token
