"""Heads made up from a seed, each with one known way of attending; with or without outlier channels.

Each is one query head over one KV head. What varies from block to block (`_topics`) lies under all of them, as in a
text: what a block is about makes whole blocks more or less interesting, so that the mean of a block says something of
it, and a single key that matters says nothing in the mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sparseprefill.contracts import AttentionInputs

HEAD_DIM = 64
OUTLIER_CHANNELS = 4
"""Of which half are large in the keys and half in the queries."""

_OWN = 32  # channels that hold what is planted; the others are background
_BLOCK = 64
_LEAST_TOKENS = 512


@dataclass(frozen=True, slots=True)
class PlantedHead:
    """A head, and the key it must not lose."""

    name: str  # its kind, and "outliers" where it has them
    inputs: AttentionInputs  # batch 1, one query head
    needle: int | None = None  # slot of the single key that most of the mass of later queries is on


def planted_heads(tokens: int, *, seed: int = 0, outliers: bool = False, block: int = _BLOCK) -> list[PlantedHead]:
    """One head of each kind in `KINDS`, float32.

    Args:
        tokens: queries and keys, at least 512.
        seed: of every draw.
        outliers: a few channels of the keys, and others of the queries, get values 10 to 50 times as large as the rest
            with means to match, as real models have them. What a head attends to stays nearly the same.
        block: tokens that share a topic.

    Raises:
        ValueError: fewer tokens than 512, or blocks that do not fit in.
    """
    if tokens < _LEAST_TOKENS or not 1 <= block <= tokens // 8:
        raise ValueError(
            f"a planted head needs at least {_LEAST_TOKENS} tokens, and eight blocks of {block}: got {tokens} tokens"
        )
    made = []
    for number, (name, plant) in enumerate(KINDS.items()):
        draw = torch.Generator().manual_seed(1000 * seed + number)
        query, key = _topics(tokens, block, draw)
        needle = plant(query, key, block, draw)
        if outliers:
            _add_outliers(query, key, draw)
        value = torch.randn(tokens, HEAD_DIM, generator=draw)
        tensors = [each[None, None].contiguous() for each in (query, key, value)]
        inputs = AttentionInputs(tensors[0], tensors[1], tensors[2], HEAD_DIM**-0.5)
        made.append(PlantedHead(f"{name} with outliers" if outliers else name, inputs, needle))
    return made


def _topics(tokens: int, block: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Query and key [tokens, HEAD_DIM] whose logits are about N(0, 1), half of it from the topics of their blocks."""
    dim = HEAD_DIM - _OWN - OUTLIER_CHANNELS
    level = (HEAD_DIM**0.5 / dim**0.5) ** 0.5  # of each channel, so that logits have variance 1
    both = []
    for _ in range(2):
        topic = torch.randn(-(-tokens // block), dim, generator=draw).repeat_interleave(block, 0)[:tokens]
        own = torch.randn(tokens, dim, generator=draw)
        full = torch.zeros(tokens, HEAD_DIM)
        full[:, _OWN : _OWN + dim] = level * (math.sqrt(0.7) * topic + math.sqrt(0.3) * own)
        both.append(full)
    return both[0], both[1]


def _diffuse(query: Tensor, key: Tensor, block: int, draw: torch.Generator) -> None:
    """Nothing beyond the topics."""


def _local(query: Tensor, key: Tensor, block: int, draw: torch.Generator) -> None:
    """The nearer, the more; and the first four keys."""
    angle = torch.arange(len(query))[:, None] / torch.logspace(0, 3, 8)  # in keys, the shortest wave is 6 long
    waves = torch.cat([angle.cos(), angle.sin()], 1)
    _plant(query, key, slice(0, 16), waves, waves, 10.0 / 8)
    key[:4, 16] = 8.0
    query[:, 16] = HEAD_DIM**0.5


def _slash(query: Tensor, key: Tensor, block: int, draw: torch.Generator) -> None:
    """One distance, far back: each key has a code, and a query looks for that of the key so far before it."""
    codes = functional.normalize(torch.randn(len(key), _OWN, generator=draw), dim=-1)
    distance = int(torch.randint(2 * block, len(key) // 2, (1,), generator=draw))
    _plant(query, key, slice(0, _OWN), codes.roll(distance, 0), codes, 14.0)


def _vertical(query: Tensor, key: Tensor, block: int, draw: torch.Generator) -> None:
    """One key in a hundred, for all queries."""
    chosen = torch.randperm(len(key), generator=draw)[: len(key) // 100]
    key[chosen, 0] = 7.0
    query[:, 0] = HEAD_DIM**0.5


def _needle(query: Tensor, key: Tensor, block: int, draw: torch.Generator) -> int:
    """A single key, in a block that has nothing else to it, which all queries look for."""
    slot = len(key) // (4 * block) * block + int(torch.randint(block, (1,), generator=draw))
    key[slot, 0] = 8.0
    query[:, 0] = math.log(len(key)) + 3.0  # a logit well above the sum of all others
    return slot


def _sink(query: Tensor, key: Tensor, block: int, draw: torch.Generator) -> None:
    """The first four keys, whatever is asked: most of the mass of nearly all queries; the topics have the rest."""
    key[:4, 0] = 8.0
    query[:, 0] = math.log(len(key)) + 1.0  # the logit of each


def _moving(query: Tensor, key: Tensor, block: int, draw: torch.Generator) -> None:
    """A block far back, another one for each stretch of two blocks of queries; what has none so far back is diffuse."""
    stretch = 2 * block
    codes = functional.normalize(torch.randn(-(-len(key) // block), _OWN, generator=draw), dim=-1)
    asked = torch.zeros(len(query), _OWN)
    for start in range(2 * stretch, len(query), stretch):  # there a stretch lies between the last target and its query
        asked[start : start + stretch] = codes[int(torch.randint((start - stretch) // block, (1,), generator=draw))]
    given = codes.repeat_interleave(block, 0)[: len(key)]
    _plant(query, key, slice(0, _OWN), asked, given, math.log(len(key) / block) + 2.5)


KINDS: dict[str, Callable[[Tensor, Tensor, int, torch.Generator], int | None]] = {
    "diffuse": _diffuse,
    "local": _local,
    "slash": _slash,
    "vertical": _vertical,
    "needle": _needle,
    "sink": _sink,
    "moving": _moving,
}
"""What a head can attend to, by name; each is planted into a query and a key [tokens, HEAD_DIM], in place."""


def _plant(query: Tensor, key: Tensor, channels: slice, asked: Tensor, given: Tensor, logit: float) -> None:
    """Codes [tokens, channels] whose products count as `logit` each."""
    level = (logit * HEAD_DIM**0.5) ** 0.5
    query[:, channels] = level * asked
    key[:, channels] = level * given


def _add_outliers(query: Tensor, key: Tensor, draw: torch.Generator) -> None:
    """Means of 10 to 50 and a spread of 2 in the last channels; what they meet there is small."""
    half = OUTLIER_CHANNELS // 2
    for large, small, channels in (
        (key, query, slice(HEAD_DIM - OUTLIER_CHANNELS, HEAD_DIM - half)),
        (query, key, slice(HEAD_DIM - half, HEAD_DIM)),
    ):
        shape = (len(large), half)
        mean = torch.empty(half).uniform_(10, 50, generator=draw) * torch.randn(half, generator=draw).sign()
        large[:, channels] = mean + 2 * torch.randn(shape, generator=draw)
        small[:, channels] = 0.1 * torch.randn(shape, generator=draw)
