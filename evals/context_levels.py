"""One level of clusters or two: when comparing with coarse clusters first takes less time.

Clusters are made up: groups of directions, so that coarse clusters mean something. Only the choice is timed, as each
question pays for it; to cluster keys is paid once.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseprefill.estimators.key_clusters import KeyClusters
from sparseprefill.patterns.squeezed import SqueezedIndex
from sparseprefill.reports import number, table

LENGTHS = (16384, 65536, 262144, 1048576)


@dataclass(frozen=True, slots=True)
class LevelCell:
    """Seconds of one choice for one block of queries, medians."""

    keys: int
    queries: int
    one: float  # a single level
    two: float
    looked_at: float  # share of the clusters within chosen coarse ones


def level_times(
    lengths: Sequence[int] = LENGTHS,
    *,
    queries: Sequence[int] = (1, 64),
    kv_heads: int = 2,
    group: int = 4,
    head_dim: int = 64,
    share: float = 0.05,
    coarse_share: float = 0.01,
    coarse_density: float = 0.6,
    density: float = 0.05,
    repeats: int = 5,
    seed: int = 0,
    progress: Callable[[int], Any] = lambda steps: None,
) -> list[LevelCell]:
    """Time both at growing lengths, interleaved. Both choose about `density` of the clusters."""
    cells = []
    for keys in lengths:
        clusters = made_up_clusters(keys, kv_heads, head_dim, share, coarse_share, seed)
        for number_of in queries:
            draw = torch.Generator().manual_seed(seed + 1)
            query = torch.randn(kv_heads, 1, group * number_of, head_dim, generator=draw)
            real = torch.ones(1, group * number_of, dtype=torch.bool)
            given = query, real, torch.tensor([number_of]), torch.zeros(kv_heads, 1, group * number_of)
            flat = KeyClusters(clusters.centroid, clusters.size)
            one, _ = _index(flat, given, density, None)
            two, looked_at = _index(clusters, given, density, coarse_density)
            seconds: dict[str, list[float]] = {"one": [], "two": []}
            for turn in range(repeats + 1):
                for name, index in (("one", one), ("two", two)):
                    began = time.perf_counter()
                    index.choose(*given)
                    if turn:
                        seconds[name].append(time.perf_counter() - began)
            cells.append(LevelCell(
                keys, number_of, statistics.median(seconds["one"]), statistics.median(seconds["two"]), looked_at
            ))  # fmt: skip
        progress(1)
    return cells


def made_up_clusters(
    keys: int, kv_heads: int, head_dim: int, share: float, coarse_share: float, seed: int
) -> KeyClusters:
    """Clusters of equally many keys each, around coarse directions."""
    draw = torch.Generator().manual_seed(seed)
    number_of, few = max(1, int(keys * share)), max(1, int(keys * coarse_share))
    coarse = torch.randn(kv_heads, few, head_dim, generator=draw)
    parent = (torch.arange(number_of) * few // number_of).expand(kv_heads, -1).contiguous()
    centroid = coarse.gather(1, parent[..., None].expand(-1, -1, head_dim))
    centroid = centroid + 0.5 * torch.randn(centroid.shape, generator=draw)
    size = torch.full((kv_heads, number_of), keys // number_of)
    return KeyClusters(centroid, size, coarse, parent)


def _index(
    clusters: KeyClusters, given: tuple[Tensor, ...], density: float, coarse_density: float | None
) -> tuple[SqueezedIndex, float]:
    """An index whose thresholds choose these shares for this very block, and the share of clusters it looks at."""
    query, _, _, edge_lse = given
    arguments = query[:, 0], 0.125, None, edge_lse[:, 0]
    fine = clusters.log_shares(*arguments).amax(1)
    coarse, looked_at = float("-inf"), 1.0
    if coarse_density is not None:
        wide = clusters.coarse_log_shares(*arguments)[0].amax(1)
        coarse = float(wide.flatten().quantile(1 - coarse_density)) if wide.numel() < 1 << 24 else 0.0
        assert clusters.parent is not None
        inside = (wide > coarse).gather(1, clusters.parent)
        looked_at = float(inside.double().mean())
        fine = fine.masked_fill(~inside, float("-inf"))
    ranked = fine.flatten().sort(descending=True).values
    threshold = float(ranked[min(len(ranked) - 1, int(density * len(ranked)))])
    order = torch.arange(clusters.keys).expand(clusters.size.shape[0], -1)
    levels = torch.tensor([[threshold] * 7, [coarse] * 7])
    return SqueezedIndex(order, clusters, levels, 0.125, None, "max", 0.0), looked_at


def level_table(cells: Sequence[LevelCell], *, markdown: bool = False) -> str:
    """One line a length and number of queries."""
    rows = [
        [
            str(c.keys),
            str(c.queries),
            f"{1e3 * c.one:.2f}",
            f"{1e3 * c.two:.2f}",
            number(c.one / c.two, 2),
            f"{c.looked_at:.0%}",
        ]
        for c in cells
    ]
    return table(
        ["keys", "queries", "one level ms", "two levels ms", "one / two", "clusters looked at"], rows, markdown=markdown
    )
