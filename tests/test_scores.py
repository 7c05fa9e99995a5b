"""What the profiler measures of a layer: against the kernels' own lse, pattern by pattern, and against plain loops."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from test_kernels import CASES

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.coverage import coverage
from sparseprefill.kernels import block_sparse_attention
from sparseprefill.kernels.block_mass import block_mass
from sparseprefill.kernels.reference import reference_attention
from sparseprefill.patterns import (
    AShape,
    BlockSparse,
    Dense,
    LastRowsDense,
    PerHead,
    RandomBlocks,
    TriShape,
    VerticalSlash,
)
from sparseprefill.patterns import scores as scoring
from sparseprefill.patterns.candidates import Candidate, candidates
from sparseprefill.patterns.nested import build_indexes, estimator_work
from sparseprefill.patterns.scores import (
    BINS,
    MOST_CELLS,
    LayerScores,
    dense_tiles,
    lost_edges,
    peak_bytes,
    score,
    summarise,
)
from support import make_inputs, random_index

ALL = [each.pattern for each in candidates()]


def sharp(inputs: AttentionInputs) -> AttentionInputs:
    """The same with attention that is not nearly uniform."""
    return dataclasses.replace(inputs, query=inputs.query * 3)


@pytest.mark.parametrize("name", CASES)
def test_block_mass_is_the_softmax_summed_over_blocks(name: str) -> None:
    """Whatever masks, caps, padding and chunks there are; and its lse is that of dense attention."""
    fields, (block_q, block_k) = CASES[name]
    inputs = make_inputs(dtype=torch.float64, **fields)
    grid = BlockGrid.of(inputs, block_q, block_k)
    mass, lse = block_mass(inputs, grid, torch.arange(grid.rows))
    dense = reference_attention(inputs, BlockIndex.dense(inputs, grid)).lse
    row = grid.query_rows()
    key = inputs.key.repeat_interleave(inputs.group_size, 1)
    logits = inputs.query @ key.mT * inputs.scale
    if inputs.softcap is not None:
        logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
    share = logits.masked_fill(~inputs.visible_mask()[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    for b in range(inputs.batch):
        for i in range(inputs.queries):
            if row[b, i] < 0:
                continue
            place = inputs.query_start + i - int(grid.anchor[b]) - (int(grid.first[b]) + int(row[b, i])) * block_q
            own, own_lse = mass[b, :, row[b, i], place], lse[b, :, row[b, i], place]
            torch.testing.assert_close(own_lse, dense[b, :, i], rtol=1e-12, atol=1e-12)
            anchored = share[b, :, i, int(grid.anchor[b]) :]
            blocks = torch.stack([part.sum(-1) for part in anchored.split(block_k, -1)], -1)
            common = min(blocks.shape[-1], own.shape[-1])
            torch.testing.assert_close(own[:, :common], blocks[:, :common], rtol=1e-12, atol=1e-12)
            assert blocks[:, common:].sum() == 0
            assert own[:, common:].sum() == 0


def test_block_mass_of_some_rows_is_that_part_of_all() -> None:
    inputs = make_inputs(queries=500)
    grid = BlockGrid.of(inputs, 64, 64)
    mass, lse = block_mass(inputs, grid, torch.arange(grid.rows))
    some, some_lse = block_mass(inputs, grid, torch.tensor([1, 4]))
    torch.testing.assert_close(some, mass[:, :, [1, 4], :, : some.shape[-1]])
    torch.testing.assert_close(some_lse, lse[:, :, [1, 4]])
    assert some.shape[-1] == 5  # the last block that row 4 sees
    assert (mass[:, :, -1, 500 % 64 :] == 0).all()  # no such queries
    assert (lse[:, :, -1, 500 % 64 :] == -torch.inf).all()


@pytest.mark.parametrize("fields", [{}, {"softcap": 3.0}, {"dtype": torch.bfloat16}, {"value_dim": 8}], ids=str)
def test_every_candidate_is_scored_as_the_kernel_would_run_it(fields: dict[str, Any]) -> None:
    """One pass for all gives what one lse-only pass each gives: exp(lse_sparse - lse_dense), density and tile_work."""
    inputs = sharp(make_inputs(queries=700, query_heads=4, kv_heads=2, head_dim=16, **fields))
    table = summarise([score(inputs, ALL)], 0.25)
    grid = BlockGrid.of(inputs, 64, 64)
    dense = BlockIndex.dense(inputs, grid)
    every = block_sparse_attention(inputs, dense, values=False).lse.double()
    for column, pattern in enumerate(ALL):
        index = pattern.build_index(inputs, grid)
        kept = (block_sparse_attention(inputs, index, values=False).lse.double() - every).exp()[0].clamp(max=1)
        counted = coverage(inputs, index)
        torch.testing.assert_close(table.mass[:, column], kept.mean(-1), rtol=0, atol=2e-5)
        torch.testing.assert_close(table.density[:, column], counted.density)
        work = estimator_work(pattern, inputs, grid, int(counted.dense_tiles))
        torch.testing.assert_close(table.work[:, column], counted.tile_work + work)
        # a quarter of the queries may keep less; the bins below 1 are a few percent of the lost mass wide
        quarter = kept.sort(-1).values[:, math.floor(0.25 * kept.shape[-1])]
        ratio = 10 ** (6 / (BINS - 1))
        assert (table.low_mass[:, column] <= quarter + 1e-5).all()
        assert (1 - table.low_mass[:, column] <= (1 - quarter) * ratio + 1e-5).all()


def test_slabs_of_heads_and_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = sharp(make_inputs(queries=900, query_heads=6, kv_heads=3, head_dim=16))
    heads = PerHead((Dense(), AShape(0, 64), AShape(64, 128), BlockSparse(0.3), Dense(), VerticalSlash(density=0.4)))
    patterns = [*(p for p in ALL if not isinstance(p, RandomBlocks)), heads, LastRowsDense(heads, 70)]
    whole = score(inputs, patterns, picture=True)
    monkeypatch.setattr(scoring, "_LISTED", 1)
    monkeypatch.setattr(scoring, "_LOGITS", 1)
    parts = score(inputs, patterns, picture=True)
    for name in ("queries", "kept", "visible", "tiles", "dense_tiles"):
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name
    torch.testing.assert_close(whole.mass, parts.mass, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whole.picture.mass, parts.picture.mass, rtol=1e-5, atol=1e-7)
    assert torch.equal(whole.picture.kept, parts.picture.kept)
    assert whole.lost.sum() == parts.lost.sum() == 6 * len(patterns) * 900


def test_each_nth_row_is_that_part_of_all_rows() -> None:
    inputs = sharp(make_inputs(queries=640, query_heads=2, kv_heads=1, head_dim=16))
    thin = score(inputs, ALL, every=3)
    assert int(thin.queries) == 4 * 64  # rows 0, 3, 6 and 9
    whole = score(inputs, ALL)
    assert torch.equal(thin.kept, whole.kept)
    assert torch.equal(thin.tiles, whole.tiles)
    grid = BlockGrid.of(inputs, 64, 64)
    index = ALL[-1].build_index(inputs, grid)
    mass, _ = block_mass(inputs, grid, torch.tensor([0, 3, 6, 9]))
    wanted = (mass[0] * index.to_mask()[0][:, [0, 3, 6, 9], None]).sum((1, 2, 3))
    torch.testing.assert_close(thin.mass[:, -1].float(), wanted, rtol=1e-5, atol=1e-5)
    for tokens in (64, 65, 640, 1000):
        rows = -(-tokens // 64)
        for every in (1, 2, 3, 50):
            looked = [row for row in range(rows) if (rows - 1 - row) % every == 0]
            assert dense_tiles(tokens, 64, every) == sum(row + 1 for row in looked)


def test_budgets_of_a_family_share_one_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(queries=300)
    grid = BlockGrid.of(inputs, 64, 64)
    asked: list[str] = []
    for cls in (VerticalSlash, BlockSparse):
        plain = cls.estimate

        def counted(self: Any, *arguments: Any, plain: Any = plain) -> Any:
            asked.append(type(self).__name__)
            return plain(self, *arguments)

        monkeypatch.setattr(cls, "estimate", counted)
    patterns = [*ALL, VerticalSlash(density=0.5, probe=16), BlockSparse(0.5, sink=0)]
    found = dict(build_indexes(patterns, inputs, grid))
    assert sorted(asked) == ["BlockSparse"] * 2 + ["VerticalSlash"] * 2
    for place, pattern in enumerate(patterns):
        assert torch.equal(found[place].to_mask(), pattern.build_index(inputs, grid).to_mask()), pattern


def test_a_family_may_be_a_number() -> None:
    """Whatever can be hashed names one: budgets of a pattern of one's own are all asked."""

    class Mine:
        family = 1  # the place of another pattern

        def __init__(self, keep: float) -> None:
            self.keep = keep

        def build_index(self, inputs: Any, grid: BlockGrid) -> Any:
            return BlockSparse(self.keep).build_index(inputs, grid)

        def estimate(self, inputs: Any, grid: BlockGrid) -> Any:
            return BlockSparse(0.1).estimate(inputs, grid)

        def choose(self, estimate: Any, inputs: Any, grid: BlockGrid) -> Any:
            return BlockSparse(self.keep).choose(estimate, inputs, grid)

    inputs = make_inputs(queries=300)
    grid = BlockGrid.of(inputs, 64, 64)
    patterns = [Mine(0.2), Dense(), Mine(0.8)]
    found = dict(build_indexes(patterns, inputs, grid))
    assert sorted(found) == [0, 1, 2]
    for place, pattern in enumerate(patterns):
        assert torch.equal(found[place].to_mask(), pattern.build_index(inputs, grid).to_mask())


