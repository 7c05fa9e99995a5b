"""The Triton kernel against the oracle: on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
import torch

from sparseprefill.contracts import AttentionInputs, AttentionOutput, BlockGrid, BlockIndex
from support import assert_within_budget, left_padding, make_inputs, random_index

if sys.platform != "linux":
    pytest.importorskip("triton", reason="triton is published for Linux only")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# conftest.py has switched the interpreter on where there is no GPU
from sparseprefill.kernels import triton_forward, triton_rows  # noqa: E402  (after the skip above)
from sparseprefill.kernels.reference import reference_attention  # noqa: E402  (after the skip above)
from sparseprefill.kernels.row_lse import row_lse  # noqa: E402  (after the skip above)
from sparseprefill.kernels.triton_forward import (  # noqa: E402  (after the skip above)
    Tiling,
    choose_for,
    choose_tiling,
    first_hole,
    heads_that_share,
    interpreted,
    longest_first,
    split_dim,
    stackable_heads,
    triton_attention,
    why_not_descriptors,
    why_not_specialised,
    why_not_triton,
)

if DEVICE == "cpu" and not interpreted():
    raise RuntimeError("something imported triton before tests/conftest.py could switch its interpreter on")

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


def attend(inputs: AttentionInputs, index: BlockIndex, **options: Any) -> AttentionOutput:
    index.validate(inputs)
    return triton_attention(inputs, index, **options)


def dense(inputs: AttentionInputs, block_q: int, block_k: int) -> BlockIndex:
    return BlockIndex.dense(inputs, BlockGrid.of(inputs, block_q, block_k))


def holes(keys: int, pads: list[int], gaps: list[tuple[int, int]]) -> torch.Tensor:
    """Left padding and, in each row, one more invalid stretch: a second turn after a padded first one."""
    valid = left_padding(keys, pads)
    for row, (start, stop) in enumerate(gaps):
        valid[row, start:stop] = False
    return valid


def segments(*lengths: int) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]


def case(name: str, blocks: tuple[int, int], density: float = 0.6, slow: bool = False, **fields: Any) -> Any:
    marks = [pytest.mark.slow] if slow else []
    return pytest.param(blocks, density, fields, id=name, marks=marks)


CASES = [
    case("one_token", (16, 16), query_heads=2, kv_heads=1, queries=1, dtype=FP16),
    case("length_63", (16, 16), query_heads=2, queries=63, head_dim=16, dtype=BF16),
    case("length_65_fp32", (32, 32), query_heads=2, queries=65),
    case("length_200_wide_rows", (128, 64), query_heads=2, queries=200, head_dim=64, dtype=FP16),
    case("dim_80_tall_columns", (32, 64), query_heads=2, queries=100, head_dim=80, dtype=BF16),
    case("dim_96_wide_rows", (64, 32), query_heads=2, queries=100, head_dim=96, dtype=FP16),
    case("dim_128", (64, 64), query_heads=2, queries=130, head_dim=128, dtype=BF16),
    case("dim_192_value_128", (64, 64), query_heads=1, kv_heads=1, queries=70, head_dim=192, value_dim=128, dtype=BF16),
    case("value_wider_and_odd", (32, 32), query_heads=1, kv_heads=1, queries=70, head_dim=64, value_dim=80),
    case("groups_of_1", (32, 32), query_heads=3, kv_heads=3, queries=65, dtype=FP16),
    case("groups_of_7", (32, 32), query_heads=7, kv_heads=1, queries=65, dtype=FP16),
    case("chunk_inside_a_block", (32, 32), query_heads=2, queries=50, keys=135, dtype=FP16),
    case("blocks_48", (48, 48), query_heads=2, queries=110, dtype=FP16),
    case("blocks_24_by_40", (24, 40), query_heads=2, queries=110, dtype=FP16),
    case("blocks_larger_than_tiles", (256, 128), query_heads=2, queries=300, keys=310, dtype=FP16),
    case("left_padding", (32, 32), batch=2, query_heads=2, queries=99, key_valid=left_padding(99, [0, 37]), dtype=FP16),
    case("row_of_padding", (32, 32), batch=2, query_heads=2, queries=40, key_valid=left_padding(40, [40, 3])),
    case(
        "second_turn_with_holes", (32, 16), batch=2, query_heads=2, queries=70, keys=150, dtype=FP16,
        key_valid=holes(150, [5, 30], [(60, 80), (80, 80)]),
    ),
    case(
        "hole_over_a_block", (16, 16), batch=1, query_heads=1, kv_heads=1, queries=40, keys=64,
        key_valid=holes(64, [0], [(16, 64)]),
    ),
    case("window_30", (32, 32), query_heads=2, queries=130, window=30, dtype=FP16),
    case("window_100_large_blocks", (128, 64), query_heads=1, kv_heads=1, queries=300, window=100, dtype=FP16),
    case("window_1", (16, 16), query_heads=1, kv_heads=1, queries=40, window=1),
    case("softcap_fp32", (32, 32), query_heads=2, queries=70, softcap=2.0, scale=1.0),
    case("softcap_bf16", (32, 32), query_heads=2, queries=70, softcap=15.0, dtype=BF16),
    case("sinks", (32, 32), query_heads=4, queries=70, sinks=torch.tensor([0.5, -3.0, 60.0, -torch.inf])),
    case("segments", (32, 32), query_heads=2, queries=120, segment=segments(33, 50, 37), dtype=FP16),
    case("segments_and_window", (32, 32), query_heads=2, queries=60, keys=120, segment=segments(70, 50), window=40),
    case("static_cache", (32, 32), query_heads=2, queries=60, keys=160, query_start=40, key_length=100, dtype=FP16),
    case("cache_shorter_than_queries", (32, 32), query_heads=1, kv_heads=1, queries=90, key_length=50),
    case("nothing_filled", (32, 32), query_heads=1, kv_heads=1, queries=40, key_length=0, sinks=torch.tensor([0.1])),
    case(
        "everything", (64, 32), batch=2, query_heads=4, queries=70, keys=150, query_start=70, key_length=138, window=90,
        head_dim=80, value_dim=48, softcap=9.0, dtype=FP16, sinks=torch.tensor([0.5, -3.0, 2.0, 0.0]),
        key_valid=holes(150, [3, 20], [(75, 80), (90, 100)]), segment=segments(50, 100).expand(2, -1),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("blocks", "density", "fields"), CASES)
def test_matches_the_oracle(blocks: tuple[int, int], density: float, fields: dict[str, Any]) -> None:
    moved = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in fields.items()}
    inputs = make_inputs(**moved, device=DEVICE)
    index = random_index(inputs, *blocks, density)
    result = attend(inputs, index)
    assert_within_budget(result, inputs, index)
    assert result.lse.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("dims", [(16, 16), (72, 72), (96, 80), (160, 64), (256, 256)], ids=str)
@pytest.mark.parametrize("blocks", [(16, 16), (64, 32), (32, 64), (128, 64), (128, 128), (100, 36)], ids=str)
def test_matches_the_oracle_everywhere(blocks: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = make_inputs(
        batch=2, query_heads=2, queries=120, keys=233, query_start=90, dtype=dtype,
        head_dim=dims[0], value_dim=dims[1],
        key_valid=left_padding(233, [0, 50], DEVICE), device=DEVICE,
    )  # fmt: skip
    index = random_index(inputs, *blocks, 0.5)
    assert_within_budget(attend(inputs, index), inputs, index)


@pytest.mark.parametrize("stages", [{}, {"window": 40}, {"softcap": 5.0}], ids=["causal", "window", "softcap"])
def test_lse_alone(stages: dict[str, Any]) -> None:
    inputs = make_inputs(query_heads=2, queries=90, device=DEVICE, dtype=FP16, **stages)
    index = random_index(inputs, 32, 32, 0.5)
    unread = dataclasses.replace(inputs, value=torch.full_like(inputs.value, torch.nan))
    alone = attend(unread, index, values=False)
    assert alone.output is None
    assert torch.equal(alone.lse, attend(inputs, index).lse)


@pytest.mark.parametrize(
    "fields",
    [
        {"queries": 60, "head_dim": 16},
        {"queries": 50, "keys": 80, "key_valid": left_padding(80, [3, 45]), "head_dim": 80, "softcap": 5.0},
    ],
    ids=["causal", "padding-and-softcap"],
)
@pytest.mark.parametrize("values", [True, False], ids=["values", "lse-alone"])
def test_some_heads_into_an_earlier_result(fields: dict[str, Any], values: bool) -> None:
    """Programs of other heads write nothing, not even the rows of padding."""
    moved = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in fields.items()}
    inputs = make_inputs(batch=2, query_heads=2, kv_heads=1, dtype=FP16, device=DEVICE, **moved)
    sparse, full = random_index(inputs, 32, 16, 0.3), dense(inputs, 32, 16)
    only = torch.tensor([[False, True], [False, False]], device=DEVICE)
    # some heads are never stacked with others, and a product of more rows may round otherwise
    unstacked = dataclasses.replace(full, start=full.start.contiguous(), count=full.count.contiguous(), alike=1)
    result, want = attend(inputs, sparse, values=values), attend(inputs, unstacked, values=values)
    for tensor in (result.output, result.lse):
        if tensor is not None:
            tensor[~only] = 7.0
    assert triton_attention(inputs, full, values=values, only=only, into=result) is result
    assert torch.equal(result.lse[only], want.lse[only])
    assert (result.lse[~only] == 7).all()
    if values:
        assert torch.equal(result.output[only], want.output[only])
        assert (result.output[~only] == 7).all()


ROW_CASES = [
    "length_65_fp32",
    "dim_80_tall_columns",
    "groups_of_7",
    "row_of_padding",
    "window_30",
    "segments",
    "everything",
]


@pytest.mark.parametrize("name", ROW_CASES)
def test_lse_of_some_rows_matches_the_oracle(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For places in any order, over several spans of keys."""
    monkeypatch.setattr(triton_rows, "_SPAN", 64)
    fields = next(each.values[2] for each in CASES if each.id == name)
    moved = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in fields.items()}
    inputs = make_inputs(**moved, device=DEVICE)
    place = torch.randint(inputs.queries, (inputs.batch, 20), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    everywhere = place[:, None].expand(-1, inputs.query_heads, -1)
    got = row_lse(inputs, place, "triton")
    exact = reference_attention(inputs).lse.gather(2, everywhere)
    plain = reference_attention(inputs, dtype=inputs.query.dtype).lse.gather(2, everywhere).double()
    empty = exact == -torch.inf
    assert torch.equal(got == -torch.inf, empty)
    got, exact, plain = (lse.double().masked_fill(empty, 0.0) for lse in (got, exact, plain))
    eps = torch.finfo(inputs.query.dtype).eps
    assert (got - exact).abs().max() <= 2 * ((plain - exact).abs().max() + eps * exact.abs().max())


def test_a_dense_index_that_aliases_its_storage() -> None:
    inputs = make_inputs(query_heads=2, queries=100, keys=140, device=DEVICE, dtype=FP16)
    assert_within_budget(attend(inputs, dense(inputs, 32, 16)), inputs, None)


def test_lists_with_slack_in_any_order() -> None:
    inputs = make_inputs(query_heads=2, queries=100, device=DEVICE, dtype=FP16)
    packed = random_index(inputs, 32, 32, 0.5)
    slots = packed.grid.key_blocks + 3
    ids = torch.full((*packed.count.shape, slots), 2**30, dtype=torch.int32, device=DEVICE)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in packed.count.shape)).tolist():
        start, count = int(packed.start[tuple(place)]), int(packed.count[tuple(place)])
        ids[tuple(place)][:count] = packed.columns[start : start + count]
    slack = BlockIndex.from_slots(packed.grid, ids, packed.count)
    slack = dataclasses.replace(slack, start=slack.start.transpose(1, 2).contiguous().transpose(1, 2))
    a, b = attend(inputs, packed), attend(inputs, slack)
    assert torch.equal(a.output, b.output)
    assert torch.equal(a.lse, b.lse)


