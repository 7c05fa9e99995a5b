"""Wrappers: what each adds to the pattern it goes around, what it saves, and what cannot be wrapped."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
import re
import threading
from typing import Any

import pytest
import torch
from method_cases import BLOCK, INPUTS, PART_INPUTS
from tiny_models import tiny_model, tokens
from torch import Tensor

from sparseprefill import patch_model
from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.kernels.reference import reference_attention
from sparseprefill.patterns import AShape, BlockSparse, Dense, LastRowsDense, PerHead, VerticalSlash
from sparseprefill.patterns.cached import Cached
from sparseprefill.patterns.cluster_segments import ClusterSegments
from sparseprefill.patterns.delta_correct import DeltaCorrect, dense_rows
from sparseprefill.patterns.flashprefill import FlashPrefill
from sparseprefill.patterns.hip import Hip
from sparseprefill.patterns.l_mul import LMul
from sparseprefill.patterns.layer_carry import LayerCarry
from sparseprefill.patterns.pbs import Pbs
from sparseprefill.patterns.per_head import of_heads
from sparseprefill.patterns.progressive import Progressive, rounded
from sparseprefill.patterns.skip_softmax import SkipSoftmax
from sparseprefill.patterns.stem import Stem
from sparseprefill.patterns.union import Union
from sparseprefill.patterns.wrapping import index_of_rows, rows_stand_alone
from sparseprefill.patterns.xattention import XAttention
from sparseprefill.prefill import resolve_method, sparse_prefill
from support import left_padding, make_inputs

INNER = BlockSparse(keep=0.2, sink=0, local=16)


def index_of(pattern: Any, inputs: AttentionInputs) -> BlockIndex:
    index: BlockIndex = pattern.build_index(inputs, BlockGrid.of(inputs, BLOCK, BLOCK))
    return index


# ---- delta correction


def real_queries(inputs: AttentionInputs) -> Tensor:
    if inputs.key_valid is None:
        return torch.ones(inputs.batch, inputs.queries, dtype=torch.bool)
    return inputs.key_valid[:, inputs.query_start : inputs.query_start + inputs.queries]


@pytest.mark.parametrize("shape", PART_INPUTS)
def test_dense_rows_are_those_of_dense_attention(shape: str) -> None:
    inputs = make_inputs(dtype=torch.float64, **PART_INPUTS[shape])
    place = torch.arange(0, inputs.queries, 7).expand(inputs.batch, -1)
    want = reference_attention(inputs, None).output
    assert want is not None
    got = dense_rows(inputs, place).transpose(1, 2)[real_queries(inputs)[:, ::7]]
    torch.testing.assert_close(got, want[:, :, ::7].transpose(1, 2)[real_queries(inputs)[:, ::7]])


@pytest.mark.parametrize("shape", PART_INPUTS)
def test_outputs_are_corrected_by_the_definition(shape: str) -> None:
    inputs = make_inputs(dtype=torch.float64, **PART_INPUTS[shape])
    pattern = DeltaCorrect(INNER, every=10)
    found = sparse_prefill(inputs, pattern, block_q=BLOCK, block_k=BLOCK, impl="reference")
    plain = sparse_prefill(inputs, INNER, block_q=BLOCK, block_k=BLOCK, impl="reference")
    dense = reference_attention(inputs, None).output
    got, sparse = found.result.output, plain.result.output
    assert got is not None
    assert sparse is not None
    assert dense is not None
    assert torch.equal(found.result.lse, plain.result.lse)
    whole = BlockIndex.dense(inputs, plain.index.grid).count == plain.index.count
    for b in range(inputs.batch):
        first = 0 if inputs.key_valid is None else max(0, int(inputs.key_valid[b].nonzero()[0]) - inputs.query_start)
        for q in range(first, inputs.queries):
            if not real_queries(inputs)[b, q]:
                continue
            g = first + (q - first) // 10 * 10
            helped = bool(real_queries(inputs)[b, g])
            if inputs.segment is not None:
                at = inputs.segment[b, inputs.query_start :]
                helped &= bool(at[g] == at[q])
            row = int(plain.index.grid.query_rows()[b, q])
            want = sparse[b, :, q] + (dense[b, :, g] - sparse[b, :, g])
            want = torch.where(whole[b, :, row, None] | torch.tensor(not helped), sparse[b, :, q], want)
            torch.testing.assert_close(got[b, :, q], want)


def test_every_query_corrected_is_dense_attention() -> None:
    inputs = make_inputs(queries=200)
    got = sparse_prefill(inputs, DeltaCorrect(INNER, every=1), block_q=BLOCK, block_k=BLOCK).result.output
    want = reference_attention(inputs, None).output
    assert got is not None
    assert want is not None
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


def test_a_correction_reaches_through_last_rows_and_leaves_them_alone() -> None:
    inputs = make_inputs(queries=200)
    pattern = resolve_method("delta_correct", keep=0.1, every=10, last_rows_dense=20)
    assert isinstance(pattern, LastRowsDense)
    got = sparse_prefill(inputs, pattern, block_q=BLOCK, block_k=BLOCK).result.output
    alone = sparse_prefill(inputs, DeltaCorrect(BlockSparse(keep=0.1), every=10), block_q=BLOCK, block_k=BLOCK)
    dense = reference_attention(inputs, None).output
    assert got is not None
    assert dense is not None
    assert alone.result.output is not None
    torch.testing.assert_close(got[:, :, -20:].double(), dense[:, :, -20:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[:, :, :170], alone.result.output[:, :, :170])
    assert not hasattr(LastRowsDense(INNER, 20), "correct")


def test_a_correction_helps_where_all_rows_miss_the_same() -> None:
    """Values with a common part far away, which a window never sees."""
    inputs = make_inputs(query_heads=2, kv_heads=2, queries=400)
    query = torch.zeros_like(inputs.query)
    plain = dataclasses.replace(inputs, query=query)
    plain.value[:, :, :200] += 2.0
    dense = reference_attention(plain, None).output
    assert dense is not None
    errors = []
    for pattern in (AShape(sink=0, window=32), DeltaCorrect(AShape(sink=0, window=32), every=32)):
        got = sparse_prefill(plain, pattern, block_q=BLOCK, block_k=BLOCK).result.output
        assert got is not None
        errors.append(float((got.double() - dense).norm()))
    assert errors[1] < 0.3 * errors[0]


def test_tiles_that_were_skipped_are_corrected_too() -> None:
    inputs = make_inputs(queries=300, query_heads=2, kv_heads=2)
    inputs.query[:] *= 4
    pattern = DeltaCorrect(SkipSoftmax(Dense(), scale=200.0), every=1)
    found = sparse_prefill(inputs, pattern, block_q=BLOCK, block_k=BLOCK).result
    dense = reference_attention(inputs, None).output
    assert found.output is not None
    assert dense is not None
    assert found.skipped is not None
    assert found.skipped.sum() > 0
    torch.testing.assert_close(found.output.double(), dense, atol=1e-5, rtol=1e-5)


def test_a_value_that_is_broken_breaks_those_who_see_it_alone() -> None:
    inputs = make_inputs(queries=320, head_dim=8, segment=torch.tensor([[0] * 160 + [1] * 160]))
    inputs.value[:, :, 200] = torch.inf
    output = sparse_prefill(inputs, DeltaCorrect(INNER, every=16), block_q=BLOCK, block_k=BLOCK).result.output
    assert output is not None
    assert bool(output[:, :, :160].isfinite().all()), "the first prompt sees nothing of the second"
    assert not bool(output[:, :, 300:].isfinite().all())


# ---- rows as calls of their own, and the cache of choices


ALONE = [
    INNER, BlockSparse(mass=0.6), FlashPrefill(0.5, sink=16, local=16), FlashPrefill(keep=0.3, sink=16, local=16),
    XAttention(0.7), XAttention(keep=0.3, stride=4), LMul(0.3, sink=16, local=16), Union(INNER, XAttention(0.5)),
    Progressive(INNER, flat=0.3), PerHead((INNER, LMul(0.3, sink=16, local=16))),
]  # fmt: skip
NOT_ALONE = [VerticalSlash(density=0.2), Union(INNER, VerticalSlash(density=0.2)), Cached(INNER), Hip(0.2, local=16),
             Stem(0.3, sink=16, local=16), LastRowsDense(INNER, 20), PerHead((INNER, Stem(0.3)))]  # fmt: skip


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("pattern", [*ALONE, *NOT_ALONE], ids=lambda pattern: f"{pattern!r:.60}")
def test_some_rows_get_the_lists_that_they_get_in_a_call_for_all(pattern: Any, name: str) -> None:
    assert rows_stand_alone(pattern) == (pattern in ALONE)
    inputs = make_inputs(query_heads=2, kv_heads=1, head_dim=8, **INPUTS[name])
    whole = index_of(pattern, inputs)
    grid = whole.grid
    wanted = torch.arange(grid.rows).expand(inputs.batch, -1) % 3 != 1
    some = index_of_rows("it", pattern, inputs, grid, wanted)
    some.validate(inputs)
    real = grid.real_queries(inputs) > 0
    for b in range(inputs.batch):
        rows = (wanted[b] & real[b]).nonzero()[:, 0]
        assert torch.equal(some.to_mask()[b][:, rows], whole.to_mask()[b][:, rows])


class Counting:
    """Counts the rows it is asked for."""

    rows_alone = True

    def __init__(self) -> None:
        self.rows = 0

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        self.rows += grid.rows
        return INNER.build_index(inputs, grid)


def test_alike_rows_are_not_asked_again() -> None:
    inputs = make_inputs(queries=640, head_dim=8)
    same = dataclasses.replace(inputs, query=inputs.query[:, :, :1].expand_as(inputs.query).contiguous())
    counting = Counting()
    index = index_of(Cached(counting, similar=0.99, most=9), same)
    assert counting.rows == 4, "40 rows, and nine may take the list of one"
    index.validate(same)
    assert Cached(counting, similar=0.99, most=9).taken_from(same, index.grid)[0].tolist() == [
        row // 10 * 10 for row in range(40)
    ]
    counting = Counting()
    index_of(Cached(counting, similar=1.1), inputs)
    assert counting.rows == 40, "no two rows are alike"
    products = [
        Cached(INNER, similar=similar).estimator_products(inputs, index.grid) for similar in (-1.0, 1.1)
    ]  # fmt: skip
    assert products[0] < products[1]


# ---- importance carried between layers


@torch.no_grad()
def lists(model: Any, **options: Any) -> tuple[list[Tensor], Tensor]:
    """Listed blocks of each layer in order, and the logits."""
    seen: list[Tensor] = []

    class Seen(LayerCarry):
        def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
            index = LayerCarry.build_index(self, inputs, grid)
            if inputs.queries == 600:  # not what patching tries out
                seen.append(index.to_mask())
            return index

    ids = tokens(1, 600)
    with patch_model(model, Seen(Dense(), first=0, near=16, probe=16, **options), min_length=1, block_q=16, block_k=16):
        logits = model(input_ids=ids).logits
    return seen, logits


def test_later_layers_lose_what_earlier_ones_did_not_look_at() -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    seen, logits = lists(model, fall=0.25, least=0.3)
    counts = [int(each.sum()) for each in seen]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[1] > counts[3]
    for before, after in itertools.pairwise(seen):
        assert not (after & ~before).any(), "what is dead stays dead"
    again, same = lists(model, fall=0.25, least=0.3)
    assert all(torch.equal(a, b) for a, b in zip(seen, again, strict=True)), "a new call begins anew"
    assert torch.equal(logits, same)
    late, _ = lists(model, start=3, fall=0.25, least=0.3)
    assert int(late[2].sum()) == int(late[0].sum()) > int(late[3].sum())


def test_threads_and_copies_have_memories_of_their_own() -> None:
    inputs = make_inputs(queries=400, head_dim=8)
    pattern = LayerCarry(BlockSparse(keep=1.0), fall=0.6, probe=16, first=0, near=0)
    index_of(pattern.for_layer(0), inputs)
    alone = index_of(pattern.for_layer(1), inputs).count.sum()
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(int(index_of(pattern.for_layer(1), inputs).count.sum())))
    thread.start()
    thread.join()
    assert found[0] > alone
    for other in (copy.deepcopy(pattern), pickle.loads(pickle.dumps(pattern))):
        assert other == pattern
        assert int(index_of(other.for_layer(1), inputs).count.sum()) == found[0]
    longer = make_inputs(queries=500, head_dim=8)
    assert index_of(pattern.for_layer(2), longer).count.sum() == index_of(Dense(), longer).count.sum(), "another call"


def test_votes_and_rows_that_are_not_finite_lose_nothing() -> None:
    inputs = make_inputs(queries=400, head_dim=8)
    broken = dataclasses.replace(inputs, query=inputs.query.clone())
    broken.query[0, 0, 395] = torch.nan  # a voter
    pattern = LayerCarry(BlockSparse(keep=1.0), fall=0.6, probe=16, first=0, near=0)
    index_of(pattern.for_layer(0), broken)
    assert index_of(pattern.for_layer(1), inputs).count.sum() == index_of(Dense(), inputs).count.sum()
    broken = dataclasses.replace(inputs, query=inputs.query.clone())
    broken.query[0, 1, 200] = torch.nan  # a row that the inner pattern keeps whole
    pattern = LayerCarry(BlockSparse(mass=0.9, sink=0, local=0), fall=0.6, probe=16, first=0, near=0)
    index_of(pattern.for_layer(0), inputs)
    index = index_of(pattern.for_layer(1), broken)
    assert index.unjudged is not None
    assert index.unjudged[0].tolist() == [0, BLOCK, 0, 0]
    assert index.count[0, 1, 200 // BLOCK] == 200 // BLOCK + 1


# ---- progressive precision


def test_few_bits_hold_what_they_can() -> None:
    inputs = make_inputs(queries=50)
    for bits in (2, 4, 8):
        few = rounded(inputs, bits)
        step = inputs.query.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        assert bool(((few.query - inputs.query).abs() <= step / 2 + 1e-6).all())
        assert all(len(row.abs().unique()) <= 2 ** (bits - 1) for row in few.key.flatten(0, 2))


def test_flat_rows_are_judged_with_all_bits() -> None:
    inputs = make_inputs(queries=640, head_dim=16)
    exact, coarse = index_of(INNER, inputs), index_of(INNER, rounded(inputs, 2))
    all_again = index_of(Progressive(INNER, bits=2, flat=1.0), inputs)
    assert torch.equal(all_again.to_mask(), exact.to_mask())
    none_again = index_of(Progressive(INNER, bits=2, flat=1e-9), inputs)
    assert torch.equal(none_again.to_mask(), coarse.to_mask())
    assert not torch.equal(exact.to_mask(), coarse.to_mask())
    peaks = Progressive(INNER, bits=2).peaks(rounded(inputs, 2), exact.grid)
    some = index_of(Progressive(INNER, bits=2, flat=float(peaks.median())), inputs).to_mask()
    again = peaks < float(peaks.median())
    assert torch.equal(some, torch.where(again[..., None], exact.to_mask(), coarse.to_mask()))


# ---- options, and what cannot be


def test_wrappers_by_name_go_around_any_method() -> None:
    assert resolve_method("cached", inner="stem", keep=0.3, similar=0.8) == Cached(
        resolve_method("stem", keep=0.3), similar=0.8
    )
    assert resolve_method("union", keep=0.1, other="a_shape:sink=0:window=0.1") == Union(
        BlockSparse(keep=0.1), AShape(0, 0.1)
    )
    assert resolve_method("delta_correct", inner="a_shape", window=100).inner == AShape(window=100)
    around = resolve_method("progressive", inner=Cached(INNER))
    assert around == Progressive(Cached(INNER))
    assert around.for_layer(3) == around


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Cached(INNER, similar=2.5), "similar must be a cosine"),
        (lambda: Cached(INNER, similar="much"), "similar must be a number"),  # type: ignore[arg-type]
        (lambda: Cached(INNER, most=0), "most must be at least 1"),
        (lambda: Cached(ClusterSegments()), "cached goes around a pattern with build_index"),
        (lambda: Cached(3), "cached goes around a pattern with build_index"),
        (lambda: Union(INNER, Pbs()), "union goes around a pattern with build_index"),
        (lambda: Union(DeltaCorrect(INNER), INNER), "DeltaCorrect changes outputs, and goes around union"),
        (lambda: Pbs(DeltaCorrect(INNER)), "DeltaCorrect changes outputs, and goes around pbs"),
        (lambda: SkipSoftmax(DeltaCorrect(INNER)), "DeltaCorrect changes outputs, and goes around skip_softmax"),
        (lambda: PerHead((DeltaCorrect(INNER),)), "cannot be the pattern of some heads"),
        (lambda: LayerCarry(INNER, start=-1), "start must be at least 0"),
        (lambda: LayerCarry(INNER, fall=0.0), "fall must be in (0, 1]"),
        (lambda: LayerCarry(INNER, least=1.5), "least must be in (0, 1]"),
        (lambda: PerHead((INNER, LayerCarry(INNER))), "LayerCarry carries something from layer to layer"),
        (lambda: PerHead((INNER, LastRowsDense(LayerCarry(INNER), 3))), "carries something from layer to layer"),
        (lambda: Cached(LayerCarry(INNER)), "LayerCarry carries something from call to call"),
        (lambda: Progressive(LastRowsDense(LayerCarry(INNER), 3)), "put what carries around progressive"),
        (lambda: Pbs(LayerCarry(INNER)), "put what carries around pbs"),
        (lambda: Cached(Union(INNER, LayerCarry(INNER))), "put what carries around cached"),
        (lambda: index_of(Cached(SkipSoftmax(INNER)), make_inputs(queries=90)), "put skipping around it"),
        (lambda: index_of(Progressive(SkipSoftmax(INNER)), make_inputs(queries=90)), "put skipping around it"),
        (lambda: Progressive(INNER, bits=1), "bits must be at least 2"),
        (lambda: Progressive(INNER, bits=17), "bits must be at most 16"),
        (lambda: Progressive(INNER, flat=0.0), "flat must be in (0, 1]"),
        (lambda: DeltaCorrect(INNER, every=0), "every must be at least 1"),
        (lambda: resolve_method("union", other="cached"), "a method that goes around no other one"),
        (lambda: resolve_method("union", other="a_shap"), "Did you mean 'a_shape'?"),
        (lambda: resolve_method("union", other="a_shape:windows=3"), "no option 'windows'"),
        (lambda: resolve_method("cached", similr=0.2), "Did you mean 'similar'?"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make: Any, said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(said)):
        make()


def test_what_an_inner_pattern_refuses_is_refused() -> None:
    inputs = make_inputs(queries=100, batch=2, key_valid=left_padding(100, [0, 30]))
    for pattern in (Cached(VerticalSlash(density=0.2)), Progressive(VerticalSlash(density=0.2)),
                    Union(INNER, VerticalSlash(density=0.2))):  # fmt: skip
        with pytest.raises(ValueError, match="square tiles"):
            pattern.build_index(inputs, BlockGrid.of(inputs, 16, 32))


def test_a_process_with_some_heads_has_both_halves_of_a_union() -> None:
    both = Union(PerHead((INNER, Dense(), Dense())), PerHead((Dense(), INNER, INNER)))
    assert of_heads(both, [1, 2]) == Union(PerHead((Dense(), Dense())), PerHead((INNER, INNER)))
