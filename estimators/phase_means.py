"""Score a tile by its antidiagonals, averaged over its cells, and by the length of its values.

Niu et al., "Stem: Rethinking Causal Information Flow in Sparse Attention", 2026, arXiv:2603.06274. Queries and keys are
taken in groups of S tokens; the score of a cell is the mean of the logits along its antidiagonal, and that of a tile is
the mean over its cells. As nothing but sums stands between the products and that mean, it can be taken first, phase by
phase:

    L[m, n] = scale / S * sum over t < S of Qp[m, S - 1 - t] . Kp[n, t]

with Qp[m, t] and Kp[n, t] the means of the tokens of a block that stand t-th in their group. That is S products for a
tile, where the cells take block_q * block_k / S of them.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid
from sparseprefill.estimators.selection import check_tokens
from sparseprefill.estimators.token_groups import (
    check_tiles,
    grouped_queries,
    grouped_tokens,
    key_slots,
    query_slots,
)
from sparseprefill.kernels.low_bit import accurate

_NUMBERS = 1 << 24  # of queries or keys that are copied or widened at a time
_LEAST = 1e-6  # added to lengths before their logarithm, and to what a deviation is divided by


@dataclass(frozen=True, slots=True)
class PhaseMeans:
    """Scaled logits of phase means, and a bonus for blocks with long values.

    A phase without a valid token has mean 0. The bonus of a block is `value_bonus` times the mean over its cells of
    `stride` keys of max(0, z), where z says by how many standard deviations the logarithm of a cell's longest value
    lies above the mean over all cells of the call. Cells without a valid key count nowhere. A soft-cap is not applied.

    With stride 1 and no bonus these are the scores of `MeanPooled`. Stem, arXiv:2603.06274. Raises ValueError or
    TypeError for a stride below 1 or a bonus below 0, and where tiles are asked for that cut groups.
    """

    stride: int = 8  # tokens of a group
    value_bonus: float = 0.2  # weight of the values' length, in the unit of logits

    def __post_init__(self) -> None:
        check_tokens("stride", self.stride)
        if isinstance(self.value_bonus, bool) or not isinstance(self.value_bonus, (int, float)):
            raise TypeError(f"value_bonus must be a number of at least 0, got {self.value_bonus!r:.80}")
        if not 0 <= self.value_bonus <= sys.float_info.max:
            raise ValueError(f"value_bonus must be a number of at least 0, got {self.value_bonus!r:.80}")

    def prepare(self, inputs: AttentionInputs, grid: BlockGrid) -> PreparedPhases:
        """What is computed once for all rows: the means of all key blocks, and their bonus.

        Raises ValueError for tiles that cut groups.
        """
        check_tiles(grid, self.stride)
        tensors = {name: getattr(inputs, name).detach() for name in ("query", "key", "value")}
        inputs = dataclasses.replace(inputs, **tensors)
        slot, inside = key_slots(inputs, grid)
        bonus = self._bonus(inputs, slot, inside) if self.value_bonus else None
        asked = query_slots(inputs, grid, 0, grid.rows)[1].sum(-1)
        key = _key_means(inputs.key, slot, inside, self.stride)
        return PreparedPhases(self.stride, inputs, grid, key, bonus, asked)

    def products(self, inputs: AttentionInputs, grid: BlockGrid) -> int:
        """What it costs a head, in products of a query and a key: a mean, or a length, reads each token once."""
        tokens = inputs.queries + inputs.last_key + (inputs.last_key if self.value_bonus else 0)
        return grid.rows * grid.key_blocks * self.stride + tokens

    def _bonus(self, inputs: AttentionInputs, slot: Tensor, inside: Tensor) -> Tensor:
        """[batch, kv_heads, key_blocks]."""
        length = torch.linalg.vector_norm(inputs.value, dim=-1, dtype=accurate(inputs.value))
        length = length.gather(2, slot.flatten(1)[:, None].expand(-1, inputs.kv_heads, -1))
        inside = inside.unflatten(2, (-1, self.stride))  # [batch, key_blocks, cells of a block, stride]
        # padding may hold anything, NaN too
        length = length.view(*length.shape[:2], *inside.shape[1:]).masked_fill(~inside[:, None], 0)
        real = inside.any(-1)[:, None]  # [batch, 1, key_blocks, cells]
        log = (length.amax(-1) + _LEAST).log()
        count = real.sum((2, 3), keepdim=True).clamp(min=1)
        mean = log.masked_fill(~real, 0).sum((2, 3), keepdim=True) / count
        apart = (log - mean).masked_fill(~real, 0)
        deviation = (apart.square().sum((2, 3), keepdim=True) / count).sqrt()
        above = (apart / (deviation + _LEAST)).relu()
        bonus: Tensor = self.value_bonus * above.sum(-1) / real.sum(-1).clamp(min=1)
        return bonus


@dataclass(frozen=True, slots=True, eq=False)
class PreparedPhases:
    """Made by `PhaseMeans.prepare`; scores slabs of rows."""

    stride: int  # tokens of a group
    inputs: AttentionInputs
    grid: BlockGrid
    key: Tensor  # [batch, kv_heads, key_blocks, stride * head_dim], means, first phase first
    bonus: Tensor | None  # [batch, kv_heads, key_blocks]; None: there is none
    asked: Tensor  # int64 [batch, rows]: valid queries

    def slabs(self) -> Iterator[tuple[int, int]]:
        """Rows [start, stop) that are scored together, so that queries and scores of a slab stay small."""
        inputs, grid = self.inputs, self.grid
        heads = inputs.batch * inputs.query_heads
        rows = max(1, _NUMBERS // (heads * grid.block_q * inputs.head_dim))
        return grid.slabs(inputs.query_heads, rows * heads * grid.key_blocks)

    def scores(self, start: int, stop: int) -> Tensor:
        """[batch, query_heads, stop - start, key_blocks] for a slab of rows, in float32 (float64 for such inputs)."""
        inputs, grid = self.inputs, self.grid
        slot, asked = query_slots(inputs, grid, start, stop)
        query = grouped_queries(inputs, slot, asked, self.stride).unflatten(2, (stop - start, -1))
        count = asked.unflatten(2, (-1, self.stride)).sum(2).flip(-1)  # [batch, rows, stride], last phase first
        query = _mean(query.sum(3), count, inputs.head_dim).unflatten(1, (inputs.kv_heads, inputs.group_size))
        scores: Tensor = (query.flatten(2, 3) @ self.key.mT).unflatten(2, (inputs.group_size, -1))
        if grid.block_q % grid.block_k:  # a row may end inside a block, and what follows there is its future
            block, key = self._key_means_up_to_the_end(start, stop)
            own = torch.einsum("bkgmd,bkmd->bkgm", query, key)[..., None]
            scores.scatter_(-1, block[:, None, None, :, None].expand_as(own), own)
        scores *= inputs.scale / self.stride
        if self.bonus is not None:
            scores += self.bonus[:, :, None, None]
        return scores.flatten(1, 2)

    def _key_means_up_to_the_end(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The key block in which each row ends, int64 [batch, rows], and the means of its keys up to that end."""
        inputs, grid = self.inputs, self.grid
        row = grid.first[:, None] + torch.arange(start, stop, device=inputs.device)
        end = (row + 1) * grid.block_q  # counted from the anchor, as blocks are
        block = ((end - 1) // grid.block_k).clamp(max=grid.key_blocks - 1)
        slot, inside = (
            each.gather(1, block[..., None].expand(-1, -1, grid.block_k)) for each in key_slots(inputs, grid)
        )
        place = block[..., None] * grid.block_k + torch.arange(grid.block_k, device=inputs.device)
        return block, _key_means(inputs.key, slot, inside & (place < end[..., None]), self.stride)


def _key_means(key: Tensor, slot: Tensor, inside: Tensor, stride: int) -> Tensor:
    """[batch, kv_heads, blocks, stride * head_dim]: phase means of the keys at `slot` [batch, blocks, block_k]."""
    batch, heads, _, dim = key.shape
    together = max(1, _NUMBERS // (batch * heads * slot.shape[2] * dim))
    parts = []
    for part, real in zip(slot.split(together, 1), inside.split(together, 1), strict=True):
        groups = grouped_tokens(key, part.flatten(1), real.flatten(1), stride)
        total = groups.unflatten(2, (part.shape[1], -1)).sum(3)
        parts.append(_mean(total, real.unflatten(2, (-1, stride)).sum(2), dim))
    return torch.cat(parts, 2)


def _mean(total: Tensor, count: Tensor, dim: int) -> Tensor:
    """Sums [batch, heads, blocks, stride * dim] over counts [batch, blocks, stride]; 0 where there is nothing."""
    mean: Tensor = total.unflatten(3, (-1, dim)) / count.clamp(min=1)[:, None, ..., None]
    return mean.flatten(3)
