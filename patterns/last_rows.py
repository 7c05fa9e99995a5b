"""A wrapper that any pattern can wear: the last queries attend densely.

The idea stands in MInference's tri-shape (arXiv:2407.02490, section 4): the question usually closes the prompt, and its
few rows are cheap.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.estimators.selection import check_tokens
from sparseprefill.patterns.expected_density import expected_density


class Pattern(Protocol):
    """Anything that names blocks: the verb of this room."""

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        """The blocks each row of the grid attends to.

        The index must stand on this grid and keep the promises of `BlockIndex`. A pattern that cannot serve the grid or
        the number of heads raises ValueError; `patch_model` asks each once, so that this shows before a model changes.
        """
        ...


@dataclass(frozen=True, slots=True)
class LastRowsDense:
    """`pattern`, but rows that hold one of the last `rows` queries of a call (and right padding) see all.

    In a chunked prefill each chunk has last queries of its own.
    """

    pattern: Pattern  # for all other rows
    rows: int  # queries, at least 1

    def __post_init__(self) -> None:
        check_tokens("last rows", self.rows)

    def for_layer(self, layer: int) -> LastRowsDense:
        """What the wrapped pattern is in this layer."""
        own = getattr(self.pattern, "for_layer", None)
        return LastRowsDense(own(layer), self.rows) if callable(own) else self

    def expecting(self, density: float) -> LastRowsDense:
        """The wrapped pattern told what density it comes to, if it wants to know."""
        own = getattr(self.pattern, "expecting", None)
        return LastRowsDense(own(density), self.rows) if callable(own) else self

    @property
    def together(self) -> tuple[Any, ...]:
        """As the wrapped pattern's, which must have it; see `sparseprefill.patterns.per_head`."""
        wrapped: Any = self.pattern
        return LastRowsDense, self.rows, wrapped.together

    @staticmethod
    def build_together(patterns: Sequence[LastRowsDense], inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        """One wrapped pattern a head, all of one `together`."""
        wrapped: list[Any] = [each.pattern for each in patterns]
        return patterns[0]._with_last_rows(wrapped[0].build_together(wrapped, inputs, grid), inputs, grid)

    def expected_density(self, keys: int) -> float:
        return min(1.0, expected_density(self.pattern, keys) + 2 * self.rows / keys)

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        return self._with_last_rows(self.pattern.build_index(inputs, grid), inputs, grid)

    @property
    def in_parts(self) -> bool:
        """As the wrapped pattern; see `sparseprefill.patterns.parts`."""
        return getattr(self.pattern, "in_parts", False)

    def build_parts(self, inputs: AttentionInputs, grid: BlockGrid) -> tuple[Any, ...]:
        """The last rows see the keys as they are, and nothing of the other parts."""
        wrapped: Any = self.pattern
        first, *others = wrapped.build_parts(inputs, grid)
        last = self._last(inputs, grid)[:, None]
        made = [dataclasses.replace(first, index=self._with_last_rows(first.index, inputs, grid))]
        for part in others:
            if part.order is not None:
                raise ValueError(
                    f"{type(self.pattern).__name__} sorts queries, so that its last rows are not the last queries: "
                    "leave out last_rows_dense"
                )
            count = part.index.count.masked_fill(last, 0)
            made.append(dataclasses.replace(part, index=dataclasses.replace(part.index, count=count)))
        return tuple(made)

    @property
    def correct(self) -> Any:
        """As the wrapped pattern's; see `sparseprefill.patterns.parts.corrected`. The last rows are exact already."""
        own: Any = self.pattern
        return own.correct  # AttributeError where there is none, so that this has none either

    def _last(self, inputs: AttentionInputs, grid: BlockGrid) -> Tensor:
        """bool [batch, rows]: rows that hold one of the last queries."""
        return grid.row_slots()[1] > (inputs.tail() - self.rows)[:, None]

    def _with_last_rows(self, sparse: BlockIndex, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        dense = BlockIndex.dense(inputs, grid)
        last = self._last(inputs, grid)[:, None].expand(sparse.start.shape)
        return BlockIndex(
            grid,
            torch.cat([dense.columns, sparse.columns]),
            torch.where(last, dense.start, sparse.start + dense.columns.numel()),
            torch.where(last, dense.count, sparse.count),
            sparse.unjudged,
            None if sparse.visit is None else torch.cat([dense.columns, sparse.visit]),
            None if sparse.skip is None else sparse.skip.masked_fill(last, -torch.inf),
            sparse.shared_by,
        )