def test_any_strides() -> None:
    inputs = make_inputs(batch=2, query_heads=4, queries=40, head_dim=80, device=DEVICE, dtype=FP16)
    index = random_index(inputs, 32, 32, 0.6)
    key = torch.zeros(2, 40, 2, 160, dtype=FP16, device=DEVICE).transpose(1, 2)[..., ::2]
    key.copy_(inputs.key)
    strided = dataclasses.replace(
        inputs,
        query=inputs.query.transpose(1, 2).contiguous().transpose(1, 2),
        key=key,
        value=inputs.value.mT.contiguous().mT,
    )
    assert not strided.key.is_contiguous()
    a, b = attend(inputs, index), attend(strided, index)
    assert torch.equal(a.output, b.output)
    assert torch.equal(a.lse, b.lse)


def test_what_nobody_sees_is_not_read() -> None:
    """Padding before the anchor and a cache's unused slots may hold NaN. Fresh outputs are full of it in all tests."""
    valid = left_padding(120, [0, 40], DEVICE)
    fields = {"query_start": 20, "key_length": 75, "key_valid": valid, "device": DEVICE, "dtype": FP16}
    inputs = make_inputs(batch=2, query_heads=2, queries=60, keys=120, **fields)
    index = random_index(inputs, 32, 32, 0.6)
    clean = attend(inputs, index)
    for tensor in (inputs.key, inputs.value):
        tensor[1, :, :40] = torch.nan
        tensor[:, :, 75:] = torch.nan
    dirty = attend(inputs, index)
    assert torch.equal(clean.output, dirty.output)
    assert torch.equal(clean.lse, dirty.lse)
    padding = torch.arange(20, 80) < 40
    assert (dirty.lse[1][:, padding] == -torch.inf).all()
    assert (dirty.output[1][:, padding] == 0).all()


