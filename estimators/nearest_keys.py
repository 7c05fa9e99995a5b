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
_SCORES = 1 << 24  # of queries and keys that are held at one time
_EXACT = 1 << 15  # keys that are compared with each other; what more of them would find is searched for
_CONSTRUCTION = 200  # keys that HNSW keeps in sight while it is built; faiss has 40
_DISTANCES = 1 << 22  # between keys, that are held at one time

KINDS = ("flat", "ivf", "hnsw", "cells", "graph")


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What a search found."""

    ids: Tensor  # int64 [queries, k], -1 where fewer keys were looked at; best first
    scores: Tensor  # float32 [queries, k] inner products, -inf there
    scanned: Tensor  # int64 [queries]: keys considered, and centroids looked at; -1: see `scanned_by_walk`


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

    @property
    def held_bytes(self) -> int:
        """Memory beside what `tensors` gives."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What a file has to hold beside the keys themselves."""
        ...


def build_index(
    kind: str, key: Tensor, query: Tensor | None, *, links: int = 128, degree: int = 16, seed: int = 0
) -> KeyIndex:
    """An index over keys of one KV head.

    Args:
        kind: one of `KINDS`.
        key: float32 [keys, head_dim].
        query: float32 [queries, head_dim], of the prefill, for the kinds that learn from queries.
        links: nearest keys of each such query that are learnt from.
        degree: of the graphs, at least 2.
        seed: of K-means.

    Raises:
        ValueError: unknown kinds, numbers that are none, queries that are missing, keys or queries that are not finite.
        ModuleNotFoundError: faiss is not installed.
    """
    if kind not in KINDS:
        raise ValueError(f"an index of keys is one of {', '.join(KINDS)}, got {kind!r}")
    if degree < 2 or links < 1:
        raise ValueError(f"a graph has at least 2 links a key, and a query 1, got degree={degree} and links={links}")
    if not len(key) or not bool(key.isfinite().all()) or (query is not None and not bool(query.isfinite().all())):
        raise ValueError("an index needs keys, and they and its queries must be finite")
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
        return ProjectedGraph.load(key, **tensors)
    return FaissKeys.load(kind, key, tensors["faiss"])


