"""Low-bit codes and scores of tiles by Triton against plain torch: on the GPU where there is one, else interpreted."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid
from sparseprefill.kernels.low_bit import EXACT, EstimatedLogits, block_max, quantize
from sparseprefill.kernels.products import low_bit_codes
from sparseprefill.patterns import PerHead, Sale
from support import left_padding, make_inputs

if sys.platform != "linux":
    pytest.importorskip("triton", reason="triton is published for Linux only")

# conftest.py has switched the interpreter on where there is no GPU
from sparseprefill.kernels import triton_forward, triton_low_bit
from sparseprefill.kernels.triton_low_bit import (
    LowBitTiling,
    low_bit_tiling,
    triton_block_max,
    triton_quantize,
    why_not_triton_low_bit,
    why_not_triton_quantize,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


def make_logits(
    batch: int = 1,
    kv_heads: int = 1,
    group: int = 1,
    rows: int = 2,
    block_q: int = 16,
    block_k: int = 16,
    keys: int = 100,
    head_dim: int = 16,
    bits: int = 4,
    softcap: float | None = None,
    anchor: tuple[int, ...] = (0,),
    key_blocks: int | None = None,
    bounds: str = "ragged",
    holes: float = 0.0,
    seed: int = 0,
    device: str = DEVICE,
) -> EstimatedLogits:
    """Random codes. `bounds`: "ragged" (each query its own, some look at nothing), "even" (one pair a row), "none"."""
    draw = torch.Generator().manual_seed(seed)
    heads, queries = kv_heads * group, rows * block_q
    query = torch.randn(batch, heads, queries, head_dim, generator=draw)
    key = torch.randn(batch, kv_heads, keys, head_dim, generator=draw)
    begin = torch.tensor(anchor * batch if len(anchor) == 1 else anchor)
    low = torch.randint(0, keys, (batch, queries), generator=draw)
    high = torch.randint(0, keys + 1, (batch, queries), generator=draw)
    if bounds == "even":
        low, high = (b.view(batch, rows, block_q)[..., :1].repeat(1, 1, block_q).flatten(1) for b in (low, high))
        low, high = torch.minimum(low, high), torch.maximum(low, high)
    low = torch.maximum(low, begin[:, None])
    high = torch.maximum(low, high) if bounds != "none" else low
    bias = torch.randn(batch, heads, keys, generator=draw)
    bias[:, :, torch.rand(keys, generator=draw) < holes] = -torch.inf
    logits = EstimatedLogits(
        quantize(query, query.mean(2), bits), quantize(key, key.mean(2), bits), bias,
        torch.randn(batch, heads, queries, generator=draw), torch.randn(batch, heads, queries, generator=draw),
        low.to(torch.int32), high.to(torch.int32), begin, block_q, block_k,
        -(-keys // block_k) if key_blocks is None else key_blocks, head_dim**-0.5, softcap,
    )  # fmt: skip
    return moved(logits, device)


def moved(logits: Any, *to: Any) -> Any:
    """Floating-point fields to a dtype, or all fields to a device."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(logits):
        value = getattr(logits, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = moved(value, *to)
        elif isinstance(value, Tensor) and (value.is_floating_point() or isinstance(to[0], str)):
            changes[field.name] = value.to(*to)
    return dataclasses.replace(logits, **changes)


def assert_same_scores(logits: EstimatedLogits, got: Tensor) -> None:
    """Within twice the error of torch in float32, plus one rounding of the largest score; -inf at the same places."""
    exact, plain = block_max(moved(logits, torch.float64)), block_max(logits)
    empty = exact == -torch.inf
    assert got.dtype == torch.float32
    assert torch.equal(got == -torch.inf, empty)
    if empty.all():
        return
    got, plain, exact = (scores.double()[~empty] for scores in (got, plain, exact))
    rounding = torch.finfo(FP32).eps * exact.abs().max()
    assert (got - exact).abs().max() <= 2 * ((plain - exact).abs().max() + rounding)


CASES: dict[str, dict[str, Any]] = {
    "one_key": {"keys": 1, "rows": 1, "bounds": "even"},
    "nothing_is_looked_at": {"bounds": "none"},
    "all_padding": {"holes": 1.0},
    "padding": {"holes": 0.3, "keys": 150},
    "ragged": {"keys": 300, "block_k": 32},
    "even": {"keys": 300, "block_k": 32, "bounds": "even"},
    "rows_of_24": {"block_q": 24, "keys": 90},
    "rows_of_100": {"block_q": 100, "keys": 90, "rows": 1},
    "rows_of_128": {"block_q": 128, "block_k": 64, "rows": 1, "keys": 200},
    "blocks_of_64": {"block_k": 64, "keys": 290},
    "blocks_of_128": {"block_k": 128, "keys": 400, "block_q": 64},
    "groups_of_2": {"group": 2, "kv_heads": 2, "keys": 90},
    "groups_of_3": {"group": 3, "keys": 90},
    "groups_of_4": {"group": 4, "keys": 140, "block_q": 32, "bounds": "even"},
    "anchors": {"batch": 3, "anchor": (0, 33, 150), "keys": 150, "rows": 1, "holes": 0.2},
    "blocks_beyond_the_keys": {"keys": 50, "key_blocks": 12},
    "blocks_short_of_the_keys": {"keys": 150, "key_blocks": 3},
    "dim_9_bits_2": {"head_dim": 9, "bits": 2},
    "dim_80": {"head_dim": 80},
    "dim_100_bits_8": {"head_dim": 100, "bits": 8},
    "dim_256": {"head_dim": 256, "keys": 40, "rows": 1},
    "softcap": {"softcap": 0.7, "holes": 0.2},
    "softcap_even_groups": {"softcap": 3.0, "group": 2, "bounds": "even", "bits": 8},
}


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_torch(name: str) -> None:
    logits = make_logits(**CASES[name])
    assert_same_scores(logits, triton_block_max(logits))


@settings(max_examples=4)
@given(
    st.fixed_dictionaries(
        {
            "kv_heads": st.integers(1, 2), "group": st.integers(1, 3), "rows": st.integers(1, 2),
            "block_q": st.integers(16, 40), "block_k": st.sampled_from([16, 32, 64]), "keys": st.integers(1, 200),
            "head_dim": st.integers(1, 40), "bits": st.sampled_from([2, 4, 8]),
            "softcap": st.sampled_from([None, 2.0]), "anchor": st.tuples(st.integers(0, 60)),
            "bounds": st.sampled_from(["ragged", "even"]), "seed": st.integers(0, 99),
        }
    )
)  # fmt: skip
def test_scores_of_any_shape(fields: dict[str, Any]) -> None:
    logits = make_logits(**fields)
    assert_same_scores(logits, triton_block_max(logits))


@pytest.mark.parametrize(
    ("tiling", "bounds"),
    [
        (LowBitTiling(32, 16, 1, 4, 1, None), "even"),
        (LowBitTiling(64, 32, 4, 4, 2, 168), "ragged"),
        (LowBitTiling(128, 16, 2, 8, 3, None), "even"),
    ],
    ids=["32-16-1", "64-32-4", "128-16-2"],
)
def test_the_tile_does_not_matter(tiling: LowBitTiling, bounds: str) -> None:
    logits = make_logits(group=4, keys=130, rows=1, bounds=bounds)
    assert_same_scores(logits, triton_block_max(logits, tiling=tiling))


@pytest.mark.parametrize("bounds", ["ragged", "even"])
def test_a_row_of_several_parts(bounds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = make_logits(batch=2, anchor=(0, 20), keys=600, block_k=32, rows=1, bounds=bounds)
    whole = triton_block_max(logits)
    monkeypatch.setattr(triton_low_bit, "_PART", 256)
    assert torch.equal(triton_block_max(logits), whole)
    assert_same_scores(logits, whole)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_largest_sums_are_exact(bits: int) -> None:
    """All codes at their largest, with either sign, at the largest head_dim: no sum of integers overflows."""
    most = 2 ** (bits - 1) - 1
    logits = make_logits(head_dim=256, bits=bits, keys=32, rows=1, bounds="even")
    sign = torch.where(torch.arange(32) % 2 == 0, 1.0, -1.0)[:, None].expand(-1, 256)
    key = quantize((most * sign)[None, None], torch.zeros(1, 1, 256), bits)
    query = quantize(torch.full((1, 1, 16, 256), float(most)), torch.zeros(1, 1, 256), bits)
    flat = torch.zeros(1, 1, 16)
    logits = dataclasses.replace(
        logits, query=query, key=key, bias=torch.zeros(1, 1, 32), shift=flat, reference=flat, scale=1.0,
        low=torch.zeros(1, 16, dtype=torch.int32), high=torch.full((1, 16), 32, dtype=torch.int32),
    )  # fmt: skip
    logits = moved(logits, DEVICE)
    assert triton_block_max(logits).flatten().tolist() == [256.0 * most**2] * 2
    logits = dataclasses.replace(logits, low=logits.low + 31)
    assert triton_block_max(logits).flatten().tolist() == [-torch.inf, -256.0 * most**2]


GROUPS: dict[str, dict[str, Any]] = {
    "token": {"dim": 20, "size": 1, "heads": 2},
    "token_bits_8": {"dim": 64, "size": 1, "bits": 8, "dtype": FP16},
    "tile_of_16": {"dim": 80, "size": 16, "anchor": (5, -30), "dtype": BF16},
    "odd_group_and_dim": {"dim": 7, "size": 3, "anchor": (0, 1), "tokens": 5, "bits": 2},
    "group_of_several_tiles": {"dim": 128, "size": 80, "anchor": (7, 33), "tokens": 110},
    "anchors_far_away": {"dim": 16, "size": 16, "anchor": (500, -700), "tokens": 40},
    "dim_1": {"dim": 1, "size": 2, "tokens": 9},
}


@pytest.mark.parametrize("name", GROUPS)
def test_codes_are_those_of_torch(name: str) -> None:
    """To the bit: with ties, zeros, padding, and numbers that are not finite."""
    fields = {"bits": 4, "anchor": (0, 0), "tokens": 70, "heads": 1, "dtype": FP32} | GROUPS[name]
    draw = torch.Generator().manual_seed(1)
    vectors = torch.randn(2, fields["heads"], fields["tokens"], fields["dim"], generator=draw)
    mean = vectors.mean(2)
    vectors[0, 0, 3] = mean[0, 0]
    vectors[1, -1, 2, 0] = torch.nan
    vectors[0, -1, 4, -1] = -torch.inf
    vectors = vectors.to(fields["dtype"]).transpose(1, 2).contiguous().transpose(1, 2).to(DEVICE)
    real = (torch.rand(2, fields["tokens"], generator=draw) < 0.8).to(DEVICE)
    common = {"group_size": fields["size"], "anchor": torch.tensor(fields["anchor"], device=DEVICE)}
    for own in (real, None) if fields["size"] == 1 else (real,):
        want, got = (
            low_bit_codes(vectors, mean.to(DEVICE), fields["bits"], each, real=own, **common)
            for each in ("torch", "triton")
        )
        assert torch.equal(got.codes, want.codes)
        assert torch.equal(got.scale, want.scale)
        assert (got.bits, got.head_dim) == (want.bits, want.head_dim)


def test_halves_are_rounded_to_even() -> None:
    halves = torch.arange(-14, 15) / 2.0  # the largest is 7, so that a code is the number itself
    vectors, mean = halves[None, None, None].to(DEVICE), torch.zeros(1, 1, 29, device=DEVICE)
    codes = triton_quantize(vectors, mean, 4)
    assert codes.unpacked()[0, 0, 0, :29].tolist() == halves.round().tolist()
    assert torch.equal(codes.codes, quantize(vectors, mean, 4).codes)


def test_groups_begin_at_token_0_without_an_anchor() -> None:
    vectors = torch.randn(1, 1, 12, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    mean, anchor = vectors.mean(2), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    got, want = (triton_quantize(vectors, mean, 4, group_size=5, anchor=each) for each in (None, anchor))
    assert torch.equal(got.codes, want.codes)
    assert torch.equal(got.scale, want.scale)
    assert got.scale[0, 0].unique_consecutive().numel() == 3


@settings(max_examples=6)
@given(st.integers(0, 999), st.sampled_from([2, 4, 8]), st.integers(1, 70), st.integers(1, 40), st.integers(-50, 90))
def test_codes_of_any_shape(seed: int, bits: int, dim: int, size: int, anchor: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    vectors = (torch.randn(1, 1, 45, dim, generator=draw) * 100).round().to(DEVICE) / 32
    common = {"group_size": size, "anchor": torch.tensor([anchor], device=DEVICE), "real": None}
    want, got = (low_bit_codes(vectors, vectors.mean(2), bits, each, **common) for each in ("torch", "triton"))
    assert torch.equal(got.codes, want.codes)
    assert torch.equal(got.scale, want.scale)


SMALL = {"window": 32, "segment": 16, "query_block": 32, "key_block": 16}
WHOLE: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, int]]] = {
    "threshold": ({"threshold": 0.9, **SMALL}, {"queries": 190, "dtype": BF16}, (32, 16)),
    "wide_tiles": ({"threshold": 0.9, **SMALL}, {"queries": 190, "softcap": 1.5}, (64, 32)),
    "padded": (
        {"threshold": 0.9, "group": "tile", **SMALL},
        {"batch": 2, "query_heads": 1, "queries": 110, "key_valid": left_padding(110, [0, 37])}, (32, 16),
    ),
    "chunk": ({"threshold": 0.7, "bits": 2, "group": "tile", **SMALL}, {"queries": 40, "keys": 150}, (32, 32)),
    "budget": ({"keep": 0.4, "bits": 8, **SMALL}, {"queries": 150, "window": 90, "dtype": FP16}, (32, 16)),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_sale_lists_the_same_blocks(name: str) -> None:
    """Every block that differs scores within the rounding of the cut."""
    options, fields, blocks = WHOLE[name]
    fields = {key: value.to(DEVICE) if isinstance(value, Tensor) else value for key, value in fields.items()}
    inputs = make_inputs(**{"query_heads": 2, "kv_heads": 1, "scale": 0.1, "device": DEVICE} | fields)
    grid = BlockGrid.of(inputs, *blocks)
    by_triton, by_torch = (Sale(product=each, **options) for each in ("triton", "torch"))
    scored, known_scores = by_triton.estimate(inputs, grid), by_torch.estimate(inputs, grid)
    if by_torch.threshold is not None:  # one that parts the blocks
        half = float(known_scores[0][known_scores[0].isfinite()].median().exp())
        by_triton, by_torch = (dataclasses.replace(each, threshold=half) for each in (by_triton, by_torch))
    index, other = by_triton.choose(scored, inputs, grid), by_torch.choose(known_scores, inputs, grid)
    if name == "threshold":
        assert torch.equal(by_triton.build_index(inputs, grid).to_mask(), index.to_mask())
    index.validate(inputs)
    assert index.unjudged is not None
    assert torch.equal(index.unjudged, other.unjudged)  # type: ignore[arg-type]
    got, want = scored[0], known_scores[0]
    assert torch.equal(got == -torch.inf, want == -torch.inf)
    finite = want.isfinite()
    error = (got - want)[finite].abs().max()
    assert error <= 1e-5 * (1 + want[finite].abs().max()), "codes, windows and padding are the same"
    mask, known = index.to_mask(), other.to_mask()
    if by_torch.threshold is not None:
        cut = torch.tensor(by_torch.threshold).log()
    else:
        cut = want.masked_fill(~known | ~finite, torch.inf).amin(-1, keepdim=True)
    assert ((mask == known) | ((want - cut).abs() <= 2 * error)).all()
    # what decides must be there: some blocks stay and some go
    visible = grid.visible_block_mask(inputs)[:, None]
    assert bool((known & finite).any())
    assert bool((~known & visible).any())


def test_heads_with_thresholds_of_their_own() -> None:
    inputs = make_inputs(query_heads=2, kv_heads=1, queries=100, device=DEVICE)
    grid = BlockGrid.of(inputs, 32, 32)
    patterns = [Sale(threshold=t, product="triton", **SMALL | {"key_block": 32, "segment": 32}) for t in (0.9, 0.5)]
    mask = PerHead(tuple(patterns)).build_index(inputs, grid).to_mask()
    for head, pattern in enumerate(patterns):
        assert torch.equal(mask[:, head], pattern.build_index(inputs, grid).to_mask()[:, head])


def test_a_head_that_cannot_be_judged_is_dense() -> None:
    inputs = make_inputs(query_heads=2, kv_heads=2, queries=130, device=DEVICE)
    inputs.key[:, 1, 40, 3] = torch.inf
    grid = BlockGrid.of(inputs, 32, 32)
    index = Sale(threshold=0.9, product="triton", **SMALL | {"key_block": 32, "segment": 32}).build_index(inputs, grid)
    assert torch.equal(index.to_mask()[:, 1], grid.visible_block_mask(inputs))
    assert index.unjudged is not None
    assert index.unjudged.tolist() == [[0, 130]]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"dtype": torch.float64}, "float32, not in torch.float64"),
        ({"bits": EXACT}, "2, 4, 8 bits, not of 16"),
        ({"head_dim": 257}, "head_dim 1 to 256, not 257"),
        ({"block_q": 8}, "16 to 128 queries, not of 8"),
        ({"block_q": 129}, "16 to 128 queries, not of 129"),
        ({"block_k": 8}, "16, 32, 64 or 128 keys, not of 8"),
        ({"block_k": 48}, "16, 32, 64 or 128 keys, not of 48"),
        ({"block_k": 256}, "16, 32, 64 or 128 keys, not of 256"),
        ({"device": torch.device("meta")}, "NVIDIA GPUs, the inputs are on meta"),
    ],
    ids=str,
)
def test_says_what_it_cannot_score(fields: dict[str, Any], reason: str) -> None:
    shape = {
        "device": torch.device(DEVICE), "dtype": FP32, "bits": 4, "head_dim": 64, "block_q": 64, "block_k": 64,
    }  # fmt: skip
    assert why_not_triton_low_bit(**shape) is None
    assert reason in (why_not_triton_low_bit(**shape | fields) or "")


