"""How many tiles a pattern will compute, before there is a prompt: counted on tiles, not reckoned from tokens.

After the simulator of Hassani et al., "Generalized Neighborhood Attention", 2025, arXiv:2504.16922: what a kernel
visits are tiles, and a window that is aligned with them costs less than one that is not. A pattern says by its method
`tile_law() -> str` what its number of tiles depends on:

    "positions"  where tokens stand and nothing else: all static patterns
    "count"      so many tiles a row, whichever they are: budgets of selectors
    "content"    what the prompt says: thresholds, masses, columns that more rows see the earlier they stand

A pattern without the method is taken for the last. The first two are counted exactly, on inputs of zeros (by a cheaper
pattern that keeps as many, where `counted_as() -> Pattern` names one); of the last
an interval is known: what is kept in any case, and everything, or less where the pattern has `most_density(keys) ->
float`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from sparseprefill.contracts import AttentionInputs, BlockGrid
from sparseprefill.coverage import coverage
from sparseprefill.patterns.block_sparse import forced_blocks
from sparseprefill.patterns.last_rows import LastRowsDense
from sparseprefill.patterns.parts import parts_coverage, parts_of
from sparseprefill.patterns.per_head import PerHead

LAWS = ("positions", "count", "content")


@dataclass(frozen=True, slots=True)
class TileCount:
    """Tiles of one layer and prompt, summed over its query heads."""

    dense: int  # of causal attention without a window
    low: int  # at least
    high: int  # at most; the same where they are known
    law: str  # one of LAWS

    @property
    def exact(self) -> bool:
        """Whether the number is known."""
        return self.low == self.high

    def share(self, tiles: float | None = None) -> float:
        """Of dense attention's tiles: `tiles`, or the most."""
        return (self.high if tiles is None else tiles) / self.dense


def tile_law(pattern: Any) -> str:
    """What the number of tiles of a pattern depends on: one of `LAWS`."""
    if isinstance(pattern, PerHead):
        laws = {tile_law(each) for each in pattern.patterns}
        return max(laws, key=LAWS.index)
    if isinstance(pattern, LastRowsDense):
        return tile_law(pattern.pattern)
    own = getattr(pattern, "tile_law", None)
    return str(own()) if callable(own) else "content"


def count_tiles(
    pattern: Any, *, keys: int, query_heads: int, kv_heads: int, block_q: int, block_k: int,
    window: int | None = None, chunk: int | None = None,
) -> TileCount:  # fmt: skip
    """The tiles of one prefill of `keys` tokens, from the start, without padding.

    `window` and `chunk`: of a layer that is local by design, which keeps all of either and whose pattern is not asked.
    Raises what the pattern refuses on such tiles.
    """
    counted_as = getattr(pattern, "counted_as", None)
    pattern = counted_as() if callable(counted_as) else pattern
    law = tile_law(pattern)
    heads, groups = (query_heads, kv_heads) if law == "positions" or isinstance(pattern, PerHead) else (1, 1)
    local = window is not None or chunk is not None
    if local:
        heads, groups = 1, 1
    inputs = _zeros(keys, heads, groups)
    grid = BlockGrid.of(inputs, block_q, block_k)
    dense = int((-(-(torch.arange(1, grid.rows + 1) * block_q).clamp(max=keys) // block_k)).sum())
    times = query_heads // heads
    if local:
        segment = None if chunk is None else (torch.arange(keys) // chunk)[None]
        low, high = grid.visible_blocks(dataclasses.replace(inputs, window=window, segment=segment))
        own = int((high - low).sum())
        return TileCount(dense * query_heads, own * query_heads, own * query_heads, "positions")
    if law != "content":
        parts = parts_of(pattern, inputs, grid)
        tiles = parts_coverage(parts).tiles if len(parts) > 1 else coverage(inputs, parts[0].index).tiles
        counted = int(tiles.sum()) * times
        return TileCount(dense * query_heads, counted, counted, law)
    least = forced_blocks(inputs, grid, _kept(pattern, "sink"), max(1, _kept(pattern, "local")))
    most = getattr(pattern, "most_density", None)
    high_share = min(1.0, float(most(keys))) if callable(most) else 1.0
    low_tiles = int(least.sum())
    high_tiles = max(low_tiles, int(dense * high_share + grid.rows))  # a share rounds up in each row
    return TileCount(dense * query_heads, low_tiles * query_heads, min(dense, high_tiles) * query_heads, law)


def _kept(pattern: Any, name: str) -> int:
    value = getattr(pattern, name, 0)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _zeros(keys: int, query_heads: int, kv_heads: int) -> AttentionInputs:
    query, key = torch.zeros(1, query_heads, keys, 1), torch.zeros(1, kv_heads, keys, 1)
    return AttentionInputs(query, key, key, 1.0)