def test_what_finding_blocks_costs() -> None:
    """64 probe rows over all keys; block means read every token and multiply once a tile."""
    inputs = make_inputs(queries=640, head_dim=32, value_dim=16)
    grid = BlockGrid.of(inputs, 64, 64)
    tiles = 10 * 11 // 2
    dense = tiles * 64 * 64 * (32 + 16)
    assert estimator_work(VerticalSlash(density=0.2), inputs, grid, tiles) == 64 * 640 * 32 / dense
    assert estimator_work(BlockSparse(0.2), inputs, grid, tiles) == (10 * 10 + 2 * 640) * 32 / dense
    assert estimator_work(AShape(), inputs, grid, tiles) == estimator_work(Dense(), inputs, grid, tiles) == 0
    mixed = PerHead((Dense(), BlockSparse(0.2), BlockSparse(0.1), Dense()))
    assert estimator_work(LastRowsDense(mixed, 5), inputs, grid, tiles) == (10 * 10 + 2 * 640) * 32 / dense / 2


def test_means_count_each_prompt_the_same() -> None:
    def one(mass: float, queries: int, bins: dict[int, int]) -> LayerScores:
        lost = torch.zeros(1, 1, BINS, dtype=torch.int64)
        for place, count in bins.items():
            lost[0, 0, place] = count
        n = torch.tensor
        return LayerScores(
            n([[mass * queries]], dtype=torch.float64), lost, n(queries), n([[2]]), n(4), n([[3]]), n(4),
            n([0.25], dtype=torch.float64),
        )  # fmt: skip

    scores = [one(0.9, 10, {0: 9, 200: 1}), one(0.5, 1000, {0: 500, 250: 500})]
    table = summarise(scores, 0.05)
    assert float(table.mass) == pytest.approx(0.7)
    assert float(table.density) == 0.5
    assert float(table.work) == 1.0
    # by prompt: 70 % of the queries lost nothing, 5 % fell into bin 200, 25 % into bin 250
    assert float(summarise(scores, 0.3).low_mass) == 1.0
    assert float(summarise(scores, 0.26).low_mass) == pytest.approx(1 - float(lost_edges()[200]))
    assert float(table.low_mass) == pytest.approx(1 - float(lost_edges()[250]))
    for bad in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="quantile must be in"):
            summarise(scores, bad)
    with pytest.raises(ValueError, match="no scores"):
        summarise([], 0.1)


