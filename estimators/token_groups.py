"""Tokens in groups of a stride, counted from where each batch row's grid begins: what strided estimators read."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid
from sparseprefill.kernels.low_bit import accurate


def check_tiles(grid: BlockGrid, stride: int) -> None:
    """Raise ValueError where a tile of the grid would cut a group of `stride` tokens."""
    for name, size in (("block_q", grid.block_q), ("block_k", grid.block_k)):
        if size % stride:
            raise ValueError(
                f"{name} must be a multiple of stride={stride}, so that no tile cuts a group, got {size}: "
                f"choose {name}={-(-size // stride) * stride} or another stride"
            )


def query_slots(inputs: AttentionInputs, grid: BlockGrid, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """int64 [batch, stop - start, block_q]: the slots of whole rows; bool: a valid query of this call stands there."""
    row = grid.first[:, None] + torch.arange(start, stop, device=inputs.device)
    slot = (grid.anchor[:, None] + row * grid.block_q)[..., None] + torch.arange(grid.block_q, device=inputs.device)
    begin, end = (bound[:, start:stop, None] for bound in grid.row_slots())
    asked = (slot >= begin) & (slot < end)
    if inputs.key_valid is not None:
        asked &= inputs.key_valid.gather(1, slot.flatten(1).clamp(0, inputs.keys - 1)).view_as(asked)
    return slot, asked


def key_slots(inputs: AttentionInputs, grid: BlockGrid) -> tuple[Tensor, Tensor]:
    """int64 [batch, key_blocks, block_k]: the slots of all key blocks; bool: a valid key stands there that was filled.

    Slots behind the last key are clamped to it.
    """
    slot = torch.arange(grid.key_blocks * grid.block_k, device=inputs.device) + grid.anchor[:, None]
    inside = slot < inputs.last_key
    slot = slot.clamp(max=inputs.keys - 1)
    if inputs.key_valid is not None:
        inside = inside & inputs.key_valid.gather(1, slot)
    blocks = (grid.key_blocks, grid.block_k)
    return slot.unflatten(1, blocks), inside.unflatten(1, blocks)


def grouped_queries(inputs: AttentionInputs, slot: Tensor, asked: Tensor, stride: int) -> Tensor:
    """[batch, query_heads, groups, stride * head_dim]: queries of whole rows, the last of each group first.

    `slot` and `asked` as `query_slots` gives them.
    """
    place = (slot - inputs.query_start).clamp(0, inputs.queries - 1)
    place, asked = (each.unflatten(2, (-1, stride)).flip(-1).flatten(1) for each in (place, asked))
    return grouped_tokens(inputs.query, place, asked, stride)


def grouped_tokens(tensor: Tensor, place: Tensor, inside: Tensor, stride: int) -> Tensor:
    """[batch, heads, groups, stride * dim]: tokens at `place`, those of a group side by side; 0 where not `inside`.

    In float32 (float64 for such tensors). `place` int64 and `inside` bool are [batch, tokens].
    """
    rows = [own.index_select(1, where) for own, where in zip(tensor, place, strict=True)]
    found = (rows[0][None] if len(rows) == 1 else torch.stack(rows)).to(accurate(tensor))
    found = found.masked_fill_(~inside[:, None, :, None], 0)  # padding may hold anything, NaN too
    groups: Tensor = found.unflatten(2, (-1, stride)).flatten(3)
    return groups
