"""Tiny random models of several families, made offline; each has something that a careless seam would drop."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SHARED = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 70, "head_dim": 24},
    "qwen2": {},
    "qwen3": {"head_dim": 24},  # QK-norm
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "gemma2": {  # soft-capped logits, every other layer local, a scale of its own
        "head_dim": 16, "sliding_window": 90, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 7,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gpt_oss": {  # attention sinks, every other layer local, experts
        "head_dim": 16, "sliding_window": 80, "num_local_experts": 4, "num_experts_per_tok": 2,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
}  # fmt: skip


def tiny_model(family: str, seed: int = 0, implementation: str = "eager", **changes: Any) -> PreTrainedModel:
    """A float32 model in eval mode with weights large enough that attention is far from uniform."""
    config = AutoConfig.for_model(family, **{**_SHARED, **FAMILIES[family], **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(12.0)
            if name.endswith("sinks"):
                parameter.normal_(0.0, 2.0)
    return model.eval()


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids without the special ones."""
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))
