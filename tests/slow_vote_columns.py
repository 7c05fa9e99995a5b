"""What rows vote for, written from the papers: loops over one batch row and one head, in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch

from sparseprefill.contracts import AttentionInputs


def visible_keys(inputs: AttentionInputs, b: int, p: int) -> list[int]:
    mask = inputs.visible_mask()[b, p - inputs.query_start]
    return [int(j) for j in mask.nonzero()[:, 0]]


def valid(inputs: AttentionInputs, b: int, p: int) -> bool:
    return inputs.key_valid is None or bool(inputs.key_valid[b, p])


def anchor_of(inputs: AttentionInputs, b: int) -> int:
    return 0 if inputs.key_valid is None else int(inputs.key_valid[b].nonzero()[0])


def tail_of(inputs: AttentionInputs, b: int) -> int:
    slots = range(inputs.query_start, inputs.query_start + inputs.queries)
    return 1 + max(p for p in slots if valid(inputs, b, p))


def voting_rows(inputs: AttentionInputs, b: int, pattern: Any) -> list[int]:
    """Slots of the last queries, and of those drawn from equal stretches before them."""
    first, tail = max(inputs.query_start, anchor_of(inputs, b)), tail_of(inputs, b)
    recent = list(range(max(inputs.query_start, tail - pattern.probe), tail))
    before = max(0, tail - pattern.probe - first)
    draw = torch.rand(pattern.spread, generator=torch.Generator().manual_seed(pattern.seed), dtype=torch.float64)
    others = [first + math.floor(before * ((t + float(u)) / pattern.spread)) for t, u in enumerate(draw)]
    rows = [p for p in others if p < first + before] + recent
    return [p for p in rows if p >= first and valid(inputs, b, p)]


def shares(inputs: AttentionInputs, b: int, h: int, query: torch.Tensor, keys: list[int]) -> dict[int, float]:
    """A softmax over some keys."""
    if not keys:
        return {}
    logits = inputs.key[b, h // inputs.group_size, keys].double() @ query.double() * inputs.scale
    if inputs.softcap is not None:
        logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
    return dict(zip(keys, logits.softmax(0).tolist(), strict=True))


def heads_of(inputs: AttentionInputs, h: int, heads: str) -> list[int]:
    group = inputs.group_size
    return {"head": [h], "group": list(range(h // group * group, (h // group + 1) * group)),
            "all": list(range(inputs.query_heads))}[heads]  # fmt: skip


def slow_votes(
    inputs: AttentionInputs, b: int, h: int, pattern: Any, stretch: int | None
) -> tuple[dict[int, float], dict[int, int]]:
    """Votes of each key, and how many rows vote on it; of one stretch, or of the whole call."""
    votes: dict[int, float] = {}
    voted: dict[int, int] = {}
    anchor = anchor_of(inputs, b)
    if stretch is None:
        ballots = [(p, visible_keys(inputs, b, p)) for p in voting_rows(inputs, b, pattern)]
    else:
        begin = anchor + stretch * pattern.superblock
        slots = range(begin, begin + pattern.superblock)
        asked = [p for p in slots if inputs.query_start <= p < inputs.query_start + inputs.queries]
        asked = [p for p in asked if valid(inputs, b, p)]
        sink = anchor + -(-pattern.sink // 16) * 16
        seen = set.intersection(*(set(visible_keys(inputs, b, p)) for p in asked)) if asked else set()
        ballots = [(asked, sorted(j for j in seen if sink <= j < begin))] if asked else []
    for asked, keys in ballots:
        for j in keys:
            voted[j] = voted.get(j, 0) + 1
        for other in heads_of(inputs, h, pattern.voters):
            rows = [asked] if isinstance(asked, int) else asked
            place = [p - inputs.query_start for p in rows]
            for j, share in shares(inputs, b, other, inputs.query[b, other, place].double().mean(0), keys).items():
                votes[j] = votes.get(j, 0.0) + share
    return votes, voted


def slow_scores(
    inputs: AttentionInputs, b: int, h: int, pattern: Any, stretch: int | None
) -> tuple[list[float], dict[int, float]]:
    """What each key slot is ranked by, and its votes."""
    votes, voted = slow_votes(inputs, b, h, pattern, stretch)
    score = [votes.get(j, 0.0) / (max(1, voted.get(j, 0)) if pattern.fair else 1) for j in range(inputs.keys)]
    if pattern.smooth == "none":
        return score, votes
    if stretch is None:
        score = [each if j < tail_of(inputs, b) - pattern.probe else 0.0 for j, each in enumerate(score)]
    half = pattern.width // 2
    around = [
        [score[i] if 0 <= i < len(score) else 0.0 for i in range(j - half, j + half + 1)] for j in range(len(score))
    ]
    return [max(each) if pattern.smooth == "max" else math.fsum(each) / pattern.width for each in around], votes


def chosen_of(
    pattern: Any, candidates: list[int], score: dict[int, float], votes: dict[int, float], total: float, size: int
) -> list[int]:
    """Of some units (blocks, or keys with a size of 1) the best ones, as many as `keep` or `mass` says."""
    ranked = sorted(candidates, key=lambda n: (-score[n], n))
    if pattern.mass is None:
        keep = pattern.keep
        wanted = math.ceil(round(len(candidates) * keep, 6)) if isinstance(keep, float) else -(-keep // size)
        return ranked[: min(max(1, wanted), len(candidates))]
    if pattern.mass == 1.0:
        return ranked
    so_far, count = total - math.fsum(votes[n] for n in candidates), 0
    for each in sorted((votes[n] for n in candidates), reverse=True):
        if so_far >= pattern.mass * total - 1e-9 * total:
            break
        so_far, count = so_far + each, count + 1
    return ranked[:count]


def slow_layer_carry(
    inputs: AttentionInputs, b: int, rows: range, pattern: Any, block: int, inner: dict[int, set[int]]
) -> dict[int, set[int]]:
    """What is left of lists in the second layer, where the first one had the same queries and keys."""
    anchor, tail = anchor_of(inputs, b), tail_of(inputs, b)
    ballot = SimpleNamespace(probe=pattern.probe, spread=0, seed=0, voters="all", superblock=None)
    votes, _ = slow_votes(inputs, b, 0, ballot, None)
    blocks = -(-(tail - anchor) // block)
    importance = [math.fsum(votes.get(j, 0.0) for j in range(anchor + n * block, anchor + (n + 1) * block))
                  for n in range(blocks)]  # fmt: skip
    share = max(pattern.least, 1 - pattern.fall)
    alive = sorted(range(blocks), key=lambda n: (-importance[n], n))[: max(1, math.ceil(round(share * blocks, 6)))]
    kept = {}
    for m in rows:
        stays = (
            set(alive) | set(range(-(-pattern.first // block))) | set(range(m + 1 - -(-pattern.near // block), m + 1))
        )
        stays |= set(range(min(m, max(0, tail - pattern.probe - anchor) // block), m + 1))
        kept[m] = inner[m] & stays or inner[m]
    return kept


def slow_vote_columns(
    inputs: AttentionInputs, b: int, h: int, rows: range, pattern: Any, block: int
) -> dict[int, set[int]]:
    anchor, kept, chosen = anchor_of(inputs, b), {}, {}
    blocks = -(-(inputs.last_key - anchor) // block)
    for m in rows:
        stretch = None if pattern.superblock is None else m * block // pattern.superblock
        if stretch not in chosen:
            score, votes = slow_scores(inputs, b, h, pattern, stretch)
            slots = [range(anchor + n * block, min(anchor + (n + 1) * block, inputs.last_key)) for n in range(blocks)]
            end = (max(0, tail_of(inputs, b) - pattern.probe - anchor) if stretch is None
                   else stretch * pattern.superblock) // block  # fmt: skip
            candidates = list(range(-(-pattern.sink // block), min(end, blocks)))
            best = {n: max((score[j] for j in own), default=0.0) for n, own in enumerate(slots)}
            mass = {n: math.fsum(votes.get(j, 0.0) for j in own) for n, own in enumerate(slots)}
            chosen[stretch] = set(chosen_of(pattern, candidates, best, mass, math.fsum(mass.values()), block))
        slots_of_row = [p for p in range(anchor + m * block, anchor + (m + 1) * block)
                        if inputs.query_start <= p < inputs.query_start + inputs.queries]  # fmt: skip
        visible = {(j - anchor) // block for p in slots_of_row for j in range(anchor, p + 1)
                   if j < inputs.filled and (inputs.window is None or p - j < inputs.window)}  # fmt: skip
        near = m + 1 - max(1, -(-pattern.local // block))
        if pattern.superblock is None:
            near = min(near, max(0, tail_of(inputs, b) - pattern.probe - anchor) // block)
        else:
            near = min(near, stretch * pattern.superblock // block)
        forced = set(range(-(-pattern.sink // block))) | set(range(max(0, near), m + 1))
        kept[m] = (forced | chosen[stretch]) & visible
    return kept
