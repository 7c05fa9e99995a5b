"""What tells a model, and a tokenizer, from others: so that a run is resumed with nothing else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel


def model_identity(model: PreTrainedModel) -> dict[str, Any]:
    """What tells a model from others: name, dtype, device, configurations, and a checksum of every weight."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in _VOLATILE}
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        if not isinstance(weight, torch.Tensor):
            continue
        digest.update(f"{name} {tuple(weight.shape)} ".encode())
        if not weight.is_meta and weight.numel():  # offloaded: its values are elsewhere until the layer runs
            digest.update(f"{_checksum(weight)} ".encode())
    generation = getattr(model, "generation_config", None)
    written = {} if generation is None else generation.to_dict()
    return {
        "name": Path(str(model.name_or_path)).name, "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type, "weights": digest.hexdigest()[:16],
        "config": _short_sha(config),
        "generation_config": _short_sha({key: value for key, value in written.items() if key not in _VOLATILE}),
    }  # fmt: skip


def _checksum(weight: torch.Tensor) -> tuple[int, int, int]:
    """Sums of the bits as integers: exact, whatever the order and the number of threads."""
    bits = weight.detach().reshape(-1).contiguous().view(torch.uint8)
    if bits.storage_offset() % 4:
        bits = bits.clone()
    whole = bits.numel() // 4 * 4
    words = bits[:whole].view(torch.int32)
    parts = (words, words[::3], bits[whole:])
    first, second, third = (int(part.sum(dtype=torch.int64)) for part in parts)
    return first, second, third


def _short_sha(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:16]


_VOLATILE = ("transformers_version", "_name_or_path", "_attn_implementation", "_attn_implementation_internal")


def tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """What tells a tokenizer from others: class, vocabulary, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    template = getattr(tokenizer, "chat_template", None)
    return {
        "class": type(tokenizer).__name__, "sha256": hashlib.sha256(text.encode()).hexdigest()[:16],
        "special": _short_sha({key: str(value) for key, value in tokenizer.special_tokens_map.items()}),
        "chat_template": None if template is None else hashlib.sha256(str(template).encode()).hexdigest()[:16],
    }  # fmt: skip
