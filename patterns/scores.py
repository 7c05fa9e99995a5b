"""What every candidate keeps of one layer's attention and what it costs, head by head: one pass for all of them.

The mass of each key block is computed once, exactly, for each query (`sparseprefill.kernels.block_mass`); what a
candidate keeps of a query is the sum over its blocks, exp(lse_sparse - lse_dense). The layer is walked in slabs of
heads and query rows, so that no more than `peak_bytes` is held beside queries, keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.coverage import tile_pairs
from sparseprefill.kernels.block_mass import block_mass
from sparseprefill.patterns.last_rows import Pattern
from sparseprefill.patterns.nested import build_indexes, estimator_work
from sparseprefill.patterns.per_head import of_heads

BINS = 256
"""Bins of lost mass: the first up to a millionth, the others in equal ratios up to 1."""

MOST_CELLS = 128
"""A picture has at most so many rows and columns; in longer prompts a cell is several tiles wide."""

_LEAST_LOST = 1e-6
_LOGITS = 1 << 24  # of a slab
_LISTED = 1 << 26  # candidates x heads x rows x key blocks that are held together


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """Where the attention of each head lies on one prompt, and what each candidate keeps of it."""

    mass: Tensor  # float32 [query_heads, cells, cells], mean over the queries of a cell's rows
    kept: Tensor  # bool [query_heads, candidates, cells, cells]: a tile of the cell is listed
    tiles: int  # tiles a cell is wide


@dataclass(frozen=True, slots=True, eq=False)
class LayerScores:
    """Counts of one layer on one prompt, on the CPU; those of several prompts may be averaged, never added."""

    mass: Tensor  # float64 [query_heads, candidates], sum of kept mass over the queries looked at
    lost: Tensor  # int64 [query_heads, candidates, BINS], queries by lost mass; see `lost_edges`
    queries: Tensor  # int64 [], queries looked at
    kept: Tensor  # int64 [query_heads, candidates], visible pairs in listed tiles
    visible: Tensor  # int64 [], visible pairs of one head
    tiles: Tensor  # int64 [query_heads, candidates], listed tiles
    dense_tiles: Tensor  # int64 [], tiles of dense attention of one head
    estimator: Tensor  # float64 [candidates], work of finding the blocks, in the unit of tile_work
    picture: Picture | None = None


def lost_edges() -> Tensor:
    """float64 [BINS]: the largest lost mass of each bin."""
    return torch.logspace(math.log10(_LEAST_LOST), 0.0, BINS, dtype=torch.float64)


def dense_tiles(tokens: int, block: int, every: int = 1) -> int:
    """Tiles of one head whose logits `score` computes for a prompt of this length, from its first token on.

    Raises ValueError for an `every` below 1.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    return sum(row + 1 for row in scored_rows(-(-tokens // block), every))


def scored_rows(rows: int, every: int) -> range:
    """Which rows of tiles are looked at: each `every`-th, the last one always."""
    return range((rows - 1) % every, rows, every)


def peak_bytes(tokens: int, query_heads: int, kv_heads: int, head_dim: int, candidates: int, block: int = 64) -> int:
    """An upper bound of what `score` holds at one time beside its inputs, in bytes."""
    blocks = -(-tokens // block)
    heads = _together(query_heads, query_heads // kv_heads, blocks, candidates)
    rows = _slab_rows(heads, block, tokens)
    logits = heads * rows * block * tokens
    listed = candidates * heads * blocks * blocks
    state = candidates * query_heads * (BINS + 8) * 8
    pictures = query_heads * MOST_CELLS**2 * (4 + 3 * candidates)
    estimates = heads * (blocks * blocks * 28 + 64 * tokens * 24)  # a ranking of blocks; probe rows, several copies
    copies = 4 * tokens * head_dim * (2 * heads + 2 * max(1, heads * kv_heads // query_heads))
    slab = logits * 9 + heads * rows * blocks * candidates * 8 + heads * rows * block * (blocks + 6 * candidates) * 8
    return slab + listed * 4 + state + pictures + estimates + copies


def _together(query_heads: int, group: int, blocks: int, candidates: int) -> int:
    """Query heads that are looked at together: whole groups, at least one."""
    groups = max(1, _LISTED // (candidates * group * blocks * blocks))
    return min(query_heads, groups * group)


def _slab_rows(heads: int, block: int, tokens: int) -> int:
    return min(-(-tokens // block), max(1, _LOGITS // (heads * block * tokens)))


def score(
    inputs: AttentionInputs,
    patterns: Sequence[Pattern],
    *,
    block: int = 64,
    block_k: int | None = None,
    every: int = 1,
    picture: bool = False,
) -> LayerScores:
    """Score candidates on one prompt's layer.

    Args:
        inputs: of one prompt: batch 1, no padding.
        patterns: the candidates.
        block: tokens of a tile, both ways.
        block_k: keys of a tile, where they are others than its queries.
        every: look at the mass of each n-th row of tiles only; density and work are those of all rows.
        picture: also keep where the mass lies.

    Raises:
        ValueError: a batch, an `every` below 1, or what a pattern refuses.
    """
    if inputs.batch != 1 or inputs.key_valid is not None:
        raise ValueError(f"candidates are scored on one prompt without padding, got a batch of {inputs.batch}")
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    grid = BlockGrid.of(inputs, block, block if block_k is None else block_k)
    heads = _together(inputs.query_heads, inputs.group_size, grid.key_blocks, len(patterns))
    parts = []
    for start in range(0, inputs.query_heads, heads):
        some = range(start, min(start + heads, inputs.query_heads))
        own = [of_heads(pattern, some) for pattern in patterns]
        parts.append(_score_heads(inputs.select_heads(some), own, grid, every, picture))
    first = parts[0]
    drawn = [part.picture for part in parts if part.picture is not None]
    return LayerScores(
        mass=torch.cat([part.mass for part in parts]),
        lost=torch.cat([part.lost for part in parts]),
        queries=first.queries,
        kept=torch.cat([part.kept for part in parts]),
        visible=first.visible,
        tiles=torch.cat([part.tiles for part in parts]),
        dense_tiles=first.dense_tiles,
        estimator=first.estimator,
        picture=None
        if not drawn
        else Picture(torch.cat([p.mass for p in drawn]), torch.cat([p.kept for p in drawn]), drawn[0].tiles),
    )


def _score_heads(
    inputs: AttentionInputs, patterns: Sequence[Pattern], grid: BlockGrid, every: int, picture: bool
) -> LayerScores:
    heads, count = inputs.query_heads, len(patterns)
    indexes: list[BlockIndex | None] = [None] * count
    for place, index in build_indexes(patterns, inputs, grid):
        indexes[place] = index
    device = inputs.device
    low, high = grid.visible_blocks(inputs)
    all_tiles = int((high - low).sum())
    tiles = torch.stack([_listed(index).count.sum((0, 2)) for index in indexes], 1)
    kept = torch.zeros(heads, count, dtype=torch.int64, device=device)
    visible = torch.zeros((), dtype=torch.int64, device=device)
    mass_sum = torch.zeros(heads, count, dtype=torch.float64, device=device)
    lost = torch.zeros(heads * count * BINS, dtype=torch.int64, device=device)
    queries = torch.zeros((), dtype=torch.int64, device=device)
    edges = lost_edges().to(device=device, dtype=torch.float32)
    number = torch.arange(heads * count, device=device).view(heads, 1, 1, count) * BINS
    cells = _Cells.of(heads, count, grid, device) if picture else None
    looked_at = set(scored_rows(grid.rows, every))
    together = _slab_rows(heads, grid.block_q, inputs.last_key)
    for start in range(0, grid.rows, together):
        slab = torch.arange(start, min(start + together, grid.rows), device=device)
        # [heads, rows, key_blocks, candidates]
        mask = torch.stack([_listed(index).to_mask(start, start + len(slab))[0] for index in indexes], -1)
        pairs = tile_pairs(inputs, grid, start, start + len(slab))
        kept += torch.einsum("hrkc,rk->hc", mask.double(), pairs[0].double()).round().to(torch.int64)
        visible += pairs.sum()
        some = [row - start for row in slab.tolist() if row in looked_at]
        if not some:
            continue
        mass, lse = block_mass(inputs, grid, slab[some])
        chosen = mask[:, some, : mass.shape[-1]].to(mass.dtype)
        share = (mass[0] @ chosen).clamp_(max=1.0)  # [heads, rows, block_q, candidates]
        real = (lse[0] > -torch.inf)[..., None]
        mass_sum += (share.double() * real).sum((1, 2))
        queries += real[0].sum()
        bins = torch.bucketize((1 - share.float()).clamp_(0.0, 1.0), edges).clamp_(max=BINS - 1) + number
        lost += torch.bincount(bins[real.expand_as(bins)], minlength=len(lost))
        if cells is not None:
            cells.add(slab[some], mass[0], real, mask[:, some])
    return LayerScores(
        mass_sum.cpu(), lost.view(heads, count, BINS).cpu(), queries.cpu(), kept.cpu(), visible.cpu(), tiles.cpu(),
        torch.tensor(all_tiles),
        torch.tensor(
            [estimator_work(pattern, inputs, grid, all_tiles) for pattern in patterns], dtype=torch.float64
        ),
        None if cells is None else cells.picture(),
    )  # fmt: skip


def _listed(index: BlockIndex | None) -> BlockIndex:
    assert index is not None
    return index


@dataclass(slots=True)
class _Cells:
    """A picture while its rows come in."""

    width: int  # tiles a cell
    mass: Tensor  # [heads, cells, cells]
    queries: Tensor  # [cells]
    kept: Tensor  # bool [heads, candidates, cells, cells]

    @staticmethod
    def of(heads: int, count: int, grid: BlockGrid, device: torch.device) -> _Cells:
        width = -(-max(grid.rows, grid.key_blocks) // MOST_CELLS)
        cells = -(-max(grid.rows, grid.key_blocks) // width)
        return _Cells(
            width, torch.zeros(heads, cells, cells, device=device), torch.zeros(cells, device=device),
            torch.zeros(heads, count, cells, cells, dtype=torch.bool, device=device),
        )  # fmt: skip

    def add(self, rows: Tensor, mass: Tensor, real: Tensor, mask: Tensor) -> None:
        """Mass [heads, rows, block_q, blocks], real [.., 1] of its queries; mask [heads, rows, key_blocks, count]."""
        row, column = rows // self.width, torch.arange(mask.shape[2], device=rows.device) // self.width
        by_block = (mass * real).sum(2).float()
        by_cell = torch.zeros(*by_block.shape[:2], self.mass.shape[2], device=rows.device)
        by_cell.index_add_(2, column[: by_block.shape[2]], by_block)
        self.mass.index_add_(1, row, by_cell)
        self.queries.index_add_(0, row, real[0].sum((1, 2)).float())
        head, r, block, candidate = mask.nonzero(as_tuple=True)
        self.kept[head, candidate, row[r], column[block]] = True

    def picture(self) -> Picture:
        return Picture((self.mass / self.queries.clamp(min=1)[:, None]).cpu(), self.kept.cpu(), self.width)


@dataclass(frozen=True, slots=True, eq=False)
class CandidateTable:
    """Means of one layer over some prompts: what choosing needs. All float64 [query_heads, candidates]."""

    mass: Tensor  # kept, mean over queries and prompts
    low_mass: Tensor  # kept at least by all but a share of the queries: see `summarise`
    density: Tensor
    work: Tensor  # tile_work and estimator work


def check_quantile(quantile: float) -> None:
    """Raise ValueError for a quantile outside of [0, 1)."""
    if not 0 <= quantile < 1:
        raise ValueError(f"quantile must be in [0, 1), got {quantile}: a share of the query rows")


def summarise(scores: Sequence[LayerScores], quantile: float) -> CandidateTable:
    """Average over prompts, each counting the same however long it is.

    `low_mass` is what all but a share `quantile` of the queries keep at least (0: all of them), rounded down to a bin.
    Raises ValueError without scores, or for a quantile outside of [0, 1).
    """
    if not scores:
        raise ValueError("there are no scores to average")
    check_quantile(quantile)
    mass = torch.stack([each.mass / each.queries.clamp(min=1) for each in scores]).mean(0)
    spread = torch.stack([each.lost.double() / each.queries.clamp(min=1) for each in scores]).mean(0)
    reached = spread.cumsum(-1) >= 1 - quantile - 1e-9
    edge = lost_edges()[reached.int().argmax(-1)]
    density = torch.stack([each.kept / each.visible for each in scores]).double().mean(0)
    work = torch.stack([each.tiles.double() / each.dense_tiles + each.estimator for each in scores]).mean(0)
    return CandidateTable(mass, torch.where(edge <= _LEAST_LOST, 1.0, 1 - edge), density, work)
