"""The logits of a long prompt, a few positions at a time: length x vocabulary is never in memory.

What a model does behind its last hidden states differs: soft caps (Gemma 2), factors (Cohere, Granite, Falcon H1),
several heads. None of it is written down here: the model's own forward runs, and only its body is replaced by one that
returns hidden states that were kept.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparseprefill.huggingface_modules import attention_modules, text_config

CHUNK_NUMBERS = 1 << 22
"""Logits in memory at once: positions x vocabulary; 32 MiB in float64."""
_CHECKED = 8  # positions


@dataclass(frozen=True, slots=True, eq=False)
class FinalStates:
    """The hidden states behind a model's last layer, and the model's own logits at some positions."""

    states: Tensor  # [length, hidden], final norm included
    places: Tensor  # int64 [checked], spread over the positions
    logits: Tensor  # [checked, vocabulary], from the very same forward pass


class OutputHead:
    """What a causal language model makes of its last hidden states, at any positions.

    Raises NotImplementedError for models that it cannot be told apart from.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        kind = type(model).__name__
        body = _body(model)
        embeddings = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers leaves it without types
        if body is None or embeddings is None:
            raise NotImplementedError(f"{kind} has no output head over a body of its own: load it as a causal LM")
        if "logits_to_keep" not in inspect.signature(model.forward).parameters:
            raise NotImplementedError(
                f"{kind}.forward takes no logits_to_keep, so it would make the logits of all positions at once: "
                "use a newer transformers, or another evaluation"
            )
        self.model = model
        self.body: nn.Module = body
        self._made: type[Any] | None = None  # what the body returns, known after a run
        self._vocabulary = 0  # as wide as the logits are, likewise

    @torch.no_grad()
    def run(self, ids: Tensor) -> FinalStates:
        """One forward pass over `ids` [1, length], whatever the model is patched with."""
        caught: list[Tensor] = []

        def catch(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            caught.append(output[0])
            self._made = type(output)

        length = ids.shape[1]
        places = torch.linspace(0, length - 1, min(_CHECKED, length)).round().long().to(ids.device)
        hook = self.body.register_forward_hook(catch)
        try:
            output = self.model(input_ids=ids, use_cache=False, logits_to_keep=places)
        finally:
            hook.remove()
        kind = type(self.model).__name__
        if len(caught) != 1 or caught[0].shape[:2] != ids.shape:
            raise NotImplementedError(f"{kind} does not run its body once for all positions: it cannot be compared")
        logits = _logits(output)
        if logits.shape[:2] != (1, len(places)):
            raise NotImplementedError(f"{kind} makes other logits than logits_to_keep asks for: it cannot be compared")
        self._vocabulary = logits.shape[-1]
        return FinalStates(caught[0][0], places, logits[0])

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """[positions, vocabulary] of hidden states [positions, hidden], in the dtype that the model gives them.

        Raises ValueError before the first `run`, which shows what the body returns.
        """
        if self._made is None:
            raise ValueError("run the model once before its output head")
        output = (states[None],) if self._made is tuple else self._made(last_hidden_state=states[None])
        ids = torch.zeros(1, len(states), dtype=torch.int64, device=self.model.device)
        with _returning(self.body, output):
            return _logits(self.model(input_ids=ids, use_cache=False, logits_to_keep=0))[0]

    def check(self, final: FinalStates) -> None:
        """Raise NotImplementedError where `logits` are not what the model itself gave.

        Sums of another shape are added up in another order: as much as that may differ is allowed.
        """
        own = final.logits.double()
        mine = self.logits(final.states[final.places]).double()
        finite = own.isfinite()
        same = mine.shape == own.shape and torch.equal(mine[~finite], own[~finite])
        error = float((mine - own)[finite].abs().max()) if same and bool(finite.any()) else 0.0
        largest = float(own[finite].abs().max()) if bool(finite.any()) else 0.0
        terms = final.states.shape[-1]
        exact, rounded = torch.finfo(torch.float32).eps, torch.finfo(final.states.dtype).eps
        allowed = (8 * rounded + 2 * terms**0.5 * exact) * max(largest, 1.0)
        if not same or not error <= allowed:
            raise NotImplementedError(
                f"{type(self.model).__name__} makes more of its last hidden states than its forward shows: logits of "
                f"some positions alone differ by {error:.1e} from those of the whole prompt (allowed {allowed:.1e})"
            )

    def chunks(self, positions: int) -> Iterator[slice]:
        """Slices of so many positions, each with few enough logits."""
        step = max(1, CHUNK_NUMBERS // max(1, self._vocabulary))
        for start in range(0, positions, step):
            yield slice(start, min(start + step, positions))


def _body(model: PreTrainedModel) -> nn.Module | None:
    """The part of a model that stands before its output head."""
    if model.base_model is not model:
        return model.base_model
    layers = set(attention_modules(model, text_config(model)).values())  # some have their body under another name
    return next((each for each in model.children() if layers <= set(each.modules())), None)


def _logits(output: Any) -> Tensor:
    logits: Tensor = output[0] if isinstance(output, tuple) else output.logits
    return logits


@contextlib.contextmanager
def _returning(body: nn.Module, output: Any) -> Iterator[None]:
    """A body whose forward pass computes nothing and returns this."""
    own = vars(body).get("forward")  # what wraps a model for several devices stands there
    body.forward = lambda *_, **__: output
    try:
        yield
    finally:
        if own is None:
            del body.forward
        else:
            body.forward = own


@dataclass(frozen=True, slots=True, eq=False)
class NextTokens:
    """Two runs of one text compared at every position that has a next token: float64 [length - 1] on the CPU."""

    kl: Tensor  # KL(first || second) of the next-token distributions, nats
    agreement: Tensor  # 1 where both hold the same token for the likeliest, else 0
    first_nll: Tensor  # -log probability of the token that comes next, by the first
    nll: Tensor  # likewise by the second


@torch.no_grad()
def compare_next_tokens(head: OutputHead, ids: Tensor, first: Tensor, second: Tensor) -> NextTokens:
    """Compare hidden states [length, hidden] of two runs over `ids` [1, length], in float64, a chunk at a time.

    Raises FloatingPointError where a model's logits are NaN.
    """
    length = ids.shape[1]
    if first.shape != second.shape or len(first) != length:
        raise ValueError(
            f"states of {tuple(first.shape)} and {tuple(second.shape)} are not two runs of {length} tokens"
        )
    made = torch.zeros(4, length - 1, dtype=torch.float64)
    for part in head.chunks(length - 1):
        mine = head.logits(first[part])
        following = ids[0, part.start + 1 : part.stop + 1].to(mine.device)[:, None]
        top = mine.argmax(-1)
        log_first = _log_probabilities(mine)
        del mine
        nll = -log_first.gather(1, following)[:, 0]
        if second is first:
            kl, agreement, second_nll = torch.zeros_like(nll), torch.ones_like(nll), nll
        else:
            other = head.logits(second[part])
            agreement = (other.argmax(-1) == top).double()
            log_second = _log_probabilities(other)
            del other
            second_nll = -log_second.gather(1, following)[:, 0]
            kl = _divergence(log_first, log_second)
        made[:, part] = torch.stack([kl, agreement, nll, second_nll]).cpu()
    bad = made.isnan().any(0)
    if bool(bad.any()):
        raise FloatingPointError(
            f"the logits at position {int(bad.nonzero()[0])} are NaN: check the model's weights and dtype"
        )
    return NextTokens(*made)


def _log_probabilities(logits: Tensor) -> Tensor:
    exact = logits.double()
    return exact.sub_(exact.logsumexp(-1, keepdim=True))


def _divergence(first: Tensor, second: Tensor) -> Tensor:
    """KL(first || second) [rows] of log probabilities [rows, vocabulary]; what has no probability adds nothing."""
    weight = first.exp()
    apart = first - second
    apart.masked_fill_(weight == 0, 0.0)  # both may be -inf there
    return apart.mul_(weight).sum(-1).clamp(min=0.0)  # below 0 by rounding alone
