"""Hierarchical pruning: large chunks of keys are probed first, and the best are cut into smaller ones and probed again.

Lee et al., "InfiniteHiP", 2025, arXiv:2502.08910, after "HiP Attention", 2024, arXiv:2406.09827.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.estimators.probed_chunks import bisect, keys_met, probes
from sparseprefill.estimators.selection import Budget, check_budget, check_count, check_share, check_tokens
from sparseprefill.patterns.block_sparse import forced_blocks
from sparseprefill.patterns.expected_density import in_blocks, kept_share
from sparseprefill.patterns.expected_overhead import Overhead, stated_overhead

_NUMBERS = 1 << 23  # of keys that were gathered, held at one time

Stage = tuple[int, int, int]
"""Tokens of a chunk, tokens that come into the stage (of the first: of no account), neighbouring queries of a probe."""


@dataclass(frozen=True, slots=True)
class Hip:
    """Sink, local window, and of the keys between them the chunks that fit a row's probes best, after some stages.

    In each stage the chunks are probed by bisection (`sparseprefill.estimators.probed_chunks`), for each KV head, with
    the heads of its group together. Of the best ones, as many as the next stage lets in, or as `keep` says if that is
    more, it makes smaller chunks, in their order, and probes these. Of the last ones as many as hold `keep` tokens
    stay, and every tile that holds one. Of equal ones the earlier stays. A chunk is a candidate if it ends behind the
    sink and begins before the local window; keys of the row's own block and later ones are never met.

    A call in which the probing would take more than `most` of dense attention's products keeps everything, and is
    counted in `BlockIndex.unjudged`, as are rows with a probe that is not finite, or a product that is NaN. It does not
    look ahead. Positions are those that keys have; arXiv:2502.08910 moves them, which is how it reaches beyond a
    model's length.

    `keep` = 1.0 is dense. Raises ValueError or TypeError for numbers that are none, chunks that are no powers of two,
    or grow.
    """

    keep: Budget = 2048  # tokens, or a share of the keys before a row
    sink: int = 256  # first tokens kept always
    local: int = 1024  # tokens before the end of a row kept always
    stages: tuple[Stage, ...] = ((256, 0, 4), (64, 8192, 4))
    most: float = 0.1  # of dense attention's pairs, each a product: gathered ones take about half of its time

    def __post_init__(self) -> None:
        check_budget("keep", self.keep)
        check_tokens("sink", self.sink, least=0)
        check_tokens("local", self.local, least=0)
        check_share("most", self.most)
        given: Any = self.stages  # a list, from JSON, is not hashable
        if isinstance(given, (str, bytes)) or not hasattr(given, "__iter__") or not given:
            raise TypeError(f"stages is a list of (chunk, tokens, stride), got {given!r:.80}")
        stages: tuple[Any, ...] = tuple(tuple(each) if hasattr(each, "__iter__") else (each,) for each in given)
        object.__setattr__(self, "stages", stages)
        before = None
        for stage in stages:
            if len(stage) != 3:
                raise TypeError(f"a stage is (chunk, tokens, stride), got {stage!r:.80}")
            chunk, tokens, stride = stage
            check_count("chunk of a stage", chunk, least=2)
            check_count("tokens of a stage", tokens, least=0)
            check_count("stride of a stage", stride)
            if chunk & (chunk - 1):
                raise ValueError(f"a chunk is halved until single keys are left, and {chunk} is no power of two")
            if before is not None and chunk > before:
                raise ValueError(f"chunks of {chunk} tokens cannot be made of chunks of {before}: let them shrink")
            before = chunk

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        if self.keep == 1.0:
            return BlockIndex.dense(inputs, grid)
        real = grid.real_queries(inputs)
        pairs = inputs.queries * (inputs.query_start + inputs.queries / 2)
        if self.estimator_products(inputs, grid) > self.most * pairs:
            asked = real.sum(-1, keepdim=True).expand(-1, inputs.query_heads)
            return dataclasses.replace(BlockIndex.dense(inputs, grid), unjudged=asked)
        visible = grid.visible_block_mask(inputs)
        forced = forced_blocks(inputs, grid, self.sink, max(1, self.local))
        row = grid.first[:, None] + torch.arange(grid.rows, device=inputs.device)
        block = torch.arange(grid.key_blocks, device=inputs.device)
        forced = forced | (block >= (row * grid.block_q // grid.block_k)[..., None])
        parts, unjudged = [], torch.zeros(inputs.batch, inputs.kv_heads, dtype=torch.int64, device=inputs.device)
        for start, stop in self._slabs(inputs, grid):
            chosen, unknown = self._chosen(inputs, grid, start, stop)
            mask = (chosen | forced[:, None, start:stop] | unknown[..., None]) & visible[:, None, start:stop]
            parts.append(
                BlockIndex.from_mask(grid, mask | (visible[:, None, start:stop] & ~mask.any(-1, keepdim=True)))
            )
            unjudged += (unknown * real[:, None, start:stop]).sum(-1)
        index = BlockIndex.stack(parts).for_heads(inputs.query_heads)
        return dataclasses.replace(index, unjudged=unjudged.repeat_interleave(inputs.group_size, 1))

    def estimator_products(self, inputs: AttentionInputs, grid: BlockGrid) -> float:
        """See `sparseprefill.patterns.nested`; of a prompt without padding."""
        first = inputs.query_start // grid.block_q
        return self._products(first, first + grid.rows, grid.block_q)

    def _products(self, first: int, last: int, block_q: int) -> float:
        """Of the rows [first, last) of tiles."""
        total = 0.0
        if self.keep == 1.0:
            return total
        for row in range(first, last):
            middle = max(0, (row + 1) * block_q - self.local - self.sink)
            wanted = self.keep if isinstance(self.keep, int) else self.keep * (row + 1) * block_q
            for number, (chunk, tokens, stride) in enumerate(self.stages):
                come = middle if number == 0 else min(middle, max(tokens, wanted))
                total += come / chunk * keys_met(chunk) * -(-block_q // stride)
        return total

    def _tiles_of(self) -> int:
        """Tokens of the tiles of 64 that a kept token may cost."""
        return max(1, 64 // self.stages[-1][0])

    def most_density(self, keys: int) -> float:
        """See `sparseprefill.patterns.expected_tiles`; each small chunk may lie in a tile of its own."""
        if self._products(0, -(-keys // 64), 64) > 0.5 * self.most * keys * keys / 2:  # near the refusal
            return 1.0
        forced = in_blocks(self.sink) + in_blocks(self.local) + 64
        keep = kept_share(self.keep, keys) * self._tiles_of() + kept_share(2 * self.stages[-1][0], keys)
        return min(1.0, kept_share(forced, keys) + keep)

    def expected_density(self, keys: int) -> float:
        forced = kept_share(in_blocks(self.sink) + in_blocks(self.local), keys)
        if self._products(0, -(-keys // 64), 64) > self.most * keys * keys / 2:  # refused, and dense
            return 1.0
        # small chunks share tiles, or take one each: between the two
        return min(1.0, forced + kept_share(self.keep, keys) * math.sqrt(self._tiles_of()))

    def expected_overhead(self, device: torch.device, head_dim: int, block_q: int, block_k: int) -> Overhead:
        """The first stage grows as dense attention does, the others by the token; keys are gathered one by one."""
        (chunk, _, stride), *others = self.stages
        pairs = keys_met(chunk) / (chunk * stride)
        wanted = self.keep if isinstance(self.keep, int) else 0
        per_key = sum(max(t, wanted) / c * keys_met(c) / s for c, t, s in others)
        tiles = 0.5 / (block_q * block_k)
        return stated_overhead(device, head_dim, pairs=4 * pairs, keys=4 * per_key, tiles=tiles, steps=3.0)

    def _chosen(self, inputs: AttentionInputs, grid: BlockGrid, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """bool [batch, kv_heads, rows, key_blocks], and bool [batch, kv_heads, rows]: rows that nobody can judge."""
        size, shape = grid.block_k, (inputs.batch, inputs.kv_heads, stop - start)
        row = grid.first[:, None] + torch.arange(start, stop, device=inputs.device)
        begin, end = (slots[:, start:stop] for slots in grid.row_slots())
        near = (grid.frontier()[:, start:stop] - -(-max(1, self.local) // size)).clamp(min=0) * size
        near = torch.minimum(near, row * grid.block_q)  # candidates begin before this, counted from the anchor
        last = (end - 1 - inputs.query_start).clamp(0, inputs.queries - 1)
        low = inputs.visible_range()[0].gather(1, last)
        high = torch.minimum(begin, grid.anchor[:, None] + row * grid.block_q)
        before = (row + 1) * grid.block_q
        if isinstance(self.keep, int):
            wanted = torch.full_like(before, self.keep)
        else:
            wanted = (before.double() * self.keep - 1e-9).ceil().to(torch.int64)
        most = self.keep if isinstance(self.keep, int) else math.ceil(self.keep * (inputs.last_key + grid.block_q))
        first = self.stages[0][0]
        count = max(1, -(-inputs.last_key // first))
        place = (torch.arange(count, device=inputs.device) * first).expand(*shape, -1)
        sink = -(-self.sink // size) * size
        alive = (place + first > sink) & (place < near[:, None, :, None])
        unknown = torch.zeros(shape, dtype=torch.bool, device=inputs.device)
        score = torch.zeros(shape, device=inputs.device)
        for number, (chunk, tokens, stride) in enumerate(self.stages):
            if number:
                larger = self.stages[number - 1][0]
                come = -(-torch.maximum(wanted, torch.full_like(wanted, tokens)) // larger)
                place, alive = _best(score, place, alive, come, -(-max(tokens, most) // larger))
                parts = torch.arange(larger // chunk, device=inputs.device) * chunk
                place = (place[..., None] + parts).flatten(3)
                alive = alive.repeat_interleave(larger // chunk, 3) & (place < near[:, None, :, None])
                alive = alive & (place + chunk > sink)
            probe, asked = probes(inputs, grid, start, stop, stride)
            bad = ~probe.isfinite().all(-1).all(-1).unflatten(1, (inputs.kv_heads, -1)).all(2)
            score = bisect(inputs, probe, asked, grid.anchor[:, None, None, None] + place, chunk, low, high)
            unknown = unknown | bad | (score.isnan() & alive).any(-1)
            score = score.masked_fill(~alive, -torch.inf).nan_to_num(nan=-torch.inf, posinf=torch.inf)
        chunk = self.stages[-1][0]
        place, alive = _best(score, place, alive, -(-wanted // chunk), -(-most // chunk))
        steps = torch.arange(max(1, -(-chunk // size)), device=inputs.device) * size
        reached = torch.cat([(place[..., None] + steps).flatten(3), place + chunk - 1], 3) // size
        real = torch.cat([alive.repeat_interleave(len(steps), 3), alive], 3)
        reached = torch.where(real, reached, grid.key_blocks).clamp(max=grid.key_blocks)
        found = torch.zeros(*shape, grid.key_blocks + 1, dtype=torch.bool, device=inputs.device)
        return found.scatter_(-1, reached, True)[..., :-1], unknown

    def _slabs(self, inputs: AttentionInputs, grid: BlockGrid) -> Iterator[tuple[int, int]]:
        chunks = max(-(-inputs.last_key // self.stages[0][0]), *(-(-t // c) for c, t, _ in self.stages))
        each = inputs.batch * chunks * (inputs.kv_heads * inputs.head_dim + inputs.query_heads * grid.block_q)
        together = max(1, _NUMBERS // max(1, each))
        for start in range(0, grid.rows, together):
            yield start, min(grid.rows, start + together)


def _best(score: Tensor, place: Tensor, alive: Tensor, count: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Places of the `count` (int64 [batch, rows]) best ones that are alive, in rising order, and which are real.

    `most`: no row has a larger count.
    """
    most = min(most, place.shape[3])
    order = score.argsort(dim=-1, descending=True, stable=True)[..., :most]
    real = alive.gather(3, order) & (score.gather(3, order) > -torch.inf)
    real = real & (torch.arange(most, device=score.device) < count[:, None, :, None])
    far = torch.iinfo(torch.int64).max // 4
    kept = torch.where(real, place.gather(3, order), far).sort(-1).values
    return kept, kept < far
