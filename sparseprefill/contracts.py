"""The nouns: what attention receives, which blocks it computes, what it returns. Imports torch only."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SLAB_ENTRIES = 1 << 25  # scores or mask entries that a pattern holds at one time
_SORT_ENTRIES = 1 << 22  # of those, where each also has an id of 8 bytes, twice


@dataclass(frozen=True, slots=True, eq=False)
class AttentionInputs:
    """One layer's projections: rotated, cache-complete, grouped heads not repeated. Nothing of the model survives here.

    Query head h reads KV head h // group_size. Key j is visible to query i (which stands in cache slot
    p = query_start + i) iff

        j <= p,   j < key_length,   key_valid[j],   segment[j] == segment[p],   p - j < window.

    Segments are contiguous, so without `key_valid` the visible keys of a query are one interval; every implementation
    relies on that, and only `key_valid` may punch holes into it. A second turn in a left-padded batch has such holes.

    Raises TypeError or ValueError at construction where shapes, dtypes or devices do not fit together.
    """

    query: Tensor  # [batch, query_heads, queries, head_dim]
    key: Tensor  # [batch, kv_heads, keys, head_dim]
    value: Tensor  # [batch, kv_heads, keys, value_dim]
    scale: float  # logits = scale * query . key
    softcap: float | None = None  # logits become softcap * tanh(logits / softcap)
    sinks: Tensor | None = None  # [query_heads], a logit a head that takes mass and has no value
    window: int | None = None  # keys a query sees at most, itself included
    key_valid: Tensor | None = None  # bool [batch, keys]
    query_start: int = 0  # cache slot of query 0
    key_length: int | None = None  # slots filled; None: all keys
    segment: Tensor | None = None  # integer [batch, keys], non-decreasing; packed prompts do not see each other

    def __post_init__(self) -> None:
        for name in ("query", "key", "value"):
            tensor = getattr(self, name)
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
            if tensor.dim() != 4:
                raise ValueError(
                    f"{name} must have 4 dimensions [batch, heads, tokens, dim], got {tuple(tensor.shape)}"
                )
            if not tensor.is_floating_point():
                raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        query, key, value = self.query, self.key, self.value
        if key.shape[:3] != value.shape[:3]:
            raise ValueError(f"key and value disagree: {tuple(key.shape)=}, {tuple(value.shape)=}")
        if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
            raise ValueError(f"query and key disagree: {tuple(query.shape)=}, {tuple(key.shape)=}")
        if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
            raise ValueError(f"query heads must be a multiple of KV heads: {query.shape[1]} and {key.shape[1]}")
        if not query.dtype == key.dtype == value.dtype:
            raise TypeError(f"one dtype is needed: {query.dtype=}, {key.dtype=}, {value.dtype=}")
        if not query.device == key.device == value.device:
            raise ValueError(f"one device is needed: {query.device=}, {key.device=}, {value.device=}")
        if self.queries == 0 or self.batch == 0 or self.query_heads == 0:
            raise ValueError(f"nothing to attend from: {tuple(query.shape)=}")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale must be a positive number, got {self.scale}")
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise ValueError(f"softcap must be a positive number or None, got {self.softcap}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 or None, got {self.window}")
        if self.sinks is not None and self.sinks.shape != (self.query_heads,):
            raise ValueError(f"sinks must be [query_heads] = [{self.query_heads}], got {tuple(self.sinks.shape)}")
        for name in ("key_valid", "segment"):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tensor.shape != (self.batch, self.keys):
                raise ValueError(f"{name} must be [batch, keys] = {(self.batch, self.keys)}, got {tuple(tensor.shape)}")
            if (tensor.dtype == torch.bool) != (name == "key_valid") or tensor.is_floating_point():
                raise TypeError(f"{name} has the wrong dtype: {tensor.dtype}")
            if tensor.device != query.device:
                raise ValueError(f"{name} is on {tensor.device}, the query on {query.device}")
        if not 0 <= self.filled <= self.keys:
            raise ValueError(f"key_length must be between 0 and {self.keys} keys, got {self.key_length}")
        if self.query_start < 0 or self.query_start + self.queries > self.keys:
            raise ValueError(
                f"queries stand in cache slots {self.query_start} to {self.query_start + self.queries - 1}, "
                f"but there are {self.keys} keys"
            )

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def query_heads(self) -> int:
        return self.query.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.key.shape[1]

    @property
    def group_size(self) -> int:
        return self.query_heads // self.kv_heads

    @property
    def queries(self) -> int:
        return self.query.shape[2]

    @property
    def keys(self) -> int:
        return self.key.shape[2]

    @property
    def head_dim(self) -> int:
        return self.query.shape[3]

    @property
    def value_dim(self) -> int:
        return self.value.shape[3]

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def filled(self) -> int:
        """Key slots that may be seen: `key_length`, or all of them."""
        return self.keys if self.key_length is None else self.key_length

    @property
    def last_key(self) -> int:
        """One past the last slot any query of these can see."""
        return min(self.filled, self.query_start + self.queries)

    def select_heads(self, heads: Sequence[int]) -> AttentionInputs:
        """Only some query heads, in the order named. Keys are copied only where `heads` breaks up a group."""
        if list(heads) == list(range(self.query_heads)):
            return self
        groups = [h // self.group_size for h in heads[:: self.group_size]]
        whole = [g * self.group_size + n for g in groups for n in range(self.group_size)]
        kv = groups if list(heads) == whole else [h // self.group_size for h in heads]
        return dataclasses.replace(
            self, query=self.query[:, list(heads)], key=self.key[:, kv], value=self.value[:, kv],
            sinks=None if self.sinks is None else self.sinks[list(heads)],
        )  # fmt: skip

    def anchor(self) -> Tensor:
        """int64 [batch]: each row's first valid key, where its block grid begins (`keys` if it has none)."""
        if self.key_valid is None:
            return torch.zeros(self.batch, dtype=torch.int64, device=self.device)
        first = self.key_valid.int().argmax(1)
        return torch.where(self.key_valid.any(1), first, self.keys)

    def tail(self) -> Tensor:
        """int64 [batch]: one past each row's last valid query slot, where right padding begins."""
        end = self.query_start + self.queries
        if self.key_valid is None:
            return torch.full((self.batch,), end, dtype=torch.int64, device=self.device)
        own = self.key_valid[:, self.query_start : end]
        return torch.where(own.any(1), end - own.flip(1).int().argmax(1), self.query_start + 1)

    def visible_range(self) -> tuple[Tensor, Tensor]:
        """int64 [batch, queries] twice: keys in [low, high) that are also valid are visible to the query."""
        slot = torch.arange(self.query_start, self.query_start + self.queries, device=self.device)
        slot = slot.expand(self.batch, -1)
        high = (slot + 1).clamp(max=self.filled)
        low = torch.zeros_like(slot)
        if self.window is not None:
            low = (slot - self.window + 1).clamp(min=0)
        if self.segment is not None:
            own = self.segment.gather(1, slot)
            low = torch.maximum(low, torch.searchsorted(self.segment.contiguous(), own.contiguous()))
        if self.key_valid is not None:
            low = torch.maximum(low, self.anchor()[:, None])
        return low, high

    def visible_mask(self, start: int = 0, stop: int | None = None) -> Tensor:
        """bool [batch, stop - start, keys] for a slab of queries, from the definition. For oracles and tests."""
        stop = self.queries if stop is None else stop
        slot = torch.arange(self.query_start + start, self.query_start + stop, device=self.device)[:, None]
        key = torch.arange(self.keys, device=self.device)
        mask = (key <= slot) & (key < self.filled)
        if self.window is not None:
            mask &= slot - key < self.window
        mask = mask.expand(self.batch, -1, -1)
        if self.segment is not None:
            mask = mask & (self.segment[:, None, :] == self.segment[:, slot[:, 0], None])
        if self.key_valid is not None:
            mask = mask & self.key_valid[:, None, :]
        return mask