def test_large_logits_neither_overflow_nor_vanish() -> None:
    inputs = make_inputs(query_heads=2, queries=64, scale=40.0, device=DEVICE, sinks=torch.tensor([1e4, -1e4]))
    index = dense(inputs, 32, 32)
    assert_within_budget(attend(inputs, index), inputs, index)


def test_more_blocks_never_lower_the_mass() -> None:
    inputs = make_inputs(query_heads=2, queries=100, device=DEVICE)
    few = random_index(inputs, 32, 32, 0.3)
    more = BlockIndex.from_mask(few.grid, few.to_mask() | random_index(inputs, 32, 32, 0.5, seed=1).to_mask())
    kept = [attend(inputs, index, values=False).lse for index in (few, more, dense(inputs, 32, 32))]
    assert (kept[0] <= kept[1] + 1e-5).all()
    assert (kept[1] <= kept[2] + 1e-5).all()


def test_block_size_does_not_matter() -> None:
    """The same pairs, listed in blocks of 64 x 64 and, each cut into eight, of 32 x 16."""
    inputs = make_inputs(query_heads=2, queries=110, device=DEVICE, dtype=FP16)
    coarse = random_index(inputs, 64, 64, 0.5)
    grid = BlockGrid.of(inputs, 32, 16)
    cut = coarse.to_mask().repeat_interleave(2, 2).repeat_interleave(4, 3)[:, :, : grid.rows, : grid.key_blocks]
    fine = BlockIndex.from_mask(grid, cut & grid.visible_block_mask(inputs)[:, None])
    for index in (coarse, fine):
        assert_within_budget(attend(inputs, index), inputs, coarse)


