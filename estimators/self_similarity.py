"""Which blocks their mean speaks for: products of block means, and how alike the tokens of each block are.

Zhang et al., "SpargeAttn: Accurate Sparse Attention Accelerating Any Model Inference", 2025, arXiv:2502.18137. The
self-similarity of a block is the mean cosine over all pairs of its tokens, which is the squared length of the mean of
their unit vectors: no product of two tokens is made. Keys are compared less their mean over the call: what all have in
common makes any block look alike, and moves no softmax.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid
from sparseprefill.estimators.mean_pooled import (
    count_real,
    key_block_means,
    means_up_to_the_end,
    pooled_logits,
    query_block_means,
    real_key_blocks,
    scaled,
)
from sparseprefill.kernels.low_bit import token_means


@dataclass(frozen=True, slots=True, eq=False)
class PooledScores:
    """Of a slab of rows; numbers are float32 (float64 for such inputs)."""

    logits: Tensor  # [batch, query_heads, rows, key_blocks], of block means, scaled and soft-capped
    query_similarity: Tensor  # [batch, query_heads, rows], 0 to 1, NaN where a query is not finite
    key_similarity: Tensor  # [batch, kv_heads, rows or 1, key_blocks], likewise; one NaN key makes all of its head NaN
    real: Tensor  # bool [batch, rows or 1, key_blocks], blocks with a real key up to the row's end


@dataclass(frozen=True, slots=True, eq=False)
class SelfSimilarity:
    """Means and similarities of all key blocks, made once; `scores` compares a slab of rows with them.

    Only real tokens count, and a ragged block has its own number of them. A zero vector is like nothing, itself
    included. Where a row may end inside a key block (block_q is no multiple of block_k), that row meets the block up to
    the row's end: what follows is its future.
    """

    inputs: AttentionInputs  # the call
    grid: BlockGrid  # its tiles
    mean_key: Tensor  # [batch, kv_heads, head_dim], over the real keys of the call
    key: Tensor  # [batch, kv_heads, key_blocks, head_dim], mean of each block
    similarity: Tensor  # [batch, kv_heads, key_blocks]
    real: Tensor  # bool [batch, key_blocks], blocks with a real key

    @staticmethod
    def of(inputs: AttentionInputs, grid: BlockGrid) -> SelfSimilarity:
        """Reads all keys: three times, in slabs."""
        keys = slice(0, inputs.last_key)
        valid = None if inputs.key_valid is None else inputs.key_valid[:, keys]
        mean = token_means(inputs.key[:, :, keys], valid)
        alike = _similarity(key_block_means(inputs, grid, lambda tokens: _unit(tokens - mean[:, :, None, None])))
        return SelfSimilarity(inputs, grid, mean, key_block_means(inputs, grid), alike, real_key_blocks(inputs, grid))

    def scores(self, start: int, stop: int) -> PooledScores:
        """Of rows [start, stop): rows * key_blocks products a head, beside reading the queries twice."""
        inputs, grid = self.inputs, self.grid
        query = query_block_means(inputs, grid, start, stop)
        logits = pooled_logits(query, self.key, inputs)
        alike, real = self.similarity[:, :, None], self.real[:, None]
        if grid.block_q % grid.block_k:  # as far as the row's end
            block, mean = means_up_to_the_end(inputs, grid, start, stop)
            _, units = means_up_to_the_end(inputs, grid, start, stop, self._centred_unit)
            grouped = query.unflatten(1, (inputs.kv_heads, inputs.group_size))
            own = scaled(torch.einsum("bkgmd,bkmd->bkgm", grouped, mean).flatten(1, 2), inputs)[..., None]
            place = block[:, None, :, None]
            logits.scatter_(-1, place.expand_as(own), own)
            units_alike = _similarity(units)[..., None]
            alike = alike.expand(-1, -1, stop - start, -1).scatter(-1, place.expand_as(units_alike), units_alike)
            begin = grid.anchor[:, None] + block * grid.block_k
            end = grid.row_slots()[1][:, start:stop].clamp(max=inputs.last_key)
            some = count_real(inputs, torch.minimum(begin, end), end) > 0
            real = real.expand(-1, stop - start, -1).scatter(-1, block[..., None], some[..., None])
        return PooledScores(logits, _similarity(query_block_means(inputs, grid, start, stop, _unit)), alike, real)

    def _centred_unit(self, tokens: Tensor) -> Tensor:
        return _unit(tokens - self.mean_key[:, :, None, None])


def _unit(tokens: Tensor) -> Tensor:
    """Each divided by its length; 0 stays 0, and what is not finite becomes NaN."""
    length = tokens.norm(dim=-1, keepdim=True)
    return tokens / torch.where(length == 0, 1, length)


def _similarity(mean_of_units: Tensor) -> Tensor:
    """Mean cosine of all pairs of tokens; rounding does not take it above 1."""
    return mean_of_units.square().sum(-1).clamp(max=1)
