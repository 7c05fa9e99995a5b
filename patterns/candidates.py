"""The patterns that a profiler chooses from: families of the methods, each at budgets that scale with length."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparseprefill.estimators.selection import check_share
from sparseprefill.patterns.a_shape import AShape
from sparseprefill.patterns.block_sparse import BlockSparse
from sparseprefill.patterns.dense import Dense
from sparseprefill.patterns.last_rows import Pattern
from sparseprefill.patterns.random_blocks import RandomBlocks
from sparseprefill.patterns.sale import Sale
from sparseprefill.patterns.sale_search import ladder
from sparseprefill.patterns.tri_shape import TriShape
from sparseprefill.patterns.vertical_slash import VerticalSlash


@dataclass(frozen=True, slots=True)
class Candidate:
    """One pattern, and whether a head may get it."""

    family: str  # name of its method
    pattern: Pattern  # with its budget
    control: bool = False  # scored for comparison, never chosen

    @property
    def label(self) -> str:
        """As methods are named on the command line, with every option that is set."""
        pattern: Any = self.pattern  # a user's own need not be a dataclass
        if not dataclasses.is_dataclass(pattern) or isinstance(pattern, type):
            return self.family
        values = {field.name: getattr(pattern, field.name) for field in dataclasses.fields(pattern)}
        options = ",".join(f"{name}={value}" for name, value in values.items() if value is not None)
        return f"{self.family}:{options}" if options else self.family


SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
"""Budgets of each family, shares of what a row (vertical-slash: the whole call) sees."""

WINDOWS = (128, 256)
"""Windows of A-shape in tokens: a head that looks at its neighbours needs no more of them in a longer prompt."""

_SINK = 64  # first tokens that every family keeps


def candidates(shares: Sequence[float] = SHARES, windows: Sequence[int] = WINDOWS) -> tuple[Candidate, ...]:
    """Dense, and every selector and static pattern at these budgets; random blocks as the control.

    SALE is not among them: it looks at every pair of a query and a key, and in plain torch its estimate takes longer
    than all of theirs together. `sale_candidates` has it by itself.

    Raises ValueError or TypeError for budgets that are none.
    """
    for share in shares:
        check_share("a share", share)
    return (
        Candidate("dense", Dense()),
        *(Candidate("a_shape", AShape(_SINK, window)) for window in (*windows, *shares)),
        *(Candidate("tri_shape", TriShape(_SINK, share, 128)) for share in shares),
        *(Candidate("vertical_slash", VerticalSlash(density=share)) for share in shares),
        *(Candidate("block_sparse", BlockSparse(share)) for share in shares),
        *(Candidate("random", RandomBlocks(share), control=True) for share in shares),
    )


THRESHOLDS = (0.9, 0.7, 0.5, 0.36, 0.256, 0.18, 0.128, 0.09, 0.064, 0.032, 0.016, *ladder())
"""Thresholds of SALE, largest first: those of its own calibration, and larger ones, which diffuse heads need to skip
anything.
"""


def sale_candidates(thresholds: Sequence[float] = THRESHOLDS, **options: Any) -> tuple[Candidate, ...]:
    """Dense, and SALE at these thresholds with these options of `Sale`; one estimate serves them all.

    Raises ValueError or TypeError for no threshold, for thresholds that are none, for options that SALE has not, and
    for its two budgets, which are what is looked for.
    """
    known = [field.name for field in dataclasses.fields(Sale)]
    for name in options:
        if name in ("threshold", "keep"):
            raise ValueError(f"the threshold of each head is what is looked for: leave {name} out")
        if name not in known:
            raise ValueError(f"sale has no option {name!r:.80}; its options: {', '.join(known)}")
    if not thresholds:
        raise ValueError("there is no threshold to choose from: give at least one")
    return Candidate("dense", Dense()), *(Candidate("sale", Sale(each, **options)) for each in thresholds)


def candidates_of(method: str, **options: Any) -> tuple[Candidate, ...]:
    """Dense, and one method at its budgets: those of `candidates`, or of `sale_candidates` with its options.

    Raises ValueError for a method that has none, and for options of another method than "sale".
    """
    if method == "sale":
        return sale_candidates(**options)
    families = [*dict.fromkeys(each.family for each in candidates()[1:] if not each.control), "sale"]
    if method not in families:
        raise ValueError(f"no budgets of {method!r:.80} to choose from: name one of {', '.join(families)}")
    if options:
        raise ValueError(f"the budgets of {method} come with their options: leave {', '.join(options)} out")
    return tuple(each for each in candidates() if each.family in ("dense", method))