def test_a_picture_shows_where_the_mass_lies_and_what_is_kept() -> None:
    inputs = sharp(make_inputs(queries=320, query_heads=2, kv_heads=1, head_dim=16))
    found = score(inputs, ALL, picture=True).picture
    grid = BlockGrid.of(inputs, 64, 64)
    mass, _ = block_mass(inputs, grid, torch.arange(5))
    torch.testing.assert_close(found.mass, mass[0].mean(2))
    assert found.tiles == 1
    for column, pattern in enumerate(ALL):
        assert torch.equal(found.kept[:, column], pattern.build_index(inputs, grid).to_mask()[0])
    long = score(make_inputs(queries=64 * (MOST_CELLS + 3), query_heads=1, kv_heads=1, head_dim=4), [Dense()],
                 picture=True).picture  # fmt: skip
    assert long.tiles == 2
    assert long.mass.shape == (1, 66, 66)  # 131 rows of tiles, the last cell half empty
    torch.testing.assert_close(long.mass.sum(-1), torch.ones(1, 66))
    assert torch.equal(long.kept[0, 0], torch.ones(66, 66).tril().bool())


def test_the_table_of_candidates() -> None:
    table = candidates()
    assert {each.family for each in table} == {
        "dense", "a_shape", "tri_shape", "vertical_slash", "block_sparse", "random",
    }  # fmt: skip
    assert [each.label for each in table if each.control] == [each.label for each in table if each.family == "random"]
    assert len({each.label for each in table}) == len(table)
    assert Candidate("a_shape", AShape(64, 0.5)).label == "a_shape:sink=64,window=0.5"
    assert Candidate("tri_shape", TriShape(64, 128, 32)).label == "tri_shape:sink=64,window=128,last=32"
    assert Candidate("vertical_slash", VerticalSlash(density=0.5)).label == "vertical_slash:density=0.5,probe=64"
    assert Candidate("mine", object()).label == "mine"  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a share must be in \(0, 1\]"):
        candidates(shares=[0.2, 1.2])
    with pytest.raises(TypeError, match="window must be"):
        candidates(windows=["128"])  # type: ignore[list-item]


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ValueError, match="one prompt without padding, got a batch of 2"):
        score(make_inputs(batch=2), [Dense()])
    with pytest.raises(ValueError, match="every must be at least 1"):
        score(make_inputs(), [Dense()], every=0)