def test_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotImplementedError, match="blocks of 16, 32, 64 or 128 keys, not of 24"):
        triton_block_max(make_logits(block_k=24))
    vectors, mean = torch.zeros(1, 1, 4, 8, device=DEVICE), torch.zeros(1, 1, 8, device=DEVICE)
    with pytest.raises(NotImplementedError, match=r"not torch\.float64"):
        triton_quantize(vectors.double(), mean, 4)
    with pytest.raises(ValueError, match="at least one token"):
        triton_quantize(vectors, mean, 4, group_size=0)
    with pytest.raises(ValueError, match="bits must be one of"):
        triton_quantize(vectors, mean, 3)
    assert "not of 16" in (why_not_triton_quantize(vectors, EXACT) or "")
    inputs = make_inputs(queries=70, device=DEVICE)
    with pytest.raises(NotImplementedError, match=r"triton cannot score tiles: .* not of 48"):
        Sale(threshold=0.5, product="triton").build_index(inputs, BlockGrid.of(inputs, 48, 48))
    monkeypatch.setattr(triton_low_bit, "device_limits", lambda device: triton_forward.DeviceLimits((8, 0), 4096, 0))
    reason = why_not_triton_low_bit(torch.device(DEVICE), FP32, 4, 64, 64, 64)
    assert reason == "no tile fits into the 4096 bytes of shared memory that a block may use"


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)], ids=str)
@pytest.mark.parametrize("shared", [99 << 10, 163 << 10, 227 << 10])
def test_tilings_fit(shared: int, capability: tuple[int, int]) -> None:
    for block_q in (16, 24, 64, 100, 128):
        for block_k in (16, 32, 64, 128):
            for group in (1, 2, 3, 4, 7, 8):
                for head_dim in (16, 80, 128, 256):
                    tiling = low_bit_tiling(block_q, block_k, group, head_dim, 8, shared, capability)
                    assert tiling is not None
                    assert tiling.shared_bytes(head_dim, 8) <= shared
                    assert tiling.block_k % block_k == 0
                    assert triton_low_bit._PART % tiling.block_k == 0
                    assert group % tiling.heads == 0
                    assert tiling.block_q >= block_q


