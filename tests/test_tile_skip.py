"""Tiles skipped while they are visited: the same decisions everywhere, by a literal definition; and what they cost."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseprefill import contracts
from sparseprefill.contracts import AttentionInputs, AttentionOutput, BlockGrid, BlockIndex
from sparseprefill.coverage import coverage
from sparseprefill.guard import Guard, guarded
from sparseprefill.huggingface_layers import PatchedLayer, Settings
from sparseprefill.kernels import block_sparse_attention, choose_implementation, cpu, why_not
from sparseprefill.kernels.reference import computed_tiles, listed_mask, reference_attention
from sparseprefill.kernels.tile_skip import tiles_to_compute
from sparseprefill.patterns import Dense, LastRowsDense, PerHead
from sparseprefill.prefill import sparse_prefill
from support import assert_within_budget, left_padding, make_inputs, random_index

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEVER = -math.inf
linux = pytest.mark.skipif(sys.platform != "linux", reason="triton is published for Linux only")


def biased(inputs: AttentionInputs, seed: int = 0) -> AttentionInputs:
    """Adds a number to the logits of every 16 keys, from -12 to 6, so that whole tiles come to weigh little."""
    draw = torch.Generator().manual_seed(seed)
    query, key = inputs.query.clone(), inputs.key.clone()
    bias = torch.rand(*key.shape[:2], -(-inputs.keys // 16), generator=draw) * 18 - 12
    query[..., 0] = 1 / inputs.scale
    key[..., 0] = bias.repeat_interleave(16, 2)[..., : inputs.keys].to(key)
    return dataclasses.replace(inputs, query=query, key=key)


def rising(inputs: AttentionInputs) -> AttentionInputs:
    """Adds a number to the logits that grows with the key's slot, from -12 to 6."""
    query, key = inputs.query.clone(), inputs.key.clone()
    query[..., 0] = 1 / inputs.scale
    key[..., 0] = torch.linspace(-12, 6, inputs.keys)
    return dataclasses.replace(inputs, query=query, key=key)


def with_skips(inputs: AttentionInputs, blocks: tuple[int, int], density: float = 0.8, seed: int = 0) -> BlockIndex:
    """Random lists, visited in random order; head 0 skips nothing, the others what weighs ever less."""
    index = random_index(inputs, *blocks, density)
    draw = torch.Generator().manual_seed(seed)
    scores = torch.rand(*index.count.shape, index.grid.key_blocks, generator=draw).to(inputs.device)
    thresholds = torch.tensor([NEVER, 0.0, -1.0, -4.0])[: inputs.query_heads].to(inputs.device)
    index = index.visiting(scores).skipping(thresholds)
    index.validate(inputs)
    return index


def holes(keys: int, pads: list[int], gaps: list[tuple[int, int]]) -> Tensor:
    valid = left_padding(keys, pads)
    for row, (start, stop) in enumerate(gaps):
        valid[row, start:stop] = False
    return valid


PADDED_RIGHT = torch.arange(100) < torch.tensor([100, 71])[:, None]
# name: blocks, fields of the inputs; the first ones run in Triton too, whose tiles are then those of the grid
CASES: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "ragged": ((32, 32), {"queries": 100}),
    "chunk-inside-a-block": ((32, 16), {"queries": 75, "keys": 130}),
    "right-padding": ((32, 32), {"batch": 2, "queries": 100, "key_valid": PADDED_RIGHT}),
    "window": ((16, 32), {"queries": 100, "window": 70}),
    "everything": (
        (32, 16),
        {
            "batch": 2, "queries": 70, "keys": 130, "query_start": 60, "key_length": 122, "window": 90, "head_dim": 80,
            "value_dim": 48, "softcap": 9.0, "sinks": torch.tensor([0.5, -3.0, 2.0, 0.0]),
            "key_valid": holes(130, [3, 20], [(75, 80), (90, 95)]),
            "segment": torch.tensor([[0] * 50 + [1] * 80] * 2),
        },
    ),
    "left-padding": ((32, 32), {"batch": 2, "queries": 100, "key_valid": left_padding(100, [0, 37])}),
    "row-of-padding": ((16, 16), {"batch": 2, "queries": 60, "key_valid": left_padding(60, [60, 3])}),
    "holes": ((16, 32), {"queries": 90, "keys": 130, "key_valid": holes(130, [5], [(60, 80)])}),
    "softcap": ((32, 32), {"queries": 100, "softcap": 8.0, "sinks": torch.tensor([0.5, -3.0, 2.0, 0.0])}),
    "segments": ((32, 32), {"queries": 100, "segment": torch.tensor([[0] * 33 + [1] * 40 + [2] * 27])}),
    "static-cache": ((32, 32), {"queries": 60, "keys": 160, "query_start": 40, "key_length": 100}),
    "odd-tiles": ((24, 40), {"queries": 100}),
}  # fmt: skip
QUICK = ("ragged", "everything")  # in the interpreter
TRITON_CASES = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in [*CASES][:5]]


