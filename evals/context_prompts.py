"""A text as a fixed context, and questions behind it: where a prompt is cut in two, with a chat template or without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseprefill.evals.prompt_rendering import Renderer, plain_ids, prefix_ids

PLAIN = (" Question: ", " Answer:")
"""What stands before and behind a question where there is no chat template; the model inside was trained so."""

_MARKS = ("\u2063context\u2063", "\u2063question\u2063")  # invisible, so that no template trims them


@dataclass(frozen=True, slots=True)
class ContextPrompt:
    """How prompts of one tokenizer are put together around a text that comes first."""

    first: str  # before the text; with a chat template
    before: str  # between text and question
    after: str  # behind the question, up to where the answer begins
    special: tuple[int, ...]  # tokens that stand before everything

    @staticmethod
    def of(tokenizer: Any, chat: str = "auto") -> ContextPrompt:
        """With the user's turn of a chat template, text and question in it, or plain; `chat` as for `Renderer.of`.

        Raises ValueError for an unknown choice, for "always" without a template, and for a template that changes the
        text it is given.
        """
        if not Renderer.of(tokenizer, chat).template:
            return ContextPrompt("", *PLAIN, tuple(prefix_ids(tokenizer)))
        turn: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{_MARKS[0]}\n\n{_MARKS[1]}"}], tokenize=False, add_generation_prompt=True
        )
        if turn.count(_MARKS[0]) != 1 or turn.count(_MARKS[1]) != 1:
            raise ValueError(
                "the chat template changes what it is given, so that no context can be cut off: chat='none'"
            )
        first, rest = turn.split(_MARKS[0])
        before, after = rest.split(_MARKS[1])
        return ContextPrompt(first, before, after, ())

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> ContextPrompt:
        """What `to_dict` gave. Raises ValueError for anything else."""
        try:
            made = ContextPrompt(data["first"], data["before"], data["after"], tuple(data["special"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"this context does not say how its questions are worded ({error})") from error
        if not all(isinstance(each, str) for each in (made.first, made.before, made.after)):
            raise ValueError("this context does not say how its questions are worded")
        return made

    def to_dict(self) -> dict[str, Any]:
        """Plain types only."""
        return {"first": self.first, "before": self.before, "after": self.after, "special": list(self.special)}

    def context_ids(self, tokenizer: Any, text: str) -> Tensor:
        """int64 [tokens]: what all questions share. Raises ValueError for an empty text."""
        if not text.strip():
            raise ValueError("the text is empty: there is nothing to ask about")
        return torch.tensor([*self.special, *plain_ids(tokenizer, self.first + text)], dtype=torch.int64)

    def question_ids(self, tokenizer: Any, question: str, cue: str = "") -> Tensor:
        """int64 [tokens]: a question, up to where its answer begins, or goes on after `cue`. ValueError if empty."""
        if not question.strip():
            raise ValueError("the question is empty: ask something")
        text = self.before + question.strip() + self.after + cue
        return torch.tensor(plain_ids(tokenizer, text), dtype=torch.int64)
