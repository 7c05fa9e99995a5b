"""Clusters of the keys of a fixed context, and what a query is likely to see in each.

Hooper et al., "Squeezed Attention", 2024, arXiv:2411.09688: keys are clustered by direction, a query is compared with
the centroids, and keys of clusters that a query would look at are attended to exactly.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseprefill.estimators.selection import check_share

BACKENDS = ("auto", "sklearn", "faiss")
_SKLEARN_PRODUCTS = 1 << 28  # keys x clusters x head_dim of one K-means; above it faiss, where it is installed
_ITERATIONS = 50  # of K-means at most; the paper has 300


@dataclass(frozen=True, slots=True, eq=False)
class KeyClusters:
    """Clusters of the keys of one layer, each KV head's own. Keys lie in their order: cluster after cluster.

    KV heads with fewer clusters than others have empty ones at the end, of size 0, that no query ever chooses.
    """

    centroid: Tensor  # float32 [kv_heads, clusters, head_dim]: means of keys as they are
    size: Tensor  # int64 [kv_heads, clusters]: keys of each
    coarse: Tensor | None = None  # float32 [kv_heads, coarse clusters, head_dim]: means too
    parent: Tensor | None = None  # int64 [kv_heads, clusters]: which coarse cluster each lies in

    @property
    def keys(self) -> int:
        """Keys of a KV head."""
        return int(self.size[0].sum())

    def log_shares(
        self, query: Tensor, scale: float, softcap: float | None = None, others: Tensor | None = None
    ) -> Tensor:
        """Log of the share of attention that one key of each cluster gets, if all its keys were the centroid.

        S_j = exp(z_j) / (sum_i n_i exp(z_i) + exp(others)), with z the logits of the centroids and n the sizes. The sum
        goes over coarse clusters where there are any, so that not all clusters have to be looked at for it.

        Args:
            query: [kv_heads, queries, head_dim].
            scale, softcap: of the attention.
            others: [kv_heads, queries] logsumexp of keys that are in no cluster, which take their part; None for none.

        Returns:
            float32 [kv_heads, queries, clusters], -inf for empty clusters.
        """
        logits = _logits(query, self.centroid, scale, softcap).masked_fill((self.size == 0)[:, None], -torch.inf)
        total = (
            _total(logits, self.size, others)
            if self.coarse is None
            else self.coarse_log_shares(query, scale, softcap, others)[1]
        )
        return logits - total[..., None]

    @property
    def coarse_size(self) -> Tensor:
        """int64 [kv_heads, coarse clusters]: keys of each."""
        assert self.coarse is not None
        assert self.parent is not None
        sizes = torch.zeros(self.coarse.shape[:2], dtype=torch.int64, device=self.size.device)
        return sizes.scatter_add_(1, self.parent, self.size)

    def coarse_log_shares(
        self, query: Tensor, scale: float, softcap: float | None = None, others: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`log_shares` of the coarse clusters, and the logarithm of their sum, float32 [kv_heads, queries]."""
        assert self.coarse is not None
        size = self.coarse_size
        logits = _logits(query, self.coarse, scale, softcap).masked_fill((size == 0)[:, None], -torch.inf)
        total = _total(logits, size, others)
        return logits - total[..., None], total

    def some_log_shares(
        self, head: int, ids: Tensor, query: Tensor, total: Tensor, scale: float, softcap: float | None = None
    ) -> Tensor:
        """`log_shares` [queries, some] of a few clusters `ids` of one KV head, with the `total` of coarse ones."""
        logits = _logits(query[None], self.centroid[head, ids][None], scale, softcap)[0]
        return logits - total[:, None]

    def owner(self) -> Tensor:
        """int64 [kv_heads, keys]: the cluster of each key, in the order they lie in."""
        number = torch.arange(self.size.shape[1], device=self.size.device)
        return torch.stack([torch.repeat_interleave(number, size) for size in self.size])

    def to(self, device: torch.device) -> KeyClusters:
        """The same on another device."""
        return KeyClusters(**{name: each.to(device) for name, each in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """What a file has to hold."""
        found = {"centroid": self.centroid, "size": self.size, "coarse": self.coarse, "parent": self.parent}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def _logits(query: Tensor, centroid: Tensor, scale: float, softcap: float | None) -> Tensor:
    logits = torch.bmm(query.float(), centroid.mT) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _total(logits: Tensor, size: Tensor, others: Tensor | None) -> Tensor:
    total = torch.logsumexp(logits + size.clamp(min=1).log()[:, None], -1)
    return total if others is None else torch.logaddexp(total, others)


def cluster_keys(
    key: Tensor,
    share: float,
    coarse_share: float | None = None,
    *,
    seed: int = 0,
    backend: str = "auto",
    progress: Callable[[int], Any] = lambda heads: None,
) -> tuple[Tensor, KeyClusters]:
    """Cluster the keys of one layer by direction: spherical K-means on keys of length 1, each KV head alone.

    A centroid is the mean of the keys as they are, so that its logits are the mean of theirs. Clusters that end up
    empty (duplicate keys make them) are dropped.

    Args:
        key: [kv_heads, keys, head_dim].
        share: clusters over keys, in (0, 1]; at least one.
        coarse_share: also cluster the centroids, into this share of the keys; None: a single level.
        seed: of the first centroids.
        backend: "sklearn", "faiss", or "auto": by size.
        progress: called with 1 after each KV head.

    Returns:
        The order int64 [kv_heads, keys] in which clusters lie one after the other (coarse ones too, keys of a cluster
        ascending), and the clusters.

    Raises:
        ValueError: shares that are none, or more coarse clusters than clusters; keys that are not finite.
        ModuleNotFoundError: the backend is not installed; the message says how to install it.
    """
    check_share("clusters", share)
    if coarse_share is not None:
        check_share("coarse clusters", coarse_share)
        if coarse_share >= share:
            raise ValueError(
                f"coarse clusters must be fewer than clusters, got shares of {coarse_share} and {share} of the keys"
            )
    if not bool(key.isfinite().all()):
        raise ValueError("there are keys that are not finite: no cluster can hold them")
    kv_heads, keys = key.shape[:2]
    number = max(1, math.floor(keys * share))
    orders, found = [], []
    for head in range(kv_heads):
        raw = key[head].float()
        label = spherical_kmeans(raw, number, seed=seed, backend=backend)
        centroid, size = _means(raw, label)
        coarse = parent = None
        if coarse_share is not None:
            few = min(max(1, math.floor(keys * coarse_share)), len(size))
            parent = spherical_kmeans(centroid, few, seed=seed, backend=backend)
            new = parent.argsort(stable=True)  # clusters of one coarse cluster lie together
            place = torch.empty_like(new).scatter_(0, new, torch.arange(len(new)))
            label, centroid, size, parent = place[label], centroid[new], size[new], parent[new]
            coarse, _ = _means(raw, parent[label])
        orders.append(label.argsort(stable=True))
        found.append((centroid, size, coarse, parent))
        progress(1)
    clusters = KeyClusters(*(None if parts[0] is None else _stack(parts) for parts in zip(*found, strict=True)))  # type: ignore[arg-type]
    return torch.stack(orders).to(key.device), dataclasses.replace(
        clusters, **{name: tensor.to(key.device) for name, tensor in clusters.tensors().items()}
    )


def _stack(parts: Any) -> Tensor:
    """Along a new first dimension; shorter ones get zeros at the end."""
    longest = max(len(part) for part in parts)
    out: Tensor = parts[0].new_zeros(len(parts), longest, *parts[0].shape[1:])
    for place, part in zip(out, parts, strict=True):
        place[: len(part)] = part
    return out


def _means(keys: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [clusters, head_dim] means of the keys of each label, int64 [clusters] how many they are."""
    size = label.bincount()
    total = torch.zeros(len(size), keys.shape[1], dtype=torch.float64).index_add_(0, label, keys.double())
    return (total / size[:, None]).float(), size


def spherical_kmeans(keys: Tensor, clusters: int, *, seed: int = 0, backend: str = "auto") -> Tensor:
    """int64 [keys]: the cluster of each key, numbered without gaps. K-means on the keys' directions.

    A key of length 0 has none, and goes wherever a direction of zeros is nearest.

    Args:
        keys: float32 [keys, head_dim], finite.
        clusters: at most as many as keys.
        seed: of the first centroids.
        backend: see `cluster_keys`.

    Raises ValueError for more clusters than keys or an unknown backend, ModuleNotFoundError where it is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"K-means is made by {', '.join(BACKENDS)}, got {backend!r}")
    if not 1 <= clusters <= len(keys):
        raise ValueError(f"{clusters} clusters of {len(keys)} keys: there must be at least one, and no more than keys")
    if clusters == len(keys):
        return torch.arange(len(keys))
    unit = torch.nn.functional.normalize(keys.detach().cpu().float(), dim=-1)
    large = unit.numel() * clusters > _SKLEARN_PRODUCTS
    if backend == "faiss" or (backend == "auto" and large and _installed("faiss")):
        label = _faiss_labels(unit, clusters, seed)
    else:
        label = _sklearn_labels(unit, clusters, seed)
    numbered: Tensor = label.unique(return_inverse=True)[1]
    return numbered


def _installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def _sklearn_labels(unit: Tensor, clusters: int, seed: int) -> Tensor:
    import warnings

    try:
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "K-means needs scikit-learn, which is not installed: pip install 'sparseprefill[estimators]'"
        ) from error
    model = KMeans(clusters, init="k-means++", n_init=1, max_iter=_ITERATIONS, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different keys than clusters
        return torch.from_numpy(model.fit(unit.numpy()).labels_).to(torch.int64)


def _faiss_labels(unit: Tensor, clusters: int, seed: int) -> Tensor:
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "K-means by faiss needs faiss-cpu, which is not installed: pip install 'sparseprefill[estimators]'"
        ) from error
    data = unit.numpy()
    model = faiss.Kmeans(
        data.shape[1], clusters, niter=_ITERATIONS, seed=seed, spherical=True, max_points_per_centroid=len(data),
        min_points_per_centroid=1,
    )  # fmt: skip
    model.train(data)
    return torch.from_numpy(model.index.search(data, 1)[1][:, 0]).to(torch.int64)
