"""Blocks with a key that signs alone promise much: every pair is looked at, with one bit a number.

You et al., "ShiftAddViT", 2023, arXiv:2306.06446, whose codes are trained; see `sparseprefill.estimators.sign_codes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.estimators.probe import head_slabs
from sparseprefill.estimators.selection import Budget, TopK, check_tokens
from sparseprefill.estimators.sign_codes import Codes, SignCodes
from sparseprefill.patterns.block_sparse import BlockSparse, forced_blocks
from sparseprefill.patterns.expected_density import in_blocks, kept_share
from sparseprefill.patterns.expected_overhead import Overhead, stated_overhead

_LOGITS = 1 << 22  # of queries and keys that are held at one time


@dataclass(frozen=True, slots=True)
class SignCode:
    """Sink, local window, and the blocks with the best pair, until `keep` of the visible ones are kept.

    A pair's score is its estimated logit less the largest estimated logit of its query, so that each query has a best
    pair with 0; a block has the score of its best pair in the row. Of equal scores the lower block comes first. Rows
    with an estimate that is not finite keep all and are counted in `BlockIndex.unjudged`.

    The mean of the keys is that of the whole call: it looks ahead by that. `keep` = 1.0 is dense. Raises ValueError or
    TypeError for numbers that are none.
    """

    keep: Budget = 0.2  # tokens, or a share of the visible keys
    bits: int = 128  # of a code
    sink: int = 64  # first tokens kept always
    local: int = 128  # tokens before the end of a row kept always
    seed: int = 0  # of the rotation

    def __post_init__(self) -> None:
        TopK(self.keep)
        self._codes()
        check_tokens("sink", self.sink, least=0)
        check_tokens("local", self.local, least=0)

    def _codes(self) -> SignCodes:
        return SignCodes(self.bits, self.seed)

    @property
    def family(self) -> tuple[Any, ...]:
        """Budgets of one code share its scores."""
        return SignCode, self.bits, self.sink, self.local, self.seed

    def estimate(self, inputs: AttentionInputs, grid: BlockGrid) -> tuple[list[tuple[int, int, Tensor]], Tensor]:
        """Scores of slabs of rows (first, last, [batch, query_heads, rows, key_blocks]), and int64 [batch, query_heads]
        queries of rows without finite ones, whose scores are equal.
        """
        codes = self._codes()
        along = codes.directions(inputs)
        key = codes.of_keys(inputs, along)
        slabs, unjudged = [], torch.zeros(inputs.batch, inputs.query_heads, dtype=torch.int64, device=inputs.device)
        real = grid.real_queries(inputs)
        for start, stop in self._slabs(inputs, grid):
            score = torch.cat([
                self._peaks(part, grid, Codes(key.sign[:, own], key.norm[:, own]), along, start, stop)
                for own, part in _groups(inputs)
            ], 1)  # fmt: skip
            whole = score.isnan().any(-1) | ~score.isfinite().any(-1)
            unjudged += (whole * real[:, None, start:stop]).sum(-1)
            slabs.append((start, stop, score.masked_fill(whole[..., None], torch.nan)))
        return slabs, unjudged

    def choose(
        self, estimate: tuple[list[tuple[int, int, Tensor]], Tensor], inputs: AttentionInputs, grid: BlockGrid
    ) -> BlockIndex:
        """`build_index` from an estimate of its family."""
        visible = grid.visible_block_mask(inputs)
        forced = forced_blocks(inputs, grid, self.sink, self.local)
        parts = []
        for start, stop, score in estimate[0]:
            whole = score.isnan().all(-1, keepdim=True)
            ids, count = TopK(self.keep).select(score.nan_to_num(-torch.inf, neginf=-torch.inf), visible[:, start:stop],
                                                forced[:, start:stop], grid.block_k)  # fmt: skip
            mask = BlockIndex.from_slots(grid, ids, count).to_mask() | (whole & visible[:, None, start:stop])
            parts.append(BlockIndex.from_mask(grid, mask))
        index = BlockIndex.stack(parts)
        return BlockIndex(grid, index.columns, index.start, index.count, estimate[1])

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        if not inputs.last_key:
            return BlockIndex.dense(inputs, grid)
        return self.choose(self.estimate(inputs, grid), inputs, grid)

    def estimator_products(self, inputs: AttentionInputs, grid: BlockGrid) -> float:
        """See `sparseprefill.patterns.nested`: every pair that is seen, of one bit a number; and the rotations."""
        pairs = inputs.queries * (inputs.query_start + inputs.queries / 2)
        return pairs + self.bits * (inputs.queries + inputs.last_key / inputs.group_size)

    def tile_law(self) -> str:
        """See `sparseprefill.patterns.expected_tiles`."""
        return "count"

    def counted_as(self) -> BlockSparse:
        """See `sparseprefill.patterns.expected_tiles`."""
        return BlockSparse(self.keep, self.sink, self.local)

    def expected_density(self, keys: int) -> float:
        return max(kept_share(self.keep, keys), kept_share(in_blocks(self.sink) + in_blocks(self.local), keys))

    def expected_overhead(self, device: torch.device, head_dim: int, block_q: int, block_k: int) -> Overhead:
        """Every pair, its angle and its maximum: several times dense attention, as measured."""
        pairs = 1.6 * max(1.0, self.bits / head_dim)
        return stated_overhead(
            device, head_dim, pairs=pairs, keys=2 * self.bits, tiles=1 / (block_q * block_k), steps=1.0
        )

    def _peaks(
        self, inputs: AttentionInputs, grid: BlockGrid, key: Codes, along: Tensor, start: int, stop: int
    ) -> Tensor:  # fmt: skip
        """[batch, query_heads, stop - start, key_blocks]: the best pair of each tile, -inf where there is none."""
        codes, size, blocks = self._codes(), grid.block_k, grid.key_blocks
        plain = inputs.key_valid is None  # keys lie in their blocks, and none behind the last row is looked at
        if plain:
            blocks = grid.reach(stop - 1)
            keys = min(inputs.last_key, blocks * size)
            key = Codes(key.sign[:, :, :keys], key.norm[:, :, :keys])
        begin, end = (slots[:, start:stop] - inputs.query_start for slots in grid.row_slots())
        place = begin[..., None] + torch.arange(grid.block_q, device=inputs.device)
        real = place < end[..., None]  # [batch, rows, block_q]
        place = place.clamp(0, inputs.queries - 1).flatten(1)
        if inputs.key_valid is not None:
            real = real & inputs.key_valid[:, inputs.query_start :].gather(1, place).view_as(real)
        low, high = (bound.gather(1, place)[..., None] for bound in inputs.visible_range())
        own = inputs.query.gather(2, place[:, None, :, None].expand(-1, inputs.query_heads, -1, inputs.head_dim))
        logits = codes.logits(codes.of(own.to(key.norm.dtype), along), key, inputs)
        slot = grid.anchor[:, None] + torch.arange(blocks * size, device=inputs.device)
        inside, at = slot < inputs.last_key, slot.clamp(max=max(0, inputs.last_key - 1))
        seen = inside[:, None] & (slot[:, None] >= low) & (slot[:, None] < high) & real.flatten(1)[..., None]
        if inputs.key_valid is not None:
            seen = seen & inputs.key_valid.gather(1, at)[:, None]
        if plain:
            laid = functional.pad(logits, (0, blocks * size - logits.shape[3]))
        else:
            laid = logits.gather(3, at[:, None, None].expand(-1, logits.shape[1], logits.shape[2], -1))
        laid = laid.masked_fill_(~seen[:, None], -torch.inf)
        best = laid.unflatten(3, (blocks, size)).amax(-1)  # of each query
        top = best.amax(-1, keepdim=True)
        relative = torch.where(top == -torch.inf, -torch.inf, best - top)
        peaks: Tensor = relative.unflatten(2, (stop - start, grid.block_q)).amax(3)
        return functional.pad(peaks, (0, grid.key_blocks - blocks), value=-torch.inf)

    @staticmethod
    def _slabs(inputs: AttentionInputs, grid: BlockGrid) -> list[tuple[int, int]]:
        each = inputs.batch * inputs.group_size * grid.block_q * max(1, grid.key_blocks * grid.block_k)
        together = max(1, _LOGITS // each)
        return [(start, min(grid.rows, start + together)) for start in range(0, grid.rows, together)]


def _groups(inputs: AttentionInputs) -> Iterator[tuple[slice, AttentionInputs]]:
    """KV heads one by one, each with the query heads of its group, so that logits of all keys stay few."""
    for start, stop, part in head_slabs(inputs, inputs.group_size):
        yield slice(start // inputs.group_size, -(-stop // inputs.group_size)), part
