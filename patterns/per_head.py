"""A pattern of its own for each head."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.patterns.expected_density import expected_density
from sparseprefill.patterns.last_rows import LastRowsDense, Pattern


def carries(pattern: Any) -> bool:
    """Whether a pattern, or one inside of it, carries something from call to call: `stateful`."""
    return bool(getattr(pattern, "stateful", False)) or any(map(carries, inside(pattern)))


def inside(pattern: Any) -> list[Any]:
    """The patterns that one goes around, or is made of."""
    found = [getattr(pattern, name, None) for name in ("inner", "other", "pattern")]
    found += pattern.patterns if isinstance(pattern, PerHead) else ()
    return [each for each in found if callable(getattr(each, "build_index", getattr(each, "build_parts", None)))]


@dataclass(frozen=True, slots=True)
class PerHead:
    """Head h follows patterns[h]. Heads with equal patterns are estimated together.

    So are heads with different patterns that have an equal `together` (anything hashable): their class is then asked
    for `build_together(patterns, inputs, grid)`, with one pattern for each head of the inputs.

    Raises ValueError for a pattern that works in parts (`sparseprefill.patterns.parts`), and in `build_index` where
    there are not as many patterns as query heads.
    """

    patterns: tuple[Pattern, ...]  # [query_heads]

    def __post_init__(self) -> None:
        for each in self.patterns:
            if hasattr(each, "correct"):
                raise ValueError(
                    f"{type(each).__name__} changes the outputs of a whole layer and cannot be the pattern of some "
                    "heads: give it to whole layers, or put a pattern for each head inside it"
                )
            if carries(each):
                raise ValueError(
                    f"{type(each).__name__} carries something from layer to layer and cannot be the pattern of some "
                    "heads: give it to whole layers, or put a pattern for each head inside it"
                )
            if getattr(each, "in_parts", False):
                raise ValueError(
                    f"{type(each).__name__} lays the keys of a whole layer in another order and cannot be the pattern "
                    "of some heads: give it to whole layers, or put a pattern for each head inside it"
                )

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        if len(self.patterns) != inputs.query_heads:
            raise ValueError(f"{len(self.patterns)} patterns for {inputs.query_heads} query heads")
        groups: dict[Any, list[int]] = {}
        for head, pattern in enumerate(self.patterns):
            groups.setdefault(getattr(pattern, "together", pattern), []).append(head)
        parts = [(heads, self._build(heads, inputs.select_heads(heads), grid)) for heads in groups.values()]
        return BlockIndex.merge(parts, inputs.query_heads)

    def expected_density(self, keys: int) -> float:
        return math.fsum(expected_density(each, keys) for each in self.patterns) / len(self.patterns)

    def _build(self, heads: Sequence[int], inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        patterns: list[Any] = [self.patterns[head] for head in heads]
        if not hasattr(patterns[0], "together"):
            index: BlockIndex = patterns[0].build_index(inputs, grid)
            return index
        index = patterns[0].build_together(patterns, inputs, grid)
        return index


def of_heads(pattern: Pattern, heads: Sequence[int]) -> Pattern:
    """The part of a layer's pattern that some of its heads follow."""
    if isinstance(pattern, PerHead):
        return PerHead(tuple(pattern.patterns[head] for head in heads))
    if isinstance(pattern, LastRowsDense):
        return dataclasses.replace(pattern, pattern=of_heads(pattern.pattern, heads))
    if hasattr(pattern, "inner"):  # a wrapper
        wrapper: Any = pattern
        wrapped = {name: getattr(wrapper, name) for name in ("inner", "other") if hasattr(wrapper, name)}
        changed: Pattern = dataclasses.replace(wrapper, **{name: of_heads(own, heads) for name, own in wrapped.items()})
        return changed
    return pattern
