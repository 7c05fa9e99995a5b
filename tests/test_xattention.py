"""XAttention: its blocks against the definition in loops, the contract of selectors, and what is special to it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from slow_xattention import slow_xattention
from strided_cases import (
    INPUTS,
    ON_TILES,
    TILES,
    assert_batch_rows_are_independent,
    assert_equals_slow,
    assert_legal,
    chunk_of,
    index_of,
    looks_ahead,
)

from sparseprefill import contracts
from sparseprefill.contracts import AttentionInputs, BlockGrid
from sparseprefill.estimators import antidiagonal
from sparseprefill.estimators.antidiagonal import Antidiagonal
from sparseprefill.estimators.covered_mass import CoveredMass
from sparseprefill.patterns import Dense, LastRowsDense, PerHead
from sparseprefill.patterns.expected_overhead import RATES
from sparseprefill.patterns.nested import build_indexes, estimator_work
from sparseprefill.patterns.xattention import OVERHEAD, XAttention
from support import left_padding, make_inputs

CPU = torch.device("cpu")

# strides below a block of 16, equal to it, and thresholds by head
PATTERNS = {
    "threshold": XAttention(0.7, stride=4),
    "by-head": XAttention((0.3, 0.95), stride=8),
    "keep": XAttention(keep=0.4, stride=4),
    "keep-tokens": XAttention(keep=48, stride=16),
}


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        *(("threshold", name) for name in INPUTS),
        *((pattern, name) for pattern in list(PATTERNS)[1:] for name in ("holes", "chunk", "window", "static-cache")),
    ],
)
def test_equals_the_slow_definition_in_float64(pattern: str, name: str) -> None:
    assert_equals_slow(PATTERNS[pattern], slow_xattention, name, 16, 16)


@pytest.mark.parametrize("name", ["holes", "chunk"])
@pytest.mark.parametrize("sizes", TILES[1:], ids=str)
def test_equals_the_slow_definition_on_rectangles(sizes: tuple[int, int], name: str) -> None:
    assert_equals_slow(PATTERNS["threshold"], slow_xattention, name, *sizes)


@pytest.mark.parametrize("name", INPUTS)
def test_groups_see_a_key_that_one_of_their_queries_may_see(name: str) -> None:
    """A valid one, between the first that the first of them sees and the last that the last one does."""
    inputs = make_inputs(query_heads=1, kv_heads=1, head_dim=8, **INPUTS[name])
    groups = Antidiagonal(4).prepare(inputs, BlockGrid.of(inputs, 16, 16))
    seen = inputs.visible_mask()
    for b in range(inputs.batch):
        valid = torch.ones(inputs.keys, dtype=torch.bool) if inputs.key_valid is None else inputs.key_valid[b]
        anchor, first = int(groups.grid.anchor[b]), int(groups.grid.first[b]) * 4
        for p in range(groups.low.shape[1]):
            slots = range(anchor + (first + p) * 4, anchor + (first + p + 1) * 4)
            asked = [i - inputs.query_start for i in slots if i < inputs.keys and valid[i]]
            asked = [i for i in asked if 0 <= i < inputs.queries]
            keys = seen[b, asked].any(0).nonzero()[:, 0].tolist()
            wanted = {
                (j - anchor) // 4 for j in range(keys[0], keys[-1] + 1) if valid[j] and j < inputs.last_key
            } if keys else set()  # fmt: skip
            got = set(range(int(groups.low[b, p]), int(groups.high[b, p])))
            if groups.occupied is not None:
                got &= set(groups.occupied[b].nonzero()[:, 0].tolist())
            assert got == wanted, f"batch row {b}, group {first + p}"


@pytest.mark.parametrize(("name", "sizes"), ON_TILES, ids=str)
def test_lists_are_legal_and_the_full_budget_is_dense(name: str, sizes: tuple[int, int]) -> None:
    assert_legal(XAttention(0.8, stride=4), XAttention(1.0, stride=4), name, *sizes)
    inputs = make_inputs(head_dim=8, **INPUTS[name])
    dense = index_of(Dense(), inputs, *sizes).to_mask()
    for full in (XAttention(keep=1.0, stride=4), XAttention(keep=10**6, stride=4)):
        assert torch.equal(index_of(full, inputs, *sizes).to_mask(), dense)


@pytest.mark.parametrize("pattern", ["threshold", "keep"])
def test_batch_rows_are_independent_of_padding_on_the_right(pattern: str) -> None:
    assert_batch_rows_are_independent(PATTERNS[pattern], True)


@pytest.mark.parametrize("sizes", TILES, ids=str)
@pytest.mark.parametrize("pattern", ["threshold", "keep"])
def test_it_does_not_look_ahead(pattern: str, sizes: tuple[int, int]) -> None:
    assert not looks_ahead(PATTERNS[pattern], *sizes)


@pytest.mark.parametrize("sizes", TILES, ids=str)
def test_what_is_not_finite_harms_no_row_before_it(sizes: tuple[int, int]) -> None:
    inputs = make_inputs(queries=240, head_dim=8)
    clean = index_of(PATTERNS["threshold"], inputs, *sizes).to_mask()
    row = 2
    edge = (row + 1) * sizes[0]
    for value in (torch.nan, torch.inf, -torch.inf):
        dirty = dataclasses.replace(inputs, key=inputs.key.clone(), query=inputs.query.clone())
        dirty.key[:, 1, edge + 1] = value
        dirty.query[:, 3, edge + 3] = value
        index = index_of(PATTERNS["threshold"], dirty, *sizes)
        assert torch.equal(index.to_mask()[:, :, : row + 1], clean[:, :, : row + 1])
        later = index_of(Dense(), inputs, *sizes).to_mask()[:, :, row + 1 :]
        assert torch.equal(index.to_mask()[:, 2:, row + 1 :], later[:, 2:])  # heads 2 and 3 read KV head 1
        assert torch.equal(index.to_mask()[:, :2, row + 1 :], clean[:, :2, row + 1 :])
        assert index.unjudged is not None
        assert index.unjudged.tolist() == [[0, 0, 240 - edge, 240 - edge]]


def test_a_score_that_overflows_is_not_judged() -> None:
    """It would be minus infinity, and weigh nothing, though both sides are finite."""
    inputs = make_inputs(queries=100, head_dim=8)
    inputs = dataclasses.replace(inputs, query=inputs.query.abs() + 10)
    inputs.key[:, 0, 50] = -3e38
    index = index_of(XAttention(0.5, stride=4), inputs)
    assert index.unjudged is not None
    assert index.unjudged.tolist() == [[52, 52, 0, 0]], "rows from slot 48 on"


def test_padding_is_not_counted_as_unjudged() -> None:
    inputs = make_inputs(batch=2, queries=200, head_dim=8, key_valid=left_padding(200, [0, 75]))
    inputs.key[:, :, 80] = torch.inf
    index = index_of(XAttention(0.5, stride=4), inputs)
    assert index.unjudged is not None
    # the row of slot 80 begins at slot 80, and at 75 where 75 slots are padding
    assert index.unjudged.tolist() == [[120] * 4, [125] * 4]


def test_a_row_that_sees_no_key_keeps_what_it_may_see() -> None:
    """A cache that is filled up to slot 20 alone, and a window: queries from slot 52 on see nothing."""
    inputs = make_inputs(queries=100, head_dim=8, window=32, key_length=20)
    index = index_of(XAttention(0.0, stride=4), inputs)
    index.validate(inputs)
    assert torch.equal(index.to_mask()[:, :, 4:], index_of(Dense(), inputs).to_mask()[:, :, 4:])
    assert index.unjudged is not None
    assert index.unjudged.tolist() == [[100 - 64] * 4], "rows of 16 from slot 64 on"


@pytest.mark.parametrize("sizes", [(16, 16), (16, 32), (32, 16)], ids=str)
@pytest.mark.parametrize("pattern", ["threshold", "keep"])
def test_chunks_choose_what_one_prefill_would(pattern: str, sizes: tuple[int, int]) -> None:
    """At every edge that is a multiple of the query block, and so of the stride."""
    inputs = make_inputs(queries=192, head_dim=8, dtype=torch.float64)
    whole = index_of(PATTERNS[pattern], inputs, *sizes).to_mask()
    for edge in range(sizes[0], 192, sizes[0]):
        for start, stop in ((0, edge), (edge, 192), (edge, min(192, edge + 2 * sizes[0]))):
            index = index_of(PATTERNS[pattern], chunk_of(inputs, start, stop), *sizes)
            first, rows, blocks = start // sizes[0], index.grid.rows, index.grid.key_blocks
            assert torch.equal(index.to_mask(), whole[:, :, first : first + rows, :blocks])
            assert not whole[:, :, first : first + rows, blocks:].any()


@pytest.mark.parametrize("edge", [1, 7, 13, 30, 33])
def test_a_chunk_that_cuts_a_group_changes_no_other_row(edge: int) -> None:
    """What is missing of the group counts as zero: `chunk` in the slow definition; whole rows do not notice."""
    inputs = make_inputs(queries=96, head_dim=8, dtype=torch.float64)
    whole = index_of(PATTERNS["threshold"], inputs).to_mask()
    first, second = (index_of(PATTERNS["threshold"], chunk_of(inputs, *cut)) for cut in ((0, edge), (edge, 96)))
    assert torch.equal(first.to_mask()[:, :, : edge // 16], whole[:, :, : edge // 16, : first.grid.key_blocks])
    assert torch.equal(second.to_mask()[:, :, 1:], whole[:, :, edge // 16 + 1 :])
    first.validate(chunk_of(inputs, 0, edge))


def test_the_rule_by_hand() -> None:
    """Blocks 0 and 4 are forced; the block that reaches the threshold is kept; ties go to the lower id."""
    mass = torch.tensor([[[[1.0, 2.0, 3.0, 2.0, 2.0, 5.0]]]], dtype=torch.float64)  # the last one is not visible
    visible = torch.tensor([[[True] * 5 + [False]]])
    forced = torch.tensor([[[True, False, False, False, True, False]]])

    def kept(threshold: float) -> list[int]:
        found: list[int] = CoveredMass((threshold,)).select(mass, visible, forced)[0, 0, 0].nonzero()[:, 0].tolist()
        return found

    assert kept(0.0) == kept(0.3) == [0, 4], "3 of 10 are forced"
    assert kept(0.31) == kept(0.6) == [0, 2, 4]
    assert kept(0.61) == kept(0.8) == [0, 1, 2, 4]
    assert kept(0.81) == kept(1.0) == [0, 1, 2, 3, 4]
    mass[..., 1:4] = 0
    assert kept(1.0) == [0, 1, 2, 3, 4], "all blocks, whatever their mass"
    assert kept(0.99) == [0, 4]


def test_threshold_0_is_first_block_and_diagonal() -> None:
    inputs = make_inputs(queries=250, head_dim=8)
    mask = index_of(XAttention(0.0, stride=4), inputs).to_mask()
    row, block = torch.arange(16)[:, None], torch.arange(16)
    assert torch.equal(mask, ((block == 0) | (block == row)).expand_as(mask))


def test_more_threshold_keeps_more_and_covers_its_share() -> None:
    inputs = make_inputs(queries=250, head_dim=8, dtype=torch.float64)
    grid = BlockGrid.of(inputs, 16, 16)
    mass = Antidiagonal(4).prepare(inputs, grid).scores(0, grid.rows)
    groups = torch.tensor([4.0] * 15 + [3.0], dtype=torch.float64)  # the last row has 10 queries
    torch.testing.assert_close(mass.sum(-1), groups.expand_as(mass[..., 0]))
    before = torch.zeros_like(mass, dtype=torch.bool)
    for threshold in (0.0, 0.2, 0.5, 0.8, 0.95, 0.999, 1.0):
        mask = index_of(XAttention(threshold, stride=4), inputs).to_mask()
        assert (mask | ~before).all()
        assert ((mass * mask).sum(-1) >= threshold * mass.sum(-1) - 1e-12).all()
        before = mask


def test_groups_that_are_alike_give_the_exact_mass() -> None:
    """Queries and keys constant within a group: the score of a cell is the logit of its pairs."""
    inputs = make_inputs(queries=160, head_dim=8, dtype=torch.float64)
    inputs = dataclasses.replace(
        inputs, query=inputs.query[:, :, ::8].repeat_interleave(8, 2), key=inputs.key[:, :, ::8].repeat_interleave(8, 2)
    )
    grid = BlockGrid.of(inputs, 16, 16)
    mass = Antidiagonal(8).prepare(inputs, grid).scores(0, grid.rows)
    key = inputs.key.repeat_interleave(2, 1)
    logits = inputs.query[:, :, ::8] @ key[:, :, ::8].mT * inputs.scale
    share = logits.masked_fill(torch.ones(20, 20).triu(1).bool(), -torch.inf).softmax(-1)
    exact = share.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).sum((3, 5))
    torch.testing.assert_close(mass, exact)


def test_a_needle_is_kept_by_all_rows_behind_it() -> None:
    """One key that all later queries look at, in a block that has nothing else to it."""
    inputs = make_inputs(query_heads=1, kv_heads=1, queries=512, head_dim=32)
    inputs.key[:, :, 200] = 40 * torch.nn.functional.normalize(inputs.query[:, :, 256:].mean(2), dim=-1)
    inputs.query[:, :, 256:] += inputs.key[:, :, 200] / 8
    for stride in (4, 8, 16):
        mask = index_of(XAttention(0.5, stride=stride), inputs).to_mask()
        assert mask[0, 0, 17:, 200 // 16].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_run_dtypes_differ_only_at_the_cut(dtype: torch.dtype) -> None:
    inputs = make_inputs(query_heads=2, kv_heads=1, queries=320, head_dim=16, dtype=dtype)
    exact = dataclasses.replace(inputs, **{n: getattr(inputs, n).double() for n in ("query", "key", "value")})
    grid = BlockGrid.of(inputs, 16, 16)
    mass, wanted = (Antidiagonal(4).prepare(i, grid).scores(0, grid.rows) for i in (inputs, exact))
    error = (mass - wanted).abs().max()
    assert error < 1e-5, "products are in float32 at least"
    for pattern in (XAttention(0.6, stride=4), XAttention(keep=0.4, stride=4)):
        got, want = (index_of(pattern, i).to_mask() for i in (inputs, exact))
        cut = wanted.masked_fill(~want, torch.inf).sort(-1).values
        # a block that differs is as good as one at the cut: the least kept one, or what is missing to the threshold
        either = (got != want).any(-1)
        spare = ((wanted * want).sum(-1) - 0.6 * wanted.sum(-1)).abs()
        close = ((wanted - cut[..., :1]).abs() <= 2 * error).any(-1) | (spare <= 16 * error)
        assert (~either | close).all()
        assert either.float().mean() < 0.05


def test_one_estimate_serves_all_knobs() -> None:
    inputs = make_inputs(batch=2, queries=200, head_dim=8, key_valid=left_padding(200, [0, 41]))
    patterns = [XAttention(t, stride=4) for t in (0.0, 0.5, 0.9, 1.0)] + [XAttention(keep=0.3, stride=4)]
    assert len({each.family for each in patterns}) == 1
    assert len({each.family for each in (*patterns, XAttention(0.5), XAttention(0.5, product="torch"))}) == 3
    for place, index in build_indexes(patterns, inputs, BlockGrid.of(inputs, 16, 16)):
        assert torch.equal(index.to_mask(), index_of(patterns[place], inputs).to_mask())


def test_heads_with_thresholds_of_their_own() -> None:
    inputs = make_inputs(query_heads=6, kv_heads=2, queries=200, head_dim=8)
    thresholds = (0.2, 0.9, 0.5, 1.0, 0.0, 0.7)
    together = index_of(XAttention(thresholds, stride=4), inputs).to_mask()
    patterns = tuple(XAttention(t, stride=4) for t in thresholds)
    by_head = index_of(PerHead(patterns), inputs)
    assert torch.equal(by_head.to_mask(), together)
    for head, pattern in enumerate(patterns):
        assert torch.equal(together[:, head], index_of(pattern, inputs).to_mask()[:, head])
    budgets = PerHead((XAttention(keep=0.3, stride=4),) * 2 + (XAttention(keep=0.6, stride=4), Dense()) * 2)
    for head, pattern in enumerate(budgets.patterns):
        assert torch.equal(index_of(budgets, inputs).to_mask()[:, head], index_of(pattern, inputs).to_mask()[:, head])
    with pytest.raises(ValueError, match="threshold has 2 numbers for 6 query heads: give one number for all"):
        index_of(XAttention((0.5, 0.6)), inputs)
    with pytest.raises(ValueError, match="threshold has 2 numbers for 1 query heads"):
        index_of(PerHead((XAttention((0.5, 0.6)),) * 6), inputs)


def test_last_rows_dense() -> None:
    inputs = make_inputs(queries=250, head_dim=8)
    index = index_of(LastRowsDense(PATTERNS["threshold"], 20), inputs)
    assert torch.equal(index.to_mask()[:, :, -2:], index_of(Dense(), inputs).to_mask()[:, :, -2:])


def test_rows_and_keys_in_slabs_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a row's work is cut must not show, nor whether masks are left out where all is seen."""
    inputs = make_inputs(batch=2, queries=150, keys=200, query_start=50, head_dim=8, dtype=torch.float64)
    inputs = dataclasses.replace(inputs, key_valid=left_padding(200, [0, 37]))
    grid = BlockGrid.of(inputs, 16, 16)
    whole = Antidiagonal(4).prepare(inputs, grid)
    wanted, index = whole.scores(0, grid.rows), index_of(PATTERNS["threshold"], inputs)
    monkeypatch.setattr(antidiagonal, "_all_seen", lambda *all_: False)
    torch.testing.assert_close(whole.scores(0, grid.rows), wanted, rtol=1e-12, atol=0)
    monkeypatch.setattr(antidiagonal.PreparedGroups, "_reach", lambda self, start, stop: (0, grid.reach(stop - 1)))
    monkeypatch.setattr(antidiagonal, "_ENTRIES", {"cpu": 1, "cuda": 1})
    assert list(whole.slabs()) == [(row, row + 1) for row in range(grid.rows)]
    torch.testing.assert_close(whole.scores(2, 7), wanted[:, :, 2:7], rtol=1e-12, atol=0)
    monkeypatch.setattr(contracts, "_SLAB_ENTRIES", 1)
    assert torch.equal(index_of(PATTERNS["threshold"], inputs).to_mask(), index.to_mask())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -0.1}, r"threshold must be in \[0, 1\], got -0.1"),
        ({"threshold": 1.1}, "threshold must be in"),
        ({"threshold": float("nan")}, "threshold must be in"),
        ({"threshold": "0.9"}, "threshold must be a number"),
        ({"threshold": True}, "threshold must be a number"),
        ({"threshold": (0.5, 2)}, "threshold must be in"),
        ({"threshold": ()}, "threshold has no numbers"),
        ({"threshold": 0.9, "keep": 0.2}, "either a threshold or a budget"),
        ({"keep": 1.5}, "keep as a share must be in"),
        ({"keep": 0}, "keep must be at least 1"),
        ({"stride": 2}, "stride must be one of 4, 8, 16, got 2"),
        ({"stride": 8.5}, "stride must be one of"),
        ({"product": "cuda"}, "unknown implementation 'cuda': choose one of auto, torch, triton"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        XAttention(**options)


def test_the_default_is_the_published_threshold() -> None:
    assert XAttention() == XAttention(threshold=0.9)
    assert XAttention(keep=0.2).threshold is None
    assert XAttention([0.5, 0.6]) == XAttention((0.5, 0.6))  # type: ignore[arg-type]
    assert hash(XAttention([0.5])) == hash(XAttention((0.5,)))  # type: ignore[arg-type]


def test_tiles_that_cut_groups_are_refused() -> None:
    inputs = make_inputs(queries=100, head_dim=8)
    with pytest.raises(ValueError, match=r"block_q must be a multiple of stride=8, .* got 12: choose block_q=16"):
        index_of(XAttention(), inputs, 12, 16)
    with pytest.raises(ValueError, match=r"block_k must be a multiple of stride=16, .* got 24: choose block_k=32"):
        index_of(XAttention(stride=16), inputs, 16, 24)


def pairs_of(inputs: AttentionInputs, stride: int) -> int:
    """Products of a head, counted cell by cell."""
    asked = {p // stride for p in range(inputs.query_start, inputs.query_start + inputs.queries)}
    return sum(stride for p in asked for _ in range(p + 1))


@pytest.mark.parametrize("stride", [4, 8, 16])
def test_the_estimate_costs_one_product_in_stride(stride: int) -> None:
    for fields in ({"queries": 250}, {"queries": 64}, {"queries": 90, "keys": 251}, {"queries": 1}):
        inputs = make_inputs(head_dim=8, **fields)
        assert XAttention(stride=stride).estimator_products(inputs, BlockGrid.of(inputs, 16, 16)) == pairs_of(
            inputs, stride
        )
    inputs = make_inputs(query_heads=1, kv_heads=1, queries=4096, head_dim=8)
    grid = BlockGrid.of(inputs, 64, 64)
    tiles = 64 * 65 // 2
    assert estimator_work(XAttention(stride=stride), inputs, grid, tiles) == pytest.approx(1 / (2 * stride), rel=0.02)
    for device, factor in OVERHEAD.items():
        stated = XAttention(stride=stride).expected_overhead(torch.device(device), 128, 64, 64)
        assert stated.share == pytest.approx(factor / (2 * stride) + RATES[device].tile / 128 / 64**2)


def test_the_expected_density() -> None:
    assert XAttention(keep=0.2).expected_density(1 << 20) == pytest.approx(0.2)
    assert XAttention(0.9).expected_density(1 << 20) == 0.5
    assert XAttention(1.0).expected_density(1 << 20) == 1.0
    assert XAttention((1.0, 0.5)).expected_density(1 << 20) == 0.75
    assert XAttention(0.0).expected_density(1 << 20) == XAttention(keep=128).expected_density(1 << 20) < 0.001
    for pattern in (XAttention(0.9), XAttention(keep=0.01), XAttention(0.0)):
        assert pattern.expected_density(128) == 1.0, "what is forced is all there is"
    inputs = make_inputs(query_heads=2, kv_heads=1, queries=1024, head_dim=8)
    for pattern in (XAttention(0.0), XAttention(keep=0.3), XAttention(keep=256)):
        mask = index_of(pattern, inputs, 64, 64).to_mask()
        assert float(mask.float().mean()) * 16 / 17 * 2 <= pattern.expected_density(1024) + 2 * 64 / 1024


def test_gradients_are_not_tracked() -> None:
    inputs = make_inputs(queries=100, head_dim=8)
    inputs.query.requires_grad_()
    index = index_of(PATTERNS["threshold"], inputs)
    assert index.unjudged is not None
    assert math.prod(index.unjudged.shape) == 4
