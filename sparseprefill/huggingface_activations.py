"""Options of a patch that bound what a long prefill holds beside attention: MLPs in chunks, logits of the last token.

Neither is sparse, and neither changes a model's code: each puts a function before a `forward`, and takes it away.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

MLP_NAMES = ("mlp", "feed_forward")
"""What decoder layers call their MLP."""

_WAY_OUT = "leave mlp_chunk out, and it runs on the whole prompt as before"


def check_activations(mlp_chunk: int | None, last_logits: bool) -> None:
    """Raises TypeError or ValueError for what is no number of tokens and no switch."""
    if mlp_chunk is not None:
        if isinstance(mlp_chunk, bool) or not isinstance(mlp_chunk, int):
            raise TypeError(f"mlp_chunk must be a whole number of tokens, or None for all at once, got {mlp_chunk!r}")
        if mlp_chunk < 1:
            raise ValueError(f"mlp_chunk must be at least 1 token, got {mlp_chunk}; None runs all at once")
    if not isinstance(last_logits, bool):
        raise TypeError(f"last_logits must be True or False, got {last_logits!r}")


def decoder_layers(model: nn.Module, attention: Mapping[int, nn.Module]) -> nn.ModuleList:
    """All layers of the language model in their order, those without attention among them.

    Raises NotImplementedError where they do not stand in one list.
    """
    wanted = {id(module) for module in attention.values()}
    for holder in model.modules():
        if isinstance(holder, nn.ModuleList):
            held = {id(inner) for layer in holder for inner in layer.modules()}
            if wanted <= held:
                return holder
    raise NotImplementedError(f"the decoder layers of {type(model).__name__} do not stand in one list")


def mlp_of(layer: nn.Module) -> nn.Module | None:
    """A decoder layer's MLP, or None where no module goes by one of its names."""
    found = (getattr(layer, name, None) for name in MLP_NAMES)
    return next((each for each in found if isinstance(each, nn.Module)), None)


def chunkable_mlps(model: PreTrainedModel, attention: Mapping[int, nn.Module]) -> list[nn.Module]:
    """The MLP of every decoder layer. Raises NotImplementedError, with its name, for one that cannot run in chunks."""
    cls, mlps = type(model).__name__, []
    for number, layer in enumerate(decoder_layers(model, attention)):
        mlp = mlp_of(layer)
        if mlp is None:
            raise NotImplementedError(
                f"mlp_chunk: layer {number} of {cls} has no module called {' or '.join(MLP_NAMES)}: {_WAY_OUT}"
            )
        reason = why_no_chunks(mlp)
        if reason is not None:
            named = f"{type(mlp).__name__} of layer {number} of {cls}"
            raise NotImplementedError(f"mlp_chunk: {named} {reason}: {_WAY_OUT}")
        mlps.append(mlp)
    return mlps


def why_no_chunks(mlp: nn.Module) -> str | None:
    """Why a module cannot be trusted to take each token for itself, or None."""
    kinds = {type(inner).__name__ for inner in mlp.modules()}
    routed = sorted(kind for kind in kinds if re.search(r"moe|expert|router|sparse", kind, re.IGNORECASE))
    if routed or hasattr(mlp, "experts"):
        return f"routes its tokens to experts ({', '.join(routed) or 'experts'}), all of a prompt at once"
    for inner in mlp.modules():
        held = [*inner.parameters(recurse=False), *inner.buffers(recurse=False)]
        linear = hasattr(inner, "in_features") or type(inner).__name__ == "Conv1D"  # transformers' linear layer
        if held and not linear and "Norm" not in type(inner).__name__ and any(each.numel() > 1 for each in held):
            return f"holds a {type(inner).__name__}, which is not known to take each token for itself"
    parameters = inspect.signature(mlp.forward).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return None if len(needed) == 1 else f"takes {len(needed)} arguments beside the hidden states it computes on"


def chunk_mlps(mlps: list[nn.Module], tokens: int, undo: list[Callable[[], None]]) -> None:
    """Let each MLP take `tokens` tokens at a time. What `undo` gains puts its `forward` back."""
    for mlp in mlps:
        replace_forward(mlp, functools.partial(_in_chunks, mlp.forward, tokens), undo)


def _in_chunks(
    forward: Callable[..., Tensor], tokens: int, hidden: Tensor, *others: Any, **options: Any
) -> Tensor:  # fmt: skip
    """An MLP on hidden states [..., width], `tokens` of them at a time; fewer go through as they are."""
    if hidden.numel() <= tokens * hidden.shape[-1]:
        return forward(hidden, *others, **options)
    if others or options:
        raise NotImplementedError(f"mlp_chunk: an MLP was called with more than its hidden states: {_WAY_OUT}")
    result: Tensor = _each_chunk(forward, tokens, hidden)
    return result


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _each_chunk(forward: Callable[..., Tensor], tokens: int, hidden: Tensor) -> Tensor:
    """The loop itself, outside compiled graphs: each length would be a graph of its own."""
    flat = hidden.reshape(1, -1, hidden.shape[-1])
    whole: Tensor | None = None
    for start in range(0, flat.shape[1], tokens):
        part = forward(flat[:, start : start + tokens])
        if not isinstance(part, Tensor):
            raise NotImplementedError(f"mlp_chunk: an MLP gives a {type(part).__name__} and no tensor: {_WAY_OUT}")
        if whole is None:
            whole = part.new_empty(1, flat.shape[1], part.shape[-1])
        whole[:, start : start + tokens] = part
    assert whole is not None
    return whole.view(*hidden.shape[:-1], -1)


def check_last_logits(model: PreTrainedModel) -> None:
    """Raises NotImplementedError for a model that cannot compute logits of some tokens alone."""
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise NotImplementedError(
            f"last_logits: {type(model).__name__} takes no logits_to_keep, so it computes all its logits or has none: "
            "leave last_logits out"
        )


def keep_last_logits(model: PreTrainedModel, undo: list[Callable[[], None]]) -> None:
    """Let a model compute the last token's logits alone, unless its caller asks for others or for a loss."""
    names = list(inspect.signature(model.forward).parameters)
    places: dict[str, int] = {name: names.index(name) for name in ("logits_to_keep", "labels") if name in names}
    forward = functools.partial(_last_token, model.forward, places)
    replace_forward(model, functools.update_wrapper(forward, model.forward), undo)  # generate reads its signature


def _last_token(forward: Callable[..., Any], places: Mapping[str, int], *args: Any, **options: Any) -> Any:
    """`forward` with logits_to_keep=1 where neither it nor labels were given."""
    keep, labels = places["logits_to_keep"], places.get("labels", len(args))
    own_labels = options.get("labels") is not None or (labels < len(args) and args[labels] is not None)
    if "logits_to_keep" not in options and keep >= len(args) and not own_labels:
        options["logits_to_keep"] = 1
    return forward(*args, **options)


def replace_forward(module: nn.Module, forward: Callable[..., Any], undo: list[Callable[[], None]]) -> None:
    """For this module alone; a `forward` of its own (offloaded weights have one) comes back."""
    if "forward" in vars(module):
        undo.append(functools.partial(setattr, module, "forward", vars(module)["forward"]))
    else:
        undo.append(functools.partial(delattr, module, "forward"))
    setattr(module, "forward", forward)  # noqa: B010 (mypy takes no assignment to a method)
