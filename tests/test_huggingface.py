"""The seam: a patched model gives what the same model gives in eager, float32, however it is called."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_architectures import small_config
from tiny_models import ALL_LOCAL, FAMILIES, served_layers, tiny_model, tokens
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache
from transformers.models.llama.modeling_llama import LlamaAttention
from ways import BLOCKS, LENGTH, OLD, in_chunks, logits, padded

from sparseprefill import patch_model, register
from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.huggingface_masks import NAME
from sparseprefill.kernels.dispatch import IMPLEMENTATIONS
from sparseprefill.patterns import AShape, Dense, ModelPatterns, PerHead
from sparseprefill.prefill import resolve_method, sparse_prefill

# methods whose selection does not look ahead, small enough that they really drop blocks
CAUSAL: dict[str, dict[str, Any]] = {
    "a_shape": {"sink": 16, "window": 40},
    "block_sparse": {"keep": 48, "sink": 16, "local": 16},
    "random": {"keep": 0.3, "sink": 16, "local": 16},
}
GEMMA4 = {
    "vocab_size": 128, "vocab_size_per_layer_input": 128, "hidden_size": 64, "hidden_size_per_layer_input": 16,
    "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "sliding_window": 90, "num_kv_shared_layers": 2, "pad_token_id": 0,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
# families for the quick run
QUICK = ("llama", "gpt_oss", "llama4_text", "lfm2")


def close(a: Tensor, b: Tensor) -> None:
    """float32 through a whole model: they agree to a thousandth of the spread of the logits."""
    assert not a.isnan().any()
    scale = b.std() if b.numel() > 1 else b.abs()
    assert (a - b).abs().max() <= 1e-3 * scale, f"logits differ by {(a - b).abs().max():.2e}, of {scale:.2e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_is_all_of_the_attention_and_leaves_no_trace(family: str) -> None:
    """Kept mass is 1 in every layer, sinks, soft-caps and windows or not, and the patch leaves the very bits."""
    model, ids = tiny_model(family), tokens(2, LENGTH)
    before = logits(model, input_ids=ids)
    with patch_model(model, "dense", **BLOCKS) as patch:
        logits(model, input_ids=ids)
        report = patch.report()
        assert report.sparse_calls == served_layers(family), "every attention layer must have run in our kernel"
        assert not report.previous_calls
        assert all(abs(x - 1) < 1e-4 for layer in report.layers for x in layer.kept_mass or [])
    assert torch.equal(logits(model, input_ids=ids), before)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "llama4_text"])
def test_static_cache_left_to_the_previous_implementation(family: str) -> None:
    model, ids = tiny_model(family), tokens(1, LENGTH)
    before = logits(model, input_ids=ids)
    with patch_model(model, "dense", dense_layers=[0, 1, 2], **BLOCKS) as patch:
        cache = StaticCache(config=model.config, max_cache_len=300)
        close(in_chunks(model, {"input_ids": ids}, [96, 104], cache), before)
        assert patch.report().previous_calls == {"dense layer": 6}


@pytest.mark.parametrize("method", CAUSAL)
@pytest.mark.parametrize("family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
class TestCausalSelection:
    """A method that does not look ahead gives a row the same answer whatever stands around it."""

    def test_row_alone_and_in_a_padded_batch(self, family: str, method: str) -> None:
        # Llama4 tempers queries by their slot, padding included: a row alone differs in the stock model too
        changes = {"attn_temperature_tuning": False} if family == "llama4_text" else {}
        model, ids = tiny_model(family, **changes), tokens(3, LENGTH)
        rows = [ids[0], ids[1, :131], ids[2, :77]]
        with patch_model(model, method, **CAUSAL[method], **BLOCKS) as patch:
            for side in ("left", "right"):
                batch = padded(rows, side)
                together = logits(model, **batch)
                for b, row in enumerate(rows):
                    alone = logits(model, input_ids=row[None])[0]
                    close(together[b][batch["attention_mask"][b].bool()], alone)
            if family not in ALL_LOCAL:  # those run exactly
                assert patch.report().density < 0.9

    def test_one_shot_and_chunked(self, family: str, method: str) -> None:
        if OLD and family == "lfm2":
            pytest.skip("its stock convolution gives something else each time when it goes on from a cache")
        model, ids = tiny_model(family), tokens(2, LENGTH)
        with patch_model(model, method, **CAUSAL[method], **BLOCKS):
            whole = logits(model, input_ids=ids)
            close(in_chunks(model, {"input_ids": ids}, [96, 104]), whole)
            if method != "block_sparse":  # its mean queries are those of a chunk's part of a block
                close(in_chunks(model, {"input_ids": ids}, [50, 101, 49]), whole)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_second_turn_on_a_left_padded_cache(family: str) -> None:
    """The second turn of a batch is left-padded again: holes in the middle of the cache."""
    model, ids = tiny_model(family), tokens(2, 300)
    first = padded([ids[0, :120], ids[1, :70]])
    second = padded([ids[0, 120:170], ids[1, 70:160]])
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    both = {
        "input_ids": torch.cat([first["input_ids"], second["input_ids"]], 1), "attention_mask": mask,
        "position_ids": positions,
    }  # fmt: skip
    alone = [logits(model, input_ids=ids[b : b + 1, :n])[0] for b, n in enumerate((170, 160))]
    if family == "llama":  # a sliding window counts padding slots in transformers, so rows alone differ there
        with patch_model(model, "dense", **BLOCKS):
            after = in_chunks(model, both, [120, 90])
        for b in range(2):
            close(after[b][mask[b].bool()], alone[b])
    before = in_chunks(model, both, [120, 90])
    with patch_model(model, "dense", **BLOCKS) as patch:
        close(in_chunks(model, both, [120, 90])[mask.bool()], before[mask.bool()])
        assert patch.report().sparse_calls == 6


def test_packed_sequences_do_not_see_each_other() -> None:
    model, ids = tiny_model("llama"), tokens(1, 200)
    positions = torch.cat([torch.arange(90), torch.arange(110)])[None]
    with patch_model(model, "dense", **BLOCKS) as patch, torch.no_grad():
        together = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        assert patch.report().sparse_calls == 3
        close(together[:, :90], model(input_ids=ids[:, :90]).logits)
        close(together[:, 90:], model(input_ids=ids[:, 90:]).logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_mask_of_the_callers_own_goes_to_the_previous_implementation(implementation: str) -> None:
    model, ids = tiny_model("llama", implementation=implementation), tokens(1, 64)
    allowed = torch.ones(64, 64, dtype=torch.bool).tril()
    allowed[40:, :20] = False
    mask = torch.zeros(1, 1, 64, 64).masked_fill(~allowed, torch.finfo(torch.float32).min)
    before = logits(model, input_ids=ids, attention_mask=mask)
    with patch_model(model, "a_shape", sink=16, window=16, **BLOCKS) as patch:
        assert torch.equal(logits(model, input_ids=ids, attention_mask=mask), before)
        assert patch.report().previous_calls == {"a mask of the caller's own": 3}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_left_alone_calls_use_the_previous_implementation(implementation: str) -> None:
    """Short prompts, dense layers and decoding give the very bits of the unpatched model."""
    model, ids = tiny_model("qwen2", implementation=implementation), tokens(2, 80)
    batch = padded([ids[0], ids[1, :50]])
    before = logits(model, **batch)
    with patch_model(model, "vertical_slash", min_length=1000, block_q=16, block_k=16) as patch:
        assert torch.equal(logits(model, **batch), before)
        assert patch.report().previous_calls == {"fewer keys than min_length=1000": 3}
    with patch_model(model, "vertical_slash") as patch:
        assert torch.equal(logits(model, **batch), before)
        assert patch.report().previous_calls == {"below break-even": 3}
        assert "uncalibrated" in str(patch.report())
    with patch_model(model, "vertical_slash", dense_layers=[0, 1, -1], **BLOCKS) as patch:
        assert torch.equal(logits(model, **batch), before)
        assert patch.report().previous_calls == {"dense layer": 3}


def test_a_static_cache_is_judged_by_what_it_holds() -> None:
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    with patch_model(model, "a_shape", min_length=201, block_q=16, block_k=16) as patch, torch.no_grad():
        model(input_ids=ids, past_key_values=StaticCache(config=model.config, max_cache_len=1000))
        assert patch.report().previous_calls == {"fewer keys than min_length=201": 3}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss"])
def test_autocast_gives_what_the_model_gives_under_it(family: str) -> None:
    """Rotated queries and keys reach the seam in float32 then, the values in bfloat16."""
    model, ids = tiny_model(family), tokens(2, LENGTH)
    batch = padded([ids[0], ids[1, :131]])
    real = batch["attention_mask"].bool()
    exact = logits(model, **batch)[real]
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(model, **batch).float()[real]
        with patch_model(model, "dense", **BLOCKS) as patch:
            got = logits(model, **batch).float()[real]
            report = patch.report()
    assert not report.previous_calls
    assert all(abs(x - 1) < 1e-3 for layer in report.layers for x in layer.kept_mass or [])
    assert (got - exact).abs().mean() <= 1.5 * (expected - exact).abs().mean()


@pytest.mark.parametrize("method", CAUSAL)
def test_what_is_float32_inside_stays_it_under_autocast(method: str) -> None:
    """The same layer's bfloat16 inputs with autocast on and off: equal blocks, equal kept mass."""
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, LENGTH, 16, generator=draw).bfloat16() * 2 for heads in (4, 2, 2))
    inputs = AttentionInputs(query, key, value, 0.25)
    pattern = resolve_method(method, **CAUSAL[method])
    plain = sparse_prefill(inputs, pattern, block_q=16, block_k=16, observe=True)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = sparse_prefill(inputs, pattern, block_q=16, block_k=16, observe=True)
    assert torch.equal(mixed.index.to_mask(), plain.index.to_mask())
    assert torch.equal(mixed.result.lse, plain.result.lse)
    assert mixed.sampled_mass is not None
    assert torch.equal(mixed.sampled_mass, plain.sampled_mass)


