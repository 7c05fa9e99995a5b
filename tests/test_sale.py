"""SALE in use: what it refuses, what it cannot judge, what it shares, what it costs, and the model around it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tiny_models import tiny_model, tokens
from ways import in_chunks, logits, padded

from sparseprefill import patch_model
from sparseprefill.cli import main
from sparseprefill.contracts import AttentionInputs, BlockGrid
from sparseprefill.estimators import RelativeAttention
from sparseprefill.estimators import relative_attention as estimating
from sparseprefill.evals import overhead
from sparseprefill.kernels import low_bit
from sparseprefill.kernels.products import PRODUCTS, ProductShape, choose_product
from sparseprefill.patterns import Dense, HeadScore, LastRowsDense, ModelPatterns, PerHead, Sale
from sparseprefill.patterns.expected_density import UNKNOWN, expected_density
from sparseprefill.patterns.expected_overhead import NOTHING, expected_overhead
from sparseprefill.prefill import COST_MODELS, resolve_method, sparse_prefill
from support import left_padding, make_inputs

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"window": 32, "segment": 32, "query_block": 32, "key_block": 16}
BLOCKS = {"block_q": 16, "block_k": 16, "min_length": 0}


def grid_of(inputs: AttentionInputs, block_q: int = 16, block_k: int = 16) -> BlockGrid:
    return BlockGrid.of(inputs, block_q, block_k)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, r"threshold must be in \(0, 1\), got 0.0"),
        ({"threshold": 1.0}, r"threshold must be in \(0, 1\), got 1.0"),
        ({"threshold": -0.1}, "threshold must be in"),
        ({"threshold": float("nan")}, "threshold must be in"),
        ({"threshold": "0.1"}, "threshold must be a number"),
        ({"threshold": True}, "threshold must be a number"),
        ({}, "either a threshold or a budget"),
        ({"threshold": 0.1, "keep": 0.2}, "either a threshold or a budget"),
        ({"keep": 1.5}, "keep as a share must be in"),
        ({"threshold": 0.1, "bits": 3}, "bits must be one of"),
        ({"threshold": 0.1, "bits": 4.0}, "bits must be one of"),
        ({"threshold": 0.1, "group": "head"}, "group must be one of token, tile"),
        ({"threshold": 0.1, "window": 100}, "window must be a multiple of key_block=32"),
        ({"threshold": 0.1, "segment": 48}, "segment must be a multiple of key_block=32"),
        ({"threshold": 0.1, "window": 32}, "window must be at least 64 tokens with query_block=64"),
        ({"threshold": 0.1, "window": 60, "segment": 20, "query_block": 48, "key_block": 20}, "at least 64 tokens"),
        ({"threshold": 0.1, "query_block": 1 << 20, "window": 1 << 20}, "query_block must be at most 4096"),
        ({"threshold": 0.1, "key_block": 1 << 20}, "key_block must be at most 4096"),
        ({"threshold": 0.1, "query_block": 0}, "query_block must be at least 1"),
        ({"threshold": 0.1, "expected": 0.0}, r"expected must be in \(0, 1\]"),
        ({"keep": 0.1, "expected": 0.1}, "a budget to keep says it by itself"),
        ({"threshold": 0.1, "product": "cuda"}, "unknown implementation 'cuda'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Sale(**options)


def test_the_method_has_the_published_threshold() -> None:
    assert resolve_method("sale") == Sale(threshold=0.004)
    assert resolve_method("sale", bits=8) == Sale(threshold=0.004, bits=8)
    assert resolve_method("sale", keep=0.2) == Sale(keep=0.2)
    with pytest.raises(ValueError, match="Did you mean 'threshold'"):
        resolve_method("sale", treshold=0.1)


@pytest.mark.parametrize("head_dim", [1, 7, 20, 33, 80, 128])
@pytest.mark.parametrize("bits", low_bit.BITS)
def test_codes_come_back_from_their_bytes(bits: int, head_dim: int) -> None:
    """Every head_dim is served; a code is within half a step of its vector, the largest of a group on the last step."""
    vectors = torch.randn(2, 3, 40, head_dim, generator=torch.Generator().manual_seed(0)) * 3 + 5
    vectors[0, 0, 3] = vectors[0, 0].mean(0)
    mean = low_bit.token_means(vectors, None)
    group = torch.arange(40).expand(2, -1) // 16
    for own in (None, group):
        codes = low_bit.quantize(vectors, mean, bits, group=own)
        whole = codes.unpacked()
        assert whole.shape[-1] % 8 == 0
        assert codes.codes.shape[-1] == (whole.shape[-1] if bits == 8 else whole.shape[-1] // 2)
        assert not whole[..., head_dim:].any()
        assert whole.abs().max() == 2 ** (bits - 1) - 1
        back = whole[..., :head_dim] * codes.scale[..., None]
        assert ((back - (vectors - mean[:, :, None])).abs() <= 0.5001 * codes.scale[..., None]).all()
        if own is not None:
            assert torch.equal(codes.scale[:, :, :16].amin(-1), codes.scale[:, :, :16].amax(-1))


def test_all_codes_of_four_bits_survive_packing() -> None:
    codes = torch.tensor(list(itertools.product(range(-7, 8), repeat=2)), dtype=torch.int8)  # high half, low half
    packed = low_bit.LowBit(low_bit.pack(codes), torch.ones(len(codes)), 4, 2)
    assert torch.equal(packed.unpacked(), codes)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_keys_that_are_all_alike_have_codes_of_zero(bits: int) -> None:
    """Nothing is divided by the scale of a group of zeros; what is left of a logit is exact."""
    inputs = make_inputs(queries=250, head_dim=8)
    inputs = dataclasses.replace(inputs, key=inputs.key[:, :, :1].expand_as(inputs.key).contiguous())
    prepared = RelativeAttention(bits=bits, **SMALL).prepare(inputs, grid_of(inputs))
    assert prepared.known.all()
    scores = prepared.scores(0, 16)
    near = scores[scores.isfinite()]
    # all weights of a query are alike, and sink and window of the last query hold between 3 and 6 blocks of keys
    assert -torch.inf < float(near.min()) <= float(near.max()) < 0
    assert float(near.max()) <= -torch.tensor(33.0).log() + 1e-4


@pytest.mark.parametrize("what", ["key inf", "query inf", "query nan"])
def test_what_is_not_finite_is_kept_whole_and_counted(what: str) -> None:
    """A head whose keys are not finite keeps everything, and so does a query's own group; the others do not notice."""
    inputs = make_inputs(query_heads=4, kv_heads=2, queries=400, head_dim=8, dtype=torch.float32)
    name, bad = what.split()
    getattr(inputs, name)[0, 0, 100, 3] = float(bad)
    pattern = Sale(threshold=0.9, **SMALL)
    index = pattern.build_index(inputs, grid_of(inputs))
    index.validate(inputs)
    dense = Dense().build_index(inputs, grid_of(inputs)).to_mask()
    touched = [0, 1] if name == "key" else [0]  # a mean over keys is of both heads of the group
    untouched = [head for head in range(4) if head not in touched]
    assert torch.equal(index.to_mask()[:, touched], dense[:, touched])
    clean = pattern.build_index(
        make_inputs(query_heads=4, kv_heads=2, queries=400, head_dim=8), grid_of(inputs)
    ).to_mask()
    assert torch.equal(index.to_mask()[:, untouched], clean[:, untouched])
    assert clean.sum() < dense.sum()
    assert index.unjudged is not None
    assert index.unjudged[0].tolist() == [400 if head in touched else 0 for head in range(4)]
    budget = Sale(keep=0.2, **SMALL).build_index(inputs, grid_of(inputs))
    assert torch.equal(budget.to_mask()[:, touched], dense[:, touched])


