"""How much of the difference to dense attention each layer makes, and how it adds up.

A layer's own error compares its attention with and without the method on the same dense inputs: every layer is given
what the dense model would give it. The hidden error compares the hidden states behind each decoder layer in the two
models as they run, earlier errors included.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparseprefill.evals.logits import FinalStates, OutputHead
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.huggingface_layers import PatchedLayer
from sparseprefill.huggingface_modules import STATE, attention_modules, text_config
from sparseprefill.reports import PatchReport

_ROWS_AT_ONCE = 4096


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers of a model that is not patched, in order, those without attention among them.

    Raises NotImplementedError where they do not stand in one list.
    """
    attention = set(attention_modules(model, text_config(model)).values())
    lists = [each for each in model.modules() if isinstance(each, nn.ModuleList) and attention <= set(each.modules())]
    if not lists:
        raise NotImplementedError(
            f"the decoder layers of {type(model).__name__} do not stand in one list, so no error of a layer can be "
            "told: leave layers out"
        )
    return list(lists[-1])  # the innermost


def sampled_places(edges: Sequence[int], rows: int) -> list[Tensor]:
    """For each part of the positions, cut at `edges`, at most `rows` evenly spaced ones of it: int64 [rows]."""
    return [
        torch.linspace(start, stop - 1, min(rows, stop - start)).round().long()
        for start, stop in itertools.pairwise(edges)
    ]


@contextlib.contextmanager
def hidden_rows(layers: Sequence[nn.Module], places: Sequence[Tensor]) -> Iterator[dict[int, list[Tensor]]]:
    """What stands behind each layer at some places while the model runs inside, on the CPU.

    Yields {layer: [a tensor [rows, hidden] for each of `places`]}, filled by a forward pass of batch 1.
    """
    kept: dict[int, list[Tensor]] = {}

    def keep(number: int, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        if not isinstance(states, Tensor) or states.dim() != 3 or len(states) != 1:
            raise NotImplementedError(
                f"decoder layer {number} returns no hidden states [1, length, hidden], so its error cannot be told: "
                "leave layers out"
            )
        kept[number] = [states[0, each.to(states.device)].cpu() for each in places]

    hooks = [
        layer.register_forward_hook(lambda module, arguments, output, number=number: keep(number, output))
        for number, layer in enumerate(layers)
    ]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def hidden_errors(dense: dict[int, list[Tensor]], sparse: dict[int, list[Tensor]]) -> list[list[float]]:
    """Relative L2 error behind each decoder layer: one list a part, one number a layer."""
    parts = range(len(dense[0]))
    return [[_relative(*_squares(sparse[n][part], dense[n][part])) for n in sorted(dense)] for part in parts]


@dataclass(frozen=True, slots=True, eq=False)
class OwnErrors:
    """What each attention layer does to its own output, on dense inputs."""

    errors: dict[int, list[float]]  # attention layer: relative L2 error of each part
    report: PatchReport  # density and kept mass on these inputs
    final: FinalStates  # of the pass, dense up to rounding


@torch.no_grad()
def own_errors(head: OutputHead, spec: MethodSpec, ids: Tensor, edges: Sequence[int], **settings: Any) -> OwnErrors:
    """Run every attention layer twice on what the dense model gives it, with the method and as it was before.

    The relative L2 error of a part is |sparse - dense| / |dense| over the outputs of the attention module, behind its
    output projection, at all positions of the part; 0 where the method keeps everything, up to rounding.

    Args:
        ids: [1, length].
        edges: positions at which the prompt is cut into parts, 0 and length included.
        settings: of `patch_model`.
    """
    model = head.model
    errors: dict[int, list[float]] = {}

    def again(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> Any:
        state: PatchedLayer = getattr(module, STATE)
        before, state.always_dense = state.always_dense, True
        try:
            dense = module.forward(*arguments, **options)
        finally:
            state.always_dense = before
        errors[state.number] = _errors_of_parts(_first(output)[0], _first(dense)[0], edges)
        return dense

    with spec.applied(model, observe=True, **settings) as patch:
        if patch is None:
            raise ValueError("the stock model makes no error: compare a method with it")
        hooks = [
            module.register_forward_hook(again, with_kwargs=True)
            for module in model.modules()
            if hasattr(module, STATE)
        ]
        try:
            final = head.run(ids)
        finally:
            for hook in hooks:
                hook.remove()
        return OwnErrors(dict(sorted(errors.items())), patch.report(), final)


def check_dense(own: OwnErrors, dense: FinalStates) -> None:
    """Raise NotImplementedError where a pass that was to be dense was not.

    The middle one of the positions is asked: rounding can send a few to other experts.
    """
    states, want = own.final.states, dense.states
    place = torch.linspace(0, len(want) - 1, min(256, len(want)), device=want.device).round().long()
    apart = torch.linalg.vector_norm(states[place].double() - want[place].double(), dim=-1)
    error = float((apart / torch.linalg.vector_norm(want[place].double(), dim=-1)).median())
    allowed = torch.finfo(want.dtype).eps ** 0.5
    if not error <= allowed:
        raise NotImplementedError(
            f"attention layers of this model do not give the same when they run twice (error {error:.1e}, allowed "
            f"{allowed:.1e}), so the error of a layer cannot be told: leave layers out"
        )


def _first(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def _errors_of_parts(sparse: Tensor, dense: Tensor, edges: Sequence[int]) -> list[float]:
    found = []
    for start, stop in itertools.pairwise(edges):
        apart = size = 0.0
        for at in range(start, stop, _ROWS_AT_ONCE):
            rows = slice(at, min(at + _ROWS_AT_ONCE, stop))
            more = _squares(sparse[rows], dense[rows])
            apart, size = apart + more[0], size + more[1]
        found.append(_relative(apart, size))
    return found


def _squares(sparse: Tensor, dense: Tensor) -> tuple[float, float]:
    """Sums of squares of the difference and of the dense one."""
    want = dense.double()
    return float((sparse.double() - want).square().sum()), float(want.square().sum())


def _relative(apart: float, size: float) -> float:
    if apart == 0.0:
        return 0.0
    return math.sqrt(apart / size) if size else math.inf
