"""SpargeAttn's map of blocks by its definition: one batch row and one head, loops. Imports nothing of the method.

Zhang et al., 2025, arXiv:2502.18137. `pattern` is anything with similarity, cdf, topk and sink. `block` is one number,
or (block_q, block_k).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs


def slow_spargeattn(
    inputs: AttentionInputs, b: int, h: int, rows: range, pattern: Any, block: int | tuple[int, int]
) -> dict[int, set[int]]:
    """The key blocks that each of the grid's rows in `rows` keeps."""
    block_q, block_k = block if isinstance(block, tuple) else (block, block)
    valid = torch.ones(inputs.keys, dtype=torch.bool) if inputs.key_valid is None else inputs.key_valid[b]
    anchor, start = int(valid.nonzero()[0]), inputs.query_start
    seen = dataclasses.replace(inputs, key_valid=None).visible_mask()[b]  # of the grid, with what padding sees
    query, key = inputs.query[b, h].double(), inputs.key[b, h // inputs.group_size].double()
    threshold = pattern.similarity[h] if isinstance(pattern.similarity, tuple) else pattern.similarity
    cdf = pattern.cdf[h] if isinstance(pattern.cdf, tuple) else pattern.cdf
    keys = [j for j in range(min(inputs.filled, start + inputs.queries)) if valid[j]]
    mean_key = key[keys].mean(0)
    kept = {}
    for m in rows:
        begin, end = anchor + m * block_q, min(anchor + (m + 1) * block_q, start + inputs.queries)
        of_row = range(max(begin, start), end)
        met = {(j - anchor) // block_k for p in of_row for j in seen[p - start].nonzero()[:, 0].tolist() if j >= anchor}
        visible = list(range(min(met), max(met) + 1))
        asked = [p - start for p in of_row if valid[p]]
        members = {n: [j for j in keys if (j - anchor) // block_k == n and j < end] for n in visible}

        judged = [n for n in visible if not members[n] or self_similarity(key[members[n]] - mean_key) > threshold]
        scored = [n for n in judged if members[n]]
        mean = query[asked].mean(0)
        scores = {n: float(mean @ key[members[n]].mean(0)) * inputs.scale for n in scored}
        if inputs.softcap is not None:
            scores = {n: inputs.softcap * math.tanh(score / inputs.softcap) for n, score in scores.items()}
        ranked = sorted(scored, key=lambda n: (-scores[n], n)) + [n for n in judged if not members[n]]
        if cdf is None:
            topk = 0.5 if pattern.topk is None else pattern.topk
            wanted = -(-topk // block_k) if isinstance(topk, int) else -(-len(visible) * round(topk * 1000) // 1000)
            selected = ranked[: min(max(1, int(wanted)), len(visible))]
        elif cdf == 1.0:
            selected = ranked
        else:
            weights = torch.tensor([scores[n] for n in scored], dtype=torch.float64).softmax(0).tolist()
            weight, running, count = dict(zip(scored, weights, strict=True)), 0.0, 0
            for n in ranked:
                running += weight.get(n, 0.0)
                count += running <= cdf
            selected = ranked[: max(1, count)]
        own = {n for n in visible if n >= m * block_q // block_k}
        sink = {n for n in visible if n * block_k < pattern.sink}
        kept[m] = set(selected) | (set(visible) - set(judged)) | own | sink
        if not self_similarity(query[asked]) > threshold:
            kept[m] = set(visible)
    return kept


def self_similarity(tokens: Tensor) -> float:
    """The mean cosine over all pairs of tokens, each with itself too; a zero vector has cosine 0 with all."""
    lengths = [float(token.norm()) for token in tokens]
    pairs = zip(tokens, lengths, strict=True)
    units = [token / length if length > 0 else torch.zeros_like(token) for token, length in pairs]
    gram = torch.stack(units) @ torch.stack(units).T
    return min(1.0, float(gram.sum()) / len(units) ** 2)