def test_blocks_that_the_chosen_kernel_cannot_serve_are_refused_at_patch_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def why_not(inputs: AttentionInputs, index: BlockIndex | None) -> str | None:
        assert index is not None
        seen.append((index.grid.block_q, index.grid.block_k))
        return "no tile of this size"

    refusing = dataclasses.replace(IMPLEMENTATIONS["cpu"], why_not=why_not)
    monkeypatch.setitem(IMPLEMENTATIONS, "cpu", refusing)
    model = tiny_model("llama")
    with pytest.raises(NotImplementedError, match="no tile of this size"):
        patch_model(model, "dense", impl="cpu", block_q=32, block_k=16)
    assert seen == [(32, 16)]


def test_tiles_that_may_be_skipped_are_served_by_a_kernel_that_can(native: Path) -> None:
    """The native kernel takes rows of 64 queries there at most: larger ones run in torch, as "auto" says."""
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    for block, kernel in ((128, "cpu"), (64, "native")):
        with patch_model(model, "skip_softmax", block_q=block, block_k=block, min_length=0) as patch:
            logits(model, input_ids=ids)
            assert patch.report().kernels == {kernel: 3}


def test_a_window_wider_than_the_model_is_none() -> None:
    model, ids = tiny_model("mistral", sliding_window=5000), tokens(1, LENGTH)
    with patch_model(model, "a_shape", sink=16, window=32, **BLOCKS) as patch:
        logits(model, input_ids=ids)
        assert patch.report().density < 0.6


