"""FlexPrefill: against its slow definition, its worked rules, what it promises, what it refuses and cannot judge."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from method_cases import INPUTS, MORE_INPUTS
from slow_flexprefill import asked_in, jensen_shannon, slow_flexprefill

from sparseprefill import contracts
from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.estimators import Probe
from sparseprefill.estimators import flexprefill as looking
from sparseprefill.estimators.flexprefill import BlockMaps, LastBlock, block_maps, head_slabs, ranked_maps
from sparseprefill.patterns import Dense
from sparseprefill.patterns.flexprefill import FlexPrefill, covering_blocks, within_share
from sparseprefill.patterns.nested import build_indexes
from support import left_padding, make_inputs

BLOCK = 16

PATTERNS = {
    "vertical-slash": FlexPrefill(gamma=0.6, tau=0.0, min_budget=32),
    "query-aware": FlexPrefill(gamma=0.7, tau=1.0, min_budget=32),
    "both": FlexPrefill(gamma=0.75, tau=0.1, min_budget=20, max_budget=100),
}


def index_of(pattern: Any, inputs: AttentionInputs, block: int = BLOCK) -> BlockIndex:
    index: BlockIndex = pattern.build_index(inputs, BlockGrid.of(inputs, block, block))
    return index


def last_block(inputs: AttentionInputs) -> LastBlock:
    return LastBlock.of(inputs, BlockGrid.of(inputs, BLOCK, BLOCK))


@pytest.mark.parametrize("name", MORE_INPUTS)  # the others: test_patterns.py
@pytest.mark.parametrize("kind", PATTERNS)
def test_equals_the_slow_definition_in_float64(kind: str, name: str) -> None:
    inputs = make_inputs(
        query_heads=4, kv_heads=2, head_dim=8, dtype=torch.float64, seed=3, **{**INPUTS, **MORE_INPUTS}[name]
    )
    index = index_of(PATTERNS[kind], inputs)
    mask, grid = index.to_mask(), index.grid
    for b in range(inputs.batch):
        first = int(grid.first[b])
        asked = [m for m in range(first, first + grid.rows) if asked_in(inputs, b, m, BLOCK)]
        for h in (0, 3):
            expected = slow_flexprefill(inputs, b, h, range(asked[0], asked[-1] + 1), PATTERNS[kind], BLOCK)
            for m in asked:
                got = set(mask[b, h, m - first].nonzero()[:, 0].tolist())
                assert got == expected[m], f"batch row {b}, head {h}, grid row {m}"


def test_the_cases_have_heads_of_both_kinds() -> None:
    inputs = make_inputs(query_heads=4, kv_heads=2, head_dim=8, dtype=torch.float64, seed=3, **INPUTS["plain"])
    aware = last_block(inputs).divergence < PATTERNS["both"].tau
    assert aware.any()
    assert not aware.all()


class TestWorkedRules:
    """By hand, in powers of two, which floats hold exactly."""

    def test_tokens_count_up_to_the_one_that_crosses_gamma_and_it_too(self) -> None:
        shares = torch.tensor([[0.125, 0.5, 0.125, 0.25]])
        together = looking.largest_together(shares)
        assert together.tolist() == [[0.5, 0.75, 0.875, 1.0]]
        # gamma -> sums at most gamma -> tokens: one more -> blocks of 2: tokens div 2 + 1
        for gamma, within, tokens, blocks in (
            (0.25, 0, 1, 1), (0.5, 1, 2, 2), (0.7, 1, 2, 2), (0.75, 2, 3, 2), (0.8, 2, 3, 2), (0.9, 3, 4, 3)
        ):  # fmt: skip
            assert int((together <= gamma).sum()) == within
            assert covering_blocks(together, gamma, 1).tolist() == [tokens + 1]
            assert covering_blocks(together, gamma, 2).tolist() == [blocks]

    def test_whole_blocks_of_tokens_get_one_block_more(self) -> None:
        together = torch.arange(1, 257) / 256.0
        assert covering_blocks(together, 127 / 256, 128).tolist() == 2  # 128 tokens: 128 div 128 + 1
        assert covering_blocks(together, 126 / 256, 128).tolist() == 1

    def test_tiles_are_kept_while_they_are_within_gamma_of_all_rows(self) -> None:
        shares = torch.tensor([[1.0, 0, 0], [0.625, 0.375, 0], [0.25, 0.5, 0.25], [1.0, 0, 0]], dtype=torch.float64)
        seen = shares > 0
        maps = ranked_maps(shares.log()[None, None], seen[None], torch.ones(1, 4, dtype=torch.bool))
        # ranked: (0,0) 1 | (3,0) 2 | (1,0) 2.625 | (2,1) 3.125 | (1,1) 3.5 | (2,0) 3.75 | (2,2) 4
        reach = torch.tensor([[1.0, 4, 4], [2.625, 3.5, 4], [3.75, 3.125, 4], [2, 4, 4]], dtype=torch.float64)
        torch.testing.assert_close(maps.reach[0, 0], reach)
        assert maps.judged.tolist() == [[4]]
        exact = BlockMaps(reach[None, None], maps.judged, maps.unknown)

        def kept(gamma: float) -> list[list[int]]:
            return (within_share(exact, gamma)[0, 0] & seen).nonzero().tolist()

        assert kept(0.2) == []  # 0.8 of four rows: the best tile alone has more
        assert kept(0.5) == [[0, 0], [3, 0]]  # 2, exactly
        assert kept(0.7) == [[0, 0], [1, 0], [3, 0]]  # 2.8: the tile that would cross it is left out
        assert kept(0.875) == [[0, 0], [1, 0], [1, 1], [2, 1], [3, 0]]
        assert kept(1.0) == seen.nonzero().tolist()

    def test_a_row_without_queries_and_one_that_is_not_finite_take_no_part(self) -> None:
        logits = torch.zeros(1, 2, 3, 2, dtype=torch.float64)
        logits[0, 1, 0, 1] = torch.nan
        seen = torch.ones(1, 3, 2, dtype=torch.bool)
        maps = ranked_maps(logits, seen, torch.tensor([[True, True, False]]))
        assert maps.judged.tolist() == [[2, 1]]
        assert maps.unknown.tolist() == [[[False, False, False], [True, False, False]]]
        assert maps.reach[0].tolist() == [
            [[0.5, 1.0], [1.5, 2.0], [2.0, 2.0]], [[1.0, 1.0], [0.5, 1.0], [1.0, 1.0]]
        ]  # fmt: skip

    def test_divergence(self) -> None:
        one, other = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])
        # 1/2 ln(4/3) + 1/2 (1/2 ln(2/3) + 1/2 ln 2) = 0.215762, and its root
        assert float(looking.jensen_shannon(one, other)) == pytest.approx(0.4645014, abs=1e-7)
        assert float(looking.jensen_shannon(one, one)) == 0.0
        assert float(looking.jensen_shannon(one, one.flip(0))) == pytest.approx(math.sqrt(math.log(2)))
        assert jensen_shannon([1.0, 0.0], [0.5, 0.5]) == pytest.approx(0.4645014, abs=1e-7)

    @pytest.mark.parametrize("tokens", [64, 70, 79, 65])
    def test_distances_count_for_the_line_where_the_last_query_meets_them(self, tokens: int) -> None:
        """Also the published pooling: groups counted from the farthest distance, the last of them the short one."""
        inputs = make_inputs(queries=tokens, head_dim=8, dtype=torch.float64)
        mass = Probe(BLOCK).mass(inputs)
        blocks = -(-tokens // BLOCK)
        by_line = torch.zeros(4, blocks, dtype=torch.float64)
        published = torch.zeros(4, blocks, dtype=torch.float64)
        for delta in range(tokens):
            share = mass.diagonal[0, :, delta] / BLOCK
            by_line[:, blocks - 1 - (tokens - 1 - delta) // BLOCK] += share  # its row less its key block
            published[:, (tokens - 1 - delta) // BLOCK] += share  # group g stands for line blocks - 1 - g
        torch.testing.assert_close(last_block(inputs).line[0], by_line)
        torch.testing.assert_close(last_block(inputs).line[0].flip(-1), published)


def test_a_head_with_shares_of_exactly_zero_is_judged() -> None:
    """0 log 0 is 0: block means that say exactly what the last queries do make the head query-aware."""
    inputs = make_inputs(query_heads=2, kv_heads=1, queries=256, head_dim=8)
    query, key = torch.zeros_like(inputs.query), torch.zeros_like(inputs.key)
    query[..., 0], key[:, :, :, 0] = 100.0, -100.0
    key[:, :, 48:64, 0] = 100.0  # the rest weighs exp(-7071): 0
    inputs = dataclasses.replace(inputs, query=query, key=key)
    last = last_block(inputs)
    assert (last.column == 0).sum() == 2 * 15
    assert (last.divergence < 1e-3).all()
    kept = index_of(FlexPrefill(gamma=0.9, tau=0.1, min_budget=16), inputs).to_mask()[0, 0]
    # 14.4 of the 16 that 16 rows have: tile (0, 0) and tiles (m, 3) have 1 each, and the next one, of row 1, 0.5
    assert kept[3:, 3].sum() == 13
    assert torch.equal(kept[14], (torch.arange(16) == 0) | (torch.arange(16) == 14) | (torch.arange(16) == 3))


def test_query_aware_heads_keep_the_least_columns_and_lines_and_the_best_tiles() -> None:
    inputs = make_inputs(queries=256, head_dim=8)
    divergence = last_block(inputs).divergence
    tau = float(divergence.median()) + 1e-9
    aware = divergence < tau
    assert 0 < int(aware.sum()) < aware.numel()
    mixed, columns, maps = (
        index_of(FlexPrefill(gamma=0.8, tau=t, min_budget=32), inputs).to_mask() for t in (tau, 0.0, 1.0)
    )
    for head, own in enumerate(aware[0].tolist()):
        assert torch.equal(mixed[0, head], (maps if own else columns)[0, head])
    none, some = (index_of(FlexPrefill(gamma=g, tau=1.0, min_budget=32), inputs).to_mask()[0] for g in (1e-9, 0.8))
    assert (none & ~some).sum() == 0  # what is left when no tile fits: the skeleton
    assert none[..., 0].all()
    assert none.diagonal(dim1=1, dim2=2).all()
    assert (none.sum(-1) <= 4).all()  # two columns, two lines
    assert (none[:, 15].sum(-1) >= 2).all()


def test_budgets_bound_columns_and_lines() -> None:
    inputs = make_inputs(queries=256, head_dim=8)
    kept = index_of(FlexPrefill(gamma=1.0, tau=0.0, min_budget=16, max_budget=40), inputs).to_mask()
    assert (kept.sum(-1) <= 6).all()  # three of each
    assert (kept[:, :, 15].sum(-1) >= 3).all()
    least = index_of(FlexPrefill(gamma=1e-9, tau=0.0, min_budget=100), inputs).to_mask()
    assert (least[:, :, 15].sum(-1) >= 7).all()
    one = index_of(FlexPrefill(gamma=1e-9, tau=0.0, min_budget=16), inputs).to_mask()
    own = torch.eye(16, dtype=torch.bool)
    own[:, 0] = True
    assert torch.equal(one, own.expand_as(one))  # the forced column and line count


def test_short_rows_and_single_queries_are_dense_and_counted() -> None:
    pattern = FlexPrefill(gamma=0.5, tau=0.1, min_budget=40)  # 3 blocks: rows of up to 48 keys
    inputs = make_inputs(batch=3, queries=200, head_dim=8, key_valid=left_padding(200, [0, 152, 151]))
    index = index_of(pattern, inputs)
    dense = index_of(Dense(), inputs).to_mask()
    assert torch.equal(index.to_mask()[1], dense[1])
    assert not torch.equal(index.to_mask()[0], dense[0])
    assert index.unjudged is not None
    assert index.unjudged.tolist() == [[0] * 4, [48] * 4, [0] * 4]
    small = index_of(dataclasses.replace(pattern, min_budget=1), inputs)  # never fewer than 2 blocks
    assert small.unjudged is not None
    assert small.unjudged.tolist() == [[0] * 4] * 3
    assert index_of(pattern, make_inputs(queries=32, head_dim=8)).unjudged.tolist() == [[32] * 4]  # type: ignore[union-attr]
    one = make_inputs(queries=1, keys=200, head_dim=8)
    index = index_of(pattern, one)
    assert index.unjudged is not None
    assert index.unjudged.tolist() == [[1] * 4]
    assert torch.equal(index.to_mask(), index_of(Dense(), one).to_mask())


@pytest.mark.parametrize("what", ["key inf", "key nan", "query inf", "query nan"])
def test_heads_whose_last_block_is_not_finite_are_kept_whole_and_counted(what: str) -> None:
    inputs = make_inputs(queries=250, head_dim=8)
    name, bad = what.split()
    getattr(inputs, name)[0, 0, 245, 3] = float(bad)
    touched = [0, 1] if name == "key" else [0]
    others = [head for head in range(4) if head not in touched]
    for pattern in PATTERNS.values():
        index = index_of(pattern, inputs)
        index.validate(inputs)
        assert torch.equal(index.to_mask()[:, touched], index_of(Dense(), inputs).to_mask()[:, touched])
        clean = index_of(pattern, make_inputs(queries=250, head_dim=8)).to_mask()
        assert torch.equal(index.to_mask()[:, others], clean[:, others])
        assert index.unjudged is not None
        assert index.unjudged[0].tolist() == [250 if head in touched else 0 for head in range(4)]


def test_a_query_that_is_not_finite_costs_a_query_aware_head_its_row() -> None:
    inputs = make_inputs(queries=250, head_dim=8)
    inputs.query[0, 2, 100, 1] = torch.nan
    sparser = FlexPrefill(gamma=0.4, tau=1.0, min_budget=16)
    index = index_of(sparser, inputs)
    index.validate(inputs)
    assert index.to_mask()[0, 2, 6, :7].all()
    assert index.to_mask()[0, 2, 7:].sum(-1).lt(torch.arange(8, 17)).any()  # the others choose
    assert index.unjudged is not None
    assert index.unjudged.tolist() == [[0, 0, 16, 0]]
    blind = index_of(PATTERNS["vertical-slash"], inputs)  # never looks at that query
    assert torch.equal(
        blind.to_mask(), index_of(PATTERNS["vertical-slash"], make_inputs(queries=250, head_dim=8)).to_mask()
    )
    assert blind.unjudged is not None
    assert not blind.unjudged.any()


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_it_looks_ahead(tau: float) -> None:
    """Rows share one ranking, in which later rows change what is left for the earlier ones."""
    pattern = FlexPrefill(gamma=0.4, tau=tau, min_budget=32)
    before, other = (make_inputs(queries=256, head_dim=8, seed=seed) for seed in (1, 2))
    mixed = {
        n: torch.cat([getattr(before, n)[:, :, :128], getattr(other, n)[:, :, 128:]], 2)
        for n in ("query", "key", "value")
    }
    a, b = (index_of(pattern, i).to_mask()[:, :, :8] for i in (before, dataclasses.replace(before, **mixed)))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("kind", PATTERNS)
def test_slabs_do_not_show(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(batch=2, query_heads=6, kv_heads=2, queries=150, keys=200, query_start=50)
    inputs = dataclasses.replace(inputs, key_valid=left_padding(200, [0, 37]))
    grid = BlockGrid.of(inputs, BLOCK, BLOCK)
    whole = PATTERNS[kind].build_index(inputs, grid)
    maps = list(block_maps(inputs, grid))
    assert [slab[:2] for slab in maps] == [(0, 6)]
    monkeypatch.setattr(contracts, "_SLAB_ENTRIES", 3 * 2 * 6 * grid.key_blocks)
    monkeypatch.setattr(looking, "_PROBE_ENTRIES", 2 * 2 * BLOCK * 200)
    monkeypatch.setattr(looking, "_MAP_ENTRIES", 2 * 2 * grid.rows * grid.key_blocks)
    cut = PATTERNS[kind].build_index(inputs, grid)
    cut.validate(inputs)
    assert torch.equal(cut.to_mask(), whole.to_mask())
    parts = list(block_maps(inputs, grid))
    assert [slab[:2] for slab in parts] == [(0, 2), (2, 3), (3, 5), (5, 6)]  # parts of a group, never of two
    torch.testing.assert_close(torch.cat([slab[2].reach for slab in parts], 1), maps[0][2].reach)


def test_slabs_of_heads_are_whole_groups_or_parts_of_one() -> None:
    inputs = make_inputs(query_heads=6, kv_heads=3, queries=4, sinks=torch.arange(6.0))
    for together, expected in (
        (1, [(h, h + 1) for h in range(6)]),
        (3, [(0, 2), (2, 4), (4, 6)]),
        (5, [(0, 4), (4, 6)]),
    ):
        slabs = list(head_slabs(inputs, together))
        assert [slab[:2] for slab in slabs] == expected
        for start, stop, part in slabs:
            assert torch.equal(part.query, inputs.query[:, start:stop])
            assert torch.equal(part.key, inputs.key[:, sorted({h // 2 for h in range(start, stop)})])
            assert part.sinks is not None
            assert part.sinks.tolist() == list(range(start, stop))


def test_a_sweep_shares_one_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(batch=2, queries=200, head_dim=8, key_valid=left_padding(200, [0, 75]))
    grid = BlockGrid.of(inputs, BLOCK, BLOCK)
    patterns = [
        FlexPrefill(gamma, tau, 32, most)
        for gamma in (0.5, 0.9, 1.0)
        for tau in (0.0, 0.12, 1.0)
        for most in (None, 64)
    ]
    wanted = [pattern.build_index(inputs, grid) for pattern in patterns]
    made: list[bool] = []
    estimate = FlexPrefill.estimate
    monkeypatch.setattr(
        FlexPrefill, "estimate", lambda self, *given: made.append(self.tau > 0) or estimate(self, *given)
    )
    for place, index in build_indexes(patterns, inputs, grid):
        assert torch.equal(index.to_mask(), wanted[place].to_mask())
        assert torch.equal(index.unjudged, wanted[place].unjudged)
    assert sorted(made) == [False, True]


def test_run_dtypes_differ_only_at_the_cut() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(query_heads=2, kv_heads=1, queries=320, head_dim=16, dtype=dtype, seed=4)
        exact = dataclasses.replace(inputs, **{n: getattr(inputs, n).double() for n in ("query", "key", "value")})
        low, high = last_block(inputs), last_block(exact)
        pattern = FlexPrefill(gamma=0.5, tau=0.0, min_budget=32)
        for name in ("column", "line"):
            got, want = (getattr(last, name) for last in (low, high))
            error = float((got - want).abs().max())
            assert error <= 4 * torch.finfo(dtype).eps
            got_sums, want_sums = (getattr(last, f"{name}_mass") for last in (low, high))
            counts = [covering_blocks(sums, pattern.gamma, BLOCK) for sums in (got_sums, want_sums)]
            assert torch.equal(*counts), "choose another seed: the count itself lies at its cut"
            for head in range(2):
                kept = [set(each[0, head].argsort(descending=True)[: int(counts[0][0, head])].tolist())
                        for each in (got, want)]  # fmt: skip
                cut = min(float(want[0, head, n]) for n in kept[1])
                assert all(abs(float(want[0, head, n]) - cut) <= 2 * error for n in kept[0] ^ kept[1])


def test_nothing_is_read_back_from_a_device() -> None:
    """Tensors without storage: whoever asks for a value gets an error."""
    valid = torch.ones(2, 250, dtype=torch.bool, device="meta")
    index = index_of(PATTERNS["both"], make_inputs(batch=2, queries=250, head_dim=8, device="meta", key_valid=valid))
    assert index.count.shape == (2, 4, 16)
    assert index.columns.device.type == "meta"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0.0}, r"gamma must be in \(0, 1\], got 0.0"),
        ({"gamma": 1.1}, r"gamma must be in \(0, 1\]"),
        ({"gamma": math.nan}, r"gamma must be in \(0, 1\]"),
        ({"gamma": "0.9"}, "gamma must be a number"),
        ({"tau": -0.1}, r"tau must be in \[0, 1\], got -0.1"),
        ({"tau": math.nan}, r"tau must be in \[0, 1\]"),
        ({"tau": True}, r"tau must be a number in \[0, 1\]"),
        ({"min_budget": 0}, "min_budget must be at least 1"),
        ({"min_budget": 0.1}, "min_budget must be a number of tokens"),
        ({"max_budget": 0.5}, "max_budget must be a number of tokens"),
        ({"max_budget": 100}, "max_budget=100 is less than min_budget=512: raise the one or lower the other"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        FlexPrefill(**options)


def test_tiles_that_are_not_square_are_refused() -> None:
    inputs = make_inputs(queries=100)
    with pytest.raises(ValueError, match="needs square tiles, got block_q=32 and block_k=16: choose"):
        FlexPrefill().build_index(inputs, BlockGrid.of(inputs, 32, 16))
    with pytest.raises(ValueError, match="needs square tiles"):
        FlexPrefill().estimate(inputs, BlockGrid.of(inputs, 16, 32))


def test_what_it_costs_and_is_expected_to_keep() -> None:
    inputs = make_inputs(queries=100, keys=250)
    grid = BlockGrid.of(inputs, BLOCK, BLOCK)
    last = 16 * 250 + 16  # the last queries with all keys, their mean with 16 block means
    assert FlexPrefill().estimator_products(inputs, grid) == last + 7 * 16 + 100 + 250
    assert FlexPrefill(tau=0.0).estimator_products(inputs, grid) == last + 250
    assert FlexPrefill().expected_density(512) == 1.0
    assert FlexPrefill().expected_density(1024) == pytest.approx(1.0)  # 512 of columns and 512 of lines
    assert FlexPrefill().expected_density(1 << 17) == 0.5
    assert FlexPrefill(gamma=1.0).expected_density(1 << 17) == 1.0
    bounded = FlexPrefill(tau=0.0, max_budget=1024).expected_density(1 << 17)
    assert bounded == pytest.approx(2 * 2048 / (1 << 17), rel=0.01)
    assert FlexPrefill(max_budget=1024).expected_density(1 << 17) == 0.5  # a query-aware head may keep more


def test_what_the_last_queries_see_begins_with_a_real_one() -> None:
    """The window of a slot that holds padding does not count."""
    inputs = make_inputs(query_heads=1, kv_heads=1, queries=64, head_dim=1, window=24)
    inputs.query[...], inputs.key[...] = 1.0, 0.0
    valid = torch.ones(1, 64, dtype=torch.bool)
    valid[:, 48:62] = False  # of the last 16 queries, those of slots 62 and 63 ask: they see 39 to 63
    inputs = dataclasses.replace(inputs, key_valid=valid)
    last = LastBlock.of(inputs, BlockGrid.of(inputs, 16, 16))
    # means of equal keys say: as much in block 2 as in block 3; what is true: 9 or 8 keys of block 2, 1 or 2 of block 3
    column = torch.tensor([0.0, 0.0, (9 / 10 + 8 / 10) / 2, (1 / 10 + 2 / 10) / 2], dtype=torch.float64)
    guess = torch.tensor([0.0, 0.0, 0.5, 0.5], dtype=torch.float64)
    assert float(last.divergence) == pytest.approx(float(jensen_shannon(guess, column)), abs=1e-6)
