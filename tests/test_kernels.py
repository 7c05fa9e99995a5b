"""The CPU path and the dispatch, judged by the float64 oracle and by properties of attention."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseprefill.contracts import AttentionInputs, AttentionOutput, BlockGrid, BlockIndex
from sparseprefill.coverage import coverage, tile_pairs
from sparseprefill.kernels import block_sparse_attention, choose_implementation, native_build, why_not
from sparseprefill.kernels import row_lse as row_lse_module
from sparseprefill.kernels.native_block_max import native_block_max
from sparseprefill.kernels.native_check import check_cases, check_library
from sparseprefill.kernels.reference import listed_mask, reference_attention
from sparseprefill.kernels.row_lse import row_lse
from support import assert_within_budget, left_padding, make_inputs, random_index


def holes(keys: int) -> torch.Tensor:
    """Left padding in row 1, and in row 0 the gap that a second turn leaves behind a left-padded first one."""
    valid = left_padding(keys, [0, 37])
    valid[0, 50:70] = False
    return valid


# name, shape and fields of the inputs, (block_q, block_k)
CASES: dict[str, tuple[dict[str, object], tuple[int, int]]] = {
    "aligned": ({"queries": 256}, (64, 64)),
    "one-query": ({"queries": 1}, (64, 64)),
    "one-query-of-65": ({"queries": 1, "keys": 65}, (64, 64)),
    "63": ({"queries": 63}, (64, 64)),
    "65": ({"queries": 65}, (64, 64)),
    "1000": ({"queries": 1000, "head_dim": 16}, (64, 64)),
    "chunk": ({"queries": 128, "keys": 320}, (64, 64)),
    "chunk-inside-a-block": ({"queries": 100, "keys": 230}, (64, 64)),
    "groups-of-7": ({"queries": 130, "query_heads": 7, "kv_heads": 1}, (64, 64)),
    "no-groups": ({"queries": 130, "query_heads": 3, "kv_heads": 3}, (64, 64)),
    "dim-80": ({"queries": 130, "head_dim": 80}, (64, 64)),
    "dim-33": ({"queries": 130, "head_dim": 33, "value_dim": 21}, (64, 64)),
    "value-smaller": ({"queries": 130, "head_dim": 48, "value_dim": 32}, (64, 64)),
    "value-larger": ({"queries": 130, "head_dim": 32, "value_dim": 48}, (64, 64)),
    "wide-tiles": ({"queries": 200}, (32, 64)),
    "tall-tiles": ({"queries": 200}, (128, 32)),
    "odd-tiles": ({"queries": 200}, (48, 40)),
    "left-padding": ({"batch": 3, "queries": 200, "key_valid": left_padding(200, [0, 70, 13])}, (64, 64)),
    "nearly-all-padding": ({"batch": 2, "queries": 200, "key_valid": left_padding(200, [199, 0])}, (64, 64)),
    "holes": ({"batch": 2, "queries": 90, "keys": 200, "key_valid": holes(200)}, (64, 64)),
    "window": ({"queries": 300, "window": 70}, (64, 64)),
    "window-of-1": ({"queries": 130, "window": 1}, (64, 64)),
    "window-and-chunk": ({"queries": 100, "keys": 300, "window": 90}, (32, 64)),
    "softcap": ({"queries": 200, "softcap": 2.0}, (64, 64)),
    "sinks": ({"queries": 200, "sinks": torch.tensor([-1.0, 0.0, 2.0, 30.0])}, (64, 64)),
    "static-cache": ({"queries": 100, "keys": 300, "query_start": 0, "key_length": 100}, (64, 64)),
    "static-cache-later": ({"queries": 64, "keys": 300, "query_start": 128, "key_length": 192}, (64, 64)),
    "packed": (
        {"batch": 2, "queries": 200, "segment": torch.tensor([[0] * 90 + [1] * 110, [0] * 20 + [4] * 100 + [5] * 80])},
        (64, 64),
    ),
    "everything": (
        {
            "batch": 2, "queries": 90, "keys": 220, "key_valid": holes(220), "window": 100, "softcap": 5.0,
            "sinks": torch.tensor([0.5, -2.0, 1.0, 0.0]), "query_start": 120, "key_length": 210,
            "segment": torch.tensor([[0] * 100 + [1] * 120, [0] * 150 + [1] * 70]),
        },
        (64, 32),
    ),
}  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_cpu_matches_the_oracle(name: str, dtype: torch.dtype) -> None:
    fields, (block_q, block_k) = CASES[name]
    inputs = make_inputs(dtype=dtype, **fields)
    for density in (0.0, 0.4, 1.0):
        index = random_index(inputs, block_q, block_k, density)
        index.validate(inputs)
        assert_within_budget(block_sparse_attention(inputs, index, impl="cpu"), inputs, index)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_native_matches_the_oracle(name: str, dtype: torch.dtype, native: Path) -> None:
    fields, (block_q, block_k) = CASES[name]
    inputs = make_inputs(dtype=dtype, **fields)
    for density in (0.0, 0.4, 1.0):
        index = random_index(inputs, block_q, block_k, density)
        assert choose_implementation(inputs, index) == "native"
        assert_within_budget(block_sparse_attention(inputs, index), inputs, index)


@pytest.mark.parametrize("impl", ["cpu", "native"])
def test_the_default_dtype_decides_nothing(impl: str) -> None:
    """Results are float32 where they should be: the library would write past the end of what is smaller."""
    inputs = make_inputs(queries=200, window=150)
    index = random_index(inputs, 64, 64, 0.6)
    whole = make_inputs(queries=256)
    own = random_index(whole, 64, 64, 0.6)
    wanted, diagonal = block_sparse_attention(inputs, index, impl), block_sparse_attention(whole, own, impl)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found, second = block_sparse_attention(inputs, index, impl), block_sparse_attention(whole, own, impl)
    finally:
        torch.set_default_dtype(usual)
    for one, other in ((found, wanted), (second, diagonal)):
        assert one.lse.dtype == torch.float32
        assert torch.equal(one.lse, other.lse)
        assert torch.equal(one.output, other.output)


def test_the_default_dtype_decides_nothing_of_scores(native: Path) -> None:
    logits = next(check_cases())[1]
    wanted = native_block_max(logits)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = native_block_max(logits)
    finally:
        torch.set_default_dtype(usual)
    assert torch.equal(found, wanted)


@pytest.fixture(scope="module")
def tiles_library(tmp_path_factory: pytest.TempPathFactory, native_folder: Path) -> Path:
    """The native library with the tiles of AMX in plain C++. Skips where bfloat16 is not multiplied in pairs either."""
    made = tmp_path_factory.mktemp("tiles") / "tiles.so"
    compiler = native_build.find_compiler()
    command = [*compiler.command, *native_build._accepted_flags(compiler, print), "-O1"]
    defined = ["-DSPARSEPREFILL_EMULATE_TILES", *map(str, native_build.SOURCES)]
    done = subprocess.run([*command, *defined, "-o", made], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(made))
    loaded.sparseprefill_instructions.restype = ctypes.c_char_p
    if b"amx_bf16" not in loaded.sparseprefill_instructions():
        pytest.skip("tiles are emulated where the processor has avx512_bf16")
    return made


@pytest.fixture
def tiles(tiles_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That library serves in this test."""
    monkeypatch.setenv(native_build.VARIABLE, str(tmp_path))
    native_build.use(tiles_library)
    return tiles_library