def test_random_draws_differ_between_layers_under_every_wrapper() -> None:
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    with patch_model(model, "random", keep=0.3, last_rows_dense=8, **BLOCKS) as patch:
        logits(model, input_ids=ids)
        assert len({layer.pattern for layer in patch.report().layers}) == 3


def test_report_counts_what_really_ran() -> None:
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    with patch_model(
        model, "a_shape", sink=16, window=32, layers={1: "dense"}, heads={(2, 3): Dense()}, **BLOCKS
    ) as patch:
        logits(model, input_ids=ids)
        logits(model, input_ids=ids)
        report = patch.report()
        layer0, layer1, layer2 = report.layers
        assert [layer.sparse_calls for layer in report.layers] == [2, 2, 2]
        assert layer0.kernels == {"cpu": 2}
        inputs = AttentionInputs(*(torch.zeros(1, h, LENGTH, 16) for h in (4, 2, 2)), scale=1.0)
        mask = AShape(16, 32).build_index(inputs, BlockGrid.of(inputs, 16, 16)).to_mask()
        kept = mask.repeat_interleave(16, 2).repeat_interleave(16, 3)[..., :LENGTH, :LENGTH].tril()
        assert layer0.density == pytest.approx((kept.sum((0, 2, 3)) / (LENGTH * (LENGTH + 1) / 2)).tolist())
        assert layer1.density == pytest.approx([1.0] * 4)
        assert layer2.density[3] == pytest.approx(1.0)
        assert layer2.density[0] < 0.6
        assert layer2.kept_mass[3] == pytest.approx(1.0, abs=1e-4)
        assert all(0 < mass < 0.999 for mass in layer0.kept_mass)
        assert json.loads(json.dumps(report.to_dict()))["layers"][0]["layer"] == 0
        assert "a_shape" in str(report)
        patch.reset()
        assert patch.report().sparse_calls == 0


