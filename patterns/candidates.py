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
