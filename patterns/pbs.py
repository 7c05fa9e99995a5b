"""Permuted block-sparse attention: keys that matter are brought together before a method chooses among their blocks.

Zhang et al., "PBS-Attn: Permuted Block-Sparse Attention", 2025, arXiv:2510.21270. Attention does not mind the order of
keys: inside each segment that a row has behind it, keys are sorted by what the last queries see in them, so that the
heavy ones of a segment share blocks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.estimators.probe import CPU_ENTRIES, head_slabs
from sparseprefill.estimators.selection import check_tokens
from sparseprefill.patterns.block_sparse import BlockSparse
from sparseprefill.patterns.dense import Dense
from sparseprefill.patterns.expected_density import expected_density, kept_share
from sparseprefill.patterns.expected_overhead import Overhead, expected_overhead, stated_overhead
from sparseprefill.patterns.nested import products_of
from sparseprefill.patterns.parts import Part
from sparseprefill.patterns.segments import (
    behind_alone,
    check_segment,
    in_order,
    order_inside,
    own_segments,
    segments_behind,
)
from sparseprefill.patterns.wrapping import check_asked_often, check_names_blocks_alone, inner_for_layer

PUBLISHED = BlockSparse(mass=0.9, sink=0, local=0)
"""What the paper's own experiments go around."""


