"""A context that is fixed before its questions are known: how one layer of it lies, and attention of questions to it.

All keys of the context are in the past of every question, so that no mask binds among them and they may lie in any
order. The first tokens (`sink`) and the last (`local`) are attended to by every query; the rest, the middle, is laid
out and indexed by a context method, which chooses among it for each KV head and block of queries.

A context method is a dataclass with `sink` and `local` tokens and these verbs:

    check_length(length: int) -> None                  before anything is run; raises ValueError for what it cannot do
    index_layer(keys: ContextKeys) -> ContextIndex     once for each layer that sees everything
    calibrate(indexes: list of them, length) -> None   once, when all layers are there
    load_index(order, tensors, key, scale, softcap)    from a file: what `ContextIndex.tensors` gave

An index lays out the middle (`order`) and has the verb `choose`, see there.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, AttentionOutput, BlockGrid, BlockIndex
from sparseprefill.estimators.selection import check_tokens
from sparseprefill.kernels import block_sparse_attention
from sparseprefill.kernels.join import join_outputs
from sparseprefill.kernels.shared_keys import causal_attention, chosen_attention, key_lse, shared_attention

ACCESS = ("auto", "tokens", "tiles")
"""How chosen keys are read: gathered one by one, or in whole tiles of the order they lie in."""

_LEAST_TILE = 16  # queries of a tile; fewer are gathered for, whatever the access

_TAIL_LOGITS = 1 << 24  # of questions and answers among themselves, that are computed all at once


@dataclass(frozen=True, slots=True, eq=False)
class ContextKeys:
    """What a context method learns from: one layer of a context."""

    key: Tensor  # float32 [kv_heads, middle, head_dim], in the order of the tokens
    edge: Tensor  # float32 [kv_heads, sink + local, head_dim]: what every query attends to
    query: Tensor  # float32 [query_heads, some, head_dim]: queries of the prefill, evenly spaced
    held_out: Tensor  # float32 [query_heads, at most local, head_dim]: the last ones, which stand behind the middle
    scale: float
    softcap: float | None
    memo: dict[Any, tuple[Any, float]] = field(default_factory=dict)  # what methods that differ in a budget alone
    # need to make once, and the seconds it took
    saved: list[float] = field(default_factory=list)  # seconds of what was there already, for who asked since

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, which is called once for each key."""
        if key in self.memo:
            self.saved.append(self.memo[key][1])
        else:
            began = time.perf_counter()
            made = make()
            self.memo[key] = made, time.perf_counter() - began
        return self.memo[key][0]

    @property
    def group_size(self) -> int:
        """Query heads of a KV head."""
        return self.query.shape[0] // self.key.shape[0]