@dataclass(frozen=True, slots=True, eq=False)
class AttentionOutput:
    """What attention over some blocks gave.

    lse is the natural logarithm of the sum of exp(logits) over the real keys whose values entered; sinks are not in it.
    A row that sees no key has lse -inf and output 0. exp(lse_sparse - lse_dense) is the share of the true attention
    mass that a selection kept, per query, exactly. Tiles that `BlockIndex.skip` left out are in neither.
    """

    output: Tensor | None  # [batch, query_heads, queries, value_dim], None in lse-only mode
    lse: Tensor  # float32 (float64 from the oracle) [batch, query_heads, queries]
    skipped: Tensor | None = None  # int64 [batch, query_heads], visible pairs in skipped tiles; None without `skip`


@dataclass(frozen=True, slots=True, eq=False)
class BlockGrid:
    """The tiles that queries and keys are cut into.

    Blocks are anchored at each batch row's first valid key, so padding, chunks and cached prefixes meet the same grid:
    query block m of the grid holds the slots [anchor + m * block_q, anchor + (m + 1) * block_q), key block n likewise.
    Row r of an index is the grid's query block `first + r`. A chunk that starts inside a block has a partial first row;
    a batch row with fewer blocks than its neighbours has rows without queries at the end.

    Example: anchor 3, block_q 4, slots 5 to 12 asked: first = 0, row 0 holds slots 5-6, row 1 slots 7-10, row 2 11-12.
    """

    block_q: int  # tokens of a query block
    block_k: int  # tokens of a key block
    anchor: Tensor  # int64 [batch], the slot where each batch row's grid begins
    first: Tensor  # int64 [batch], the grid's query block that is row 0
    rows: int  # rows of an index on this grid
    key_blocks: int  # no list names a block at or above this
    query_start: int  # cache slot of query 0
    queries: int  # of the inputs this grid was made for
    since: Tensor | None = None  # int64 [batch, rows]: a row's lists name no block below this; see `between`
    until: Tensor | None = None  # int64 [batch, rows]: nor any at or above this

    @staticmethod
    def of(inputs: AttentionInputs, block_q: int, block_k: int) -> BlockGrid:
        """The grid of these inputs. Reads nothing back to the host: with padding, `rows` may be one too many.

        Raises ValueError for block sizes below 1.
        """
        for name, size in (("block_q", block_q), ("block_k", block_k)):
            if size < 1:
                raise ValueError(f"{name} must be positive, got {size}")
        start, queries = inputs.query_start, inputs.queries
        anchor = inputs.anchor()
        rows = -(-(start + queries) // block_q) - start // block_q
        if inputs.key_valid is not None and start:
            rows = (queries + block_q - 2) // block_q + 1
        first = (start - anchor).clamp(min=0) // block_q
        key_blocks = max(1, -(-inputs.last_key // block_k))
        return BlockGrid(block_q, block_k, anchor, first, rows, key_blocks, start, queries)

    def between(self, since: Tensor, until: Tensor) -> BlockGrid:
        """The same tiles, but rows choose among the key blocks [since, until) alone, int64 [batch, rows].

        A row that sees none of them gets one block all the same, as no list is empty: whoever asks drops it.
        """
        return dataclasses.replace(self, since=since, until=until)

    def fits(self, inputs: AttentionInputs) -> str | None:
        """Why an index on this grid cannot be used with these inputs, or None."""
        if (self.query_start, self.queries) != (inputs.query_start, inputs.queries):
            return (
                f"it was made for {self.queries} queries from slot {self.query_start}, "
                f"the inputs have {inputs.queries} from {inputs.query_start}"
            )
        if self.anchor.shape[0] != inputs.batch:
            return f"it was made for a batch of {self.anchor.shape[0]}, the inputs have {inputs.batch}"
        if self.anchor.device != inputs.device:
            return f"it is on {self.anchor.device}, the inputs are on {inputs.device}"
        if self.key_blocks != max(1, -(-inputs.last_key // self.block_k)):
            return f"it was made for {self.key_blocks} key blocks, the inputs have {inputs.last_key} keys to see"
        return None

    def row_slots(self) -> tuple[Tensor, Tensor]:
        """int64 [batch, rows] twice: the slots [start, stop) asked in each row; empty for rows without queries."""
        block = self.first[:, None] + torch.arange(self.rows, device=self.anchor.device)
        edge = self.anchor[:, None] + block * self.block_q
        end = self.query_start + self.queries
        start = edge.clamp(self.query_start, end)
        return start, torch.minimum((edge + self.block_q).clamp(max=end), torch.full_like(edge, end)).clamp(min=start)

    def real_queries(self, inputs: AttentionInputs) -> Tensor:
        """int64 [batch, rows]: how many queries of each row are no padding."""
        start, stop = (slots - self.query_start for slots in self.row_slots())
        if inputs.key_valid is None:
            return stop - start
        own = inputs.key_valid[:, self.query_start : self.query_start + self.queries]
        before = torch.nn.functional.pad(own.to(torch.int64).cumsum(1), (1, 0))
        return before.gather(1, stop) - before.gather(1, start)

    def frontier(self) -> Tensor:
        """int64 [batch, rows]: key blocks up to the end of each whole row, asked entirely or not; a chunk's edge does
        not move it, so rules that count from it choose the same blocks in any chunk.
        """
        row = self.first[:, None] + torch.arange(1, self.rows + 1, device=self.anchor.device)
        return -(-row * self.block_q // self.block_k)

    def reach(self, row: int) -> int:
        """How many key blocks a row can see at most: those up to its end if the grid began at slot 0.

        Known on the host. Padding makes a row see fewer, never more.
        """
        end = (self.query_start // self.block_q + row + 1) * self.block_q
        return min(self.key_blocks, -(-end // self.block_k))

    def query_rows(self) -> Tensor:
        """int64 [batch, queries]: the row each query stands in, -1 for padding before the anchor."""
        slot = torch.arange(self.query_start, self.query_start + self.queries, device=self.anchor.device)
        past = slot - self.anchor[:, None]
        return torch.where(past >= 0, past // self.block_q - self.first[:, None], -1)

    def visible_blocks(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """int64 [batch, rows] twice: the key blocks [low, high) in which a row may see something.

        Blocks in between may still be empty where `key_valid` has holes. A row without queries gets block 0.
        """
        low, high = inputs.visible_range()
        start, stop = self.row_slots()
        some = stop > start
        first = (start - self.query_start).clamp(max=self.queries - 1)
        last = (stop - 1 - self.query_start).clamp(0, self.queries - 1)
        low_block = (low.gather(1, first) - self.anchor[:, None]).clamp(min=0) // self.block_k
        high_block = -(-(high.gather(1, last) - self.anchor[:, None]) // self.block_k)
        low_block = torch.where(some, low_block, 0)
        high_block = torch.where(some, high_block, 1).clamp(max=self.key_blocks)
        if self.since is not None and self.until is not None:
            low_block = torch.maximum(low_block, self.since)
            high_block = torch.minimum(high_block, self.until)
            low_block = torch.where(high_block > low_block, low_block, 0)
        low_block = low_block.clamp(max=self.key_blocks - 1)  # a window may begin where a cache has ended
        return low_block, torch.maximum(high_block, low_block + 1)

    def visible_block_mask(self, inputs: AttentionInputs) -> Tensor:
        """bool [batch, rows, key_blocks] of `visible_blocks`."""
        low, high = self.visible_blocks(inputs)
        block = torch.arange(self.key_blocks, device=self.anchor.device)
        return (block >= low[..., None]) & (block < high[..., None])

    def slabs(self, heads: int, entries: int | None = None) -> Iterator[tuple[int, int]]:
        """Rows [start, stop), a slab at a time, so that what is held for `heads` x rows x key_blocks stays bounded.

        `entries`: at most so many at a time, where the common bound is not small enough.
        """
        most = _SLAB_ENTRIES if entries is None else min(entries, _SLAB_ENTRIES)
        together = max(1, most // (self.anchor.shape[0] * heads * self.key_blocks))
        for start in range(0, self.rows, together):
            yield start, min(self.rows, start + together)


@dataclass(frozen=True, slots=True, eq=False)
class BlockIndex:
    """Ragged lists of key blocks, one for each (batch row, query head, row of the grid).

    Row r attends to columns[start[r] : start[r] + count[r]]: strictly ascending, at least one, each inside the grid's
    visible blocks. Lists may have slack between them and may share storage (a dense index is one list that all rows
    read from), so an estimator over-allocates freely and never reads a length back to the host. Only where an index is
    one of several parts (`sparseprefill.patterns.parts`) may a list be empty; it too begins inside the storage.

    Example, 3 rows, causal, one sink block and the diagonal: columns [0, 0, 1, 0, 2], start [0, 1, 3], count [1, 2, 2].

    With `skip`, a kernel leaves out tiles while it visits them (BLASST, arXiv:2512.12087; SpargeAttn,
    arXiv:2502.18137): their exponentials, their values, their part of lse. Let r be the largest logit that a query met
    in the tiles computed so far, -inf before the first. A tile is skipped iff no query of the row has a logit there
    above r + skip. Only asked queries whose own slot is valid count: neither padding, whose output then means nothing,
    nor a chunk's edge keeps a tile; a logit that is NaN does. Each dropped key weighs at most lambda = exp(skip) of the
    heaviest key that was computed: a query that drops n keys loses at most n * lambda / (1 + n * lambda) of its mass.
    The earlier heavy tiles are visited, the more is skipped. skip -inf skips nothing; 0 skips what raises no query's r.

    `visit` without `skip` changes nothing but rounding, and may be ignored.
    """

    grid: BlockGrid  # the tiles that rows and key blocks are numbered by
    columns: Tensor  # int32 [capacity], key blocks
    start: Tensor  # int64 [batch, query_heads, rows], where each list begins in `columns`
    count: Tensor  # int32 [batch, query_heads, rows], how long it is
    unjudged: Tensor | None = None  # int64 [batch, query_heads], queries whose row was kept whole as none could choose
    visit: Tensor | None = None  # int32 [capacity], each list as in `columns`, in the order of visits; None: ascending
    skip: Tensor | None = None  # float32 [batch, query_heads, rows], natural log of lambda <= 1 for each list
    alike: int = 1  # so many neighbouring heads have the same lists, as whoever made them promises; ask `shared_by`

    @property
    def query_heads(self) -> int:
        return self.start.shape[1]

    @property
    def shared_by(self) -> int:
        """How many neighbouring query heads one list serves, as far as the host knows: a divisor of their number.

        All of them where the lists are expanded over the heads. A kernel may then load a key block once for several.
        """
        if self.start.stride(1) == self.count.stride(1) == 0:
            return self.query_heads
        return self.alike

    def for_heads(self, query_heads: int) -> BlockIndex:
        """The same lists for more heads, each for query_heads / self.query_heads neighbours; nothing is copied but
        where lists begin and how long they are. One list a KV head becomes one for each head of its group.

        Raises ValueError where the number of heads is no multiple.
        """
        many, rest = divmod(query_heads, self.query_heads)
        if rest or not many:
            raise ValueError(f"lists of {self.query_heads} heads cannot be shared by {query_heads}: give a multiple")

        def spread(tensor: Tensor) -> Tensor:
            if self.query_heads == 1:
                return tensor.expand(-1, query_heads, *tensor.shape[2:])
            return tensor.repeat_interleave(many, 1)

        unjudged, skip = (None if each is None else spread(each) for each in (self.unjudged, self.skip))
        return BlockIndex(
            self.grid, self.columns, spread(self.start), spread(self.count), unjudged, self.visit, skip,
            many * self.shared_by,
        )  # fmt: skip

    @staticmethod
    def dense(inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        """Every block that any query of the row may see."""
        low, high = grid.visible_blocks(inputs)
        columns = torch.arange(grid.key_blocks, dtype=torch.int32, device=inputs.device)
        shape = (inputs.batch, inputs.query_heads, grid.rows)
        return BlockIndex(
            grid, columns, low[:, None].expand(shape), (high - low).to(torch.int32)[:, None].expand(shape)
        )

    @staticmethod
    def from_mask(grid: BlockGrid, mask: Tensor) -> BlockIndex:
        """From bool [batch, query_heads, rows, key_blocks]. On a GPU this allocates for a full mask (no host sync)."""
        count = mask.sum(-1, dtype=torch.int32)
        if mask.device.type == "cpu":
            columns = mask.nonzero()[:, -1].to(torch.int32)
            if bool((count == 0).any()):  # rows of a part: their lists too begin inside the storage
                columns = torch.cat([columns, columns.new_zeros(1)])
            start = count.flatten().cumsum(0).view_as(count) - count
            return BlockIndex(grid, columns, start.to(torch.int64), count)
        blocks = mask.shape[-1]
        slot = torch.where(mask, mask.cumsum(-1) - 1, blocks)
        ids = torch.arange(blocks, dtype=torch.int32, device=mask.device).expand_as(slot)
        columns = torch.zeros(*mask.shape[:-1], blocks + 1, dtype=torch.int32, device=mask.device).scatter_(
            -1, slot, ids
        )
        start = torch.arange(count.numel(), device=mask.device).view_as(count) * (blocks + 1)
        return BlockIndex(grid, columns.flatten(), start, count)

    @staticmethod
    def from_slabs(
        grid: BlockGrid,
        query_heads: int,
        slabs: Sequence[tuple[int, int]],
        chosen: Callable[[int, int], Tensor],
        scores: Callable[[int, int], Tensor] | None = None,
    ) -> BlockIndex:
        """From the masks of consecutive slabs of rows, made and written one at a time; for GPUs.

        Nothing is read back to the host, and no list has room for more blocks than the last row of its slab can see
        (`BlockGrid.reach`). One prompt of 128k tokens, 32 heads, blocks of 64 x 64, slabs of 64 rows: 64 * 32 lists
        have room for 64 * s + 1 ids of 4 bytes in slab s = 1 .. 32, together 264 MiB; masks of all blocks at once
        would have made 512 MiB, and a join of slabs twice what it joins.

        Args:
            grid: the grid of all rows.
            query_heads: heads in each mask.
            slabs: rows [start, stop), in order and without gaps, all rows of the grid.
            chosen: called with a slab, gives bool [batch, query_heads, stop - start, key_blocks], of visible blocks.
            scores: called after it, gives numbers of that shape: higher ones are visited first, ties by lower id.
        """
        batch, device = grid.anchor.shape[0], grid.anchor.device
        # one place more a list: where the blocks go that are not chosen
        sizes = [batch * query_heads * (stop - start) * (grid.reach(stop - 1) + 1) for start, stop in slabs]
        columns = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        visit = None if scores is None else torch.zeros_like(columns)
        starts, counts = [], []
        for (start, stop), size, before in zip(slabs, sizes, itertools.accumulate(sizes, initial=0), strict=False):
            width = grid.reach(stop - 1)
            mask = chosen(start, stop)[..., :width]
            room = slice(before, before + size)
            ids = torch.arange(width, dtype=torch.int32, device=device).expand_as(mask)
            count = _pack(mask, ids, columns[room])
            if visit is not None and scores is not None:
                order = scores(start, stop)[..., :width].argsort(dim=-1, descending=True, stable=True)
                _pack(mask.gather(-1, order), order.to(torch.int32), visit[room])
            starts.append(before + torch.arange(count.numel(), device=device).view_as(count) * (width + 1))
            counts.append(count)
        return BlockIndex(grid, columns, torch.cat(starts, 2), torch.cat(counts, 2), visit=visit)

    @staticmethod
    def from_slots(grid: BlockGrid, ids: Tensor, count: Tensor) -> BlockIndex:
        """From ids [batch, query_heads, rows, slots], of which the first `count` are ascending and valid."""
        start = torch.arange(count.numel(), device=ids.device).view_as(count) * ids.shape[-1]
        return BlockIndex(grid, ids.to(torch.int32).flatten(), start, count.to(torch.int32))

    @staticmethod
    def stack(slabs: Sequence[BlockIndex]) -> BlockIndex:
        """Join indexes over consecutive slabs of rows of one grid, first rows first."""
        if len(slabs) == 1:
            return slabs[0]
        offset = itertools.accumulate((slab.columns.numel() for slab in slabs), initial=0)
        counted = [slab.unjudged for slab in slabs if slab.unjudged is not None]
        return BlockIndex(
            slabs[0].grid,
            torch.cat([slab.columns for slab in slabs]),
            torch.cat([slab.start + before for slab, before in zip(slabs, offset, strict=False)], 2),
            torch.cat([slab.count for slab in slabs], 2),
            torch.stack(counted).sum(0) if counted else None,
            visit=_joined_visit(slabs),
            skip=_joined_skip(slabs, 2),
            alike=math.gcd(*(slab.shared_by for slab in slabs)),
        )

    @staticmethod
    def merge(parts: Sequence[tuple[Sequence[int], BlockIndex]], query_heads: int) -> BlockIndex:
        """Join indexes that each serve some query heads: parts are (heads, index over just those heads, in that order).

        Raises ValueError unless every head is served exactly once on one grid.
        """
        served = [head for heads, _ in parts for head in heads]
        if sorted(served) != list(range(query_heads)):
            raise ValueError(f"heads 0 to {query_heads - 1} must each be served once, got {sorted(served)}")
        grid = parts[0][1].grid
        starts, counts, offset = [], [], 0
        for heads, part in parts:
            if (part.grid.block_q, part.grid.block_k, part.grid.rows) != (grid.block_q, grid.block_k, grid.rows):
                raise ValueError("the parts stand on different grids")
            if part.query_heads != len(heads):
                raise ValueError(f"{len(heads)} heads named for an index over {part.query_heads}")
            starts.append(part.start + offset)
            counts.append(part.count)
            offset += part.columns.numel()
        if len(parts) == 1 and served == list(range(query_heads)):
            return parts[0][1]
        order = torch.tensor(served, device=grid.anchor.device).argsort()
        columns = torch.cat([part.columns for _, part in parts])
        unjudged = None
        if any(part.unjudged is not None for _, part in parts):
            each = [torch.zeros_like(p.count[..., 0], dtype=torch.int64) if p.unjudged is None else p.unjudged
                    for _, p in parts]  # fmt: skip
            unjudged = torch.cat(each, 1)[:, order]
        each_part = [part for _, part in parts]
        skip = _joined_skip(each_part, 1)
        return BlockIndex(
            grid, columns, torch.cat(starts, 1)[:, order], torch.cat(counts, 1)[:, order], unjudged,
            _joined_visit(each_part), None if skip is None else skip[:, order],
        )  # fmt: skip

    def visiting(self, scores: Tensor | Callable[[int, int], Tensor]) -> BlockIndex:
        """The same lists, visited by falling score, ties by lower id. Nothing is read back from a GPU.

        Args:
            scores: [batch, query_heads, rows, key_blocks]; those of blocks that are not listed do not matter. Or what
                gives rows [start, stop) of it, for scores that are better not held all at once.

        Raises ValueError where the scores have another shape.
        """
        grid = self.grid
        shape = (*self.count.shape, grid.key_blocks)
        if isinstance(scores, Tensor) and scores.shape != shape:
            raise ValueError(
                f"scores must be [batch, query_heads, rows, key_blocks] = {shape}, got {tuple(scores.shape)}"
            )
        rows = (lambda start, stop: scores[:, :, start:stop]) if isinstance(scores, Tensor) else scores
        slabs = list(grid.slabs(self.query_heads, _SORT_ENTRIES))
        ordered = BlockIndex.from_slabs(grid, self.query_heads, slabs, self.to_mask, rows)
        return dataclasses.replace(ordered, unjudged=self.unjudged, skip=self.skip)

    def skipping(self, log_threshold: float | Tensor) -> BlockIndex:
        """The same lists, whose kernel may skip tiles: see `skip` in the text of this class.

        With lambda = s / keys no query loses more than s / (1 + s) of its mass, at any length.

        Args:
            log_threshold: natural log of lambda, 0 at most; -inf skips nothing. One number, or a tensor [query_heads]
                or [batch, query_heads, rows].

        Raises ValueError for a number above 0 or NaN, or another shape. Numbers in a tensor on a GPU are not read back;
        `validate` does.
        """
        shape, device = self.count.shape, self.grid.anchor.device
        if not isinstance(log_threshold, Tensor):
            log_threshold = torch.full((), log_threshold, dtype=torch.float64)
        if log_threshold.dim() and log_threshold.shape not in (shape[1:2], shape):
            raise ValueError(
                "log_threshold must be one number, or a tensor [query_heads] or [batch, query_heads, rows] of "
                f"{tuple(shape)}, got {tuple(log_threshold.shape)}"
            )
        if log_threshold.device.type == "cpu" and not bool((log_threshold <= 0).all()):  # NaN is refused too
            raise ValueError(
                "log_threshold must be 0 or less: it is the natural log of lambda, a share of the heaviest key's weight"
            )
        given = log_threshold.to(device, torch.float32, non_blocking=True)
        given = given[:, None] if given.dim() == 1 else given
        return dataclasses.replace(self, skip=given.expand(shape))

    def to_mask(self, start: int = 0, stop: int | None = None) -> Tensor:
        """bool [batch, query_heads, rows, key_blocks]; `start`, `stop`: a slab of rows."""
        first, count = self.start[:, :, start:stop], self.count[:, :, start:stop]
        slot = torch.arange(self.grid.key_blocks, device=self.columns.device)
        real = slot < count[..., None]
        # slots beyond a list's end are clamped into storage and put into an extra column that is cut off
        ids = self.columns[(first[..., None] + slot).clamp(max=self.columns.numel() - 1)].to(torch.int64)
        ids = torch.where(real, ids, self.grid.key_blocks)
        mask = torch.zeros(*real.shape[:-1], self.grid.key_blocks + 1, dtype=torch.bool, device=ids.device)
        return mask.scatter_(-1, ids, True)[..., :-1]

    def visit_places(self, start: int = 0, stop: int | None = None) -> Tensor:
        """int64 [batch, query_heads, rows, key_blocks]: when each listed block is visited, key_blocks for the others.

        `start`, `stop`: a slab of rows.
        """
        first, count = self.start[:, :, start:stop], self.count[:, :, start:stop]
        blocks = self.grid.key_blocks
        slot = torch.arange(blocks, device=self.columns.device)
        real = slot < count[..., None]
        order = self.columns if self.visit is None else self.visit
        ids = order[(first[..., None] + slot).clamp(max=order.numel() - 1)].to(torch.int64)
        ids = torch.where(real, ids, blocks)
        places = torch.full((*real.shape[:-1], blocks + 1), blocks, device=ids.device)
        return places.scatter_(-1, ids, slot.expand_as(ids))[..., :-1]

    def validate(self, inputs: AttentionInputs, *, empty_rows: bool = False) -> None:
        """Check every promise of this class (reads back to the host; for tests and debugging). Raises ValueError.

        `empty_rows`: rows may be empty, as in an index that is one of several parts.
        """
        grid = self.grid
        reason = grid.fits(inputs)
        if reason:
            raise ValueError(f"this index does not belong to these inputs: {reason}")
        shape = (inputs.batch, inputs.query_heads, grid.rows)
        if self.start.shape != shape or self.count.shape != shape:
            raise ValueError(
                f"start and count must be {shape}, got {tuple(self.start.shape)}, {tuple(self.count.shape)}"
            )
        if (self.count < (0 if empty_rows else 1)).any():
            raise ValueError(f"{int((self.count < 1).sum())} rows have an empty list")
        if (self.count > grid.key_blocks).any() or (self.start < 0).any():
            raise ValueError("a list is longer than there are key blocks, or starts before the storage")
        if (self.start + self.count.clamp(min=1) > self.columns.numel()).any():
            raise ValueError("a list ends beyond the storage")
        slot = torch.arange(grid.key_blocks, device=self.columns.device)
        real = slot < self.count[..., None]
        ids = self.columns[(self.start[..., None] + slot).clamp(max=self.columns.numel() - 1)].to(torch.int64)
        if ((ids[..., 1:] <= ids[..., :-1]) & real[..., 1:]).any():
            raise ValueError("a list is not strictly ascending")
        low, high = grid.visible_blocks(inputs)
        if (((ids < low[:, None, :, None]) | (ids >= high[:, None, :, None])) & real).any():
            raise ValueError(
                "a list names a block that its queries cannot see (future, outside the window, or no block)"
            )
        if self.shared_by < 1 or self.query_heads % self.shared_by:
            raise ValueError(f"alike must divide the {self.query_heads} heads, got {self.shared_by}")
        for name, tensor in (("start", self.start), ("count", self.count)):
            first = tensor[:, :: self.shared_by].repeat_interleave(self.shared_by, 1)
            if not torch.equal(first, tensor):
                raise ValueError(
                    f"every {self.shared_by} heads should share their lists, but {name} differs among them"
                )
        if self.visit is not None:
            if self.visit.shape != self.columns.shape or self.visit.dtype != torch.int32:
                raise ValueError(
                    f"visit must be int32 {tuple(self.columns.shape)} as columns, "
                    f"got {self.visit.dtype} {tuple(self.visit.shape)}"
                )
            visited = self.visit[(self.start[..., None] + slot).clamp(max=self.columns.numel() - 1)].to(torch.int64)
            beyond = torch.iinfo(torch.int64).max
            if not torch.equal(visited.masked_fill(~real, beyond).sort(-1).values, ids.masked_fill(~real, beyond)):
                raise ValueError("visit does not name the blocks of each list, each once")
        if self.skip is not None:
            if self.skip.shape != shape or self.skip.dtype != torch.float32:
                raise ValueError(f"skip must be float32 {shape}, got {self.skip.dtype} {tuple(self.skip.shape)}")
            if not (self.skip <= 0).all():
                raise ValueError("skip must be 0 or less: it is the natural log of a share")


def _pack(mask: Tensor, ids: Tensor, room: Tensor) -> Tensor:
    """Write the marked ids [..., width] in their order to the front of each list; int32 [...], how many they are.

    `room` has width + 1 places a list, the last for what is not marked.
    """
    width = mask.shape[-1]
    place = mask.cumsum(-1, dtype=torch.int32)
    count = place[..., -1].clone()
    place = place.sub_(1).masked_fill_(~mask, width).to(torch.int64)
    room.view(*count.shape, width + 1).scatter_(-1, place, ids)
    return count


def _joined_visit(parts: Sequence[BlockIndex]) -> Tensor | None:
    """Storage of all parts, ascending where a part has no order of its own."""
    if all(part.visit is None for part in parts):
        return None
    return torch.cat([part.columns if part.visit is None else part.visit for part in parts])


def _joined_skip(parts: Sequence[BlockIndex], dim: int) -> Tensor | None:
    """Thresholds of all parts, joined along a dimension; a part without any never skips."""
    if all(part.skip is None for part in parts):
        return None
    never = -torch.inf
    return torch.cat([torch.full_like(p.count, never, dtype=torch.float32) if p.skip is None else p.skip
                      for p in parts], dim)  # fmt: skip
