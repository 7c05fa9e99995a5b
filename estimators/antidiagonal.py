"""Estimate the attention mass of tiles from one product in `stride`: those along antidiagonals.

Xu et al., "XAttention: Block Sparse Attention with Antidiagonal Scoring", 2025, arXiv:2503.16428. Queries and keys are
taken in groups of S tokens, counted from each batch row's first valid key. The score of a group p of queries and a
group t of keys is the mean of the logits along the antidiagonal of their S x S cell,

    a[p, t] = scale / S * sum over r < S of Q[p * S + S - 1 - r] . K[t * S + r],

each token of either group once. A softmax over t makes it a share of the mass of p, and a tile's mass is the sum over
its cells. Laid side by side, the tokens of a group are one vector of S * head_dim numbers, and the sum is one product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid
from sparseprefill.estimators.token_groups import (
    check_tiles,
    grouped_queries,
    grouped_tokens,
    key_slots,
    query_slots,
)
from sparseprefill.kernels.low_bit import accurate

STRIDES = (4, 8, 16)
"""Tokens of a group. What the estimate costs falls with it, and so does what it sees."""

IMPLEMENTATIONS = ("auto", "torch", "triton")

_ENTRIES = {"cpu": 1 << 21, "cuda": 1 << 24}  # scores of cells, or of groups and blocks, that are held at a time
_ROWS_OF_A_PRODUCT = 512  # on the CPU: fewer multiply less of the future, more multiply faster


@dataclass(frozen=True, slots=True)
class Antidiagonal:
    """Share of each row's attention mass in each tile, by antidiagonals of cells of `stride` x `stride` tokens.

    A cell enters the softmax of its queries if they see a valid key in it, from the first key of the first of them to
    the last key of the last; the cell on the diagonal holds pairs of the future, of the row's own tokens. What is
    missing in a group (padding, or what lies outside of a chunk) counts as zero. XAttention, arXiv:2503.16428. Raises
    ValueError for another stride, and where tiles are asked for that cut groups.
    """

    stride: int = 8  # tokens of a group: 4, 8 or 16
    impl: str = "auto"  # "torch" or "triton"

    def __post_init__(self) -> None:
        if isinstance(self.stride, bool) or self.stride not in STRIDES:
            raise ValueError(f"stride must be one of {', '.join(map(str, STRIDES))}, got {self.stride!r:.80}")
        if self.impl not in IMPLEMENTATIONS:
            raise ValueError(f"unknown implementation {self.impl!r:.80}: choose one of {', '.join(IMPLEMENTATIONS)}")

    def prepare(self, inputs: AttentionInputs, grid: BlockGrid) -> PreparedGroups:
        """What is computed once for all rows: the key groups that each query group sees, and how keys are read.

        Raises ValueError for tiles that cut groups, NotImplementedError with the reason where "triton" cannot serve.
        """
        check_tiles(grid, self.stride)
        inputs = dataclasses.replace(inputs, query=inputs.query.detach(), key=inputs.key.detach())
        impl = self._choose(inputs, grid)
        low, high, asked = _seen(inputs, grid, self.stride)
        slot, inside = (each.flatten(1) for each in key_slots(inputs, grid))
        occupied = None if inputs.key_valid is None else inside.unflatten(1, (-1, self.stride)).any(-1)
        key = grouped_tokens(inputs.key, slot, inside, self.stride) if impl == "torch" else None
        return PreparedGroups(self.stride, impl, inputs, grid, low, high, asked, occupied, key)

    def products(self, inputs: AttentionInputs) -> int:
        """What it costs a head, in products of a query and a key: `stride` for each cell up to the diagonal.

        Padding, windows and packed prompts make it less; the law is that of one prompt.
        """
        first, last = inputs.query_start // self.stride, (inputs.query_start + inputs.queries - 1) // self.stride
        return ((last + 1) * (last + 2) - first * (first + 1)) // 2 * self.stride

    def _choose(self, inputs: AttentionInputs, grid: BlockGrid) -> str:
        if self.impl == "torch" or (self.impl == "auto" and inputs.device.type == "cpu"):
            return "torch"
        reason = _why_not_triton(inputs, grid, self.stride)
        if reason is None:
            return "triton"
        if self.impl == "triton":
            raise NotImplementedError(f"triton cannot score antidiagonals: {reason}")
        return "torch"


def _why_not_triton(inputs: AttentionInputs, grid: BlockGrid, stride: int) -> str | None:
    try:
        from sparseprefill.kernels.triton_antidiagonal import why_not_antidiagonal
    except ImportError as error:
        return f"triton cannot be imported ({error}); on Linux: pip install triton"
    return why_not_antidiagonal(inputs, grid.block_k, stride)


@dataclass(frozen=True, slots=True, eq=False)
class PreparedGroups:
    """Made by `Antidiagonal.prepare`; scores slabs of rows."""

    stride: int  # tokens of a group
    impl: str  # "torch" or "triton"
    inputs: AttentionInputs
    grid: BlockGrid
    low: Tensor  # int32 [batch, query groups of all rows]: key groups in [low, high) are seen
    high: Tensor  # 0 where no query asks
    asked: Tensor  # int64 [batch, rows]: valid queries
    occupied: Tensor | None  # bool [batch, key groups] that hold a valid key; None: all
    key: Tensor | None  # [batch, kv_heads, key groups, stride * head_dim] for torch

    @property
    def _groups_of_a_row(self) -> int:
        return self.grid.block_q // self.stride

    def slabs(self) -> Iterator[tuple[int, int]]:
        """Rows [start, stop) that are scored together, so that what is held stays small."""
        inputs, grid = self.inputs, self.grid
        per_row = inputs.batch * inputs.query_heads * self._groups_of_a_row * grid.key_blocks
        entries = _ENTRIES["cpu" if inputs.device.type == "cpu" else "cuda"]
        if inputs.device.type == "cpu":
            rows = max(1, _ROWS_OF_A_PRODUCT // (inputs.group_size * self._groups_of_a_row))
            entries = min(entries, rows * per_row)
        return grid.slabs(inputs.query_heads * self._groups_of_a_row, entries)

    def scores(self, start: int, stop: int) -> Tensor:
        """[batch, query_heads, stop - start, key_blocks]: estimated mass of the tiles of a slab of rows.

        A row's mass is that of its query groups, 1 each; 0 where no valid query asks. NaN in all tiles of a row that
        cannot be judged: something that it sees gives no finite score, or none of its queries sees a key. float32
        (float64 for such inputs).
        """
        inputs, grid, per_row = self.inputs, self.grid, self._groups_of_a_row
        shape = (inputs.batch, inputs.query_heads, stop - start, grid.key_blocks)
        mass = torch.zeros(shape, dtype=accurate(inputs.query), device=inputs.device)
        first, last = self._reach(start, stop)
        if first < last:
            lse = self._block_lse(start, stop, first, last)
            whole = lse.logsumexp(-1, keepdim=True)
            # a query group that sees nothing has no share in anything
            share = lse.sub_(whole.masked_fill_(whole == -torch.inf, 0)).exp_()
            mass[..., first:last] = share.unflatten(2, (-1, per_row)).sum(3)
        unknown = (self.asked[:, None, start:stop] > 0) & ~(mass.sum(-1) > 0)
        return mass.masked_fill_(unknown[..., None], torch.nan)

    def _reach(self, start: int, stop: int) -> tuple[int, int]:
        """Blocks [first, last) that hold all that a slab of rows sees; read on the CPU, a bound elsewhere."""
        if self.inputs.device.type != "cpu":
            return 0, self.grid.reach(stop - 1)
        low, high = self._bounds(start, stop)
        some = low < high
        if not some.any():
            return 0, 0
        width = self.grid.block_k // self.stride
        return int(low[some].min()) // width, -(-int(high[some].max()) // width)

    def _bounds(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """`low` and `high` of the query groups of a slab of rows."""
        some = slice(start * self._groups_of_a_row, stop * self._groups_of_a_row)
        return self.low[:, some], self.high[:, some]

    def _block_lse(self, start: int, stop: int, first: int, last: int) -> Tensor:
        """[batch, query_heads, query groups of the rows, last - first]: logsumexp of each group's scores in a block.

        -inf where it sees nothing of the block, NaN where one of its scores there is not finite.
        """
        inputs, grid = self.inputs, self.grid
        low, high = self._bounds(start, stop)
        if self.impl == "triton":
            from sparseprefill.kernels.triton_antidiagonal import triton_block_lse

            first_group = (grid.first + start) * self._groups_of_a_row
            return triton_block_lse(
                inputs, stride=self.stride, block_k=grid.block_k, anchor=grid.anchor, first_group=first_group,
                low=low, high=high, occupied=self.occupied, blocks=last,
            )[..., first:]  # fmt: skip
        assert self.key is not None
        query = grouped_queries(inputs, *query_slots(inputs, grid, start, stop), self.stride)
        query = query.unflatten(1, (inputs.kv_heads, inputs.group_size)).flatten(2, 3)
        query *= inputs.scale / self.stride
        width, on_cpu = grid.block_k // self.stride, inputs.device.type == "cpu"
        lse: Tensor = query.new_empty(inputs.batch, inputs.query_heads, low.shape[1], last - first)
        per_block = inputs.batch * inputs.query_heads * low.shape[1] * width
        together = max(1, _ENTRIES["cpu" if on_cpu else "cuda"] // per_block)
        for block in range(first, last, together):
            end = min(last, block + together)
            scores = query @ self.key[:, :, block * width : end * width].mT
            scores = scores.view(inputs.batch, inputs.query_heads, low.shape[1], -1)
            if inputs.softcap is not None:
                scores = scores.div_(inputs.softcap).tanh_().mul_(inputs.softcap)
            scores.masked_fill_(scores == -torch.inf, torch.nan)  # what is masked below is -inf, what overflowed is not
            occupied = None if self.occupied is None else self.occupied[:, block * width : end * width]
            if not (on_cpu and _all_seen(low, high, occupied, block * width, end * width)):
                scores.masked_fill_(~_seen_groups(low, high, occupied, block * width, end * width)[:, None], -torch.inf)
            lse[..., block - first : end - first] = scores.unflatten(-1, (-1, width)).logsumexp(-1)
        return lse

    def queries_in_rows(self, rows: Tensor) -> Tensor:
        """int64 [batch, query_heads]: valid queries in the marked rows, bool [batch, query_heads, rows]."""
        return (rows * self.asked[:, None]).sum(-1)


def _seen(inputs: AttentionInputs, grid: BlockGrid, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which key groups each query group of all rows sees, int32 [batch, groups] low and high; valid queries a row."""
    slot, asked = query_slots(inputs, grid, 0, grid.rows)
    place = (slot - inputs.query_start).clamp(0, inputs.queries - 1).flatten(1)
    real = asked.flatten(1)
    low, high = (bound.gather(1, place) for bound in inputs.visible_range())
    low = low.masked_fill(~real, inputs.keys).unflatten(1, (-1, stride)).amin(-1)
    high = high.masked_fill(~real, 0).unflatten(1, (-1, stride)).amax(-1)
    if inputs.key_valid is not None:  # to the next valid key: one before it may stand in the same group, out of sight
        key = torch.arange(inputs.keys, device=inputs.device)
        after = key.masked_fill(~inputs.key_valid, inputs.keys).flip(1).cummin(1).values.flip(1)
        low = torch.where(low < high, after.gather(1, low.clamp(max=inputs.keys - 1)), low)
    some = low < high
    anchor = grid.anchor[:, None]
    low = torch.where(some, (low - anchor).clamp(min=0) // stride, 0)
    high = torch.where(some, -((anchor - high) // stride), 0)
    return low.to(torch.int32), high.to(torch.int32), asked.sum(-1)


def _all_seen(low: Tensor, high: Tensor, occupied: Tensor | None, first: int, last: int) -> bool:
    """Whether every query group sees all key groups [first, last)."""
    return bool((low <= first).all() & (high >= last).all()) and (occupied is None or bool(occupied.all()))


def _seen_groups(low: Tensor, high: Tensor, occupied: Tensor | None, first: int, last: int) -> Tensor:
    """bool [batch, query groups, last - first]: which of the key groups [first, last) each query group sees."""
    group = torch.arange(first, last, device=low.device)
    seen = (group >= low[..., None]) & (group < high[..., None])
    return seen if occupied is None else seen & occupied[:, None]
