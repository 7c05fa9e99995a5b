"""Which modules of a stock model can be patched, and what shapes they will send: nothing here changes a model."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.kernels import IMPLEMENTATIONS, why_not

STATE = "_sparseprefill"  # attribute of a patched attention module


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention module sends: of the heads that live in this process, under tensor parallelism."""

    query_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class HeadSlice:
    """Which part of every layer's heads this process holds: part `rank` of `ranks` equal ones."""

    rank: int = 0
    ranks: int = 1

    def of(self, heads: int, what: str = "query heads") -> range:
        """The heads of this process among `heads`. Raises NotImplementedError where they cannot be cut evenly."""
        if heads % self.ranks:
            raise NotImplementedError(
                f"tensor parallelism over {self.ranks} processes does not divide {heads} {what}: "
                "use a number of processes that does"
            )
        own = heads // self.ranks
        return range(self.rank * own, (self.rank + 1) * own)


def unwrap(model: Any) -> PreTrainedModel:
    """The transformers model inside wrappers that keep it whole (`torch.compile`, a PEFT model); TypeError if none."""
    inner = model
    for _ in range(4):  # wrappers of wrappers, but never an endless chain
        if isinstance(inner, PreTrainedModel):
            return inner
        if isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod
        elif callable(getattr(inner, "get_base_model", None)):
            inner = inner.get_base_model()
    raise TypeError(f"patch_model takes a transformers PreTrainedModel, got {type(model).__name__}")


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The configuration of the language model inside `model`. Raises NotImplementedError where there are several."""
    try:
        config: PreTrainedConfig = model.config.get_text_config()
    except ValueError as error:
        raise NotImplementedError(
            f"{type(model).__name__} has several language models: patch the one you mean by itself ({error})"
        ) from error
    return config


def attention_modules(model: PreTrainedModel, config: PreTrainedConfig) -> dict[int, nn.Module]:
    """The self-attention modules of the language model, by layer. Raises where there is nothing to patch."""
    cls = type(model).__name__
    states = [getattr(m, STATE) for m in model.modules() if hasattr(m, STATE)]
    if any(not state.registered for state in states):
        raise ValueError(f"this {cls} is patched already: remove the first patch, or give it all methods at once")
    if not model._can_set_attn_implementation():
        raise NotImplementedError(
            f"{cls} does not dispatch through transformers' attention interface, so it cannot be patched: "
            "use a class that does (see `AttentionInterface` in its documentation), or a newer transformers"
        )
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        number = getattr(module, "layer_idx", None)
        if not isinstance(number, int) or "Attention" not in type(module).__name__:
            continue
        if getattr(module, "is_causal", True) is False or getattr(module, "config", config) is not config:
            continue
        if not hasattr(module, "scaling") and not hasattr(module, "num_key_value_groups"):
            continue
        if number in found:
            raise NotImplementedError(f"{cls} has two attention modules in layer {number}: it cannot be patched yet")
        found[number] = module
    if not found:
        raise NotImplementedError(f"{cls} has no causal self-attention layer that sparseprefill knows how to patch")
    return found


def implementations_of(module: nn.Module) -> tuple[Any, Any]:
    """(transformers' table of attention functions, the eager one or None) that a module's family uses."""
    for cls in type(module).__mro__:  # a user's own subclass lives in another file
        namespace = vars(sys.modules.get(cls.__module__, None) or object)
        if "eager_attention_forward" in namespace:
            return namespace.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS), namespace[
                "eager_attention_forward"
            ]
    return ALL_ATTENTION_FUNCTIONS, None


def chooses_its_keys(module: nn.Module) -> bool:
    """Whether an attention module makes a mask of its own for some implementations, by name, and indices for others."""
    try:
        source = inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return False
    return re.search(r"_attn_implementation\s+(not\s+)?in\s*\(", source) is not None


def tensor_parallel(model: PreTrainedModel) -> HeadSlice:
    """Which heads this process holds of a model that was loaded with `tp_plan`.

    Some plans leave attention whole (GPT-OSS), or gather its projections again (Phi3): then that is all heads.
    """
    mesh = getattr(model, "_device_mesh", None)
    size = getattr(model, "_tp_size", None) or 1
    if mesh is None or size == 1:
        return HeadSlice()
    plan = getattr(model, "_tp_plan", None) or {}
    if not any(
        ("attn" in name or "attention" in name) and style in ("colwise", "local_colwise")
        for name, style in plan.items()
    ):
        return HeadSlice()
    names = getattr(mesh, "mesh_dim_names", None) or ()
    own = mesh["tp"] if mesh.ndim > 1 and "tp" in names else mesh
    return HeadSlice(own.get_local_rank(), size)


def model_facts(config: PreTrainedConfig) -> dict[str, Any]:
    """The hard keys of a model: a profile made for other values is refused. Lists where layers differ."""
    layers = config.num_hidden_layers
    each = [_layer_facts(config, number) for number in range(layers)]
    same = {name: values[0] if len(set(values)) == 1 else values for name, values in _columns(each).items()}
    return {
        "architecture": config.model_type, "layers": layers, **same, "vocabulary": config.vocab_size,
        "rope": _plain(getattr(config, "rope_parameters", None)),
    }  # fmt: skip


def _plain(value: Any) -> Any:
    """The same in types that JSON has; tables by layer type stay tables."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _columns(rows: list[dict[str, int]]) -> dict[str, list[int]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _layer_facts(config: PreTrainedConfig, layer: int) -> dict[str, int]:
    own = _layer_config(config, layer)
    heads = getattr(own, "num_attention_heads", None)
    if heads is None:
        raise NotImplementedError(f"a {config.model_type} configuration names no attention heads: nothing to patch")
    return {
        "query_heads": heads,
        "kv_heads": getattr(own, "num_key_value_heads", None) or heads,
        "head_dim": getattr(own, "head_dim", None) or own.hidden_size // heads,
    }


def _layer_config(config: PreTrainedConfig, layer: int) -> PreTrainedConfig:
    """What one layer was built from; some models have layers of different shapes."""
    if getattr(config, "_heterogeneity_spec", None) is None:
        return config
    own: PreTrainedConfig = config.per_layer_config[layer]
    return own


def layer_shapes(modules: dict[int, nn.Module], config: PreTrainedConfig, part: HeadSlice) -> dict[int, LayerShape]:
    """The shape of each attention module, by layer."""
    shapes = {}
    for number, module in modules.items():
        facts = _layer_facts(config, number)
        heads = (
            getattr(module, "num_heads", None) or getattr(module, "num_attention_heads", None) or facts["query_heads"]
        )
        groups = getattr(module, "num_key_value_groups", None) or heads // facts["kv_heads"]
        head_dim = getattr(module, "qk_head_dim", None) or getattr(module, "head_dim", None) or facts["head_dim"]
        own, kv_heads = len(part.of(heads)), len(part.of(heads // groups, "KV heads"))
        shapes[number] = LayerShape(own, kv_heads, head_dim, getattr(module, "v_head_dim", None) or head_dim)
    return shapes


def kernel_for(
    shape: LayerShape, device: torch.device, dtype: torch.dtype, impl: str, block_q: int, block_k: int,
    *, skips: bool = False,
) -> tuple[str | None, dict[str, str]]:  # fmt: skip
    """(the implementation that serves a layer of this shape or None, why not each of the others).

    `skips`: whether the lists allow the kernel to leave out tiles (`BlockIndex.skip`).
    """

    def zeros(heads: int, dim: int) -> Tensor:
        return torch.zeros(1, heads, 1, dim, device=device, dtype=dtype)

    key, value = zeros(shape.kv_heads, shape.head_dim), zeros(shape.kv_heads, shape.value_dim)
    inputs = AttentionInputs(zeros(shape.query_heads, shape.head_dim), key, value, 1.0)
    index = BlockIndex.dense(inputs, BlockGrid.of(inputs, block_q, block_k))
    index = index.skipping(torch.zeros((), device=device)) if skips else index
    chosen, reasons = None, {}
    for name, implementation in IMPLEMENTATIONS.items():
        if impl not in ("auto", name):
            reasons[name] = f"impl={impl!r} was asked for"
        elif (reason := why_not(name, inputs, index)) is not None:
            reasons[name] = reason
        elif impl == "auto" and not implementation.automatic(inputs):
            reasons[name] = f"it is never chosen by itself, impl={name!r} asks for it"
        elif chosen is not None:
            reasons[name] = f"{chosen} comes first"
        else:
            chosen = name
    return chosen, reasons


def device_of(module: nn.Module) -> torch.device | None:
    """Where a module computes; None while nothing says so (weights not loaded yet)."""
    hook = getattr(module, "_hf_hook", None)  # accelerate's: the weights may lie elsewhere between calls
    place = getattr(hook, "execution_device", None)
    if place is not None:
        return torch.device(place if not isinstance(place, int) else f"cuda:{place}")
    parameter = next(module.parameters(), None)
    if parameter is None or parameter.device.type == "meta":
        return None
    return parameter.device


def model_window(model: Any) -> int | None:
    """Tokens a model can take, where its configuration says so."""
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(window) if isinstance(window, int) and window > 0 else None


def nested_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A configuration and those inside it."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        inner = getattr(config, name, None)
        if isinstance(inner, PreTrainedConfig):
            yield from nested_configs(inner)