@functools.cache
def prepared(name: str, dtype: torch.dtype = torch.float32) -> tuple[AttentionInputs, BlockIndex, Any]:
    """Inputs, lists and what the literal definition says of them."""
    blocks, fields = CASES[name]
    inputs = biased(make_inputs(dtype=dtype, **fields))
    index = with_skips(inputs, blocks)
    return inputs, index, literal(inputs, index)


def literal(inputs: AttentionInputs, index: BlockIndex) -> tuple[Tensor, list[list[int]], float]:
    """Tiles that are computed, pairs that are skipped, and how close the closest decision was: query by query.

    A tile is skipped iff every real query of its row that sees something of it finds its largest logit there at most
    log lambda above the largest one of the tiles that were computed before.
    """
    grid = index.grid
    computed, closest = index.to_mask(), math.inf
    skipped = [[0] * inputs.query_heads for _ in range(inputs.batch)]
    logits = inputs.query.double().unflatten(1, (inputs.kv_heads, -1)) @ inputs.key.double()[:, :, None].mT
    logits = logits.flatten(1, 2) * inputs.scale
    if inputs.softcap is not None:
        logits = inputs.softcap * torch.tanh(logits / inputs.softcap)

    def sees(b: int, slot: int, key: int) -> bool:
        return (
            key <= slot and key < inputs.filled
            and (inputs.key_valid is None or bool(inputs.key_valid[b, key]))
            and (inputs.segment is None or bool(inputs.segment[b, key] == inputs.segment[b, slot]))
            and (inputs.window is None or slot - key < inputs.window)
        )  # fmt: skip

    slots = range(inputs.query_start, inputs.query_start + inputs.queries)
    visible = [[[sees(b, slot, key) for key in range(inputs.keys)] for slot in slots] for b in range(inputs.batch)]
    for b in range(inputs.batch):
        anchor, first = int(grid.anchor[b]), int(grid.first[b])
        for h in range(inputs.query_heads):
            numbers = logits[b, h].tolist()
            for row in range(grid.rows):
                begin = anchor + (first + row) * grid.block_q
                queries = [slot - inputs.query_start for slot in slots if begin <= slot < begin + grid.block_q]
                threshold = float(index.skip[b, h, row])  # type: ignore[index]
                if threshold == NEVER or not queries:
                    continue
                start = int(index.start[b, h, row])
                highest = dict.fromkeys(queries, -math.inf)
                for block in index.visit[start : start + int(index.count[b, h, row])].tolist():  # type: ignore[index]
                    key = anchor + block * grid.block_k
                    keys = range(key, min(key + grid.block_k, inputs.keys))
                    seen = {i: [numbers[i][j] for j in keys if visible[b][i][j]] for i in queries}
                    real = [
                        i for i in queries
                        if seen[i] and (inputs.key_valid is None or bool(inputs.key_valid[b, slots[i]]))
                    ]  # fmt: skip
                    margins = [max(seen[i]) - highest[i] - threshold for i in real]
                    if real:  # what decides is the query that comes closest to keeping the tile, or keeps it most
                        closest = min(closest, abs(max(margins)))
                    if all(margin <= 0 for margin in margins):
                        computed[b, h, row, block] = False
                        skipped[b][h] += sum(map(len, seen.values()))
                    else:
                        highest = {i: max([highest[i], *seen[i]]) for i in queries}
    return computed, skipped, closest


@pytest.mark.parametrize("name", CASES)
def test_the_oracle_skips_by_the_definition(name: str) -> None:
    inputs, index, (computed, skipped, _) = prepared(name)
    assert torch.equal(computed_tiles(inputs, index), computed)
    result = block_sparse_attention(inputs, index, "reference")
    assert result.skipped.tolist() == skipped
    pruned = reference_attention(inputs, BlockIndex.from_mask(index.grid, computed))
    assert torch.equal(result.output, pruned.output)
    assert torch.equal(result.lse, pruned.lse)
    assert sum(map(sum, skipped)) > 0, "nothing is skipped: this case shows nothing"
    assert not any(heads[0] for heads in skipped), "head 0 skips nothing"


def check(result: AttentionOutput, name: str, dtype: torch.dtype) -> None:
    """The same tiles as the definition skips, and their pairs."""
    inputs, index, (_, skipped, closest) = prepared(name, dtype)
    assert closest > 1e-4, "a decision is within rounding: choose another seed"
    assert_within_budget(result, inputs, index)
    assert result.skipped.tolist() == skipped
    assert result.skipped.dtype == torch.int64


