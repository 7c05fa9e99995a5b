"""Lists of blocks written slab by slab into storage of the triangle's size: those of one mask, and how much room."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseprefill.contracts import BlockGrid, BlockIndex
from sparseprefill.estimators import relative_attention
from sparseprefill.patterns import AShape, Dense, Sale, TriShape, sale
from sparseprefill.patterns.parts import without_heads
from support import left_padding, make_inputs, random_index

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"queries": 250},
    "one-query": {"queries": 1},
    "padded": {"batch": 3, "queries": 200, "key_valid": left_padding(200, [0, 75, 199])},
    "padded-chunk": {"batch": 2, "queries": 90, "keys": 240, "key_valid": left_padding(240, [0, 37])},
    "window": {"queries": 250, "window": 100},
    "chunk": {"queries": 75, "keys": 250},
    "static-cache": {"queries": 100, "keys": 300, "query_start": 50, "key_length": 120},
}


def in_slabs(index: BlockIndex, rows: int) -> BlockIndex:
    """The same lists, written slab by slab."""
    grid = index.grid
    slabs = [(start, min(grid.rows, start + rows)) for start in range(0, grid.rows, rows)]
    return BlockIndex.from_slabs(grid, index.query_heads, slabs, lambda start, stop: index.to_mask(start, stop))


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("shape", SHAPES)
def test_slabs_give_the_lists_of_the_whole_mask(shape: str, rows: int) -> None:
    inputs = make_inputs(head_dim=8, **SHAPES[shape])
    for blocks in ((16, 16), (32, 16), (16, 48), (24, 40)):
        whole = random_index(inputs, *blocks, 0.6)
        index = in_slabs(whole, rows)
        index.validate(inputs)
        assert torch.equal(index.count, whole.count)
        assert torch.equal(index.to_mask(), whole.to_mask())
        assert (index.count.dtype, index.start.dtype) == (whole.count.dtype, whole.start.dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_dense_lists_have_room(shape: str) -> None:
    inputs = make_inputs(head_dim=8, **SHAPES[shape])
    for blocks in ((16, 16), (32, 16), (16, 48)):
        dense = BlockIndex.dense(inputs, BlockGrid.of(inputs, *blocks))
        assert torch.equal(in_slabs(dense, 2).to_mask(), dense.to_mask())


@settings(max_examples=25)
@given(st.integers(1, 200), st.integers(0, 150), st.integers(1, 70), st.integers(1, 70), st.integers(0, 349))
def test_no_row_sees_beyond_its_reach(queries: int, start: int, block_q: int, block_k: int, pad: int) -> None:
    keys = queries + start
    valid = left_padding(keys, [0, min(pad, keys - 1)])
    inputs = make_inputs(batch=2, query_heads=1, kv_heads=1, queries=queries, keys=keys, head_dim=1, key_valid=valid)
    grid = BlockGrid.of(inputs, block_q, block_k)
    _, high = grid.visible_blocks(inputs)
    assert (high <= torch.tensor([grid.reach(row) for row in range(grid.rows)])).all()


def room(grid: BlockGrid, heads: int, slabs: list[tuple[int, int]]) -> int:
    return sum(heads * (stop - start) * (grid.reach(stop - 1) + 1) for start, stop in slabs)


def test_a_long_prompt_takes_half_of_what_whole_masks_take() -> None:
    """128k tokens, 32 heads, blocks of 64 x 64, in slabs of 64 rows."""
    anchor, blocks = torch.zeros(1, dtype=torch.int64), (1 << 17) // 64
    grid = BlockGrid(64, 64, anchor, anchor, blocks, blocks, 0, 1 << 17)
    slabs = list(grid.slabs(32, relative_attention._SLAB_ENTRIES))
    assert slabs[:2] == [(0, 64), (64, 128)]
    triangle = 32 * blocks * (blocks + 1) // 2
    assert triangle <= room(grid, 32, slabs) < 1.04 * triangle
    assert round(room(grid, 32, slabs) * 4 / 2**20) == 264
    small = random_index(make_inputs(queries=250, head_dim=8), 16, 16, 0.5)
    assert in_slabs(small, 3).columns.numel() == room(small.grid, 4, [(n, min(n + 3, 16)) for n in range(0, 16, 3)])


@pytest.mark.parametrize("options", [{"threshold": 0.9}, {"keep": 0.4}], ids=str)
def test_sale_off_the_cpu_lists_the_same(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The way for devices whose lists must not be read back, on the CPU, in slabs of a few rows."""
    inputs = make_inputs(batch=2, queries=230, head_dim=8, key_valid=left_padding(230, [0, 41]))
    grid = BlockGrid.of(inputs, 16, 16)
    pattern = Sale(window=32, segment=32, query_block=32, key_block=16, **options)
    want = pattern.build_index(inputs, grid)
    monkeypatch.setattr(relative_attention, "_SLAB_ENTRIES", 4 * inputs.batch * inputs.query_heads * grid.key_blocks)
    monkeypatch.setattr(sale, "_joined", BlockIndex.from_slabs)
    index = pattern.build_index(inputs, grid)
    assert index.columns.numel() > want.columns.numel()
    index.validate(inputs)
    assert torch.equal(index.to_mask(), want.to_mask())
    assert torch.equal(index.unjudged, want.unjudged)  # type: ignore[arg-type]


