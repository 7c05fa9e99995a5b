"""Which key blocks hold a row's own tokens: what every selector must keep, so that each query sees itself."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid


def check_keys_reach(name: str, inputs: AttentionInputs) -> None:
    """Raise ValueError where the filled keys end before the queries, for what needs each query among the keys."""
    if inputs.last_key < inputs.query_start + inputs.queries:
        raise ValueError(
            f"{name} needs the keys of its queries, and {inputs.last_key} keys end before query "
            f"{inputs.query_start + inputs.queries}: pass key_length that counts them, or another method"
        )


def with_own_blocks(forced: Tensor, inputs: AttentionInputs, grid: BlockGrid) -> Tensor:
    """bool [batch, rows, key_blocks]: what is `forced` or holds tokens of the row itself, as far as it is visible.

    The blocks are those of the whole row of the grid, asked entirely or not. Where neither is visible, which takes a
    cache whose filled part ends before the row, the last visible block is there: a row is never empty.
    """
    block = torch.arange(grid.key_blocks, device=inputs.device)
    row = grid.first[:, None] + torch.arange(grid.rows, device=inputs.device)
    begin, end = row * grid.block_q // grid.block_k, grid.frontier()
    low, high = grid.visible_blocks(inputs)
    forced = forced | ((block >= begin[..., None]) & (block < end[..., None]))
    forced = forced & (block >= low[..., None]) & (block < high[..., None])
    return forced | ((block == high[..., None] - 1) & ~forced.any(-1, keepdim=True))