@pytest.mark.parametrize("impl", ["cpu", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_cpu_skips_what_the_definition_skips(name: str, dtype: torch.dtype, impl: str) -> None:
    inputs, index, _ = prepared(name, dtype)
    if impl == "native" and index.grid.block_q > 64:
        assert "rows of at most 64 queries" in (why_not(impl, inputs, index) or "")
        assert choose_implementation(inputs, index) == "cpu"
        return
    check(block_sparse_attention(inputs, index, impl), name, dtype)
    unread = dataclasses.replace(inputs, value=torch.full_like(inputs.value, torch.nan))
    check(block_sparse_attention(unread, index, impl, values=False), name, dtype)


@pytest.mark.parametrize("name", ["everything", "right-padding"])
def test_small_slabs_decide_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, index, _ = prepared(name)
    monkeypatch.setattr(cpu, "_PEAKS", 1)
    monkeypatch.setattr(cpu, "_CALL_BYTES", 1)
    monkeypatch.setattr(contracts, "_SLAB_ENTRIES", 1)
    check(block_sparse_attention(inputs, index, "cpu"), name, torch.float32)


@settings(max_examples=60)
@given(data=st.data())
def test_one_pass_decides_what_a_walk_decides(data: st.DataObject) -> None:
    """Also with NaN, infinities, and maxima that tie."""
    number = st.sampled_from([-math.inf, math.inf, math.nan, -3.0, -1.0, 0.0, 1.0, 2.0])
    tiles, queries = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    peaks = [data.draw(st.lists(number, min_size=queries, max_size=queries)) for _ in range(tiles)]
    counts = data.draw(st.lists(st.booleans(), min_size=queries, max_size=queries))
    threshold = data.draw(st.sampled_from([-math.inf, -2.0, -1.0, 0.0]))
    highest, want = torch.full((queries,), -math.inf), []
    for row in torch.tensor(peaks):
        keeps = [
            bool(n) and x != -math.inf and not x <= r + threshold for x, r, n in zip(row, highest, counts, strict=True)
        ]
        want.append(threshold == -math.inf or any(keeps))
        if want[-1]:
            highest = torch.maximum(highest, row)
    got = tiles_to_compute(torch.tensor([peaks]), torch.tensor([counts]), torch.tensor([threshold]))
    assert got.tolist() == [want]


def some_heads(inputs: AttentionInputs, index: BlockIndex, heads: list[int]) -> tuple[AttentionInputs, BlockIndex]:
    assert index.skip is not None
    start, count, skip = (t[:, heads] for t in (index.start, index.count, index.skip))
    return inputs.select_heads(heads), dataclasses.replace(index, start=start, count=count, skip=skip)


@linux
@pytest.mark.parametrize("name", TRITON_CASES)
def test_triton_skips_what_the_definition_skips(name: str) -> None:
    """The tiling takes these tiles whole. Two heads are enough for the interpreter, one of them without a threshold."""
    whole, lists, (_, skipped, closest) = prepared(name)
    assert closest > 1e-4, "a decision is within rounding: choose another seed"
    heads = [0, 2]
    inputs, index = some_heads(whole, lists, heads)
    for values in (True,) if name in QUICK else (True, False):
        unread = inputs if values else dataclasses.replace(inputs, value=torch.full_like(inputs.value, torch.nan))
        result = on_host(block_sparse_attention(on_device(unread), on_device(index), "triton", values=values))
        assert_within_budget(result, inputs, index)
        assert result.skipped.tolist() == [[each[h] for h in heads] for each in skipped]


def on_device(thing: Any, impl: str = "triton") -> Any:
    """A dataclass with all its tensors where this implementation runs."""
    if impl != "triton":
        return thing
    moved = {}
    for field in dataclasses.fields(thing):
        value = getattr(thing, field.name)
        if isinstance(value, Tensor):
            moved[field.name] = value.to(DEVICE)
        elif isinstance(value, BlockGrid):
            moved[field.name] = on_device(value)
    return dataclasses.replace(thing, **moved)


def on_host(result: AttentionOutput) -> AttentionOutput:
    return AttentionOutput(*(None if t is None else t.cpu() for t in (result.output, result.lse, result.skipped)))


IMPLEMENTATIONS = ["reference", "cpu", "native", pytest.param("triton", marks=linux)]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_switched_off_it_is_the_same_to_the_bit(dense: bool, impl: str) -> None:
    """No threshold, an order alone, and thresholds of -inf; with every tile listed too."""
    inputs = make_inputs(batch=2, query_heads=1, kv_heads=1, queries=40, keys=60, key_valid=left_padding(60, [0, 23]))
    if dense:
        inputs = make_inputs(query_heads=1, kv_heads=1, queries=64)
    index = dataclasses.replace(with_skips(inputs, (16, 16), 1.0 if dense else 0.6), skip=None)
    never = index.skipping(NEVER)
    inputs, index, never = (on_device(each, impl) for each in (inputs, index, never))
    plain = block_sparse_attention(inputs, dataclasses.replace(index, visit=None), impl)
    assert plain.skipped is None
    for result in (block_sparse_attention(inputs, index, impl), block_sparse_attention(inputs, never, impl)):
        assert torch.equal(result.output, plain.output)
        assert torch.equal(result.lse, plain.lse)
    assert result.skipped.tolist() == [[0] * inputs.query_heads] * inputs.batch


@pytest.mark.parametrize("impl", ["cpu", "native"])
def test_switched_off_in_large_blocks_it_is_the_same_to_the_bit(impl: str) -> None:
    """Blocks of more keys than are otherwise taken at a time."""
    inputs = make_inputs(query_heads=2, kv_heads=1, queries=64, keys=700, query_start=636)
    index = BlockIndex.dense(inputs, BlockGrid.of(inputs, 64, 256))
    plain, never = (block_sparse_attention(inputs, each, impl) for each in (index, index.skipping(NEVER)))
    assert torch.equal(never.output, plain.output)
    assert torch.equal(never.lse, plain.lse)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_some_heads_of_an_earlier_result(impl: str) -> None:
    """Counts are replaced with the heads; heads that are run again over lists without thresholds skip nothing."""
    inputs = rising(make_inputs(batch=2, query_heads=2, queries=48, key_valid=left_padding(48, [0, 5])))
    index = Skipping(0.0).build_index(inputs, BlockGrid.of(inputs, 16, 16))
    full = BlockIndex.dense(inputs, index.grid)
    inputs, index, full = (on_device(each, impl) for each in (inputs, index, full))
    only = torch.tensor([[True, False], [False, False]], device=inputs.device)
    first, again = (block_sparse_attention(inputs, each, impl) for each in (index, full))
    lse, counts = first.lse.clone(), first.skipped.clone()
    assert (counts > 0).all()
    assert block_sparse_attention(inputs, full, impl, only=only, into=first) is first
    assert torch.equal(first.skipped, counts.masked_fill(only, 0))
    assert torch.equal(first.lse, torch.where(only[..., None], again.lse, lse))
    block_sparse_attention(inputs, index, impl, only=only, into=first)
    assert torch.equal(first.skipped, counts)
    assert torch.equal(first.lse, lse)
    with pytest.raises(ValueError, match="does not count them"):
        block_sparse_attention(inputs, index, impl, only=only, into=again)


def bound_holds(inputs: AttentionInputs, index: BlockIndex, result: AttentionOutput, slack: float = 1e-9) -> Tensor:
    """The kept share of what is listed, at least 1 / (1 + n * lambda) for a query that drops n keys.

    A dropped key weighs at most lambda * exp(r), and r, the maximum over tiles that are computed, is the logit of a key
    that is kept: so the dropped weigh at most n * lambda times the kept. With lambda = s / keys: the share lost is at
    most s / (1 + s).
    """
    listed = reference_attention(inputs, dataclasses.replace(index, skip=None))
    computed = BlockIndex.from_mask(index.grid, computed_tiles(inputs, index))
    seen = inputs.visible_mask()[:, None]
    before, after = ((listed_mask(each, inputs.keys, 0, inputs.queries) & seen).sum(3) for each in (index, computed))
    rows = index.grid.query_rows().clamp(min=0)[:, None].expand(-1, inputs.query_heads, -1)
    dropped_weight = (before - after) * index.skip.double().exp().gather(2, rows)
    real = before > 0
    if inputs.key_valid is not None:
        real &= inputs.key_valid[:, inputs.query_start : inputs.query_start + inputs.queries][:, None]
    lost = torch.where(real, listed.lse - result.lse, 0.0)
    assert (lost >= -slack).all(), "what is skipped cannot raise lse"
    assert (lost <= torch.where(real, dropped_weight.log1p(), 0.0) + slack).all()
    return lost


@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000), queries=st.integers(1, 60), past=st.integers(0, 40), pad=st.integers(0, 30),
    block_q=st.integers(4, 20), block_k=st.integers(4, 20), share=st.floats(0.01, 1.0), ordered=st.booleans(),
)  # fmt: skip
def test_what_a_query_loses_is_bounded(
    seed: int, queries: int, past: int, pad: int, block_q: int, block_k: int, share: float, ordered: bool
) -> None:
    keys = queries + past
    valid = left_padding(keys, [min(pad, keys - 1), 0])
    inputs = make_inputs(
        batch=2, query_heads=2, kv_heads=1, queries=queries, keys=keys, head_dim=4, scale=2.0, seed=seed,
        dtype=torch.float64, key_valid=valid,
    )  # fmt: skip
    index = random_index(inputs, block_q, block_k, 0.8, seed)
    threshold = math.log(share / keys)
    index = index.skipping(torch.tensor([threshold, min(0.0, threshold + 3)]))
    if ordered:
        draw = torch.Generator().manual_seed(seed)
        index = index.visiting(torch.rand(*index.count.shape, index.grid.key_blocks, generator=draw))
    index.validate(inputs)
    lost = bound_holds(inputs, index, reference_attention(inputs, index))
    assert (1 - (-lost[:, 0]).exp() <= share / (1 + share) + 1e-9).all()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_the_bound_is_reached(impl: str) -> None:
    """One heavy key in the tile visited first, and all keys of the other tiles lambda times as heavy."""
    keys, block = 256, 8
    threshold = float(torch.tensor(math.log(0.5 / keys), dtype=torch.float32))
    logits = torch.full((keys,), threshold, dtype=torch.float64)
    logits[-block:] = -60.0
    logits[-1] = 0.0
    query, value = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.ones(1, 1, keys, 1, dtype=torch.float64)
    inputs = AttentionInputs(query, logits.view(1, 1, -1, 1), value, 1.0, query_start=keys - 1)
    if impl == "cpu":
        inputs = dataclasses.replace(inputs, **{n: getattr(inputs, n).float() for n in ("query", "key", "value")})
    index = BlockIndex.dense(inputs, BlockGrid.of(inputs, 1, block)).skipping(threshold)
    latest_first = torch.arange(keys // block).view(1, 1, 1, -1)
    result = block_sparse_attention(inputs, index.visiting(latest_first), impl)
    assert result.skipped.tolist() == [[keys - block]]
    weight = (keys - block) * math.exp(threshold)
    lost = 1 - math.exp(float(result.lse) - float(reference_attention(inputs).lse))
    assert lost == pytest.approx(weight / (1 + weight), rel=1e-6)
    assert 0.96 * 0.5 / 1.5 < lost < 0.5 / 1.5
    # the other way round no tile is light when it comes
    assert block_sparse_attention(inputs, index, impl).skipped.tolist() == [[0]]


def test_lambda_1_skips_what_raises_no_maximum() -> None:
    inputs = biased(make_inputs(queries=100))
    index = with_skips(inputs, (32, 16)).skipping(0.0)
    logits = inputs.query.double() @ inputs.key.double().repeat_interleave(2, 1).mT * inputs.scale
    logits = logits.masked_fill(~inputs.visible_mask()[:, None], -torch.inf)
    computed = computed_tiles(inputs, index)
    for h in range(4):
        for row in range(4):
            start, part = int(index.start[0, h, row]), logits[0, h, row * 32 : (row + 1) * 32]
            highest = torch.full((part.shape[0],), -torch.inf, dtype=torch.float64)
            for block in index.visit[start : start + int(index.count[0, h, row])].tolist():
                peak = part[:, block * 16 : (block + 1) * 16].amax(1)
                assert bool(computed[0, h, row, block]) == bool((peak > highest).any())
                highest = torch.maximum(highest, peak)


def test_a_ragged_row_skips_as_its_queries_alone_do() -> None:
    """Slots after the last query, slots of padding, and slots of another chunk keep no tile."""
    inputs = biased(make_inputs(query_heads=2, queries=70, keys=134))  # the last row of 32 holds 6 queries
    index = with_skips(inputs, (32, 16)).skipping(torch.tensor([0.0, -1.0]))
    last = dataclasses.replace(inputs, query=inputs.query[:, :, -6:], query_start=128)
    grid = BlockGrid.of(last, 32, 16)
    alone = dataclasses.replace(
        index, grid=grid, start=index.start[:, :, -1:], count=index.count[:, :, -1:], skip=index.skip[:, :, -1:]
    )  # fmt: skip
    tiles = computed_tiles(last, alone)
    assert (~tiles & alone.to_mask()).any(), "nothing is skipped: this shows nothing"
    assert torch.equal(computed_tiles(inputs, index)[:, :, -1:], tiles)
    # the same with padding to the right, whose queries would keep every tile: no number is below NaN
    padded = make_inputs(query_heads=2, queries=90, keys=154, key_valid=(torch.arange(154) < 134)[None])
    for name in ("query", "key", "value"):
        getattr(padded, name)[:, :, : getattr(inputs, name).shape[2]] = getattr(inputs, name)
    padded.query[:, :, 70:] = torch.nan
    padded.key[:, :, 134:] = torch.nan
    lists = dataclasses.replace(index, grid=BlockGrid.of(padded, 32, 16))
    assert lists.grid.rows == index.grid.rows + 1
    lists = BlockIndex.stack([lists, BlockIndex.dense(padded, lists.grid)])
    lists = dataclasses.replace(lists, **{n: getattr(lists, n)[:, :, [0, 1, 2, 6]] for n in ("start", "count", "skip")})
    lists.validate(padded)
    assert torch.equal(computed_tiles(padded, lists)[:, :, :3, :9], computed_tiles(inputs, index))
    counts = []
    for impl in ("reference", "cpu", *(["triton"] if sys.platform == "linux" else [])):
        want, result = (
            block_sparse_attention(on_device(i, impl), on_device(x, impl), impl)
            for i, x in ((inputs, index), (padded, lists))
        )
        torch.testing.assert_close(result.output[:, :, :70], want.output)
        torch.testing.assert_close(result.lse[:, :, :70], want.lse)
        counts.append((want.skipped.tolist(), result.skipped.tolist()))
    assert counts[0] == counts[1] == counts[-1], "the reference counts what the others count"


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_tile_with_nan_is_computed(impl: str) -> None:
    """However little the rest of it weighs, so that the NaN shows; and so are all that its queries see afterwards."""
    inputs = rising(make_inputs(query_heads=2, queries=48))
    index = Skipping(0.0).build_index(inputs, BlockGrid.of(inputs, 16, 16))
    inputs, index = on_device(inputs, impl), on_device(index, impl)
    before = block_sparse_attention(inputs, index, impl).skipped[0].tolist()
    assert min(before) > 0
    inputs.key[:, 0, 4] = torch.nan  # in the tile that is visited last
    result = block_sparse_attention(inputs, index, impl)
    assert result.output[:, 0, 4:].isnan().all()
    assert not result.output[:, 1].isnan().any()
    kept = computed_tiles(inputs, index)[0, 0]
    assert kept[:, 0].all()
    assert result.skipped[0].tolist() == [int((~kept & index.to_mask()[0, 0]).sum()) * 256, before[1]]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_lists_of_a_part_may_all_be_empty(impl: str) -> None:
    """As where nothing lies behind any row: packed prompts, say, of less than a segment."""
    inputs = make_inputs(query_heads=2, kv_heads=1, queries=48)
    grid = BlockGrid.of(inputs, 16, 16)
    mask = torch.zeros(1, 2, 3, 3, dtype=torch.bool)
    for listed in (0, 1):
        mask[0, 1, 2, 0] = bool(listed)
        index = BlockIndex.from_mask(grid, mask).skipping(-1.0)
        result = block_sparse_attention(on_device(inputs, impl), on_device(index, impl), impl)
        assert result.skipped.tolist() == [[0, 0]]
        assert int((result.lse > -torch.inf).sum()) == 16 * listed
        assert int((result.output != 0).any(-1).sum()) == 16 * listed


def test_order_matters() -> None:
    """Few tiles are heavy, the first one is not: visited by weight, far more is skipped than by ascending id."""
    draw = torch.Generator().manual_seed(0)
    inputs = make_inputs(query_heads=8, kv_heads=4, queries=512, dtype=torch.float32)
    heavy = torch.rand(1, 4, 32, generator=draw).repeat_interleave(16, 2) ** 8 * 14  # few tiles, anywhere
    inputs.query[..., 0] = 1 / inputs.scale
    inputs.key[..., 0] = heavy
    inputs.key[:, :, :16, 0] = -5.0  # hardly any sink
    index = BlockIndex.dense(inputs, BlockGrid.of(inputs, 16, 16)).skipping(math.log(0.05))
    mass = heavy.unflatten(2, (32, 16)).amax(3).repeat_interleave(2, 1)[:, :, None].expand(-1, -1, 32, -1)
    ascending, ordered = (block_sparse_attention(inputs, i).skipped for i in (index, index.visiting(mass)))
    assert (ordered >= ascending).all()
    assert ordered.sum() > 1.2 * ascending.sum()
    bound_holds(inputs, index.visiting(mass), block_sparse_attention(inputs, index.visiting(mass)), 1e-5)


@linux
def test_parts_of_a_tile_are_counted() -> None:
    """With all logits equal and lambda 1, a program computes just the parts in which some query sees its first key."""
    from sparseprefill.kernels.triton_forward import Tiling, triton_attention

    valid = holes(90, [3, 20], [(30, 37), (50, 58)])
    inputs = make_inputs(batch=2, query_heads=1, kv_heads=1, queries=38, keys=90, window=55, key_valid=valid)
    inputs.query.zero_()
    grid = BlockGrid.of(inputs, 40, 24)
    index = Skipping(0.0).build_index(inputs, grid)
    result = triton_attention(on_device(inputs), on_device(index), tiling=Tiling(16, 16, 4, 1))
    seen, own = inputs.visible_mask(), valid[:, 52:]
    want = [0, 0]
    for b, row, part in itertools.product(range(2), range(grid.rows), range(3)):
        begin = int(grid.anchor[b]) + (int(grid.first[b]) + row) * 40 + part * 16
        queries = [n for n in range(begin - 52, min(begin + 16, begin - part * 16 + 40) - 52) if 0 <= n < 38]
        started = torch.zeros(38, dtype=torch.bool)
        start, count = int(index.start[b, 0, row]), int(index.count[b, 0, row])
        for block, piece in itertools.product(index.visit[start : start + count].tolist(), range(2)):
            key = int(grid.anchor[b]) + block * 24 + piece * 16
            tile = seen[b, queries, key : key + (8 if piece else 16)]
            if (tile.any(1) & ~started[queries] & own[b, queries]).any():
                started[queries] |= tile.any(1)
            else:
                want[b] += int(tile.sum())
    assert result.skipped.flatten().tolist() == want
    assert min(want) > 100


@linux
@pytest.mark.slow
@pytest.mark.parametrize("blocks", [(40, 24), (64, 64)], ids=str)
def test_parts_of_a_tile_are_decided_apart(blocks: tuple[int, int]) -> None:
    """Triton's tiles are smaller than the grid's: what a query loses has the same bound."""
    from sparseprefill.kernels.triton_forward import Tiling, triton_attention

    inputs = biased(make_inputs(query_heads=4, queries=50, keys=80, window=70))
    inputs, index = some_heads(inputs, with_skips(inputs, blocks), [0, 2])
    result = on_host(triton_attention(on_device(inputs), on_device(index), tiling=Tiling(16, 16, 4, 1)))
    listed = reference_attention(inputs, dataclasses.replace(index, skip=None))
    plain = reference_attention(inputs, dataclasses.replace(index, skip=None), dtype=torch.float32)
    slack = 2 * ((plain.lse - listed.lse).abs().max() + torch.finfo(torch.float32).eps * listed.lse.abs().max())
    lost = listed.lse - result.lse
    keys = listed_mask(index, inputs.keys, 0, inputs.queries).sum(3)
    assert (lost >= -slack).all()
    assert (lost <= (keys * index.skip[..., :1].double().exp()).log1p() + slack).all()
    assert (result.skipped > 0).tolist() == [[False, True]]


def test_density_counts_one_half_of_what_is_skipped() -> None:
    inputs, index, (_, skipped, _) = prepared("window")
    result = block_sparse_attention(inputs, index)
    without, seen = coverage(inputs, index), coverage(inputs, index, result.skipped)
    assert seen.skipped.tolist() == skipped[0]
    assert without.skipped.tolist() == [0] * 4
    torch.testing.assert_close(
        seen.density, without.density - torch.tensor(skipped[0], dtype=torch.float64) / (2 * seen.visible)
    )
    assert torch.equal(seen.tile_work, without.tile_work)


@dataclasses.dataclass(frozen=True, slots=True)
class Skipping:
    """Every block, with a threshold."""

    threshold: float

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        latest = torch.arange(grid.key_blocks, device=inputs.device).expand(
            inputs.batch, inputs.query_heads, grid.rows, -1
        )
        return BlockIndex.dense(inputs, grid).skipping(self.threshold).visiting(latest)


def test_reports_count_skipped_values() -> None:
    inputs = rising(make_inputs(queries=128))
    layer = PatchedLayer(0, Skipping(-1.0), False, Settings(block_q=32, block_k=32), "sdpa", "skipping", 32)
    done = sparse_prefill(inputs, Skipping(-1.0), block_q=32, block_k=32, observe=True)
    assert (done.coverage.skipped > 0).all()
    layer.note(done, "cpu")
    layer.note(done, "cpu")
    assert layer.report().density == done.coverage.density.tolist()
    assert max(layer.report().density) < 1
    assert layer.report().tile_work == [1.0] * 4


def test_a_guard_runs_heads_again_without_skipping() -> None:
    inputs = rising(make_inputs(queries=128))
    index = Skipping(0.0).build_index(inputs, BlockGrid.of(inputs, 32, 32))
    result = block_sparse_attention(inputs, index)
    assert (result.skipped > 0).all()
    after, call = guarded(inputs, index, result, Guard(1.0))
    assert call.check.failed.all()
    after.validate(inputs)
    assert (after.skip == NEVER).all()
    assert (result.skipped == 0).all()
    assert_within_budget(result, inputs, None)


def test_wrappers_and_joins_keep_order_and_thresholds() -> None:
    inputs = rising(make_inputs(queries=128))
    grid = BlockGrid.of(inputs, 32, 32)
    latest = [[2, 1, 0], [3, 2, 1, 0]]

    def lists(index: BlockIndex, head: int) -> list[list[int]]:
        index.validate(inputs)
        return [
            index.visit[start : start + count].tolist()
            for start, count in zip(index.start[0, head].tolist(), index.count[0, head].tolist(), strict=True)
        ]

    some = LastRowsDense(Skipping(-1.0), 3).build_index(inputs, grid)
    assert lists(some, 0)[2:] == [latest[0], [0, 1, 2, 3]]
    assert some.skip[0, 0].tolist() == [-1.0, -1.0, -1.0, NEVER]
    mixed = PerHead((Skipping(-1.0), Dense(), Skipping(-2.0), Dense())).build_index(inputs, grid)
    assert lists(mixed, 2)[2:] == latest
    assert lists(mixed, 1)[2:] == [[0, 1, 2], [0, 1, 2, 3]]
    assert mixed.skip[0, :, 0].tolist() == [-1.0, NEVER, -2.0, NEVER]
    whole = Skipping(-1.0).build_index(inputs, grid)
    halves = [
        dataclasses.replace(whole, start=whole.start[:, :, rows], count=whole.count[:, :, rows], **fields)
        for rows, fields in (
            (slice(0, 2), {"visit": None, "skip": None}), (slice(2, 4), {"skip": whole.skip[:, :, 2:]})
        )
    ]  # fmt: skip
    joined = BlockIndex.stack(halves)
    assert lists(joined, 3) == [[0], [0, 1], *latest]
    assert joined.skip[0, 3].tolist() == [NEVER, NEVER, -1.0, -1.0]
    assert BlockIndex.stack([dataclasses.replace(half, visit=None, skip=None) for half in halves]).skip is None
    result = block_sparse_attention(inputs, mixed)
    assert (result.skipped[0] > 0).tolist() == [True, False, True, False]


@pytest.mark.parametrize("entries", [1, 1 << 22])
def test_visits_follow_scores(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Higher first, ties by lower id, whatever blocks that are not listed score; thresholds and counts stay."""
    monkeypatch.setattr(contracts, "_SORT_ENTRIES", entries)
    inputs = make_inputs(batch=2, queries=90, keys=240, head_dim=8, key_valid=left_padding(240, [0, 37]))
    for index in (random_index(inputs, 16, 16, 0.5), BlockIndex.dense(inputs, BlockGrid.of(inputs, 24, 40))):
        index = dataclasses.replace(index.skipping(-2.0), unjudged=torch.ones(2, 4, dtype=torch.int64))
        draw = torch.Generator().manual_seed(0)
        scores = torch.randint(-1, 3, (*index.count.shape, index.grid.key_blocks), generator=draw).float()
        scores[scores < 0] = -torch.inf
        for given_scores in (scores, lambda start, stop, scores=scores: scores[:, :, start:stop]):
            ordered = index.visiting(given_scores)
            ordered.validate(inputs)
            assert torch.equal(ordered.to_mask(), index.to_mask())
            assert torch.equal(ordered.skip, index.skip)
            assert ordered.unjudged is index.unjudged
            for b, h, row in itertools.product(*map(range, index.count.shape)):
                start, count = int(ordered.start[b, h, row]), int(ordered.count[b, h, row])
                ids, own = ordered.columns[start : start + count].tolist(), scores[b, h, row].tolist()
                assert ordered.visit[start : start + count].tolist() == sorted(ids, key=lambda n: -own[n])


def test_what_does_not_fit_is_refused() -> None:
    inputs = make_inputs(queries=64)
    index = BlockIndex.dense(inputs, BlockGrid.of(inputs, 32, 32))
    for threshold in (0.1, math.nan, torch.tensor([0.0, -1.0, math.nan, 0.0]), torch.full((4,), 1e-3)):
        with pytest.raises(ValueError, match="0 or less"):
            index.skipping(threshold)
    for threshold in (torch.zeros(3), torch.zeros(1, 4), torch.zeros(1, 4, 3)):
        with pytest.raises(ValueError, match="one number, or a tensor"):
            index.skipping(threshold)
    assert index.skipping(torch.full((1, 4, 2), -1.0)).skip.shape == (1, 4, 2)
    with pytest.raises(ValueError, match=r"scores must be .*\(1, 4, 2, 2\)"):
        index.visiting(torch.zeros(1, 4, 2, 3))
    columns, shape = index.columns, index.count.shape
    for fields, message in (
        ({"visit": columns[:1]}, "visit must be int32"),
        ({"visit": columns.long()}, "visit must be int32"),
        ({"visit": torch.zeros_like(columns)}, "each once"),
        ({"visit": torch.tensor([1, 0], dtype=torch.int32)}, "each once"),  # the first row does not list block 1
        ({"skip": torch.zeros(1, 4)}, "skip must be float32"),
        ({"skip": torch.zeros(shape, dtype=torch.float64)}, "skip must be float32"),
        ({"skip": torch.full(shape, 0.5)}, "0 or less"),
        ({"skip": torch.full(shape, math.nan)}, "0 or less"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(index, **fields).validate(inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_long_lists_on_the_gpu(dtype: torch.dtype) -> None:
    """The bound holds, heads without a threshold keep their bits, and nothing is read back to the host."""
    inputs = rising(make_inputs(query_heads=4, kv_heads=2, queries=2048, keys=4096, head_dim=128, dtype=dtype))
    inputs.key[..., 0] *= 10
    index = Skipping(0.0).build_index(inputs, BlockGrid.of(inputs, 128, 64))
    index = on_device(index.skipping(torch.tensor([NEVER, 0.0, -1.0, -4.0])))
    inputs = on_device(inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = block_sparse_attention(inputs, index, "triton")
        plain = block_sparse_attention(inputs, dataclasses.replace(index, skip=None), "triton")
        scores = torch.zeros(*index.count.shape, index.grid.key_blocks, device=DEVICE)
        index.visiting(scores).skipping(-1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(result.output[:, 0], plain.output[:, 0])
    assert (result.skipped[:, 1:] > 0).all()
    listed = dataclasses.replace(index, skip=None)
    exact, rounded = (reference_attention(inputs, listed, dtype=each).lse for each in (torch.float64, dtype))
    slack = 2 * ((rounded - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max())
    keys = listed_mask(index, inputs.keys, 0, inputs.queries).sum(3)
    lost = exact - result.lse
    assert (lost >= -slack).all()
    assert (lost <= (keys * index.skip[..., :1].double().exp()).log1p() + slack).all()
