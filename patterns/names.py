"""Names and options as they are written: what an unknown name was perhaps meant to be, and options as text."""

from __future__ import annotations

import difflib
import json
from typing import Any


def nearest_name(name: str, known: Any) -> str:
    """`Did you mean ...?` for a message, or nothing where no known name is near."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f" Did you mean {close[0]!r}?" if close else ""


_WORDS = {"True": True, "False": False, "None": None}  # as Python writes what JSON has in small letters


def _parts(text: str) -> list[str]:
    """What stands between commas, those inside of brackets left alone."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def parse_options(text: str) -> dict[str, Any]:
    """`keep=0.2,sink=64` as a dictionary: numbers where they are numbers, so True, False and None; text elsewhere.

    Lists and dictionaries are written as JSON has them: `stages=[[256,0,4],[64,8192,4]]`.
    """
    options: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in _parts(text))):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"an option is written name=value, got {part!r}")
        try:
            options[name.strip()] = json.loads(value)
        except (ValueError, RecursionError):  # no JSON, or numbers of thousands of digits
            options[name.strip()] = _WORDS.get(value.strip(), value.strip())
    return options
