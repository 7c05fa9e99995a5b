"""Delta correction: every n-th query is computed densely too, and its difference is added to its neighbours.

Willette, Lee and Hwang, "Delta Attention: Fast and Accurate Sparse Attention Inference by Delta Correction", 2025,
arXiv:2505.11254. What a selection misses is much the same for neighbouring queries.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, AttentionOutput, BlockGrid, BlockIndex
from sparseprefill.estimators.mean_pooled import scaled
from sparseprefill.estimators.selection import check_tokens
from sparseprefill.kernels.low_bit import accurate
from sparseprefill.patterns.expected_density import expected_density
from sparseprefill.patterns.expected_overhead import Overhead, expected_overhead, stated_overhead
from sparseprefill.patterns.expected_tiles import tile_law
from sparseprefill.patterns.nested import products_of
from sparseprefill.patterns.parts import Part
from sparseprefill.patterns.wrapping import check_inner, inner_for_layer, keeps_everything

_LOGITS = 1 << 22  # of dense rows and keys that are held at one time


@dataclass(frozen=True, slots=True)
class DeltaCorrect:
    """The blocks of `inner`, and o + (dense o - o) of the last corrected query before it for each query's output o.

    Queries at multiples of `every` tokens, counted from the first valid key or the first query of a chunk, are computed
    densely. Queries whose corrected one is padding or belongs to another packed prompt are left alone, and so are rows
    that see all blocks, which are exact already. The lse stays that of `inner`'s selection,
    so that a kept mass says nothing of the correction: ask for output errors. `every` = 1 is dense attention.

    arXiv:2505.11254. Raises ValueError or TypeError for tokens that are none, and TypeError for what names no blocks of
    keys as they lie.
    """

    inner: Any  # anything with `build_index`
    every: int = 64  # queries

    def __post_init__(self) -> None:
        check_tokens("every", self.every)
        check_inner("delta_correct", self.inner)

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        index: BlockIndex = self.inner.build_index(inputs, grid)
        return index

    def correct(self, inputs: AttentionInputs, parts: tuple[Part, ...], result: AttentionOutput) -> AttentionOutput:
        """The result with corrected outputs; see `sparseprefill.patterns.parts.corrected`."""
        if result.output is None:
            return result
        first = (inputs.anchor().clamp(min=inputs.query_start) - inputs.query_start)[:, None]
        asked = torch.arange(inputs.queries, device=inputs.device)
        count = -(-inputs.queries // self.every)
        place = (first + torch.arange(count, device=inputs.device) * self.every).clamp(max=inputs.queries - 1)
        output, heads = result.output, inputs.query_heads
        sparse = output.gather(2, place[:, None, :, None].expand(-1, heads, -1, output.shape[3]))
        delta = dense_rows(inputs, place) - sparse.to(accurate(inputs.query))
        mine = ((asked - first).clamp(min=0) // self.every).clamp(max=count - 1)  # [batch, queries]
        index = parts[0].index
        low, high = index.grid.visible_blocks(inputs)
        short = index.count < (high - low)[:, None]  # [batch, query_heads, rows]
        if index.skip is not None:
            short = short | (index.skip > -torch.inf)
        row = index.grid.query_rows()
        helped = (row >= 0) & self._same(inputs, place.gather(1, mine), asked)
        corrected = []
        together = max(1, _LOGITS // (inputs.batch * heads * output.shape[3]))
        for start in range(0, inputs.queries, together):
            own = slice(start, start + together)
            missing = short.gather(2, row[:, own].clamp(min=0)[:, None].expand(-1, heads, -1)) & helped[:, None, own]
            added = delta.gather(2, mine[:, None, own, None].expand(-1, heads, -1, delta.shape[3]))
            changed = (output[:, :, own].to(added.dtype) + added).to(output.dtype)
            corrected.append(torch.where(missing[..., None], changed, output[:, :, own]))
        return dataclasses.replace(result, output=torch.cat(corrected, 2))

    @staticmethod
    def _same(inputs: AttentionInputs, source: Tensor, asked: Tensor) -> Tensor:
        """bool [batch, queries]: the corrected query before each one is a real one, of the same packed prompt."""
        slot = source + inputs.query_start
        same = torch.ones_like(slot, dtype=torch.bool)
        if inputs.key_valid is not None:
            same = same & inputs.key_valid.gather(1, slot)
        if inputs.segment is not None:
            own = inputs.segment[:, inputs.query_start + asked]
            same = same & (inputs.segment.gather(1, slot) == own)
        return same

    def keeps_everything(self) -> bool:
        """Whether `inner` is dense by its kind."""
        return keeps_everything(self.inner)

    def for_layer(self, layer: int) -> DeltaCorrect:
        """What `inner` is in this layer."""
        return dataclasses.replace(self, inner=inner_for_layer(self.inner, layer))

    def estimator_products(self, inputs: AttentionInputs, grid: BlockGrid) -> float:
        """See `sparseprefill.patterns.nested`: `inner`'s, and those of the dense rows, with keys and with values."""
        return products_of(self.inner, inputs, grid) + 2.0 * -(-inputs.queries // self.every) * inputs.last_key

    def tile_law(self) -> str:
        """See `sparseprefill.patterns.expected_tiles`."""
        return tile_law(self.inner)

    def expected_density(self, keys: int) -> float:
        return min(1.0, expected_density(self.inner, keys) + 1 / self.every)

    def expected_overhead(self, device: torch.device, head_dim: int, block_q: int, block_k: int) -> Overhead:
        """That of `inner`, and the dense rows' products beside what the density counts of them."""
        own = stated_overhead(device, head_dim, pairs=2 / self.every, steps=0.6)
        return own + expected_overhead(self.inner, device, head_dim, block_q, block_k)


def dense_rows(inputs: AttentionInputs, place: Tensor) -> Tensor:
    """[batch, query_heads, rows, value_dim] in float32 (float64 for such inputs): dense attention of some queries.

    `place`: int64 [batch, rows], which queries. A query that sees no key has output 0. Rows are taken a slab at a time.
    """
    kv_heads, width = inputs.kv_heads, accurate(inputs.query)
    low, high = (bound.gather(1, place) for bound in inputs.visible_range())
    query = inputs.query.gather(2, place[:, None, :, None].expand(-1, inputs.query_heads, -1, inputs.head_dim))
    query = query.to(width).unflatten(1, (kv_heads, -1))
    keys = inputs.last_key
    key, value = inputs.key[:, :, :keys].to(width), inputs.value[:, :, :keys].to(width)
    slot = torch.arange(keys, device=inputs.device)
    together = max(1, _LOGITS // (inputs.batch * inputs.query_heads * max(1, keys)))
    outputs = []
    if inputs.key_valid is not None:  # what no query sees may hold anything, and 0 times NaN is NaN
        value = value.masked_fill(~inputs.key_valid[:, None, :keys, None], 0.0)
    broken = ~value.isfinite().all(-1)  # [batch, kv_heads, keys]: NaN for those who see it, and for nobody else
    value = value.masked_fill(broken[..., None], 0.0)
    for start in range(0, place.shape[1], together):
        rows = slice(start, start + together)
        logits = scaled(torch.einsum("bkgid,bkjd->bkgij", query[:, :, :, rows], key), inputs)
        unseen = (slot < low[:, rows, None]) | (slot >= high[:, rows, None])
        if inputs.key_valid is not None:
            unseen = unseen | ~inputs.key_valid[:, None, :keys]
        logits = logits.masked_fill(unseen[:, None, None], -torch.inf)
        if inputs.sinks is not None:
            sink = inputs.sinks.to(width).view(1, kv_heads, -1, 1, 1).expand(*logits.shape[:4], 1)
            share = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
        else:
            share = logits.softmax(-1).masked_fill(unseen.all(-1)[:, None, None, :, None], 0.0)
        output = torch.einsum("bkgij,bkjd->bkgid", share, value)
        hit = (broken[:, :, None] & ~unseen[:, None]).any(-1)  # [batch, kv_heads, rows]
        outputs.append(output.masked_fill(hit[:, :, None, :, None], torch.nan).flatten(1, 2))
    return torch.cat(outputs, 2)
