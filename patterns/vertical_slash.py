"""Vertical-slash: some key columns for all queries, and some distances.

Jiang et al., "MInference 1.0", 2024, arXiv:2407.02490, section 3.2: both are named by what the last queries of the
prompt attend to. There, columns and distances are single tokens. Here they are blocks, as in FlexPrefill (Lai et al.,
2025, arXiv:2502.20766): a block column is all tiles (m, n) with one n, a block slash all tiles (m, m - d) with one d.
A token distance delta = d * block + r lies in the tiles of slash d for a share 1 - r / block of its length and in those
of d + 1 for the rest; a slash's score counts each distance by that share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.estimators.probe import Probe
from sparseprefill.estimators.selection import check_share, check_tokens
from sparseprefill.patterns.expected_density import in_blocks, kept_share
from sparseprefill.patterns.expected_overhead import Overhead, stated_overhead

PUBLISHED = (1000, 6096)  # MInference's default (verticals, slashes), in tokens
SINK, BAND = 30, 100  # columns and distances MInference always keeps, in tokens
_FEW = 8  # lists are written without a mask where a row has at most one in so many blocks


@dataclass(frozen=True, slots=True)
class VerticalSlash:
    """Either a budget of tokens for each kind, or a density that both share out in the published proportion.

    With `verticals` and `slashes`, ceil(budget / block) block columns and block slashes are kept. With `density`, the
    longest prefix of the two rankings (taken in the proportion 1000 : 6096) whose tiles are at most that share of the
    visible tiles of this call is kept, for each head and batch row. The columns of the first 30 tokens and the
    distances below 100 are kept in any case. All blocks, or density 1.0, is dense.

    The rankings come from the last `probe` queries, so the blocks of early rows depend on later tokens: it looks ahead.
    Slashes need square tiles. A head with a window or with packed segments sees fewer tiles, never others.

    MInference, arXiv:2407.02490, section 3.2, with blocks for tokens as in FlexPrefill, arXiv:2502.20766. Raises
    ValueError for both or neither of the two budgets, and in `build_index` for tiles that are not square.
    """

    verticals: int | None = None  # tokens, rounded up to blocks
    slashes: int | None = None  # tokens, rounded up to blocks
    density: float | None = None  # share of the visible tiles, in (0, 1]
    probe: int = 64  # last queries that are looked at

    def __post_init__(self) -> None:
        tokens = self.verticals is not None and self.slashes is not None
        if tokens == (self.density is not None) or (self.verticals is None) != (self.slashes is None):
            raise ValueError(
                "vertical-slash takes either verticals and slashes (tokens) or a density, got "
                f"verticals={self.verticals}, slashes={self.slashes}, density={self.density}"
            )
        for name in ("verticals", "slashes"):
            budget = getattr(self, name)
            if budget is not None:
                check_tokens(name, budget)
        if self.density is not None:
            check_share("density", self.density)
        Probe(self.probe)

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        if grid.block_q != grid.block_k:
            raise ValueError(
                f"vertical-slash needs square tiles, got block_q={grid.block_q} and block_k={grid.block_k}: "
                "choose block_q equal to block_k"
            )
        return self.choose(self.estimate(inputs, grid), inputs, grid)

    @property
    def family(self) -> tuple[Any, ...]:
        """Budgets that look at as many queries rank columns and slashes alike."""
        return VerticalSlash, self.probe

    def estimate(self, inputs: AttentionInputs, grid: BlockGrid) -> tuple[Tensor, Tensor]:
        """Ranks of block columns and of block slashes, int64 [batch, query_heads, key_blocks]; `choose` cuts them."""
        column, slash = self._block_mass(inputs, grid)
        block = torch.arange(grid.key_blocks, device=inputs.device)
        column = column.masked_fill(block * grid.block_k < SINK, torch.inf)
        slash = slash.masked_fill((block - 1) * grid.block_k < BAND, torch.inf)
        return ranks(column), ranks(slash)

    def choose(self, estimate: tuple[Tensor, Tensor], inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        """`build_index` from an estimate of its family."""
        column_rank, slash_rank = estimate
        if self.density is None:
            assert self.verticals is not None
            assert self.slashes is not None
            columns = torch.full_like(column_rank[..., :1], -(-self.verticals // grid.block_k))
            slashes = torch.full_like(slash_rank[..., :1], -(-self.slashes // grid.block_k))
        else:
            columns, slashes = _fit(self.density, column_rank, slash_rank, inputs, grid)
        columns = columns.clamp(min=-(-SINK // grid.block_k))
        slashes = slashes.clamp(min=-(-BAND // grid.block_k) + 1)
        return _index(column_rank < columns, slash_rank < slashes, inputs, grid)

    def estimator_products(self, inputs: AttentionInputs, grid: BlockGrid) -> int:
        """See `sparseprefill.patterns.nested`."""
        return Probe(self.probe).products(inputs)

    def most_density(self, keys: int) -> float:
        """See `sparseprefill.patterns.expected_tiles`."""
        return self.expected_density(keys)

    def expected_density(self, keys: int) -> float:
        forced = kept_share(in_blocks(SINK) + in_blocks(BAND) + 64, keys)  # a distance lies in two block slashes
        if self.density is not None:
            return max(self.density, forced)
        assert self.verticals is not None
        assert self.slashes is not None
        return max(kept_share(self.verticals + self.slashes, keys), forced)

    def expected_overhead(self, device: torch.device, head_dim: int, block_q: int, block_k: int) -> Overhead:
        """The probe's products; a share of the tiles where so many are listed that it takes a mask of all."""
        tiles = 0.25 / (block_q * block_k)
        return stated_overhead(device, head_dim, keys=self.probe, tiles=tiles, steps=0.64)

    def _block_mass(self, inputs: AttentionInputs, grid: BlockGrid) -> tuple[Tensor, Tensor]:
        """[batch, query_heads, key_blocks] twice: probe mass of each block column and of each block slash."""
        mass = Probe(self.probe).mass(inputs)
        size, blocks = grid.block_k, grid.key_blocks
        column = mass.block_columns(grid)
        distance = functional.pad(mass.diagonal, (0, max(0, blocks * size - inputs.keys)))[..., : blocks * size]
        distance = distance.unflatten(2, (blocks, size))
        past = torch.arange(size, device=inputs.device).to(distance.dtype) / size  # r / block
        own, next_one = (distance * (1 - past)).sum(-1), (distance * past).sum(-1)
        return column, own + functional.pad(next_one, (1, 0))[..., :-1]