@pytest.mark.parametrize("tiling", [Tiling(16, 16, 4, 1), Tiling(32, 32, 4, 2), Tiling(128, 64, 4, 3)], ids=str)
def test_the_tile_does_not_matter(tiling: Tiling) -> None:
    inputs = make_inputs(query_heads=1, kv_heads=1, queries=150, keys=170, window=60, device=DEVICE, dtype=FP16)
    index = random_index(inputs, 64, 32, 0.6)
    assert_within_budget(attend(inputs, index, tiling=tiling), inputs, index)


def shared_lists(inputs: AttentionInputs, blocks: tuple[int, int], lists: int, density: float = 0.6) -> BlockIndex:
    """One list for each of `lists` runs of neighbouring heads."""
    few = dataclasses.replace(
        inputs, query=inputs.query[:, :lists], key=inputs.key[:, :1], value=inputs.value[:, :1], sinks=None
    )
    return random_index(few, *blocks, density).for_heads(inputs.query_heads)


def some_slow(names: list[str], *quick: str) -> list[Any]:
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in names]


SHARED_CASES = [
    "length_63", "dim_80_tall_columns", "chunk_inside_a_block", "blocks_48", "left_padding", "row_of_padding",
    "second_turn_with_holes", "window_30", "segments", "static_cache", "sinks", "everything",
]  # fmt: skip


@pytest.mark.parametrize("name", some_slow(SHARED_CASES, "sinks", "everything"))
def test_heads_that_share_a_list_are_stacked(name: str) -> None:
    """In one tile, each with its own queries, sink and places in memory; the same as head by head."""
    blocks, density, fields = next(each.values for each in CASES if each.id == name)
    lists = 1 if name in ("sinks", "left_padding") else 2
    moved = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in fields.items()}
    inputs = make_inputs(**({"dtype": FP16} | moved | {"query_heads": 4, "kv_heads": 2}), device=DEVICE)
    index = shared_lists(inputs, (min(blocks[0], 32), blocks[1]), lists, density)
    limits = triton_forward.device_limits(inputs.device)
    tiling = choose_for(inputs, index, None, limits)
    assert tiling is not None
    assert tiling.heads == 2
    result = attend(inputs, index)
    assert_within_budget(result, inputs, index)
    alone = attend(inputs, index, tiling=dataclasses.replace(tiling, heads=1, block_q=tiling.queries))
    assert torch.allclose(result.lse, alone.lse, rtol=1e-5, atol=1e-5)


