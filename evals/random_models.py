"""Models of published shapes with random weights, for what a prefill costs: shapes decide that. Nothing is fetched."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from sparseprefill.evals.loading import check_device, load_config
from sparseprefill.huggingface_activations import decoder_layers
from sparseprefill.huggingface_modules import attention_modules, text_config
from sparseprefill.patterns.store import INSIDE

_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    },
    "qwen3-8b": {  # queries and keys are normed before they are rotated
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
}  # fmt: skip

SHAPES = (*_ARCHITECTURES, INSIDE)
"""What `random_model` makes; "inside" has the shape of the model inside."""


def shape_config(shape: str) -> PreTrainedConfig:
    """The configuration of a shape. Raises ValueError for a name that is none of `SHAPES`."""
    if shape == INSIDE:
        return load_config()
    if shape not in _ARCHITECTURES:
        raise ValueError(f"no shape is called {shape!r}: choose one of {', '.join(SHAPES)}")
    config: PreTrainedConfig = AutoConfig.for_model(**_ARCHITECTURES[shape])
    return config


def random_model(
    shape: str, *, layers: int | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """A causal language model of this shape, its weights drawn where they stay and in their own dtype.

    `layers`: that many instead of all. Raises ValueError for unknown shapes, and more layers than there are.
    """
    check_device(device)
    config = shape_config(shape)
    config.name_or_path = f"{shape}, random weights"
    if layers is not None:
        check_layers(layers, config.num_hidden_layers)
        config.num_hidden_layers = layers
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices), torch.device(device):
        torch.manual_seed(seed)
        made: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    model: PreTrainedModel = made
    model.train(False)
    return model


def check_layers(layers: int, there: int) -> None:
    """Raises ValueError unless so many layers can be kept of those that are there."""
    if not 1 <= layers <= there:
        raise ValueError(f"the model has {there} layers, so 1 to {there} of them can run, not {layers}")


def keep_layers(model: PreTrainedModel, layers: int) -> None:
    """Cut a model that was loaded down to its first layers, for good."""
    config = text_config(model)
    there = decoder_layers(model, attention_modules(model, config))
    check_layers(layers, len(there))
    del there[layers:]
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


def layers_holder(model: PreTrainedModel) -> tuple[nn.Module, str, nn.ModuleList]:
    """(the module that holds the list of decoder layers, by which name, the list)."""
    layers = decoder_layers(model, attention_modules(model, text_config(model)))
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is layers:
                return parent, name, layers
    raise AssertionError("a list of layers that no module holds")
