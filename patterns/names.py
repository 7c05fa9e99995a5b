"""Names and options as they are written: what an unknown name was perhaps meant to be, and options as text."""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Iterator
from typing import Any


def nearest_name(name: str, known: Any) -> str:
    """`Did you mean ...?` for a message, or nothing where no known name is near."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f" Did you mean {close[0]!r}?" if close else ""


_WORDS = {"True": True, "False": False, "None": None}  # as Python writes what JSON has in small letters


def _parts(text: str) -> Iterator[str]:
    """`name=value` between commas; a value that is a whole list or dictionary of JSON keeps its commas."""
    start = 0
    while start < len(text):
        stop = text.find(",", start)
        equals = text.find("=", start, len(text) if stop < 0 else stop)
        value = text[equals + 1 :].lstrip() if equals >= 0 else ""
        if value.startswith(("[", "{")):
            with contextlib.suppress(ValueError, RecursionError):
                _, length = json.JSONDecoder().raw_decode(value)
                end = len(text) - len(value) + length
                if text[end:].lstrip()[:1] in ("", ","):
                    stop = text.find(",", end)
        stop = len(text) if stop < 0 else stop
        yield text[start:stop]
        start = stop + 1


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
