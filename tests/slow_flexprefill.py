"""FlexPrefill by its definition: one batch row and one head, loops, plain Python sums. Imports nothing of the method.

Lai et al., 2025, arXiv:2502.20766. `pattern` is anything with gamma, tau, min_budget and max_budget.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs


def is_real(inputs: AttentionInputs, b: int, p: int) -> bool:
    return inputs.key_valid is None or bool(inputs.key_valid[b, p])


def anchor_of(inputs: AttentionInputs, b: int) -> int:
    return next(p for p in range(inputs.keys) if is_real(inputs, b, p))


def real_queries(inputs: AttentionInputs, b: int) -> list[int]:
    """Slots."""
    start = inputs.query_start
    return [p for p in range(start, start + inputs.queries) if is_real(inputs, b, p)]


def asked_in(inputs: AttentionInputs, b: int, m: int, block: int) -> list[int]:
    """Slots of the real queries in row m."""
    anchor = anchor_of(inputs, b)
    return [p for p in real_queries(inputs, b) if (p - anchor) // block == m]


def visible_blocks(inputs: AttentionInputs, b: int, m: int, block: int) -> set[int]:
    """Key blocks from the first to the last that row m of the grid may see, holes and padding in them or not."""
    anchor, start = anchor_of(inputs, b), inputs.query_start
    prompt = [0] * inputs.keys if inputs.segment is None else inputs.segment[b].tolist()
    found = set()
    for p in range(max(start, anchor + m * block), min(start + inputs.queries, anchor + (m + 1) * block)):
        for j in range(anchor, min(p + 1, inputs.filled)):
            if prompt[p] == prompt[j] and (inputs.window is None or p - j < inputs.window):
                found.add((j - anchor) // block)
    return found


def slow_logits(inputs: AttentionInputs, query: Tensor, key: Tensor) -> Tensor:
    logits = query @ key.T * inputs.scale
    return logits if inputs.softcap is None else inputs.softcap * torch.tanh(logits / inputs.softcap)


def softmax(scores: dict[Any, float]) -> dict[Any, float]:
    top = max(scores.values())
    total = sum(math.exp(score - top) for score in scores.values())
    return {place: math.exp(score - top) / total for place, score in scores.items()}


def tokens_for(shares: list[float], gamma: float) -> int:
    """1 + how many of the running sums of the shares, largest first, are at most gamma."""
    total, within = 0.0, 0
    for share in sorted(shares, reverse=True):
        total += share
        within += total <= gamma
    return 1 + within


def jensen_shannon(one: list[float], other: list[float]) -> float:
    total = 0.0
    for a, v in zip(one, other, strict=True):
        middle = (a + v) / 2
        total += 0.5 * sum(x * math.log(x / middle) for x in (a, v) if x > 0)  # 0 log 0 = 0
    return math.sqrt(max(0.0, total))


def slow_flexprefill(
    inputs: AttentionInputs, b: int, h: int, rows: range, pattern: Any, block: int
) -> dict[int, set[int]]:
    """The key blocks that each of the grid's rows in `rows` keeps."""
    anchor, start = anchor_of(inputs, b), inputs.query_start
    seen = inputs.visible_mask()[b]
    query, key = inputs.query[b, h].double(), inputs.key[b, h // inputs.group_size].double()
    visible = {m: visible_blocks(inputs, b, m, block) for m in rows}
    real = real_queries(inputs, b)
    end = real[-1]
    least = -(-pattern.min_budget // block)
    if end + 1 - anchor <= max(2 * block, least * block) or end == max(start, anchor):
        return visible

    # the last block of queries, exactly
    last = [p for p in real if p > end - block]
    keys = min(inputs.filled, start + inputs.queries)
    blocks = -(-(end + 1 - anchor) // block)
    attention = {}
    for p in last:
        own = [j for j in range(anchor, keys) if seen[p - start, j]]
        weights = slow_logits(inputs, query[p - start], key[own]).softmax(0).tolist()
        attention[p] = dict(zip(own, weights, strict=True))
    columns, distances = [0.0] * keys, [0.0] * keys
    for p in last:
        for j, weight in attention[p].items():
            columns[j] += weight / len(last)
            distances[p - j] += weight / len(last)
    of_column, of_line = [0.0] * blocks, [0.0] * blocks
    for j in range(anchor, end + 1):
        of_column[(j - anchor) // block] += columns[j]
    for delta in range(end + 1 - anchor):
        of_line[(end - anchor) // block - (end - delta - anchor) // block] += distances[delta]

    # what block means say of them
    def mean_of(slots: list[int]) -> Tensor:
        return key[slots].mean(0)

    members = {
        n: [j for j in range(anchor + n * block, min(anchor + (n + 1) * block, keys)) if is_real(inputs, b, j)]
        for n in range(-(-(keys - anchor) // block))
    }
    near = [min(own) for own in attention.values()]
    met = [n for n in members if members[n] and anchor + (n + 1) * block > min(near) and anchor + n * block <= end]
    mean_query = query[[p - start for p in last]].mean(0)
    guess = softmax({n: float(slow_logits(inputs, mean_query, mean_of(members[n])[None])[0]) for n in met})
    aware = jensen_shannon([guess.get(n, 0.0) for n in range(blocks)], of_column) < pattern.tau

    # columns and lines
    def blocks_for(shares: list[float]) -> int:
        if aware:
            return least
        if pattern.gamma == 1.0:
            count = blocks
        else:
            count = tokens_for(shares, pattern.gamma) // block + 1
        most = blocks if pattern.max_budget is None else min(blocks, -(-pattern.max_budget // block))
        return max(least, min(count, most))

    def best(shares: list[float], count: int) -> set[int]:
        shares = [math.inf, *shares[1:]]
        return set(sorted(range(len(shares)), key=lambda n: (-shares[n], n))[:count])

    kept_columns = best(of_column, blocks_for(columns))
    kept_lines = best(of_line, blocks_for(distances))
    kept = {m: {n for n in visible[m] if n in kept_columns or m - n in kept_lines or n == m} for m in rows}
    if not aware:
        return kept

    # the map of block means
    asked = {m: asked_in(inputs, b, m, block) for m in range(blocks)}
    total = {}
    for m in [m for m in asked if asked[m]]:
        mean = query[[p - start for p in asked[m]]].mean(0)
        own = [n for n in sorted(visible_blocks(inputs, b, m, block)) if members[n]]
        row = softmax({n: float(slow_logits(inputs, mean, mean_of(members[n])[None])[0]) for n in own})
        total.update({(m, n): share for n, share in row.items()})
    allowed = pattern.gamma * sum(1 for m in asked if asked[m])
    running = 0.0
    for m, n in sorted(total, key=lambda tile: (-total[tile], tile)):
        running += total[m, n]
        if running > allowed and pattern.gamma < 1.0:
            break
        if m in kept:
            kept[m].add(n)
    if pattern.gamma == 1.0:
        return visible
    return kept