def test_four_heads_of_a_dense_group_fill_a_tile() -> None:
    inputs = make_inputs(query_heads=8, kv_heads=2, queries=70, keys=100, device=DEVICE, dtype=FP16)
    index = dense(inputs, 32, 32)
    tiling = choose_for(inputs, index, None, triton_forward.device_limits(inputs.device))
    assert tiling is not None
    assert (tiling.heads, tiling.queries, tiling.block_q) == (4, 32, 128)
    assert_within_budget(attend(inputs, index), inputs, None)


def test_which_heads_are_stacked() -> None:
    """What the host knows of the lists decides, nothing that stands on the device."""
    inputs = make_inputs(query_heads=12, kv_heads=2, queries=40, device=DEVICE)
    index = dense(inputs, 16, 16)
    only = torch.ones(1, 12, dtype=torch.bool, device=DEVICE)
    assert stackable_heads(inputs, index) == 2  # of 6 heads a group
    assert stackable_heads(inputs, index, only) == 1
    assert stackable_heads(inputs, index.skipping(-5.0)) == 1
    assert stackable_heads(inputs, shared_lists(inputs, (16, 16), 3)) == 2
    assert stackable_heads(inputs, shared_lists(inputs, (16, 16), 4)) == 1
    assert stackable_heads(inputs, random_index(inputs, 16, 16, 0.5)) == 1
    assert stackable_heads(dataclasses.replace(inputs, key=inputs.key[:, :1], value=inputs.value[:, :1]), index) == 4


def test_tilings_stack_heads_where_their_queries_leave_room() -> None:
    def tile(block_q: int, heads: int, capability: tuple[int, int] = (9, 0)) -> tuple[int, int, int]:
        chosen = choose_tiling(128, 128, BF16, block_q, 64, 227 << 10, capability, heads=heads)
        assert chosen is not None
        return chosen.block_q, chosen.heads, chosen.warps

    assert tile(128, 4) == (128, 1, 8)
    assert tile(64, 4) == tile(64, 2) == (128, 2, 8)
    assert tile(64, 1) == (64, 1, 4)
    assert tile(32, 8, (8, 0)) == (128, 4, 8)
    assert tile(16, 2) == (32, 2, 4)


DESCRIBED_CASES = [
    "length_63", "length_200_wide_rows", "groups_of_7", "chunk_inside_a_block", "blocks_24_by_40", "left_padding",
    "second_turn_with_holes", "window_30", "softcap_bf16", "segments", "static_cache", "nothing_filled",
]  # fmt: skip


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the same cases run with what its capability gives")
@pytest.mark.parametrize("name", some_slow(DESCRIBED_CASES, "softcap_bf16", "static_cache"))
def test_descriptors_fetch_the_same(name: str) -> None:
    """And so do warps that do nothing but fetch, where no later token's value is NaN. To the bit."""
    blocks, density, fields = next(each.values for each in CASES if each.id == name)
    inputs = make_inputs(**({"dtype": FP16} | fields))
    if inputs.filled < inputs.keys:
        inputs.key[:, :, inputs.filled :] = inputs.value[:, :, inputs.filled :] = torch.nan
    index = random_index(inputs, *blocks, density)
    tiling = choose_for(inputs, index, None, triton_forward.device_limits(inputs.device))
    assert tiling is not None
    plain = attend(inputs, index, tiling=tiling)
    for specialise in (False, True):
        other = dataclasses.replace(tiling, descriptors=True, specialise=specialise)
        result = attend(inputs, index, tiling=other)
        assert torch.equal(result.output, plain.output)  # type: ignore[arg-type]
        assert torch.equal(result.lse, plain.lse)