def test_memory_is_bounded_at_length() -> None:
    """A layer of 32 heads of 128 dims at 32k tokens stays within 2 GiB by the bound that is announced."""
    count = len(ALL)
    assert peak_bytes(32768, 32, 8, 128, count) < 2 << 30
    assert peak_bytes(32768, 32, 32, 128, count) < 2 << 30
    for tokens in (1024, 8192, 32768, 131072):
        assert peak_bytes(tokens, 32, 8, 128, count) < peak_bytes(2 * tokens, 32, 8, 128, count)


def test_random_lists_keep_what_the_kernel_says() -> None:
    inputs = make_inputs(queries=200, query_heads=3, kv_heads=1)
    index = random_index(inputs, 64, 64, 0.4)

    class Fixed:
        def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
            return BlockIndex(grid, index.columns, index.start, index.count)

    found = score(inputs, [Fixed()])
    exact = (
        reference_attention(inputs, index).lse - reference_attention(inputs, BlockIndex.dense(inputs, index.grid)).lse
    )
    torch.testing.assert_close(found.mass[:, 0] / 200, exact.exp()[0].mean(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_scores_on_a_gpu_are_those_of_the_cpu() -> None:
    inputs = sharp(make_inputs(queries=1500, query_heads=4, kv_heads=2, head_dim=64))
    on_gpu = dataclasses.replace(
        inputs, query=inputs.query.cuda(), key=inputs.key.cuda(), value=inputs.value.cuda()
    )  # fmt: skip
    static = [each.pattern for each in candidates() if each.family in ("dense", "a_shape", "tri_shape", "random")]
    cpu, gpu = score(inputs, static, picture=True), score(on_gpu, static, picture=True)
    for name in ("queries", "kept", "visible", "tiles", "dense_tiles", "estimator"):
        assert torch.equal(getattr(cpu, name), getattr(gpu, name)), name
    torch.testing.assert_close(cpu.mass, gpu.mass, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(cpu.picture.mass, gpu.picture.mass, rtol=1e-4, atol=1e-6)
    own = [each.pattern for each in candidates() if each.family in ("vertical_slash", "block_sparse")]
    cpu, gpu = score(inputs, own), score(on_gpu, own)
    # rankings may differ where scores are as good as equal
    torch.testing.assert_close(cpu.mass / 1500, gpu.mass / 1500, rtol=0, atol=1e-3)
