"""What a pattern will keep before anything was looked at: what the cost model reckons with.

A pattern says it by its method `expected_density(keys) -> float`, which is asked through the function of that name.
"""

from __future__ import annotations

from typing import Any

UNKNOWN = 0.5
"""What is reckoned with where a threshold decides what a prompt keeps, and nothing says what it came to."""

_BLOCK = 64  # what is kept in any case counts in blocks, of this size


def expected_density(pattern: Any, keys: int) -> float:
    """What share of a one-shot prefill's pairs a pattern will keep, at most.

    What a pattern keeps in any case counts, in blocks of 64: in a short prompt that is more than its budget. A user's
    object without `expected_density(keys) -> float` is taken for 0.5.
    """
    own = getattr(pattern, "expected_density", None)
    return float(own(keys)) if callable(own) else UNKNOWN


def in_blocks(tokens: int) -> int:
    """Tokens rounded up to whole blocks of 64."""
    return -(-tokens // _BLOCK) * _BLOCK


def kept_share(budget: int | float, keys: int) -> float:
    """Share of causal pairs when every query keeps a budget: tokens, or a share of what it sees."""
    if isinstance(budget, float):
        return budget
    kept = min(budget, keys)
    return (kept * keys - kept * (kept - 1) / 2) / (keys * (keys + 1) / 2)