@pytest.mark.parametrize(
    "name", [name if name in ("65", "everything") else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_tiles_match_the_oracle(name: str, tiles: Path) -> None:
    """With values and without, and where what may be skipped is or is not."""
    fields, (block_q, block_k) = CASES[name]
    inputs = make_inputs(dtype=torch.bfloat16, **fields)
    for density in (0.0, 0.4, 1.0):
        index = random_index(inputs, block_q, block_k, density)
        assert choose_implementation(inputs, index) == "native"
        result = block_sparse_attention(inputs, index)
        assert_within_budget(result, inputs, index)
        poisoned = dataclasses.replace(inputs, value=torch.full_like(inputs.value, torch.nan))
        assert torch.equal(block_sparse_attention(poisoned, index, values=False).lse, result.lse)
        if block_q > 64:
            continue
        never = block_sparse_attention(inputs, index.skipping(-torch.inf))
        assert torch.equal(never.output, result.output)
        skipping = index.skipping(-0.5)
        result = block_sparse_attention(inputs, skipping)
        assert torch.equal(result.skipped, reference_attention(inputs, skipping).skipped)
        assert_within_budget(result, inputs, skipping)


@pytest.mark.slow
def test_tiles_pass_the_check(tiles: Path) -> None:
    check_library(tiles)


def test_tiles_multiply_what_nobody_sees_by_nothing(tiles: Path) -> None:
    """NaN in padding, and in a cache that is not filled yet, within groups of keys that are packed together."""
    valid = left_padding(300, [0, 37])
    valid[0, 50:70] = False
    inputs = make_inputs(
        dtype=torch.bfloat16, batch=2, queries=100, keys=300, query_start=128, key_length=228, key_valid=valid
    )
    index = random_index(inputs, 64, 64, 1.0)
    clean = block_sparse_attention(inputs, index)
    assert_within_budget(clean, inputs, index)
    hidden = ~valid
    hidden[:, 228:] = True
    key, value = (t.masked_fill(hidden[:, None, :, None], torch.nan) for t in (inputs.key, inputs.value))
    found = block_sparse_attention(dataclasses.replace(inputs, key=key, value=value), index)
    assert torch.equal(found.output, clean.output)
    assert torch.equal(found.lse, clean.lse)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    queries=st.integers(1, 150), past=st.integers(0, 400), block_q=st.integers(1, 70), block_k=st.integers(1, 70),
    pad=st.integers(0, 60), window=st.one_of(st.none(), st.integers(1, 200)), density=st.floats(0, 1),
    head_dim=st.integers(1, 70), value_dim=st.integers(1, 70),
)  # fmt: skip
def test_tiles_in_any_geometry(
    queries: int,
    past: int,
    block_q: int,
    block_k: int,
    pad: int,
    window: int | None,
    density: float,
    head_dim: int,
    value_dim: int,
    tiles_library: Path,
) -> None:
    keys = queries + past
    inputs = make_inputs(
        dtype=torch.bfloat16, batch=2, query_heads=2, kv_heads=1, queries=queries, keys=keys, head_dim=head_dim,
        value_dim=value_dim, window=window, key_valid=left_padding(keys, [min(pad, keys - 1), 0]),
    )  # fmt: skip
    index = random_index(inputs, block_q, block_k, density)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(native_build.VARIABLE, str(tiles_library.parent))
        native_build.use(tiles_library)
        assert_within_budget(block_sparse_attention(inputs, index), inputs, index)


@pytest.mark.parametrize("impl", ["cpu", "native"])
@pytest.mark.parametrize("name", CASES)
def test_lse_only_reads_no_values(name: str, impl: str) -> None:
    fields, (block_q, block_k) = CASES[name]
    inputs = make_inputs(**fields)
    poisoned = dataclasses.replace(inputs, value=torch.full_like(inputs.value, torch.nan))
    index = random_index(inputs, block_q, block_k, 0.4)
    result = block_sparse_attention(poisoned, index, impl, values=False)
    assert result.output is None
    assert_within_budget(result, inputs, index)


@pytest.mark.parametrize(("name", "impl"), [*itertools.product(CASES, ("cpu", "native")), ("everything", "reference")])
def test_some_heads_into_an_earlier_result(name: str, impl: str) -> None:
    """Those heads over the other index, the others with the bits they had; nothing is computed where none is named."""
    fields, (block_q, block_k) = CASES[name]
    inputs = make_inputs(**fields)
    before, after = (random_index(inputs, block_q, block_k, density) for density in (0.2, 1.0))
    only = torch.zeros(inputs.batch, inputs.query_heads, dtype=torch.bool)
    for heads in ([], [(0, 1)], [(b, h) for b in range(inputs.batch) for h in range(b, inputs.query_heads)]):
        for b, h in heads:
            only[b, h] = True
        first = block_sparse_attention(inputs, before, impl)
        kept = first.output.clone(), first.lse.clone()
        result = block_sparse_attention(inputs, after, impl, only=only, into=first)
        assert result is first
        assert torch.equal(result.output[~only], kept[0][~only])
        assert torch.equal(result.lse[~only], kept[1][~only])
        mask = torch.where(only[..., None, None], after.to_mask(), before.to_mask())
        merged = BlockIndex.from_mask(before.grid, mask)
        rounded = result.output.to(inputs.query.dtype), result.lse
        assert_within_budget(AttentionOutput(*rounded), inputs, merged)
    lse = block_sparse_attention(inputs, before, impl, values=False)
    assert block_sparse_attention(inputs, after, impl, values=False, only=only, into=lse).output is None
    assert torch.equal(lse.lse[only], block_sparse_attention(inputs, after, impl, values=False).lse[only])


def test_heads_and_result_that_do_not_fit_are_refused() -> None:
    inputs = make_inputs(queries=130)
    index = random_index(inputs, 64, 64, 0.5)
    result, marks = block_sparse_attention(inputs, index), torch.ones(1, 4, dtype=torch.bool)
    other = block_sparse_attention(make_inputs(queries=131), random_index(make_inputs(queries=131), 64, 64, 0.5))
    for only, into, values, message in (
        (marks, None, True, "both or neither"),
        (None, result, True, "both or neither"),
        (marks[:, :3], result, True, r"only must be bool .*\(1, 4\)"),
        (marks.int(), result, True, "only must be bool"),
        (marks, other, True, "a result of other inputs"),
        (marks, AttentionOutput(result.output[..., :16], result.lse), True, "its output is"),
        (marks, result, False, "none where lse alone"),
    ):
        with pytest.raises(ValueError, match=message):
            block_sparse_attention(inputs, index, only=only, into=into, values=values)


@pytest.mark.parametrize("slab", [1 << 10, 1 << 20], ids=lambda slab: f"{slab}-logits")
@pytest.mark.parametrize("name", CASES)
def test_lse_of_some_rows_matches_the_oracle(name: str, slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For places in any order, however many keys are looked at together."""
    monkeypatch.setattr(row_lse_module, "_CPU_LOGITS", slab)
    fields, _ = CASES[name]
    inputs = make_inputs(**fields)
    draw = torch.Generator().manual_seed(1)
    place = torch.randint(inputs.queries, (inputs.batch, 7), generator=draw)
    made = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b, out: made.append(out.numel()) or bmm(a, b, out=out))
    got = row_lse(inputs, place).double()
    everywhere = place[:, None].expand(-1, inputs.query_heads, -1)
    exact = reference_attention(inputs).lse.gather(2, everywhere)
    plain = reference_attention(inputs, dtype=torch.float32).lse.gather(2, everywhere).double()
    empty = exact == -torch.inf
    assert torch.equal(got == -torch.inf, empty)
    got, exact, plain = (lse.masked_fill(empty, 0.0) for lse in (got, exact, plain))
    eps = torch.finfo(torch.float32).eps
    assert (got - exact).abs().max() <= 2 * ((plain - exact).abs().max() + eps * exact.abs().max())
    assert max(made) <= max(row_lse_module._CPU_LOGITS, inputs.batch * inputs.query_heads * 7)


@pytest.mark.parametrize("name", CASES)
def test_a_dense_index_is_dense_attention(name: str) -> None:
    fields, (block_q, block_k) = CASES[name]
    inputs = make_inputs(**fields)
    index = BlockIndex.dense(inputs, BlockGrid.of(inputs, block_q, block_k))
    index.validate(inputs)
    exact, listed = reference_attention(inputs), reference_attention(inputs, index)
    assert torch.equal(exact.lse, listed.lse)
    assert torch.equal(exact.output, listed.output)
    assert_within_budget(block_sparse_attention(inputs, index), inputs, None)
    share = coverage(inputs, index)
    torch.testing.assert_close(share.density, torch.ones_like(share.density))
    torch.testing.assert_close(share.tile_work, torch.ones_like(share.tile_work))


@pytest.mark.parametrize("name", CASES)
def test_coverage_counts_visible_pairs(name: str) -> None:
    fields, (block_q, block_k) = CASES[name]
    inputs = make_inputs(**fields)
    index = random_index(inputs, block_q, block_k, 0.4)
    visible = inputs.visible_mask()[:, None]
    listed = visible & listed_mask(index, inputs.keys, 0, inputs.queries)
    # padding queries that stand before the anchor see nothing, so they are in neither count
    brute = listed.sum((0, 2, 3)).double() / visible.sum()
    torch.testing.assert_close(coverage(inputs, index, slab=2).density, brute)
    assert tile_pairs(inputs, index.grid).sum() == visible.sum()


def test_oracle_on_a_worked_example() -> None:
    """Two keys with logits ln 3 and 0, a sink of ln 4: shares 3/8 and 1/8 of the mass, lse ln 4."""
    inputs = AttentionInputs(
        query=torch.tensor([[[[0.0], [1.0]]]], dtype=torch.float64),
        key=torch.tensor([[[[3.0]], [[1.0]]]], dtype=torch.float64).log().reshape(1, 1, 2, 1),
        value=torch.tensor([[[[8.0], [80.0]]]], dtype=torch.float64),
        scale=1.0,
        sinks=torch.tensor([4.0]).double().log(),
    )
    result = reference_attention(inputs)
    torch.testing.assert_close(result.output[0, 0, 1], torch.tensor([3.0 + 10.0], dtype=torch.float64))
    torch.testing.assert_close(result.lse[0, 0, 1], torch.tensor(4.0, dtype=torch.float64).log())
    torch.testing.assert_close(result.output[0, 0, 0], torch.tensor([8.0 / 5], dtype=torch.float64))


@pytest.mark.parametrize("impl", ["cpu", "native"])
def test_blocks_are_anchored_at_the_first_valid_key(impl: str) -> None:
    """The same prompt with and without left padding, one-shot and in chunks, meets the same grid."""
    alone = make_inputs(queries=200)
    index = random_index(alone, 64, 64, 0.3)
    whole = block_sparse_attention(alone, index, impl)

    pad = 57
    padded = make_inputs(queries=200 + pad, key_valid=left_padding(200 + pad, [pad]))
    for name in ("query", "key", "value"):
        getattr(padded, name)[:, :, pad:] = getattr(alone, name)
    shifted = BlockIndex.from_mask(BlockGrid.of(padded, 64, 64), _grown(index.to_mask(), 5, 5))
    result = block_sparse_attention(padded, shifted, impl)
    torch.testing.assert_close(result.output[:, :, pad:], whole.output)
    torch.testing.assert_close(result.lse[:, :, pad:], whole.lse)
    assert (result.lse[:, :, :pad] == -torch.inf).all()
    assert (result.output[:, :, :pad] == 0).all()

    for start, stop in ((0, 90), (90, 100), (100, 200)):  # edges inside blocks
        chunk = dataclasses.replace(
            alone, query=alone.query[:, :, start:stop], key=alone.key[:, :, :stop], value=alone.value[:, :, :stop],
            query_start=start,
        )  # fmt: skip
        grid = BlockGrid.of(chunk, 64, 64)
        mask = index.to_mask()[:, :, start // 64 : start // 64 + grid.rows, : grid.key_blocks]
        part = block_sparse_attention(
            chunk, BlockIndex.from_mask(grid, mask & grid.visible_block_mask(chunk)[:, None]), impl
        )
        torch.testing.assert_close(part.output, whole.output[:, :, start:stop])


def _grown(mask: torch.Tensor, rows: int, blocks: int) -> torch.Tensor:
    grown = torch.zeros(*mask.shape[:2], rows, blocks, dtype=torch.bool)
    grown[:, :, : mask.shape[2], : mask.shape[3]] = mask
    grown[:, :, mask.shape[2] :, 0] = True
    return grown


@pytest.mark.parametrize("impl", ["cpu", "native"])
def test_batch_row_alone_is_the_same_row(impl: str) -> None:
    inputs = make_inputs(batch=3, queries=200, key_valid=left_padding(200, [0, 70, 13]))
    index = random_index(inputs, 64, 64, 0.3)
    whole = block_sparse_attention(inputs, index, impl)
    for b in range(3):
        row = dataclasses.replace(
            inputs, **{n: getattr(inputs, n)[b : b + 1] for n in ("query", "key", "value", "key_valid")}
        )
        grid = BlockGrid.of(row, 64, 64)
        part = BlockIndex(grid, index.columns, index.start[b : b + 1], index.count[b : b + 1])
        torch.testing.assert_close(block_sparse_attention(row, part, impl).output, whole.output[b : b + 1])


@pytest.mark.parametrize("impl", ["cpu", "native"])
def test_more_blocks_never_lower_lse_and_kept_mass_is_a_share(impl: str) -> None:
    inputs = make_inputs(queries=320)
    few = random_index(inputs, 64, 64, 0.2)
    many = BlockIndex.from_mask(few.grid, few.to_mask() | random_index(inputs, 64, 64, 0.5, seed=1).to_mask())
    dense = reference_attention(inputs).lse
    lse_few, lse_many = (block_sparse_attention(inputs, i, impl).lse for i in (few, many))
    assert (lse_many >= lse_few - 1e-6).all()
    assert ((lse_few - dense).exp() <= 1 + 1e-5).all()


@pytest.mark.parametrize("impl", ["cpu", "native"])
def test_the_same_token_mask_with_another_block_size(impl: str) -> None:
    inputs = make_inputs(queries=256)
    coarse = random_index(inputs, 64, 64, 0.3)
    fine_mask = coarse.to_mask().repeat_interleave(4, 2).repeat_interleave(2, 3)
    grid = BlockGrid.of(inputs, 16, 32)
    fine = BlockIndex.from_mask(grid, fine_mask & grid.visible_block_mask(inputs)[:, None])
    a, b = (block_sparse_attention(inputs, i, impl) for i in (coarse, fine))
    torch.testing.assert_close(a.output, b.output)
    torch.testing.assert_close(a.lse, b.lse)


@pytest.mark.parametrize("impl", ["cpu", "native"])
def test_nothing_leaks_from_the_future(impl: str) -> None:
    inputs = make_inputs(queries=300)
    index = BlockIndex.dense(inputs, BlockGrid.of(inputs, 64, 64))
    sparse = random_index(inputs, 64, 64, 0.4)
    for chosen in (index, sparse):
        before = block_sparse_attention(inputs, chosen, impl).output
        key, value = inputs.key.clone(), inputs.value.clone()
        key[:, :, 150:], value[:, :, 150:] = 7.0, 1e4
        after = block_sparse_attention(dataclasses.replace(inputs, key=key, value=value), chosen, impl).output
        assert torch.equal(before[:, :, :150], after[:, :, :150])


@pytest.mark.parametrize("impl", ["cpu", "native"])
def test_lists_may_share_storage_and_have_slack(impl: str) -> None:
    inputs = make_inputs(queries=200)
    index = random_index(inputs, 64, 64, 0.4)
    blocks = index.grid.key_blocks
    ids = torch.full((*index.count.shape, blocks + 3), 99)
    for place in itertools.product(*map(range, index.count.shape)):
        count, start = int(index.count[place]), int(index.start[place])
        ids[place][:count] = index.columns[start : start + count]
    slack = BlockIndex.from_slots(index.grid, ids, index.count)
    slack.validate(inputs)
    assert torch.equal(slack.to_mask(), index.to_mask())
    a, b = (block_sparse_attention(inputs, i, impl).output for i in (index, slack))
    assert torch.equal(a, b)


@pytest.mark.parametrize("impl", ["cpu", "native"])
@pytest.mark.parametrize("queries", [128, 100], ids=["aligned", "partial"])
@pytest.mark.parametrize("density", [0.4, 1.0], ids=["sparse", "dense"])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_any_strides(name: str, density: float, queries: int, impl: str) -> None:
    """torch's fused operator takes the elements of a token for neighbours, whatever the last stride says."""
    inputs = make_inputs(query_heads=1, kv_heads=1, queries=queries)
    index = random_index(inputs, 64, 64, density)
    strided = dataclasses.replace(inputs, **{name: getattr(inputs, name).mT.contiguous().mT})
    assert getattr(strided, name).stride(-1) != 1
    a, b = (block_sparse_attention(i, index, impl) for i in (inputs, strided))
    assert torch.equal(a.output, b.output)
    assert torch.equal(a.lse, b.lse)


@pytest.mark.parametrize("impl", ["cpu", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_expanded_tensors(dtype: torch.dtype, impl: str) -> None:
    """Keys that the batch shares, values that all heads share, queries of one position: strides of 0."""
    inputs = make_inputs(batch=2, queries=130, dtype=dtype)
    expanded = dataclasses.replace(
        inputs, key=inputs.key[:1].expand(2, -1, -1, -1), value=inputs.value[:, :1].expand(-1, 2, -1, -1),
        query=inputs.query[:, :, :1].expand(-1, -1, 130, -1),
    )  # fmt: skip
    index = random_index(expanded, 64, 64, 0.5)
    assert_within_budget(block_sparse_attention(expanded, index, impl), expanded, index)


@pytest.mark.parametrize("impl", ["cpu", "native"])
def test_one_full_row_among_nearly_empty_ones(impl: str) -> None:
    inputs = make_inputs(queries=1024)
    grid = BlockGrid.of(inputs, 64, 64)
    mask = torch.eye(grid.rows, dtype=torch.bool).expand(1, 4, -1, -1).clone()
    mask[:, 1, 14, :15] = True
    index = BlockIndex.from_mask(grid, mask)
    assert_within_budget(block_sparse_attention(inputs, index, impl), inputs, index)


@pytest.mark.parametrize("impl", ["cpu", "native"])
def test_long_lists_do_not_drift(impl: str) -> None:
    """Many steps of the online softmax: a maximum that stays must fade nothing, not even by rounding."""
    inputs = make_inputs(query_heads=2, queries=64, keys=1 << 14, head_dim=64)
    index = random_index(inputs, 64, 64, 0.7)
    assert_within_budget(block_sparse_attention(inputs, index, impl), inputs, index)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_leaves_out_what_no_query_sees(dtype: torch.dtype, native: Path) -> None:
    """Padding, holes and unused slots of a cache may hold anything."""
    for name in ("left-padding", "holes", "static-cache", "static-cache-later", "everything"):
        fields, (block_q, block_k) = CASES[name]
        inputs = make_inputs(dtype=dtype, **fields)
        unseen = torch.arange(inputs.keys).expand(inputs.batch, -1) >= inputs.filled
        if inputs.key_valid is not None:
            unseen = unseen | ~inputs.key_valid
        index = random_index(inputs, block_q, block_k, 0.5)
        want = block_sparse_attention(inputs, index)
        for tensor in (inputs.key, inputs.value):
            tensor.masked_fill_(unseen[:, None, :, None], torch.nan)
        found = block_sparse_attention(inputs, index)
        assert torch.equal(found.output, want.output)
        assert torch.equal(found.lse, want.lse)


def test_merge_puts_heads_where_they_belong() -> None:
    inputs = make_inputs(queries=200)
    index = random_index(inputs, 64, 64, 0.4)
    parts = [
        (heads, BlockIndex(index.grid, index.columns, index.start[:, heads], index.count[:, heads]))
        for heads in ([2, 0], [3, 1])
    ]
    assert torch.equal(BlockIndex.merge(parts, 4).to_mask(), index.to_mask())
    with pytest.raises(ValueError, match="served once"):
        BlockIndex.merge(parts[:1], 4)


@pytest.mark.parametrize("impl", ["cpu", "native"])
@settings(max_examples=40, deadline=None)
@given(
    queries=st.integers(1, 150), past=st.integers(0, 100), block_q=st.integers(1, 70), block_k=st.integers(1, 70),
    pad=st.integers(0, 60), window=st.one_of(st.none(), st.integers(1, 200)), density=st.floats(0, 1),
)  # fmt: skip
def test_any_geometry(
    queries: int,
    past: int,
    block_q: int,
    block_k: int,
    pad: int,
    window: int | None,
    density: float,
    impl: str,
) -> None:
    keys = queries + past
    inputs = make_inputs(
        batch=2, query_heads=2, kv_heads=1, queries=queries, keys=keys, head_dim=8, window=window,
        key_valid=left_padding(keys, [min(pad, keys - 1), 0]),
    )  # fmt: skip
    index = random_index(inputs, block_q, block_k, density)
    index.validate(inputs)
    assert_within_budget(block_sparse_attention(inputs, index, impl), inputs, index)


def test_what_cannot_be_served_is_refused_with_a_reason() -> None:
    inputs = make_inputs(queries=130)
    index = random_index(inputs, 64, 64, 0.5)
    with pytest.raises(ValueError, match="unknown implementation 'gpu': choose one of auto, triton, native, cpu"):
        block_sparse_attention(inputs, index, impl="gpu")
    longer = make_inputs(queries=131)
    with pytest.raises(ValueError, match="made for 130 queries"):
        block_sparse_attention(longer, index)
    with pytest.raises(ValueError, match="4 heads, the query has 8"):
        block_sparse_attention(make_inputs(queries=130, query_heads=8), index)
    double = make_inputs(queries=130, dtype=torch.float64)
    assert "float64" in (why_not("cpu", double) or "")
    with pytest.raises(NotImplementedError, match=r"cpu: it computes float32.*"):
        block_sparse_attention(double, random_index(double, 64, 64, 0.5))
    assert block_sparse_attention(double, random_index(double, 64, 64, 0.5), impl="reference").output is not None
    trained = dataclasses.replace(inputs, query=inputs.query.requires_grad_())
    with pytest.raises(NotImplementedError, match=r"torch\.no_grad"):
        block_sparse_attention(trained, index)
    assert choose_implementation(make_inputs(queries=130)) == "cpu"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": 0.0}, "scale"),
        ({"softcap": -1.0}, "softcap"),
        ({"window": 0}, "window"),
        ({"sinks": torch.zeros(3)}, "sinks"),
        ({"key_valid": torch.ones(1, 5, dtype=torch.bool)}, "key_valid"),
        ({"key_valid": torch.ones(1, 128, dtype=torch.int64)}, "key_valid"),
        ({"segment": torch.zeros(1, 128)}, "segment"),
        ({"key_length": 200}, "key_length"),
        ({"query_start": 1}, "slots 1 to 128"),
        ({"query_heads": 3}, "multiple of KV heads"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else None,
)
def test_inputs_that_do_not_fit_together(fields: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make_inputs(**fields)


def test_validate_finds_every_broken_promise() -> None:
    inputs = make_inputs(queries=256)
    good = BlockIndex.dense(inputs, BlockGrid.of(inputs, 64, 64))
    shape = good.count.shape

    def broken(columns: list[int], count: int) -> BlockIndex:
        return BlockIndex(
            good.grid, torch.tensor(columns, dtype=torch.int32), torch.zeros(shape, dtype=torch.int64),
            torch.full(shape, count, dtype=torch.int32),
        )  # fmt: skip

    for index, message in (
        (broken([0], 0), "empty list"),
        (broken([0, 0], 2), "ascending"),
        (broken([0, 1], 2), "cannot see"),  # the first row sees block 0 only
        (broken([0], 2), "beyond the storage"),
        (broken([0, 1, 2, 3, 4], 5), "longer than"),
    ):
        with pytest.raises(ValueError, match=message):
            index.validate(inputs)
