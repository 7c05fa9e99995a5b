"""Stem as published (arXiv:2603.06274), for one head, in loops: what `tests/test_stem.py` compares with."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from slow_xattention import visible_blocks

from sparseprefill.contracts import AttentionInputs


def slow_schedule(blocks: int, decay: float) -> list[int]:
    """The published budget of each row of a prompt of so many blocks of 128 tokens."""
    if blocks < 56:
        most = blocks
    elif blocks < 160:
        most = int(0.2 * blocks + 30)
    else:
        most = int(0.1 * blocks) + 30
    budgets = []
    for m in range(blocks):
        way = (m - most) / (blocks - 1 - most) if m > most else 0.0
        budgets.append(max(1, math.floor(most - (most - decay * most) * way + 1e-9)))
    return budgets


def slow_stem(
    inputs: AttentionInputs, b: int, h: int, rows: Iterable[int], pattern: Any, block_q: int, block_k: int
) -> dict[int, set[int]]:
    """The key blocks that each of `rows` (query blocks of the grid, with a valid query) keeps, by cells of S x S."""
    valid = [True] * inputs.keys if inputs.key_valid is None else inputs.key_valid[b].tolist()
    anchor, stride = valid.index(True), pattern.stride
    end = inputs.query_start + inputs.queries
    filled = min(end, inputs.keys if inputs.key_length is None else inputs.key_length)
    asked = [inputs.query_start <= p < end and valid[p] for p in range(inputs.keys)]
    there = [j < filled and valid[j] for j in range(inputs.keys)]
    g = h // inputs.group_size
    query, key = inputs.query[b, h].double(), inputs.key[b, g].double()

    # by cells of `stride` keys: the longest value, as a z-score of its logarithm
    longest: dict[int, float] = {}
    for j in range(anchor, inputs.keys):
        if there[j]:
            t = (j - anchor) // stride
            longest[t] = max(longest.get(t, 0.0), float(inputs.value[b, g, j].double().norm()))
    logs = {t: math.log(length + 1e-6) for t, length in longest.items()}
    mean = sum(logs.values()) / len(logs)
    deviation = math.sqrt(sum((each - mean) ** 2 for each in logs.values()) / len(logs))
    above = {t: max(0.0, (each - mean) / (deviation + 1e-6)) for t, each in logs.items()}

    def mean_of(slots: list[int], tensor: Any, offset: int) -> Any:
        if not slots:
            return tensor[0] * 0
        return sum(tensor[p - offset] for p in slots) / len(slots)

    def phase(slots: range, t: int, real: list[bool]) -> list[int]:
        return [p for p in slots if p < inputs.keys and (p - anchor) % stride == t and real[p]]

    def score(m: int, n: int) -> float:
        row = range(anchor + m * block_q, anchor + (m + 1) * block_q)
        block = range(anchor + n * block_k, min(anchor + (n + 1) * block_k, row.stop))  # nothing behind the row's end
        total = 0.0
        for t in range(stride):
            q = mean_of(phase(row, stride - 1 - t, asked), query, inputs.query_start)
            total += float(q @ mean_of(phase(block, t, there), key, 0))
        cells = [c for c in range(n * block_k // stride, (n + 1) * block_k // stride) if c in above]
        bonus = sum(above[c] for c in cells) / len(cells) if cells else 0.0
        return total * inputs.scale / stride + pattern.value_bonus * bonus

    tail = max(p for p in range(inputs.query_start, end) if valid[p]) + 1
    tokens = min(tail, filled) - anchor
    blocks, last = -(-tokens // block_k), (tokens - 1) // block_q * block_q
    if pattern.keep is None:
        most = min(blocks, -(-slow_schedule(-(-tokens // 128), 1.0)[0] * 128 // block_k))
    elif isinstance(pattern.keep, float):
        most = min(blocks, max(1, math.ceil(blocks * pattern.keep - 1e-9)))
    else:
        most = min(blocks, -(-pattern.keep // block_k))

    kept: dict[int, set[int]] = {}
    for m in rows:
        slots = [p - inputs.query_start for p in range(anchor + m * block_q, anchor + (m + 1) * block_q)]
        visible = visible_blocks(inputs, b, [i for i in slots if 0 <= i < inputs.queries], anchor, block_k)
        scores = {n: score(m, n) for n in visible}
        if not all(map(math.isfinite, scores.values())):
            kept[m] = set(visible)
            continue
        begin, start = m * block_q, most * block_k
        way = min(1.0, (begin - start) / max(1, last - start)) if begin > start else 0.0
        budget = max(1, math.floor(most * (1 - (1 - pattern.decay) * way) + 1e-9))
        frontier = -(-(m + 1) * block_q // block_k)
        forced = set(range(-(-pattern.sink // block_k))) | set(range(frontier - -(-pattern.local // block_k), frontier))
        forced |= set(range(m * block_q // block_k, frontier))
        chosen = sorted(visible, key=lambda n: (-scores[n], n))[:budget]
        kept[m] = (forced & set(visible) or {visible[-1]}) | set(chosen)  # a cache may end before the row does
    return kept