@pytest.fixture
def no_reads() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("group", ["token", "tile"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_long_prompts_on_the_gpu(bits: int, group: str) -> None:
    """The assembly, the tensor cores and long loops, which no interpreter runs."""
    valid = left_padding(5000, [0, 777], DEVICE)
    inputs = make_inputs(
        batch=2, query_heads=8, kv_heads=2, queries=5000, head_dim=128, dtype=BF16, device=DEVICE, key_valid=valid
    )  # fmt: skip
    grid = BlockGrid.of(inputs, 64, 64)
    (got, _), (want, _) = (
        Sale(threshold=0.01, bits=bits, group=group, product=each).estimate(inputs, grid)
        for each in ("triton", "torch")
    )
    assert torch.equal(got == -torch.inf, want == -torch.inf)
    finite = want.isfinite()
    assert (got - want)[finite].abs().max() <= 1e-4


@pytest.mark.gpu
def test_nothing_is_read_back_to_the_host(no_reads: None) -> None:
    inputs = make_inputs(
        batch=2, query_heads=8, kv_heads=2, queries=512, head_dim=64, dtype=BF16, device=DEVICE,
        key_valid=left_padding(512, [0, 100], DEVICE),
    )  # fmt: skip
    grid = BlockGrid.of(inputs, 64, 64)
    Sale(threshold=0.01).build_index(inputs, grid)
    torch.cuda.set_sync_debug_mode("error")
    Sale(threshold=0.01).build_index(inputs, grid)


@pytest.mark.gpu
def test_selection_stays_below_half_a_gibibyte() -> None:
    """Of 128k tokens in 32 heads, with blocks of 64 x 64; inputs and what attention needs are not counted."""
    query = torch.randn(1, 32, 1 << 17, 128, dtype=BF16, device=DEVICE)
    key, value = (torch.randn(1, 8, 1 << 17, 128, dtype=BF16, device=DEVICE) for _ in range(2))
    inputs = AttentionInputs(query, key, value, 128**-0.5)
    grid = BlockGrid.of(inputs, 64, 64)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    index = Sale(threshold=0.5).build_index(inputs, grid)
    assert torch.cuda.max_memory_allocated() - before < 1 << 29
    assert index.columns.nbytes < 270 << 20