def test_a_query_without_local_mass_keeps_its_row() -> None:
    """Here nothing is filled in of what the last queries see; the rows before theirs do not notice."""
    inputs = make_inputs(query_heads=2, kv_heads=1, queries=300, head_dim=8)
    inputs = dataclasses.replace(inputs, key_length=200, window=64)
    pattern = Sale(threshold=0.9, **SMALL)
    index = pattern.build_index(inputs, grid_of(inputs))
    index.validate(inputs)
    sees = inputs.visible_mask().any(-1)[0]
    assert index.unjudged is not None
    assert index.unjudged.tolist() == [[int((~sees).sum())] * 2]
    assert 0 < int((~sees).sum()) < 100
    scores = pattern.estimator.prepare(inputs, grid_of(inputs)).scores(0, 19)
    blind = torch.tensor([bool((~sees[row : row + 16]).any()) for row in range(0, 300, 16)])
    assert (scores[0, :, blind] == torch.inf).all()
    assert (scores[0, :, ~blind] < torch.inf).all()


def test_a_query_whose_local_mass_overflows_keeps_its_row() -> None:
    """Means and keys are finite, and so is all that the other queries rest on."""
    inputs = make_inputs(query_heads=2, kv_heads=1, queries=300, head_dim=8)
    inputs.query[0, 1, 200] = 1e20 * inputs.key[0, 0, 200].sign()
    inputs.key[0, 0, 200] *= 1e19
    index = Sale(threshold=0.9, **SMALL).build_index(inputs, grid_of(inputs))
    assert index.unjudged is not None
    assert index.unjudged[0, 1] > 0
    row = 200 // 16
    assert torch.equal(index.to_mask()[0, 1, row], Dense().build_index(inputs, grid_of(inputs)).to_mask()[0, 1, row])