def ranks(score: Tensor) -> Tensor:
    """int64 like score: 0 for the highest score of the last dimension, of equal ones for the lower place."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    return torch.empty_like(order).scatter_(
        -1, order, torch.arange(score.shape[-1], device=score.device).expand_as(order)
    )


def _split(total: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of each kind out of `total`, in the published proportion."""
    columns = (total * PUBLISHED[0] + sum(PUBLISHED) // 2) // sum(PUBLISHED)
    return columns, total - columns


def _fit(
    density: float, column_rank: Tensor, slash_rank: Tensor, inputs: AttentionInputs, grid: BlockGrid
) -> tuple[Tensor, Tensor]:
    """[batch, query_heads, 1] twice: how many columns and slashes fill `density` of this call's visible tiles."""
    begin, end = grid.row_slots()
    first = grid.first[:, None, None]
    asked = (end > begin) & (begin < inputs.tail()[:, None])
    last = first + asked.sum(1)[:, None, None]  # rows [first, last) of the grid are asked
    block = torch.arange(grid.key_blocks, device=inputs.device)
    reach = (last - torch.maximum(first, block)).clamp(min=0)  # tiles of column n, and of slash d
    allowed = reach.sum(-1, keepdim=True).double() * density

    def tiles(total: Tensor) -> Tensor:
        columns, slashes = _split(total)
        in_column, in_slash = column_rank < columns, slash_rank < slashes
        # tiles in both: column n and slash d meet in row n + d
        below = functional.pad(in_slash.to(torch.int64).cumsum(-1), (1, 0))  # slashes < d
        stop = (last - block).clamp(0, grid.key_blocks).expand_as(column_rank)
        start = (first - block).clamp(0, grid.key_blocks).expand_as(column_rank)
        meeting = (below.gather(-1, stop) - below.gather(-1, start)) * in_column
        return ((in_column + in_slash.to(torch.int64)) * reach - meeting).sum(-1, keepdim=True)

    low = torch.zeros_like(column_rank[..., :1])
    high = torch.full_like(low, 2 * grid.key_blocks)
    if density == 1.0:
        return high, high
    for _ in range((2 * grid.key_blocks).bit_length()):  # bisection: tiles(total) never falls
        middle = (low + high + 1) // 2
        fits = tiles(middle) <= allowed
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle - 1)
    return _split(low)


