"""HyperAttention: queries and keys sorted by a hash, blocks of neighbours exact, all others by a few drawn keys.

Han et al., "HyperAttention: Long-context Attention in Near-Linear Time", 2023, arXiv:2310.05869. A baseline: it looks
at directions alone, and estimates what it leaves out instead of naming what matters.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.estimators.selection import check_count, check_tokens
from sparseprefill.kernels.low_bit import accurate
from sparseprefill.patterns.expected_density import kept_share
from sparseprefill.patterns.expected_overhead import Overhead, stated_overhead
from sparseprefill.patterns.own_blocks import check_keys_reach
from sparseprefill.patterns.parts import Part
from sparseprefill.patterns.segments import in_order, order_inside, own_segments


@dataclass(frozen=True, slots=True)
class HyperAttention:
    """Exact inside segments of `segment` tokens; between the halves of twice, four times, ... as many an estimate.

    A rectangle is the later half's queries against the earlier half's keys, for halves of `segment`, 2 `segment`, ...
    tokens, counted from the first valid key, so that every pair of different segments is in one. Queries and keys of a
    rectangle are sorted by the place of their hash (`bits` signs along random directions) in a walk on which neighbours
    differ in one sign; its keys are cut into blocks of `block`, its queries into as many. A query attends exactly to
    the block at its place, and of all other keys of the rectangle to `block` that are drawn, with replacement, for each
    block of queries and KV head; each of these counts for as many as it stands for. Numerator and denominator of the
    softmax are each right in the mean over the draw.

    lse is an estimate then, and a kept mass made of it means nothing: ask for output errors. A prompt of one segment is
    dense. It looks ahead, by the other queries of a half. Where a half is asked in part, its tiles of queries are
    spread over the blocks as they come.

    arXiv:2310.05869. Raises ValueError or TypeError for numbers that are none, and in `build_parts` ValueError for
    blocks that do not fit tiles, and for packed prompts and windows, which cut through rectangles.
    """

    segment: int = 4096  # tokens that are attended to exactly, and halves of the smallest rectangle
    block: int = 256  # keys of a block, and drawn ones
    bits: int = 7  # of a hash
    seed: int = 0  # of directions and draws; each layer has another

    in_parts: ClassVar[bool] = True
    weighs_keys: ClassVar[bool] = True  # see `sparseprefill.patterns.parts.estimates`

    def __post_init__(self) -> None:
        check_tokens("segment", self.segment)
        check_tokens("block", self.block)
        check_count("bits", self.bits)
        check_count("seed", self.seed, least=0)
        if self.bits > 30:
            raise ValueError(f"bits must be at most 30, so that a hash is a number, got {self.bits}")
        if self.segment % self.block or self.segment < 2 * self.block:
            raise ValueError(
                f"segment={self.segment} must be two blocks of {self.block} or more, and whole ones: "
                "choose another block"
            )

    def for_layer(self, layer: int) -> HyperAttention:
        """Each layer draws for itself."""
        return dataclasses.replace(self, seed=self.seed * 1009 + layer)

    def build_parts(self, inputs: AttentionInputs, grid: BlockGrid) -> tuple[Part, ...]:
        """A row's own segment, and for each size of halves the blocks at the queries' places and the drawn keys."""
        if self.block % grid.block_k or self.block % grid.block_q:
            raise ValueError(
                f"blocks of {self.block} do not fit tiles of {grid.block_q} x {grid.block_k}: choose a multiple of both"
            )
        if inputs.window is not None or inputs.segment is not None:
            raise ValueError(
                "hyperattention halves a prompt that is seen as a whole; windows and packed prompts are not: run "
                "packed prompts apart, and leave layers with a window to another method"
            )
        check_keys_reach(type(self).__name__, inputs)
        row = grid.first[:, None] + torch.arange(grid.rows, device=inputs.device)
        until = (row * grid.block_q // self.segment * (self.segment // grid.block_k)).clamp(max=grid.key_blocks)
        begin, end = grid.row_slots()
        until = torch.where(end > begin, until, 0)
        parts = [Part(inputs, own_segments(inputs, grid, torch.zeros_like(until), until))]
        half, level = self.segment, 0
        while half < inputs.last_key:
            parts += self._rectangles(inputs, grid, half, level)
            half, level = 2 * half, level + 1
        return tuple(parts)

    def ranks(self, vectors: Tensor, level: int) -> Tensor:
        """int64 [batch, heads, tokens]: the place of each vector's hash on the walk."""
        draw = torch.Generator().manual_seed(self.seed * 64 + 2 * level)
        direction = torch.randn(vectors.shape[-1], self.bits, generator=draw, dtype=torch.float64)
        sign = (
            vectors.to(accurate(vectors)) @ direction.to(vectors.device, accurate(vectors), non_blocking=True) > 0
        ).to(torch.int64)
        place = sign[..., 0]
        last = place
        for bit in range(1, self.bits):  # a walk on which one sign changes at a time: each bit flips with those before
            last = last ^ sign[..., bit]
            place = 2 * place + last
        return place

    def estimator_products(self, inputs: AttentionInputs, grid: BlockGrid) -> float:
        """See `sparseprefill.patterns.nested`: the hashes, for each size of halves."""
        levels = self._levels(inputs.last_key)
        return levels * self.bits * (inputs.queries + inputs.last_key / inputs.group_size)

    def tile_law(self) -> str:
        """See `sparseprefill.patterns.expected_tiles`."""
        return "count"

    def expected_density(self, keys: int) -> float:
        own = kept_share(self.segment, keys) / (1 if keys <= self.segment else 1.5)  # half of it, in the mean
        return min(1.0, own + self._levels(keys) * 2 * self.block / keys)

    def expected_overhead(self, device: torch.device, head_dim: int, block_q: int, block_k: int) -> Overhead:
        """Hashes, sorts, and queries, keys and values written anew twice for each size of halves; for eight of them."""
        tiles = 1 / (block_q * block_k)
        return stated_overhead(device, head_dim, keys=8 * (2 * self.bits + 96), tiles=tiles, steps=8.0)

    def _levels(self, keys: int) -> int:
        """How many sizes of halves there are."""
        return max(0, (-(-keys // self.segment) - 1).bit_length())

    def _rectangles(self, inputs: AttentionInputs, grid: BlockGrid, half: int, level: int) -> list[Part]:
        """All rectangles of one size: blocks at the queries' places, and drawn keys."""
        key_order = order_inside(inputs, half, self._importance(inputs, level))
        query_order = self._query_order(inputs, half, level)
        query = inputs.query.gather(2, query_order[..., None].expand_as(inputs.query))
        sorted_inputs = dataclasses.replace(in_order(inputs, key_order), query=query)
        # where a row stands among those of its half that are asked, and which block of keys that is
        row = (grid.first[:, None] + torch.arange(grid.rows, device=inputs.device)) * grid.block_q
        own, blocks = row // half, half // self.block
        begun = (inputs.query_start - inputs.anchor()).clamp(min=0)[:, None]
        first = torch.maximum(own * half, begun)
        real = (inputs.tail() - inputs.anchor())[:, None]  # right padding does not count
        stop = torch.minimum(own * half + half, real)
        block = ((row - first).clamp(min=0) * blocks // (stop - first).clamp(min=1)).clamp(0, blocks - 1)
        begin, end = grid.row_slots()
        crossed = (own % 2 == 1) & (end > begin)
        block = torch.where(crossed, (own - 1) * blocks + block, 0)  # of the half before
        drawn_order, log_weight = self._drawn(inputs, key_order, half, level)
        weight = log_weight.gather(1, block)
        valid = None
        if inputs.key_valid is not None:  # drawn keys are real ones, wherever they come to stand
            valid = torch.arange(inputs.keys, device=inputs.device) >= inputs.anchor()[:, None]
        drawn = dataclasses.replace(in_order(inputs, drawn_order), query=query, key_valid=valid)
        each = weight.gather(1, grid.query_rows().clamp(min=0)).masked_fill(grid.query_rows() < 0, 0.0)
        return [
            Part(sorted_inputs, self._index(inputs, grid, block, crossed), query_order),
            Part(
                drawn, self._index(inputs, grid, block, crossed & (weight > -torch.inf)), query_order,
                each.masked_fill(each == -torch.inf, 0.0)[:, None],
            ),
        ]  # fmt: skip

    def _importance(self, inputs: AttentionInputs, level: int) -> Tensor:
        """[batch, kv_heads, keys]: the lower on the walk, the earlier; -inf for keys that do not count."""
        rank = -self.ranks(inputs.key, level).to(torch.float64)
        slot = torch.arange(inputs.keys, device=inputs.device)
        counted = (slot >= inputs.anchor()[:, None]) & (slot < inputs.last_key)
        if inputs.key_valid is not None:
            counted = counted & inputs.key_valid
        return rank.masked_fill(~counted[:, None], -torch.inf)

    def _query_order(self, inputs: AttentionInputs, half: int, level: int) -> Tensor:
        """int64 [batch, query_heads, queries]: queries of each half by rank, those that are not valid last."""
        slot = torch.arange(inputs.query_start, inputs.query_start + inputs.queries, device=inputs.device)
        past = slot - inputs.anchor()[:, None]
        own = torch.where(past >= 0, past // half + 1, 0)
        rank = self.ranks(inputs.query, level)
        if inputs.key_valid is not None:
            rank = rank.masked_fill(~inputs.key_valid[:, None, slot], 1 << self.bits)
        return (own[:, None] * (2 << self.bits) + rank).argsort(dim=-1, stable=True)

    def _index(self, inputs: AttentionInputs, grid: BlockGrid, block: Tensor, some: Tensor) -> BlockIndex:
        """The tiles of one block for each row (int64 [batch, rows]), for those that have `some`."""
        tiles = self.block // grid.block_k
        start = (block * tiles).clamp(max=grid.key_blocks - 1)
        count = torch.where(some, tiles, 0).to(torch.int32)
        columns = torch.arange(grid.key_blocks, dtype=torch.int32, device=inputs.device)
        return BlockIndex(grid, columns, start[:, None], count[:, None]).for_heads(inputs.query_heads)

    def _drawn(
        self, inputs: AttentionInputs, key_order: Tensor, half: int, level: int
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """int64 [batch, kv_heads, keys]: the slot of the key drawn for each place; and float64 [batch, blocks]: the log
        of how many keys each draw of a block of queries stands for, -inf where there are none.
        """
        anchor, keys = inputs.anchor(), inputs.keys
        blocks, halves = half // self.block, -(-keys // half)
        slot = anchor[:, None] + torch.arange(halves * half, device=inputs.device)
        valid = slot < inputs.last_key
        if inputs.key_valid is not None:
            valid = valid & inputs.key_valid.gather(1, slot.clamp(max=keys - 1))
        valid = valid.unflatten(1, (halves, half))  # of sorted places too, as what does not count stays where it is
        before = torch.nn.functional.pad(valid.to(torch.int64).cumsum(-1), (1, 0))  # [batch, halves, half + 1]
        edge = before[..., :: self.block]  # valid ones before each block, [batch, halves, blocks + 1]
        inside, total = edge.diff(dim=-1), before[..., -1:]
        others = total - inside  # [batch, halves, blocks]
        draw = torch.Generator().manual_seed(self.seed * 64 + 2 * level + 1)
        # halves first: a longer prompt draws the same numbers for its beginning
        share = torch.rand(halves, inputs.kv_heads, blocks, self.block, generator=draw, dtype=torch.float64)
        number = (
            (share.transpose(0, 1).to(inputs.device, non_blocking=True) * others[:, None, ..., None])
            .floor()
            .to(torch.int64)
        )
        number = torch.where(number >= edge[:, None, :, :-1, None], number + inside[:, None, ..., None], number)
        # in which the n-th valid one is looked up
        flat = before[:, None, :, 1:].expand(-1, inputs.kv_heads, -1, -1).contiguous()
        place = torch.searchsorted(flat, number.flatten(3).contiguous(), right=True).clamp(max=half - 1)
        place = (place + torch.arange(halves, device=inputs.device)[:, None] * half).flatten(2)
        source = key_order.gather(2, (anchor[:, None, None] + place).clamp(max=keys - 1))
        past = torch.arange(keys, device=inputs.device) - anchor[:, None]
        chosen = source.gather(2, past.clamp(0, source.shape[2] - 1)[:, None].expand(-1, inputs.kv_heads, -1))
        identity = torch.arange(keys, device=inputs.device)
        log_weight = (others.double() / self.block).log().flatten(1)
        return torch.where((past >= 0)[:, None], chosen, identity), log_weight