def test_holes_in_the_keys_are_not_looked_at() -> None:
    """A key that is not valid would have the largest weight of all, by what is exact of it; it moves no list."""
    valid = torch.rand(1, 400, generator=torch.Generator().manual_seed(0)) > 0.3
    valid[0, :16] = True
    inputs = make_inputs(query_heads=2, kv_heads=1, queries=400, head_dim=8, key_valid=valid)
    inputs.query.add_(1)
    pattern = Sale(threshold=0.9, **SMALL)
    clean = pattern.build_index(inputs, grid_of(inputs)).to_mask()
    inputs.key.masked_fill_(~valid[:, None, :, None], 50.0)
    assert torch.equal(pattern.build_index(inputs, grid_of(inputs)).to_mask(), clean)
    assert clean.sum() < Dense().build_index(inputs, grid_of(inputs)).to_mask().sum()


def test_padding_does_not_count_as_unjudged() -> None:
    inputs = make_inputs(batch=2, queries=200, head_dim=8, key_valid=left_padding(200, [0, 75]))
    index = Sale(threshold=0.5, **SMALL).build_index(inputs, grid_of(inputs))
    assert index.unjudged is not None
    assert not index.unjudged.any()


@pytest.mark.parametrize("bits", [4, low_bit.EXACT])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_padding_may_hold_anything(bad: float, bits: int) -> None:
    """Rows of padding that saw nothing are NaN in some models' next layer."""
    valid = left_padding(200, [0, 75])
    valid[0, 190:] = False
    pattern = Sale(threshold=0.5, bits=bits, **SMALL)
    inputs = make_inputs(batch=2, queries=200, head_dim=8, key_valid=valid)
    clean = pattern.build_index(inputs, grid_of(inputs))
    for tensor in (inputs.query, inputs.key, inputs.value):
        tensor.masked_fill_(~valid[:, None, :, None], bad)
    index = pattern.build_index(inputs, grid_of(inputs))
    assert index.unjudged is not None
    assert not index.unjudged.any()
    assert torch.equal(index.to_mask(), clean.to_mask())


