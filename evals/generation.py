"""Greedy generation with the time to first token: what every task that reads text out of a model runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from sparseprefill.evals.tasks import Attempt
from sparseprefill.huggingface_modules import model_window


class _FirstToken(LogitsProcessor):
    """Tells an attempt when the first logits are there, and changes nothing."""

    def __init__(self, attempt: Attempt) -> None:
        self.attempt: Attempt | None = attempt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.attempt is not None:
            self.attempt.prefilled()
            self.attempt = None
        return scores


@torch.no_grad()
def generate(
    attempt: Attempt, max_new_tokens: int, *, stop_ids: Sequence[int] = (), min_new_tokens: int = 0
) -> list[int]:
    """New token ids after `attempt.prompt`, greedily, the end-of-text token left out. Patches the model for it.

    Args:
        max_new_tokens: at most so many.
        stop_ids: tokens that end the answer besides the model's own; they are left out of it.
        min_new_tokens: no end before so many.

    Raises:
        ValueError: prompt and answer do not fit the model's window.
    """
    model, tokenizer = attempt.model, attempt.tokenizer
    check_window(model, len(attempt.prompt.token_ids) + max_new_tokens, attempt.prompt.id)
    ends = end_ids(model, tokenizer) | set(stop_ids)
    ids = torch.tensor([list(attempt.prompt.token_ids)], device=model.device)
    settings: dict[str, Any] = {
        "do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None,
        "repetition_penalty": None, "max_new_tokens": max_new_tokens, "eos_token_id": sorted(ends) or None,
        "pad_token_id": next((x for x in (tokenizer.pad_token_id, *sorted(ends)) if x is not None), 0),
        "logits_processor": LogitsProcessorList([_FirstToken(attempt)]),
    }  # fmt: skip
    if min_new_tokens:
        settings["min_new_tokens"] = min_new_tokens
    with attempt.patched():
        written = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)  # type: ignore[operator]
        new: list[int] = written[0, ids.shape[1] :].tolist()
    attempt.new_tokens = len(new)
    while new and new[-1] in ends:
        new.pop()
    return new


def end_ids(model: Any, tokenizer: Any) -> set[int]:
    """Every token that ends a text for this model: of its generation config and of its tokenizer."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = set(own) if isinstance(own, (list, tuple)) else {own}
    return {int(each) for each in found | {getattr(tokenizer, "eos_token_id", None)} if each is not None}


def check_window(model: Any, tokens: int, what: str) -> None:
    """Raise ValueError where so many tokens exceed the model's window."""
    window = model_window(model)
    if window is not None and tokens > window:
        raise ValueError(
            f"{what}: prompt and answer take {tokens} tokens, and the model's window is {window}: choose a shorter "
            "length, or a maximum length that truncates"
        )