def _index(in_column: Tensor, in_slash: Tensor, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
    """Union of block columns and block slashes, rows in slabs."""
    few = crossed_lists(in_column, in_slash, None, inputs, grid)
    if few is not None:
        return few
    visible = grid.visible_block_mask(inputs)
    parts = []
    for start, stop in grid.slabs(inputs.query_heads):
        mask = crossed_tiles(in_column, in_slash, grid, start, stop) & visible[:, None, start:stop]
        parts.append(BlockIndex.from_mask(grid, mask))
    return BlockIndex.stack(parts)


def crossed_lists(
    in_column: Tensor, in_slash: Tensor, also: Tensor | None, inputs: AttentionInputs, grid: BlockGrid
) -> BlockIndex | None:
    """The lists of `crossed_tiles`, as far as visible, made without a mask of all tiles.

    None on a GPU, where the numbers of chosen ones are not read, and where so many are chosen that a mask is less.

    Args:
        in_column, in_slash: bool [batch, query_heads, key_blocks], by key block and by distance.
        also: int64 [batch, rows], one more block of each row.
    """
    if inputs.device.type != "cpu":
        return None
    columns, slashes = (int(each.sum(-1).max()) for each in (in_column, in_slash))
    width = columns + slashes + (also is not None)
    if width > grid.key_blocks // _FEW:
        return None
    nowhere = 1 << 40  # sorts last; above any row, also of queries far behind what a cache holds
    low, high = (bound[:, None, :, None] for bound in grid.visible_blocks(inputs))
    row = (grid.first[:, None] + torch.arange(grid.rows, device=inputs.device))[:, None, :, None]
    column = _places(in_column, columns, nowhere)[:, :, None]
    slash = _places(in_slash, slashes, nowhere)[:, :, None]

    def listed(start: int, stop: int) -> BlockIndex:
        own = slice(start, stop)
        shape = (*in_column.shape[:2], stop - start)
        parts = [column.expand(*shape, -1), row[:, :, own] - slash]  # of no slash: far below any block
        if also is not None:
            parts.append(also[:, None, own, None].expand(*shape, 1))
        ids = torch.cat(parts, -1)
        unseen = (ids < low[:, :, own]) | (ids >= high[:, :, own])
        ids = ids.masked_fill_(unseen, nowhere).sort(-1).values
        ids[..., 1:].masked_fill_(ids[..., 1:] == ids[..., :-1], nowhere)
        ids = ids.sort(-1).values
        return BlockIndex.from_slots(grid, ids.clamp(max=grid.key_blocks - 1), (ids < nowhere).sum(-1))

    return BlockIndex.stack([listed(*slab) for slab in grid.slabs(in_column.shape[1])])


def _places(chosen: Tensor, width: int, nowhere: int) -> Tensor:
    """int64 [batch, query_heads, width]: where bool [batch, query_heads, blocks] is true, then `nowhere`."""
    place = torch.arange(chosen.shape[-1], device=chosen.device).expand(chosen.shape)
    return place.masked_fill(~chosen, nowhere).sort(-1).values[..., :width]


def crossed_tiles(in_column: Tensor, in_slash: Tensor, grid: BlockGrid, start: int, stop: int) -> Tensor:
    """bool [batch, query_heads, stop - start, key_blocks]: tiles of a slab of rows on a chosen column or slash.

    Of square tiles; those of the future are not on a slash, but may be on a column. The choices are bool
    [batch, query_heads, key_blocks], by key block and by distance.
    """
    row = grid.first[:, None] + torch.arange(start, stop, device=in_column.device)
    distance = row[..., None] - torch.arange(grid.key_blocks, device=in_column.device)  # [batch, rows, key_blocks]
    flat = distance.clamp(min=0, max=grid.key_blocks - 1).flatten(1)[:, None].expand(*in_slash.shape[:2], -1)
    on_slash: Tensor = in_slash.gather(2, flat).unflatten(2, distance.shape[1:]) & (distance >= 0)[:, None]
    return on_slash.logical_or_(in_column[:, :, None])