def test_removal_restores_everything() -> None:
    model, ids = tiny_model("llama", implementation="sdpa"), tokens(1, LENGTH)
    twin = type(model)(model.config).eval()
    assert twin.config is model.config
    before, original = logits(model, input_ids=ids), model.config
    attributes = [set(vars(m)) for m in model.modules()]
    patch = patch_model(model, "a_shape", sink=16, window=16, **BLOCKS)
    assert model.config is not original
    assert twin.config._attn_implementation == "sdpa", "a model made from the same config must not switch"
    assert not torch.equal(logits(model, input_ids=ids), before)
    with pytest.raises(ValueError, match="patched already"):
        patch_model(model, "dense")
    patch.remove()
    patch.remove()
    assert not patch.active
    assert model.config is original
    assert all(m.config is original for m in model.modules() if hasattr(m, "config"))
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert torch.equal(logits(model, input_ids=ids), before)


def test_two_models_with_two_methods() -> None:
    ids = tokens(1, LENGTH)
    first, second = tiny_model("llama"), tiny_model("llama")
    with patch_model(first, "a_shape", sink=16, window=16, **BLOCKS):
        alone = logits(first, input_ids=ids)
        with patch_model(second, "dense", **BLOCKS):
            assert torch.equal(logits(first, input_ids=ids), alone)
            dense = logits(second, input_ids=ids)
        assert torch.equal(logits(first, input_ids=ids), alone)
    close(dense, logits(second, input_ids=ids))


def test_saved_while_patched_holds_no_trace(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "plain")
    with patch_model(model, "a_shape", **BLOCKS):
        model.save_pretrained(tmp_path / "patched")
    names = sorted(p.name for p in (tmp_path / "plain").iterdir())
    assert sorted(p.name for p in (tmp_path / "patched").iterdir()) == names
    for name in names:
        assert (tmp_path / "patched" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_register_serves_from_pretrained(tmp_path: Path) -> None:
    model, ids = tiny_model("llama", implementation="sdpa"), tokens(1, LENGTH)
    model.save_pretrained(tmp_path)
    with patch_model(model, "a_shape", sink=16, window=16, **BLOCKS):
        patched = logits(model, input_ids=ids)
    register("a_shape", sink=16, window=16, **BLOCKS)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME).eval()
    assert torch.equal(logits(loaded, input_ids=ids), patched)
    batch = padded([ids[0, :50], ids[0, :30]])
    generated = loaded.generate(
        batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=4, do_sample=False
    )
    assert generated.shape == (2, 54)
    with patch_model(loaded, "dense", **BLOCKS):
        close(logits(loaded, input_ids=ids), logits(model, input_ids=ids))
    with pytest.raises(ValueError, match="previous must be"):
        register("dense", previous="nothing")


class EveryOther:
    """A user's own method: it has the verb and nothing else."""

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        mask = grid.visible_block_mask(inputs)[:, None].expand(-1, inputs.query_heads, -1, -1).clone()
        mask[..., 1::2] &= ~torch.ones_like(mask[..., 1::2])
        mask |= Dense().build_index(inputs, grid).to_mask() & torch.eye(*mask.shape[-2:], dtype=torch.bool)
        return BlockIndex.from_mask(grid, mask)


def test_a_users_own_object_with_the_verb() -> None:
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    with patch_model(model, EveryOther(), **BLOCKS) as patch:
        logits(model, input_ids=ids)
        assert 0.4 < patch.report().density < 0.8


