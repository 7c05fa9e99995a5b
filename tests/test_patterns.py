"""Which blocks each method names: against slow definitions written from the papers, and the contract all share.

The slow definitions import nothing from the methods. In float64 the lists are equal, ties broken by lower id. In run
dtypes every block that differs lies within the score error of the cut.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from method_cases import BLOCK, CASES, INPUTS, slow_row, slow_window

from sparseprefill import contracts
from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.coverage import coverage
from sparseprefill.estimators import MeanPooled, Probe, TopK, keep_blocks
from sparseprefill.estimators.relative_attention import scored_blocks
from sparseprefill.estimators.selection import ranked
from sparseprefill.huggingface import patch_model
from sparseprefill.kernels import block_sparse_attention
from sparseprefill.patterns import (
    AShape,
    BlockSparse,
    Dense,
    LastRowsDense,
    ModelPatterns,
    PerHead,
    RandomBlocks,
    VerticalSlash,
    load_patterns,
    save_patterns,
)
from sparseprefill.patterns.expected_density import expected_density
from sparseprefill.patterns.flashprefill import FlashPrefill
from sparseprefill.patterns.l_mul import LMul
from sparseprefill.patterns.methods import DEFAULT_OPTIONS, METHODS
from sparseprefill.patterns.sign_code import SignCode
from sparseprefill.prefill import CostModel, kept_mass_sample, named_method, resolve_method
from support import assert_within_budget, left_padding, make_inputs


def index_of(pattern: Any, inputs: AttentionInputs, block_q: int = BLOCK, block_k: int = BLOCK) -> BlockIndex:
    index: BlockIndex = pattern.build_index(inputs, BlockGrid.of(inputs, block_q, block_k))
    return index


@pytest.mark.parametrize("segment", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("window", [0, 1, 2, 4, 5, 8])
def test_the_window_of_sale(window: int, segment: int) -> None:
    """Sink, tested segments and window are all blocks of a row, and the published arithmetic gives the same."""
    blocks = torch.arange(1, 601)
    tested = scored_blocks(blocks, segment, window).tolist()
    for n, own in zip(blocks.tolist(), tested, strict=True):
        local = n - 1 - own
        assert own % segment == 0
        assert local == slow_window(n, segment, window)
        assert min(window, n - 1) <= local < max(window, 0) + segment or local == n - 1
        whole = math.ceil((n - 1) / segment)  # as published: T segments, r <= 0 blocks over, e segments given up
        over = n - 1 - whole * segment
        published_local, published = over, whole
        if over < window:
            given_up = math.ceil((window - over) / segment)
            published_local, published = segment * given_up + over, whole - given_up
        assert 1 + published * segment + published_local == n
        if published >= 0:
            assert (published * segment, published_local) == (own, local)
        else:
            assert own == 0


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("method", [name for name, case in CASES.items() if case.slow is not None])
def test_equals_the_slow_definition_in_float64(method: str, name: str) -> None:
    case = CASES[method]
    slow = case.slow
    assert slow is not None
    inputs = make_inputs(query_heads=2, kv_heads=1, head_dim=8, dtype=torch.float64, seed=3, **INPUTS[name])
    index = index_of(case.pattern, inputs)
    mask = index.to_mask()
    for b in range(inputs.batch):
        first = int(index.grid.first[b])
        asked = [m for m in range(first, first + index.grid.rows) if slow_row(inputs, b, m)]
        end = int(inputs.tail()[b])
        real = range(asked[0], 1 + max(m for m in asked if slow_row(inputs, b, m)[0] < end))
        for h in range(2):
            expected = slow(inputs, b, h, real, case.pattern)
            for m in real:
                got = set(mask[b, h, m - first].nonzero()[:, 0].tolist())
                assert got == expected[m], f"batch row {b}, head {h}, grid row {m}"


def test_a_mass_is_that_of_the_logits_the_model_sees() -> None:
    """Soft-caps flatten a softmax, and a block that is one hole has no share in it."""
    query, key = torch.ones(1, 1, 96, 1), torch.zeros(1, 1, 96, 1)
    key[:, :, :16] = 5.0
    inputs = AttentionInputs(query, key, key, 1.0)
    pattern = BlockSparse(mass=0.9, sink=0, local=0)
    assert index_of(pattern, inputs).count[0, 0].tolist() == [1, 1, 1, 1, 1, 1]  # e ** 5 = 148 beside 1
    capped = index_of(pattern, dataclasses.replace(inputs, softcap=0.1))  # e ** 0.1 = 1.1: all but one of ten
    assert capped.count[0, 0].tolist() == [1, 2, 3, 4, 5, 6]

    key = torch.full((1, 1, 96, 1), -5.0)
    key[:, :, 16:48] = torch.nan
    valid = torch.ones(1, 96, dtype=torch.bool)
    valid[:, 16:48] = False
    index = index_of(pattern, AttentionInputs(query, key, key, 1.0, key_valid=valid))
    assert index.to_mask()[0, 0, 5].tolist() == [True, False, False, True, True, True]
    assert index.unjudged is not None
    assert not index.unjudged.any()


def test_rows_without_a_softmax_are_whole_and_counted() -> None:
    inputs = make_inputs(batch=2, query_heads=2, kv_heads=1, queries=90, key_valid=left_padding(90, [0, 21]))
    inputs.query[1, 1, 40] = torch.inf  # row 1 of batch row 1
    index = index_of(BlockSparse(mass=0.2, sink=0, local=0), inputs)
    assert index.count[1, 1, 1] == 2
    assert index.unjudged is not None
    assert index.unjudged.tolist() == [[0, 0], [0, 16]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_block_sparse_in_run_dtypes_differs_only_at_the_cut(dtype: torch.dtype) -> None:
    inputs = make_inputs(query_heads=2, kv_heads=1, queries=320, head_dim=16, dtype=dtype)
    exact = dataclasses.replace(inputs, **{n: getattr(inputs, n).double() for n in ("query", "key", "value")})
    pattern = BlockSparse(keep=80, sink=0, local=0)
    grid = BlockGrid.of(inputs, BLOCK, BLOCK)
    scores, wanted = (MeanPooled().scores(i, grid, 0, grid.rows) for i in (inputs, exact))
    error = (scores - wanted).abs().max()
    got, want = (index_of(pattern, i).to_mask() for i in (inputs, exact))
    cut = wanted.masked_fill(~want, torch.inf).amin(-1, keepdim=True)
    assert ((got == want) | ((wanted - cut).abs() <= 2 * error)).all()
    assert error < 1e-5, "means are taken in float32 at least"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_probe_in_run_dtypes_is_close_to_exact(dtype: torch.dtype) -> None:
    inputs = make_inputs(query_heads=2, kv_heads=1, queries=320, head_dim=16, dtype=dtype)
    exact = dataclasses.replace(inputs, **{n: getattr(inputs, n).double() for n in ("query", "key", "value")})
    low, high = Probe(24).mass(inputs), Probe(24).mass(exact)
    assert (low.column - high.column).abs().max() <= 24 * 4 * torch.finfo(dtype).eps
    assert (low.diagonal - high.diagonal).abs().max() <= 24 * 4 * torch.finfo(dtype).eps
    for mass in (low, high):  # each probe row spreads a mass of 1
        torch.testing.assert_close(mass.column.sum(-1), torch.full_like(mass.column[..., 0], 24), rtol=1e-2, atol=0)
        torch.testing.assert_close(mass.diagonal.sum(-1), mass.column.sum(-1))


SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"queries": 250},
    "one-query": {"queries": 1},
    "one-query-late": {"queries": 1, "keys": 100},
    "block": {"queries": BLOCK},
    "padded": {"batch": 3, "queries": 200, "key_valid": left_padding(200, [0, 75, 199])},
    "right-padded": {"batch": 2, "queries": 200, "key_valid": left_padding(200, [0, 75]).flip(1)},
    "window": {"queries": 250, "window": 100},
    "packed": {"queries": 200, "segment": torch.tensor([[0] * 90 + [1] * 110])},
    "chunk-inside-a-block": {"queries": 75, "keys": 250},
    "static-cache": {"queries": 100, "keys": 300, "query_start": 50, "key_length": 150},
}  # fmt: skip


BY_HEAD = (
    "cached", "hip", "hip-share", "layer_carry", "random", "local_stride", "local_stride-share", "vote_columns",
    "snapkv", "tokenselect", "zipvl",
)  # fmt: skip
"""What gives each head other blocks by its number, or lets heads vote together: a call with some heads is another."""


class TestSelectorContract:
    """What every method promises."""

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("method", CASES)
    def test_lists_are_legal(self, method: str, shape: str) -> None:
        inputs = make_inputs(head_dim=8, **SHAPES[shape])
        index = index_of(CASES[method].pattern, inputs)
        index.validate(inputs)  # never empty, ascending, unique, nothing of the future
        assert_within_budget(block_sparse_attention(inputs, index), inputs, index)

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("method", CASES)
    def test_full_budget_is_dense(self, method: str, shape: str) -> None:
        inputs = make_inputs(head_dim=8, **SHAPES[shape])
        index = index_of(CASES[method].full, inputs)
        assert torch.equal(index.to_mask(), index_of(Dense(), inputs).to_mask())

    @pytest.mark.parametrize("method", [name for name, case in CASES.items() if not case.square])
    def test_rectangular_tiles(self, method: str) -> None:
        inputs = make_inputs(queries=250, head_dim=8)
        for sizes in ((32, 16), (16, 32), (48, 20)):
            if any(size % CASES[method].steps for size in sizes):
                continue
            index_of(CASES[method].pattern, inputs, *sizes).validate(inputs)
            full = index_of(CASES[method].full, inputs, *sizes)
            assert torch.equal(full.to_mask(), index_of(Dense(), inputs, *sizes).to_mask())

    @pytest.mark.parametrize("method", CASES)
    def test_batch_rows_are_independent(self, method: str) -> None:
        valid = left_padding(200, [0, 75, 30])
        inputs = make_inputs(batch=3, queries=200, head_dim=8, key_valid=valid)
        for tensor in (inputs.query, inputs.key, inputs.value):  # padding may hold anything
            tensor.masked_fill_(~valid[:, None, :, None], torch.nan)
        index = index_of(CASES[method].pattern, inputs)
        assert index.unjudged is None or not index.unjudged.any()
        for b, pad in enumerate((0, 75, 30)):
            row = dataclasses.replace(
                inputs, **{n: getattr(inputs, n)[b : b + 1, :, pad:] for n in ("query", "key", "value")}, key_valid=None
            )
            alone = index_of(CASES[method].pattern, row)
            rows, blocks = alone.grid.rows, alone.grid.key_blocks
            assert torch.equal(index.to_mask()[b : b + 1, :, :rows, :blocks], alone.to_mask())

    @pytest.mark.parametrize("method", CASES)
    def test_what_lies_behind_the_filled_cache_does_not_matter(self, method: str) -> None:
        inputs = make_inputs(queries=110, keys=320, query_start=50, key_length=160, head_dim=8)
        before = index_of(CASES[method].pattern, inputs).to_mask()
        inputs.key[:, :, 160:] = torch.nan
        assert torch.equal(index_of(CASES[method].pattern, inputs).to_mask(), before)

    @pytest.mark.parametrize("method", [name for name in CASES if not name.startswith("sale")])
    def test_a_cache_that_nothing_fills_yet(self, method: str) -> None:
        inputs = make_inputs(queries=40, keys=64, query_start=0, key_length=0, head_dim=8)
        index_of(CASES[method].pattern, inputs).validate(inputs)

    @pytest.mark.parametrize("method", [m for m in CASES if m not in BY_HEAD])
    def test_grouped_heads_read_the_right_keys(self, method: str) -> None:
        grouped = make_inputs(query_heads=6, kv_heads=2, queries=200, head_dim=8)
        repeated = dataclasses.replace(
            grouped, key=grouped.key.repeat_interleave(3, 1), value=grouped.value.repeat_interleave(3, 1)
        )
        a, b = (index_of(CASES[method].pattern, i).to_mask() for i in (grouped, repeated))
        assert torch.equal(a, b)
        heads = [4, 1, 0]
        part = index_of(CASES[method].pattern, grouped.select_heads(heads)).to_mask()
        assert torch.equal(part, a[:, heads])

    @pytest.mark.parametrize("method", CASES)
    def test_chunks(self, method: str) -> None:
        case = CASES[method]
        inputs = make_inputs(queries=256, head_dim=8)
        whole = index_of(case.pattern, inputs).to_mask()
        edges = [0, 96, 160, 256] if "block_sparse" in method else [0, 90, 101, 256]
        for start, stop in itertools.pairwise(edges):
            chunk = dataclasses.replace(
                inputs, query=inputs.query[:, :, start:stop], key=inputs.key[:, :, :stop],
                value=inputs.value[:, :, :stop], query_start=start,
            )  # fmt: skip
            index = index_of(case.pattern, chunk)
            index.validate(chunk)
            first, rows, blocks = start // BLOCK, index.grid.rows, index.grid.key_blocks
            if case.chunked == "identical" or "block_sparse" in method:
                assert torch.equal(index.to_mask(), whole[:, :, first : first + rows, :blocks])
        # "own": test_equals_the_slow_definition_in_float64[...-chunk] holds it

    @pytest.mark.parametrize("method", CASES)
    def test_looking_ahead(self, method: str) -> None:
        """Tokens after query block m are changed: do the blocks of rows up to m change?"""
        case = CASES[method]
        before = make_inputs(queries=256, head_dim=8, seed=1)
        other = make_inputs(queries=256, head_dim=8, seed=2)
        changed = False
        for m in (3, 7, 11):
            edge = (m + 1) * BLOCK
            mixed = {
                n: torch.cat([getattr(before, n)[:, :, :edge], getattr(other, n)[:, :, edge:] * 3], 2)
                for n in ("query", "key", "value")
            }
            after = dataclasses.replace(before, **mixed)
            a, b = (index_of(case.pattern, i).to_mask()[:, :, : m + 1] for i in (before, after))
            changed |= not torch.equal(a, b)
            # a prompt that ends there: what its rows would choose without any later token
            short = dataclasses.replace(before, **{n: getattr(before, n)[:, :, :edge] for n in mixed})
            c = index_of(case.pattern, short).to_mask()
            changed |= not torch.equal(a[..., : m + 1], c)
        assert changed == case.looks_ahead

    @pytest.mark.parametrize("sizes", [(16, 32), (32, 48), (48, 20), (16, 16)], ids=str)
    def test_block_means_hold_nothing_of_the_future(self, sizes: tuple[int, int]) -> None:
        """Where a row ends inside a key block, the keys behind its end do not enter the block's mean."""
        before = make_inputs(queries=250, head_dim=8, seed=1)
        pattern = BlockSparse(keep=1, sink=0, local=0)
        rows = -(-250 // sizes[0])
        for m in range(rows - 1):
            edge = (m + 1) * sizes[0]
            later = {n: getattr(before, n).clone() for n in ("query", "key", "value")}
            for tensor in later.values():
                tensor[:, :, edge:] = 3.0 - 7.0 * tensor[:, :, edge:]
            after = dataclasses.replace(before, **later)
            a, b = (index_of(pattern, i, *sizes).to_mask()[:, :, : m + 1] for i in (before, after))
            assert torch.equal(a, b), f"row {m}"

    def test_the_table_says_the_same(self) -> None:
        for name, case in CASES.items():
            row = METHODS[name.partition("-")[0]]
            assert (row.looks_ahead, row.chunked) == (case.looks_ahead, case.chunked), name
        # what moves keys has tests of its own
        moving = {name for name, row in METHODS.items() if getattr(row.pattern, "in_parts", False) is True}
        assert {name.partition("-")[0] for name in CASES} | {"minference"} == set(METHODS) - moving
        assert METHODS["minference"].looks_ahead

    def test_options_of_several_numbers_survive_a_profile(self, tmp_path: Path) -> None:
        several = (
            resolve_method("xattention", threshold=(0.3, 0.4), product="torch"),
            resolve_method("stem", keep=0.2, decay=(0.7, 0.8)),
            resolve_method("spargeattn", cdf=(0.9, 0.8), similarity=(0.1, 0.2)),
        )
        save_patterns(ModelPatterns((several,)), tmp_path / "profile.json")
        assert load_patterns(tmp_path / "profile.json").layers == (several,)

    @pytest.mark.parametrize(
        ("method", "option"),
        [("flashprefill", "alpha"), ("stem", "value_bonus"), ("spargeattn", "pv_skip"), ("skip_softmax", "scale")],
    )
    def test_whole_numbers_that_no_float_holds_are_refused(self, method: str, option: str) -> None:
        resolve_method(method, **{option: 3})
        with pytest.raises(ValueError, match=option):
            resolve_method(method, **{option: 10**400})

    @pytest.mark.parametrize("method", METHODS)
    def test_no_option_is_hidden_by_one_of_the_patch(self, method: str) -> None:
        taken = set(inspect.signature(patch_model).parameters) - {"profile"}
        assert not taken & set(METHODS[method].options)

    @pytest.mark.parametrize("method", CASES)
    def test_last_rows_dense_is_an_option_of_every_method(self, method: str) -> None:
        inputs = make_inputs(queries=250, head_dim=8)
        plain = index_of(CASES[method].pattern, inputs).to_mask()
        index = index_of(LastRowsDense(CASES[method].pattern, 20), inputs)
        index.validate(inputs)
        dense = index_of(Dense(), inputs).to_mask()
        assert torch.equal(index.to_mask()[:, :, -2:], dense[:, :, -2:])
        assert torch.equal(index.to_mask()[:, :, :-2], plain[:, :, :-2])


@pytest.mark.gpu
@pytest.mark.parametrize("method", CASES)
def test_a_gpu_chooses_what_the_cpu_does_and_reads_nothing_back(method: str) -> None:
    inputs = make_inputs(queries=250, head_dim=8, dtype=torch.float64)
    want = index_of(CASES[method].pattern, inputs).to_mask()
    there = dataclasses.replace(inputs, **{n: getattr(inputs, n).cuda() for n in ("query", "key", "value")})
    index_of(CASES[method].pattern, there)  # what is made once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        index = index_of(CASES[method].pattern, there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(index.to_mask().cpu(), want)


@pytest.mark.parametrize("density", [0.3, 0.5, 0.8])
def test_vertical_slash_fills_its_density_and_no_more(density: float) -> None:
    inputs = make_inputs(queries=3200, head_dim=8)
    work = coverage(inputs, index_of(VerticalSlash(density=density), inputs)).tile_work
    assert (work <= density).all()
    assert (work > density - 0.05).all()


def test_shares_keep_their_density() -> None:
    inputs = make_inputs(queries=3200, head_dim=8)
    for pattern in (BlockSparse(keep=0.2), RandomBlocks(keep=0.2), AShape(sink=16, window=0.2)):
        work = coverage(inputs, index_of(pattern, inputs)).tile_work
        assert ((work >= 0.2) & (work < 0.23)).all(), pattern
        assert abs(expected_density(pattern, 3200) - 0.2) < 1e-9


def test_what_is_seen_ranks_before_what_is_not_whatever_its_score() -> None:
    scores = torch.tensor([[[[1.0, 2.0, -torch.inf, torch.nan, 3.0]]]])
    visible = torch.tensor([[[False, False, True, True, True]]])
    assert ranked(scores, visible, None)[0, 0, 0, :3].tolist() == [4, 2, 3]
    for inputs in (
        make_inputs(queries=300, head_dim=8, window=90),
        make_inputs(queries=300, head_dim=8, segment=torch.tensor([[0] * 90 + [1] * 210])),
    ):
        holes = dataclasses.replace(inputs, key_valid=~((torch.arange(300) > 99) & (torch.arange(300) < 170))[None])
        broken = dataclasses.replace(inputs, key=inputs.key.clone())
        broken.key[:, :, 120:200] = torch.nan
        patterns = SignCode(0.9, bits=12, sink=0, local=0), BlockSparse(0.9, 0, 0), LMul(0.5, sink=0, local=0)
        for made, pattern in itertools.product((holes, broken), patterns):
            index_of(pattern, made).validate(made)


def test_ties_go_to_the_lower_id() -> None:
    scores = torch.tensor([[[[1.0, 2.0, 2.0, 2.0, 1.0]]]])
    visible = torch.tensor([[[True, True, True, True, True]]])
    ids, count = TopK(2 * BLOCK).select(scores, visible, None, BLOCK)
    assert ids[..., :2].flatten().tolist() == [1, 2]
    assert count.flatten().tolist() == [2]
    forced = torch.tensor([[[False, False, False, False, True]]])
    assert TopK(2 * BLOCK).select(scores, visible, forced, BLOCK)[0][..., :2].flatten().tolist() == [1, 4]


def test_budgets_round_up_and_stay_inside() -> None:
    visible = torch.tensor([1, 3, 10, 40])
    assert keep_blocks(0.2, visible, BLOCK).tolist() == [1, 1, 2, 8]
    assert keep_blocks(33, visible, BLOCK).tolist() == [1, 3, 3, 3]
    assert keep_blocks(1.0, visible, BLOCK).tolist() == [1, 3, 10, 40]


@pytest.mark.parametrize("method", ["vertical_slash", "block_sparse", "random"])
def test_rows_in_slabs_are_the_same_rows(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pattern holds a bounded number of entries at a time; where it cuts must not show."""
    inputs = make_inputs(batch=2, query_heads=4, kv_heads=2, queries=150, keys=200, query_start=50)
    inputs = dataclasses.replace(inputs, key_valid=left_padding(200, [0, 37]))
    grid = BlockGrid.of(inputs, BLOCK, BLOCK)
    whole = CASES[method].pattern.build_index(inputs, grid)
    monkeypatch.setattr(contracts, "_SLAB_ENTRIES", 3 * 2 * 4 * grid.key_blocks)
    assert len(list(grid.slabs(4))) == -(-grid.rows // 3) > 1
    cut = CASES[method].pattern.build_index(inputs, grid)
    cut.validate(inputs)
    assert torch.equal(cut.to_mask(), whole.to_mask())


def test_per_head_patterns() -> None:
    inputs = make_inputs(query_heads=6, kv_heads=2, queries=200, head_dim=8)
    patterns = (Dense(), AShape(16, 32), BlockSparse(keep=48), AShape(16, 32), BlockSparse(keep=48), Dense())
    mask = index_of(PerHead(patterns), inputs).to_mask()
    for head, pattern in enumerate(patterns):
        assert torch.equal(mask[:, head], index_of(pattern, inputs).to_mask()[:, head])
    with pytest.raises(ValueError, match="5 patterns for 6"):
        index_of(PerHead(patterns[:5]), inputs)


def test_profiles_are_kept_in_a_file(tmp_path: Any) -> None:
    heads = (AShape(16, 32), VerticalSlash(verticals=100, slashes=200), BlockSparse(keep=0.2), Dense())
    patterns = ModelPatterns((heads, heads[::-1], (Dense(),) * 4), {"layers": 3, "query_heads": 4})
    save_patterns(patterns, tmp_path / "p.json")
    assert load_patterns(tmp_path / "p.json") == patterns
    assert patterns.for_layer(2) == Dense()
    assert patterns.for_layer(0) == PerHead(heads)
    resolved = resolve_method("minference", profile=tmp_path / "p.json", last_rows_dense=5)
    assert isinstance(resolved, ModelPatterns)
    assert resolved.for_layer(2) == LastRowsDense(Dense(), 5)
    for text, message in (
        ('{"schema": 9}', "schema 9"),
        ('{"schema": 2, "layers": []}', "list of layers"),
        ('{"schema": 2, "layers": [[{"type": "star"}]]}', "layer 0, head 0: a pattern needs a `type`"),
        ('{"schema": 2, "layers": [[{"type": "a_shape", "window": -1}]]}', "layer 0, head 0: window"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_patterns(tmp_path / "bad.json")


def test_the_default_method() -> None:
    """Where none is named: with options of its own unless there are others, and not where there is a profile."""
    name, options = named_method(None, None, {})
    resolve_method(name, **options)
    assert options == DEFAULT_OPTIONS
    assert named_method(None, None, {"keep": 0.5}) == (name, {"keep": 0.5})
    assert named_method(None, "inside", {}) == ("minference", {})
    assert named_method("a_shape", None, {"sink": 4}) == ("a_shape", {"sink": 4})


def test_minference_without_a_profile() -> None:
    assert resolve_method("minference") == VerticalSlash(density=0.2)
    assert resolve_method("minference", budget="paper") == VerticalSlash(verticals=1000, slashes=6096)
    with pytest.raises(ValueError, match="either a budget or a density"):
        resolve_method("minference", budget="paper", density=0.1)


def test_kept_mass_is_measured_exactly() -> None:
    inputs = make_inputs(queries=200, head_dim=8, key_valid=left_padding(200, [30]))
    index = index_of(AShape(16, 32), inputs)
    result = block_sparse_attention(inputs, index)
    sums = kept_mass_sample(inputs, result.lse, 200)
    dense = block_sparse_attention(inputs, index_of(Dense(), inputs))
    exact = (result.lse - dense.lse)[:, :, 30:].double().exp().sum((0, 2))
    torch.testing.assert_close(sums[:, 0], exact, rtol=1e-4, atol=1e-4)
    assert sums[:, 1].tolist() == [170.0] * 4


def test_the_cost_model_has_a_break_even() -> None:
    model = CostModel(tile_factor=2.5, fixed_tokens=512)
    assert not model.sparse_is_cheaper(1 << 20, 1 << 20, 0.5)  # 2.5 x 0.5 is more than dense at any length
    assert model.sparse_is_cheaper(4096, 4096, 0.2)
    assert not model.sparse_is_cheaper(512, 512, 0.1)
    assert model.sparse_is_cheaper(128, 1 << 16, 0.1)  # a chunk far into a long cache


def test_a_window_that_begins_where_a_cache_has_ended() -> None:
    """Rows that see nothing name one block of the grid, and none beyond it."""
    inputs = make_inputs(queries=30, keys=80, key_length=20, window=16)
    for block_q, block_k in ((16, 16), (16, 8), (8, 16)):
        grid = BlockGrid.of(inputs, block_q, block_k)
        low, high = grid.visible_blocks(inputs)
        assert bool(((low >= 0) & (low < high) & (high <= grid.key_blocks)).all())
        index = BlockIndex.dense(inputs, grid)
        index.validate(inputs)
        result = block_sparse_attention(inputs, index)
        assert bool((result.lse == -torch.inf).all())
        assert result.output is not None
        assert not result.output.any()
        FlashPrefill(keep=16, sink=0, local=0).build_index(inputs, grid).validate(inputs)
