"""XAttention as published (arXiv:2503.16428), for one head, in loops: what `tests/test_xattention.py` compares with."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from sparseprefill.contracts import AttentionInputs


def slow_xattention(
    inputs: AttentionInputs, b: int, h: int, rows: Iterable[int], pattern: Any, block_q: int, block_k: int
) -> dict[int, set[int]]:
    """The key blocks that each of `rows` (query blocks of the grid, with a valid query) keeps."""
    valid = [True] * inputs.keys if inputs.key_valid is None else inputs.key_valid[b].tolist()
    anchor, stride = valid.index(True), pattern.stride
    last_key = min(inputs.keys if inputs.key_length is None else inputs.key_length, inputs.keys)
    asked = [inputs.query_start <= p < inputs.query_start + inputs.queries and valid[p] for p in range(inputs.keys)]
    there = [j < min(last_key, inputs.query_start + inputs.queries) and valid[j] for j in range(inputs.keys)]
    seen = inputs.visible_mask()[b]  # [queries, keys]
    query, key = inputs.query[b, h].double(), inputs.key[b, h // inputs.group_size].double()

    def tokens(group: int) -> range:
        return range(anchor + group * stride, min(anchor + (group + 1) * stride, inputs.keys))

    def antidiagonal(p: int, t: int) -> float:
        total = 0.0
        for r in range(stride):
            i, j = anchor + p * stride + stride - 1 - r, anchor + t * stride + r
            if i < inputs.keys and j < inputs.keys and asked[i] and there[j]:
                total += float(query[i - inputs.query_start] @ key[j])
        score = total * inputs.scale / stride
        return score if inputs.softcap is None else inputs.softcap * math.tanh(score / inputs.softcap)

    def admitted(p: int) -> list[int]:
        """Key groups with a valid key from the first that p's first query sees to the last that its last one sees."""
        real = [i for i in tokens(p) if asked[i]]
        span: set[int] = set()
        for i in real:
            span |= set(seen[i - inputs.query_start].nonzero()[:, 0].tolist())
        if not span:
            return []
        return [
            t for t in range(p + 1) if any(min(span) <= j <= max(span) and there[j] for j in tokens(t))
        ]  # fmt: skip

    kept: dict[int, set[int]] = {}
    for m in rows:
        row = [p for p in range(anchor + m * block_q, anchor + (m + 1) * block_q) if p < inputs.keys]
        visible = visible_blocks(
            inputs, b, [p - inputs.query_start for p in row if is_asked(inputs, p)], anchor, block_k
        )
        mass, judged = dict.fromkeys(visible, 0.0), True
        for p in range(m * block_q // stride, (m + 1) * block_q // stride):
            groups = admitted(p)
            scores = [antidiagonal(p, t) for t in groups]
            judged &= all(map(math.isfinite, scores))
            if not groups or not judged:
                continue
            shares = torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()
            for t, share in zip(groups, shares, strict=True):
                mass[t * stride // block_k] += share
        own = range(m * block_q // block_k, -(-(m + 1) * block_q // block_k))
        forced = [n for n in visible if n == 0 or n in own] or [visible[-1]]
        if not judged or sum(mass.values()) == 0:
            kept[m] = set(visible)
            continue
        others = sorted((n for n in visible if n not in forced), key=lambda n: (-mass[n], n))
        if pattern.keep is not None:
            budget = pattern.keep
            wanted = math.ceil(len(visible) * budget - 1e-9) if isinstance(budget, float) else -(-budget // block_k)
            kept[m] = set(forced) | set(others[: max(0, max(1, wanted) - len(forced))])
            continue
        threshold = pattern.threshold[h] if isinstance(pattern.threshold, tuple) else pattern.threshold
        if threshold == 1:
            kept[m] = set(visible)
            continue
        needed, reached = threshold * sum(mass.values()), sum(mass[n] for n in forced)
        kept[m] = set(forced)
        for n in others:
            if reached >= needed:
                break
            kept[m].add(n)
            reached += mass[n]
    return kept


def is_asked(inputs: AttentionInputs, p: int) -> bool:
    """Whether slot p holds a query of this call, padding or not."""
    return inputs.query_start <= p < inputs.query_start + inputs.queries


def visible_blocks(inputs: AttentionInputs, b: int, queries: list[int], anchor: int, block_k: int) -> list[int]:
    """Key blocks of the grid from the first to the last key that any of these queries may see, holes or not."""
    filled = inputs.keys if inputs.key_length is None else inputs.key_length
    segment = None if inputs.segment is None else inputs.segment[b].tolist()
    found: set[int] = set()
    for i in queries:
        p = inputs.query_start + i
        first = anchor if inputs.window is None else max(anchor, p - inputs.window + 1)
        keys = list(range(first, min(p + 1, filled)))
        if segment is not None:
            keys = [j for j in keys if segment[j] == segment[p]]
        found |= {(j - anchor) // block_k for j in keys}
    return sorted(found)