@pytest.mark.slow
def test_compiled_decoding_stays_in_one_graph_and_is_counted() -> None:
    model = tiny_model("llama")
    torch.compiler.reset()
    with patch_model(model, "dense", **BLOCKS) as patch, torch.no_grad():
        compiled = torch.compile(model, backend="eager", dynamic=True)
        cache = compiled(input_ids=tokens(1, LENGTH), use_cache=True).past_key_values
        assert patch.report().sparse_calls == 3
        for n in range(3):
            compiled(input_ids=tokens(1, 1, seed=n), past_key_values=cache)
        assert patch.report().previous_calls == {"compiled decoding (counted once a graph)": 3}
        torch.compiler.reset()
        explained = torch._dynamo.explain(model)(input_ids=tokens(1, 1), past_key_values=cache)
        assert explained.graph_break_count == 0, explained.break_reasons


# --- edges: each was wrong once ---------------------------------------------------------------------------------------


def test_a_window_wider_than_the_model_still_holds_for_a_longer_prompt() -> None:
    model, ids = tiny_model("mistral", max_position_embeddings=64, sliding_window=70), tokens(1, LENGTH)
    before = logits(model, input_ids=ids)
    with patch_model(model, "dense", **BLOCKS):
        close(logits(model, input_ids=ids), before)


def test_a_second_register_is_for_other_models() -> None:
    models = [tiny_model("llama"), tiny_model("gpt_oss")]
    before = [logits(model, input_ids=tokens(1, 40)) for model in models]
    register("dense", previous="eager")
    for model in models:
        model.config._attn_implementation = NAME
        logits(model, input_ids=tokens(1, 40))
    register("dense", previous="sdpa")
    for model, expected in zip(models, before, strict=True):
        assert torch.equal(logits(model, input_ids=tokens(1, 40)), expected)


def test_a_model_inside_the_model_is_left_alone() -> None:
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    model.draft = tiny_model("gpt_oss")
    before = logits(model.draft, input_ids=ids)
    with patch_model(model, "a_shape", sink=16, window=16, **BLOCKS):
        assert model.draft.config._attn_implementation == "eager"
        assert torch.equal(logits(model.draft, input_ids=ids), before)
    assert model.draft.config._attn_implementation == "eager"


@pytest.mark.slow
def test_a_compiled_copy_is_refused() -> None:
    model = tiny_model("llama")
    torch.compiler.reset()
    with patch_model(model, "dense", **BLOCKS) as patch:
        twin = torch.compile(copy.deepcopy(model), backend="eager")
        with pytest.raises(Exception, match="patch the copy"):
            logits(twin, input_ids=tokens(1, 8))
        assert not patch.report().previous_calls, "a copy's calls are not counted in the original's report"


def test_what_is_changed_while_patched_stays_changed() -> None:
    model = tiny_model("llama")
    original = model.config
    with patch_model(model, "dense", **BLOCKS):
        model.resize_token_embeddings(140)
        model.config.use_cache = False
    assert model.config is original
    assert (original.vocab_size, original.use_cache) == (140, False)
    assert original._attn_implementation == "eager"


def test_a_method_of_the_models_own_comes_back() -> None:
    model = tiny_model("llama")
    mine = model.generate_batch = lambda: "mine"
    with patch_model(model, "dense", **BLOCKS):
        assert model.generate_batch is not mine
    assert model.generate_batch is mine


def test_negative_layers_are_the_layers_they_stand_for() -> None:
    model = tiny_model("llama")
    profile = ModelPatterns(tuple((AShape(16, 16 * (n + 1)),) * 4 for n in range(3)))
    with patch_model(model, "dense", layers={-1: profile}, **BLOCKS) as patch:
        logits(model, input_ids=tokens(1, LENGTH))
        assert patch.report().layers[2].pattern == "AShape(sink=16, window=48)"


def test_one_head_of_a_method_with_dense_last_rows() -> None:
    model = tiny_model("llama")
    each = PerHead((AShape(16, 16), Dense(), AShape(16, 32), Dense()))
    with patch_model(model, each, last_rows_dense=8, heads={(0, 0): Dense()}, **BLOCKS) as patch:
        logits(model, input_ids=tokens(1, LENGTH))
        density = patch.report().layers[0].density
        assert density[0] == pytest.approx(1.0)
        assert density[2] < 0.6


