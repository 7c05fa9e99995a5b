"""All causal language models of the installed transformers: right, or refused by name; none silently wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import tokens
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from ways import BLOCKS, LENGTH, logits

from sparseprefill import patch_model

pytestmark = pytest.mark.slow
SHORT = 40  # tokens, fewer than a tile

# by whatever name a family calls it; each family takes what its configuration knows
SMALL: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "n_embd": 64, "d_model": 64, "intermediate_size": 96, "d_ff": 96,
    "ffn_dim": 96, "decoder_ffn_dim": 96, "encoder_ffn_dim": 96, "num_hidden_layers": 3, "n_layer": 3, "n_layers": 3,
    "decoder_layers": 3, "encoder_layers": 3, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "rotary_dim": 8,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "num_key_value_heads": 2, "num_kv_heads": 1,
    "max_position_embeddings": 2048, "n_positions": 2048, "sliding_window": 90, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "index_topk": 16, "index_topk_blocks": 2, "index_block_size": 16,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_k": 2, "moe_topk": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "moe_layer_start_index": 1, "mamba_n_heads": 4, "mamba_d_head": 32,
    "mamba_d_ssm": 128, "mamba_d_state": 16, "n_mamba_heads": 2, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16, "ssm_state_size": 16,
    "n_groups": 1, "attention_dropout": 0.0, "resid_pdrop": 0.0, "is_decoder": True,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 12, "qk_head_dim": None, "head_dim": None,
}  # fmt: skip
HYBRID = ["linear_attention", "full_attention", "linear_attention"]
# what single families need on top; None takes a value away
# (selections smaller than the prompts, so that one that is lost shows)
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": HYBRID},
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"n_embd": 64, "rotary_dim": 8, "n_ctx": 2048},
    "falcon_h1": {"mamba_chunk_size": 16},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "moe_topk": [1] * 3},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"]},
    "ministral": {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "qwen3_5_text": {"layer_types": HYBRID},
    "qwen3_5_moe_text": {"layer_types": HYBRID},
    "qwen3_next": {"layer_types": HYBRID, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
TOO_LARGE = 60_000_000  # parameters: some configurations cannot be made small


def small_config(kind: str) -> Any:
    """A small configuration of a family, or the error of the family that none of ours fits."""
    base = AutoConfig.for_model(kind)
    known = set(base.to_dict())
    values = {name: value for name, value in SMALL.items() if name in known}
    if "kv_lora_rank" in known:
        values |= {name: value for name, value in LATENT.items() if name in known and value is not None}
    elif "head_dim" in known:
        values["head_dim"] = 16
    return AutoConfig.for_model(kind, **{**values, **OWN.get(kind, {})})


OUTCOMES: Counter[str] = Counter()


@pytest.mark.parametrize("kind", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_right_or_refused(kind: str, record_property: Callable[[str, object], None]) -> None:
    def outcome(text: str) -> None:
        OUTCOMES[text.partition(":")[0]] += 1
        record_property("outcome", text)

    record_property("architecture", kind)
    try:
        config = small_config(kind)
        if config.get_text_config() is not config:
            outcome("not tried: it has more than a language model; see its text configuration")
            return
        with torch.device("meta"):
            parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if parameters > TOO_LARGE:
            outcome(f"not tried: its smallest configuration has {parameters} parameters")
            return
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        sharpen(model)
        mask = torch.ones(2, LENGTH, dtype=torch.int64)
        mask[1, :70] = 0
        inputs = [{"input_ids": tokens(2, LENGTH)}, {"input_ids": tokens(2, LENGTH), "attention_mask": mask}]
        before = [logits(model, **each) for each in inputs]
        short = logits(model, input_ids=tokens(2, SHORT))
    except Exception as error:  # the stock model does not run on our small configuration
        outcome(f"not tried: {type(error).__name__}: {(str(error).splitlines() or ['-'])[0][:120]}")
        return
    try:
        with patch_model(model, "dense", **BLOCKS) as patch:
            after = [logits(model, **each) for each in inputs]
            report = patch.report()
    except NotImplementedError as error:
        outcome(f"refused: {error}")
        return
    with patch_model(model, "dense") as patch:  # fewer tokens than a tile: the way back
        close(logits(model, input_ids=tokens(2, SHORT)), short)
    for want, got in zip(before, after, strict=True):
        real = mask.bool() if want is before[1] else torch.ones_like(mask, dtype=torch.bool)
        close(got[real], want[real])
    reasons = ", ".join(sorted(report.previous_calls))
    assert report.sparse_calls or reasons, "neither run nor counted"
    served = sum(1 for layer in report.layers if layer.sparse_calls)
    elsewhere = f"; on the previous implementation: {reasons}" if reasons else ""
    outcome(f"right: {served} of {config.num_hidden_layers} layers{elsewhere}")


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    worst = (got - want).abs().max() / want.std()
    assert worst <= 1e-3, f"silently wrong: off by {worst:.1e} of the spread"


def sharpen(model: Any) -> None:
    """Queries and keys large enough that attention is far from uniform."""
    names = ("q_proj", "k_proj", "qkv", "q_b_proj", "kv_b_proj", "query", "key", "Wqkv", "c_attn")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in names) and parameter.dim() > 1:
                parameter.mul_(8.0)


def test_most_were_tried() -> None:
    """Comes last: what could not be made small must not hide what could be wrong."""
    total = sum(OUTCOMES.values())
    if total >= len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        assert OUTCOMES["right"] >= 0.5 * total, OUTCOMES
        assert OUTCOMES["not tried"] <= 0.25 * total, OUTCOMES
