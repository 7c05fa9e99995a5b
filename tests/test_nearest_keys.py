"""Indexes of keys: what they find is there, flat is exact, looking further finds more, and files give the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparseprefill.estimators import nearest_keys
from sparseprefill.estimators.key_clusters import cluster_keys, spherical_kmeans
from sparseprefill.estimators.nearest_keys import KINDS, QueryCells, _not_occluded, build_index, load_index, nearest_of
from sparseprefill.evals.context_levels import level_table, level_times
from sparseprefill.evals.context_recall import (
    RecallCell,
    distance_table,
    query_distances,
    recall_curves,
    recall_table,
    scan_for,
)


def made(keys: int = 600, queries: int = 300, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, queries to learn from and to search with; queries come from a part of the space that few keys are in."""
    draw = torch.Generator().manual_seed(seed)
    key = torch.randn(keys, 16, generator=draw)
    turn = torch.randn(16, 16, generator=draw) / 4
    shift = 2 * torch.randn(16, generator=draw)
    learnt, asked = (torch.randn(n, 16, generator=draw) @ turn + shift for n in (queries, 20))
    return key, learnt, asked


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_found_is_there_and_files_give_the_same(kind: str) -> None:
    key, learnt, asked = made()
    index = build_index(kind, key, learnt, links=32, degree=8)
    found = index.search(asked, 10, 40)
    assert found.ids.shape == found.scores.shape == (20, 10)
    for query, ids, scores in zip(asked, found.ids, found.scores, strict=True):
        real = ids[ids >= 0]
        assert len(real.unique()) == len(real) > 0
        torch.testing.assert_close(scores[ids >= 0], key[real] @ query, atol=1e-4, rtol=1e-4)
        assert bool((scores.diff() <= 0).all()), "best first"
    again = load_index(kind, key, index.tensors()).search(asked, 10, 40)
    assert torch.equal(again.ids, found.ids)
    if kind == "flat":
        assert torch.equal(found.ids, nearest_of(asked, key, 10))


@pytest.mark.parametrize("kind", ["ivf", "hnsw", "graph"])
def test_looking_at_everything_finds_everything(kind: str) -> None:
    key, learnt, asked = made()
    index = build_index(kind, key, learnt, links=32, degree=8)
    found = index.search(asked, 10, 600)
    same = (found.ids[:, :, None] == nearest_of(asked, key, 10)[:, None]).any(1).double().mean()
    assert float(same) == (1.0 if kind != "hnsw" else pytest.approx(1.0, abs=0.03))


def test_cells_find_what_queries_of_their_kind_wanted() -> None:
    key, learnt, asked = made()
    index = build_index("cells", key, learnt, links=64)
    few, many = (index.search(asked, 10, effort) for effort in (1, 9))
    best = nearest_of(asked, key, 10)
    share = [float((found.ids[:, :, None] == best[:, None]).any(1).double().mean()) for found in (few, many)]
    assert share[0] <= share[1]
    assert share[1] > 0.9, "queries from the same part of the space"
    assert bool((few.scanned < many.scanned).all())
    assert float(many.scanned.double().mean()) < 600


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keys", [1, 2, 3, 40])
def test_few_keys_few_queries_and_equal_ones(kind: str, keys: int) -> None:
    key, learnt, asked = made()
    for own, some, links in (
        (key[:keys], learnt, 32),
        (key[:keys], learnt[:1], 1),
        (key[:1].repeat(keys, 1), learnt, 5),
    ):
        index = build_index(kind, own.contiguous(), some, links=links, degree=2)
        found = index.search(asked, 10, 50)
        assert found.ids.shape == found.scores.shape == (20, 10)
        assert int(found.ids.max()) < keys
        assert bool(((found.ids < 0) == (found.scores == -torch.inf)).all())
        wanted = min(keys, 10) if kind in ("flat", "graph", "ivf") else 1
        assert all(len(set(row) - {-1}) >= wanted for row in found.ids.tolist()), "what can be reached is found"
        again = load_index(kind, own.contiguous(), index.tensors()).search(asked, 10, 50)
        assert torch.equal(again.ids, found.ids)


