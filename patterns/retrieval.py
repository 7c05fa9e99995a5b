"""Retrieval: of a fixed context, the keys nearest to each query, found in an index.

Liu et al., "RetrievalAttention: Accelerating Long-Context LLM Inference via Vector Retrieval", 2024, arXiv:2409.10516.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseprefill.estimators.nearest_keys import KINDS, KeyIndex, build_index, load_index
from sparseprefill.estimators.selection import check_share, check_tokens
from sparseprefill.patterns.fixed_context import ContextKeys, check_edges, room_left

_PROMISES = 1 << 24  # of blocks and keys that are held at one time

EFFORTS = {"flat": 1, "ivf": 16, "hnsw": 128, "cells": 8, "graph": 128}
"""How far a search looks by itself: cells that are visited, or keys that are kept in sight."""


@dataclass(frozen=True, slots=True)
class Retrieval:
    """The `keys` nearest to each query by inner product, of the keys between sink and local window.

    Each KV head has an index of its own, and every query of its group searches it. A block of queries attends to what
    any of its queries found; where that is more than `density` leaves, to the keys that promise the most: the largest
    logit, less what the query finds in sink and local window.

    The index "cells" or "graph" is built with queries of the prefill as well as with keys, "flat", "ivf" and "hnsw"
    with keys alone; "flat" is exact.

    `keys` of the whole middle, without `density`, is dense attention. arXiv:2409.10516, which has 128 first and 512
    last tokens, 100 keys for each query and head, and decodes alone. Raises ValueError or TypeError for numbers that
    are none.
    """

    keys: int = 100  # for each query and head
    density: float | None = 0.15  # of the context's keys at most, sink and local window included; None: no limit
    index: str = "graph"  # one of `KINDS`
    effort: int | None = None  # None: see `EFFORTS`
    sink: int = 128  # first tokens, attended to always
    local: int = 512  # last tokens, attended to always
    links: int = 128  # nearest keys of each query of the prefill that an index learns from
    train: int = 4096  # of those queries, at most, for each KV head
    seed: int = 0  # of K-means

    def __post_init__(self) -> None:
        check_edges(self.sink, self.local)
        for name in ("keys", "links", "train"):
            check_tokens(name, getattr(self, name))
        if self.density is not None:
            check_share("density", self.density)
        if self.effort is not None:
            check_tokens("effort", self.effort)
        if self.index not in KINDS:
            raise ValueError(f"index is one of {', '.join(KINDS)}, got {self.index!r:.80}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be a whole number from 0 to 2^32 - 1, got {self.seed!r:.80}")

    def check_length(self, length: int) -> None:
        """Raise ValueError where a context of this length cannot be served with this density."""
        room_left(length, self.sink, self.local)
        if self.density is not None and self.density * length <= self.sink + self.local:
            raise ValueError(
                f"sink ({self.sink}) and local window ({self.local}) are {(self.sink + self.local) / length:.1%} of a "
                f"context of {length} tokens, and density={self.density} leaves nothing to retrieve: choose a higher "
                "density or a smaller window"
            )

    def _limit(self, length: int) -> int | None:
        """Keys of the middle that a block may have."""
        if self.density is None or self.density == 1.0:
            return None
        return max(1, int(self.density * length) - self.sink - self.local)

    def index_layer(self, keys: ContextKeys) -> RetrievalIndex:
        """An index for each KV head; none where everything is asked for."""
        kv_heads, middle = keys.key.shape[:2]
        order = torch.arange(middle).expand(kv_heads, -1)
        limit = self._limit(middle + self.sink + self.local)
        if self.keys >= middle and limit is None:
            return RetrievalIndex(order, [], limit, middle, 1, keys.scale, keys.softcap)
        query = keys.query.unflatten(0, (kv_heads, -1)).flatten(1, 2)
        some = torch.linspace(0, query.shape[1] - 1, min(self.train, query.shape[1])).round().to(torch.int64)
        found = keys.once(
            ("indexes", self.index, self.links, self.train, self.seed), lambda: [
                build_index(
                    self.index, keys.key[head].contiguous(), query[head, some], links=self.links, seed=self.seed
                )
                for head in range(kv_heads)
            ]
        )  # fmt: skip
        return RetrievalIndex(order, found, limit, min(self.keys, middle), self._effort, keys.scale, keys.softcap)

    @property
    def _effort(self) -> int:
        return EFFORTS[self.index] if self.effort is None else self.effort

    def calibrate(self, indexes: Sequence[RetrievalIndex], length: int) -> None:
        """There is nothing to calibrate. Raises ValueError as `check_length`."""
        self.check_length(length)

    def load_index(
        self, order: Tensor, tensors: dict[str, Tensor], key: Tensor, scale: float, softcap: float | None
    ) -> RetrievalIndex:
        """What `RetrievalIndex.tensors` gave; `key` is float32 [kv_heads, middle, head_dim]."""
        kv_heads, middle = order.shape
        limit = self._limit(middle + self.sink + self.local)
        if self.keys >= middle and limit is None:
            return RetrievalIndex(order, [], limit, middle, 1, scale, softcap)
        found = []
        for head in range(kv_heads):
            own = {name.split(".", 1)[1]: each for name, each in tensors.items() if name.startswith(f"{head}.")}
            found.append(load_index(self.index, key[head].float(), own))
        return RetrievalIndex(order, found, limit, min(self.keys, middle), self._effort, scale, softcap)


@dataclass(frozen=True, slots=True, eq=False)
class RetrievalIndex:
    """Indexes of one layer; keys lie in the order of the tokens."""

    order: Tensor  # int64 [kv_heads, middle]
    indexes: list[KeyIndex]  # of each KV head; none: every query finds everything
    limit: int | None  # keys of a block at most
    keys: int  # of a query
    effort: int
    scale: float
    softcap: float | None

    def choose(self, query: Tensor, real: Tensor, queries: Tensor, edge_lse: Tensor) -> Tensor:
        """See `ContextIndex.choose`."""
        kv_heads, blocks, _, _ = query.shape
        middle = self.order.shape[1]
        query, real, edge_lse = query.cpu(), real.cpu(), edge_lse.cpu()  # where the indexes are
        marked = torch.zeros(kv_heads, blocks, middle, dtype=torch.bool)
        if not self.indexes:
            return ~marked
        block, row = real.nonzero(as_tuple=True)
        together = max(1, _PROMISES // (middle + 1))
        most = self.limit
        if most is None or int(real.sum(1).max()) * self.keys <= most or most >= middle:
            most = None
        for head, index in enumerate(self.indexes):
            found = index.search(query[head, block, row].float().contiguous(), self.keys, self.effort)
            if most is None:  # there is room for all of them, so that none has to be ranked
                there = found.ids >= 0
                marked[head][block[:, None].expand_as(there)[there], found.ids[there]] = True
                continue
            promise = found.scores * self.scale
            if self.softcap is not None:
                promise = self.softcap * torch.tanh(promise / self.softcap)
            promise = promise - edge_lse[head, block, row][:, None]
            place = torch.where(found.ids < 0, middle, found.ids)
            for start in range(0, blocks, together):
                some = (block >= start) & (block < start + together)
                number = min(together, blocks - start)
                marked[head, start : start + number] = _best(
                    number, middle, most, block[some] - start, place[some], promise[some]
                )
        return marked

    def to(self, device: torch.device) -> RetrievalIndex:
        """See `ContextIndex.to`: searches stay on the CPU."""
        return dataclasses.replace(self, order=self.order.to(device))

    @property
    def held_bytes(self) -> int:
        """Memory beside what `tensors` gives: the keys once more in float32, and what faiss makes of links."""
        return sum(index.held_bytes for index in self.indexes)

    def tensors(self) -> dict[str, Tensor]:
        """See `ContextIndex.tensors`."""
        return {
            f"{head}.{name}": each for head, index in enumerate(self.indexes) for name, each in index.tensors().items()
        }


def _best(blocks: int, middle: int, most: int, block: Tensor, place: Tensor, promise: Tensor) -> Tensor:
    """bool [blocks, middle]: what queries found, the `most` that promise most; place `middle` is for none."""
    best = torch.full((blocks, middle + 1), -torch.inf)
    flat = block[:, None] * (middle + 1) + place
    best.view(-1).scatter_reduce_(0, flat.flatten(), promise.flatten(), "amax")
    top = best[:, :middle].topk(most, -1)
    return torch.zeros(blocks, middle, dtype=torch.bool).scatter_(1, top.indices, top.values > -torch.inf)
