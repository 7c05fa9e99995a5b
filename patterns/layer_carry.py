"""Importance carried from layer to layer: key blocks that early layers hardly looked at are dead in later ones.

Wang, Zhang and Han, "SpAtten", 2021, arXiv:2012.09852: token importance adds up over layers and heads, and a token that
was pruned stays pruned (cascade). There all of the token goes; here its key block leaves the lists of what is wrapped.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.estimators.column_votes import column_votes, rows_that_vote
from sparseprefill.estimators.selection import check_count, check_share, check_tokens, keep_blocks
from sparseprefill.patterns.block_sparse import forced_blocks
from sparseprefill.patterns.expected_density import expected_density
from sparseprefill.patterns.expected_overhead import Overhead, expected_overhead, stated_overhead
from sparseprefill.patterns.nested import products_of
from sparseprefill.patterns.wrapping import check_inner, inner_for_layer, keeps_everything


@dataclass(frozen=True, slots=True, eq=False)
class Carried:
    """What the layers so far have left behind."""

    layer: int  # the last one that was here
    call: tuple[Any, ...]  # what was asked of it
    importance: Tensor  # float32 [batch, key_blocks], votes of all layers so far; NaN: not known
    alive: Tensor  # bool [batch, key_blocks]


class Memory:
    """What was carried, of each thread by itself. A copy of a model begins with nothing."""

    def __init__(self) -> None:
        self._carried: weakref.WeakKeyDictionary[threading.Thread, Carried] = weakref.WeakKeyDictionary()

    def get(self) -> Carried | None:
        """That of this thread."""
        return self._carried.get(threading.current_thread())

    def put(self, carried: Carried) -> None:
        """Keep it for this thread."""
        self._carried[threading.current_thread()] = carried

    def __deepcopy__(self, _: Any) -> Memory:
        return Memory()

    def __reduce__(self) -> tuple[type[Memory], tuple[()]]:
        return Memory, ()


@dataclass(frozen=True, slots=True)
class LayerCarry:
    """The blocks of `inner`, without those that are dead.

    In each layer the last `probe` queries of all heads vote on the keys, and votes add up over the layers of a call.
    From layer `start` on, a layer first leaves of the blocks that are alive those with the most votes, a share of
    max(`least`, 1 - `fall` * (layer - `start` + 1)) of all; of equal votes the lower block. What is dead stays dead.
    The blocks of the `first` tokens, of the `near` tokens before a row's end and from the last `probe` queries on
    are never dead. Nothing dies where a vote is not finite, and rows that `inner` keeps whole as it cannot judge them
    stay whole. A call begins where a layer comes that is not behind the last one, or asks for something else.

    Without a layer, as in comparisons of single layers, nothing is behind it: it is `inner`. It looks ahead. SpAtten,
    arXiv:2012.09852. Raises ValueError or TypeError for numbers that are none, and TypeError for what names no blocks
    of keys as they lie.
    """

    inner: Any  # anything with `build_index`
    start: int = 1  # the first layer that leaves blocks out
    fall: float = 0.1  # share of the blocks that each layer leaves out
    least: float = 0.3  # share that stays in any layer
    probe: int = 64  # last queries, which vote
    first: int = 64  # tokens at the beginning that never die
    near: int = 128  # tokens before a row's end that never die
    layer: int | None = field(default=None, repr=False)  # set by `for_layer`
    memory: Memory = field(default_factory=Memory, repr=False, compare=False)

    stateful: ClassVar[bool] = True  # one call a layer; see `check_asked_often`

    def __post_init__(self) -> None:
        check_count("start", self.start, least=0)
        check_share("fall", self.fall)
        check_share("least", self.least)
        check_tokens("probe", self.probe)
        check_tokens("first", self.first, least=0)
        check_tokens("near", self.near, least=0)
        check_inner("layer_carry", self.inner)

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        index: BlockIndex = self.inner.build_index(inputs, grid)
        if self.layer is None:
            return index
        call = (
            inputs.batch, inputs.query_start, inputs.queries, inputs.keys, inputs.last_key, inputs.device,
            grid.block_q, grid.block_k,
        )  # fmt: skip
        before = self.memory.get()
        if before is not None and (before.layer >= self.layer or before.call != call):
            before = None
        votes = self._votes(inputs, grid)
        if before is None:
            alive = torch.ones_like(votes, dtype=torch.bool)
        else:
            alive = self._alive(inputs, grid, before)
            votes = votes + before.importance
            index = self._without_dead(index, alive, inputs, grid)
        self.memory.put(Carried(self.layer, call, votes, alive))
        return index

    def keeps_everything(self) -> bool:
        """Nothing is dead before a second layer; after that even a dense pattern loses blocks."""
        return self.layer is None and keeps_everything(self.inner)

    def for_layer(self, layer: int) -> LayerCarry:
        """This layer's, which carries on what the others have left."""
        return dataclasses.replace(self, inner=inner_for_layer(self.inner, layer), layer=layer)

    def estimator_products(self, inputs: AttentionInputs, grid: BlockGrid) -> float:
        """See `sparseprefill.patterns.nested`. Keys are met twice by those who vote."""
        own = 0.0 if self.layer is None else 2.0 * min(self.probe, inputs.queries) * inputs.last_key
        return products_of(self.inner, inputs, grid) + own

    def expected_density(self, keys: int) -> float:
        return expected_density(self.inner, keys)

    def expected_overhead(self, device: torch.device, head_dim: int, block_q: int, block_k: int) -> Overhead:
        """That of `inner`, of those who vote, and a mask of all tiles."""
        tiles = 0.5 / (block_q * block_k)
        own = stated_overhead(device, head_dim, keys=2 * self.probe, tiles=tiles, steps=1.0)
        return own + expected_overhead(self.inner, device, head_dim, block_q, block_k)

    def _votes(self, inputs: AttentionInputs, grid: BlockGrid) -> Tensor:
        """float32 [batch, key_blocks]: what the last queries of all heads give each block; NaN where not finite."""
        votes, _ = column_votes(inputs, rows_that_vote(inputs, self.probe, 0, 0), "all")
        slot = grid.anchor[:, None] + torch.arange(grid.key_blocks * grid.block_k, device=inputs.device)
        own = votes[:, 0, 0].gather(1, slot.clamp(max=inputs.keys - 1)) * (slot < inputs.last_key)
        by_block: Tensor = own.unflatten(1, (grid.key_blocks, grid.block_k)).sum(-1).float()
        return by_block.masked_fill(~votes[:, 0, 0].isfinite().all(-1, keepdim=True), torch.nan)

    def _alive(self, inputs: AttentionInputs, grid: BlockGrid, before: Carried) -> Tensor:
        """bool [batch, key_blocks]: what is alive in this layer, those that are never dead left aside."""
        assert self.layer is not None
        if self.layer < self.start:
            return before.alive
        share = max(self.least, 1 - self.fall * (self.layer - self.start + 1))
        blocks = -(-(inputs.tail() - grid.anchor) // grid.block_k)[:, None]
        real = torch.arange(grid.key_blocks, device=inputs.device) < blocks
        ranked = before.importance.masked_fill(~(before.alive & real), -torch.inf).argsort(
            dim=-1, descending=True, stable=True
        )
        first = torch.arange(grid.key_blocks, device=inputs.device) < keep_blocks(float(share), blocks, grid.block_k)
        unknown = before.importance.isnan().any(-1, keepdim=True)
        return (torch.zeros_like(before.alive).scatter_(-1, ranked, first) | unknown) & before.alive

    def _without_dead(
        self, index: BlockIndex, alive: Tensor, inputs: AttentionInputs, grid: BlockGrid
    ) -> BlockIndex:  # fmt: skip
        row = grid.first[:, None] + torch.arange(grid.rows, device=inputs.device)
        block = torch.arange(grid.key_blocks, device=inputs.device)
        recent = (inputs.tail() - self.probe - grid.anchor).clamp(min=0)[:, None] // grid.block_k
        first = torch.minimum(row * grid.block_q // grid.block_k, recent)
        low, high = grid.visible_blocks(inputs)
        stays = alive[:, None] | forced_blocks(inputs, grid, self.first, self.near) | (block >= first[..., None])
        parts = []
        for begin, end in grid.slabs(index.query_heads):
            listed = index.to_mask(begin, end)
            mask = listed & stays[:, None, begin:end]
            if index.unjudged is not None:
                whole = listed.sum(-1) == (high - low)[:, None, begin:end]
                mask = mask | (listed & (whole & (index.unjudged > 0)[..., None])[..., None])
            parts.append(BlockIndex.from_mask(grid, torch.where(mask.any(-1, keepdim=True), mask, listed)))
        made = dataclasses.replace(BlockIndex.stack(parts), unjudged=index.unjudged, skip=index.skip)
        if index.visit is None:
            return made
        return made.visiting(lambda begin, end: -index.visit_places(begin, end))