@pytest.mark.parametrize("kind", KINDS)
def test_what_no_index_can_be_made_of_is_refused(kind: str) -> None:
    key, learnt, _ = made()
    for own, some in (
        (key.index_fill(0, torch.tensor([3]), torch.inf), learnt),
        (key, learnt * torch.nan),
        (key[:0], learnt),
    ):
        with pytest.raises(ValueError, match="must be finite"):
            build_index(kind, own, some)
    with pytest.raises(ValueError, match="at least 2 links"):
        build_index(kind, key, learnt, degree=1)
    if kind in ("flat", "ivf", "hnsw"):
        with pytest.raises(ValueError, match="600 other keys"):
            load_index(kind, key[:-1], build_index(kind, key, learnt).tensors())


def test_cells_by_definition() -> None:
    key, learnt, asked = made()
    index = build_index("cells", key, learnt, links=20)
    assert isinstance(index, QueryCells)
    found = index.search(asked, 10, 3)
    for query, ids, scanned in zip(asked, found.ids, found.scanned, strict=True):
        cells = (index.centroid @ query).topk(3).indices.tolist()
        members = {int(key) for cell in cells for key in index.members[index.start[cell] : index.start[cell + 1]]}
        assert int(scanned) == len(members) + len(index.centroid)
        listed = torch.tensor(sorted(members))
        assert set(ids.tolist()) == set(listed[(key[listed] @ query).topk(10).indices].tolist())


@pytest.mark.parametrize("most", [4, 40])
def test_links_by_definition(most: int) -> None:
    key, _, _ = made()
    pivots = torch.arange(0, 600, 7)
    others = nearest_of(key[pivots], key, 30)
    others[:, 25:] = torch.where(torch.arange(len(pivots))[:, None] % 2 == 0, others[:, 25:], -1)
    for pivot, near, got in zip(
        pivots.tolist(), others.tolist(), _not_occluded(key, pivots, others, most), strict=True
    ):
        near = sorted({n for n in near if n not in (-1, pivot)}, key=lambda n: float((key[n] - key[pivot]).norm()))
        taken: list[int] = []
        for each in near:
            apart = float((key[each] - key[pivot]).norm())
            if all(apart < float((key[each] - key[other]).norm()) for other in taken) and len(taken) < most:
                taken.append(each)
        rest = [each for each in near if each not in taken]
        assert got == taken + rest[: most - len(taken)]


def test_a_graph_of_many_keys_is_searched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    key, learnt, asked = made()
    exact = build_index("graph", key, learnt, links=32, degree=8)
    monkeypatch.setattr(nearest_keys, "_EXACT", 100)
    index = build_index("graph", key, learnt, links=32, degree=8)
    assert not torch.equal(index.tensors()["neighbours"], exact.tensors()["neighbours"])
    for each in (exact, index):
        found = each.search(asked, 10, 100)
        same = (found.ids[:, :, None] == nearest_of(asked, key, 10)[:, None]).any(1).double().mean()
        assert float(same) > 0.9


def test_a_graph_that_links_to_nothing_is_refused() -> None:
    key, learnt, _ = made()
    tensors = build_index("graph", key, learnt, links=8).tensors()
    with pytest.raises(ValueError, match="links to others"):
        load_index("graph", key[:-1], tensors)
    with pytest.raises(ValueError, match="links to others"):
        load_index(
            "graph", key, {**tensors, "neighbours": tensors["neighbours"].masked_fill(tensors["neighbours"] == 3, 600)}
        )
    with pytest.raises(ValueError, match="searches begin at 600"):
        load_index("graph", key, {**tensors, "entry": torch.tensor(600)})


def test_a_key_that_is_near_to_all_does_not_collect_the_graph() -> None:
    key, learnt, _ = made()
    key[0] *= 30  # every lost key has it as its nearest
    index = build_index("graph", key, learnt[:20], links=4, degree=4)
    assert index.tensors()["neighbours"].shape[1] <= 12
    found = index.search(learnt[:5], 600, 600)
    assert bool((found.ids.sort(1).values == torch.arange(600)).all()), "every key can be reached"


@pytest.mark.parametrize("kind", ["cells", "graph"])
def test_without_queries_there_is_nothing_to_learn(kind: str) -> None:
    with pytest.raises(ValueError, match="built with queries"):
        build_index(kind, made()[0], None)
    with pytest.raises(ValueError, match="is one of"):
        build_index("lsh", made()[0], None)