def test_one_list_serves_several_heads() -> None:
    inputs = make_inputs(query_heads=6, kv_heads=2, queries=100, keys=130, head_dim=8)
    few = dataclasses.replace(inputs, query=inputs.query[:, :2])
    own = random_index(few, 16, 16, 0.5).skipping(-4.0)
    own = dataclasses.replace(own, unjudged=torch.tensor([[3, 5]]))
    index = own.for_heads(6)
    index.validate(inputs)
    assert index.shared_by == 3
    assert index.columns is own.columns
    assert torch.equal(index.to_mask(), own.to_mask().repeat_interleave(3, 1))
    assert index.unjudged is not None
    assert index.unjudged.tolist() == [[3, 3, 3, 5, 5, 5]]
    assert index.skip is not None
    assert index.skip.shape == index.count.shape
    assert own.shared_by == random_index(inputs, 16, 16, 0.5).shared_by == 1
    with pytest.raises(ValueError, match="lists of 2 heads cannot be shared by 5"):
        own.for_heads(5)
    with pytest.raises(ValueError, match="every 2 heads should share their lists, but start differs"):
        dataclasses.replace(random_index(inputs, 16, 16, 0.5), alike=2).validate(inputs)
    with pytest.raises(ValueError, match="alike must divide the 6 heads, got 4"):
        dataclasses.replace(own.for_heads(6), alike=4).validate(inputs)


@pytest.mark.parametrize(
    "pattern", [Dense(), AShape(16, 32), TriShape(16, 32, 20)], ids=["dense", "a_shape", "tri_shape"]
)
def test_static_lists_are_shared_by_all_heads(pattern: Any) -> None:
    inputs = make_inputs(batch=2, query_heads=6, kv_heads=2, queries=100, keys=130, head_dim=8)
    grid = BlockGrid.of(inputs, 16, 16)
    index = pattern.build_index(inputs, grid)
    index.validate(inputs)
    assert index.shared_by == 6
    assert without_heads(index, torch.eye(2, 6, dtype=torch.bool)).shared_by == 1


def test_slabs_share_what_each_of_them_shares() -> None:
    inputs = make_inputs(query_heads=4, kv_heads=1, queries=64, head_dim=8)
    one = random_index(dataclasses.replace(inputs, query=inputs.query[:, :1]), 16, 16, 0.5).for_heads(4)
    two = random_index(dataclasses.replace(inputs, query=inputs.query[:, :2]), 16, 16, 0.5).for_heads(4)
    assert BlockIndex.stack([one, one]).shared_by == 4
    assert BlockIndex.stack([one, two]).shared_by == 2
