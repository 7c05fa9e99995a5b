"""Tiny random models of many families, made offline; each has something that a careless seam would drop."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

_SHARED = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
IMAGE, IMAGE_TOKENS = 100, 16  # the token that stands for a patch of an image, and how many an image has

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 70, "head_dim": 24},  # every layer local
    "qwen2": {},
    "qwen3": {"head_dim": 24},  # QK-norm
    "qwen3_moe": {"head_dim": 24, **_EXPERTS},
    "gemma2": {  # soft-capped logits, every other layer local, a scale of its own
        "head_dim": 16, "sliding_window": 90, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 7,
        "layer_types": _ALTERNATING,
    },
    "gemma3_text": {  # QK-norm, every other layer local with rotary frequencies of its own
        "head_dim": 16, "sliding_window": 90, "query_pre_attn_scalar": 7, "layer_types": _ALTERNATING,
    },
    "phi3": {},  # one projection for queries, keys and values
    "glm4": {"head_dim": 16},  # part of each head rotated
    "granite": {"attention_multiplier": 0.6},  # a scale of its own
    "olmo2": {},  # QK-norm over all heads together
    "cohere2": {"sliding_window": 90, "layer_types": _ALTERNATING, "logit_scale": 1.0},  # full layers without RoPE
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "gpt_oss": {  # attention sinks, every other layer local, experts
        "head_dim": 16, "sliding_window": 80, "num_local_experts": 4, "num_experts_per_tok": 2,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "deepseek_v3": {  # latent attention: value_dim is not head_dim
        "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16, "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "n_shared_experts": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 2,
    },
    "llama4_text": {  # chunked layers, full layers without RoPE and with tempered queries
        "head_dim": 16, "intermediate_size_mlp": 96, "num_local_experts": 2, "attention_chunk_size": 64,
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"], "no_rope_layers": [1, 0, 1],
        "floor_scale": 16,
    },
    "qwen3_next": {  # hybrid: two linear layers, a full one with a gate on its output
        "head_dim": 16, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16, "shared_expert_intermediate_size": 32, **_EXPERTS,
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},  # hybrid: two convolutions, a full layer
    "gemma3": {  # vision and language: tokens of an image see each other both ways
        "text_config": {
            **_SHARED, "head_dim": 16, "sliding_window": 90, "query_pre_attn_scalar": 7, "layer_types": _ALTERNATING,
        },
        "vision_config": _VISION, "mm_tokens_per_image": IMAGE_TOKENS, "image_token_id": IMAGE,
        "boi_token_id": 101, "eoi_token_id": 102,
    },
    "qwen2_5_vl": {  # vision and language: rotary positions in three dimensions
        "text_config": {
            **_SHARED,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        },
        "vision_config": {
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
            "patch_size": 4, "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [1],
            "temporal_patch_size": 2,
        },
        "image_token_id": IMAGE, "video_token_id": 103, "vision_start_token_id": 101, "vision_end_token_id": 102,
    },
}  # fmt: skip

VISION = ("gemma3", "qwen2_5_vl")
# how many of the three layers are attention layers that a patch serves
LAYERS = {"qwen3_next": 1, "lfm2": 1}
# families in which every attention layer is local, and so runs exactly under any method
ALL_LOCAL = ("mistral",)


def served_layers(family: str) -> int:
    return LAYERS.get(family, 3)


def tiny_config(family: str, **changes: Any) -> Any:
    shared = {} if family in VISION else _SHARED
    return AutoConfig.for_model(family, **{**shared, **FAMILIES[family], **changes})


def tiny_model(family: str, seed: int = 0, implementation: str = "eager", **changes: Any) -> PreTrainedModel:
    """A float32 model in eval mode with weights large enough that attention is far from uniform."""
    kind = AutoModelForImageTextToText if family in VISION else AutoModelForCausalLM
    torch.manual_seed(seed)
    model = kind.from_config(tiny_config(family, **changes), attn_implementation=implementation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "q_b_proj", "kv_b_proj")):
                parameter.mul_(12.0)
            if "qkv_proj" in name:  # queries and keys are its first rows
                parameter[: parameter.shape[0] * 3 // 4].mul_(12.0)
            if name.endswith("sinks"):
                parameter.normal_(0.0, 2.0)
    return model.eval()


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids without the special ones."""
    return torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(seed))


def with_image(family: str, ids: torch.Tensor, at: int = 40) -> dict[str, torch.Tensor]:
    """The inputs of a vision-language model: one image in each prompt."""
    ids = ids.clone()
    ids[:, at] = 101
    ids[:, at + 1 : at + 1 + IMAGE_TOKENS] = IMAGE
    draw = torch.Generator().manual_seed(1)
    is_image = (ids == IMAGE).to(torch.int64)
    if family == "gemma3":
        pixels = torch.randn(len(ids), 3, 32, 32, generator=draw)
        return {"input_ids": ids, "pixel_values": pixels, "token_type_ids": is_image}
    pixels = torch.randn(len(ids) * 64, 3 * 2 * 16, generator=draw)
    grid = torch.tensor([[1, 8, 8]] * len(ids))
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": is_image.int()}
