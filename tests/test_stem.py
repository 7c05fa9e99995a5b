"""Stem: its blocks against the definition in loops, the contract of selectors, and what is special to it."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from slow_stem import slow_schedule, slow_stem
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
from sparseprefill.contracts import BlockGrid
from sparseprefill.estimators import MeanPooled, phase_means
from sparseprefill.estimators.phase_means import PhaseMeans
from sparseprefill.patterns import Dense, LastRowsDense, PerHead
from sparseprefill.patterns.nested import build_indexes
from sparseprefill.patterns.stem import Stem
from support import left_padding, make_inputs

PATTERNS = {
    "share": Stem(keep=0.3, stride=4, sink=16, local=16),
    "decay": Stem(keep=0.5, decay=0.4, stride=4, sink=0, local=32, value_bonus=1.0),
    "tokens": Stem(keep=48, stride=4, sink=32, local=0, value_bonus=0),
    "stride-2": Stem(keep=0.3, decay=0.7, stride=2, sink=0, local=0),
}


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        *(("decay", name) for name in INPUTS),
        *((pattern, name) for pattern in PATTERNS if pattern != "decay" for name in ("holes", "chunk", "window")),
    ],
)
def test_equals_the_slow_definition_in_float64(pattern: str, name: str) -> None:
    assert_equals_slow(PATTERNS[pattern], slow_stem, name, 16, 16)


@pytest.mark.parametrize("name", ["holes", "chunk"])
@pytest.mark.parametrize("sizes", TILES[1:], ids=str)
def test_equals_the_slow_definition_on_rectangles(sizes: tuple[int, int], name: str) -> None:
    assert_equals_slow(PATTERNS["decay"], slow_stem, name, *sizes)


@pytest.mark.parametrize(("name", "sizes"), ON_TILES, ids=str)
def test_lists_are_legal_and_the_full_budget_is_dense(name: str, sizes: tuple[int, int]) -> None:
    assert_legal(PATTERNS["decay"], Stem(keep=1.0, decay=0.5, stride=4), name, *sizes)
    inputs = make_inputs(head_dim=8, **INPUTS[name])
    dense = index_of(Dense(), inputs, *sizes).to_mask()
    for full in (Stem(stride=4), Stem(rate=1.0, stride=4), Stem(keep=10**6, stride=4, decay=0.3)):
        assert torch.equal(index_of(full, inputs, *sizes).to_mask(), dense)


@pytest.mark.parametrize("pattern", ["decay", "tokens"])
def test_batch_rows_are_independent_of_padding_on_the_right(pattern: str) -> None:
    assert_batch_rows_are_independent(PATTERNS[pattern], True)


@pytest.mark.parametrize("sizes", TILES, ids=str)
def test_it_looks_ahead_by_the_bonus_and_by_the_budget(sizes: tuple[int, int]) -> None:
    plain: dict[str, Any] = {"keep": 64, "stride": 4, "sink": 16, "local": 0, "value_bonus": 0}
    assert not looks_ahead(Stem(**plain), *sizes)
    assert looks_ahead(Stem(**plain | {"value_bonus": 2.0}), *sizes)
    assert looks_ahead(Stem(**plain | {"keep": 128, "decay": 0.4}), *sizes)
    assert looks_ahead(Stem(**plain | {"keep": 0.3}), *sizes)


@pytest.mark.parametrize("sizes", [(16, 16), (16, 32), (32, 16)], ids=str)
def test_chunks_choose_what_one_prefill_would_where_it_does_not_look_ahead(sizes: tuple[int, int]) -> None:
    inputs = make_inputs(queries=192, head_dim=8, dtype=torch.float64)
    whole = index_of(PATTERNS["tokens"], inputs, *sizes).to_mask()
    for edge in range(sizes[0], 192, sizes[0]):
        for start, stop in ((0, edge), (edge, 192)):
            index = index_of(PATTERNS["tokens"], chunk_of(inputs, start, stop), *sizes)
            first, rows, blocks = start // sizes[0], index.grid.rows, index.grid.key_blocks
            assert torch.equal(index.to_mask(), whole[:, :, first : first + rows, :blocks])


def test_the_last_chunk_chooses_what_one_prefill_would() -> None:
    """It sees as long a prompt, and the values of all of it."""
    inputs = make_inputs(queries=192, head_dim=8, dtype=torch.float64)
    whole = index_of(PATTERNS["decay"], inputs).to_mask()
    for start in range(16, 192, 16):
        last = index_of(PATTERNS["decay"], chunk_of(inputs, start, 192)).to_mask()
        assert torch.equal(last, whole[:, :, start // 16 :])


@pytest.mark.parametrize("stride", [1, 2, 4, 8, 16])
def test_means_of_phases_are_means_of_antidiagonals(stride: int) -> None:
    """As published: scores of all cells first, then the mean over those of a tile, acausal ones of the diagonal too."""
    inputs = make_inputs(query_heads=2, kv_heads=1, queries=160, head_dim=8, dtype=torch.float64)
    grid = BlockGrid.of(inputs, 16, 32)
    scores = PhaseMeans(stride, 0).prepare(inputs, grid).scores(0, grid.rows)
    query = inputs.query.unflatten(2, (-1, stride)).flip(3).flatten(3)
    key = inputs.key.unflatten(2, (-1, stride)).flatten(3)
    cells = query @ key.mT * inputs.scale / stride
    tiles = cells.unflatten(2, (10, -1)).unflatten(4, (5, -1)).mean((3, 5))
    before = torch.arange(5) < (torch.arange(1, 11)[:, None] * 16) // 32  # blocks that end before the row does
    torch.testing.assert_close(scores[:, :, before], tiles[:, :, before], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "sizes"), ON_TILES, ids=str)
def test_stride_1_without_bonus_is_the_mean_pooled_score(name: str, sizes: tuple[int, int]) -> None:
    inputs = make_inputs(head_dim=8, dtype=torch.float64, **INPUTS[name])
    grid = BlockGrid.of(inputs, *sizes)
    scores, wanted = (
        PhaseMeans(1, 0).prepare(inputs, grid).scores(0, grid.rows),
        MeanPooled().scores(inputs, grid, 0, grid.rows),
    )
    visible = grid.visible_block_mask(inputs)[:, None].expand_as(scores)
    torch.testing.assert_close(scores[visible], wanted[visible], rtol=1e-12, atol=1e-14)


def test_the_bonus_by_hand() -> None:
    """Cells of 2 keys, of which five are real; logs of their longest values 0, 0, 0, 0, 2: mean 0.4, deviation 0.8."""
    inputs = make_inputs(batch=1, query_heads=1, kv_heads=1, queries=12, head_dim=4, dtype=torch.float64)
    length = torch.tensor([1, 1, 0.5, 1, 1, 0, 1, 1, torch.e**2, 3, 100, 100])
    value = inputs.value / inputs.value.norm(dim=-1, keepdim=True) * length[:, None]
    valid = torch.tensor([[True] * 10 + [False] * 2])
    inputs = dataclasses.replace(inputs, value=value, key_valid=valid)
    grid = BlockGrid.of(inputs, 4, 4)
    bonus = PhaseMeans(2, 0.2).prepare(inputs, grid).bonus
    assert bonus is not None
    # z of the long cell is (2 - 0.4) / 0.8 = 2; its block has one real cell
    torch.testing.assert_close(bonus, torch.tensor([[[0.0, 0.0, 0.4]]], dtype=torch.float64), atol=1e-5, rtol=0)
    scores, plain = (PhaseMeans(2, w).prepare(inputs, grid).scores(0, grid.rows) for w in (0.2, 0.0))
    torch.testing.assert_close(scores - plain, bonus[:, :, None].expand_as(scores))
    same = dataclasses.replace(inputs, value=value / length[:, None].clamp(min=1e-3) * 5, key_valid=None)
    same.value[:, :, 5] = same.value[:, :, 4]
    flat = PhaseMeans(2, 0.2).prepare(same, grid).bonus
    assert flat is not None
    assert flat.abs().max() < 1e-6, "values that are alike earn nothing"


def test_long_values_are_kept_first() -> None:
    inputs = make_inputs(queries=256, head_dim=8)
    inputs.value[:, :, 96:112] *= 50
    with_bonus, without = (
        index_of(Stem(keep=48, stride=4, sink=0, local=0, value_bonus=w), inputs).to_mask() for w in (20.0, 0.0)
    )
    assert with_bonus[:, :, 6:, 6].all()
    assert not without[:, :, 6:, 6].all()


DENSITIES = {
    8: (0.88, 0.81), 16: (0.67, 0.60), 32: (0.38, 0.33), 64: (0.29, 0.25), 128: (0.24, 0.21), 256: (0.22, 0.18),
    1024: (0.20, 0.17),
}  # fmt: skip


def budgets(pattern: Stem, tokens: int, block: int = 128) -> list[int]:
    rows = torch.arange(-(-tokens // block))[None]
    found: list[int] = pattern.row_budgets(torch.tensor([tokens]), rows, block, block)[0].tolist()
    return found


@pytest.mark.parametrize("length", DENSITIES)
@pytest.mark.parametrize("decay", [1.0, 0.7])
def test_the_published_densities(decay: float, length: int) -> None:
    """Of budgets alone, without what is forced."""
    blocks = length * 8
    found = budgets(Stem(decay=decay), length * 1024)
    assert found == slow_schedule(blocks, decay)
    assert all(later <= earlier for earlier, later in itertools.pairwise(found))
    assert min(found) >= 1
    density = sum(min(m + 1, each) for m, each in enumerate(found)) / sum(range(1, blocks + 1))
    assert round(density, 2) == DENSITIES[length][decay != 1]


def test_the_published_schedule_at_every_short_length() -> None:
    for blocks in (*range(1, 200), 255, 256, 1000, 1001):
        for decay in (1.0, 0.7, 0.05):
            assert budgets(Stem(decay=decay), blocks * 128) == slow_schedule(blocks, decay)
            assert budgets(Stem(decay=decay), blocks * 128 - 127) == slow_schedule(blocks, decay)


@pytest.mark.parametrize("block", [16, 32, 64, 256])
def test_the_schedule_does_not_depend_on_the_tile(block: int) -> None:
    """But for rounding: up to whole blocks in K, down in each row, and rows of other lengths."""
    for tokens in (6000, 9000, 20000, 50000):
        wide = budgets(Stem(decay=0.5), tokens)
        for row, own in enumerate(budgets(Stem(decay=0.5), tokens, block)):
            there = wide[min(row * block // 128, len(wide) - 1)] * 128
            assert abs(own * block - there) <= 2 * max(block, 128) + 0.5 * max(block, 128)


@pytest.mark.parametrize("sizes", [(64, 128), (128, 32), (32, 128)], ids=str)
def test_the_schedule_on_rectangles_is_one_of_tokens(sizes: tuple[int, int]) -> None:
    pattern, tokens = Stem(keep=4096, decay=0.5), torch.tensor([16384])
    found = pattern.row_budgets(tokens, torch.arange(16384 // sizes[0])[None], *sizes)[0] * sizes[1]
    begin = torch.arange(0, 16384, sizes[0])
    wanted = 4096 - 2048 * (begin - 4096).clamp(min=0) / (16384 - sizes[0] - 4096)
    assert ((wanted - found >= -1e-6) & (wanted - found < sizes[1])).all()
    assert found[0] == 4096
    assert found[-1] == 2048


def test_less_decay_computes_more() -> None:
    inputs = make_inputs(query_heads=2, kv_heads=1, queries=1024, head_dim=8)
    patterns = [Stem(keep=0.5, decay=d, stride=4, sink=16, local=16) for d in (1.0, 0.7, 0.4, 0.1)]
    masks = [index.to_mask() for _, index in build_indexes(patterns, inputs, BlockGrid.of(inputs, 16, 16))]
    counts = [int(mask.sum()) for mask in masks]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == 4
    for more, less in itertools.pairwise(masks):
        assert (more | ~less).all()


@pytest.mark.parametrize("decay", [1.0, 0.7, 0.3])
@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 0.9, 1.0])
def test_a_budget_for_a_density(density: float, decay: float) -> None:
    pattern = Stem.for_density(density, decay, stride=4, sink=0, local=0)
    assert pattern.decay == decay
    assert isinstance(pattern.keep, float)
    if decay == 1:
        assert 2 * pattern.keep - pattern.keep**2 == pytest.approx(density)
    blocks = 4000  # fine enough that whole blocks do not show
    found = budgets(pattern, blocks * 128)
    reached = sum(min(m + 1, each) for m, each in enumerate(found)) / sum(range(1, blocks + 1))
    assert reached == pytest.approx(density, abs=2e-3)
    for bad in (0, 1.5):
        with pytest.raises(ValueError, match=r"density must be in \(0, 1\]"):
            Stem.for_density(bad)


def test_the_expected_density() -> None:
    for length, (whole, falling) in DENSITIES.items():
        for decay, wanted in ((1.0, whole), (0.7, falling)):
            stated = Stem(decay=decay, sink=0, local=0).expected_density(length * 1024)
            assert stated == pytest.approx(wanted, abs=0.015)
            assert Stem(decay=decay).expected_density(length * 1024) >= stated
    assert Stem().expected_density(7000) == 1.0
    assert Stem(keep=1.0).expected_density(1 << 20) == 1.0
    assert Stem(keep=64).expected_density(512) == 1.0, "sink and window are all there is"
    assert Stem(decay=(1.0, 0.5)).expected_density(1 << 17) == Stem(decay=1.0).expected_density(1 << 17)
    inputs = make_inputs(query_heads=2, kv_heads=1, queries=2048, head_dim=8)
    for pattern in (Stem(keep=0.2, decay=0.5, sink=64, local=64), Stem(keep=256, sink=0, local=100, decay=0.3)):
        mask = index_of(pattern, inputs, 64, 64).to_mask()
        assert float(mask.float().mean()) * 32 / 33 * 2 <= pattern.expected_density(2048) + 2 * 64 / 2048


def test_layers() -> None:
    pattern = Stem(keep=0.3, decay=(1.0, 0.9, 0.5), dense_first=1)
    assert pattern.for_layer(0) == Dense()
    assert pattern.for_layer(1) == Stem(keep=0.3, decay=0.9)
    assert pattern.for_layer(2) == Stem(keep=0.3, decay=0.5)
    assert Stem(keep=0.3).for_layer(7) == Stem(keep=0.3)
    assert Stem(decay=[1.0, 0.9]) == Stem(decay=(1.0, 0.9))  # type: ignore[arg-type]
    assert LastRowsDense(pattern, 5).for_layer(1) == LastRowsDense(Stem(keep=0.3, decay=0.9), 5)
    with pytest.raises(ValueError, match="decay has 3 numbers, one for each layer, and none for layer 3"):
        pattern.for_layer(3)
    inputs = make_inputs(queries=100, head_dim=8)
    for unresolved in (Stem(decay=(1.0, 0.5)), Stem(dense_first=2)):
        with pytest.raises(ValueError, match="take the pattern that for_layer"):
            index_of(unresolved, inputs)


def test_what_is_not_finite_is_kept_and_counted() -> None:
    inputs = make_inputs(queries=240, head_dim=8)
    clean = index_of(PATTERNS["tokens"], inputs)
    assert clean.unjudged is not None
    assert clean.unjudged.tolist() == [[0] * 4]
    for value in (torch.nan, torch.inf):
        dirty = dataclasses.replace(inputs, key=inputs.key.clone(), query=inputs.query.clone())
        dirty.key[:, 1, 100] = value  # of row 6, and seen from there on
        dirty.query[:, 0, 20] = value  # of row 1
        index = index_of(PATTERNS["tokens"], dirty)
        assert index.unjudged is not None
        assert index.unjudged.tolist() == [[16, 0, 240 - 96, 240 - 96]]
        mask, dense = index.to_mask(), index_of(Dense(), inputs).to_mask()
        assert torch.equal(mask[:, 2:, 6:], dense[:, 2:, 6:])
        assert torch.equal(mask[:, 0, 1], dense[:, 0, 1])
        assert torch.equal(mask[:, 1], clean.to_mask()[:, 1])
        assert torch.equal(mask[:, :, 2:6], clean.to_mask()[:, :, 2:6])
    dirty = dataclasses.replace(inputs, value=inputs.value.clone())
    dirty.value[:, 0, 200] = torch.nan
    unjudged = index_of(PATTERNS["share"], dirty).unjudged
    assert unjudged is not None
    assert unjudged.tolist() == [[240, 240, 0, 0]], "a length that is none has no deviation from the mean"
    assert torch.equal(index_of(PATTERNS["tokens"], dirty).to_mask(), clean.to_mask()), (
        "without a bonus no value is read"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_run_dtypes_differ_only_at_the_cut(dtype: torch.dtype) -> None:
    inputs = make_inputs(query_heads=2, kv_heads=1, queries=320, head_dim=16, dtype=dtype)
    exact = dataclasses.replace(inputs, **{n: getattr(inputs, n).double() for n in ("query", "key", "value")})
    grid = BlockGrid.of(inputs, 16, 16)
    scores, wanted = (PhaseMeans(4).prepare(i, grid).scores(0, grid.rows) for i in (inputs, exact))
    error = (scores - wanted).abs().max()
    assert error < 1e-5, "means are taken in float32 at least"
    pattern = Stem(keep=80, stride=4, sink=0, local=0)
    got, want = (index_of(pattern, i).to_mask() for i in (inputs, exact))
    own = torch.eye(grid.rows, dtype=torch.bool)  # the row's own block is there whatever its score
    cut = wanted.masked_fill(~want | own, torch.inf).amin(-1, keepdim=True)
    assert ((got == want) | ((wanted - cut).abs() <= 2 * error)).all()


def test_one_ranking_serves_all_budgets() -> None:
    inputs = make_inputs(batch=2, queries=200, head_dim=8, key_valid=left_padding(200, [0, 41]))
    shared: dict[str, Any] = {"stride": 4, "value_bonus": 0.5}
    patterns = [Stem(keep=0.3, **shared), Stem(keep=48, decay=0.5, sink=0, **shared), Stem(rate=0.2, **shared)]
    assert len({each.family for each in patterns}) == 1
    assert len({each.family for each in (*patterns, Stem(value_bonus=0.5), Stem(stride=4))}) == 3
    for place, index in build_indexes(patterns, inputs, BlockGrid.of(inputs, 16, 16)):
        assert torch.equal(index.to_mask(), index_of(patterns[place], inputs).to_mask())
    heads = PerHead((patterns[0], Dense(), patterns[0], patterns[1]))
    for head, pattern in enumerate(heads.patterns):
        assert torch.equal(index_of(heads, inputs).to_mask()[:, head], index_of(pattern, inputs).to_mask()[:, head])


def test_rows_and_keys_in_slabs_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(batch=2, queries=150, keys=200, query_start=50, head_dim=8, dtype=torch.float64)
    inputs = dataclasses.replace(inputs, key_valid=left_padding(200, [0, 37]))
    for sizes in ((16, 16), (16, 32)):
        whole = index_of(PATTERNS["decay"], inputs, *sizes)
        with monkeypatch.context() as patch:
            patch.setattr(phase_means, "_NUMBERS", 1)
            patch.setattr(contracts, "_SLAB_ENTRIES", 3 * 2 * 4 * whole.grid.key_blocks)
            assert torch.equal(index_of(PATTERNS["decay"], inputs, *sizes).to_mask(), whole.to_mask())
            patch.setattr(phase_means, "_NUMBERS", 1 << 24)
            assert torch.equal(index_of(PATTERNS["decay"], inputs, *sizes).to_mask(), whole.to_mask())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "keep must be at least 1"),
        ({"keep": 1.5}, "keep as a share must be in"),
        ({"keep": 0.2, "rate": 0.2}, "either keep or rate and bias"),
        ({"keep": 0.2, "bias": 0}, "either keep or rate and bias"),
        ({"rate": 0.0}, r"rate must be in \(0, 1\]"),
        ({"bias": -1}, "bias must be at least 0"),
        ({"bias": 0.5}, "bias must be a number of tokens"),
        ({"decay": 0.0}, r"decay must be in \(0, 1\]"),
        ({"decay": (0.5, 1.5)}, r"decay must be in \(0, 1\]"),
        ({"decay": ()}, "decay has no numbers"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"stride": 8.0}, "stride must be a number of tokens"),
        ({"value_bonus": -0.1}, "value_bonus must be a number of at least 0"),
        ({"value_bonus": float("inf")}, "value_bonus must be a number of at least 0"),
        ({"value_bonus": "0.2"}, "value_bonus must be a number of at least 0"),
        ({"sink": -1}, "sink must be at least 0"),
        ({"local": 0.5}, "local must be a number of tokens"),
        ({"dense_first": -1}, "dense_first must be at least 0 layers"),
        ({"dense_first": True}, "dense_first must be a number of layers"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Stem(**options)


def test_tiles_that_cut_groups_are_refused() -> None:
    inputs = make_inputs(queries=100, head_dim=8)
    with pytest.raises(ValueError, match=r"block_q must be a multiple of stride=8, .* got 12: choose block_q=16"):
        index_of(Stem(), inputs, 12, 16)


def test_the_estimate_costs_stride_products_a_tile() -> None:
    inputs = make_inputs(queries=250, head_dim=8)
    grid = BlockGrid.of(inputs, 16, 16)
    assert Stem(stride=8).estimator_products(inputs, grid) == 16 * 16 * 8 + 3 * 250
    assert Stem(stride=1, value_bonus=0).estimator_products(inputs, grid) == MeanPooled().products(inputs, grid)