@dataclass(frozen=True, slots=True)
class Pbs:
    """`inner` chooses among blocks of sorted keys; a row's own segment is computed whole, with its keys as they lie.

    Segments are counted from each batch row's first valid key. A segment is behind a row if it ends before the row's
    block of queries begins, and all of the row's queries see it whole (a window or a packed prompt may cut through one:
    that one is computed whole). Its keys are sorted once for each KV head, by the mean over the last `probe` queries,
    and the query heads of the group, of a softmax over the keys of all whole segments. What `inner` calls visible is
    what is behind a row, so its budgets are shares of that.

    The last queries decide the order, so it looks ahead. `inner` = Dense is dense attention, bit for bit, and so is a
    prompt of at most one segment, which is counted in `BlockIndex.unjudged`.

    PBS-Attn, arXiv:2510.21270, where `inner` is block means with a cumulative mass of 0.9, blocks of 128, and keys are
    sorted for each query head. Raises ValueError or TypeError for counts that are none, and in `build_parts` ValueError
    for segments that are no multiple of the key blocks.
    """

    inner: Any = PUBLISHED  # anything with `build_index`
    segment: int = 256  # tokens
    probe: int = 128  # last queries that decide the order
    force_first: bool = True  # keep the block that the first token went to

    in_parts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_tokens("segment", self.segment)
        check_tokens("probe", self.probe)
        if not isinstance(self.force_first, bool):
            raise TypeError(f"force_first must be True or False, got {self.force_first!r:.80}")
        if not callable(getattr(self.inner, "build_index", None)) or getattr(self.inner, "in_parts", False):
            raise TypeError(
                f"pbs goes around a pattern with build_index(inputs, grid), got {type(self.inner).__name__}: keys "
                "cannot be sorted twice"
            )
        check_names_blocks_alone("pbs", self.inner)
        check_asked_often("pbs", self.inner)

    def build_parts(self, inputs: AttentionInputs, grid: BlockGrid) -> tuple[Part, ...]:
        """A row's own segment with keys as they lie, and what `inner` chose of the sorted ones behind it."""
        check_segment(self.segment, grid)
        if self.keeps_everything():
            return (Part(inputs, self.inner.build_index(inputs, grid)),)
        asked = grid.real_queries(inputs).sum(-1, keepdim=True).expand(-1, inputs.query_heads)
        if inputs.last_key <= self.segment:
            self.inner.build_index(inputs, grid)  # what it refuses is refused at any length, before a model is patched
            return (Part(inputs, dataclasses.replace(BlockIndex.dense(inputs, grid), unjudged=asked)),)
        since, until = segments_behind(inputs, grid, self.segment)
        order = order_inside(inputs, self.segment, self._importance(inputs))
        sorted_inputs = in_order(inputs, order)
        chosen = self.inner.build_index(sorted_inputs, grid.between(since, until))
        first = _block_of_first(inputs, order, grid.block_k) if self.force_first else None
        behind = behind_alone(chosen, grid, since, until, first, inputs.group_size)
        unjudged = chosen.unjudged
        if inputs.key_valid is not None:  # batch rows of at most one segment, beside longer ones
            short = inputs.tail().clamp(max=inputs.filled) - inputs.anchor() <= self.segment
            judged = torch.zeros_like(asked) if unjudged is None else unjudged
            unjudged = torch.where(short[:, None], asked, judged)
        own = dataclasses.replace(own_segments(inputs, grid, since, until), unjudged=unjudged)
        return Part(inputs, own), Part(sorted_inputs, behind)

    def keeps_everything(self) -> bool:
        """Whether `inner` is dense by its kind."""
        return isinstance(self.inner, Dense)

    def for_layer(self, layer: int) -> Pbs:
        """What `inner` is in this layer."""
        return dataclasses.replace(self, inner=inner_for_layer(self.inner, layer))

    def estimator_products(self, inputs: AttentionInputs, grid: BlockGrid) -> float:
        """See `sparseprefill.patterns.nested`."""
        return products_of(self.inner, inputs, grid) + min(self.probe, inputs.queries) * inputs.last_key

    def expected_density(self, keys: int) -> float:
        return min(1.0, expected_density(self.inner, keys) + kept_share(self.segment, keys))

    def expected_overhead(self, device: torch.device, head_dim: int, block_q: int, block_k: int) -> Overhead:
        """Beside `inner` the probe's products, and keys and values written in their new order."""
        own = stated_overhead(device, head_dim, keys=self.probe + 16, tiles=0.5 / (block_q * block_k), steps=1.5)
        return own + expected_overhead(self.inner, device, head_dim, block_q, block_k)

    def _importance(self, inputs: AttentionInputs) -> Tensor:
        """[batch, kv_heads, keys]: mean weight of each key of a whole segment for the last queries of the group."""
        if inputs.device.type == "cpu":  # a few groups at a time: fresh memory costs more than the passes over it
            entries = inputs.batch * min(self.probe, inputs.queries) * inputs.keys
            together = max(1, CPU_ENTRIES // (entries * inputs.group_size)) * inputs.group_size
            if together < inputs.query_heads:
                return torch.cat([self._weights(part) for _, _, part in head_slabs(inputs, together)], 1)
        return self._weights(inputs)

    def _weights(self, inputs: AttentionInputs) -> Tensor:
        """`_importance`, all groups at once."""
        rows = min(self.probe, inputs.queries)
        first = (inputs.tail() - rows).clamp(min=inputs.query_start)
        slot = first[:, None] + torch.arange(rows, device=inputs.device)
        place = (slot - inputs.query_start)[:, None, :, None].expand(-1, inputs.query_heads, -1, inputs.head_dim)
        accurate = torch.float64 if inputs.query.dtype == torch.float64 else torch.float32
        query = inputs.query.gather(2, place).to(accurate).unflatten(1, (inputs.kv_heads, inputs.group_size))
        logits = (query.flatten(2, 3) @ inputs.key.to(accurate).mT).mul_(inputs.scale)
        if inputs.softcap is not None:
            logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
        key = torch.arange(inputs.keys, device=inputs.device)
        anchor, tail = inputs.anchor()[:, None], inputs.tail()[:, None].clamp(max=inputs.filled)
        whole = anchor + (tail - anchor).clamp(min=0) // self.segment * self.segment
        counted = (key >= anchor) & (key < whole)
        if inputs.key_valid is not None:
            counted &= inputs.key_valid
        share = logits.masked_fill_(~counted[:, None, None], -torch.inf).softmax(-1)
        share = share.unflatten(2, (inputs.group_size, rows))
        if inputs.key_valid is not None:
            asked = inputs.key_valid.gather(1, slot)
            share = share.masked_fill(~asked[:, None, None, :, None], 0)
        importance: Tensor = share.sum((2, 3)).nan_to_num(0.0)
        return importance.masked_fill(~counted[:, None], -torch.inf)


def _block_of_first(inputs: AttentionInputs, order: Tensor, block_k: int) -> Tensor:
    """int64 [batch, kv_heads]: the key block that each batch row's first valid key went to."""
    anchor = inputs.anchor()[:, None]
    slot = (order == anchor[..., None]).to(torch.int64).argmax(-1)
    return (slot - anchor).clamp(min=0) // block_k
