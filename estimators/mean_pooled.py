"""Score a tile by the product of the mean query and the mean key of its blocks (MInference's block-sparse estimate).

Jiang et al., "MInference 1.0", 2024, arXiv:2407.02490, section 3.2. The mean is over real tokens only: padding enters
neither side, and a ragged last block is divided by its own length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid


@dataclass(frozen=True, slots=True)
class MeanPooled:
    """Scores are scaled logits of block means; beside the means, a head costs rows * key_blocks products.

    The mean is over real tokens only. MInference, arXiv:2407.02490, section 3.2.
    """

    def scores(self, inputs: AttentionInputs, grid: BlockGrid, start: int, stop: int) -> Tensor:
        """[batch, query_heads, stop - start, key_blocks] for a slab of rows, in float32 (float64 for such inputs)."""
        query = self._query_means(inputs, grid, start, stop).unflatten(1, (inputs.kv_heads, inputs.group_size))
        key = self._key_means(inputs, grid)
        scores = torch.einsum("bkgmd,bknd->bkgmn", query, key)
        if grid.block_q % grid.block_k:  # a row may end inside a block, and what follows there is its future
            block, mean = self._means_up_to_the_end(inputs, grid, start, stop)
            own = torch.einsum("bkgmd,bkmd->bkgm", query, mean)[..., None]
            scores.scatter_(-1, block[:, None, None, :, None].expand_as(own), own)
        return scores.flatten(1, 2) * inputs.scale

    def products(self, inputs: AttentionInputs, grid: BlockGrid) -> int:
        """What it costs a head, in products of a query and a key: a mean reads each token once."""
        return grid.rows * grid.key_blocks + inputs.queries + inputs.last_key

    def _means_up_to_the_end(
        self, inputs: AttentionInputs, grid: BlockGrid, start: int, stop: int
    ) -> tuple[Tensor, Tensor]:
        """The key block in which each row ends, int64 [batch, rows], and the mean of its keys up to that end."""
        end = grid.row_slots()[1][:, start:stop]
        block = ((end - 1 - grid.anchor[:, None]).clamp(min=0) // grid.block_k).clamp(max=grid.key_blocks - 1)
        begin = grid.anchor[:, None] + block * grid.block_k
        end = end.clamp(max=inputs.last_key)
        return block, _means(inputs.key, begin, end, inputs.key_valid, grid.block_k, whole=False)

    def _query_means(self, inputs: AttentionInputs, grid: BlockGrid, start: int, stop: int) -> Tensor:
        begin, end = (slots[:, start:stop] - inputs.query_start for slots in grid.row_slots())
        real = None if inputs.key_valid is None else inputs.key_valid[:, inputs.query_start :]
        return _means(inputs.query, begin, end, real, grid.block_q)

    def _key_means(self, inputs: AttentionInputs, grid: BlockGrid) -> Tensor:
        edge = grid.anchor[:, None] + torch.arange(grid.key_blocks + 1, device=inputs.device) * grid.block_k
        edge = edge.clamp(max=inputs.last_key)
        return _means(inputs.key, edge[:, :-1], edge[:, 1:], inputs.key_valid, grid.block_k)


def _means(tensor: Tensor, begin: Tensor, end: Tensor, real: Tensor | None, size: int, whole: bool = True) -> Tensor:
    """Means of tensor [batch, heads, tokens, dim] over token ranges [begin, end) of at most `size`: [.., ranges, dim].

    `real` bool [batch, at least tokens]: tokens that count. An empty range has mean 0. `whole`: the ranges follow each
    other, so that they cover all tokens if there are as many.
    """
    batch, heads, tokens, dim = tensor.shape
    place = begin[..., None] + torch.arange(size, device=tensor.device)  # [batch, ranges, size]
    inside = place < end[..., None]
    place = place.clamp(max=tokens - 1).flatten(1)
    if real is not None:
        inside = inside & real.gather(1, place).view_as(inside)
    accurate = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    weight = inside.to(accurate) / inside.sum(-1, keepdim=True).clamp(min=1)
    if whole and real is None and tokens == begin.shape[1] * size and batch == 1:
        blocks = tensor.unflatten(2, (-1, size))  # every range is whole: no gather
    else:
        blocks = tensor.gather(2, place[:, None, :, None].expand(batch, heads, -1, dim)).unflatten(2, (-1, size))
    return torch.einsum("bhmsd,bms->bhmd", blocks.to(accurate), weight)
