"""How many of the nearest keys an index finds, against how many keys it looks at: on the queries and keys of a model.

Recall@k: of the k keys with the largest inner products, the share that was found. Scanned: inner products over keys.
Queries are those of questions about the context, which no index has seen; what knows queries learnt from the context's.

Beside it how far the queries are from the keys, next to how far keys are from each other: what makes an index of keys
alone fail in the paper (Liu et al., "RetrievalAttention", 2024, arXiv:2409.10516, section 2.4).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseprefill.estimators.nearest_keys import FaissKeys, ProjectedGraph, build_index, nearest_of, scanned_by_walk
from sparseprefill.reports import number, table

EFFORTS = {
    "flat": (1,), "ivf": (1, 2, 4, 8, 16, 32, 64, 128), "hnsw": (100, 150, 200, 400, 800, 1600),
    "cells": (1, 2, 4, 8, 16, 32, 64), "graph": (100, 150, 200, 400, 800, 1600),
}  # fmt: skip
"""How far each kind is let look."""


@dataclass(frozen=True, slots=True)
class RecallCell:
    """One kind at one effort, means over heads and queries."""

    kind: str
    effort: int
    recall: float
    scanned: float  # share of the keys
    build_seconds: float  # of one KV head


def recall_curves(
    heads: Sequence[tuple[Tensor, Tensor, Tensor]],
    *,
    kinds: Mapping[str, Sequence[int]] = EFFORTS,
    k: int = 100,
    links: int = 128,
    progress: Callable[[int], Any] = lambda steps: None,
) -> list[RecallCell]:
    """Curves over KV heads, each (keys [keys, head_dim], queries to learn from, queries to search with), float32.

    Raises ValueError where a head has fewer than `k` keys.
    """
    if any(len(key) < k for key, _, _ in heads):
        raise ValueError(f"recall@{k} needs at least {k} keys")
    exact = [nearest_of(query, key, k) for key, _, query in heads]
    cells = []
    for kind, efforts in kinds.items():
        indexes, seconds = [], []
        for key, learnt, _ in heads:
            began = time.perf_counter()
            indexes.append(build_index(kind, key, learnt, links=links))
            seconds.append(time.perf_counter() - began)
            progress(1)
        for effort in efforts:
            recalls, scans = [], []
            for index, want, (key, _, query) in zip(indexes, exact, heads, strict=True):
                found = index.search(query, k, effort)
                hits = (found.ids[:, :, None] == want[:, None]).any(1)
                recalls.append(hits.double().mean())
                scanned = found.scanned
                if isinstance(index, ProjectedGraph) or (isinstance(index, FaissKeys) and index.kind == "hnsw"):
                    scanned = scanned_by_walk(index, query, k, effort)
                scans.append(scanned.double().mean() / len(key))
            cells.append(RecallCell(
                kind, effort, float(torch.stack(recalls).mean()), float(torch.stack(scans).mean()),
                sum(seconds) / len(seconds),
            ))  # fmt: skip
    return cells


@dataclass(frozen=True, slots=True)
class HeadDistance:
    """Mahalanobis distances from the keys of one KV head, medians."""

    keys: float  # of keys that the mean and the covariance do not know
    queries: float

    @property
    def ratio(self) -> float:
        """How many times as far the queries are."""
        return self.queries / self.keys


def query_distances(heads: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[HeadDistance]:
    """Distances of the queries to search with, and of keys; heads as `recall_curves` takes them.

    Mean and covariance are those of every other key, and the keys that are measured are the rest, in float64.

    Raises ValueError where a head has too few keys for a covariance, or keys that do not vary in some direction.
    """
    found = []
    for place, (key, _, query) in enumerate(heads):
        known, rest = key[0::2].double(), key[1::2].double()
        if len(known) <= key.shape[1] or not len(rest) or not len(query):
            raise ValueError(
                f"distances of {key.shape[1]} dimensions need queries and more than {2 * key.shape[1]} keys, "
                f"got {len(query)} and {len(key)}"
            )
        mean = known.mean(0)
        factor, failed = torch.linalg.cholesky_ex((known - mean).T @ (known - mean) / (len(known) - 1))
        if int(failed):
            raise ValueError(f"the keys of KV head {place} do not vary in some direction: they have no distance")

        def median(x: Tensor, mean: Tensor = mean, factor: Tensor = factor) -> float:
            return float(torch.linalg.solve_triangular(factor, (x - mean).T, upper=False).norm(dim=0).median())

        found.append(HeadDistance(median(rest), median(query.double())))
    return found


def distance_table(distances: Sequence[HeadDistance], *, markdown: bool = False) -> str:
    """Lowest, median and highest of the KV heads."""
    kinds = {
        "keys": [each.keys for each in distances], "queries": [each.queries for each in distances],
        "queries / keys": [each.ratio for each in distances],
    }  # fmt: skip
    rows = [
        [name, *(number(each, 3) for each in (min(own), statistics.median(own), max(own)))]
        for name, own in kinds.items()
    ]
    return table(["distance from the keys", "lowest", "median", "highest"], rows, markdown=markdown)


def recall_table(cells: Sequence[RecallCell], *, markdown: bool = False) -> str:
    """One line a kind and effort."""
    rows = [
        [cell.kind, str(cell.effort), number(cell.recall), f"{cell.scanned:.1%}", number(cell.build_seconds, 2)]
        for cell in cells
    ]
    return table(["index", "effort", "recall", "scanned", "build s"], rows, markdown=markdown)


def scan_for(cells: Sequence[RecallCell], kind: str, recall: float) -> float | None:
    """Share of the keys that a kind scans for this recall, between its points; None where it does not get there."""
    points = sorted((cell.recall, cell.scanned) for cell in cells if cell.kind == kind)
    below = [point for point in points if point[0] < recall]
    above = [point for point in points if point[0] >= recall]
    if not above:
        return None
    if not below:
        return above[0][1]
    (r0, s0), (r1, s1) = below[-1], above[0]
    return s0 + (s1 - s0) * (recall - r0) / (r1 - r0)


def scan_table(
    cells: Sequence[RecallCell], *, recalls: Sequence[float] = (0.8, 0.9, 0.95, 0.98), markdown: bool = False
) -> str:
    """One line a kind: the share of the keys that it scans for a recall, between the efforts that were tried."""

    def shown(kind: str, recall: float) -> str:
        share = scan_for(cells, kind, recall)
        if share is None:
            return "-"
        least = min((cell.scanned, cell.recall) for cell in cells if cell.kind == kind)
        return f"{'<= ' if share == least[0] < 1 and recall < least[1] else ''}{share:.1%}"

    rows = []
    for kind in dict.fromkeys(cell.kind for cell in cells):
        seconds = next(cell.build_seconds for cell in cells if cell.kind == kind)
        rows.append([kind, *(shown(kind, recall) for recall in recalls), number(seconds, 2)])
    return table(["index", *(f"scanned for {recall:.0%}" for recall in recalls), "build s"], rows, markdown=markdown)


def recall_plot(cells: Sequence[RecallCell], path: Path, k: int) -> None:
    """Recall against the scanned share, logarithmic; format by the name's ending."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    names = {"flat": "flat (exact)", "ivf": "IVF, keys alone", "hnsw": "HNSW, keys alone",
             "cells": "cells trained on queries", "graph": "graph projected from queries"}  # fmt: skip
    for place, kind in enumerate(dict.fromkeys(cell.kind for cell in cells)):
        own = sorted((cell.scanned, cell.recall) for cell in cells if cell.kind == kind)
        axis.plot(
            *zip(*own, strict=True), marker="o^sDv"[place % 5], markersize=5, linewidth=1.3, label=names.get(kind, kind)
        )
    axis.set_xscale("log")
    axis.set_xticks([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlim(0.9 * min(cell.scanned for cell in cells), 1.1)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    axis.set_xlabel("keys scanned")
    axis.set_ylabel(f"recall@{k}")
    axis.set_ylim(0, 1.03)
    axis.grid(visible=True, which="major", linewidth=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)
