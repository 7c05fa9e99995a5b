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
from sparseprefill.patterns.parts import Part

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

    def build_parts(self, inputs: AttentionInputs, grid: BlockGrid) -> tuple[Part, ...]:
        """A row's own segment with keys as they lie, and what `inner` chose of the sorted ones behind it."""
        if self.segment % grid.block_k:
            raise ValueError(
                f"segments of {self.segment} tokens are no multiple of key blocks of {grid.block_k}: choose a segment "
                "that is, or another block_k"
            )
        if self.keeps_everything():
            return (Part(inputs, self.inner.build_index(inputs, grid)),)
        asked = grid.real_queries(inputs).sum(-1, keepdim=True).expand(-1, inputs.query_heads)
        if inputs.last_key <= self.segment:
            self.inner.build_index(inputs, grid)  # what it refuses is refused at any length, before a model is patched
            return (Part(inputs, dataclasses.replace(BlockIndex.dense(inputs, grid), unjudged=asked)),)
        since, until = self._behind(inputs, grid)
        order = self._order(inputs)
        sorted_inputs = _sorted(inputs, order)
        chosen = self.inner.build_index(sorted_inputs, grid.between(since, until))
        first = _block_of_first(inputs, order, grid.block_k) if self.force_first else None
        behind = _behind_alone(chosen, grid, since, until, first, inputs.group_size)
        unjudged = chosen.unjudged
        if inputs.key_valid is not None:  # batch rows of at most one segment, beside longer ones
            short = inputs.tail().clamp(max=inputs.filled) - inputs.anchor() <= self.segment
            judged = torch.zeros_like(asked) if unjudged is None else unjudged
            unjudged = torch.where(short[:, None], asked, judged)
        own = dataclasses.replace(_own(inputs, grid, since, until), unjudged=unjudged)
        return Part(inputs, own), Part(sorted_inputs, behind)

    def keeps_everything(self) -> bool:
        """Whether `inner` is dense by its kind."""
        return isinstance(self.inner, Dense)

    def for_layer(self, layer: int) -> Pbs:
        """What `inner` is in this layer."""
        own = getattr(self.inner, "for_layer", None)
        return dataclasses.replace(self, inner=own(layer)) if callable(own) else self

    def estimator_products(self, inputs: AttentionInputs, grid: BlockGrid) -> float:
        """See `sparseprefill.patterns.nested`."""
        own = getattr(self.inner, "estimator_products", None)
        inner = float(own(inputs, grid)) if callable(own) else 0.0
        return inner + min(self.probe, inputs.queries) * inputs.last_key

    def expected_density(self, keys: int) -> float:
        return min(1.0, expected_density(self.inner, keys) + kept_share(self.segment, keys))

    def expected_overhead(self, device: torch.device, head_dim: int, block_q: int, block_k: int) -> Overhead:
        """Beside `inner` the probe's products, and keys and values written in their new order."""
        own = stated_overhead(device, head_dim, keys=self.probe + 16, tiles=0.5 / (block_q * block_k), steps=1.5)
        return own + expected_overhead(self.inner, device, head_dim, block_q, block_k)

    def _behind(self, inputs: AttentionInputs, grid: BlockGrid) -> tuple[Tensor, Tensor]:
        """int64 [batch, rows] twice: key blocks [since, until) of the segments that lie behind each row."""
        blocks = self.segment // grid.block_k
        row = grid.first[:, None] + torch.arange(grid.rows, device=inputs.device)
        until = row * grid.block_q // self.segment * blocks
        low, _ = inputs.visible_range()
        begin, end = grid.row_slots()
        last = (end - 1 - inputs.query_start).clamp(0, inputs.queries - 1)
        past = (low.gather(1, last) - grid.anchor[:, None]).clamp(min=0)
        since = -(-past // self.segment) * blocks
        until = torch.where(end > begin, until.clamp(max=grid.key_blocks), 0)
        return torch.minimum(since, until), until

    def _order(self, inputs: AttentionInputs) -> Tensor:
        """int64 [batch, kv_heads, keys]: the slot whose key comes to stand in each slot."""
        anchor, keys = inputs.anchor(), inputs.keys
        importance = self._importance(inputs)  # [batch, kv_heads, keys], -inf for what no query may see
        count = -(-keys // self.segment)
        slot = anchor[:, None] + torch.arange(count * self.segment, device=inputs.device)
        inside = slot < keys
        place = slot.clamp(max=keys - 1)[:, None].expand(-1, inputs.kv_heads, -1)
        own = importance.gather(2, place).masked_fill(~inside[:, None], -torch.inf).unflatten(2, (count, self.segment))
        # a slot without a key to sort keeps its own, so that it is known by its place who is padding; of the others the
        # first gets the heaviest key
        counted = own > -torch.inf
        rank = counted.cumsum(-1) - 1
        heaviest = own.argsort(dim=-1, descending=True, stable=True).gather(-1, rank.clamp(min=0))
        here = torch.arange(self.segment, device=inputs.device)
        begin = torch.arange(count, device=inputs.device)[:, None] * self.segment
        moved = anchor[:, None, None] + (torch.where(counted, heaviest, here) + begin).flatten(2)
        past = torch.arange(keys, device=inputs.device) - anchor[:, None]
        moved = moved.gather(2, past.clamp(0, moved.shape[2] - 1)[:, None].expand(-1, inputs.kv_heads, -1))
        return torch.where((past >= 0)[:, None], moved, torch.arange(keys, device=inputs.device))

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


def _sorted(inputs: AttentionInputs, order: Tensor) -> AttentionInputs:
    """Keys and values in another order; invalid ones stay where they are, so that `key_valid` stays what it is."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor.gather(2, order[..., None].expand(-1, -1, -1, tensor.shape[3]))

    return dataclasses.replace(inputs, key=moved(inputs.key), value=moved(inputs.value))


def _block_of_first(inputs: AttentionInputs, order: Tensor, block_k: int) -> Tensor:
    """int64 [batch, kv_heads]: the key block that each batch row's first valid key went to."""
    anchor = inputs.anchor()[:, None]
    slot = (order == anchor[..., None]).to(torch.int64).argmax(-1)
    return (slot - anchor).clamp(min=0) // block_k


def _behind_alone(
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


def _own(inputs: AttentionInputs, grid: BlockGrid, since: Tensor, until: Tensor) -> BlockIndex:
    """All visible blocks but those behind each row, the same for all heads."""
    block = torch.arange(grid.key_blocks, device=inputs.device)
    behind = (block >= since[..., None]) & (block < until[..., None])
    return BlockIndex.from_mask(grid, (grid.visible_block_mask(inputs) & ~behind)[:, None]).for_heads(
        inputs.query_heads
    )
