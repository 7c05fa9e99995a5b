"""Many patterns over the same inputs, as the profiler asks them; and what finding the blocks costs.

Patterns that differ in their budgets alone form a family: the estimate is made once, and each budget cuts it. A pattern
takes part with

    family      anything hashable; patterns of one family share estimates
    estimate(inputs, grid)              what the family looks at, once
    choose(estimate, inputs, grid)      the same index as build_index

and says what the estimate costs with `estimator_products(inputs, grid)`: products of a query and a key, head_dim
multiplications each, for one head. A pattern without these is asked for its index alone, and costs nothing to find:
that is right for a static one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.patterns.last_rows import LastRowsDense, Pattern
from sparseprefill.patterns.per_head import PerHead


def build_indexes(
    patterns: Sequence[Pattern], inputs: AttentionInputs, grid: BlockGrid
) -> Iterator[tuple[int, BlockIndex]]:
    """(its place in `patterns`, its index) of each pattern, family by family; one estimate is held at a time."""
    families: dict[Any, list[int]] = {}
    alone = object()
    for place, pattern in enumerate(patterns):
        families.setdefault(getattr(pattern, "family", (alone, place)), []).append(place)
    for places in families.values():
        if not hasattr(patterns[places[0]], "family"):
            yield places[0], patterns[places[0]].build_index(inputs, grid)
            continue
        first: Any = patterns[places[0]]
        estimate = first.estimate(inputs, grid)
        for place in places:
            own: Any = patterns[place]
            yield place, own.choose(estimate, inputs, grid)


def estimator_work(pattern: Pattern, inputs: AttentionInputs, grid: BlockGrid, dense_tiles: int) -> float:
    """Work of finding the blocks, in the unit of tile_work: over that of the tiles of dense attention, of one head.

    A product of a query and a key is head_dim multiplications; dense attention makes one, and value_dim more, for each
    pair of a tile.
    """
    pairs = dense_tiles * grid.block_q * grid.block_k * (inputs.head_dim + inputs.value_dim)
    return products_of(pattern, inputs, grid) * inputs.head_dim / pairs


def products_of(pattern: Any, inputs: AttentionInputs, grid: BlockGrid) -> float:
    """Products of a query and a key that the estimate makes, for one head."""
    if isinstance(pattern, LastRowsDense):
        return products_of(pattern.pattern, inputs, grid)
    if isinstance(pattern, PerHead):  # the mean over heads
        return sum(products_of(each, inputs, grid) for each in pattern.patterns) / len(pattern.patterns)
    own = getattr(pattern, "estimator_products", None)
    return float(own(inputs, grid)) if callable(own) else 0.0
