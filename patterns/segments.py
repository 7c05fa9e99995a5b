"""Segments of keys that lie wholly behind a row, in which keys may stand in any order: what sorts them shares this.

Segments are counted from each batch row's first valid key. A segment is behind a row if it ends before the row's block
of queries begins, and all of the row's queries see it whole.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex


def check_segment(segment: int, grid: BlockGrid) -> None:
    """Raise ValueError for segments that are no multiple of the key blocks."""
    if segment % grid.block_k:
        raise ValueError(
            f"segments of {segment} tokens are no multiple of key blocks of {grid.block_k}: choose a segment that is, "
            "or another block_k"
        )


def segments_behind(inputs: AttentionInputs, grid: BlockGrid, segment: int) -> tuple[Tensor, Tensor]:
    """int64 [batch, rows] twice: key blocks [since, until) of the segments that lie behind each row."""
    blocks = segment // grid.block_k
    row = grid.first[:, None] + torch.arange(grid.rows, device=inputs.device)
    until = row * grid.block_q // segment * blocks
    low, _ = inputs.visible_range()
    begin, end = grid.row_slots()
    last = (end - 1 - inputs.query_start).clamp(0, inputs.queries - 1)
    past = (low.gather(1, last) - grid.anchor[:, None]).clamp(min=0)
    since = -(-past // segment) * blocks
    until = torch.where(end > begin, until.clamp(max=grid.key_blocks), 0)
    return torch.minimum(since, until), until


def order_inside(inputs: AttentionInputs, segment: int, importance: Tensor) -> Tensor:
    """int64 [batch, kv_heads, keys]: the slot whose key comes to stand in each slot, the most important ones first.

    `importance`: [batch, kv_heads, keys], -inf for keys that are to stay where they are; ties by lower slot.
    """
    anchor, keys = inputs.anchor(), inputs.keys
    count = -(-keys // segment)
    slot = anchor[:, None] + torch.arange(count * segment, device=inputs.device)
    inside = slot < keys
    place = slot.clamp(max=keys - 1)[:, None].expand(-1, inputs.kv_heads, -1)
    own = importance.gather(2, place).masked_fill(~inside[:, None], -torch.inf).unflatten(2, (count, segment))
    # a slot without a key to sort keeps its own, so that it is known by its place who is padding; of the others the
    # first gets the heaviest key
    counted = own > -torch.inf
    rank = counted.cumsum(-1) - 1
    heaviest = own.argsort(dim=-1, descending=True, stable=True).gather(-1, rank.clamp(min=0))
    here = torch.arange(segment, device=inputs.device)
    begin = torch.arange(count, device=inputs.device)[:, None] * segment
    moved = anchor[:, None, None] + (torch.where(counted, heaviest, here) + begin).flatten(2)
    past = torch.arange(keys, device=inputs.device) - anchor[:, None]
    moved = moved.gather(2, past.clamp(0, moved.shape[2] - 1)[:, None].expand(-1, inputs.kv_heads, -1))
    return torch.where((past >= 0)[:, None], moved, torch.arange(keys, device=inputs.device))


def in_order(inputs: AttentionInputs, order: Tensor) -> AttentionInputs:
    """Keys and values in another order; invalid ones stay where they are, so that `key_valid` stays what it is."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor.gather(2, order[..., None].expand(-1, -1, -1, tensor.shape[3]))

    return dataclasses.replace(inputs, key=moved(inputs.key), value=moved(inputs.value))


def behind_alone(
    chosen: BlockIndex, grid: BlockGrid, since: Tensor, until: Tensor, first: Tensor | None, group_size: int
) -> BlockIndex:
    """What was chosen of the blocks behind each row, on the whole grid: nothing where there are none."""
    block = torch.arange(grid.key_blocks, device=since.device)
    parts = []
    for start, stop in grid.slabs(chosen.query_heads):
        legal = (block >= since[:, start:stop, None]) & (block < until[:, start:stop, None])
        mask = chosen.to_mask(start, stop)
        if first is not None:
            mask = mask | (block == first.repeat_interleave(group_size, 1)[..., None, None])
        parts.append(BlockIndex.from_mask(grid, mask & legal[:, None]))
    index = dataclasses.replace(BlockIndex.stack(parts), skip=chosen.skip)
    if chosen.visit is None:
        return index
    return index.visiting(lambda start, stop: -chosen.visit_places(start, stop))


def own_segments(inputs: AttentionInputs, grid: BlockGrid, since: Tensor, until: Tensor) -> BlockIndex:
    """All visible blocks but those behind each row, the same for all heads."""
    block = torch.arange(grid.key_blocks, device=inputs.device)
    behind = (block >= since[..., None]) & (block < until[..., None])
    return BlockIndex.from_mask(grid, (grid.visible_block_mask(inputs) & ~behind)[:, None]).for_heads(
        inputs.query_heads
    )
