"""What methods are compared on: the layers of a model under dense attention, and heads made up."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.evals.planted_heads import planted_heads
from sparseprefill.huggingface import patch_model
from sparseprefill.huggingface_modules import model_window
from sparseprefill.prompts import ProfilePrompt

_PLANTED = "planted: "


@dataclass(frozen=True, slots=True)
class NamedInputs:
    """Some heads to compare on."""

    name: str  # of a prompt's layer, or of a made-up head
    group: str  # over which means are taken
    inputs: AttentionInputs  # of one prompt: batch 1, no padding
    needle: int | None = None  # slot of a key that queries after it look for


def layer_inputs(
    model: PreTrainedModel, ids: Tensor, layers: Collection[int] | None = None
) -> dict[int, AttentionInputs]:
    """What layers hand to attention, by their numbers, when all of them attend densely; None: all that do.

    Those that are asked for are held together, the others are let go.
    """
    seen: dict[int, AttentionInputs] = {}

    @dataclass(frozen=True)
    class Recorder:
        layer: int = -1

        def for_layer(self, layer: int) -> Recorder:
            return Recorder(layer)

        def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
            if layers is None or self.layer in layers:
                seen[self.layer] = inputs
            return BlockIndex.dense(inputs, grid)

    with patch_model(model, Recorder(), min_length=0, observe=False), torch.no_grad():
        seen.clear()  # a pattern is tried once when a model is patched
        model(input_ids=ids, logits_to_keep=1)
    return seen


def model_inputs(
    model: PreTrainedModel,
    prompts: Iterable[ProfilePrompt],
    *,
    layers: Sequence[int] | None = None,
    called: str = "model",
) -> Iterator[NamedInputs]:
    """The layers of a model on prompts, under dense attention throughout; those of one prompt are held together.

    Args:
        model: any that `patch_model` takes.
        prompts: each within the model's window.
        layers: their numbers; None: all that see a whole prompt. Layers with a window of their own do not.
        called: how groups begin; the length follows.

    Raises:
        ValueError: prompts beyond the model's window, layers that are none or see a part of the prompt alone, no
            layer left; what `patch_model` raises.
    """
    window = model_window(model)
    for prompt in prompts:
        tokens = len(prompt.token_ids)
        if window is not None and tokens > window:
            raise ValueError(
                f"{prompt.name} has {tokens} tokens, and the model's window is {window}: take shorter prompts"
            )
        ids = torch.tensor([list(prompt.token_ids)], device=model.device)
        found = layer_inputs(model, ids, layers)
        whole = {layer: each for layer, each in found.items() if each.window is None and each.segment is None}
        for layer in layers or ():
            if layer not in whole:
                raise ValueError(
                    f"layer {layer} is none that sees a whole prompt and runs through sparseprefill: `sparseprefill "
                    "doctor` says how the layers of a model run"
                )
        if not whole:
            raise ValueError("no layer of this model sees a whole prompt, so there is nothing to compare")
        for layer in sorted(whole) if layers is None else layers:
            yield NamedInputs(f"{prompt.name} layer {layer}", f"{called}, {tokens} tokens", whole[layer])


def planted_inputs(tokens: int, seed: int = 0) -> Iterator[NamedInputs]:
    """Heads made up, each a group of its own, without and with outlier channels."""
    for outliers in (False, True):
        for head in planted_heads(tokens, seed=seed, outliers=outliers):
            yield NamedInputs(head.name, f"{_PLANTED}{head.name}", head.inputs, head.needle)


def of_models(groups: Iterable[str]) -> list[str]:
    """Those groups that are no made-up heads."""
    return [group for group in groups if not group.startswith(_PLANTED)]


def moved(each: NamedInputs, device: torch.device | str) -> NamedInputs:
    """The same, where attention is to run."""
    inputs = each.inputs
    tensors = {
        name: tensor.to(device)
        for name in ("query", "key", "value", "sinks")
        if (tensor := getattr(inputs, name)) is not None
    }
    return dataclasses.replace(each, inputs=dataclasses.replace(inputs, **tensors))
