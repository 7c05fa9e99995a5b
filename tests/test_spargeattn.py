"""SpargeAttn: against its slow definition, its worked rules, what it promises, what it refuses and cannot judge."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from method_cases import INPUTS, MORE_INPUTS
from slow_spargeattn import self_similarity, slow_spargeattn

from sparseprefill import contracts
from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.estimators import mean_pooled
from sparseprefill.estimators.self_similarity import SelfSimilarity
from sparseprefill.patterns import Dense, ModelPatterns, load_patterns, save_patterns
from sparseprefill.patterns.nested import build_indexes
from sparseprefill.patterns.spargeattn import RankedBlocks, SpargeAttn
from support import left_padding, make_inputs

BLOCK = 16

PATTERNS = {
    "untuned": SpargeAttn(),
    "cdf": SpargeAttn(similarity=0.06, cdf=0.8),
    "per-head": SpargeAttn(similarity=(0.05, 0.07, 0.1, -0.1), cdf=(0.3, 0.6, 0.9, 0.5), sink=20),
    "tokens": SpargeAttn(similarity=0.045, topk=40),
}


RECTANGLES = [(32, 16), (16, 32), (48, 20)]


def index_of(pattern: Any, inputs: AttentionInputs, block_q: int = BLOCK, block_k: int = BLOCK) -> BlockIndex:
    index: BlockIndex = pattern.build_index(inputs, BlockGrid.of(inputs, block_q, block_k))
    return index


def similarities(inputs: AttentionInputs) -> SelfSimilarity:
    return SelfSimilarity.of(inputs, BlockGrid.of(inputs, BLOCK, BLOCK))


def assert_as_defined(
    pattern: SpargeAttn, inputs: AttentionInputs, heads: tuple[int, ...], sizes: tuple[int, int]
) -> None:
    index = index_of(pattern, inputs, *sizes)
    mask, grid = index.to_mask(), index.grid
    begin, end = grid.row_slots()
    for b in range(inputs.batch):
        first, valid = int(grid.first[b]), torch.ones(inputs.keys, dtype=torch.bool)
        valid = valid if inputs.key_valid is None else inputs.key_valid[b]
        asked = [r for r in range(grid.rows) if valid[int(begin[b, r]) : int(end[b, r])].any()]
        for h in heads:
            rows = range(first + asked[0], first + asked[-1] + 1)
            expected = slow_spargeattn(inputs, b, h, rows, pattern, sizes)
            for r in asked:
                got = set(mask[b, h, r].nonzero()[:, 0].tolist())
                assert got == expected[first + r], f"batch row {b}, head {h}, grid row {first + r}"


@pytest.mark.parametrize("name", MORE_INPUTS)  # the others: test_patterns.py
@pytest.mark.parametrize("kind", PATTERNS)
def test_equals_the_slow_definition_in_float64(kind: str, name: str) -> None:
    inputs = make_inputs(
        query_heads=4, kv_heads=2, head_dim=8, dtype=torch.float64, seed=3, **{**INPUTS, **MORE_INPUTS}[name]
    )
    assert_as_defined(PATTERNS[kind], inputs, (1, 2), (BLOCK, BLOCK))


@pytest.mark.parametrize("sizes", RECTANGLES, ids=str)
@pytest.mark.parametrize("name", ["plain", "right-padded", "chunk", "holes"])
def test_equals_the_slow_definition_on_rectangular_tiles(name: str, sizes: tuple[int, int]) -> None:
    inputs = make_inputs(
        query_heads=4, kv_heads=2, head_dim=8, dtype=torch.float64, seed=3, **{**INPUTS, **MORE_INPUTS}[name]
    )
    assert_as_defined(PATTERNS["tokens"], inputs, (0, 3), sizes)
    assert_as_defined(PATTERNS["per-head"], inputs, (1,), sizes)


def test_the_cases_have_blocks_of_both_kinds() -> None:
    inputs = make_inputs(query_heads=4, kv_heads=2, head_dim=8, dtype=torch.float64, seed=3, **INPUTS["plain"])
    for pattern in (PATTERNS["cdf"], PATTERNS["tokens"]):
        alike = similarities(inputs).similarity > pattern.similarity
        assert alike.any()
        assert not alike.all()


class TestWorkedRules:
    """By hand, in powers of two, which floats hold exactly."""

    @pytest.mark.parametrize(
        ("cdf", "kept"),
        [
            (0.0, [1]),  # none fits: one is kept
            (0.25, [1]),
            (0.5, [1]),  # 0.5, exactly
            (0.7, [1]),  # the one that would cross it is left out
            (0.75, [1, 3]),
            (0.875, [0, 1, 3]),  # of equal ones the lower id
            (0.99, [0, 1, 3]),
            (1.0, [0, 1, 2, 3]),
        ],
    )
    def test_blocks_are_kept_while_they_are_within_the_cdf(self, cdf: float, kept: list[int]) -> None:
        """Shares 1/8, 1/2, 1/8, 1/4 of the last row; its own block, 4, has nothing, and is kept anyway."""
        inputs = make_inputs(query_heads=1, kv_heads=1, queries=5 * BLOCK, head_dim=8)
        ranked = RankedBlocks(
            rank=torch.tensor([[[[2, 0, 3, 1, 4]]]], dtype=torch.int32).expand(1, 1, 5, 5),
            reach=torch.tensor([[[[0.875, 0.5, 1.0, 0.75, 1.0]]]], dtype=torch.float64).expand(1, 1, 5, 5),
            candidate=torch.ones(1, 1, 5, 5, dtype=torch.bool),
            unknown=torch.zeros(1, 1, 5, dtype=torch.bool), whole=torch.zeros(1, 1, 5, dtype=torch.bool),
        )  # fmt: skip
        index = SpargeAttn(cdf=cdf).choose(ranked, inputs, BlockGrid.of(inputs, BLOCK, BLOCK))
        assert index.to_mask()[0, 0, 4].nonzero()[:, 0].tolist() == [*kept, 4]

    def test_the_ranking_of_a_row(self) -> None:
        """One query with five keys, each a block: logits ln 1, ln 4, ln 1, ln 2 and far below."""
        logits = torch.tensor([0.0, math.log(4), 0.0, math.log(2), -1000.0], dtype=torch.float64)
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        inputs = AttentionInputs(
            one, logits[None, None, :, None], logits[None, None, :, None], scale=1.0, query_start=4
        )
        ranked = SpargeAttn().estimate(inputs, BlockGrid.of(inputs, 1, 1))
        assert ranked.rank.flatten().tolist() == [2, 0, 3, 1, 4]
        reach = torch.tensor([0.875, 0.5, 1.0, 0.75, 1.0], dtype=torch.float64)  # of 1/2, 1/4, 1/8, 1/8 and nothing
        torch.testing.assert_close(ranked.reach.flatten(), reach)

    def test_similarity(self) -> None:
        """Two unit vectors at an angle: (1 + cos) / 2. A zero vector has cosine 0, with itself too."""
        for other, expected in (([1.0, 0], 1.0), ([0, 1.0], 0.5), ([-1.0, 0], 0.0), ([0, 0], 0.25), ([3.0, 4.0], 0.8)):
            query = torch.tensor([[2.0, 0], other])[None, None]
            inputs = AttentionInputs(query, query, query, scale=1.0)
            grid = BlockGrid.of(inputs, 2, 2)
            found = SelfSimilarity.of(inputs, grid).scores(0, 1).query_similarity
            assert float(found) == pytest.approx(expected)
            assert self_similarity(query[0, 0]) == pytest.approx(expected)

    def test_keys_are_compared_less_their_mean(self) -> None:
        key = torch.tensor([[5.0, 1.0], [5.0, 1.0], [5.0, -1.0], [5.0, -1.0]])[None, None]  # the mean is (5, 0)
        inputs = AttentionInputs(key, key, key, scale=1.0)
        assert SelfSimilarity.of(inputs, BlockGrid.of(inputs, 4, 4)).similarity.tolist() == [[[0.0]]]
        assert SelfSimilarity.of(inputs, BlockGrid.of(inputs, 2, 2)).similarity.tolist() == [[[1.0, 1.0]]]


@pytest.mark.parametrize("kind", PATTERNS)
def test_what_all_keys_have_in_common_does_not_matter(kind: str) -> None:
    """The similarity is of keys less their mean, and a softmax does not see it."""
    inputs = make_inputs(query_heads=4, kv_heads=2, queries=250, head_dim=8, dtype=torch.float64, seed=3)
    shift = 3 * torch.randn(1, 2, 1, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    moved = dataclasses.replace(inputs, key=inputs.key + shift)
    assert torch.equal(index_of(PATTERNS[kind], moved).to_mask(), index_of(PATTERNS[kind], inputs).to_mask())


@pytest.mark.parametrize("sizes", [(BLOCK, BLOCK), *RECTANGLES], ids=str)
def test_similarity_at_its_ends(sizes: tuple[int, int]) -> None:
    """-1: every block is judged; 1: none is, and all are kept, though blocks of one token are as alike as can be."""
    inputs = make_inputs(queries=193, head_dim=8)
    dense = index_of(Dense(), inputs, *sizes).to_mask()
    for pattern in (SpargeAttn(similarity=1.0, topk=1), SpargeAttn(similarity=1.0, cdf=0.0)):
        assert torch.equal(index_of(pattern, inputs, *sizes).to_mask(), dense)
    judged = index_of(SpargeAttn(similarity=-1.0, cdf=0.0), inputs, *sizes).to_mask()
    own = -(-sizes[0] // sizes[1]) + 1
    assert (judged.sum(-1) <= 1 + own).all()
    assert torch.equal(judged, index_of(SpargeAttn(similarity=-0.1, cdf=0.0), inputs, *sizes).to_mask())
    same = dataclasses.replace(inputs, key=inputs.key[:, :, :1].expand_as(inputs.key))
    same = dataclasses.replace(same, query=inputs.query[:, :, :1].expand_as(inputs.query))
    assert torch.equal(index_of(SpargeAttn(similarity=1.0, topk=1), same, *sizes).to_mask(), dense)


def test_key_blocks_that_are_not_alike_are_kept_by_all_and_queries_keep_all() -> None:
    inputs = make_inputs(query_heads=2, kv_heads=1, queries=256, head_dim=8, dtype=torch.float64)
    inputs = dataclasses.replace(inputs, key=inputs.key[:, :, ::BLOCK].repeat_interleave(BLOCK, 2))
    inputs = dataclasses.replace(inputs, query=inputs.query[:, :, ::BLOCK].repeat_interleave(BLOCK, 2))
    pattern = SpargeAttn(similarity=0.9, topk=BLOCK)
    kept = index_of(pattern, inputs).to_mask()
    assert (kept.sum(-1) <= 2).all()  # the best one, and the row's own
    mixed = torch.randn(1, 1, BLOCK, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs.key[:, :, 5 * BLOCK : 6 * BLOCK] = mixed
    kept = index_of(pattern, inputs).to_mask()
    assert kept[:, :, 5:, 5].all()
    assert (kept.sum(-1) <= 3).all()
    inputs.query[:, 1:, 9 * BLOCK : 10 * BLOCK] = mixed
    kept = index_of(pattern, inputs).to_mask()
    assert kept[0, 1, 9, :10].all()
    assert (kept.sum(-1) <= 3).sum() == 31
    index = index_of(pattern, inputs)
    assert index.unjudged is not None
    assert not index.unjudged.any(), "that is a judgement"


def test_a_row_all_of_whose_blocks_are_unlike_keeps_them_all() -> None:
    inputs = make_inputs(queries=250, head_dim=8)
    inputs = dataclasses.replace(inputs, query=inputs.query[:, :, :1].expand_as(inputs.query))
    for options in ({"cdf": 0.5}, {"topk": 0.1}):
        index = index_of(SpargeAttn(similarity=0.99, **options), inputs)  # type: ignore[arg-type]
        assert torch.equal(index.to_mask(), index_of(Dense(), inputs).to_mask())
        assert index.unjudged is not None
        assert not index.unjudged.any()


def test_sink_and_own_blocks_are_kept() -> None:
    inputs = make_inputs(queries=250, head_dim=8)
    for sizes in [(BLOCK, BLOCK), *RECTANGLES]:
        kept = index_of(SpargeAttn(cdf=0.0, sink=20), inputs, *sizes).to_mask()
        block = torch.arange(kept.shape[-1]) * sizes[1]
        assert kept[..., block < 20][:, :, 1:].all()
        for m in range(kept.shape[2]):
            own = (block + sizes[1] > m * sizes[0]) & (block < min((m + 1) * sizes[0], 250))
            assert kept[:, :, m, own].all()


@pytest.mark.parametrize("what", ["key inf", "key nan", "query inf", "query nan"])
def test_what_is_not_finite_is_kept_whole_and_counted(what: str) -> None:
    """A key spoils the mean of its head's keys; a query the row that it stands in."""
    inputs = make_inputs(queries=250, head_dim=8)
    name, bad = what.split()
    getattr(inputs, name)[0, 0, 100, 3] = float(bad)
    dense, clean = index_of(Dense(), inputs).to_mask(), make_inputs(queries=250, head_dim=8)
    for pattern in PATTERNS.values():
        index = index_of(pattern, inputs)
        index.validate(inputs)
        expected = index_of(pattern, clean).to_mask()
        if name == "key":
            expected[:, :2] = dense[:, :2]
        else:
            expected[:, 0, 6] = dense[:, 0, 6]
        assert torch.equal(index.to_mask(), expected)
        assert index.unjudged is not None
        assert index.unjudged[0].tolist() == ([250, 250, 0, 0] if name == "key" else [16, 0, 0, 0])


