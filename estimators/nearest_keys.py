"""Nearest keys by inner product: indexes over the keys of a fixed context, one for each KV head.

Liu et al., "RetrievalAttention", 2024, arXiv:2409.10516: queries and keys of attention are distributed differently, so
that an index that knows keys alone must scan many of them for what a query wants; one that was built with the queries
of the prefill needs few. No code of it was published.

`flat` looks at every key: the exact answer. `ivf` and `hnsw` are faiss's, over keys alone. `cells` and `graph` know
queries: see there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sparseprefill.estimators.key_clusters import spherical_kmeans

_HOSTS = 32  # nearest reached keys that one which is not may hang on
_GATHERED = 1 << 24  # numbers of candidates that are gathered at one time

KINDS = ("flat", "ivf", "hnsw", "cells", "graph")


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What a search found."""

    ids: Tensor  # int64 [queries, k], -1 where fewer keys were looked at; best first
    scores: Tensor  # float32 [queries, k] inner products, -inf there
    scanned: (
        Tensor  # int64 [queries]: inner products computed, those with centroids included; -1: see `scanned_by_hnsw`
    )


class KeyIndex(Protocol):
    """An index over the keys of one KV head. A search never needs more than the index and the query."""

    @property
    def key(self) -> Tensor:
        """float32 [keys, head_dim]."""
        ...

    def search(self, query: Tensor, k: int, effort: int) -> Found:
        """The best `k` keys for each query, float32 [queries, head_dim].

        `effort` is how far it looks: cells that are visited, or nodes that are kept in sight; flat has no use for it.
        """
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What a file has to hold beside the keys themselves."""
        ...


def build_index(
    kind: str, key: Tensor, query: Tensor | None, *, links: int = 128, degree: int = 32, seed: int = 0
) -> KeyIndex:
    """An index over keys of one KV head.

    Args:
        kind: one of `KINDS`.
        key: float32 [keys, head_dim].
        query: float32 [queries, head_dim], of the prefill, for the kinds that learn from queries.
        links: nearest keys of each such query that are learnt from.
        degree: of the graphs.
        seed: of K-means.

    Raises:
        ValueError: unknown kinds, and queries that are missing.
        ModuleNotFoundError: faiss is not installed.
    """
    if kind not in KINDS:
        raise ValueError(f"an index of keys is one of {', '.join(KINDS)}, got {kind!r}")
    if kind in ("cells", "graph"):
        if query is None or not len(query):
            raise ValueError(f"an index of kind {kind!r} is built with queries of the prefill, and there are none")
        nearest = nearest_of(query, key, min(links, len(key)))
        if kind == "cells":
            return QueryCells.of(key, query, nearest, seed=seed)
        return ProjectedGraph.of(key, nearest, degree)
    return FaissKeys.of(kind, key, degree)


def load_index(kind: str, key: Tensor, tensors: dict[str, Tensor]) -> KeyIndex:
    """What `tensors()` of an index of this kind gave, over the same keys."""
    if kind == "cells":
        return QueryCells(key, **tensors)
    if kind == "graph":
        return ProjectedGraph(key, **tensors)
    return FaissKeys.load(kind, key, tensors["faiss"])


def nearest_of(query: Tensor, key: Tensor, k: int, *, slab: int = 1024) -> Tensor:
    """int64 [queries, k]: the keys with the largest inner products, best first."""
    return torch.cat([(part @ key.T).topk(k, -1).indices for part in query.split(slab)])


def _ranked(query: Tensor, key: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best k of each query's candidates, int64 [queries, some], -1 for none: ids and inner products."""
    scores = torch.einsum("nd,ncd->nc", query, key[candidates.clamp(min=0)])
    scores = scores.masked_fill(candidates < 0, -torch.inf)
    if candidates.shape[1] < k:
        more = k - candidates.shape[1]
        scores = torch.nn.functional.pad(scores, (0, more), value=-torch.inf)
        candidates = torch.nn.functional.pad(candidates, (0, more), value=-1)
    best = scores.topk(k, -1)
    return candidates.gather(1, best.indices).masked_fill(best.values == -torch.inf, -1), best.values


