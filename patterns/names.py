"""What a name that is not known was perhaps meant to be."""

from __future__ import annotations

import difflib
from typing import Any


def nearest_name(name: str, known: Any) -> str:
    """`Did you mean ...?` for a message, or nothing where no known name is near."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f" Did you mean {close[0]!r}?" if close else ""