def nearest_of(query: Tensor, key: Tensor, k: int) -> Tensor:
    """int64 [queries, k]: the keys with the largest inner products, best first."""
    together = max(1, _SCORES // max(1, len(key)))
    return torch.cat([(part @ key.T).topk(k, -1).indices for part in query.split(together)])


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
        together = max(1, _SCORES // max(1, len(self.key)))
        parts = [self._search(some, k, effort) for some in query.split(together)]
        return Found(*(torch.cat(each) for each in zip(*parts, strict=True)))

    def _search(self, query: Tensor, k: int, effort: int) -> tuple[Tensor, Tensor, Tensor]:
        """All queries are compared with every key that one of them considers, and ranked by their own alone."""
        keys = len(self.key)
        visited = (query @ self.centroid.T).topk(min(effort, len(self.centroid)), -1).indices
        cells, place = visited.unique(return_inverse=True)
        start, count = self.start[cells], self.start[cells + 1] - self.start[cells]
        owner = torch.arange(len(cells)).repeat_interleave(count)
        at = torch.arange(len(owner)) + (start - (count.cumsum(0) - count)).repeat_interleave(count)
        held = torch.zeros(len(cells), keys, dtype=torch.bool)
        held.view(-1)[owner * keys + self.members[at]] = True
        considered = held[place[:, 0]]
        for column in place.T[1:]:
            considered |= held[column]
        some = considered.any(0).nonzero()[:, 0]
        considered = considered[:, some]
        scores = (query @ self.key[some].T).masked_fill_(~considered, -torch.inf)
        best = scores.topk(min(k, len(some)), -1)
        missing = k - best.values.shape[1]
        found = torch.nn.functional.pad(best.values, (0, missing), value=-torch.inf)
        ids = torch.nn.functional.pad(some[best.indices], (0, missing), value=-1)
        return ids.masked_fill(found == -torch.inf, -1), found, considered.sum(1) + len(self.centroid)

    @property
    def held_bytes(self) -> int:
        return 4 * self.key.numel()

    def tensors(self) -> dict[str, Tensor]:
        return {"centroid": self.centroid, "members": self.members, "start": self.start}


@dataclass(frozen=True, slots=True, eq=False)
class ProjectedGraph:
    """A graph of keys, two of which are linked where some query wanted both; searched by best first.

    For each query of the prefill its nearest key is linked to its other near ones, as far as none that is linked
    already lies between (the occlusion rule), up to `degree`. Queries want few of the keys, so that every key is also
    linked to half as many of the keys that it would itself find as a query. Keys that no search from the entry would
    reach are linked to the nearest key that one does. After Chen et al., "RoarGraph", 2024, arXiv:2408.08933, whose
    queries stand in the graph while it is built and are projected away, and whose own links between keys come from
    searches in what is there; here they are exact, or from a small-world graph where keys are many.
    """

    key: Tensor  # float32 [keys, head_dim]
    neighbours: Tensor  # int32 [keys, most], -1 for none
    entry: Tensor  # int64 []: where every search begins
    index: Any  # of faiss, which walks

    @staticmethod
    def of(key: Tensor, nearest: Tensor, degree: int) -> ProjectedGraph:
        """From the nearest keys of queries, int64 [queries, links], best first."""
        keys = len(key)
        wanted: dict[int, dict[int, None]] = {}
        for pivot, *others in nearest.tolist():
            wanted.setdefault(pivot, {}).update(dict.fromkeys(others))
        linked: list[dict[int, None]] = [{} for _ in range(keys)]
        pivots = torch.tensor(list(wanted))
        by_queries = torch.nn.utils.rnn.pad_sequence(
            [
                _nearest_first(key, pivot, torch.tensor(list(others), dtype=torch.int64))[: 4 * degree]
                for pivot, others in wanted.items()
            ],
            batch_first=True, padding_value=-1,
        )  # fmt: skip
        own = max(1, degree // 2)
        by_keys = _neighbours(key, min(4 * own, keys), degree)
        for some, near, most in ((pivots, by_queries, degree), (torch.arange(keys), by_keys, own)):
            for pivot, chosen in zip(some.tolist(), _not_occluded(key, some, near, most), strict=True):
                linked[pivot].update(dict.fromkeys(chosen))
        for pivot, others in enumerate(list(map(list, linked))):
            for other in others:  # and back, as far as there is room
                if len(linked[other]) < 2 * degree:
                    linked[other][pivot] = None
        entry = torch.bincount(nearest[:, 0], minlength=keys).argmax()  # what most queries want first
        lists = list(map(list, linked))
        _connect(key, lists, [int(entry)], 3 * degree)
        most = max(map(len, lists), default=1)
        table = np.full((keys, max(1, most)), -1, dtype=np.int32)
        for row, links in zip(table, lists, strict=True):
            row[: len(links)] = links
        return ProjectedGraph.load(key, torch.from_numpy(table), entry)

    @staticmethod
    def load(key: Tensor, neighbours: Tensor, entry: Tensor) -> ProjectedGraph:
        """From what `tensors` gave. Raises ValueError for links to keys that do not exist."""
        keys, dim = key.shape
        if len(neighbours) != keys or not (-1 <= int(neighbours.min()) <= int(neighbours.max()) < keys):
            raise ValueError(f"a graph of {keys} keys is damaged: it links to others")
        if not 0 <= int(entry) < keys:
            raise ValueError(f"a graph of {keys} keys is damaged: searches begin at {int(entry)}")
        faiss = _faiss()
        # a small-world graph of one level, whose links are these
        half = max(2, -(-neighbours.shape[1] // 2))  # faiss cannot do with one
        made = faiss.IndexHNSWFlat(dim, half, faiss.METRIC_INNER_PRODUCT)
        faiss.downcast_index(made.storage).add(key.numpy())
        made.ntotal = keys
        faiss.copy_array_to_vector(np.ones(keys, dtype=np.int32), made.hnsw.levels)
        made.hnsw.prepare_level_tab(keys, True)
        if made.hnsw.nb_neighbors(0) != 2 * half or made.hnsw.neighbors.size() != keys * 2 * half:
            raise RuntimeError(
                f"this version of faiss ({faiss.__version__}) lays its graphs out in another way: use index='cells' or "
                "'hnsw', and please report it"
            )
        links = faiss.rev_swig_ptr(made.hnsw.neighbors.data(), keys * 2 * half).reshape(keys, 2 * half)
        links[:] = -1
        links[:, : neighbours.shape[1]] = neighbours.numpy()
        made.hnsw.entry_point, made.hnsw.max_level = int(entry), 0
        return ProjectedGraph(key, neighbours, entry, made)

    def search(self, query: Tensor, k: int, effort: int) -> Found:
        parameters = _faiss().SearchParametersHNSW(efSearch=max(effort, k))
        scores, ids = self.index.search(query.numpy(), k, params=parameters)
        return _found(scores, ids, torch.full((len(query),), -1))

    @property
    def held_bytes(self) -> int:
        """The keys twice, as faiss has them too, and links, levels and offsets of faiss."""
        return 8 * self.key.numel() + 4 * int(self.index.hnsw.neighbors.size()) + 12 * len(self.key)

    def tensors(self) -> dict[str, Tensor]:
        return {"neighbours": self.neighbours, "entry": self.entry}


def _neighbours(key: Tensor, k: int, degree: int) -> Tensor:
    """int64 [keys, k]: what each key would find as a query, -1 for none; not exact where keys are many."""
    if len(key) <= _EXACT:
        return nearest_of(key, key, k)
    return FaissKeys.of("hnsw", key, degree).search(key, k, 2 * k).ids


def _nearest_first(key: Tensor, pivot: int, others: Tensor) -> Tensor:
    """The others by their distance from the pivot, without itself."""
    others = others[others != pivot]
    return others[(key[others] - key[pivot]).norm(dim=-1).argsort(stable=True)]


def _not_occluded(key: Tensor, pivots: Tensor, others: Tensor, degree: int) -> list[list[int]]:
    """Of each pivot's others [pivots, some] those that are nearer to it than to any nearer one that was taken.

    -1 is none, as is the pivot itself. What room is left of `degree` is filled with the rest, nearest first.
    """
    found = []
    for some in torch.arange(len(pivots)).split(max(1, _DISTANCES // max(1, others.shape[1]) ** 2)):
        pivot, ids = pivots[some], others[some]
        none = (ids < 0) | (ids == pivot[:, None])
        apart = (key[ids.clamp(min=0)] - key[pivot][:, None]).norm(dim=-1).masked_fill(none, torch.inf)
        apart, order = apart.sort(dim=1, stable=True)
        ids = ids.gather(1, order)
        points = key[ids.clamp(min=0)]
        between = torch.cdist(points, points)
        nearest = torch.full_like(apart, torch.inf)  # of those that were taken, how far the nearest one is
        taken = torch.zeros_like(ids, dtype=torch.bool)
        for place in range(ids.shape[1]):
            take = (apart[:, place] < nearest[:, place]) & (taken.sum(1) < degree)
            taken[:, place] = take
            nearest = torch.where(take[:, None], nearest.minimum(between[:, place]), nearest)
        first = (~taken).to(torch.int8).argsort(dim=1, stable=True)[:, :degree]
        chosen = ids.gather(1, first).masked_fill(apart.gather(1, first) == torch.inf, -1)
        found += [[each for each in row if each >= 0] for row in chosen.tolist()]
    return found


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
    sizes: np.ndarray  # of the lists of "ivf"

    @staticmethod
    def around(kind: str, key: Tensor, index: Any) -> FaissKeys:
        """With the sizes of its lists."""
        lists = range(index.nlist) if kind == "ivf" else ()
        return FaissKeys(kind, key, index, np.array([index.invlists.list_size(each) for each in lists], dtype=np.int64))

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
            made.hnsw.efConstruction = _CONSTRUCTION
        else:
            made = faiss.IndexFlatIP(dim)
        made.add(key.numpy())
        return FaissKeys.around(kind, key, made)

    @staticmethod
    def load(kind: str, key: Tensor, data: Tensor) -> FaissKeys:
        """From what `tensors` gave. Raises ValueError for bytes that faiss cannot read."""
        faiss = _faiss()
        try:
            made = faiss.deserialize_index(data.numpy())
        except RuntimeError as error:
            raise ValueError(f"an index of faiss is damaged: {str(error)[:200]}") from error
        if (made.ntotal, made.d, made.metric_type) != (*key.shape, faiss.METRIC_INNER_PRODUCT):
            raise ValueError(f"an index of faiss is of {made.ntotal} other keys, not of these {len(key)}")
        return FaissKeys.around(kind, key, made)

    def search(self, query: Tensor, k: int, effort: int) -> Found:
        faiss = _faiss()
        keys = len(self.key)
        if self.kind == "ivf":
            lists = min(effort, self.index.nlist)
            scores, ids = self.index.search(query.numpy(), k, params=faiss.SearchParametersIVF(nprobe=lists))
            visited = self.index.quantizer.search(query.numpy(), lists)[1]
            scanned = torch.from_numpy(np.where(visited >= 0, self.sizes[visited], 0).sum(1)) + self.index.nlist
        elif self.kind == "hnsw":
            parameters = faiss.SearchParametersHNSW(efSearch=max(effort, k))
            scores, ids = self.index.search(query.numpy(), k, params=parameters)
            scanned = torch.full((len(query),), -1)
        else:
            scores, ids = self.index.search(query.numpy(), k)
            scanned = torch.full((len(query),), keys)
        return _found(scores, ids, scanned)

    @property
    def held_bytes(self) -> int:
        return 4 * self.key.numel()  # once more in what `tensors` gives

    def tensors(self) -> dict[str, Tensor]:
        return {"faiss": torch.from_numpy(_faiss().serialize_index(self.index))}


def _found(scores: np.ndarray, ids: np.ndarray, scanned: Tensor) -> Found:
    found = torch.from_numpy(ids)
    return Found(found, torch.from_numpy(scores).masked_fill(found < 0, -torch.inf), scanned)


def scanned_by_walk(index: FaissKeys | ProjectedGraph, query: Tensor, k: int, effort: int) -> Tensor:
    """int64 [queries]: inner products of each search in a graph, faiss's or projected.

    faiss counts for the whole process: ask for it in one thread.
    """
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
