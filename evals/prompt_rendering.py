"""From the text of a question to token ids: chat template or none, special tokens, and the start of the answer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

CHAT_CHOICES = ("auto", "none", "always")
"""Use the tokenizer's chat template: if it has one, never, or refuse a tokenizer without one."""

_SPARE = 16  # tokens: a word that is cut at an end of a piece of text can only change the few that stand there

_PROBE = 'The quick brown fox: 1234567 jumps,\nover "x" in a9f0-77! Don\'t stop. Größe 中文\n\n  end'


@dataclass(frozen=True, slots=True)
class Renderer:
    """How prompts of one tokenizer are made."""

    tokenizer: Any
    template: bool  # the user's turn, then the assistant's header, then the cue

    @staticmethod
    def of(tokenizer: Any, chat: str = "auto") -> Renderer:
        """Raises ValueError for an unknown choice, and for "always" where the tokenizer has no chat template."""
        if chat not in CHAT_CHOICES:
            raise ValueError(f"unknown choice of a chat template {chat!r}: choose one of {', '.join(CHAT_CHOICES)}")
        has = bool(getattr(tokenizer, "chat_template", None))
        if chat == "always" and not has:
            raise ValueError("the tokenizer has no chat template: choose a model that follows instructions, or 'auto'")
        return Renderer(tokenizer, has and chat != "none")

    def token_ids(self, text: str, cue: str) -> list[int]:
        """The prompt, special tokens included and once: a template brings its own. The cue pre-fills the answer."""
        if self.template:
            turn: str = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            return plain_ids(self.tokenizer, turn + cue.lstrip())
        ids = _encode(self.tokenizer, text + cue, True)
        # a tokenizer that closes every text would close this one before its answer
        end = getattr(self.tokenizer, "eos_token_id", None)
        while ids and ids[-1] == end:
            ids.pop()
        return ids

    def room(self, reply: str, usual: int) -> int:
        """New tokens that an answer may have: as usual, and half as many again as a right one takes here."""
        return max(usual, len(plain_ids(self.tokenizer, reply)) * 3 // 2)

    def settings(self) -> dict[str, Any]:
        """What prompts depend on, as JSON."""
        ids = plain_ids(self.tokenizer, _PROBE)
        found: dict[str, Any] = {
            "chat_template": self.template,
            "tokenizer": _sha(repr((prefix_ids(self.tokenizer), ids))),
        }
        if self.template:
            turn = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
            )
            found["chat_template_sha"] = _sha(turn)
        return found


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids without special tokens."""
    return _encode(tokenizer, text, False)


def _encode(tokenizer: Any, text: str, special: bool) -> list[int]:
    settings: dict[str, Any] = {"add_special_tokens": special}
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        settings["verbose"] = False  # no warning of long texts: fitting tries some that are too long
    ids: list[int] = list(tokenizer(text, **settings)["input_ids"])
    return ids


def first_ids(tokenizer: Any, text: str, count: int) -> list[int]:
    """The first `count` tokens of a text, without special tokens; fewer where it has no more.

    A long text is not encoded whole: it is cut far enough behind these tokens not to change them.
    """
    characters = 8 * max(1, count)
    while True:
        ids = plain_ids(tokenizer, text[:characters])
        if len(ids) >= count + _SPARE or characters >= len(text):
            return ids[:count]
        characters *= 2


def last_ids(tokenizer: Any, text: str, count: int) -> list[int]:
    """The last `count` tokens of a text: see `first_ids`."""
    characters = 8 * max(1, count)
    while True:
        ids = plain_ids(tokenizer, text[max(0, len(text) - characters) :])
        if len(ids) >= count + _SPARE or characters >= len(text):
            return ids[max(0, len(ids) - count) :]
        characters *= 2


def prefix_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text: a BOS token, or nothing. ValueError where that cannot be told."""
    ids, plain = _encode(tokenizer, "a", True), plain_ids(tokenizer, "a")
    for start in range(len(ids) - len(plain) + 1):
        if ids[start : start + len(plain)] == plain:
            return ids[:start]
    raise ValueError(
        "the tokenizer changes a text when it adds special tokens, so prompts cannot be put together for it"
    )


def haystack_settings(sentences: Sequence[str] | None) -> dict[str, Any]:
    """Which text hides the needles, as JSON."""
    if sentences is None:
        return {"haystack": "prose"}
    return {"haystack": "file", "haystack_sha": _sha("\0".join(sentences)), "haystack_sentences": len(sentences)}


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