def test_chunks_of_whole_rows_choose_alike_where_all_blocks_are_judged() -> None:
    inputs = make_inputs(queries=256, head_dim=8)
    for kind, pattern in PATTERNS.items():
        whole = index_of(pattern, inputs).to_mask()
        for start, stop in itertools.pairwise([0, 96, 160, 256] if kind == "untuned" else [0, 90, 101, 256]):
            cut = {n: getattr(inputs, n)[:, :, :stop] for n in ("key", "value")}
            chunk = dataclasses.replace(inputs, query=inputs.query[:, :, start:stop], query_start=start, **cut)
            index = index_of(pattern, chunk)
            index.validate(chunk)
            if kind == "untuned":
                rows = slice(start // BLOCK, start // BLOCK + index.grid.rows)
                assert torch.equal(index.to_mask(), whole[:, :, rows, : index.grid.key_blocks])


@pytest.mark.parametrize("sizes", [(BLOCK, BLOCK), *RECTANGLES], ids=str)
def test_it_looks_ahead_only_through_the_mean_key(sizes: tuple[int, int]) -> None:
    before = make_inputs(queries=250, head_dim=8, seed=1)
    changed = {"untuned": False, "tokens": False}
    for edge in (96, 192):  # ends of rows
        m = edge // sizes[0] - 1
        later = {n: getattr(before, n).clone() for n in ("query", "key", "value")}
        for tensor in later.values():
            tensor[:, :, edge:] = 3.0 - 7.0 * tensor[:, :, edge:]
        after = dataclasses.replace(before, **later)
        for kind in changed:
            a, b = (index_of(PATTERNS[kind], i, *sizes).to_mask()[:, :, : m + 1] for i in (before, after))
            changed[kind] |= not torch.equal(a, b)
    assert changed == {"untuned": False, "tokens": True}


def test_block_means_do_not_notice_what_padding_and_an_empty_cache_hold() -> None:
    """Also for block_sparse, which takes them from the same place."""
    inputs = make_inputs(batch=2, queries=110, keys=320, query_start=50, key_length=160, head_dim=8)
    inputs = dataclasses.replace(inputs, key_valid=left_padding(320, [0, 70]))
    grid = BlockGrid.of(inputs, BLOCK, BLOCK)
    before = mean_pooled.MeanPooled().scores(inputs, grid, 0, grid.rows)
    inputs.key[:, :, 160:], inputs.key[1, :, :70], inputs.query[1, :, :20] = torch.nan, torch.nan, torch.nan
    assert torch.equal(mean_pooled.MeanPooled().scores(inputs, grid, 0, grid.rows), before)


@pytest.mark.parametrize("kind", PATTERNS)
def test_slabs_do_not_show(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(batch=2, query_heads=4, kv_heads=2, queries=150, keys=200, query_start=50)
    inputs = dataclasses.replace(inputs, key_valid=left_padding(200, [0, 37]))
    for sizes in ((BLOCK, BLOCK), (48, 20)):
        grid = BlockGrid.of(inputs, *sizes)
        monkeypatch.undo()
        whole = PATTERNS[kind].build_index(inputs, grid)
        monkeypatch.setattr(contracts, "_SLAB_ENTRIES", 3 * 2 * 4 * grid.key_blocks)
        monkeypatch.setattr(mean_pooled, "_SLAB_NUMBERS", 2 * 4 * 32 * sizes[0])
        cut = PATTERNS[kind].build_index(inputs, grid)
        cut.validate(inputs)
        assert torch.equal(cut.to_mask(), whole.to_mask())


def test_a_sweep_shares_one_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(batch=2, queries=200, head_dim=8, key_valid=left_padding(200, [0, 75]))
    grid = BlockGrid.of(inputs, BLOCK, BLOCK)
    patterns = [
        SpargeAttn(similarity, **options) for similarity in (-0.1, 0.05)
        for options in ({}, {"topk": 0.2}, {"topk": 64, "sink": 16}, {"cdf": 0.9}, {"cdf": (0.1, 0.2, 0.3, 1.0)})
    ]  # fmt: skip
    wanted = [pattern.build_index(inputs, grid) for pattern in patterns]
    made: list[float] = []
    estimate = SpargeAttn.estimate
    monkeypatch.setattr(
        SpargeAttn, "estimate", lambda self, *given: made.append(self.similarity) or estimate(self, *given)
    )
    for place, index in build_indexes(patterns, inputs, grid):
        assert torch.equal(index.to_mask(), wanted[place].to_mask())
        assert torch.equal(index.unjudged, wanted[place].unjudged)
    assert made == [-0.1, 0.05]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_run_dtypes_differ_only_at_the_cut(dtype: torch.dtype) -> None:
    inputs = make_inputs(query_heads=2, kv_heads=1, queries=320, head_dim=16, dtype=dtype)
    exact = dataclasses.replace(inputs, **{n: getattr(inputs, n).double() for n in ("query", "key", "value")})
    low, high = (similarities(i).scores(0, 20) for i in (inputs, exact))
    error = (low.logits - high.logits).abs().max()
    assert error < 1e-5, "means are taken in float32 at least"
    for name in ("query_similarity", "key_similarity"):
        assert (getattr(low, name) - getattr(high, name)).abs().max() < 1e-5
    pattern = SpargeAttn(topk=80)
    got, want = (index_of(pattern, i).to_mask() for i in (inputs, exact))
    cut = high.logits.masked_fill(~want, torch.inf).amin(-1, keepdim=True)
    assert ((got == want) | ((high.logits - cut).abs() <= 2 * error)).all()
    pattern = SpargeAttn(cdf=0.6)
    got, want = (index_of(pattern, i).to_mask() for i in (inputs, exact))
    share, reach = high.logits.masked_fill(~_visible(inputs), -torch.inf).softmax(-1), _reach(exact)
    assert ((got == want) | ((reach - 0.6).abs() <= share + 1e-4)).all()


def _visible(inputs: AttentionInputs) -> torch.Tensor:
    return BlockGrid.of(inputs, BLOCK, BLOCK).visible_block_mask(inputs)[:, None]


def _reach(inputs: AttentionInputs) -> torch.Tensor:
    return SpargeAttn().estimate(inputs, BlockGrid.of(inputs, BLOCK, BLOCK)).reach


def test_nothing_is_read_back_from_a_device() -> None:
    """Tensors without storage: whoever asks for a value gets an error."""
    valid = torch.ones(2, 250, dtype=torch.bool, device="meta")
    inputs = make_inputs(batch=2, queries=250, head_dim=8, device="meta", key_valid=valid)
    for pattern, sizes in ((PATTERNS["per-head"], (48, 20)), (PATTERNS["tokens"], (BLOCK, BLOCK))):
        index = index_of(pattern, inputs, *sizes)
        assert index.count.shape == (2, 4, -(-250 // sizes[0]))
        assert index.columns.device.type == "meta"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"similarity": 1.1}, r"similarity must be in \[-1, 1\], got 1.1"),
        ({"similarity": math.nan}, r"similarity must be in \[-1, 1\]"),
        ({"similarity": "0"}, r"similarity must be a number in \[-1, 1\], or a tuple"),
        ({"similarity": [0.1, "0"]}, r"similarity must be a number in \[-1, 1\], or a tuple"),
        ({"similarity": [[0.1], 0.2]}, r"similarity must be a number in \[-1, 1\], or a tuple"),
        ({"similarity": (0.1, -2.0)}, r"similarity must be in \[-1, 1\], got -2.0"),
        ({"similarity": ()}, "similarity has no numbers"),
        ({"cdf": -0.1}, r"cdf must be in \[0, 1\], got -0.1"),
        ({"cdf": True}, r"cdf must be a number in \[0, 1\]"),
        ({"cdf": (0.1, None)}, r"cdf must be a number in \[0, 1\], or a tuple of them, got None"),
        ({"topk": 0}, "topk must be at least 1"),
        ({"topk": 1.5}, "topk as a share must be in"),
        ({"cdf": 0.9, "topk": 0.5}, "either a cdf or a topk, got cdf=0.9 and topk=0.5: leave one out"),
        ({"sink": -1}, "sink must be at least 0"),
        ({"pv_skip": -1.0}, "pv_skip must be at least 0 and finite"),
        ({"pv_skip": math.inf}, "pv_skip must be at least 0 and finite"),
        ({"pv_skip": "50"}, "pv_skip must be a number of at least 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        SpargeAttn(**options)


def test_similarity_is_that_of_directions() -> None:
    """Short vectors count as long ones; and not even blocks of one vector each are above 1."""
    inputs = make_inputs(queries=96, head_dim=4)
    short = dataclasses.replace(inputs, query=inputs.query * 1e-6, key=inputs.key * 1e-6)
    grid = BlockGrid.of(inputs, 16, 16)
    long, low = (SelfSimilarity.of(each, grid).scores(0, grid.rows) for each in (inputs, short))
    torch.testing.assert_close(low.query_similarity, long.query_similarity)
    torch.testing.assert_close(low.key_similarity, long.key_similarity)
    sign = torch.tensor([1.0, -1.0]).repeat(3).repeat_interleave(16)[:, None]  # the mean of all keys is 0
    one = dataclasses.replace(inputs, key=sign.expand_as(inputs.key).clone(), query=torch.ones_like(inputs.query))
    index = SpargeAttn(similarity=1.0, topk=1).build_index(one, grid)
    assert torch.equal(index.to_mask(), Dense().build_index(one, grid).to_mask())


def test_a_profile_holds_numbers_of_heads(tmp_path: Path) -> None:
    """JSON knows lists alone."""
    pattern = SpargeAttn(similarity=(0.0, 0.1), cdf=(0.5, 0.9))
    assert SpargeAttn(similarity=[0.0, 0.1], cdf=[0.5, 0.9]) == pattern  # type: ignore[arg-type]
    assert hash(SpargeAttn(similarity=[0.0, 0.1])) == hash(SpargeAttn(similarity=(0.0, 0.1)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="similarity has no numbers"):
        SpargeAttn(similarity=[])  # type: ignore[arg-type]
    profile = ModelPatterns(((pattern, pattern),))
    save_patterns(profile, tmp_path / "profile.json")
    assert load_patterns(tmp_path / "profile.json") == profile


def test_there_is_a_number_for_each_head() -> None:
    inputs = make_inputs(queries=100, head_dim=8)
    for options in ({"similarity": (0.1, 0.2)}, {"cdf": (0.5,)}):
        with pytest.raises(ValueError, match=r"has \d numbers for 4 query heads"):
            index_of(SpargeAttn(**options), inputs)  # type: ignore[arg-type]
    each = SpargeAttn(similarity=(0.0, 0.05, 0.1, 0.2), cdf=(0.2, 0.4, 0.6, 0.8))
    together = index_of(each, inputs).to_mask()
    for head in range(4):
        alone = SpargeAttn(similarity=each.similarity[head], cdf=each.cdf[head])  # type: ignore[index]
        assert torch.equal(index_of(alone, inputs).to_mask()[:, head], together[:, head])


def test_what_it_costs_and_is_expected_to_keep() -> None:
    inputs = make_inputs(queries=100, keys=250)
    assert SpargeAttn().estimator_products(inputs, BlockGrid.of(inputs, 32, 16)) == 4 * 16 + 3 * 100 + 4 * 250
    assert SpargeAttn().expected_density(1 << 17) == pytest.approx(0.5 + 2 * 64 / (1 << 17), rel=1e-3)
    assert SpargeAttn(topk=0.1, sink=64).expected_density(1 << 17) == pytest.approx(0.1 + 2 * 128 / (1 << 17), rel=1e-3)
    assert SpargeAttn(topk=4096).expected_density(1 << 17) == pytest.approx(2 * 4160 / (1 << 17), rel=0.05)
    assert SpargeAttn(cdf=0.9).expected_density(1 << 17) == pytest.approx(0.5 + 2 * 64 / (1 << 17), rel=1e-3)
    for dense in (SpargeAttn(topk=1.0), SpargeAttn(cdf=1.0), SpargeAttn(similarity=1.0)):
        assert dense.expected_density(1 << 17) == 1.0
    assert SpargeAttn().expected_density(64) == 1.0
