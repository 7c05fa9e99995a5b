"""Blocks by signs, by additions and by stages, written from the papers: loops over one batch row and one head."""

from __future__ import annotations

import math
import struct
from typing import Any

import torch
from slow_vote_columns import anchor_of, valid, visible_keys

from sparseprefill.contracts import AttentionInputs


def rows_slots(inputs: AttentionInputs, b: int, m: int, block: int) -> list[int]:
    """Valid slots asked in row m."""
    anchor, stop = anchor_of(inputs, b), inputs.query_start + inputs.queries
    slots = range(anchor + m * block, anchor + (m + 1) * block)
    return [p for p in slots if inputs.query_start <= p < stop and valid(inputs, b, p)]


def visible_blocks(inputs: AttentionInputs, b: int, m: int, block: int) -> set[int]:
    anchor, stop = anchor_of(inputs, b), inputs.query_start + inputs.queries
    slots = [p for p in range(anchor + m * block, anchor + (m + 1) * block) if inputs.query_start <= p < stop]
    first = [0 if inputs.window is None else max(0, p - inputs.window + 1) for p in slots]
    return {
        (j - anchor) // block for p, low in zip(slots, first, strict=True)
        for j in range(max(low, anchor), min(p + 1, inputs.filled))
    }  # fmt: skip


