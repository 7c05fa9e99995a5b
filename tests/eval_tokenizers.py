"""Tokenizers as different as they come, for the tests of evaluations."""

from __future__ import annotations

import functools
import re
from typing import Any

from transformers import AutoTokenizer

from sparseprefill.evals.loading import model_folder


class ByteTokenizer:
    """A token a byte, a BOS before every text and, if it closes them, an EOS behind it."""

    bos_token_id, eos_token_id, pad_token_id = 256, 257, 257

    def __init__(self, chat: bool = False, closes: bool = False) -> None:
        self.chat_template = "a template" if chat else None
        self.closes = closes

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        pieces = re.split(r"(<bos>)", text)
        ids = [x for piece in pieces for x in ([self.bos_token_id] if piece == "<bos>" else piece.encode())]
        if add_special_tokens:
            ids = [self.bos_token_id, *ids] + [self.eos_token_id] * self.closes
        return {"input_ids": ids}

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(x for x in ids if x < 256).decode()

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        assert add_generation_prompt
        (message,) = messages
        return f"<bos>[{message['role']}]{message['content']}[/][assistant]"


class WordTokenizer:
    """A token a word; blanks are lost."""

    eos_token_id = pad_token_id = 0
    chat_template = None

    def __init__(self) -> None:
        self.words: dict[str, int] = {"<end>": 0}

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [self.words.setdefault(word, len(self.words)) for word in text.split()]}

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        names = list(self.words)
        return " ".join(names[x] for x in ids)


@functools.cache
def inside() -> Any:
    """That of the model inside."""
    return AutoTokenizer.from_pretrained(model_folder(None))


TOKENIZERS: dict[str, Any] = {
    "inside": inside, "bytes": ByteTokenizer, "bytes, chat": lambda: ByteTokenizer(chat=True),
    "bytes, closed": lambda: ByteTokenizer(closes=True), "words": WordTokenizer,
}  # fmt: skip