class ContextIndex(Protocol):
    """What a context method made of a layer."""

    order: Tensor  # int64 [kv_heads, middle]: which key of the middle lies at each place

    def choose(self, query: Tensor, real: Tensor, queries: Tensor, edge_lse: Tensor) -> Tensor:
        """Which keys each block of queries attends to.

        Args:
            query: [kv_heads, blocks, rows, head_dim]; a row is a query of one of the heads of the group.
            real: bool [blocks, rows]: rows that are no padding.
            queries: int64 [blocks]: how many queries those are, each one of all heads of the group.
            edge_lse: float32 [kv_heads, blocks, rows]: the logsumexp over sink and local.

        Returns:
            bool [kv_heads, blocks, middle], in that order.
        """
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What a file has to hold, `order` left out."""
        ...

    def to(self, device: torch.device) -> ContextIndex:
        """The same where keys are kept on another device; it may choose wherever it likes."""
        ...


class ContextMethod(Protocol):
    """See the text of this module."""

    sink: int
    local: int

    def check_length(self, length: int) -> None: ...

    def index_layer(self, keys: ContextKeys) -> Any: ...

    def calibrate(self, indexes: Sequence[Any], length: int) -> None: ...

    def load_index(
        self, order: Tensor, tensors: dict[str, Tensor], key: Tensor, scale: float, softcap: float | None
    ) -> Any: ...


def check_edges(sink: int, local: int) -> None:
    """Raise ValueError or TypeError for token counts that are none; there must be local tokens to learn from."""
    check_tokens("sink", sink, least=0)
    check_tokens("local", local)


def room_left(length: int, sink: int, local: int) -> int:
    """Keys between sink and local. Raises ValueError where a context of `length` tokens has none."""
    if length <= sink + local:
        raise ValueError(
            f"a context of {length} tokens is no longer than its sink ({sink}) and local window ({local}) together: "
            "there is nothing to choose from; choose smaller ones, or put it into the prompt"
        )
    return length - sink - local


@dataclass(frozen=True, slots=True, eq=False)
class ContextLayer:
    """Keys and values of one layer of a context, as they lie. Nothing writes to them."""

    edge_key: Tensor  # [kv_heads, sink + local, head_dim]
    edge_value: Tensor  # [kv_heads, sink + local, value_dim]
    key: Tensor  # [kv_heads, middle, head_dim] in the order of the index
    value: Tensor  # [kv_heads, middle, value_dim]
    sink: int
    order: Tensor  # int64 [kv_heads, middle]
    index: Any | None  # None: everything is attended to

    @staticmethod
    def of(key: Tensor, value: Tensor, sink: int, local: int, index: Any | None) -> ContextLayer:
        """From keys and values [kv_heads, length, ...] in the order of the tokens; `index` over the middle, or None."""
        length = key.shape[1]
        middle = room_left(length, sink, local)
        index = None if index is None else index.to(key.device)
        order = torch.arange(middle, device=key.device).expand(key.shape[0], -1) if index is None else index.order

        def parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
            edge = torch.cat([tensor[:, :sink], tensor[:, length - local :]], 1)
            place = (order + sink)[..., None].expand(-1, -1, tensor.shape[2])
            return edge, tensor.gather(1, place)

        (edge_key, own_key), (edge_value, own_value) = parts(key), parts(value)
        return ContextLayer(edge_key, edge_value, own_key, own_value, sink, order, index)

    @property
    def length(self) -> int:
        """Tokens of the context."""
        return self.key.shape[1] + self.edge_key.shape[1]

    def plain(self) -> tuple[Tensor, Tensor]:
        """Keys and values [kv_heads, length, ...] in the order of the tokens: copies."""

        def joined(edge: Tensor, middle: Tensor) -> Tensor:
            back = torch.empty_like(middle).scatter_(1, self.order[..., None].expand_as(middle), middle)
            return torch.cat([edge[:, : self.sink], back, edge[:, self.sink :]], 1)

        return joined(self.edge_key, self.key), joined(self.edge_value, self.value)

    def last(self, tokens: int) -> tuple[Tensor, Tensor]:
        """The last keys and values, in the order of the tokens."""
        local = self.edge_key.shape[1] - self.sink
        if tokens <= local:
            start = self.edge_key.shape[1] - tokens
            return self.edge_key[:, start:], self.edge_value[:, start:]
        if self.index is None and tokens - local <= self.key.shape[1]:  # the middle lies as the tokens do
            start = self.key.shape[1] - (tokens - local)
            own, other = (
                torch.cat([middle[:, start:], edge[:, self.sink :]], 1)
                for middle, edge in ((self.key, self.edge_key), (self.value, self.edge_value))
            )
            return own, other
        key, value = self.plain()
        return key[:, -tokens:], value[:, -tokens:]


@dataclass(frozen=True, slots=True, eq=False)
class ContextCounts:
    """What one call attended to, of the context alone; counts of queries and keys."""

    chosen: Tensor  # int64 [kv_heads]: pairs of a real query and a chosen key of the middle
    edges: Tensor  # int64 []: pairs of a real query and a key of sink or local, in each head
    visible: Tensor  # int64 []: pairs of a real query and any key of the context, in each head


def attend_to_context(
    layer: ContextLayer,
    query: Tensor,
    tail: AttentionInputs,
    *,
    block_q: int = 64,
    access: str = "auto",
    block_k: int = 64,
) -> tuple[AttentionOutput, ContextCounts]:
    """Attention of questions to a context and to themselves.

    Args:
        layer: the context, the same for all questions.
        query: [batch, query_heads, queries, head_dim].
        tail: the same queries with the keys of question and answer alone: `key_valid` marks padding, `query_start` is
            counted from the first of them. Its sinks take their share of everything, once.
        block_q: queries that share a choice; a block never holds queries of two questions.
        access: see `ACCESS`; "auto" gathers.
        block_k: keys of a tile.

    Returns:
        Output in the dtype of the query, with lse over everything; and what was attended to.

    Raises ValueError for an unknown access.
    """
    if access not in ACCESS:
        raise ValueError(f"keys are read by {', '.join(ACCESS)}, got {access!r}")
    batch, query_heads, queries, _ = query.shape
    kv_heads = layer.key.shape[0]
    group = query_heads // kv_heads
    scale, softcap = tail.scale, tail.softcap
    size = min(block_q, queries)
    blocks = -(-queries // size)
    # blocks are counted from each question's first token, so that a choice does not depend on its neighbours
    own = None if tail.key_valid is None else tail.key_valid[:, tail.query_start : tail.query_start + queries]
    lead = torch.zeros(batch, dtype=torch.int64, device=query.device) if own is None else own.to(torch.int8).argmax(1)
    place = torch.arange(blocks * size, device=query.device) + lead[:, None]
    asked, place = place < queries, place.clamp(max=queries - 1)
    if own is not None:
        asked = asked & own.gather(1, place)
    asked = asked.reshape(batch * blocks, 1, size)
    padded = query.gather(2, place[:, None, :, None].expand(-1, query_heads, -1, query.shape[3]))
    # [kv_heads, batch * blocks, group * size, head_dim]
    rows = padded.unflatten(1, (kv_heads, group)).unflatten(3, (blocks, size)).permute(1, 0, 3, 2, 4, 5)
    rows = rows.flatten(1, 2).flatten(2, 3)
    real = asked.expand(-1, group, -1).flatten(1)
    home = (
        (torch.arange(queries, device=query.device) - lead[:, None]).clamp(min=0)[:, None].expand(-1, query_heads, -1)
    )

    def back(output: Tensor, lse: Tensor) -> AttentionOutput:
        """[batch, query_heads, blocks * size, ...] to the places of the queries."""
        return AttentionOutput(
            output.gather(2, home[..., None].expand(-1, -1, -1, output.shape[3])), lse.gather(2, home)
        )

    def apart(output: Tensor, lse: Tensor) -> AttentionOutput:
        """From rows of blocks back to [batch, query_heads, queries, ...]."""
        shape = (kv_heads, batch, blocks, group, size)
        whole = output.reshape(*shape, -1).permute(1, 0, 3, 2, 4, 5).flatten(1, 2).flatten(2, 3)
        return back(whole, lse.reshape(shape).permute(1, 0, 3, 2, 4).flatten(1, 2).flatten(2, 3))

    flat = rows.flatten(1, 2)
    device = query.device
    edge = shared_attention(flat, layer.edge_key.to(device), layer.edge_value.to(device), scale, softcap)
    parts = [apart(*edge)]
    count = asked.sum()
    middle = layer.key.shape[1]
    if layer.index is None:
        parts.append(apart(*shared_attention(flat, layer.key.to(device), layer.value.to(device), scale, softcap)))
        chosen = (count * middle).expand(kv_heads)
    else:
        edge_lse = edge[1].reshape(rows.shape[:3])
        there = layer.key.device
        given = rows, real, asked.sum((1, 2)), edge_lse
        marked = layer.index.choose(*(each.to(there) for each in given)).to(there)
        if access == "tiles" and size >= _LEAST_TILE:
            marked = _whole_tiles(marked, block_k)
            parts.append(back(*_by_tiles(layer, padded, marked, tail, size, block_k)))
        else:
            parts.append(apart(*chosen_attention(rows, layer.key, layer.value, marked, scale, softcap)))
        chosen = (marked.sum(-1) * asked.sum((1, 2)).to(there)).sum(1)
    parts.append(_tail(tail))
    result = join_outputs(parts, tail.sinks)
    assert result.output is not None
    result = dataclasses.replace(result, output=result.output.to(query.dtype))
    return result, ContextCounts(chosen, count * layer.edge_key.shape[1], count * layer.length)


def _whole_tiles(marked: Tensor, block_k: int) -> Tensor:
    """bool [kv_heads, blocks, middle]: every key of a tile in which one is marked."""
    middle = marked.shape[-1]
    return _tiles_of(marked, block_k).repeat_interleave(block_k, -1)[..., :middle]


def _tiles_of(marked: Tensor, block_k: int) -> Tensor:
    """bool [kv_heads, blocks, tiles]: those in which a key is marked."""
    tiles: Tensor = (
        torch.nn.functional.pad(marked, (0, -marked.shape[-1] % block_k)).unflatten(-1, (-1, block_k)).any(-1)
    )
    return tiles


def _by_tiles(
    layer: ContextLayer, query: Tensor, marked: Tensor, tail: AttentionInputs, block_q: int, block_k: int
) -> tuple[Tensor, Tensor]:
    """The chosen tiles through the block-sparse kernel, all questions as one prompt behind the middle.

    Rows of the index are blocks of queries; keys need places behind the middle for the queries to stand in, which are
    never looked at.
    """
    batch, query_heads, queries, _ = query.shape
    kv_heads, middle = layer.key.shape[:2]
    aligned = -(-middle // block_q) * block_q  # so that no row of the grid holds queries of two questions

    def behind(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, 0, 0, aligned - middle + batch * queries))[None].to(query.device)

    inputs = AttentionInputs(
        query.transpose(0, 1).reshape(1, query_heads, batch * queries, -1), behind(layer.key), behind(layer.value),
        tail.scale, softcap=tail.softcap, query_start=aligned, key_length=middle,
    )  # fmt: skip
    grid = BlockGrid.of(inputs, block_q, block_k)
    mask = _tiles_of(marked, block_k).repeat_interleave(query_heads // kv_heads, 0)[None].to(query.device)
    result = block_sparse_attention(inputs, BlockIndex.from_mask(grid, mask))
    assert result.output is not None
    shape = (query_heads, batch, queries)
    output = result.output[0].reshape(*shape, -1).transpose(0, 1).float()
    return output, result.lse[0].reshape(shape).transpose(0, 1)


def _tail(tail: AttentionInputs) -> AttentionOutput:
    """Questions and answers among themselves."""
    if tail.batch * tail.query_heads * tail.queries * tail.keys <= _TAIL_LOGITS:
        output, lse = causal_attention(tail.query, tail.key, tail.value, tail.visible_mask(), tail.scale, tail.softcap)
        return AttentionOutput(output, lse)
    own = dataclasses.replace(tail, sinks=None)
    result = block_sparse_attention(own, BlockIndex.dense(own, BlockGrid.of(own, 64, 64)))
    assert result.output is not None
    return AttentionOutput(result.output.float(), result.lse)


def dense_lse(layer: ContextLayer, tail: AttentionInputs, place: Tensor) -> Tensor:
    """float32 [batch, query_heads, rows]: the logsumexp over context and tail, of the queries at `place`."""
    query = tail.query[:, :, place]
    batch, query_heads, rows, _ = query.shape
    kv_heads = layer.key.shape[0]
    flat = query.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 3)
    shape = (kv_heads, batch, query_heads // kv_heads, rows)
    parts = []
    for key in (layer.edge_key, layer.key):
        own = key_lse(flat, key.to(query.device), tail.scale, tail.softcap)
        parts.append(own.reshape(shape).transpose(0, 1).flatten(1, 2))
    visible = tail.visible_mask()[:, place]
    _, lse = causal_attention(query, tail.key, tail.value, visible, tail.scale, tail.softcap)
    return torch.logsumexp(torch.stack([*parts, lse]), 0)