def kept(scores: dict[int, float], forced: set[int], visible: set[int], keep: int | float, block: int) -> set[int]:
    forced = forced & visible
    count = -(-keep // block) if isinstance(keep, int) else math.ceil(round(len(visible) * keep, 6))
    count = max(min(max(1, count), len(visible)), len(forced))
    return set(sorted(visible, key=lambda n: (n not in forced, -scores.get(n, -math.inf), n))[:count])


def forced_of(m: int, sink: int, local: int, block: int) -> set[int]:
    return set(range(-(-sink // block))) | set(range(m + 1 - -(-local // block), m + 1))


def slow_sign_code(inputs: AttentionInputs, b: int, h: int, m: int, pattern: Any, block: int) -> set[int]:
    dim, group = inputs.head_dim, h // inputs.group_size
    draw = torch.Generator().manual_seed(pattern.seed)
    turns = [torch.linalg.qr(torch.randn(dim, dim, generator=draw, dtype=torch.float64)).Q
             for _ in range(math.ceil(pattern.bits / dim))]  # fmt: skip
    along = torch.cat(turns)[: pattern.bits]
    real = [j for j in range(inputs.last_key) if valid(inputs, b, j)]
    mean = inputs.key[b, group, real].mean(0)
    anchor, scores = anchor_of(inputs, b), {}
    for p in rows_slots(inputs, b, m, block):
        query, logits = inputs.query[b, h, p - inputs.query_start], {}
        for j in visible_keys(inputs, b, p):
            key = inputs.key[b, group, j] - mean
            differing = int(((along @ query < 0) != (along @ key < 0)).sum())
            z = float(query.norm() * key.norm() * math.cos(math.pi * differing / pattern.bits)) * inputs.scale
            logits[j] = inputs.softcap * math.tanh(z / inputs.softcap) if inputs.softcap else z
        top = max(logits.values())
        for j, z in logits.items():
            n = (j - anchor) // block
            scores[n] = max(scores.get(n, -math.inf), z - top)
    forced = forced_of(m, pattern.sink, pattern.local, block)
    return kept(scores, forced, visible_blocks(inputs, b, m, block), pattern.keep, block)


def bits_of(x: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", x))[0])


def slow_l_mul(x: float, y: float, bits: int) -> float:
    """By the value of the mantissas: their sum and the correction, carried into the exponent as often as it goes."""
    cut = (1 << 23) - 1 - ((1 << (23 - bits)) - 1)
    (ex, mx), (ey, my) = (((bits_of(z) >> 23) & 255, (bits_of(z) & cut) / (1 << 23)) for z in (x, y))
    if not ex or not ey:
        return 0.0
    mantissa, exponent = mx + my + 2.0 ** -(bits if bits <= 3 else 3 if bits == 4 else 4), ex + ey - 254
    while mantissa >= 1:
        mantissa, exponent = mantissa - 1, exponent + 1
    return math.copysign((1 + mantissa) * 2.0**exponent if exponent > -127 else 0.0, x) * math.copysign(1.0, y)


def slow_l_mul_rows(inputs: AttentionInputs, b: int, h: int, m: int, pattern: Any, block: int) -> set[int]:
    asked = [p - inputs.query_start for p in rows_slots(inputs, b, m, block)]
    query = inputs.query[b, h, asked].double().mean(0).float() if asked else torch.zeros(inputs.head_dim)
    anchor, visible, scores = anchor_of(inputs, b), visible_blocks(inputs, b, m, block), {}
    for n in visible:
        slots = range(anchor + n * block, min(anchor + (n + 1) * block, inputs.last_key))
        real = [j for j in slots if valid(inputs, b, j)]
        key = inputs.key[b, h // inputs.group_size, real].double().mean(0).float() if real else torch.zeros_like(query)
        scores[n] = math.fsum(slow_l_mul(float(x), float(y), pattern.bits) for x, y in zip(query, key, strict=True))
    return kept(scores, forced_of(m, pattern.sink, pattern.local, block), visible, pattern.keep, block)


def slow_hip(inputs: AttentionInputs, b: int, h: int, rows: range, pattern: Any, block: int) -> dict[int, set[int]]:
    return {m: slow_hip_row(inputs, b, h, m, pattern, block) for m in rows}


def slow_hip_row(inputs: AttentionInputs, b: int, h: int, m: int, pattern: Any, block: int) -> set[int]:
    anchor, visible = anchor_of(inputs, b), visible_blocks(inputs, b, m, block)
    asked = rows_slots(inputs, b, m, block)
    local = max(1, pattern.local)
    near = min(max(0, m + 1 - -(-local // block)) * block, m * block)
    sink = -(-pattern.sink // block) * block
    forced = forced_of(m, pattern.sink, local, block) | {m}
    if not asked:
        return visible
    slots = [p for p in range(anchor + m * block, anchor + (m + 1) * block)
             if inputs.query_start <= p < inputs.query_start + inputs.queries]  # fmt: skip
    low = max(anchor, 0 if inputs.window is None else slots[-1] - inputs.window + 1)
    keep = pattern.keep if isinstance(pattern.keep, int) else math.ceil(round((m + 1) * block * pattern.keep, 6))
    heads = range(h // inputs.group_size * inputs.group_size, (h // inputs.group_size + 1) * inputs.group_size)
    chunks: list[int] = []
    for number, (size, tokens, stride) in enumerate(pattern.stages):
        if number == 0:
            chunks = list(range(0, inputs.last_key, size))
        else:
            larger = pattern.stages[number - 1][0]
            best = sorted(scores, key=lambda c: (-scores[c], c))[: -(-max(tokens, keep) // larger)]  # noqa: F821
            chunks = [c + part for c in sorted(best) for part in range(0, larger, size)]
        chunks = [c for c in chunks if c + size > sink and c < near]
        probes = []
        for begin in range(anchor + m * block, anchor + (m + 1) * block, stride):
            own = [p - inputs.query_start for p in asked if begin <= p < begin + stride]
            probes += [inputs.query[b, head, own].mean(0) for head in heads] if own else []
        scores = {}
        for c in chunks:
            found = bisect_chunk(inputs, b, h // inputs.group_size, anchor + c, size, probes, low, slots[0])
            if found > -math.inf:
                scores[c] = found
    size = pattern.stages[-1][0]
    best = sorted(scores, key=lambda c: (-scores[c], c))[: -(-keep // size)]
    tiles = {tile for c in best for tile in range(c // block, (c + size - 1) // block + 1)}
    return (tiles | forced) & visible


def bisect_chunk(
    inputs: AttentionInputs, b: int, group: int, begin: int, size: int, probes: list[torch.Tensor], low: int, high: int
) -> float:
    best = -math.inf
    while size > 1:
        size //= 2
        values = []
        for side in (begin, begin + size):
            j = side + size // 2
            seen = low <= j < high and j < inputs.keys and valid(inputs, b, j)
            values.append(max(float(probe @ inputs.key[b, group, j]) for probe in probes) if seen else -math.inf)
        best = max(best, *values)
        if values[1] > values[0]:
            begin += size
    return best
