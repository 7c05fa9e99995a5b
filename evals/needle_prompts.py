"""Needles in a haystack at a depth that is asked for, as pure text: the classic one and four of its relatives.

Every sample of a kind, length and depth has facts and a haystack of its own, so that samples say something new.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

from sparseprefill.evals.retrieval_prompts import (
    INTRO_ONE,
    INTRO_SOME,
    Draft,
    Haystack,
    Sample,
    UserText,
    draw_hex,
    draw_keys,
    draw_numbers,
    fact_cue,
    fact_question,
    fact_reply,
    noise,
    prose,
    statement,
)

_OWNERS = (
    "Amara", "Boris", "Chiara", "Dmitri", "Esther", "Freya", "Gilbert", "Hugo", "Igor", "Jasmine", "Kofi", "Ling",
    "Mirela", "Noor", "Oscar", "Priya", "Quentin", "Rufus", "Selma", "Tomas", "Ursula", "Vera", "Wilma", "Yusuf",
)  # fmt: skip
MOST_NEEDLES = len(_OWNERS)
"""In one prompt."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a sample is drawn with."""

    draw: random.Random
    depth: float  # 0 to 1
    needles: int
    text: UserText | None  # None: seeded prose


def _classic(plan: Plan) -> Draft:
    (key,), (value,) = draw_keys(1, plan.draw, plan.text), draw_numbers(1, plan.draw, plan.text)
    haystack = prose(plan.draw, plan.text)

    def make(size: int) -> Sample:
        context, places = haystack.around(size, [(plan.depth, statement(key, value))])
        return Sample(
            INTRO_ONE, context, fact_question([key]), fact_cue(key), (value,), fact_reply([key], [value]), places, size
        )

    return Draft(make)


def _multi(plan: Plan) -> Draft:
    """The first at the depth, the others evenly between it and the end; all are asked for."""
    count = plan.needles
    keys, values = draw_keys(count, plan.draw, plan.text), draw_numbers(count, plan.draw, plan.text)
    haystack = prose(plan.draw, plan.text)
    needles = [
        (plan.depth + k * (1 - plan.depth) / count, statement(key, value))
        for k, (key, value) in enumerate(zip(keys, values, strict=True))
    ]

    def make(size: int) -> Sample:
        context, places = haystack.around(size, needles)
        return Sample(
            INTRO_SOME, context, fact_question(keys), fact_cue(keys[0]), tuple(values), fact_reply(keys, values),
            places, size,
        )  # fmt: skip

    return Draft(make)


def _passkey(plan: Plan) -> Draft:
    (value,) = draw_numbers(1, plan.draw, digits=5)
    haystack = noise()

    def make(size: int) -> Sample:
        context, places = haystack.around(size, [(plan.depth, f"\nThe pass key is {value}. Keep it in mind.")])
        return Sample(
            "A pass key is hidden in the text below, among much that does not matter. Find it and remember it.\n",
            context, "\nQuestion: What is the pass key?", " Answer: The pass key is", (value,), f" {value}.", places,
            size,
        )  # fmt: skip

    return Draft(make)


def _key_value(plan: Plan) -> Draft:
    """One entry of a JSON object of ids; the haystack is its other entries."""
    key, value = draw_hex(plan.draw), draw_hex(plan.draw)
    draw = random.Random(plan.draw.getrandbits(64))
    haystack = Haystack(f'\n"{draw_hex(draw)}": "{draw_hex(draw)}"' for _ in itertools.repeat(None))

    def make(size: int) -> Sample:
        entries, (place,) = haystack.around(size, [(plan.depth, f'\n"{key}": "{value}"')])
        context = ("{", *(f"{entry}," for entry in entries[:-1]), entries[-1], "\n}")
        return Sample(
            "Below is a JSON object. Remember its entries: you will be asked for the value of one key.\n\n", context,
            f'\nQuestion: What is the value of the key "{key}" in the JSON object?',
            f' Answer: The value of the key "{key}" is', (value,), f' "{value}".', (place + 1,), size,
        )  # fmt: skip

    return Draft(make)


def _two_hop(plan: Plan) -> Draft:
    """One fact says what somebody owns, another the code of that; there are others of both forms."""
    count = plan.needles
    keys, values = draw_keys(count, plan.draw, plan.text), draw_numbers(count, plan.draw, plan.text)
    owners = plan.draw.sample(_OWNERS, count)
    haystack = prose(plan.draw, plan.text)
    facts = [statement(key, value) for key, value in zip(keys, values, strict=True)]
    facts += [f" {owner} owns the {key}." for owner, key in zip(owners, keys, strict=True)]
    needles = [(plan.draw.random(), fact) for fact in facts]
    needles[0] = (plan.depth, facts[0])

    def make(size: int) -> Sample:
        context, places = haystack.around(size, needles)
        return Sample(
            "The text below says, among other things, who owns what, and which secret codes things have. Remember it: "
            "you will be asked for a code.\n\n",
            context, f" Question: What is the secret code of what {owners[0]} owns?",
            f" Answer: The secret code of what {owners[0]} owns is", (values[0],), f" {values[0]}.",
            (places[0], places[count]), size,
        )  # fmt: skip

    return Draft(make)


KINDS: dict[str, Callable[[Plan], Draft]] = {
    "classic": _classic,
    "multi": _multi,
    "passkey": _passkey,
    "kv": _key_value,
    "two_hop": _two_hop,
}
"""What can be asked of a haystack at its end, by name."""

TEXT_KINDS = ("classic", "multi", "two_hop")
"""Those whose haystack is prose, or a user's text."""

MANY_KINDS = ("multi", "two_hop")
"""Those with a number of needles of one's own choice."""

NEW_TOKENS = {"classic": 32, "multi": 128, "passkey": 16, "kv": 80, "two_hop": 32}
"""Tokens that an answer may have."""


def needle_draft(
    kind: str,
    length: int,
    depth: float,
    *,
    seed: int = 1,
    index: int = 0,
    needles: int = 3,
    text: UserText | None = None,
) -> Draft:
    """Sample `index` of a kind at a length, of any size, with what is asked for at a depth from 0 to 1.

    Raises ValueError for an unknown kind, a depth or a number of needles out of range.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: choose from {', '.join(KINDS)}")
    if not 0 <= depth <= 1:
        raise ValueError(f"depths are between 0 and 1, got {depth}")
    if not 1 <= needles <= MOST_NEEDLES:
        raise ValueError(f"needles must be between 1 and {MOST_NEEDLES}, got {needles}")
    draw = random.Random(f"needles/{kind}/{seed}/{length}/{round(10000 * depth)}/{index}")
    return KINDS[kind](Plan(draw, depth, needles, text))