@dataclass(frozen=True, slots=True, eq=False)
class QueryCells:
    """Coarse cells that were trained on queries: each lists the keys that its queries wanted.

    Queries of the prefill are clustered by direction; a cell holds every key that is among the nearest of one of its
    queries. A search visits the cells whose centroids are nearest to the query, and ranks their keys exactly. Keys that
    no query wanted lie in no cell.
    """

    key: Tensor  # float32 [keys, head_dim]
    centroid: Tensor  # float32 [cells, head_dim], of length 1
    members: Tensor  # int32, cell after cell, ascending in each
    start: Tensor  # int64 [cells + 1]

    @staticmethod
    def of(key: Tensor, query: Tensor, nearest: Tensor, *, queries_a_cell: int = 32, seed: int = 0) -> QueryCells:
        """From queries and their nearest keys, int64 [queries, links]."""
        label = spherical_kmeans(query, max(1, len(query) // queries_a_cell), seed=seed)
        cells = int(label.max()) + 1
        unit = torch.nn.functional.normalize(query, dim=-1)
        total = torch.zeros(cells, key.shape[1]).index_add_(0, label, unit)
        pair = (label[:, None] * len(key) + nearest).unique()  # sorted, so cell after cell
        start = torch.searchsorted(pair, torch.arange(cells + 1) * len(key))
        return QueryCells(key, torch.nn.functional.normalize(total, dim=-1), (pair % len(key)).to(torch.int32), start)

    def search(self, query: Tensor, k: int, effort: int) -> Found:
        visited = (query @ self.centroid.T).topk(min(effort, len(self.centroid)), -1).indices
        candidates = []
        for cells in visited:
            parts = [self.members[self.start[c] : self.start[c + 1]] for c in cells.tolist()]
            candidates.append(torch.cat(parts).unique())
        scanned = torch.tensor([len(each) for each in candidates])
        together = max(1, _GATHERED // (max(1, int(scanned.max())) * self.key.shape[1]))
        found = []
        for start in range(0, len(query), together):
            some = slice(start, start + together)
            padded = torch.nn.utils.rnn.pad_sequence(candidates[some], batch_first=True, padding_value=-1)
            found.append(_ranked(query[some], self.key, padded.to(torch.int64), k))
        ids, scores = (torch.cat(each) for each in zip(*found, strict=True))
        return Found(ids, scores, scanned + len(self.centroid))

    def tensors(self) -> dict[str, Tensor]:
        return {"centroid": self.centroid, "members": self.members, "start": self.start}


@dataclass(frozen=True, slots=True, eq=False)
class ProjectedGraph:
    """A graph of keys, two of which are linked where some query wanted both; searched by best first.

    For each query of the prefill its nearest key is linked to its other near ones, as far as none that is linked
    already lies between (the occlusion rule), up to `degree`. Keys that no search from the entry would reach are linked
    to the nearest key that one does. After Chen et al., "RoarGraph", 2024, arXiv:2408.08933, whose queries stand in the
    graph while it is built and are projected away.
    """

    key: Tensor  # float32 [keys, head_dim]
    neighbours: Tensor  # int32 [keys, most], -1 for none
    entry: Tensor  # int64 [some]: where every search begins

    @staticmethod
    def of(key: Tensor, nearest: Tensor, degree: int) -> ProjectedGraph:
        """From the nearest keys of queries, int64 [queries, links], best first."""
        keys = len(key)
        wanted: list[list[int]] = [[] for _ in range(keys)]
        for row in nearest.tolist():
            wanted[row[0]].extend(row[1:])
        linked: list[list[int]] = [[] for _ in range(keys)]
        for pivot, others in enumerate(wanted):
            if others:
                linked[pivot] = _not_occluded(key, pivot, list(dict.fromkeys(others)), degree)
        for pivot, others in enumerate(list(map(list, linked))):
            for other in others:  # and back, as far as there is room
                if len(linked[other]) < 2 * degree and pivot not in linked[other]:
                    linked[other].append(pivot)
        popular = torch.bincount(nearest[:, 0], minlength=keys)
        entry = popular.topk(min(8, keys)).indices
        _connect(key, linked, entry.tolist(), 3 * degree)
        most = max(map(len, linked), default=1)
        table = np.full((keys, max(1, most)), -1, dtype=np.int32)
        for row, others in zip(table, linked, strict=True):
            row[: len(others)] = others
        return ProjectedGraph(key, torch.from_numpy(table), entry)

    def search(self, query: Tensor, k: int, effort: int) -> Found:
        """All queries walk together, each with `effort` keys in sight: its best unvisited one is opened next."""
        width, number = max(effort, k), len(query)
        seen = torch.zeros(number, len(self.key) + 1, dtype=torch.bool)
        seen[:, -1] = True  # where -1 points to
        ids = torch.full((number, width), -1)
        scores = torch.full((number, width), -torch.inf)
        opened = torch.zeros(number, width, dtype=torch.bool)
        scanned = torch.zeros(number, dtype=torch.int64)
        fresh = self.entry.expand(number, -1)
        while True:
            new = ~seen.gather(1, fresh)
            seen.scatter_(1, fresh, True)
            scanned += new.sum(1)
            found = torch.einsum("nd,ncd->nc", query, self.key[fresh.clamp(0, len(self.key) - 1)]).masked_fill(
                ~new, -torch.inf
            )
            best = torch.cat([scores, found], 1).topk(width, 1)
            ids = torch.cat([ids, fresh], 1).gather(1, best.indices)
            opened = torch.cat([opened, torch.zeros_like(new)], 1).gather(1, best.indices)
            scores = best.values
            waiting = scores.masked_fill(opened, -torch.inf)
            score, place = waiting.max(1)
            alive = score > -torch.inf
            if not bool(alive.any()):
                return Found(ids[:, :k].masked_fill(scores[:, :k] == -torch.inf, -1), scores[:, :k], scanned)
            opened[torch.arange(number), place] = True
            node = ids[torch.arange(number), place].clamp(min=0)
            fresh = self.neighbours[node].to(torch.int64).masked_fill(~alive[:, None], -1)
            fresh = torch.where(fresh < 0, len(self.key), fresh)  # the place that is always seen

    def tensors(self) -> dict[str, Tensor]:
        return {"neighbours": self.neighbours, "entry": self.entry}


def _not_occluded(key: Tensor, pivot: int, others: list[int], degree: int) -> list[int]:
    """Of the others, nearest to the pivot first, those that are nearer to it than to any that was taken before."""
    ids = torch.tensor(others)
    points = key[ids]
    distance = (points - key[pivot]).norm(dim=-1)
    order = distance.argsort(stable=True)[: 4 * degree]
    points, ids, distance = points[order], ids[order], distance[order]
    between = torch.cdist(points, points)
    taken: list[int] = []
    for place in range(len(ids)):
        if len(taken) == degree:
            break
        if not taken or bool((distance[place] < between[place, taken]).all()):
            taken.append(place)
    left = [place for place in range(len(ids)) if place not in set(taken)]
    return ids[taken + left[: degree - len(taken)]].tolist()  # what is left fills the room, nearest first


def _connect(key: Tensor, linked: list[list[int]], entry: list[int], room: int) -> None:
    """Link what cannot be reached from the entry to a near key that can; none has more links than there is room."""
    reached = np.zeros(len(linked), dtype=bool)

    def walk(first: list[int]) -> None:
        waiting = [each for each in first if not reached[each]]
        reached[waiting] = True
        while waiting:
            for other in linked[waiting.pop()]:
                if not reached[other]:
                    reached[other] = True
                    waiting.append(other)

    walk(entry)
    lost = np.flatnonzero(~reached)
    if not len(lost):
        return
    there = torch.from_numpy(np.flatnonzero(reached))
    hosts = there[nearest_of(key[torch.from_numpy(lost)], key[there], min(_HOSTS, len(there)))].tolist()
    for node, near in zip(lost.tolist(), hosts, strict=True):
        if not reached[node]:
            # a key that is long is near to many: where it is full, the next one on the way takes the node
            host = next((each for each in near if len(linked[each]) < room), near[0])
            while len(linked[host]) >= room:
                host = linked[host][-1]
            linked[host].append(node)
            walk([node])


@dataclass(frozen=True, slots=True, eq=False)
class FaissKeys:
    """faiss over keys alone, by inner product: exact (`flat`), inverted lists (`ivf`), a small-world graph (`hnsw`)."""

    kind: str
    key: Tensor  # float32 [keys, head_dim]
    index: Any  # of faiss

    @staticmethod
    def of(kind: str, key: Tensor, degree: int) -> FaissKeys:
        """Build it. The number of lists is 4 times the root of the number of keys, as faiss's own guide has it."""
        faiss = _faiss()
        keys, dim = key.shape
        made: Any
        if kind == "ivf":
            lists = max(1, min(round(4 * math.sqrt(keys)), keys))
            made = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)
            made.cp.min_points_per_centroid = 1
            made.train(key.numpy())
        elif kind == "hnsw":
            made = faiss.IndexHNSWFlat(dim, degree, faiss.METRIC_INNER_PRODUCT)
        else:
            made = faiss.IndexFlatIP(dim)
        made.add(key.numpy())
        return FaissKeys(kind, key, made)

    @staticmethod
    def load(kind: str, key: Tensor, data: Tensor) -> FaissKeys:
        """From what `tensors` gave. Raises ValueError for bytes that faiss cannot read."""
        faiss = _faiss()
        try:
            made = faiss.deserialize_index(data.numpy())
        except RuntimeError as error:
            raise ValueError(f"an index of faiss is damaged: {str(error)[:200]}") from error
        return FaissKeys(kind, key, made)

    def search(self, query: Tensor, k: int, effort: int) -> Found:
        faiss = _faiss()
        keys = len(self.key)
        if self.kind == "ivf":
            lists = min(effort, self.index.nlist)
            scores, ids = self.index.search(query.numpy(), k, params=faiss.SearchParametersIVF(nprobe=lists))
            visited = self.index.quantizer.search(query.numpy(), lists)[1]
            sizes = np.array([self.index.invlists.list_size(each) for each in range(self.index.nlist)])
            scanned = torch.from_numpy(np.where(visited >= 0, sizes[visited], 0).sum(1)) + self.index.nlist
        elif self.kind == "hnsw":
            parameters = faiss.SearchParametersHNSW(efSearch=max(effort, k))
            scores, ids = self.index.search(query.numpy(), k, params=parameters)
            scanned = torch.full((len(query),), -1)
        else:
            scores, ids = self.index.search(query.numpy(), k)
            scanned = torch.full((len(query),), keys)
        found = torch.from_numpy(ids)
        return Found(found, torch.from_numpy(scores).masked_fill(found < 0, -torch.inf), scanned)

    def tensors(self) -> dict[str, Tensor]:
        return {"faiss": torch.from_numpy(_faiss().serialize_index(self.index))}


def scanned_by_hnsw(index: FaissKeys, query: Tensor, k: int, effort: int) -> Tensor:
    """int64 [queries]: inner products of each search. faiss counts for the whole process: ask for it in one thread."""
    faiss = _faiss()
    parameters = faiss.SearchParametersHNSW(efSearch=max(effort, k))
    counts = []
    for one in query.numpy():
        faiss.cvar.hnsw_stats.reset()
        index.index.search(one[None], k, params=parameters)
        counts.append(int(faiss.cvar.hnsw_stats.ndis))
    return torch.tensor(counts)


def _faiss() -> Any:
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "this index needs faiss, which is not installed: pip install 'sparseprefill[estimators]'"
        ) from error
    return faiss
