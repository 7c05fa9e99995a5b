"""How much of the attention a list of blocks computes, in pairs of (query, key): one definition for every report.

density = pairs of computed tiles, clipped to visible pairs, over all visible pairs. A tile whose values were skipped
(`BlockIndex.skip`) counts one half: its logits were computed, which is half of the products.
tile_work = listed tiles over the tiles that dense attention computes on the same grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex


@dataclass(frozen=True, slots=True, eq=False)
class Coverage:
    """Counts over the whole batch, on the device of the inputs. Counts of several calls may be added."""

    kept: Tensor  # int64 [query_heads] visible pairs in listed tiles
    visible: Tensor  # int64 [] visible pairs of one head
    tiles: Tensor  # int64 [query_heads] listed tiles
    dense_tiles: Tensor  # int64 [] tiles that dense attention lists for one head
    skipped: Tensor  # int64 [query_heads] of the kept pairs, those in tiles whose values were skipped

    @property
    def density(self) -> Tensor:
        """Of each head, float64 [query_heads]."""
        return (self.kept.double() - self.skipped.double() / 2) / self.visible.clamp(min=1)

    @property
    def tile_work(self) -> Tensor:
        """Of each head, float64 [query_heads]."""
        return self.tiles.double() / self.dense_tiles.clamp(min=1)


def coverage(inputs: AttentionInputs, index: BlockIndex, skipped: Tensor | None = None, *, slab: int = 256) -> Coverage:
    """Count what an index computes. No host sync, but for packed prompts; `slab` rows are looked at together.

    A dense index has density and tile work 1. The index must stand on the grid of these inputs. What is skipped shows
    only while attention runs: `skipped` is what `AttentionOutput.skipped` counted, int64 [batch, query_heads].
    """
    grid = index.grid
    kept = torch.zeros(index.query_heads, dtype=torch.int64, device=inputs.device)
    visible = torch.zeros((), dtype=torch.int64, device=inputs.device)
    for start in range(0, grid.rows, slab):
        stop = min(grid.rows, start + slab)
        pairs = tile_pairs(inputs, grid, start, stop)
        kept += (index.to_mask(start, stop) * pairs[:, None]).sum((0, 2, 3))
        visible += pairs.sum()
    begin, end = grid.row_slots()
    low, high = grid.visible_blocks(inputs)
    asked = end > begin
    tiles, dense_tiles = (index.count * asked[:, None]).sum((0, 2)), ((high - low) * asked).sum()
    return Coverage(kept, visible, tiles, dense_tiles, torch.zeros_like(kept) if skipped is None else skipped.sum(0))


def tile_pairs(inputs: AttentionInputs, grid: BlockGrid, start: int = 0, stop: int | None = None) -> Tensor:
    """int64 [batch, rows, key_blocks]: visible (query, key) pairs in each tile, for a slab of rows."""
    stop = grid.rows if stop is None else stop
    begin, end = (slots[:, start:stop, None] for slots in grid.row_slots())
    edges = grid.anchor[:, None] + torch.arange(grid.key_blocks + 1, device=inputs.device) * grid.block_k
    edges = edges.clamp(max=inputs.filled)
    if inputs.segment is not None:
        return _pairs_query_by_query(inputs, grid, edges, start, stop)
    # P[t] = valid keys before t; F[t] = P[0] + ... + P[t]
    if inputs.key_valid is None:
        before = torch.arange(inputs.keys + 1, device=inputs.device).expand(inputs.batch, -1)
    else:
        before = torch.nn.functional.pad(inputs.key_valid.to(torch.int64).cumsum(1), (1, 0))
    total = before.cumsum(1)

    def summed(first: Tensor, last: Tensor, cap: Tensor) -> Tensor:
        """Sum over t in [first, last) of P[min(max(t, 0), cap)]; the terms below 0 are P[0] = 0."""
        first, last = first.clamp(min=0), last.clamp(min=0)
        shape = (inputs.batch, stop - start, grid.key_blocks + 1)
        inner_last = torch.minimum(last, cap + 1).expand(shape).flatten(1)
        inner_first = torch.minimum(first, cap + 1).expand(shape).flatten(1)
        padded = torch.nn.functional.pad(total, (1, 0))  # padded[t] = P[0] + ... + P[t - 1]
        inner = (padded.gather(1, inner_last) - padded.gather(1, inner_first)).view(shape)
        outer = (last - torch.maximum(first, cap + 1)).clamp(min=0) * before.gather(1, cap.flatten(1)).view(cap.shape)
        return inner + outer

    caps = edges[:, None, :]
    below_high = summed(begin + 1, end + 1, caps)  # keys before each edge and not after the query, summed over the row
    pairs = below_high[..., 1:] - below_high[..., :-1]
    if inputs.window is not None:
        below_low = summed(begin + 1 - inputs.window, end + 1 - inputs.window, caps)
        pairs = pairs - (below_low[..., 1:] - below_low[..., :-1])
    return pairs


def _pairs_query_by_query(inputs: AttentionInputs, grid: BlockGrid, edges: Tensor, start: int, stop: int) -> Tensor:
    valid = torch.ones(inputs.batch, inputs.keys, dtype=torch.bool, device=inputs.device)
    if inputs.key_valid is not None:
        valid = inputs.key_valid
    before = torch.nn.functional.pad(valid.to(torch.int64).cumsum(1), (1, 0))
    low, high = inputs.visible_range()
    high = torch.maximum(low, high)
    rows = grid.query_rows()
    pairs = torch.zeros(inputs.batch, stop - start, grid.key_blocks, dtype=torch.int64, device=inputs.device)
    for b in range(inputs.batch):
        here = ((rows[b] >= start) & (rows[b] < stop)).nonzero()[:, 0]
        for part in here.split(1024):
            clipped_high = torch.minimum(high[b, part, None], edges[b])
            clipped_low = torch.minimum(low[b, part, None], edges[b])
            until = before[b][torch.maximum(clipped_high, clipped_low)] - before[b][clipped_low]
            pairs[b].index_add_(0, rows[b, part] - start, until.diff(dim=1))
    return pairs
