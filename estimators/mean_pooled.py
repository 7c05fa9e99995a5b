"""Score a tile by the product of the mean query and the mean key of its blocks (MInference's block-sparse estimate).

Jiang et al., "MInference 1.0", 2024, arXiv:2407.02490, section 3.2. The mean is over real tokens only: padding enters
neither side, whatever it holds, and a ragged last block is divided by its own length.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sparseprefill.contracts import AttentionInputs, BlockGrid
from sparseprefill.estimators.l_mul import l_mul_products
from sparseprefill.kernels.low_bit import accurate

_SLAB_NUMBERS = 1 << 24  # numbers of a tensor that are widened and averaged at one time

Change = Callable[[Tensor], Tensor]
"""Done to tokens [batch, heads, ranges, size, head_dim], widened, before their mean is taken."""


@dataclass(frozen=True, slots=True)
class MeanPooled:
    """Scores are scaled logits of block means; beside the means, a head costs rows * key_blocks products.

    The mean is over real tokens only. MInference, arXiv:2407.02490, section 3.2. With `mantissa` products of means are
    additions of integers (`sparseprefill.estimators.l_mul`), and scores float32.
    """

    mantissa: int | None = None  # bits of it that are added; None: products

    def scores(self, inputs: AttentionInputs, grid: BlockGrid, start: int, stop: int) -> Tensor:
        """[batch, query_heads, stop - start, key_blocks] for a slab of rows, in float32 (float64 for such inputs)."""
        query = query_block_means(inputs, grid, start, stop).unflatten(1, (inputs.kv_heads, inputs.group_size))
        key = key_block_means(inputs, grid)
        if self.mantissa is None:
            scores = torch.einsum("bkgmd,bknd->bkgmn", query, key)
        else:
            scores = l_mul_products(query, key[:, :, None], self.mantissa)
        if grid.block_q % grid.block_k:  # a row may end inside a block, and what follows there is its future
            block, mean = means_up_to_the_end(inputs, grid, start, stop)
            if self.mantissa is None:
                own = torch.einsum("bkgmd,bkmd->bkgm", query, mean)[..., None]
            else:
                own = l_mul_products(query[..., None, :], mean[:, :, None, :, None], self.mantissa)[..., 0]
            scores.scatter_(-1, block[:, None, None, :, None].expand_as(own), own)
        return scores.flatten(1, 2) * inputs.scale

    def products(self, inputs: AttentionInputs, grid: BlockGrid) -> int:
        """What it costs a head, in products of a query and a key: a mean reads each token once."""
        return grid.rows * grid.key_blocks + inputs.queries + inputs.last_key


def query_block_means(
    inputs: AttentionInputs, grid: BlockGrid, start: int, stop: int, change: Change | None = None
) -> Tensor:
    """[batch, query_heads, stop - start, head_dim]: means of the real queries of a slab of rows, 0 where none is."""
    begin, end = (slots[:, start:stop] - inputs.query_start for slots in grid.row_slots())
    real = None if inputs.key_valid is None else inputs.key_valid[:, inputs.query_start :]
    whole = real is None and inputs.query_start % grid.block_q == 0 and inputs.queries % grid.block_q == 0
    first = start * grid.block_q if whole else None
    return range_means(inputs.query, begin, end, real, grid.block_q, first, change)


def key_block_means(inputs: AttentionInputs, grid: BlockGrid, change: Change | None = None) -> Tensor:
    """[batch, kv_heads, key_blocks, head_dim]: means of the real keys of each block, 0 where none is."""
    edge = grid.anchor[:, None] + torch.arange(grid.key_blocks + 1, device=inputs.device) * grid.block_k
    edge = edge.clamp(max=inputs.last_key)
    first = 0 if inputs.key_valid is None and inputs.last_key == grid.key_blocks * grid.block_k else None
    return range_means(inputs.key, edge[:, :-1], edge[:, 1:], inputs.key_valid, grid.block_k, first, change)


def means_up_to_the_end(
    inputs: AttentionInputs, grid: BlockGrid, start: int, stop: int, change: Change | None = None
) -> tuple[Tensor, Tensor]:
    """The key block in which each row ends, int64 [batch, stop - start], and the mean of its keys up to that end.

    Means are [batch, kv_heads, stop - start, head_dim].
    """
    end = grid.row_slots()[1][:, start:stop]
    block = ((end - 1 - grid.anchor[:, None]).clamp(min=0) // grid.block_k).clamp(max=grid.key_blocks - 1)
    begin = grid.anchor[:, None] + block * grid.block_k
    end = end.clamp(max=inputs.last_key)
    return block, range_means(inputs.key, begin, end, inputs.key_valid, grid.block_k, change=change)


def real_key_blocks(inputs: AttentionInputs, grid: BlockGrid) -> Tensor:
    """bool [batch, key_blocks]: blocks with a real key; where `key_valid` has holes there may be others."""
    edge = grid.anchor[:, None] + torch.arange(grid.key_blocks + 1, device=inputs.device) * grid.block_k
    edge = edge.clamp(max=inputs.last_key)
    return count_real(inputs, edge[:, :-1], edge[:, 1:]) > 0


def count_real(inputs: AttentionInputs, begin: Tensor, end: Tensor) -> Tensor:
    """int64, as begin and end [batch, ranges]: how many of the slots [begin, end) hold a real token."""
    if inputs.key_valid is None:
        return (end - begin).clamp(min=0)
    before = functional.pad(inputs.key_valid.to(torch.int64).cumsum(1), (1, 0))
    return (before.gather(1, end) - before.gather(1, begin)).clamp(min=0)


def pooled_logits(query: Tensor, key: Tensor, inputs: AttentionInputs) -> Tensor:
    """Logits of means, scaled and soft-capped as the model's own: [batch, heads, rows, key_blocks].

    From query [batch, heads, rows, head_dim] and key [batch, some kv_heads, key_blocks, head_dim], each of which serves
    as many of the heads.
    """
    grouped = query.unflatten(1, (key.shape[1], -1))
    return scaled(torch.einsum("bkgmd,bknd->bkgmn", grouped, key).flatten(1, 2), inputs)


def scaled(products: Tensor, inputs: AttentionInputs) -> Tensor:
    """Logits from products of queries and keys: scaled and soft-capped."""
    logits = products * inputs.scale
    return logits if inputs.softcap is None else inputs.softcap * torch.tanh(logits / inputs.softcap)


def range_means(
    tensor: Tensor,
    begin: Tensor,
    end: Tensor,
    real: Tensor | None,
    size: int,
    first: int | None = None,
    change: Change | None = None,
) -> Tensor:
    """Means over ranges of tokens, [batch, heads, ranges, dim], in float32 (float64 for such a tensor).

    Args:
        tensor: [batch, heads, tokens, dim].
        begin: int64 [batch, ranges], where each range begins.
        end: int64 [batch, ranges], one past its last token, at most `size` tokens on. An empty range has mean 0.
        real: bool [batch, at least tokens], tokens that count; None: all. The others may hold anything, NaN too.
        size: tokens of a range.
        first: known where all ranges are of `size` real tokens, each after the other: where the first begins.
        change: done to tokens before the mean.
    """
    batch, heads, tokens, dim = tensor.shape
    ranges = begin.shape[1]
    together = max(1, _SLAB_NUMBERS // (batch * heads * size * dim))
    parts = []
    for start, stop in itertools.pairwise([*range(0, ranges, together), ranges]):
        place = begin[:, start:stop, None] + torch.arange(size, device=tensor.device)  # [batch, ranges, size]
        inside = place < end[:, start:stop, None]
        place = place.clamp(max=tokens - 1).flatten(1)
        if real is not None:
            inside = inside & real.gather(1, place).view_as(inside)
        weight = inside.to(accurate(tensor)) / inside.sum(-1, keepdim=True).clamp(min=1)
        if first is None:
            blocks = tensor.gather(2, place[:, None, :, None].expand(batch, heads, -1, dim))
            blocks = blocks.unflatten(2, (-1, size)).to(accurate(tensor))
        else:  # no gather
            own = tensor[:, :, first + start * size : first + stop * size]
            blocks = own.unflatten(2, (-1, size)).to(accurate(tensor))
        if change is not None:
            blocks = change(blocks)
        if first is None:
            blocks = blocks.masked_fill(~inside[:, None, :, :, None], 0)  # a weight of 0 does not undo a NaN
        parts.append(torch.einsum("bhmsd,bms->bhmd", blocks, weight.to(blocks.dtype)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)
