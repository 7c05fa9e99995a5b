"""Key columns that a few rows vote for: SnapKV, TokenSelect and ZipVL, as one pattern with three presets.

Li et al., "SnapKV", 2024, arXiv:2404.14469; Wu et al., "TokenSelect", 2024, arXiv:2411.02886; He et al., "ZipVL", 2024,
arXiv:2410.08584. The first thins out a cache after the prefill, the second chooses tokens for each chunk of a prompt,
the third drops tokens for a whole layer: here their votes say which key blocks the rows of a prefill attend to.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.estimators.column_votes import (
    HEADS,
    Voters,
    column_votes,
    mean_rows_that_vote,
    rows_that_vote,
    set_slabs,
    smoothed,
)
from sparseprefill.estimators.selection import Budget, check_budget, check_count, check_share, check_tokens, keep_blocks
from sparseprefill.patterns.block_sparse import forced_blocks
from sparseprefill.patterns.expected_density import UNKNOWN, in_blocks, kept_share
from sparseprefill.patterns.expected_overhead import Overhead, stated_overhead
from sparseprefill.patterns.own_blocks import check_keys_reach
from sparseprefill.patterns.parts import Part

_VOTES = 1 << 25  # votes of sets on keys that are held at one time


@dataclass(frozen=True, slots=True)
class VoteColumns:
    """Sink, local window, and the key columns with the most votes.

    A vote is what a row's softmax gives a key, summed over the rows of a set and over heads, as `voters` says. Without
    a `superblock` the last `probe` queries vote on all keys that they see, and `spread` others, one from each of so
    many equal stretches before them; columns before the last `probe` queries are chosen once for all rows. With one,
    the mean query of each stretch of `superblock` tokens votes on the keys between the sink and the stretch; a row
    takes the choice of the stretch that it begins in, and keeps all from that stretch's beginning on.

    Votes are divided by the number of rows that vote on a key where `fair`, and smoothed over `width` neighbouring
    keys; a block gets the best of its keys. `keep` says how many of the candidate blocks are kept; or `mass` takes as
    many as hold this share of all votes, by falling votes, with what is kept in any case. Of equal votes the lower
    block comes first. Blocks of the sink, and from the first of the last `probe` queries on, are kept always.

    With `unit` = "token" single columns are chosen instead, in packs of a key block, gathered for each KV head: a row
    attends to the packs that lie wholly before its local window. What has no finite votes keeps everything, and is
    counted in `BlockIndex.unjudged`. It looks ahead. `keep` = 1.0 is dense.

    Raises ValueError or TypeError for numbers that are none, for both or neither of `keep` and `mass`, and for tokens
    with a superblock or with votes of single query heads.
    """

    keep: Budget | None = None  # of the candidates: tokens, or a share
    mass: float | None = None  # share of all votes
    sink: int = 64  # first tokens kept always
    local: int = 256  # tokens before the end of a row kept always
    probe: int = 64  # last queries
    spread: int = 0  # other queries
    superblock: int | None = None  # tokens that share a choice
    voters: str = "group"  # heads whose votes are added, one of HEADS
    smooth: str = "none"  # "none", "max" or "mean"
    width: int = 7  # keys, odd
    fair: bool = False  # early keys are not preferred for being seen by more rows
    unit: str = "block"  # or "token"
    seed: int = 0  # of the other queries

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.mass is None):
            raise ValueError(
                f"columns are chosen by keep or by mass, one of them, got keep={self.keep} and mass={self.mass}"
            )
        if self.keep is not None:
            check_budget("keep", self.keep)
        if self.mass is not None:
            check_share("mass", self.mass)
        check_tokens("sink", self.sink, least=0)
        check_tokens("local", self.local, least=0)
        check_tokens("probe", self.probe)
        check_count("spread", self.spread, least=0)
        check_count("width", self.width)
        check_count("seed", self.seed, least=0)
        if self.superblock is not None:
            check_tokens("superblock", self.superblock)
            asked = {"probe": 64, "spread": 0, "fair": False, "seed": 0}
            given = [name for name, default in asked.items() if getattr(self, name) != default]
            if given:
                raise ValueError(
                    f"with superblock= the mean query of each stretch votes, and {', '.join(given)} would change "
                    "nothing: leave out one or the other"
                )
        if self.width % 2 == 0:
            raise ValueError(f"width must be odd, so that a key stands in the middle, got {self.width}")
        for name, known in (("voters", HEADS), ("smooth", ("none", "max", "mean")), ("unit", ("block", "token"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r:.80}")
        if not isinstance(self.fair, bool):
            raise TypeError(f"fair must be True or False, got {self.fair!r:.80}")
        if self.unit == "token" and (self.superblock is not None or self.voters == "head"):
            raise ValueError(
                "unit='token' gathers the columns of each KV head once for the whole call: leave out superblock, and "
                "take voters='group' or 'all'"
            )

    @property
    def estimated_by(self) -> tuple[object, ...]:
        """What finding the columns takes depends on these; see `estimator_name`."""
        return self.probe, self.spread, self.superblock, self.voters, self.unit

    @property
    def in_parts(self) -> bool:
        """Whether keys are gathered; see `sparseprefill.patterns.parts`."""
        return self.unit == "token"

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        if self.keep == 1.0:
            return BlockIndex.dense(inputs, grid)
        forced, visible = self._forced(inputs, grid), grid.visible_block_mask(inputs)
        voters, row_set, number = self._voters(inputs, grid)
        chosen, unjudged = self._blocks(inputs, grid, voters, number)  # bool [batch, heads, sets, key_blocks]
        heads = chosen.shape[1]
        parts = []
        for start, stop in grid.slabs(heads):
            own = row_set[:, None, start:stop, None].expand(-1, heads, -1, grid.key_blocks)
            mask = (chosen.gather(2, own) | forced[:, None, start:stop]) & visible[:, None, start:stop]
            parts.append(
                BlockIndex.from_mask(grid, mask | (visible[:, None, start:stop] & ~mask.any(-1, keepdim=True)))
            )
        index = BlockIndex.stack(parts).for_heads(inputs.query_heads)
        whole = unjudged.gather(2, row_set[:, None].expand(-1, heads, -1))
        counted = (grid.real_queries(inputs)[:, None] * whole).sum(-1)
        return dataclasses.replace(index, unjudged=counted.repeat_interleave(inputs.query_heads // heads, 1))

    def build_parts(self, inputs: AttentionInputs, grid: BlockGrid) -> tuple[Part, ...]:
        """Sink and local window with the keys as they lie, and the gathered columns."""
        if self.unit != "token" or self.keep == 1.0:
            return (Part(inputs, self.build_index(inputs, grid)),)
        return self._token_parts(inputs, grid)

    def estimator_products(self, inputs: AttentionInputs, grid: BlockGrid) -> float:
        """See `sparseprefill.patterns.nested`. Keys are met twice."""
        if self.keep == 1.0:
            return 0.0
        if self.superblock is None:
            return 2.0 * min(inputs.queries, self.probe + self.spread) * inputs.last_key
        sets = -(-inputs.queries // self.superblock)
        return 2.0 * sets * inputs.last_key

    def tile_law(self) -> str:
        """See `sparseprefill.patterns.expected_tiles`: columns may lie in a row's local window, or behind it."""
        return "count" if self.keep == 1.0 else "content"

    def most_density(self, keys: int) -> float:
        """See `sparseprefill.patterns.expected_tiles`: as if all columns stood in front."""
        if self.keep is None:
            return 1.0
        own = in_blocks(self.probe) + 64 if self.superblock is None else 2 * in_blocks(self.superblock)
        forced = in_blocks(self.sink) + max(in_blocks(self.local), own) + 64
        columns = self.keep if isinstance(self.keep, int) else math.ceil(self.keep * keys)
        return min(1.0, kept_share(in_blocks(columns) + forced, keys))

    def expected_density(self, keys: int) -> float:
        stretch = 0 if self.superblock is None else self.superblock // 2
        forced = kept_share(in_blocks(self.sink) + max(in_blocks(self.local), stretch), keys)
        chosen = UNKNOWN if self.keep is None else kept_share(self.keep, keys)
        return min(1.0, forced + chosen)

    def expected_overhead(self, device: torch.device, head_dim: int, block_q: int, block_k: int) -> Overhead:
        """The voters' products and softmax, each a pass over them, and a mask of all tiles."""
        if self.keep == 1.0:
            return stated_overhead(device, head_dim, steps=0.1)
        if self.superblock is not None:
            pairs, tiles = 12 / self.superblock, 0.5 / (block_q * block_k)
            return stated_overhead(device, head_dim, pairs=pairs, tiles=tiles, steps=0.8)
        tiles = 0.25 / (block_q * block_k)
        return stated_overhead(device, head_dim, keys=3 * (self.probe + self.spread), tiles=tiles, steps=0.8)

    def _forced(self, inputs: AttentionInputs, grid: BlockGrid) -> Tensor:
        """bool [batch, rows, key_blocks]: sink and local window; with superblocks also a row's own stretch."""
        forced = forced_blocks(inputs, grid, self.sink, max(self.local, 1))
        row = grid.first[:, None] + torch.arange(grid.rows, device=inputs.device)
        block = torch.arange(grid.key_blocks, device=inputs.device)
        if self.superblock is None:  # where the row stands itself, and behind the candidates
            end = (inputs.tail() - self.probe - grid.anchor).clamp(min=0)[:, None] // grid.block_k
            first = torch.minimum(row * grid.block_q // grid.block_k, end)
        else:
            first = row * grid.block_q // self.superblock * self.superblock // grid.block_k
        return forced | (block >= first[..., None])

    def _voters(self, inputs: AttentionInputs, grid: BlockGrid) -> tuple[Voters, Tensor, Tensor]:
        """Who votes; int64 [batch, rows]: the set whose choice a row takes; int64 [batch, sets]: its stretch."""
        row = grid.first[:, None] + torch.arange(grid.rows, device=inputs.device)
        if self.superblock is None:
            return rows_that_vote(inputs, self.probe, self.spread, self.seed), torch.zeros_like(row), row[:, :1]
        sink = -(-self.sink // grid.block_k) * grid.block_k
        voters, number = mean_rows_that_vote(inputs, self.superblock, sink)
        own = row * grid.block_q // self.superblock - number[:, :1]
        return voters, own.clamp(0, voters.low.shape[1] - 1), number

    def _blocks(
        self, inputs: AttentionInputs, grid: BlockGrid, voters: Voters, stretch: Tensor
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """bool [batch, heads, sets, key_blocks]: the chosen blocks of each set; and [batch, heads, sets]: all of them,
        as there were no finite votes.
        """
        sets, size, blocks = voters.low.shape[1], grid.block_k, grid.key_blocks
        heads = {"head": inputs.query_heads, "group": inputs.kv_heads, "all": 1}[self.voters]
        slot = grid.anchor[:, None] + torch.arange(blocks * size, device=inputs.device)
        inside, place = slot < inputs.last_key, slot.clamp(max=inputs.keys - 1)
        chosen, whole = [], []
        for start, stop in set_slabs(inputs, sets, heads, _VOTES):
            votes, voted = column_votes(inputs, voters.part(start, stop), self.voters)
            candidates = self._candidates(inputs, grid, stretch[:, start:stop])  # [batch, sets, key_blocks]

            def by_block(each: Tensor) -> Tensor:
                own = place[:, None, None].expand(*each.shape[:3], -1)
                found: Tensor = (each.gather(3, own) * inside[:, None, None]).unflatten(3, (blocks, size))
                return found

            score = by_block(self._score(inputs, votes, voted)).amax(-1)
            unknown = ~votes.isfinite().all(-1)
            ranked = score.masked_fill(~candidates[:, None], -torch.inf).argsort(dim=-1, descending=True, stable=True)
            number = candidates.sum(-1)[:, None].expand(ranked.shape[:3])
            count = self._count(by_block(votes).sum(-1), candidates, number, size)
            first = torch.arange(blocks, device=inputs.device) < torch.minimum(count, number)[..., None]
            mask = torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, ranked, first)
            chosen.append(mask | unknown[..., None])
            whole.append(unknown)
        return torch.cat(chosen, 2), torch.cat(whole, 2)

    def _candidates(self, inputs: AttentionInputs, grid: BlockGrid, stretch: Tensor) -> Tensor:
        """bool [batch, sets, key_blocks]: behind the sink, and before those that all rows of the set keep."""
        block = torch.arange(grid.key_blocks, device=inputs.device)
        if self.superblock is None:
            end = (inputs.tail() - self.probe - grid.anchor).clamp(min=0)[:, None] // grid.block_k
        else:
            end = stretch * self.superblock // grid.block_k
        return (block >= -(-self.sink // grid.block_k)) & (block < end[..., None])

    def _score(self, inputs: AttentionInputs, votes: Tensor, voted: Tensor) -> Tensor:
        """[batch, heads, sets, keys]: what keys are ranked by."""
        score = votes / voted.clamp(min=1)[:, None] if self.fair else votes
        if self.superblock is None and self.smooth != "none":  # what the last rows keep anyway lends nothing
            key = torch.arange(inputs.keys, device=inputs.device)
            score = score.masked_fill((key >= (inputs.tail() - self.probe)[:, None])[:, None, None], 0.0)
        return smoothed(score, self.smooth, self.width)

    def _count(self, votes: Tensor, candidates: Tensor, number: Tensor, size: int) -> Tensor:
        """int64 [batch, heads, sets]: how many of the candidates are kept; votes of candidates, and of the others."""
        if self.mass is None:
            assert self.keep is not None
            return keep_blocks(self.keep, number, size)
        own = votes.masked_fill(~candidates[:, None], 0.0)
        falling = own.sort(-1, descending=True).values.cumsum(-1)
        total = votes.sum(-1, keepdim=True)
        kept = functional.pad(falling[..., :-1], (1, 0)) + (total - own.sum(-1, keepdim=True))
        count = (kept < self.mass * total - 1e-9 * total).sum(-1)
        return torch.where(torch.full_like(count, self.mass == 1.0, dtype=torch.bool), number, count)

    def _token_parts(self, inputs: AttentionInputs, grid: BlockGrid) -> tuple[Part, ...]:
        check_keys_reach("vote_columns with unit='token'", inputs)
        size, keys = grid.block_k, inputs.keys
        votes, voted = column_votes(inputs, self._voters(inputs, grid)[0], self.voters)
        score = self._score(inputs, votes, voted)[:, :, 0].expand(-1, inputs.kv_heads, -1)
        votes = votes[:, :, 0].expand(-1, inputs.kv_heads, -1)
        unknown = ~votes.isfinite().all(-1)  # [batch, kv_heads]
        slot = torch.arange(keys, device=inputs.device)
        edge = -(-self.sink // size), (inputs.tail() - self.probe - grid.anchor).clamp(min=0) // size
        candidates = (slot >= (grid.anchor + edge[0] * size)[:, None]) & (
            slot < (grid.anchor + edge[1] * size)[:, None]
        )
        if inputs.key_valid is not None:
            candidates = candidates & inputs.key_valid
        number = candidates.sum(-1)[:, None].expand(unknown.shape)
        packs = -(-self._count(votes, candidates, number, 1) // size)
        whole = unknown | (packs * size >= number)  # all candidates: nothing is gathered
        packs = packs.masked_fill(whole, 0)
        most = keys // size if inputs.device.type != "cpu" else int(packs.max())
        order = score.masked_fill(~candidates[:, None], -torch.inf).argsort(dim=-1, descending=True, stable=True)
        taken = torch.arange(keys, device=inputs.device) < (packs * size)[..., None]
        column = torch.where(taken, order, keys).sort(-1).values[..., : most * size]  # ascending, then none
        visible = grid.visible_block_mask(inputs)
        mask = (self._forced(inputs, grid)[:, None] | whole[..., None, None]) & visible[:, None]
        packed, cut = self._packs(inputs, grid, column, packs) if most else (None, None)
        if cut is not None:  # a row that sees a part of a pack alone gets the blocks of chosen columns instead
            mask = mask | (cut[..., None] & self._blocks_of(inputs, grid, column)[:, :, None] & visible[:, None])
        mask = mask | (visible[:, None] & ~mask.any(-1, keepdim=True))
        asked = grid.real_queries(inputs).sum(-1)[:, None] * unknown
        own = dataclasses.replace(
            BlockIndex.from_mask(grid, mask).for_heads(inputs.query_heads),
            unjudged=asked.repeat_interleave(inputs.group_size, 1),
        )
        if packed is None:
            return (Part(inputs, own),)
        return Part(inputs, own), Part(_gathered(inputs, column), packed)

    def _blocks_of(self, inputs: AttentionInputs, grid: BlockGrid, column: Tensor) -> Tensor:
        """bool [batch, kv_heads, key_blocks]: blocks that hold one of the columns."""
        block = (column - grid.anchor[:, None, None]).clamp(min=0) // grid.block_k
        inside = column < inputs.keys
        found = torch.zeros(*column.shape[:2], grid.key_blocks, dtype=torch.int32, device=column.device)
        return found.scatter_add_(2, block.clamp(max=grid.key_blocks - 1), inside.to(torch.int32)) > 0

    def _packs(
        self, inputs: AttentionInputs, grid: BlockGrid, column: Tensor, packs: Tensor
    ) -> tuple[BlockIndex, Tensor]:  # fmt: skip
        """Of each row the packs that end before its local window, and begin where all of its queries see; and bool
        [batch, kv_heads, rows]: rows of which some queries see a part of a pack alone, or see it alone; these get none.
        """
        size = grid.block_k
        first, last = column[..., ::size], column[..., size - 1 :: size]  # [batch, kv_heads, packs]
        row = grid.first[:, None] + torch.arange(grid.rows, device=inputs.device)
        near = torch.minimum(grid.frontier() - -(-max(self.local, 1) // size), row * grid.block_q // size)
        edge = grid.anchor[:, None] + near.clamp(min=0) * size
        begin, end = grid.row_slots()
        latest = (end - 1 - inputs.query_start).clamp(0, inputs.queries - 1)
        low = inputs.visible_range()[0].gather(1, latest)
        shape = (inputs.batch, inputs.kv_heads, grid.rows)
        since = torch.searchsorted(first.contiguous(), low[:, None].expand(shape).contiguous())
        until = torch.searchsorted(last.contiguous(), edge[:, None].expand(shape).contiguous())
        until = torch.minimum(until, packs[..., None]).masked_fill((end <= begin)[:, None], 0)
        since = torch.minimum(since, until)
        ends = last.gather(2, (since - 1).clamp(min=0))
        earliest = inputs.visible_range()[0].gather(1, (begin - inputs.query_start).clamp(0, inputs.queries - 1))
        cut = (since > 0) & (ends >= earliest[:, None])
        until = torch.where(cut, since, until)
        columns = torch.arange(grid.key_blocks, dtype=torch.int32, device=inputs.device)
        index = BlockIndex(grid, columns, since.clamp(max=grid.key_blocks - 1), (until - since).to(torch.int32))
        return index.for_heads(inputs.query_heads), cut


def _gathered(inputs: AttentionInputs, column: Tensor) -> AttentionInputs:
    """Keys and values with the columns (int64 [batch, kv_heads, columns], ascending) at each batch row's beginning.

    A column comes to stand no later than where it stood, so that whoever saw it sees it still; windows and segments are
    for who lists them to heed.
    """
    keys, anchor = inputs.keys, inputs.anchor()
    slot = torch.arange(keys, device=inputs.device)
    past = slot - anchor[:, None]
    moved = column.gather(2, past.clamp(0, column.shape[2] - 1)[:, None].expand(-1, inputs.kv_heads, -1))
    inside = ((past >= 0) & (past < column.shape[2]))[:, None]
    order = torch.where(inside, moved, slot).clamp(max=keys - 1)

    def taken(tensor: Tensor) -> Tensor:
        return tensor.gather(2, order[..., None].expand(-1, -1, -1, tensor.shape[3]))

    valid = None if inputs.key_valid is None else past >= 0
    return dataclasses.replace(
        inputs, key=taken(inputs.key), value=taken(inputs.value), key_valid=valid, window=None, segment=None
    )


def snapkv(
    keep: Budget | None = None, probe: int = 32, sink: int = 64, local: int = 256, width: int = 7, smooth: str = "max",
    voters: str = "group", unit: str = "block", mass: float | None = None,
) -> VoteColumns:  # fmt: skip
    """SnapKV's vote: the last queries, smoothed by the largest of neighbours; arXiv:2404.14469."""
    return VoteColumns(
        **_usual(keep, mass, 0.2), sink=sink, local=local, probe=probe, voters=voters, smooth=smooth, width=width,
        unit=unit,
    )  # fmt: skip


def tokenselect(
    keep: Budget | None = None, superblock: int = 512, sink: int = 128, local: int = 512, voters: str = "all",
    mass: float | None = None,
) -> VoteColumns:  # fmt: skip
    """TokenSelect's vote: the mean query of each stretch, over all heads; arXiv:2411.02886."""
    return VoteColumns(**_usual(keep, mass, 0.2), sink=sink, local=local, superblock=superblock, voters=voters)


def zipvl(
    mass: float | None = None, probe: int = 64, spread: int = 64, sink: int = 64, local: int = 256, voters: str = "all",
    seed: int = 0, unit: str = "block", keep: Budget | None = None,
) -> VoteColumns:  # fmt: skip
    """ZipVL's vote: recent and random queries, as many columns as hold a mass, the fairest first; arXiv:2410.08584."""
    given = {"mass": 0.975} if keep is None and mass is None else {"keep": keep, "mass": mass}
    return VoteColumns(
        **given, sink=sink, local=local, probe=probe, spread=spread, voters=voters, fair=True, seed=seed, unit=unit
    )  # fmt: skip


def _usual(keep: Budget | None, mass: float | None, usual: float) -> dict[str, Any]:
    """What was given, or the usual share."""
    return {"keep": usual if keep is None and mass is None else keep, "mass": mass}
