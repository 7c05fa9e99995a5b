"""Scores along antidiagonals by Triton against plain torch: on the GPU where there is one, else interpreted."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from strided_cases import with_holes
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid
from sparseprefill.estimators.antidiagonal import Antidiagonal, PreparedGroups
from sparseprefill.patterns import PerHead
from sparseprefill.patterns.stem import Stem
from sparseprefill.patterns.xattention import XAttention
from support import left_padding, make_inputs

if sys.platform != "linux":
    pytest.importorskip("triton", reason="triton is published for Linux only")

# conftest.py has switched the interpreter on where there is no GPU
from sparseprefill.kernels import triton_antidiagonal, triton_forward
from sparseprefill.kernels.triton_antidiagonal import (
    AntidiagonalTiling,
    antidiagonal_tiling,
    triton_block_lse,
    why_not_antidiagonal,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


def inputs_of(fields: dict[str, Any]) -> AttentionInputs:
    moved = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in fields.items()}
    return make_inputs(**{"query_heads": 2, "kv_heads": 1, "head_dim": 16, "device": DEVICE} | moved)


def prepared(inputs: AttentionInputs, stride: int, sizes: tuple[int, int], impl: str) -> PreparedGroups:
    return Antidiagonal(stride, impl).prepare(inputs, BlockGrid.of(inputs, *sizes))


def assert_same_mass(inputs: AttentionInputs, stride: int, sizes: tuple[int, int]) -> None:
    """Within twice the error of torch in float32, plus one rounding of the mass of a row."""
    exact = dataclasses.replace(inputs, **{n: getattr(inputs, n).double() for n in ("query", "key", "value")})
    rows = prepared(inputs, stride, sizes, "torch").grid.rows
    got, plain, want = (
        prepared(*each).scores(0, rows)
        for each in (
            (inputs, stride, sizes, "triton"), (inputs, stride, sizes, "torch"), (exact, stride, sizes, "torch"),
        )
    )  # fmt: skip
    assert got.dtype == FP32
    assert not got.isnan().any()
    assert torch.equal(got > 0, want > 0) or bool((want[(got > 0) != (want > 0)] < 1e-30).all())
    budget = 2 * ((plain - want).abs().max() + torch.finfo(FP32).eps * sizes[0] / stride)
    assert (got - want).abs().max() <= budget


# each with its stride, its tiles, and what is awkward about it
CASES: dict[str, tuple[int, tuple[int, int], dict[str, Any]]] = {
    "one_query": (4, (16, 16), {"queries": 1}),
    "plain": (4, (16, 16), {"queries": 250, "query_heads": 3}),
    "several_tiles": (4, (16, 16), {"queries": 40, "keys": 1200, "dtype": BF16}),
    "published": (8, (64, 64), {"queries": 200, "dtype": BF16, "query_heads": 4, "head_dim": 24}),
    "one_group_a_block": (16, (32, 16), {"queries": 200, "kv_heads": 2, "dtype": FP16}),
    "wide_blocks": (4, (48, 128), {"queries": 200, "head_dim": 7}),
    "padded": (8, (16, 32), {"batch": 2, "queries": 150, "key_valid": left_padding(150, [0, 75])}),
    "holes": (
        4, (16, 16), {"batch": 2, "queries": 90, "keys": 200, "key_valid": with_holes(left_padding(200, [3, 75]))},
    ),
    "chunk_inside_a_group": (8, (16, 16), {"queries": 75, "keys": 250, "dtype": BF16}),
    "static_cache": (4, (16, 16), {"queries": 70, "keys": 200, "query_start": 50, "key_length": 120}),
    "softcap": (4, (16, 16), {"queries": 100, "softcap": 1.5}),
    "window": (8, (32, 32), {"queries": 200, "window": 61}),
    "first_blocks_out_of_sight": (4, (16, 16), {"queries": 30, "keys": 150, "window": 40}),
    "packed": (4, (16, 16), {"queries": 100, "segment": torch.tensor([[0] * 45 + [1] * 55])}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_masses_are_those_of_torch(name: str) -> None:
    stride, sizes, fields = CASES[name]
    inputs = inputs_of(fields)
    # tokens outside of heads, as a model has them
    inputs = dataclasses.replace(inputs, query=inputs.query.transpose(1, 2).contiguous().transpose(1, 2))
    assert_same_mass(inputs, stride, sizes)


@pytest.mark.parametrize(
    "tiling",
    [
        AntidiagonalTiling(16, 2, 16, 16, 4, 1), AntidiagonalTiling(64, 1, 32, 32, 4, 2),
        AntidiagonalTiling(32, 4, 128, 64, 8, 3),
    ],
    ids=str,
)  # fmt: skip
def test_the_tile_does_not_matter(tiling: AntidiagonalTiling, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_antidiagonal, "antidiagonal_tiling", lambda *_: tiling)
    for window in (None, 5):  # which ends in the last key group of a tile
        inputs = inputs_of({"queries": 150, "query_heads": 4, "head_dim": 24, "window": window})
        assert_same_mass(inputs, 4, (16, 16))


@pytest.mark.parametrize("value", [torch.inf, -3e38])  # the other one overflows
def test_padding_is_not_read(value: float) -> None:
    """What is no token may be NaN; what is one and not finite costs its own rows alone."""
    valid = with_holes(left_padding(120, [3, 40])[:, :120]).to(DEVICE)
    inputs = inputs_of({"batch": 2, "queries": 60, "keys": 120, "key_valid": valid})
    dirty = dataclasses.replace(
        inputs, query=inputs.query.masked_fill(~valid[:, None, 60:, None], torch.nan),
        key=inputs.key.masked_fill(~valid[:, None, :, None], torch.nan),
    )  # fmt: skip
    clean, same = (prepared(each, 4, (16, 16), "triton").scores(0, 4) for each in (inputs, dirty))
    assert torch.equal(clean, same)
    # of batch row 0, grid row 6 from slot 3 on
    dirty.key[0, 0, 105] = value
    dirty = dataclasses.replace(dirty, query=dirty.query.abs() + 10)
    got, want = (XAttention(0.5, stride=4, product=each) for each in ("triton", "torch"))
    grid = BlockGrid.of(dirty, 16, 16)
    index, other = got.build_index(dirty, grid), want.build_index(dirty, grid)
    assert torch.equal(index.to_mask(), other.to_mask())
    assert index.unjudged is not None
    assert index.unjudged.tolist() == [[21, 21], [0, 0]]
    assert other.unjudged is not None
    assert torch.equal(other.unjudged, index.unjudged)


@pytest.mark.parametrize("options", [{"threshold": 0.7}, {"keep": 0.4}, {"threshold": (0.0, 1.0)}], ids=str)
def test_xattention_lists_the_same_blocks(options: dict[str, Any]) -> None:
    inputs = inputs_of({"queries": 200, "dtype": BF16})
    grid = BlockGrid.of(inputs, 16, 16)
    made = (XAttention(stride=4, product=each, **options) for each in ("triton", "torch"))
    got, want = (pattern.build_index(inputs, grid) for pattern in made)
    got.validate(inputs)
    assert torch.equal(got.to_mask(), want.to_mask()), "seeds for which no block is at the cut"


def test_says_what_it_cannot_score(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of({"queries": 40})
    assert why_not_antidiagonal(inputs, 64, 8) is None
    for fields, block_k, stride, reason in (
        ({"dtype": torch.float64}, 64, 8, "not torch.float64"),
        ({}, 64, 2, "groups of 4, 8, 16 tokens, not of 2"),
        ({}, 48, 8, "and 48 keys are 6"),
        ({}, 20, 8, "and 20 keys are 2.5"),
        ({}, 256, 4, "and 256 keys are 64"),
        ({"head_dim": 257}, 64, 8, "head_dim 1 to 256, not 257"),
    ):
        assert reason in (why_not_antidiagonal(inputs_of({"queries": 40} | fields), block_k, stride) or "")
    with pytest.raises(NotImplementedError, match=r"triton cannot score antidiagonals: .* and 48 keys are 6"):
        XAttention(stride=8, product="triton").build_index(inputs, BlockGrid.of(inputs, 16, 48))
    bound = torch.zeros(1, 2, dtype=torch.int32, device=DEVICE)
    zero = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(NotImplementedError, match="not of 2"):
        triton_block_lse(
            inputs, stride=2, block_k=16, anchor=zero, first_group=zero, low=bound, high=bound, occupied=None, blocks=1
        )
    if DEVICE == "cpu":  # where a GPU is there, `auto` takes what serves
        assert prepared(inputs, 8, (16, 16), "auto").impl == "torch"
    monkeypatch.setattr(
        triton_antidiagonal, "device_limits", lambda device: triton_forward.DeviceLimits((8, 0), 4096, 0)
    )
    assert "no tile fits into the 4096 bytes" in (why_not_antidiagonal(inputs, 64, 8) or "")


@pytest.mark.parametrize("shared", [99 << 10, 163 << 10, 227 << 10])
def test_tilings_fit(shared: int) -> None:
    for dtype in (FP16, FP32):
        for block_k, stride in ((16, 16), (64, 8), (128, 4), (128, 16)):
            for group in (1, 2, 3, 4, 6, 7, 8, 48):
                for head_dim in (1, 16, 24, 80, 96, 128, 256):
                    tiling = antidiagonal_tiling(block_k, stride, group, head_dim, dtype, shared)
                    assert tiling is not None
                    assert tiling.shared_bytes(dtype) <= shared
                    assert tiling.keys % (block_k // stride) == 0
                    assert group % tiling.heads == 0
                    assert min(tiling.keys, tiling.channels, tiling.groups * tiling.heads) >= 16


@pytest.fixture
def no_reads() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("stride", [4, 8, 16])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_long_prompts_on_the_gpu(dtype: torch.dtype, stride: int) -> None:
    """The tensor cores and long loops, which no interpreter runs."""
    inputs = make_inputs(
        batch=2, query_heads=8, kv_heads=2, queries=5000, head_dim=128, dtype=dtype, device=DEVICE,
        key_valid=left_padding(5000, [0, 777], DEVICE),
    )  # fmt: skip
    assert_same_mass(inputs, stride, (64, 64))
    got, want = (
        XAttention(0.9, stride=stride, product=each).build_index(inputs, BlockGrid.of(inputs, 64, 64)).to_mask()
        for each in ("triton", "torch")
    )
    assert (got != want).float().mean() < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize(
    "pattern",
    [
        XAttention(0.9), XAttention(keep=0.2), XAttention(tuple(h / 8 for h in range(8))), Stem(keep=0.3, decay=0.5),
        PerHead((XAttention(0.9),) * 4 + (XAttention(0.5),) * 4),
    ],
    ids=str,
)  # fmt: skip
def test_nothing_is_read_back_to_the_host(pattern: Any, no_reads: None) -> None:
    inputs = make_inputs(
        batch=2, query_heads=8, kv_heads=2, queries=512, head_dim=64, dtype=BF16, device=DEVICE,
        key_valid=left_padding(512, [0, 100], DEVICE),
    )  # fmt: skip
    grid = BlockGrid.of(inputs, 64, 64)
    pattern.build_index(inputs, grid)
    torch.cuda.set_sync_debug_mode("error")
    index = pattern.build_index(inputs, grid)
    torch.cuda.set_sync_debug_mode("default")
    index.validate(inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", [XAttention(0.9, product="torch"), XAttention(0.9), Stem(keep=0.3)], ids=str)
def test_the_same_blocks_as_on_the_cpu(pattern: Any) -> None:
    inputs = make_inputs(queries=1500, head_dim=64, device=DEVICE)
    fields = {name: getattr(inputs, name).cpu() for name in ("query", "key", "value")}
    there = pattern.build_index(inputs, BlockGrid.of(inputs, 64, 64)).to_mask().cpu()
    here = dataclasses.replace(inputs, **fields)
    assert (there != pattern.build_index(here, BlockGrid.of(here, 64, 64)).to_mask()).float().mean() < 1e-3