@pytest.mark.parametrize("backend", ["sklearn", "faiss"])
def test_k_means_of_both_kinds(backend: str) -> None:
    draw = torch.Generator().manual_seed(1)
    centre = torch.randn(6, 16, generator=draw)
    member = torch.arange(300) % 6
    key = (centre[member] + 0.05 * torch.randn(300, 16, generator=draw)) * (
        0.1 + 3 * torch.rand(300, 1, generator=draw)
    )
    label = spherical_kmeans(key, 30, seed=3, backend=backend)
    pure = [len(member[label == each].unique()) == 1 for each in range(int(label.max()) + 1)]
    assert all(pure), "directions tell them apart, lengths do not"
    assert torch.equal(label, spherical_kmeans(key, 30, seed=3, backend=backend)), "the same seed gives the same"
    with pytest.raises(ValueError, match="no more than keys"):
        spherical_kmeans(key, 301, backend=backend)
    with pytest.raises(ValueError, match="not finite"):
        cluster_keys(torch.full((1, 10, 4), torch.nan), 0.5)
    same = spherical_kmeans(key[:1].expand(50, -1), 7, backend=backend)
    assert same.max() < 7
    assert torch.equal(same.unique(), torch.arange(int(same.max()) + 1)), "numbered without gaps"


def test_recall_against_scanned_share() -> None:
    kinds = {"flat": (1,), "ivf": (1, 64), "cells": (1, 9), "graph": (50, 200)}
    cells = recall_curves([made(seed=seed) for seed in (0, 1)], kinds=kinds, k=10, links=64)
    by = {(cell.kind, cell.effort): cell for cell in cells}
    assert by["flat", 1].recall == by["flat", 1].scanned == 1.0
    for kind, (low, high) in {"ivf": (1, 64), "cells": (1, 9), "graph": (50, 200)}.items():
        assert by[kind, low].recall <= by[kind, high].recall + 1e-9
        assert by[kind, low].scanned < by[kind, high].scanned
    assert "cells" in recall_table(cells)
    with pytest.raises(ValueError, match="at least 700 keys"):
        recall_curves([made()], kinds=kinds, k=700)


def test_scan_for_a_recall_lies_between_points() -> None:
    cells = [RecallCell("ivf", n, recall, scanned, 0.0) for n, recall, scanned in ((1, 0.5, 0.1), (2, 0.9, 0.3))]
    assert scan_for(cells, "ivf", 0.7) == pytest.approx(0.2)
    assert scan_for(cells, "ivf", 0.4) == 0.1
    assert scan_for(cells, "ivf", 0.95) is None


def test_distances_are_those_of_their_definition_and_of_no_basis() -> None:
    key, learnt, asked = made(keys=2000)
    (found,) = query_distances([(key, learnt, asked)])
    inverse = torch.linalg.inv(torch.cov(key[0::2].double().T))
    for x, median in ((key[1::2], found.keys), (asked, found.queries)):
        away = x.double() - key[0::2].double().mean(0)
        assert median == pytest.approx(float(torch.einsum("nd,de,ne->n", away, inverse, away).sqrt().median()))
    assert found.ratio > 1.5, "queries come from elsewhere"
    turn = torch.randn(16, 16, generator=torch.Generator().manual_seed(5))
    (turned,) = query_distances([(key @ turn + 3, learnt, asked @ turn + 3)])
    assert turned.ratio == pytest.approx(found.ratio, rel=1e-3), "a linear map changes both alike"
    (same,) = query_distances([(key, learnt, key[:200])])
    assert same.ratio == pytest.approx(1.0, abs=0.05)
    assert "queries / keys" in distance_table([found, same])
    with pytest.raises(ValueError, match="more than 32 keys"):
        query_distances([(key[:32], learnt, asked)])
    with pytest.raises(ValueError, match="do not vary"):
        query_distances([(torch.zeros(64, 16), learnt, asked)])


def test_one_level_and_two_are_timed_on_the_same_choice() -> None:
    cells = level_times((2000, 4000), queries=(1, 5), repeats=1)
    assert [(cell.keys, cell.queries) for cell in cells] == [(2000, 1), (2000, 5), (4000, 1), (4000, 5)]
    assert all(cell.one > 0 and cell.two > 0 and 0 < cell.looked_at < 1 for cell in cells)
    assert "one / two" in level_table(cells)