@pytest.mark.parametrize(("query_block", "key_block"), [(48, 20), (16, 40), (64, 32), (20, 16)])
def test_the_least_window_holds_each_query(query_block: int, key_block: int) -> None:
    """Also where a row ends inside a key block; a multiple less is refused, or holds all queries by luck of the cut."""
    least = query_block + key_block - math.gcd(query_block, key_block)
    window = -(-least // key_block) * key_block
    sizes = {"segment": key_block, "query_block": query_block, "key_block": key_block}
    inputs = make_inputs(queries=400, head_dim=8)
    slot = torch.arange(400)
    _, high = RelativeAttention(window=window, **sizes)._tested_keys(inputs, grid_of(inputs))
    assert (high <= torch.maximum(slot, torch.tensor(key_block))).all()
    with pytest.raises(ValueError, match=f"window must be at least {least} tokens"):
        RelativeAttention(window=window - key_block, **sizes)


class TestHeads:
    """Thresholds of their own, one estimate."""

    def test_each_head_gets_what_its_own_pattern_gives(self) -> None:
        inputs = make_inputs(query_heads=4, kv_heads=2, queries=300, head_dim=8)
        each = (
            Sale(threshold=0.9, **SMALL), Sale(threshold=0.3, **SMALL), Dense(), Sale(keep=0.4, **SMALL)
        )  # fmt: skip
        index = PerHead(each).build_index(inputs, grid_of(inputs))
        index.validate(inputs)
        for head, pattern in enumerate(each):
            alone = pattern.build_index(inputs, grid_of(inputs)).to_mask()[:, head]
            assert torch.equal(index.to_mask()[:, head], alone), head
        assert index.unjudged is not None
        assert index.unjudged.tolist() == [[0, 0, 0, 0]]

    def test_keys_become_codes_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        prepared = []
        prepare = RelativeAttention.prepare

        def counted(self: RelativeAttention, inputs: AttentionInputs, grid: BlockGrid) -> Any:
            prepared.append(inputs.kv_heads)
            return prepare(self, inputs, grid)

        monkeypatch.setattr(RelativeAttention, "prepare", counted)
        inputs = make_inputs(query_heads=6, kv_heads=2, queries=100, head_dim=8)
        heads = tuple(Sale(threshold=0.1 + head / 10) for head in range(6))
        PerHead(heads).build_index(inputs, grid_of(inputs))
        PerHead(tuple(LastRowsDense(each, 20) for each in heads)).build_index(inputs, grid_of(inputs))
        assert prepared == [2, 2], "six thresholds, one estimate, keys of two KV heads"

    def test_last_rows_are_whole_above_thresholds_of_their_own(self) -> None:
        inputs = make_inputs(query_heads=4, kv_heads=2, queries=300, head_dim=8)
        heads = tuple(LastRowsDense(Sale(threshold=0.6 + head / 10, **SMALL), 40) for head in range(4))
        index = PerHead(heads).build_index(inputs, grid_of(inputs))
        index.validate(inputs)
        for head, pattern in enumerate(heads):
            alone = pattern.build_index(inputs, grid_of(inputs)).to_mask()[:, head]
            assert torch.equal(index.to_mask()[:, head], alone), head
        assert heads[0].expecting(0.4).pattern == heads[0].pattern.expecting(0.4)

    def test_a_profile_of_thresholds_runs(self) -> None:
        model, ids = tiny_model("llama"), tokens(1, 200)
        heads = tuple(Sale(threshold=0.2 + 0.1 * head, **SMALL) for head in range(model.config.num_attention_heads))
        with patch_model(model, PerHead(heads), **BLOCKS) as patch:
            logits(model, input_ids=ids)
            density = patch.report().layers[0].density
        assert density is not None
        assert density == sorted(density, reverse=True), "a higher threshold keeps no more"


@pytest.mark.parametrize("shape", ["plain", "padded", "chunk", "window", "softcap"])
@pytest.mark.parametrize("bits", low_bit.BITS)
def test_the_native_product_keeps_the_same_blocks(native: Path, bits: int, shape: str) -> None:
    inputs = make_inputs(
        queries=700, head_dim=40,
        **{
            "plain": {}, "padded": {"batch": 2, "key_valid": left_padding(700, [0, 133])},
            "chunk": {"keys": 1000}, "window": {"window": 500}, "softcap": {"softcap": 2.0},
        }[shape],
    )  # fmt: skip
    grid = BlockGrid.of(inputs, 64, 64)
    assert choose_product(ProductShape(inputs.device, torch.float32, bits, 40, 64, 64)) == "native"
    native_scores, torch_scores = (
        RelativeAttention(bits=bits, product=product).prepare(inputs, grid).scores(0, grid.rows)
        for product in ("auto", "torch")
    )
    for threshold in (0.1, 0.5, 0.9):
        kept = Sale(threshold=threshold, bits=bits).build_index(inputs, grid).to_mask()
        wanted = Sale(threshold=threshold, bits=bits, product="torch").build_index(inputs, grid).to_mask()
        cut = torch.tensor(threshold).log()
        error = (native_scores - torch_scores)[torch_scores.isfinite()].abs().max()
        assert ((kept == wanted) | ((torch_scores - cut).abs() <= 2 * error)).all()
        assert error < 1e-5


def test_what_a_product_cannot_is_refused_by_name() -> None:
    assert choose_product(ProductShape(torch.device("cpu"), torch.float32, 4, 64, 64, 64)) == "torch", "not built"
    inputs = make_inputs(queries=100, head_dim=8)
    with pytest.raises(NotImplementedError, match=r"native cannot score tiles: .*build-cpu"):
        Sale(threshold=0.1, product="native").build_index(inputs, grid_of(inputs))
    assert set(PRODUCTS) == {"triton", "native", "torch"}


def test_the_native_product_says_what_it_cannot(native: Path) -> None:
    for shape, message in (
        (ProductShape(torch.device("cpu"), torch.float64, 4, 64, 64, 64), "float32"),
        (ProductShape(torch.device("cpu"), torch.float32, 16, 64, 64, 64), "not of 16"),
        (ProductShape(torch.device("cpu"), torch.float32, 4, 64, 64, 20), "multiple of 16 keys"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            choose_product(shape, "native")
        assert choose_product(shape) == "torch"


class TestCost:
    """An estimate that costs as much as dense attention is never chosen for it."""

    def test_without_the_native_library_dense_runs(self) -> None:
        model, ids = tiny_model("llama"), tokens(1, 200)
        with patch_model(model, "sale", keep=0.02, **{**BLOCKS, "min_length": None}) as patch:
            layer = next(iter(patch._layers.values()))
            for keys in (1 << 12, 1 << 20):
                mask = next(iter(_masks(patch, ids)))
                reason = layer.why_dense(keys, keys, mask, torch.device("cpu"), torch.float32)
                assert reason == "finding the blocks would cost more than it saves"

    def test_with_it_sparse_runs(self, native: Path) -> None:
        model, ids = tiny_model("llama"), tokens(1, 200)
        with patch_model(model, "sale", keep=0.02, min_length=None) as patch:
            layer = next(iter(patch._layers.values()))
            assert layer.why_dense(1 << 14, 1 << 14, next(iter(_masks(patch, ids))), CPU, torch.float32) is not None
            layer.head_dim = 64  # heads as small as this model's do not pay
            mask = next(iter(_masks(patch, ids)))
            assert layer.why_dense(1 << 14, 1 << 14, mask, torch.device("cpu"), torch.float32) is None
            assert layer.why_dense(256, 256, mask, torch.device("cpu"), torch.float32) is not None

    def test_overheads_add_up(self) -> None:
        cpu = torch.device("cpu")
        own = Sale(threshold=0.1, product="torch")
        one = expected_overhead(own, cpu, 64, 64, 64)
        assert one.share >= 1
        half = expected_overhead(PerHead((own, Dense())), cpu, 64, 64, 64)
        assert (half.share, half.per_key, half.fixed_tokens) == (one.share / 2, one.per_key / 2, one.fixed_tokens)
        wrapped = resolve_method("sale", threshold=0.1, product="torch", last_rows_dense=64)
        assert expected_overhead(wrapped, cpu, 64, 64, 64) == one
        assert expected_overhead(Dense(), cpu, 64, 64, 64) == NOTHING
        assert not COST_MODELS["cpu", "cpu"].sparse_is_cheaper(1 << 20, 1 << 20, 0.01, one)
        assert COST_MODELS["cpu", "cpu"].sparse_is_cheaper(1 << 20, 1 << 20, 0.01, 0.5)

    def test_short_prompts_are_known_to_be_nearly_dense(self) -> None:
        assert expected_density(Sale(threshold=0.5), 256) == 1.0
        assert expected_density(Sale(keep=0.1), 1 << 20) == pytest.approx(0.1)

    def test_a_profile_says_what_its_thresholds_come_to(self) -> None:
        scores = ((HeadScore(0.9, 0.8, 0.4, 0.7), HeadScore(0.9, 0.8, 0.6, 0.9)),)
        profile = ModelPatterns(((Sale(threshold=0.1), Sale(threshold=0.1)),), tuning=scores)
        assert expected_density(profile.for_layer(0), 1 << 20) == pytest.approx(0.5)
        assert expected_density(Sale(threshold=0.1), 1 << 20) == pytest.approx(UNKNOWN)
        inputs = make_inputs(query_heads=2, kv_heads=1, queries=300, head_dim=8)
        told, untold = (
            pattern.build_index(inputs, grid_of(inputs)).to_mask()
            for pattern in (profile.for_layer(0), Sale(threshold=0.1))
        )
        assert torch.equal(told, untold), "it chooses no block"


def _masks(patch: Any, ids: torch.Tensor) -> Any:
    from sparseprefill.huggingface_masks import masks_of

    return masks_of(patch.model, ids.shape[1]).values()


class TestModel:
    """In a whole model."""

    def test_all_blocks_are_dense(self) -> None:
        model, ids = tiny_model("llama"), tokens(2, 200)
        exact = logits(model, input_ids=ids)
        with patch_model(model, "sale", keep=1.0, **BLOCKS):
            found = logits(model, input_ids=ids)
        assert (found - exact).abs().max() <= 1e-3 * exact.std()

    def test_report_says_what_it_costs_and_what_it_could_not_judge(self) -> None:
        model, ids = tiny_model("llama"), tokens(1, 300)
        with patch_model(model, "sale", keep=0.3, **SMALL, **BLOCKS) as patch:
            logits(model, input_ids=ids)
            report = patch.report()
        assert report.sparse_calls == len(report.layers)
        for layer in report.layers:
            assert layer.overhead is not None
            reckoned = COST_MODELS["cpu", "cpu"].tile_factor * sum(layer.tile_work or ()) / len(layer.tile_work or ())
            assert layer.overhead == pytest.approx(layer.estimator_seconds / layer.kernel_seconds * reckoned)
            assert layer.unjudged == 0
        assert "overhead" in str(report)
        assert "could not be judged" not in str(report)
        assert report.density is not None
        assert report.density < 0.95

    def test_infinite_keys_are_counted_in_the_report(self) -> None:
        inputs = make_inputs(query_heads=2, kv_heads=1, queries=100, head_dim=8)
        inputs.key[0, 0, 50, 0] = torch.inf
        prefill = sparse_prefill(inputs, Sale(threshold=0.5, **SMALL), block_q=16, block_k=16)
        assert prefill.index.unjudged is not None
        assert prefill.index.unjudged.tolist() == [[100, 100]]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_padded_rows_are_themselves_alone(self, dtype: torch.dtype) -> None:
        model, ids = tiny_model("llama").to(dtype), tokens(1, 180)
        with patch_model(model, "sale", threshold=0.5, **SMALL, **BLOCKS):
            alone = logits(model, input_ids=ids)
            together = logits(model, **padded([tokens(1, 230, seed=5)[0], ids[0]]))[1:, -180:]
        model.float()
        spread = alone.float().std()
        assert (together.float() - alone.float()).abs().max() <= max(1e-3, 40 * torch.finfo(dtype).eps) * spread

    def test_chunks_run(self) -> None:
        model, ids = tiny_model("llama"), tokens(1, 200)
        exact = logits(model, input_ids=ids)
        with patch_model(model, "sale", keep=1.0, **BLOCKS) as patch:
            found = in_chunks(model, {"input_ids": ids}, [90, 25, 85])
            assert patch.report().sparse_calls > 0
        assert (found - exact).abs().max() <= 1e-3 * exact.std()


PEAK = """
import re, sys, torch
from sparseprefill.contracts import AttentionInputs, BlockGrid
from sparseprefill.patterns import Sale
torch.set_num_threads(2)
def status(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
def drawn(heads, tokens):  # as models hand them over: heads beside each other
    return torch.randn(1, tokens, heads, 128, dtype=torch.bfloat16).transpose(1, 2)
small = AttentionInputs(drawn(32, 512), drawn(8, 512), drawn(8, 512), scale=128 ** -0.5)
Sale(threshold=0.9).build_index(small, BlockGrid.of(small, 64, 64))
tokens = 32768
inputs = AttentionInputs(drawn(32, tokens), drawn(8, tokens), drawn(8, tokens), scale=128 ** -0.5)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
index = Sale(keep=0.2).build_index(inputs, BlockGrid.of(inputs, 64, 64))
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_peak_memory_at_32k(native: Path) -> None:
    """32 query heads over 8 of keys, head_dim 128, no N x N memory: far below 0.5 GiB."""
    run = subprocess.run([sys.executable, "-c", PEAK], text=True, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 200  # MiB


def test_slabs_of_queries_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(batch=2, queries=150, keys=200, head_dim=8, key_valid=left_padding(200, [0, 37]))
    pattern = Sale(threshold=0.9, **SMALL)
    whole = pattern.build_index(inputs, grid_of(inputs)).to_mask()
    monkeypatch.setattr(estimating, "_SLAB_NUMBERS", 2 * 4 * 32 * 8)
    monkeypatch.setattr(low_bit, "_SLAB_NUMBERS", 2 * 4 * 8 * 7)
    assert torch.equal(pattern.build_index(inputs, grid_of(inputs)).to_mask(), whole)


class TestBench:
    """`bench --estimator`."""

    def test_it_prints_shares_of_dense(self, tmp_path: Path) -> None:
        out = tmp_path / "cells.json"
        arguments = [
            "bench", "--device", "cpu", "--estimator", "sale:keep=0.3", "--estimator", "block_sparse:keep=0.3",
            "--lengths", "512", "--heads", "2/1", "--repeats", "1", "--out", str(out),
        ]  # fmt: skip
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        assert "estimate / dense" in result.output
        assert out.exists()
        assert re.search(r"^sale:keep=0.3 +torch +bfloat16", result.output, flags=re.MULTILINE)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--estimator", "sale", "--lengths", "100"], "multiples of 128"),
            (["--estimator", "sale", "--heads", "8"], "query/KV heads"),
            (["--estimator", "sale", "--ttft", "1k"], "goes with"),
            (["--heads", "8/2", "--calibrate"], "--heads is not for --calibrate"),
            (["--estimator", "minference:profile=inside", "--lengths", "256"], "profile of a model"),
        ],
    )
    def test_what_does_not_go_together(self, arguments: list[str], message: str) -> None:
        result = CliRunner().invoke(main, ["bench", "--device", "cpu", *arguments])
        assert result.exit_code != 0
        assert message in result.output

    def test_wrong_scores_are_not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        inputs = make_inputs(queries=400, head_dim=8)
        right = estimating.tile_scores
        monkeypatch.setattr(
            estimating, "tile_scores", lambda logits, name: right(logits, name) + (1e-2 if name == "auto" else 0)
        )
        with pytest.raises(ValueError, match="scores are wrong"):
            overhead.check_scores(RelativeAttention(**SMALL), inputs, grid_of(inputs))