def test_descriptors_read_strides_of_every_layout() -> None:
    """Tokens outside heads in memory, one batch row of an odd stride, more slots than are filled."""
    stored = torch.randn(1, 90, 2, 2, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE, BF16)
    key, value = stored.permute(3, 0, 2, 1, 4)
    query = make_inputs(query_heads=4, queries=70, head_dim=32, dtype=BF16, device=DEVICE).query
    inputs = AttentionInputs(query, key, value, 0.2, query_start=10, key_length=80)
    index = random_index(inputs, 32, 16, 0.5)
    assert why_not_descriptors(inputs, (9, 0)) is None
    result = attend(inputs, index, tiling=Tiling(32, 16, 4, 1, descriptors=interpreted()))
    assert_within_budget(result, inputs, index)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda key: key.float(), "float32"),
        (lambda key: key[..., :24], "24 numbers"),
        (lambda key: torch.cat([key, key], 3)[..., ::2], "side by side"),
        (lambda key: torch.cat([key.flatten(), key.new_zeros(1)])[1:].view_as(key), "begin at a multiple"),
        (lambda key: torch.cat([key, key[..., :1]], 3)[..., :-1], "stride of 66 bytes"),
        (lambda key: key[:, :1].expand(-1, 2, -1, -1), "stride of 0 bytes"),
        (lambda key: key, None),
        (lambda key: key[:, :1], None),
    ],
    ids=["float32", "dim", "spread", "offset", "stride", "expanded", "fits", "one-head"],
)
def test_says_why_descriptors_cannot_serve(change: Any, reason: str | None) -> None:
    key = torch.zeros(1, 2, 40, 32, dtype=FP16)
    changed = change(key)
    query = changed.new_zeros(1, 2, 40, changed.shape[3])
    inputs = AttentionInputs(query, changed, changed, 1.0)
    said = why_not_descriptors(inputs, (9, 0))
    assert (said is None) if reason is None else (reason in (said or ""))
    assert "8.6" in (why_not_descriptors(inputs, (8, 6)) or "")


def test_refuses_tilings_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(query_heads=4, kv_heads=2, queries=40, head_dim=24, dtype=FP16, device=DEVICE)
    index = dense(inputs, 16, 16)
    for tiling, reason in (
        (Tiling(64, 16, 4, 1, heads=4), "4 heads cannot be stacked here: 2 share"),
        (Tiling(16, 16, 4, 1, descriptors=True), "no power of two"),
        (Tiling(16, 16, 4, 1, specialise=True), "by descriptors"),
    ):
        with pytest.raises(ValueError, match=reason):
            triton_attention(inputs, index, tiling=tiling)
    described = Tiling(16, 16, 4, 1, descriptors=True)
    assert "10.0 is needed, this one is 9.0" in (why_not_specialised(described, (9, 0)) or "")
    assert why_not_specialised(described, (10, 0)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=lambda dtype: str(dtype)[6:])
def test_long_lists_on_the_gpu(dtype: torch.dtype) -> None:
    inputs = make_inputs(query_heads=8, kv_heads=2, queries=2048, keys=8192, head_dim=128, dtype=dtype, device=DEVICE)
    index = random_index(inputs, 128, 64, 0.2)
    assert_within_budget(attend(inputs, index), inputs, index)
    if dtype == FP32:
        assert_within_budget(attend(inputs, index, float32_dots="tf32x3"), inputs, index)


@pytest.mark.gpu
def test_nothing_is_read_back_to_the_host() -> None:
    valid = left_padding(512, [0, 100], DEVICE)
    inputs = make_inputs(batch=2, queries=256, keys=512, head_dim=64, dtype=BF16, device=DEVICE, key_valid=valid)
    index = random_index(inputs, 64, 64, 0.5)
    attend(inputs, index)
    only, into = torch.tensor([[True, False] * 2, [False] * 4], device=DEVICE), attend(inputs, index)
    triton_attention(inputs, index, only=only, into=into)
    torch.cuda.set_sync_debug_mode("error")
    try:
        triton_attention(inputs, index)
        triton_attention(inputs, index, only=only, into=into)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"head_dim": 8}, "head_dim 16 to 256, not 8"),
        ({"head_dim": 272, "value_dim": 64}, "head_dim 16 to 256, not 272"),
        ({"head_dim": 64, "value_dim": 300}, "value_dim 16 to 256, not 300"),
    ],
    ids=["float64", "narrow", "wide", "wide_values"],
)
def test_says_what_it_cannot_do(fields: dict[str, Any], reason: str) -> None:
    assert reason in (why_not_triton(make_inputs(queries=16, device=DEVICE, **fields), None) or "")


