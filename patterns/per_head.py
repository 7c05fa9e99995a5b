"""A pattern of its own for each head."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.patterns.last_rows import LastRowsDense, Pattern


@dataclass(frozen=True, slots=True)
class PerHead:
    """Head h follows patterns[h]. Heads with equal patterns are estimated together.

    `build_index` raises ValueError where there are not as many patterns as query heads.
    """

    patterns: tuple[Pattern, ...]  # [query_heads]

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        if len(self.patterns) != inputs.query_heads:
            raise ValueError(f"{len(self.patterns)} patterns for {inputs.query_heads} query heads")
        groups: dict[Pattern, list[int]] = {}
        for head, pattern in enumerate(self.patterns):
            groups.setdefault(pattern, []).append(head)
        parts = [(heads, pattern.build_index(inputs.select_heads(heads), grid)) for pattern, heads in groups.items()]
        return BlockIndex.merge(parts, inputs.query_heads)


def of_heads(pattern: Pattern, heads: Sequence[int]) -> Pattern:
    """The part of a layer's pattern that some of its heads follow."""
    if isinstance(pattern, PerHead):
        return PerHead(tuple(pattern.patterns[head] for head in heads))
    if isinstance(pattern, LastRowsDense):
        return dataclasses.replace(pattern, pattern=of_heads(pattern.pattern, heads))
    return pattern
