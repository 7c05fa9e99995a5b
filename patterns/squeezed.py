"""Squeezed: of a fixed context, the keys of clusters that the queries of a block are likely to look at.

Hooper et al., "Squeezed Attention: Accelerating Long Context Length LLM Inference", 2024, arXiv:2411.09688.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseprefill.estimators.key_clusters import BACKENDS, KeyClusters, cluster_keys
from sparseprefill.estimators.selection import check_share
from sparseprefill.kernels.shared_keys import key_lse
from sparseprefill.patterns.fixed_context import ContextKeys, check_edges, room_left

STEPS = (1, 2, 4, 8, 16, 32, 64)
"""Queries that share a choice, for which a threshold of its own is calibrated."""

_SCORES = 1 << 24  # of queries and clusters that are held at one time
_GROUPS = 16  # of held-out queries a step and layer


@dataclass(frozen=True, slots=True)
class Squeezed:
    """Keys of clusters whose estimated share passes one threshold, the same for all layers and heads.

    The keys between sink and local window are clustered by direction, for each KV head. What one key of a cluster gets
    of a query's attention is estimated with the cluster's mean in the place of its keys; sink and local window take
    their own part of it exactly. A block of queries takes the largest estimate of its queries and heads (`mean`: their
    mean), and chooses the clusters above the threshold. That is where the last `local` queries of the context, in
    groups, would have chosen `density` of it on average over all layers and heads: heads that look at few keys get few.
    Larger groups have a higher threshold, as the largest of more estimates is larger. Before that, each block gets its
    best clusters up to `even` of the budget, in each KV head: heads that look at many keys a little would go empty.

    With `coarse`, the means are clustered once more, and only clusters within a chosen coarse one are compared.

    `density` = 1.0 is dense attention. arXiv:2411.09688, where one choice serves all queries, made from the mean, and
    each head of a group has clusters of its own. Raises ValueError or TypeError for numbers that are none.
    """

    density: float = 0.15  # of the context's keys that are attended to, sink and local window included
    clusters: float = 0.05  # clusters over keys
    even: float = 0.5  # share of the budget that every KV head and block has for itself; the rest goes by threshold
    coarse: float | None = None  # coarse clusters over keys; None: a single level
    coarse_density: float = 0.6  # of the keys that lie in chosen coarse clusters
    sink: int = 64  # first tokens, attended to always
    local: int = 256  # last tokens, attended to always; their queries calibrate the threshold
    reduce: str = "max"  # over the queries and heads of a block: "max" or "mean"
    seed: int = 0  # of K-means
    backend: str = "auto"  # of K-means: "sklearn", "faiss", or by size

    def __post_init__(self) -> None:
        check_edges(self.sink, self.local)
        for name in ("density", "clusters", "coarse_density"):
            check_share(name, getattr(self, name))
        if isinstance(self.even, bool) or not isinstance(self.even, int | float) or not 0 <= self.even <= 1:
            raise ValueError(f"even is a share from 0 to 1, got {self.even!r:.80}")
        if self.coarse is not None:
            check_share("coarse", self.coarse)
            if self.coarse >= self.clusters:
                raise ValueError(f"coarse clusters must be fewer than clusters, got {self.coarse} and {self.clusters}")
        if self.reduce not in ("max", "mean"):
            raise ValueError(f"reduce is 'max' or 'mean', got {self.reduce!r:.80}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend is one of {', '.join(BACKENDS)}, got {self.backend!r:.80}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be a whole number from 0 to 2^32 - 1, got {self.seed!r:.80}")

    @property
    def everything(self) -> bool:
        """Whether nothing is left out."""
        return self.density == 1.0

    def check_length(self, length: int) -> None:
        """Raise ValueError where a context of this length cannot be served with this density."""
        middle = room_left(length, self.sink, self.local)
        if not self.everything and self.density * length <= self.sink + self.local:
            raise ValueError(
                f"sink ({self.sink}) and local window ({self.local}) are {(self.sink + self.local) / length:.1%} of a "
                f"context of {length} tokens, and density={self.density} leaves nothing for the {middle} keys between: "
                "choose a higher density or a smaller window"
            )

    def index_layer(self, keys: ContextKeys) -> SqueezedIndex:
        """Cluster the keys of a layer, and note what its held-out queries would see; thresholds come later."""
        if self.everything:
            order = torch.arange(keys.key.shape[1]).expand(keys.key.shape[0], -1)
            return SqueezedIndex(order, None, None, keys.scale, keys.softcap, self.reduce, 0.0)
        made = self.clusters, self.coarse, self.seed, self.backend
        order, clusters = keys.once(
            ("clusters", *made), lambda: cluster_keys(
                keys.key, self.clusters, self.coarse, seed=self.seed, backend=self.backend
            )
        )  # fmt: skip
        least = self._least(keys.key.shape[1])
        index = SqueezedIndex(order, clusters, None, keys.scale, keys.softcap, self.reduce, least)
        seen = keys.once(("held out", *made, self.reduce), lambda: self._held_out(keys, clusters))
        index.held_out.extend(seen)
        return index

    def _held_out(self, keys: ContextKeys, clusters: KeyClusters) -> list[tuple[Tensor, Tensor | None]]:
        """For each step: estimates [kv_heads, groups, clusters] of groups of that many held-out queries, coarse too."""
        kv_heads, group = keys.key.shape[0], keys.group_size
        query = keys.held_out.unflatten(0, (kv_heads, group))  # [kv_heads, group, tokens, head_dim]
        edge_lse = key_lse(query.flatten(1, 2), keys.edge, keys.scale, keys.softcap)
        given = query.flatten(1, 2), keys.scale, keys.softcap, edge_lse
        fine = clusters.log_shares(*given).unflatten(1, query.shape[1:3])
        coarse = None
        if clusters.coarse is not None:
            coarse = clusters.coarse_log_shares(*given)[0].unflatten(1, query.shape[1:3])
        found = []
        for step in STEPS:
            groups = query.shape[2] // step
            if not groups:
                break
            chosen = torch.linspace(0, groups - 1, min(groups, _GROUPS)).round().to(torch.int64)

            def grouped(shares: Tensor, step: int = step, groups: int = groups, chosen: Tensor = chosen) -> Tensor:
                parts = shares[:, :, : groups * step].unflatten(2, (groups, step))[:, :, chosen]
                return reduced(parts.transpose(1, 2).flatten(2, 3), 2, self.reduce)

            found.append((grouped(fine), None if coarse is None else grouped(coarse)))
        return found

    def _share(self, middle: int) -> float:
        """Of the keys between sink and local window, what the density leaves."""
        edges = self.sink + self.local
        return max(0.0, (self.density * (middle + edges) - edges) / middle)

    def _least(self, middle: int) -> float:
        """The share of them that every block gets."""
        return self.even * self._share(middle)

    def calibrate(self, indexes: Sequence[SqueezedIndex], length: int) -> None:
        """Set the thresholds of all layers' indexes, and drop what they were made from.

        Raises ValueError as `check_length`.
        """
        self.check_length(length)
        if self.everything:
            return
        middle = length - self.sink - self.local
        share, least = self._share(middle), self._least(middle)
        levels = []
        for step in range(len(indexes[0].held_out)):
            scored = [(_sure(i.held_out[step][0], i.fine.size, least), i.fine.size) for i in indexes]
            fine = _threshold(scored, share)
            coarse = -math.inf
            if self.coarse is not None:
                wider = max(share, min(1.0, self.coarse_density))
                coarse = _threshold([(i.held_out[step][1], i.fine.coarse_size) for i in indexes], wider)
                inside = (_within(i, step, coarse) for i in indexes)
                fine = _threshold([(_sure(scores, size, least), size) for scores, size in inside], share)
            levels.append((fine, coarse))
        for index in indexes:
            index.thresholds = torch.tensor(levels, dtype=torch.float32).T.contiguous()
            index.held_out.clear()

    def load_index(
        self, order: Tensor, tensors: dict[str, Tensor], key: Tensor, scale: float, softcap: float | None
    ) -> SqueezedIndex:
        """What `SqueezedIndex.tensors` gave."""
        tensors = dict(tensors)
        thresholds = tensors.pop("thresholds", None)
        clusters = KeyClusters(**tensors) if tensors else None
        least = 0.0 if clusters is None else self._least(order.shape[1])
        return SqueezedIndex(order, clusters, thresholds, scale, softcap, self.reduce, least)


@dataclass(slots=True, eq=False)
class SqueezedIndex:
    """Clusters of one layer; keys of the middle lie cluster after cluster."""

    order: Tensor  # int64 [kv_heads, middle]
    clusters: KeyClusters | None  # None: everything is chosen
    thresholds: Tensor | None  # float32 [2, steps]: of clusters and of coarse ones, for as many queries as `STEPS` say
    scale: float
    softcap: float | None
    reduce: str
    least: float  # share of the middle that every block gets
    held_out: list[tuple[Tensor, Tensor | None]]  # until the thresholds are there
    owner: Tensor | None  # int64 [kv_heads, middle]: the cluster of each key, in the order they lie in

    def __init__(
        self, order: Tensor, clusters: KeyClusters | None, thresholds: Tensor | None, scale: float,
        softcap: float | None, reduce: str, least: float,
    ) -> None:  # fmt: skip
        self.order, self.clusters, self.thresholds = order, clusters, thresholds
        self.scale, self.softcap, self.reduce, self.least = scale, softcap, reduce, least
        self.held_out = []
        self.owner = None if clusters is None else clusters.owner()

    @property
    def fine(self) -> KeyClusters:
        """The clusters, where there are any."""
        assert self.clusters is not None
        return self.clusters

    def choose(self, query: Tensor, real: Tensor, queries: Tensor, edge_lse: Tensor) -> Tensor:
        """See `ContextIndex.choose`. Raises RuntimeError before `calibrate`."""
        kv_heads, blocks, rows, _ = query.shape
        if self.clusters is None:
            return torch.ones(kv_heads, blocks, self.order.shape[1], dtype=torch.bool, device=query.device)
        if self.thresholds is None:
            raise RuntimeError("the thresholds of this index were not calibrated yet")
        together = max(1, _SCORES // (kv_heads * rows * self.clusters.size.shape[1]))
        parts = [
            self._marked(*each)
            for each in zip(
                query.split(together, 1), real.split(together), queries.split(together), edge_lse.split(together, 1),
                strict=True,
            )
        ]  # fmt: skip
        return self._keys_of(torch.cat(parts, 1))

    def _marked(self, query: Tensor, real: Tensor, queries: Tensor, edge_lse: Tensor) -> Tensor:
        """bool [kv_heads, blocks, clusters] of some blocks."""
        assert self.clusters is not None
        assert self.thresholds is not None
        kv_heads, blocks = query.shape[:2]
        steps = torch.tensor(STEPS[: self.thresholds.shape[1]], device=query.device)
        step = torch.searchsorted(steps, queries).clamp(max=len(steps) - 1)
        fine, coarse = self.thresholds[0][step], self.thresholds[1][step]  # [blocks]
        given = query.flatten(1, 2), self.scale, self.softcap, edge_lse.flatten(1)
        if self.clusters.coarse is None:
            scores = self._of_blocks(self.clusters.log_shares(*given), real)
            return _sure(scores, self.clusters.size, self.least) > fine[:, None]
        shares, total = self.clusters.coarse_log_shares(*given)
        wide, total = self._of_blocks(shares, real) > coarse[:, None], total.view(edge_lse.shape)
        assert self.clusters.parent is not None
        near = wide.gather(2, self.clusters.parent[:, None].expand(-1, blocks, -1)) & (self.clusters.size > 0)[:, None]
        scores = torch.full(near.shape, -torch.inf, device=query.device)
        for head in range(kv_heads):
            for block in range(blocks):
                ids = near[head, block].nonzero()[:, 0]
                place = head, ids, query[head, block], total[head, block]
                own = self.clusters.some_log_shares(*place, self.scale, self.softcap)
                scores[head, block, ids] = self._of_blocks(own[None], real[block][None])[0, 0]
        return _sure(scores, self.clusters.size, self.least) > fine[:, None]

    def _keys_of(self, marked: Tensor) -> Tensor:
        """bool [kv_heads, blocks, middle] from bool [kv_heads, blocks, clusters]."""
        assert self.owner is not None
        return marked.gather(2, self.owner[:, None].expand(-1, marked.shape[1], -1))

    def _of_blocks(self, shares: Tensor, real: Tensor) -> Tensor:
        """[kv_heads, blocks, clusters] from [kv_heads, blocks * rows, clusters], padding left out."""
        apart: Tensor = shares.unflatten(1, real.shape).masked_fill(~real[..., None], -torch.inf)
        if self.reduce == "max":
            return apart.amax(2)
        return apart.logsumexp(2) - real.sum(1).clamp(min=1).log()[:, None]

    def to(self, device: torch.device) -> SqueezedIndex:
        """See `ContextIndex.to`."""
        clusters = None if self.clusters is None else self.clusters.to(device)
        thresholds = None if self.thresholds is None else self.thresholds.to(device)
        return SqueezedIndex(
            self.order.to(device), clusters, thresholds, self.scale, self.softcap, self.reduce, self.least
        )

    def tensors(self) -> dict[str, Tensor]:
        """See `ContextIndex.tensors`."""
        if self.clusters is None or self.thresholds is None:
            return {}
        return {**self.clusters.tensors(), "thresholds": self.thresholds}


def reduced(log_shares: Tensor, dim: int, how: str) -> Tensor:
    """The largest of a dimension, or the logarithm of the mean."""
    if how == "max":
        return log_shares.amax(dim)
    return log_shares.logsumexp(dim) - math.log(log_shares.shape[dim])


def _sure(scores: Tensor, size: Tensor, least: float) -> Tensor:
    """Estimates [kv_heads, groups, clusters], inf for the best clusters of each group that hold `least` of the keys."""
    if not least:
        return scores
    ranked, order = scores.sort(descending=True, dim=-1, stable=True)
    held = size[:, None].expand_as(scores).gather(-1, order).double().cumsum(-1)
    sure = (held <= least * held[..., -1:]) & (ranked > -torch.inf)
    return torch.empty_like(scores).scatter_(-1, order, ranked.masked_fill(sure, torch.inf))


def _threshold(scored: Sequence[tuple[Any, Tensor]], share: float) -> float:
    """Where clusters above it hold at most `share` of all keys: estimates [kv_heads, groups, clusters], sizes."""
    score = torch.cat([scores.flatten() for scores, _ in scored])
    weight = torch.cat([size[:, None].expand_as(scores).flatten() for scores, size in scored]).double()
    score, order = score.sort(descending=True, stable=True)
    held = weight[order].cumsum(0)
    beyond = (held > share * held[-1]).nonzero()
    return float(score[beyond[0, 0]]) if len(beyond) else -math.inf


def _within(index: SqueezedIndex, step: int, coarse: float) -> tuple[Tensor, Tensor]:
    """Estimates of clusters, those left out whose coarse cluster was not chosen."""
    fine, wide = index.held_out[step]
    assert wide is not None
    assert index.fine.parent is not None
    parent = index.fine.parent[:, None].expand(-1, fine.shape[1], -1)
    return fine.masked_fill(~(wide > coarse).gather(2, parent), -torch.inf), index.fine.size