def test_refuses_gradients() -> None:
    inputs = make_inputs(queries=16, device=DEVICE)
    inputs.value.requires_grad_()
    assert "no backward" in (why_not_triton(inputs, None) or "")


def test_refuses_an_old_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_forward.triton, "__version__", "3.3.1+git")
    assert "3.4 or newer, 3.3.1+git" in (why_not_triton(make_inputs(queries=16, device=DEVICE), None) or "")


@pytest.mark.parametrize(
    ("limits", "reason"),
    [(((7, 5), 64 << 10, 4 << 20), "this GPU has 7.5"), (((8, 0), 8 << 10, 4 << 20), "8192 bytes of shared memory")],
    ids=["old", "small"],
)
def test_refuses_a_device(limits: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(queries=16, head_dim=64, device=DEVICE)
    assert why_not_triton(inputs, dense(inputs, 16, 16)) is None
    monkeypatch.setattr(triton_forward, "device_limits", lambda device: triton_forward.DeviceLimits(*limits))
    assert reason in (why_not_triton(inputs, None) or "")


def test_inputs_on_the_cpu_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(queries=16)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "inputs are on the CPU" in (why_not_triton(inputs, None) or "")


@pytest.mark.parametrize(
    ("dim", "parts"),
    [(16, (16, 0)), (17, (16, 16)), (64, (64, 0)), (72, (64, 16)), (80, (64, 16)), (96, (64, 32)), (112, (64, 64)),
     (128, (128, 0)), (192, (128, 64)), (255, (128, 128)), (256, (256, 0))],
)  # fmt: skip
def test_split_dim(dim: int, parts: tuple[int, int]) -> None:
    assert split_dim(dim) == parts


@pytest.mark.parametrize("shared", [99 << 10, 163 << 10, 227 << 10])
@pytest.mark.parametrize("dtype", [FP16, FP32], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("head_dim", [16, 80, 128, 192, 256])
def test_tilings_fit(head_dim: int, dtype: torch.dtype, shared: int) -> None:
    for block_q, block_k in ((1, 1), (16, 16), (48, 24), (64, 32), (128, 128), (100, 36), (512, 512)):
        tiling = choose_tiling(head_dim, head_dim, dtype, block_q, block_k, shared, (9, 0))
        assert tiling is not None
        assert tiling.shared_bytes(head_dim, head_dim, dtype) <= shared
        for tile, block in ((tiling.block_q, block_q), (tiling.block_k, block_k)):
            assert tile >= 16
            assert tile & (tile - 1) == 0
            assert tile <= max(16, 2 * block)


def test_no_tiling_fits_nothing() -> None:
    assert choose_tiling(256, 256, FP16, 64, 64, 4096) is None


def test_tiles_divide_blocks_where_they_can() -> None:
    assert choose_tiling(64, 64, FP16, 128, 96, 163 << 10) == Tiling(128, 32, 8, 3)
    assert choose_tiling(64, 64, FP16, 192, 128, 163 << 10) == Tiling(64, 64, 4, 3)


def test_the_longest_rows_come_first() -> None:
    count = torch.tensor([[[1, 2, 3], [2, 2, 9], [5, 1, 1], [1, 1, 2]]], dtype=torch.int32)
    assert longest_first(count, 4).tolist() == [5, 6, 2, 1, 3, 4, 11, 0, 7, 8, 9, 10]
    order = longest_first(count.repeat(2, 1, 1), 2).tolist()
    assert order[:6] == [5, 2, 1, 3, 4, 0]
    assert sorted(order) == list(range(24))
    assert all(first // 6 == place // 6 for place, first in enumerate(order))


def test_heads_whose_keys_fit_a_cache_run_together() -> None:
    inputs = make_inputs(query_heads=12, kv_heads=6, queries=64, head_dim=32, dtype=FP16)
    head = 64 * (32 + 32) * 2
    assert [heads_that_share(inputs, heads * head) for heads in (0, 1, 3, 5, 6, 99)] == [2, 2, 6, 6, 12, 12]


def test_left_padding_has_no_hole() -> None:
    inputs = make_inputs(batch=2, queries=20, key_valid=holes(20, [3, 4], [(0, 0), (10, 12)]))
    assert first_hole(inputs, inputs.anchor()).tolist() == [20, 10]
    assert first_hole(dataclasses.replace(inputs, key_valid=None), inputs.anchor()) is None
