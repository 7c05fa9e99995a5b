"""Profiles and the scores beside them, small, with random attention that is really scored."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields

from sparseprefill.patterns import HeadScore, ModelPatterns
from sparseprefill.patterns.candidates import Candidate, candidates
from sparseprefill.patterns.last_rows import Pattern
from sparseprefill.patterns.scores import CandidateTable, LayerScores, Picture, score, summarise
from support import make_inputs

LAYERS, HEADS, BLOCK = 2, 4, 32
CANDIDATES = candidates(shares=(0.2, 0.5), windows=(64,))


@dataclass(frozen=True)
class Info:
    """A column."""

    label: str
    family: str
    control: bool


@dataclass(frozen=True)
class Prompt:
    """A prompt."""

    name: str
    tokens: int
    held_out: bool


PROMPTS = (Prompt("first", 160, False), Prompt("second", 256, False), Prompt("third", 320, True))


@dataclass(frozen=True)
class Scores:
    """What `ProfileScores` asks for, from scores in memory."""

    found: dict[tuple[str, int], LayerScores]
    prompts: tuple[Prompt, ...] = PROMPTS
    layers: tuple[int, ...] = tuple(range(LAYERS))
    candidates: tuple[Info, ...] = tuple(Info(each.label, each.family, each.control) for each in CANDIDATES)
    pictured: tuple[int, ...] = tuple(range(LAYERS))

    def table(self, layer: int, held_out: bool, quantile: float) -> CandidateTable:
        return summarise([self.found[p.name, layer] for p in self.prompts if p.held_out == held_out], quantile)

    @property
    def settings(self) -> dict[str, object]:
        return {"prompts_digest": "d1"}

    def picture(self, layer: int) -> tuple[str, Picture] | None:
        name = self.prompts[-1].name
        picture = self.found[name, layer].picture
        return None if layer not in self.pictured or picture is None else (name, picture)


@functools.cache
def scores(every: int = 1) -> Scores:
    """Every candidate on two layers of random attention."""
    found = {}
    for number, prompt in enumerate(PROMPTS):
        for layer in range(LAYERS):
            inputs = make_inputs(query_heads=HEADS, queries=prompt.tokens, seed=10 * number + layer, scale=0.6)
            found[prompt.name, layer] = score(
                inputs, [each.pattern for each in CANDIDATES], block=BLOCK, every=every, picture=True
            )
    return Scores(found)


def score_of(table: CandidateTable, head: int, column: int) -> HeadScore:
    """One cell of a table."""
    values = [float(getattr(table, each.name)[head, column]) for each in fields(HeadScore)]
    return HeadScore(*(min(1.0, value) for value in values[:3]), values[3])


def profile_of(found: Scores, target: float = 0.8, quantile: float = 0.1, held_out: bool = True) -> ModelPatterns:
    """The cheapest candidate whose low mass reaches a target, head by head."""
    layers: list[tuple[Pattern, ...]] = []
    tuning: list[tuple[HeadScore, ...]] = []
    judged: list[tuple[HeadScore, ...]] = []
    for layer in found.layers:
        own = found.table(layer, False, quantile)
        chosen = [_cheapest(own, head, target) for head in range(len(own.mass))]
        layers.append(tuple(CANDIDATES[column].pattern for column in chosen))
        tuning.append(tuple(score_of(own, head, column) for head, column in enumerate(chosen)))
        if held_out:
            other = found.table(layer, True, quantile)
            judged.append(tuple(score_of(other, head, column) for head, column in enumerate(chosen)))
    made = {
        "sparseprefill": "0.1.0", "target": {"kind": "mass", "mass": target},
        "quantile": quantile, "block": BLOCK, "every": 1, "candidates": [each.label for each in found.candidates],
        "prompts": [{"name": p.name, "tokens": p.tokens, "held_out": p.held_out} for p in found.prompts],
        "prompts_digest": "d1", "seed": 1, "tiles": 7,
    }  # fmt: skip
    return ModelPatterns(tuple(layers), model_of(layers), "0a1b", tuple(tuning), tuple(judged), made)


def _cheapest(table: CandidateTable, head: int, target: float) -> int:
    may = [n for n, each in enumerate(CANDIDATES) if not each.control and table.low_mass[head, n] >= target]
    return min(may, key=lambda column: float(table.work[head, column]))


def model_of(layers: Sequence[Sequence[Pattern]]) -> dict[str, object]:
    """Hard keys of a model with these heads."""
    heads = [len(each) for each in layers]
    return {
        "architecture": "llama", "layers": len(layers), "query_heads": heads[0] if len(set(heads)) == 1 else heads,
        "kv_heads": 2, "head_dim": 32, "rope": {"rope_type": "default"}, "vocabulary": 99,
    }  # fmt: skip


def drawn_profile(layers: int, heads: int, seed: int, most: Sequence[Candidate] = CANDIDATES) -> ModelPatterns:
    """Patterns and scores drawn at random, every layer alike in its number of heads."""
    import random

    draw = random.Random(seed)

    def one() -> HeadScore:
        mass = draw.random()
        return HeadScore(mass, mass * draw.random(), draw.random(), draw.random())

    patterns = tuple(tuple(draw.choice(most).pattern for _ in range(heads)) for _ in range(layers))
    tuning, held_out = (tuple(tuple(one() for _ in range(heads)) for _ in range(layers)) for _ in range(2))
    return ModelPatterns(patterns, model_of(patterns), "0a1b", tuning, held_out, {"seed": seed, "prompts_digest": "d1"})