class SubclassedAttention(LlamaAttention):
    """A user's own class, in a file without the family's eager function."""


def test_a_users_subclass_of_an_attention_class_goes_back_to_eager() -> None:
    model, ids = tiny_model("llama"), tokens(1, 100)
    for layer in model.model.layers:
        layer.self_attn.__class__ = SubclassedAttention
    before = model.generate(ids, max_new_tokens=3, do_sample=False)
    with patch_model(model, "dense", **BLOCKS):
        assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), before)


@pytest.mark.skipif(OLD, reason="the family is newer")
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("length", "kept"), [(40, 5), (100, 1), (100, 5), (100, 40)])
def test_a_model_that_drops_queries_behind_its_mask(implementation: str, length: int, kept: int) -> None:
    """Gemma 4 with shared keys computes its last layers for the last queries alone."""
    config = AutoConfig.for_model("gemma4_text", **GEMMA4)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    ids = tokens(2, length)
    before = logits(model, input_ids=ids, logits_to_keep=kept)
    model.set_attn_implementation(implementation)
    with patch_model(model, "dense", block_q=64, block_k=64, min_length=0):
        close(logits(model, input_ids=ids, logits_to_keep=kept), before)


@pytest.mark.skipif(OLD, reason="the families are newer")
@pytest.mark.parametrize("kind", ["deepseek_v32", "glm_moe_dsa", "minimax_m3_vl_text", "axk2", "hy_v4"])
def test_a_model_that_chooses_keys_by_the_name_of_the_implementation_is_refused(kind: str) -> None:
    model = AutoModelForCausalLM.from_config(small_config(kind))
    with pytest.raises(NotImplementedError, match="chooses the keys of each query itself"):
        patch_model(model, "dense")


def test_deepcopy_of_a_config_is_not_bound() -> None:
    model = tiny_model("llama")
    with patch_model(model, "dense", **BLOCKS):
        other = copy.deepcopy(model.config)
        assert other._attn_implementation == NAME
        fresh = AutoModelForCausalLM.from_config(other).eval()
        # under our name without state: it runs, on the previous implementation
        assert logits(fresh, input_ids=tokens(1, LENGTH)).shape == (1, LENGTH, 128)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_on_a_gpu(family: str) -> None:
    model, ids = tiny_model(family).cuda(), tokens(2, LENGTH).cuda()
    before = logits(model, input_ids=ids)
    with patch_model(model, "dense", **BLOCKS) as patch:
        close(logits(model, input_ids=ids), before)
        report = patch.report()
    assert report.sparse_calls == 3
    for layer in report.layers:
        assert layer.kernels == {"triton": 1}
        assert layer.estimator_seconds > 0
        assert layer.kernel_seconds > 0
    assert torch.equal(logits(model, input_ids=ids), before)


@pytest.mark.gpu
@pytest.mark.parametrize("method", [*CAUSAL, "vertical_slash"])
def test_selection_on_a_gpu_is_that_of_the_cpu(method: str) -> None:
    """Logits follow the selection: one block of a layer's hundreds that differs is more than rounding."""
    model, ids = tiny_model("llama"), tokens(1, LENGTH)
    options = CAUSAL.get(method, {"verticals": 32, "slashes": 64})
    found = []
    for device in ("cpu", "cuda"):
        model.to(device)
        with patch_model(model, method, **options, **BLOCKS):
            found.append(logits(model, input_ids=ids.to(device)).cpu())
    close(found[1], found[0])


@pytest.mark.gpu
def test_nan_on_a_gpu_is_raised_once_after_the_prefill() -> None:
    model, ids = tiny_model("llama").cuda(), tokens(1, LENGTH).cuda()
    weight = model.model.layers[1].self_attn.k_proj.weight
    kept = weight.detach().clone()
    with patch_model(model, "dense", **BLOCKS):
        with torch.no_grad():
            weight[0, 0] = torch.nan
        with pytest.raises(FloatingPointError, match="layer 1 contain NaN"):
            logits(model, input_ids=ids)
        with torch.no_grad():
            weight.copy_(kept)
        assert not logits(model, input_ids=ids).isnan().any()
