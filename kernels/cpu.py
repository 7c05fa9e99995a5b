"""The CPU path: gathers the listed tiles and hands them, many rows at a time, to torch's fused CPU attention.

The tiles of a row are cut into pieces that fit a core's cache; pieces with equally many tiles form one batched call. A
tile that all queries of its row see entirely ("full") needs no mask; the few others (on the diagonal, at a window's
edge, around holes) are computed apart, with a mask. The pieces are joined by their logsumexp. Only listed tiles are
computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sparseprefill.contracts import AttentionInputs, AttentionOutput, BlockIndex
from sparseprefill.coverage import tile_pairs
from sparseprefill.kernels.tile_skip import tiles_to_compute

# gathered keys and values of one piece of a row, and of one batched call: on the cells of `sparseprefill bench` half or
# twice as much made no difference; a quarter, or rows in one piece, were slower
_PIECE_BYTES = 1 << 20
_CALL_BYTES = 4 << 20
_PEAKS = 1 << 22  # row maxima of tiles that are held at one time, where tiles may be skipped


def why_not_cpu(inputs: AttentionInputs, index: BlockIndex | None) -> str | None:
    """Why this path cannot serve these inputs, or None."""
    if inputs.device.type != "cpu":
        return f"it runs on the CPU, the inputs are on {inputs.device}"
    if inputs.query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes float32, bfloat16 and float16, not {inputs.query.dtype}"
    if inputs.query.requires_grad or inputs.key.requires_grad or inputs.value.requires_grad:
        return "it has no backward pass: run under torch.no_grad()"
    return None


def cpu_attention(
    inputs: AttentionInputs,
    index: BlockIndex,
    *,
    values: bool = True,
    only: Tensor | None = None,
    into: AttentionOutput | None = None,
) -> AttentionOutput:
    """Attention over the listed blocks; with `values=False` only lse is computed and no value is read.

    `only`, `into`: see `block_sparse_attention`.
    """
    if only is not None and into is not None:
        return _some_heads(inputs, index, values, only, into)
    if index.skip is not None:
        kept, skipped = _without_skipped(inputs, index, index.skip)
        return dataclasses.replace(cpu_attention(inputs, kept, values=values), skipped=skipped)
    if values and inputs.sinks is None and _is_plain_dense(inputs, index):
        return _dense(inputs)
    tiles = _Tiles.of(inputs, index, values)
    heads, rows, block_q = index.query_heads, index.grid.rows, index.grid.block_q
    shape = (inputs.batch * heads * rows, block_q)
    space = _Workspace()
    plain = values and inputs.softcap is None
    output: Tensor | None
    if plain and tiles.diagonal:
        output, lse = _diagonal(tiles, inputs, rows)
    else:
        lse = torch.full(shape, -torch.inf, dtype=torch.float32)  # whatever the caller's default dtype is
        output = torch.zeros(*shape, inputs.value_dim, dtype=torch.float32) if values else None
        for flat, ids in _batches(tiles, tiles.edge, tiles.edge_count, values):
            query = tiles.query.index_select(0, flat)
            part = _masked(query, ids, tiles, inputs, space, _edge_mask(flat, ids, tiles, inputs), values)
            _accumulate(flat, part, output, lse)
    for flat, ids in _batches(tiles, tiles.full, tiles.full_count, values):
        query = tiles.query.index_select(0, flat)
        if plain:
            part = _flash(query, ids, tiles, inputs, space)
        else:
            part = _masked(query, ids, tiles, inputs, space, values=values)
        _accumulate(flat, part, output, lse)
    return _scatter(inputs, index, output, lse)


def _some_heads(
    inputs: AttentionInputs, index: BlockIndex, values: bool, only: Tensor, into: AttentionOutput
) -> AttentionOutput:
    """One batch row after another: its marked heads as inputs of their own, written where they belong."""
    grid = index.grid
    for b in only.any(1).nonzero()[:, 0].tolist():
        heads = only[b].nonzero()[:, 0].tolist()
        row = slice(b, b + 1)
        alone = dataclasses.replace(
            inputs, query=inputs.query[row], key=inputs.key[row], value=inputs.value[row],
            key_valid=None if inputs.key_valid is None else inputs.key_valid[row],
            segment=None if inputs.segment is None else inputs.segment[row],
        ).select_heads(heads)  # fmt: skip
        own = dataclasses.replace(grid, anchor=grid.anchor[row], first=grid.first[row])
        lists = BlockIndex(
            own, index.columns, index.start[row, heads], index.count[row, heads], visit=index.visit,
            skip=None if index.skip is None else index.skip[row, heads],
        )  # fmt: skip
        part = cpu_attention(alone, lists, values=values)
        into.lse[b, heads] = part.lse[0]
        if into.skipped is not None:
            into.skipped[b, heads] = 0 if part.skipped is None else part.skipped[0]
        if into.output is not None and part.output is not None:
            into.output[b, heads] = part.output[0]
    return into


def _without_skipped(inputs: AttentionInputs, index: BlockIndex, skip: Tensor) -> tuple[BlockIndex, Tensor]:
    """The lists without what is skipped, some of them empty; int64 [batch, query_heads] visible pairs in that.

    No value is read. Some lists at a time, so that memory does not grow with them.
    """
    grid = index.grid
    batch, heads, rows = index.count.shape
    skipped = torch.zeros(batch, heads, dtype=torch.int64)
    threshold, first, count = skip.flatten(), index.start.flatten(), index.count.flatten().to(torch.int64)
    begin, end = grid.row_slots()
    judged = ((end > begin)[:, None] & (skip > -torch.inf) & (index.count > 0)).flatten().nonzero()[:, 0]
    if not len(judged):
        return dataclasses.replace(index, visit=None, skip=None), skipped
    kept = torch.cat([index.to_mask(start, stop) for start, stop in grid.slabs(heads)], 2)
    visit = index.columns if index.visit is None else index.visit
    tiles, full, space = _Tiles.of(inputs, index, values=False), _full_tiles(inputs, index), _Workspace()
    judged = judged[count[judged].argsort(stable=True)]  # lists of a length go together
    tile_bytes = tiles.key[0].numel() * 4
    together = min(_PEAKS // (grid.block_q * int(count[judged].max())), _CALL_BYTES // tile_bytes)
    for flat in judged.split(max(1, together)):
        b, h, r = flat // (heads * rows), flat // rows % heads, flat % rows
        place = torch.arange(int(count[flat].max()))
        real = place < count[flat, None]
        block = visit[first[flat, None] + place.minimum(count[flat, None] - 1)].to(torch.int64)
        ids = (b * inputs.kv_heads + h // inputs.group_size)[:, None] * grid.key_blocks + block
        edge = real & ~full[b[:, None], r[:, None], block]
        slot = tiles.slot[b, r]
        counts = (slot >= inputs.query_start) & (slot < inputs.query_start + inputs.queries)
        if inputs.key_valid is not None:
            counts &= inputs.key_valid[b[:, None], slot.clamp(max=inputs.keys - 1)]
        drop = real & ~tiles_to_compute(_peaks(inputs, tiles, flat, ids, edge, space), counts, threshold[flat])
        n, place = drop.nonzero(as_tuple=True)
        kept[b[n], h[n], r[n], block[n, place]] = False
    for start, stop in grid.slabs(heads):
        dropped = index.to_mask(start, stop) & ~kept[:, :, start:stop]
        skipped += (dropped * tile_pairs(inputs, grid, start, stop)[:, None]).sum((2, 3))
    return BlockIndex.from_mask(grid, kept), skipped


def _peaks(
    inputs: AttentionInputs, tiles: _Tiles, flat: Tensor, ids: Tensor, edge: Tensor, space: _Workspace
) -> Tensor:
    """float32 [rows, tiles, block_q]: each query's largest visible logit in each tile; `edge` ones need a mask."""
    query, block_k = tiles.query.index_select(0, flat).float(), tiles.key.shape[1]
    together = max(1, _CALL_BYTES // (len(flat) * tiles.key[0].numel() * 4))
    parts = []
    for part, masked in zip(ids.split(together, 1), edge.split(together, 1), strict=True):
        logits = _logits(query, part, tiles, inputs, space).unflatten(2, (-1, block_k)).transpose(1, 2)
        peaks = logits.amax(3)
        n, place = masked.nonzero(as_tuple=True)
        mask = _edge_mask(flat[n], part[n, place, None], tiles, inputs)
        peaks[n, place] = logits[n, place].masked_fill_(~mask, -torch.inf).amax(2)
        parts.append(peaks)
    return torch.cat(parts, 1)


@dataclass(slots=True)
class _Tiles:
    """The listed tiles of all rows, split into full and edge ones; a row is a (batch, head, grid row) with queries."""

    query: Tensor  # [rows, block_q, head_dim], padded where a row is partial
    key: Tensor  # [batch * kv_heads * key_blocks, block_k, head_dim]
    value: Tensor  # likewise; without values the keys stand here and are not read
    row: Tensor  # [live rows] flat number of each row
    anchor: Tensor  # [batch]
    slot: Tensor  # [batch, grid rows, block_q] slot of each query
    low: Tensor  # the same shape: keys [low, high) are visible
    high: Tensor
    full: Tensor  # flat ids into key, row by row
    full_count: Tensor
    edge: Tensor
    edge_count: Tensor
    diagonal: bool  # every row has exactly one edge tile, aligned: its own queries against their own keys

    @staticmethod
    def of(inputs: AttentionInputs, index: BlockIndex, values: bool) -> _Tiles:
        grid = index.grid
        batch, heads, rows = inputs.batch, index.query_heads, grid.rows
        begin, end = grid.row_slots()
        row = (end > begin)[:, None].expand(batch, heads, rows).flatten().nonzero()[:, 0]
        count = index.count.flatten()[row].to(torch.int64)
        first = index.start.flatten()[row]
        owner = torch.repeat_interleave(torch.arange(len(row)), count)
        offset = torch.arange(len(owner)) - (count.cumsum(0) - count)[owner]
        block = index.columns[first[owner] + offset].to(torch.int64)
        b = row // (heads * rows)
        head = row // rows % heads
        full = _full_tiles(inputs, index)[b[owner], row[owner] % rows, block]
        flat = ((b * inputs.kv_heads + head // inputs.group_size) * grid.key_blocks)[owner] + block
        full_count = torch.zeros(len(row), dtype=torch.int64).index_add_(0, owner, full.to(torch.int64))
        edge_count = count - full_count
        key = _blocks(inputs, inputs.key, index)
        slot = (grid.anchor[:, None] + (grid.first[:, None] + torch.arange(rows)) * grid.block_q)[..., None]
        slot = slot + torch.arange(grid.block_q)
        low, high = inputs.visible_range()
        place = (slot - inputs.query_start).clamp(0, inputs.queries - 1).flatten(1)
        diagonal = (
            grid.block_q == grid.block_k
            and inputs.key_valid is None and inputs.window is None and inputs.segment is None
            and inputs.softcap is None
            and inputs.query_start % grid.block_q == 0
            and inputs.queries % grid.block_q == 0
            and inputs.filled >= inputs.query_start + inputs.queries
            and len(row) == batch * heads * rows
            and bool((edge_count == 1).all())
        )  # fmt: skip
        return _Tiles(
            query=_query_rows(inputs, slot),
            key=key,
            value=_blocks(inputs, inputs.value, index) if values else key,
            row=row,
            anchor=grid.anchor,
            slot=slot,
            low=low.gather(1, place).view_as(slot),
            high=high.gather(1, place).view_as(slot),
            full=flat[full],
            full_count=full_count,
            edge=flat[~full],
            edge_count=edge_count,
            diagonal=diagonal,
        )


def _full_tiles(inputs: AttentionInputs, index: BlockIndex) -> Tensor:
    """bool [batch, rows, key_blocks]: every query of the row sees every key of the block."""
    grid = index.grid
    low, high = inputs.visible_range()
    begin, end = grid.row_slots()
    first = (begin - inputs.query_start).clamp(max=inputs.queries - 1)
    last = (end - 1 - inputs.query_start).clamp(min=0)
    edge = grid.anchor[:, None] + torch.arange(grid.key_blocks + 1) * grid.block_k
    full = (edge[:, None, :-1] >= low.gather(1, last)[..., None]) & (
        edge[:, None, 1:] <= high.gather(1, first)[..., None]
    )
    if inputs.key_valid is not None:
        before = functional.pad(inputs.key_valid.to(torch.int64).cumsum(1), (1, 0))
        held = before.gather(1, edge.clamp(max=inputs.keys)).diff(dim=1)
        full &= (held == grid.block_k)[:, None]
    return full


def _query_rows(inputs: AttentionInputs, slot: Tensor) -> Tensor:
    """[batch * heads * rows, block_q, head_dim]; rows that are partial repeat some query, to be thrown away."""
    batch, heads, queries, dim = inputs.query.shape
    block_q = slot.shape[-1]
    if inputs.key_valid is None and inputs.query_start % block_q == 0 and queries % block_q == 0:
        return inputs.query.reshape(-1, block_q, dim)
    place = (slot - inputs.query_start).clamp(0, queries - 1).flatten(1)
    place = place[:, None, :, None].expand(batch, heads, -1, dim)
    return inputs.query.gather(2, place).reshape(-1, block_q, dim)


def _blocks(inputs: AttentionInputs, tensor: Tensor, index: BlockIndex) -> Tensor:
    """[batch * kv_heads * key_blocks, block_k, dim], anchored; a view where the layout allows, else one copy."""
    grid = index.grid
    size = grid.key_blocks * grid.block_k
    if inputs.key_valid is None and tensor.shape[2] == size:
        return tensor.reshape(-1, grid.block_k, tensor.shape[3])
    blocks = tensor.new_zeros(*tensor.shape[:2], size, tensor.shape[3])
    for b, anchor in enumerate(grid.anchor.tolist()):
        part = tensor[b, :, anchor : anchor + size]
        blocks[b, :, : part.shape[1]] = part
    return blocks.view(-1, grid.block_k, tensor.shape[3])


def _batches(tiles: _Tiles, listed: Tensor, count: Tensor, values: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut the tiles of all rows (count: [live rows], listed: their ids, row by row) into batched calls.

    Yields (flat row numbers [n], tile ids [n, tiles]); a row comes up once per piece, never twice in one call.
    """
    if not len(listed):
        return
    tile_bytes = tiles.key[0].numel() * tiles.key.element_size() * (2 if values else 1)
    piece = max(1, _PIECE_BYTES // tile_bytes)
    start = count.cumsum(0) - count
    for turn in range(-(-int(count.max()) // piece)):
        left = (count - turn * piece).clamp(0, piece)
        order = left.argsort(stable=True)  # stable: neighbouring rows of a head share keys
        sizes, members = left[order].unique_consecutive(return_counts=True)
        for size, rows in zip(sizes.tolist(), order.split(members.tolist()), strict=True):
            if size:
                together = max(2 * torch.get_num_threads(), _CALL_BYTES // (size * tile_bytes))
                ids = listed[start[rows, None] + turn * piece + torch.arange(size)]
                yield from zip(tiles.row[rows].split(together), ids.split(together), strict=True)


def _accumulate(flat: Tensor, part: tuple[Tensor | None, Tensor], output: Tensor | None, lse: Tensor) -> None:
    """Join a part of some rows into what they have this far."""
    before = None if output is None else output.index_select(0, flat)
    joined, joined_lse = _join((before, lse.index_select(0, flat)), part)
    lse.index_copy_(0, flat, joined_lse)
    if output is not None and joined is not None:
        output.index_copy_(0, flat, joined)


class _Workspace:
    """Memory that gathered tiles are written to, call after call: fresh pages would cost more than the copy itself."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def gather(self, name: str, blocks: Tensor, ids: Tensor) -> Tensor:
        """blocks[ids] as [rows, tiles * block_k, dim]; valid until the next gather of that name."""
        rows, count = ids.shape
        size = ids.numel() * blocks[0].numel()
        if name not in self._memory or self._memory[name].numel() < size:
            self._memory[name] = blocks.new_empty(size)
        out = self._memory[name][:size].view(ids.numel(), *blocks.shape[1:])
        torch.index_select(blocks, 0, ids.flatten(), out=out)
        return out.view(rows, count * blocks.shape[1], blocks.shape[2])


def _flash(
    query: Tensor, ids: Tensor, tiles: _Tiles, inputs: AttentionInputs, space: _Workspace
) -> tuple[Tensor, Tensor]:
    """Unmasked tiles, through the fused operator."""
    key, value = space.gather("key", tiles.key, ids), space.gather("value", tiles.value, ids)
    output, lse = _fused(query[:, None], key[:, None], value[:, None], False, inputs.scale)
    return output[:, 0], lse[:, 0]


def _diagonal(tiles: _Tiles, inputs: AttentionInputs, rows: int) -> tuple[Tensor, Tensor]:
    """Every row's queries against their own keys, straight from where they lie: float32 [rows, block_q, ...] of all."""
    block = tiles.key.shape[1]
    start = inputs.query_start // block
    key, value = (
        t.view(inputs.batch * inputs.kv_heads, -1, block, t.shape[-1])[:, start : start + rows]
        for t in (tiles.key, tiles.value)
    )
    output = torch.empty(*tiles.query.shape[:2], inputs.value_dim, dtype=torch.float32)
    lse = torch.empty(tiles.query.shape[:2], dtype=torch.float32)
    for number, query in enumerate(tiles.query.split(rows)):  # a (batch row, query head) at a time
        own = number // inputs.group_size
        part, part_lse = _fused(query[:, None], key[own, :, None], value[own, :, None], True, inputs.scale)
        output[number * rows : (number + 1) * rows] = part[:, 0]
        lse[number * rows : (number + 1) * rows] = part_lse[:, 0]
    return output, lse


def _fused(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """torch's fused CPU attention with its logsumexp [batch, heads, queries]; it wants equal head and value dims."""
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    if value_dim < head_dim:
        value = functional.pad(value, (0, head_dim - value_dim))
    elif value_dim > head_dim:
        query, key = (functional.pad(t, (0, value_dim - head_dim)) for t in (query, key))
    # the operator reads the elements of a token as neighbours and never asks for their stride
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=None, scale=scale
    )
    return output[..., :value_dim], lse


def _masked(
    query: Tensor,
    ids: Tensor,
    tiles: _Tiles,
    inputs: AttentionInputs,
    space: _Workspace,
    mask: Tensor | None = None,
    values: bool = True,
) -> tuple[Tensor | None, Tensor]:
    """Tiles with a mask [rows, block_q, tiles * block_k], or soft-capped, or without values; float32 inside."""
    logits = _logits(query.float(), ids, tiles, inputs, space)
    if mask is not None:
        logits = logits.masked_fill_(~mask, -torch.inf)
    if not values:
        return None, logits.logsumexp(-1)
    peak = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)  # a row that sees nothing
    share = (logits - peak).exp_()
    mass = share.sum(-1, keepdim=True)
    output = torch.bmm(share, space.gather("value", tiles.value, ids).float()) / mass.clamp(min=1e-30)
    return output, (mass.log() + peak)[..., 0]


def _logits(query: Tensor, ids: Tensor, tiles: _Tiles, inputs: AttentionInputs, space: _Workspace) -> Tensor:
    """float32 [rows, block_q, tiles * block_k], scaled and soft-capped, nothing masked."""
    logits = torch.bmm(query, space.gather("key", tiles.key, ids).float().mT) * inputs.scale
    if inputs.softcap is not None:
        logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
    return logits


def _edge_mask(flat: Tensor, ids: Tensor, tiles: _Tiles, inputs: AttentionInputs) -> Tensor:
    """bool [rows, block_q, tiles * block_k]: who sees whom in these tiles, element by element."""
    rows = tiles.slot.shape[1]
    b, r = flat // (inputs.query_heads * rows), flat % rows
    low, high = (bound[b, r][..., None] for bound in (tiles.low, tiles.high))
    block_k = tiles.key.shape[1]
    place = ids % (tiles.key.shape[0] // (inputs.batch * inputs.kv_heads)) * block_k
    key = (place[..., None] + torch.arange(block_k)).flatten(1) + tiles.anchor[b, None]
    mask = (key[:, None] >= low) & (key[:, None] < high)
    if inputs.key_valid is not None:
        mask &= inputs.key_valid[b[:, None], key.clamp(max=inputs.keys - 1)][:, None]
    return mask


def _is_plain_dense(inputs: AttentionInputs, index: BlockIndex) -> bool:
    """Nothing is masked but the future, and every tile is listed."""
    if inputs.key_valid is not None or inputs.window is not None or inputs.segment is not None:
        return False
    if inputs.softcap is not None or inputs.filled < inputs.query_start + inputs.queries:
        return False
    low, high = index.grid.visible_blocks(inputs)
    return bool((index.count == (high - low)[:, None]).all())


def _dense(inputs: AttentionInputs) -> AttentionOutput:
    """All tiles at once: the cached keys without a mask, the new ones causally."""
    start, stop = inputs.query_start, inputs.query_start + inputs.queries
    new = inputs.key[:, :, start:stop], inputs.value[:, :, start:stop]
    output: Tensor | None
    output, lse = _fused(inputs.query, *new, True, inputs.scale)
    if start:
        old = inputs.key[:, :, :start], inputs.value[:, :, :start]
        output, lse = _join((output, lse), _fused(inputs.query, *old, False, inputs.scale))
    return _finish(inputs, output, lse)


def _join(a: tuple[Tensor | None, Tensor], b: tuple[Tensor | None, Tensor]) -> tuple[Tensor | None, Tensor]:
    """Join attention over two disjoint sets of keys, each already normalised, by their logsumexp."""
    (output_a, lse_a), (output_b, lse_b) = a, b
    lse = torch.logaddexp(lse_a, lse_b)
    if output_a is None or output_b is None:
        return None, lse
    share_b = torch.sigmoid(lse_b - lse_a).nan_to_num_(0.0)[..., None]  # both empty: -inf - -inf
    return torch.lerp(output_a.float(), output_b.float(), share_b), lse


def _scatter(inputs: AttentionInputs, index: BlockIndex, output: Tensor | None, lse: Tensor) -> AttentionOutput:
    """From [rows of the index, block_q, ...] back to [batch, query_heads, queries, ...]; padding sees nothing."""
    batch, heads, queries = inputs.query.shape[:3]
    grid = index.grid
    lse = lse.view(batch, heads, -1)
    output = None if output is None else output.view(batch, heads, -1, inputs.value_dim)
    if lse.shape[2] != queries or inputs.key_valid is not None or inputs.query_start % grid.block_q:
        slot = torch.arange(inputs.query_start, inputs.query_start + queries)
        place = slot - grid.anchor[:, None] - (grid.first * grid.block_q)[:, None]
        seen = (place >= 0)[:, None]
        place = place.clamp(min=0)[:, None].expand(batch, heads, queries)
        lse = lse.gather(2, place).masked_fill(~seen, -torch.inf)
        if output is not None:
            output = output.gather(2, place[..., None].expand(-1, -1, -1, inputs.value_dim)) * seen[..., None]
    return _finish(inputs, output, lse)


def _finish(inputs: AttentionInputs, output: Tensor | None, lse: Tensor) -> AttentionOutput:
    """Sinks take their share of the mass; the output returns to the dtype of the inputs."""
    if output is not None:
        if inputs.sinks is not None:
            output = output * torch.sigmoid(lse - inputs.sinks.float()[None, :, None])[..., None]
        output = output.to(inputs.query.dtype)
    return AttentionOutput(output, lse)
