"""What the tests need of each method: one row in `CASES`, and the slow definition of what it keeps.

The slow definitions are written from the papers and import nothing from the methods: loops over one batch row and one
head, plain Python and torch on whole matrices, in float64, tiles of BLOCK x BLOCK.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from slow_flexprefill import slow_flexprefill
from slow_pair_scores import slow_hip, slow_l_mul_rows, slow_sign_code
from slow_spargeattn import slow_spargeattn
from slow_stem import slow_stem
from slow_vote_columns import slow_layer_carry, slow_vote_columns
from slow_xattention import slow_xattention
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.patterns import (
    AShape,
    BlockSparse,
    Dense,
    RandomBlocks,
    Sale,
    TriShape,
    VerticalSlash,
)
from sparseprefill.patterns.cached import Cached
from sparseprefill.patterns.delta_correct import DeltaCorrect
from sparseprefill.patterns.flashprefill import FlashPrefill
from sparseprefill.patterns.flexprefill import FlexPrefill
from sparseprefill.patterns.gna import Gna, Span
from sparseprefill.patterns.hip import Hip
from sparseprefill.patterns.l_mul import LMul
from sparseprefill.patterns.layer_carry import LayerCarry
from sparseprefill.patterns.local_stride import LocalStride
from sparseprefill.patterns.progressive import Progressive
from sparseprefill.patterns.sign_code import SignCode
from sparseprefill.patterns.skip_softmax import SkipSoftmax
from sparseprefill.patterns.spargeattn import SpargeAttn
from sparseprefill.patterns.stem import Stem
from sparseprefill.patterns.union import Union
from sparseprefill.patterns.vote_columns import VoteColumns, snapkv, tokenselect, zipvl
from sparseprefill.patterns.xattention import XAttention
from support import left_padding

BLOCK = 16


def with_holes(keys: int) -> torch.Tensor:
    """bool [2, keys]: left padding, a block of nothing, and nothing right before the end."""
    valid = left_padding(keys, [5, 40])
    valid[0, 60:100] = False
    valid[1, keys - 12 : keys - 9] = False
    return valid


INPUTS: dict[str, dict[str, Any]] = {
    "plain": {"queries": 250},
    "one-block": {"queries": 9},
    "padded": {"batch": 2, "queries": 200, "key_valid": left_padding(200, [0, 75])},
    "right-padded": {"batch": 2, "queries": 200, "key_valid": left_padding(200, [0, 75]).flip(1)},
    "chunk": {"queries": 90, "keys": 250},
    "softcap": {"queries": 150, "softcap": 1.5},
}
"""What every method meets its slow definition on."""

MORE_INPUTS: dict[str, dict[str, Any]] = {
    "window": {"queries": 200, "window": 100},
    "packed": {"queries": 200, "segment": torch.tensor([[0] * 90 + [1] * 110])},
    "packed late": {"queries": 200, "segment": torch.tensor([[0] * 190 + [1] * 10])},
    "static-cache": {"queries": 100, "keys": 300, "query_start": 50, "key_length": 150},
    "holes": {"batch": 2, "queries": 120, "keys": 250, "key_valid": with_holes(250)},
}
"""And some, in test files of their own."""

PART_INPUTS: dict[str, dict[str, Any]] = {
    "plain": {"queries": 250},
    "one-query": {"queries": 1},
    "one-query-late": {"queries": 1, "keys": 100},
    "padded": {"batch": 3, "queries": 200, "key_valid": left_padding(200, [0, 75, 199])},
    "right-padded": {"batch": 2, "queries": 200, "key_valid": left_padding(200, [0, 75]).flip(1)},
    "holes": {"batch": 2, "queries": 200, "key_valid": torch.arange(400).view(2, 200) % 7 < 5},
    "window": {"queries": 250, "window": 100},
    "packed": {"queries": 200, "segment": torch.tensor([[0] * 90 + [1] * 110])},
    "chunk-inside-a-block": {"queries": 75, "keys": 250},
    "static-cache": {"queries": 100, "keys": 300, "query_start": 50, "key_length": 150},
    "softcap": {"queries": 150, "softcap": 1.5},
    "sinks": {"queries": 150, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
}  # fmt: skip
"""What patterns that lay keys in another order meet theirs on."""

Slow = Callable[[AttentionInputs, int, int, range, Any], dict[int, set[int]]]
"""(inputs, batch row, head, rows of the grid that hold a real query, pattern) -> the key blocks of each row."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A method small enough to drop blocks at a few hundred tokens, and what it is at full budget."""

    pattern: Any
    full: Any
    looks_ahead: bool
    chunked: str  # "identical" or "own", as in the methods table
    slow: Slow | None  # None: what it keeps is drawn, or everything
    drawn: Any = None  # how hypothesis draws such a pattern; one row a method has it
    square: bool = False  # tiles of other shapes are refused
    steps: int = 1  # tokens of a tile must be a multiple of it


# ---- slow definitions: loops over one batch row and one head, plain Python and torch on whole matrices


def slow_visible(inputs: AttentionInputs, b: int, m: int) -> list[int]:
    """Key blocks in which row m of the grid of batch row b sees a key."""
    anchor = slow_anchor(inputs, b)
    return sorted({(j - anchor) // BLOCK for p in slow_row(inputs, b, m) for j in slow_keys(inputs, p) if j >= anchor})


def slow_anchor(inputs: AttentionInputs, b: int) -> int:
    return 0 if inputs.key_valid is None else int(inputs.key_valid[b].nonzero()[0])


def slow_keys(inputs: AttentionInputs, p: int) -> range:
    first = 0 if inputs.window is None else max(0, p - inputs.window + 1)
    return range(first, min(p + 1, inputs.keys if inputs.key_length is None else inputs.key_length))


def slow_row(inputs: AttentionInputs, b: int, m: int) -> list[int]:
    """Slots asked in row m (a block number of the grid)."""
    anchor = slow_anchor(inputs, b)
    start, stop = inputs.query_start, inputs.query_start + inputs.queries
    return [p for p in range(anchor + m * BLOCK, anchor + (m + 1) * BLOCK) if start <= p < stop]


def slow_logits(inputs: AttentionInputs, b: int, h: int) -> Tensor:
    """[queries, keys] in float64, masked."""
    query, key = inputs.query[b, h].double(), inputs.key[b, h // inputs.group_size].double()
    logits = query @ key.T * inputs.scale
    if inputs.softcap is not None:
        logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
    return logits.masked_fill(~inputs.visible_mask()[b], -torch.inf)


def row_by_row(slow: Callable[[AttentionInputs, int, int, int, Any], set[int]]) -> Slow:
    """A definition of one row as one of all rows."""
    return lambda inputs, b, h, rows, pattern: {m: slow(inputs, b, h, m, pattern) for m in rows}


def in_blocks(slow: Callable[..., dict[int, set[int]]]) -> Slow:
    """A definition for tiles of any size."""
    return lambda inputs, b, h, rows, pattern: slow(inputs, b, h, rows, pattern, BLOCK)


def on_tiles(slow: Callable[..., dict[int, set[int]]]) -> Slow:
    """A definition for tiles of any size, queries and keys told apart."""
    return lambda inputs, b, h, rows, pattern: slow(inputs, b, h, rows, pattern, BLOCK, BLOCK)


def slow_a_shape(inputs: AttentionInputs, b: int, h: int, m: int, pattern: Any) -> set[int]:
    anchor, kept = slow_anchor(inputs, b), set()
    if isinstance(pattern.window, float):
        wanted = max(1, -(-(m + 1) * round(pattern.window * 1000) // 1000))
        sink = -(-pattern.sink // BLOCK)
        kept = set(range(sink)) | set(range(m + 1 - max(1, wanted - sink), m + 1))
        return kept & set(slow_visible(inputs, b, m))
    whole_row = range(anchor + m * BLOCK, anchor + (m + 1) * BLOCK)  # of the grid, asked entirely or not
    for p in whole_row:
        kept |= {
            (j - anchor) // BLOCK for j in range(anchor, p + 1) if j - anchor < pattern.sink or p - j < pattern.window
        }
    kept |= set(range(-(-pattern.sink // BLOCK)))
    return kept & set(slow_visible(inputs, b, m))


def slow_tri_shape(inputs: AttentionInputs, b: int, h: int, m: int, pattern: TriShape) -> set[int]:
    if slow_last_rows(inputs, b, m, pattern.last):
        return set(slow_visible(inputs, b, m))
    return slow_a_shape(inputs, b, h, m, pattern)


def slow_local_stride(inputs: AttentionInputs, b: int, h: int, m: int, pattern: LocalStride) -> set[int]:
    """The closed form, for each pair of blocks of the rule that a tile holds."""
    head, kept = h // inputs.group_size, set()
    if head >= inputs.kv_heads - pattern.dense_heads:
        return set(slow_visible(inputs, b, m))
    step = 0 if pattern.homogeneous else max(1, pattern.stride // inputs.kv_heads)
    for i in {p // pattern.block for p in range(m * BLOCK, (m + 1) * BLOCK)}:
        if isinstance(pattern.local, float):
            local = max(1, -(-(i + 1) * round(pattern.local * 1000) // 1000))
        else:
            local = -(-pattern.local // pattern.block)
        for j in range(i + 1):
            if i - j < local or (j + head * step + pattern.offset) % pattern.stride == 0:
                kept |= {key // BLOCK for key in range(j * pattern.block, (j + 1) * pattern.block)}
    return kept & set(slow_visible(inputs, b, m))


def slow_neighbourhood(
    p: int, size: int, window: int, stride: int, dilation: int, causal: bool
) -> set[int]:  # fmt: skip
    """Coordinates that the token p of one dimension sees."""
    c, r = divmod(p, dilation)
    group = len(range(r, size, dilation))
    if causal:
        leader = min(c // stride * stride + stride - 1, group - 1)
        start, end = max(leader - (window - 1), 0), c + 1
    else:
        leader = min(c // stride * stride + stride // 2, group - 1)
        start = max(leader - window // 2, 0)
        start -= max(0, start + window - group)
        end = start + window
    return {each * dilation + r for each in range(start, end)}


def slow_span(p: int, span: Span) -> set[int]:
    """Keys inside of a span that its token p sees, counted from its first token."""
    axes, rest = [], p
    for step, *each in zip(
        (math.prod(span.shape[d + 1 :]) for d in range(len(span.shape))), span.shape, span.window, span.stride,
        span.dilation, span.causal, strict=True,
    ):  # fmt: skip
        own, rest = divmod(rest, step)
        axes.append([step * each_key for each_key in slow_neighbourhood(own, *each)])
    return {sum(keys) for keys in itertools.product(*axes)}


def slow_gna(inputs: AttentionInputs, b: int, h: int, m: int, pattern: Gna) -> set[int]:
    anchor, tail = slow_anchor(inputs, b), int(inputs.tail()[b])
    length, window, kept = tail - anchor, pattern.window, set(range(-(-pattern.sink // BLOCK)))
    if isinstance(window, float):
        group = math.ceil(length / pattern.dilation)
        window = max(pattern.stride, math.ceil(group * round(window * 1000) / 1000))
    for p in range(m * BLOCK, (m + 1) * BLOCK):
        own = next((span for span in pattern.spans if span.start <= p < span.stop), None)
        if own is not None:
            keys = {own.start + each for each in slow_span(p - own.start, own)}
            kept |= {j // BLOCK for j in keys if j <= p}
        if p < length:
            keys = slow_neighbourhood(p, length, window, pattern.stride, pattern.dilation, True)
            kept |= {j // BLOCK for j in keys if own is None or j < own.start}
    return kept & set(slow_visible(inputs, b, m))


def slow_last_rows(inputs: AttentionInputs, b: int, m: int, last: int) -> bool:
    real = list(range(inputs.query_start, inputs.query_start + inputs.queries))
    if inputs.key_valid is not None:
        real = [p for p in real if inputs.key_valid[b, p]]
    return any(p > real[-1] - last for p in slow_row(inputs, b, m))


def slow_block_sparse(inputs: AttentionInputs, b: int, h: int, m: int, pattern: BlockSparse) -> set[int]:
    visible = slow_visible(inputs, b, m)
    forced = slow_forced(m, pattern.sink, pattern.local) & set(visible)
    scores = slow_pooled_scores(inputs, b, h, m)
    count = max(slow_budget(pattern.keep, len(visible)), len(forced))
    ranked = sorted(visible, key=lambda n: (n not in forced, -scores[n], n))
    return set(ranked[:count])


def slow_block_sparse_mass(inputs: AttentionInputs, b: int, h: int, m: int, pattern: BlockSparse) -> set[int]:
    """A softmax over the logits of block means, soft-capped as the model's own; blocks without a key have no share."""
    visible, anchor = slow_visible(inputs, b, m), slow_anchor(inputs, b)
    forced = slow_forced(m, pattern.sink, pattern.local) & set(visible)
    end = min(inputs.query_start + inputs.queries, inputs.filled)
    weight = dict.fromkeys(visible, 0.0)
    for n, logit in slow_pooled_scores(inputs, b, h, m).items():
        slots = range(anchor + n * BLOCK, min(anchor + (n + 1) * BLOCK, end))
        if any(inputs.key_valid is None or inputs.key_valid[b, j] for j in slots):
            weight[n] = math.exp(inputs.softcap * math.tanh(logit / inputs.softcap) if inputs.softcap else logit)
    kept, so_far = set(forced), 0.0
    for n in sorted(visible, key=lambda n: (n not in forced, -weight[n], n)):
        if so_far < pattern.mass * math.fsum(weight.values()):
            kept.add(n)
        so_far += weight[n]
    return kept


def slow_pooled_scores(inputs: AttentionInputs, b: int, h: int, m: int) -> dict[int, float]:
    anchor = slow_anchor(inputs, b)

    def real(slots: list[int]) -> list[int]:
        return [p for p in slots if inputs.key_valid is None or inputs.key_valid[b, p]]

    asked = [p - inputs.query_start for p in real(slow_row(inputs, b, m))]
    query = inputs.query[b, h, asked].double().mean(0)
    end = min(inputs.query_start + inputs.queries, inputs.filled)
    scores = {}
    for n in slow_visible(inputs, b, m):
        slots = real(list(range(anchor + n * BLOCK, min(anchor + (n + 1) * BLOCK, end))))
        key = inputs.key[b, h // inputs.group_size, slots].double().mean(0) if slots else torch.zeros_like(query)
        scores[n] = float(query @ key * inputs.scale)
    return scores


def slow_forced(m: int, sink: int, local: int) -> set[int]:
    return set(range(-(-sink // BLOCK))) | set(range(m + 1 - -(-local // BLOCK), m + 1))


def slow_budget(budget: int | float, visible: int) -> int:
    wanted = -(-budget // BLOCK) if isinstance(budget, int) else -(-visible * round(budget * 1000) // 1000)
    return min(max(1, int(wanted)), visible)


def slow_skip_softmax(inputs: AttentionInputs, b: int, h: int, m: int, pattern: Any) -> set[int]:
    """The lists are those of what it goes around: what is skipped is for the kernel to find."""
    return slow_a_shape(inputs, b, h, m, pattern.inner)


def slow_union(inputs: AttentionInputs, b: int, h: int, m: int, pattern: Union) -> set[int]:
    own = slow_block_sparse(inputs, b, h, m, pattern.inner)
    return own | slow_a_shape(inputs, b, h, m, pattern.other)


def slow_inner(inputs: AttentionInputs, b: int, h: int, m: int, pattern: Any) -> set[int]:
    """Wrappers that change nothing of the lists of a layer by itself."""
    return slow_block_sparse(inputs, b, h, m, pattern.inner)


@dataclasses.dataclass(frozen=True)
class SecondLayer(LayerCarry):
    """Two layers with the same queries and keys, and the lists of the second one."""

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        plain = LayerCarry(
            **{each: getattr(self, each) for each in ("inner", "fall", "least", "probe", "first", "near")}
        )
        plain.for_layer(0).build_index(inputs, grid)
        return plain.for_layer(1).build_index(inputs, grid)


def slow_second_layer(
    inputs: AttentionInputs, b: int, h: int, rows: range, pattern: SecondLayer
) -> dict[int, set[int]]:  # fmt: skip
    inner = {m: slow_block_sparse(inputs, b, h, m, pattern.inner) for m in rows}
    return slow_layer_carry(inputs, b, rows, pattern, BLOCK, inner)


def slow_cached(inputs: AttentionInputs, b: int, h: int, rows: range, pattern: Cached) -> dict[int, set[int]]:
    """Row by row: like the last one that made a list, or not."""
    maker, lists, mean = -1, {}, {}
    for m in rows:
        asked = [p - inputs.query_start for p in slow_row(inputs, b, m)]
        if inputs.key_valid is not None:
            asked = [p for p in asked if inputs.key_valid[b, p + inputs.query_start]]
        mean[m] = inputs.query[b][:, asked].double().mean(1).flatten() if asked else torch.zeros(1, dtype=torch.float64)
        like = maker >= 0 and m - maker <= pattern.most and mean[m].shape == mean[maker].shape
        if like:
            like = float(mean[m] @ mean[maker] / mean[m].norm() / mean[maker].norm()) >= pattern.similar
        maker = maker if like else m
        own = slow_block_sparse(inputs, b, h, maker, pattern.inner)
        lists[m] = (own | set(range(maker, m + 1))) & set(slow_visible(inputs, b, m)) if like else own
    return lists


def slow_progressive(inputs: AttentionInputs, b: int, h: int, m: int, pattern: Progressive) -> set[int]:
    def few(tensor: Tensor) -> Tensor:
        most = 2 ** (pattern.bits - 1) - 1
        scale = tensor.abs().amax(-1, keepdim=True) / most
        return (tensor / scale).round() * scale

    coarse = dataclasses.replace(inputs, query=few(inputs.query), key=few(inputs.key))
    asked = slow_row(inputs, b, m)
    keys = [j for j in slow_keys(inputs, asked[-1]) if inputs.key_valid is None or inputs.key_valid[b, j]]
    place = [p - inputs.query_start for p in asked if inputs.key_valid is None or inputs.key_valid[b, p]]
    mean = coarse.query[b, h, place].mean(0)
    z = coarse.key[b, h // inputs.group_size, keys] @ mean * inputs.scale
    if inputs.softcap is not None:
        z = inputs.softcap * torch.tanh(z / inputs.softcap)
    flat = float(z.softmax(0).max()) < pattern.flat
    return slow_block_sparse(inputs if flat else coarse, b, h, m, pattern.inner)


def slow_flashprefill(inputs: AttentionInputs, b: int, h: int, m: int, pattern: FlashPrefill) -> set[int]:
    """As published: energies are sums of exp over rows, relative to the row block's peak and normalised."""
    anchor, end = slow_anchor(inputs, b), min(inputs.query_start + inputs.queries, inputs.filled)
    visible = slow_visible(inputs, b, m)
    logits: dict[int, list[float]] = {}
    for n in visible:
        slots = range(anchor + n * BLOCK, min(anchor + (n + 1) * BLOCK, end))
        real = [j for j in slots if inputs.key_valid is None or inputs.key_valid[b, j]]
        mean = inputs.key[b, h // inputs.group_size, real].double().mean(0)
        for p in slow_row(inputs, b, m):
            asked = inputs.key_valid is None or bool(inputs.key_valid[b, p])
            if asked and real and slow_keys(inputs, p)[0] <= real[-1] <= p:
                z = float(inputs.query[b, h, p - inputs.query_start].double() @ mean * inputs.scale)
                if inputs.softcap is not None:
                    z = inputs.softcap * math.tanh(z / inputs.softcap)
                logits.setdefault(n, []).append(z)
    peak = max((z for own in logits.values() for z in own), default=0.0)
    energy = {n: math.fsum(math.exp(z - peak) for z in own) for n, own in logits.items()}
    total = math.fsum(energy.values()) + 1e-9
    energy = {n: own / total for n, own in energy.items()}
    forced = (slow_forced(m, pattern.sink, pattern.local) | slow_own(inputs, b, m)) & set(visible)
    ranked = sorted(visible, key=lambda n: (-energy.get(n, -1.0), n))
    if pattern.keep is not None:
        count = max(slow_budget(pattern.keep, len(visible)), len(forced))
        return set(sorted(ranked, key=lambda n: n not in forced)[:count])
    sink = set() if pattern.sink_counts else set(range(-(-pattern.sink // BLOCK)))
    largest = max((own for n, own in energy.items() if n not in sink), default=0.0)
    least = set(ranked[: slow_budget(pattern.least, len(visible))]) if pattern.least else set()
    alpha = 0.12 if pattern.alpha is None else pattern.alpha
    strong = {n for n in visible if energy.get(n, 0.0) >= alpha * largest} if alpha == 0 or energy else set()
    return forced | least | (strong if alpha == 0 else strong & energy.keys())


def slow_own(inputs: AttentionInputs, b: int, m: int) -> set[int]:
    """Blocks that the queries of a row stand in themselves."""
    return {(p - slow_anchor(inputs, b)) // BLOCK for p in slow_row(inputs, b, m)}


def slow_vertical_slash(inputs: AttentionInputs, b: int, h: int, pattern: VerticalSlash) -> tuple[list[int], list[int]]:
    """Block columns and block slashes by falling mass, forced ones first."""
    anchor = slow_anchor(inputs, b)
    share = slow_logits(inputs, b, h).softmax(-1).nan_to_num(0.0)
    slots = list(range(inputs.query_start, inputs.query_start + inputs.queries))
    end = max(p for p in slots if inputs.key_valid is None or inputs.key_valid[b, p])
    probe = [p for p in slots if end - pattern.probe < p <= end]
    blocks = -(-inputs.last_key // BLOCK)
    column, slash = [0.0] * blocks, [0.0] * blocks
    for p in probe:
        if inputs.key_valid is not None and not inputs.key_valid[b, p]:
            continue
        for j in range(anchor, p + 1):
            mass = float(share[p - inputs.query_start, j])
            column[(j - anchor) // BLOCK] += mass
            d, r = divmod(p - j, BLOCK)  # a share of the distance lies in tiles (m, m - d), the rest in (m, m - d - 1)
            slash[d] += mass * (1 - r / BLOCK)
            if d + 1 < blocks:
                slash[d + 1] += mass * r / BLOCK
    forced_columns = {n for n in range(blocks) if n * BLOCK < 30}
    forced_slashes = {d for d in range(blocks) if (d - 1) * BLOCK < 100}
    return (
        sorted(range(blocks), key=lambda n: (n not in forced_columns, -column[n] if n not in forced_columns else 0, n)),
        sorted(range(blocks), key=lambda d: (d not in forced_slashes, -slash[d] if d not in forced_slashes else 0, d)),
    )


def slow_vertical_slash_rows(
    inputs: AttentionInputs, b: int, h: int, rows: range, pattern: VerticalSlash
) -> dict[int, set[int]]:
    columns, slashes = slow_vertical_slash(inputs, b, h, pattern)
    least = -(-30 // BLOCK), -(-100 // BLOCK) + 1

    def kept(c: int, s: int) -> dict[int, set[int]]:
        chosen_columns, chosen_slashes = set(columns[:c]), set(slashes[:s])
        return {
            m: {n for n in slow_visible(inputs, b, m) if n in chosen_columns or m - n in chosen_slashes} for m in rows
        }

    if pattern.density is None:
        assert pattern.verticals is not None
        assert pattern.slashes is not None
        return kept(max(-(-pattern.verticals // BLOCK), least[0]), max(-(-pattern.slashes // BLOCK), least[1]))
    allowed = sum(m + 1 for m in rows) * pattern.density
    best = (0, 0)
    for total in range(2 * len(columns) + 1):
        c = (total * 1000 + 3548) // 7096
        everything = set(columns[:c]), set(slashes[: total - c])
        tiles = sum(1 for m in rows for n in range(m + 1) if n in everything[0] or m - n in everything[1])
        if tiles <= allowed:
            best = (c, total - c)
    return kept(max(best[0], least[0]), max(best[1], least[1]))


def slow_sale_rows(inputs: AttentionInputs, b: int, h: int, real: range, pattern: Sale) -> dict[int, set[int]]:
    """The whole of SALE for one head: means, codes, windows, weights, and what each row keeps of them."""
    anchor, keys = slow_anchor(inputs, b), min(inputs.last_key, inputs.keys)
    valid = torch.ones(inputs.keys, dtype=torch.bool) if inputs.key_valid is None else inputs.key_valid[b]
    query, key = inputs.query[b, h].double(), inputs.key[b, h // inputs.group_size, :keys].double()
    here = valid[inputs.query_start : inputs.query_start + inputs.queries]
    query_mean, key_mean = query[here].mean(0), key[valid[:keys]].mean(0)

    def rounded(vectors: Tensor, groups: list[Any]) -> Tensor:
        most, out = 2 ** (pattern.bits - 1) - 1, torch.zeros_like(vectors)
        for group in set(groups):
            members = [n for n, own in enumerate(groups) if own == group]
            largest = max(float(vectors[members].abs().max()), 1e-300)
            out[members] = (vectors[members] * most / largest).round() * largest / most
        return out

    by_token = pattern.group == "token"
    slots = [inputs.query_start + i for i in range(inputs.queries)]
    centred_query = (query - query_mean) * here[:, None]
    centred_key = (key - key_mean) * valid[:keys, None]
    query_codes = rounded(centred_query, [p if by_token else (p - anchor) // 16 for p in slots])
    key_codes = rounded(centred_key, [j if by_token else max(0, j - anchor) // pattern.key_block for j in range(keys)])
    estimate = (query_codes @ key_codes.T + centred_key @ query_mean + (query @ key_mean)[:, None]) * inputs.scale
    if inputs.softcap is not None:
        estimate = inputs.softcap * torch.tanh(estimate / inputs.softcap)
    exact = slow_logits(inputs, b, h)
    kept: dict[int, set[int]] = {}
    for m in real:
        visible, best = slow_visible(inputs, b, m), {}
        forced: set[int] = set()
        for p in slow_row(inputs, b, m):
            blocks = -(-pattern.query_block * ((p - anchor) // pattern.query_block + 1) // pattern.key_block)
            local = slow_window(blocks, pattern.segment // pattern.key_block, pattern.window // pattern.key_block)
            window = anchor + (blocks - local) * pattern.key_block
            near = [j for j in range(anchor, keys) if j - anchor < pattern.key_block or j >= window]
            forced |= {n for n in visible if n * BLOCK < pattern.key_block or anchor + (n + 1) * BLOCK > window}
            if not valid[p]:
                continue
            i = p - inputs.query_start
            mass = torch.logsumexp(exact[i, near], 0)
            for j in range(anchor + pattern.key_block, window):
                if j < keys and exact[i, j] > -torch.inf:
                    n = (j - anchor) // BLOCK
                    best[n] = max(best.get(n, -torch.inf), float(estimate[i, j] - mass))
        forced &= set(visible)
        if pattern.keep is not None:
            count = max(slow_budget(pattern.keep, len(visible)), len(forced))
            ranked = sorted(visible, key=lambda n: (n not in forced, -best.get(n, -torch.inf), n))
            kept[m] = set(ranked[:count])
        else:
            kept[m] = forced | {n for n, score in best.items() if score > math.log(pattern.threshold or 0)}
    return kept


def slow_window(blocks: int, segment: int, window: int) -> int:
    """Blocks of the local window, step by step: whole segments after block 0 are tested while enough is left."""
    tested = 0
    while 1 + tested + segment <= blocks and blocks - (1 + tested + segment) >= window:
        tested += segment
    return blocks - 1 - tested


BUDGETS = st.one_of(st.integers(1, 200), st.sampled_from((0.1, 0.25, 0.5, 0.9, 1.0)))


def small_sale(budget: dict[str, Any], step: tuple[int, int], window: int, segment: int, **options: Any) -> Sale:
    """Steps and windows that fit into a few hundred tokens; `window` and `segment` in steps beyond the least."""
    query_block, key_block = step
    least = -(-(query_block + key_block - math.gcd(query_block, key_block)) // key_block)
    return Sale(
        **budget, query_block=query_block, key_block=key_block, window=(least + window) * key_block,
        segment=segment * key_block, **options,
    )  # fmt: skip


CASES: dict[str, Case] = {
    "dense": Case(Dense(), Dense(), False, "identical", None, st.just(Dense())),
    "a_shape": Case(
        AShape(sink=20, window=50), AShape(sink=0, window=10**6), False, "identical", row_by_row(slow_a_shape),
        st.builds(AShape, sink=st.integers(0, 90), window=BUDGETS),
    ),
    "a_shape-share": Case(
        AShape(sink=16, window=0.3), AShape(sink=0, window=1.0), False, "identical", row_by_row(slow_a_shape)
    ),
    "tri_shape": Case(
        TriShape(sink=20, window=50, last=20), TriShape(sink=0, window=10**6), True, "own", row_by_row(slow_tri_shape),
        st.builds(TriShape, sink=st.integers(0, 90), window=BUDGETS, last=st.integers(1, 60)),
    ),
    "local_stride": Case(
        LocalStride(local=30, stride=5, block=16, offset=1), LocalStride(local=16, stride=1, block=16), False,
        "identical", row_by_row(slow_local_stride),
        st.builds(
            LocalStride, local=BUDGETS, stride=st.integers(1, 9), block=st.integers(1, 40), offset=st.integers(0, 20),
            homogeneous=st.booleans(), dense_heads=st.integers(0, 1),
        ),
    ),
    "local_stride-share": Case(
        LocalStride(local=0.2, stride=7, block=24), LocalStride(local=1.0, stride=100), False, "identical",
        row_by_row(slow_local_stride),
    ),
    "local_stride-homogeneous": Case(
        LocalStride(local=20, stride=4, block=16, homogeneous=True), LocalStride(stride=1), False, "identical",
        row_by_row(slow_local_stride),
    ),
    "gna": Case(
        Gna(window=40, stride=24, sink=10), Gna(window=10**6, stride=4, sink=0), True, "own", row_by_row(slow_gna),
        st.builds(
            lambda window, stride, dilation, sink, spans: Gna(
                window if isinstance(window, float) else max(window, stride), stride, dilation, sink, spans
            ),
            BUDGETS, st.integers(1, 20), st.sampled_from((1, 1, 2, 3, 7, 20)), st.integers(0, 70),
            st.sampled_from((
                (), (Span(3, (7, 9), (4, 3), (2, 1)),), (Span(20, (3, 4, 5), (2, 2, 3)), Span(100, (50,), (9,))),
            )),
        ),
    ),
    "gna-dilated": Case(
        Gna(window=0.3, stride=6, dilation=5, sink=0), Gna(window=1.0, sink=0), True, "own", row_by_row(slow_gna)
    ),
    "gna-spans": Case(
        Gna(
            window=40, stride=40, sink=0, spans=(
                Span(10, (8, 9), (3, 5), (2, 1), (1, 1), (False, False)), Span(90, (4, 4, 4), (2, 2, 2), (), (2, 1, 1)),
                Span(154, (40,), (6,), (3,), (2,), (True,)),
            ),
        ),
        Gna(window=1.0, spans=(Span(10, (8, 9), (8, 9)),)), True, "own", row_by_row(slow_gna),
    ),
    "vertical_slash": Case(
        VerticalSlash(verticals=40, slashes=120, probe=24), VerticalSlash(verticals=10**6, slashes=1), True, "own",
        slow_vertical_slash_rows,
        st.one_of(
            st.builds(VerticalSlash, density=st.sampled_from((0.2, 0.5, 0.8, 1.0)), probe=st.integers(1, 80)),
            st.builds(
                VerticalSlash, verticals=st.integers(1, 90), slashes=st.integers(1, 90), probe=st.integers(1, 80)
            ),
        ),
        square=True,
    ),
    "vertical_slash-density": Case(
        VerticalSlash(density=0.85, probe=24), VerticalSlash(density=1.0), True, "own", slow_vertical_slash_rows,
        square=True,
    ),
    "block_sparse": Case(
        BlockSparse(keep=80, sink=16, local=32), BlockSparse(keep=10**6), False, "own", row_by_row(slow_block_sparse),
        st.builds(BlockSparse, keep=BUDGETS, sink=st.integers(0, 70), local=st.integers(0, 70)),
    ),
    "block_sparse-share": Case(
        BlockSparse(keep=0.3, sink=0, local=0), BlockSparse(keep=1.0), False, "own", row_by_row(slow_block_sparse)
    ),
    "block_sparse-mass": Case(
        BlockSparse(mass=0.7, sink=16, local=32), BlockSparse(mass=1.0), False, "own",
        row_by_row(slow_block_sparse_mass),
        st.builds(
            BlockSparse, mass=st.sampled_from((0.2, 0.6, 0.9, 1.0)), sink=st.integers(0, 70), local=st.integers(0, 70)
        ),
    ),
    "sale": Case(
        Sale(threshold=0.9, window=32, segment=32, query_block=32, key_block=16), Sale(keep=1.0), True, "own",
        slow_sale_rows,
        st.builds(
            small_sale,
            st.one_of(
                st.builds(dict, threshold=st.sampled_from((0.001, 0.3, 0.9, 0.999))), st.builds(dict, keep=BUDGETS)
            ),
            step=st.sampled_from(((16, 16), (32, 16), (16, 32), (24, 20))), window=st.integers(0, 3),
            segment=st.integers(1, 4), bits=st.sampled_from((2, 4, 8, 16)), group=st.sampled_from(("token", "tile")),
        ),
    ),
    "sale-tile": Case(
        Sale(threshold=0.9, bits=2, group="tile", window=32, segment=32, query_block=16, key_block=32), Sale(keep=1.0),
        True, "own", slow_sale_rows,
    ),
    "sale-keep": Case(
        Sale(keep=0.4, window=16, segment=16, query_block=16, key_block=16), Sale(keep=10**6), True, "own",
        slow_sale_rows,
    ),
    "flashprefill": Case(
        FlashPrefill(alpha=0.6, sink=16, local=16), FlashPrefill(alpha=0.0), False, "own",
        row_by_row(slow_flashprefill),
        st.builds(
            FlashPrefill, alpha=st.sampled_from((0.0, 0.05, 0.5, 0.9, 1.5)), sink=st.integers(0, 70),
            local=st.integers(0, 70), least=st.integers(0, 90), sink_counts=st.booleans(),
        ),
    ),
    "flashprefill-keep": Case(
        FlashPrefill(keep=0.3, sink=0, local=0), FlashPrefill(keep=1.0), False, "own", row_by_row(slow_flashprefill)
    ),
    "flashprefill-least": Case(
        FlashPrefill(alpha=1.0, sink=16, local=0, least=30, sink_counts=False), FlashPrefill(alpha=0.0, sink=20), False,
        "own", row_by_row(slow_flashprefill),
    ),
    "xattention": Case(
        XAttention(threshold=0.5, stride=4), XAttention(threshold=1.0, stride=4), False, "own",
        on_tiles(slow_xattention),
        st.builds(XAttention, threshold=st.sampled_from((0.0, 0.3, 0.7, 0.95, 1.0)), stride=st.just(4)),
        steps=4,
    ),
    "xattention-keep": Case(
        XAttention(keep=0.3, stride=8), XAttention(keep=1.0, stride=8), False, "own", on_tiles(slow_xattention),
        steps=8,
    ),
    "stem": Case(
        Stem(keep=80, decay=0.5, stride=4, sink=16, local=16), Stem(keep=1.0, stride=4), True, "own",
        on_tiles(slow_stem),
        st.builds(
            Stem, keep=BUDGETS, decay=st.sampled_from((0.3, 0.7, 1.0)), stride=st.just(4), sink=st.integers(0, 70),
            local=st.integers(0, 70), value_bonus=st.sampled_from((0.0, 0.2, 2.0)),
        ),
        steps=4,
    ),
    "flexprefill": Case(
        FlexPrefill(gamma=0.4, tau=1.0, min_budget=32), FlexPrefill(gamma=1.0, tau=1.0), True, "own",
        in_blocks(slow_flexprefill),
        st.builds(
            FlexPrefill, gamma=st.sampled_from((0.1, 0.5, 0.9, 1.0)), tau=st.sampled_from((0.0, 0.1, 0.3, 1.0)),
            min_budget=st.integers(1, 60), max_budget=st.sampled_from((None, 64, 200)),
        ),
        square=True,
    ),
    "flexprefill-lines": Case(
        FlexPrefill(gamma=0.4, tau=0.0, min_budget=32), FlexPrefill(gamma=1.0, tau=0.0), True, "own",
        in_blocks(slow_flexprefill), square=True,
    ),
    "spargeattn": Case(
        SpargeAttn(similarity=0.045, topk=40), SpargeAttn(topk=1.0), True, "own", in_blocks(slow_spargeattn),
        st.builds(
            SpargeAttn, similarity=st.sampled_from((-0.1, 0.0, 0.05, 0.2, 1.0)), topk=BUDGETS, sink=st.integers(0, 70)
        ),
    ),
    "spargeattn-cdf": Case(
        SpargeAttn(similarity=0.06, cdf=0.5), SpargeAttn(similarity=0.06, cdf=1.0), True, "own",
        in_blocks(slow_spargeattn),
    ),
    "vote_columns": Case(
        VoteColumns(keep=0.3, sink=16, local=32, probe=24), VoteColumns(keep=1.0), True, "own",
        in_blocks(slow_vote_columns),
        st.builds(
            VoteColumns, keep=BUDGETS, sink=st.integers(0, 70), local=st.integers(0, 70), probe=st.integers(1, 60),
            spread=st.integers(0, 20), voters=st.sampled_from(("head", "group", "all")), width=st.sampled_from((1, 5)),
            smooth=st.sampled_from(("none", "max", "mean")), fair=st.booleans(), seed=st.integers(0, 9),
        )
        | st.builds(
            VoteColumns, keep=BUDGETS, sink=st.integers(0, 70), local=st.integers(0, 70),
            superblock=st.sampled_from((32, 64)), voters=st.sampled_from(("head", "group", "all")),
            smooth=st.sampled_from(("none", "max", "mean")), width=st.sampled_from((1, 5)),
        ),
    ),
    "vote_columns-mean": Case(
        VoteColumns(mass=0.8, sink=20, local=16, probe=20, spread=9, voters="head", smooth="mean", width=5, seed=4),
        VoteColumns(mass=1.0, sink=0, local=100, probe=1), True, "own", in_blocks(slow_vote_columns),
    ),
    "snapkv": Case(
        snapkv(keep=40, probe=20, sink=16, local=32), snapkv(keep=1.0), True, "own", in_blocks(slow_vote_columns)
    ),
    "tokenselect": Case(
        tokenselect(keep=0.25, superblock=48, sink=16, local=32), tokenselect(keep=1.0), True, "own",
        in_blocks(slow_vote_columns),
    ),
    "zipvl": Case(
        zipvl(mass=0.8, probe=20, spread=16, sink=16, local=32, seed=3), zipvl(keep=1.0), True, "own",
        in_blocks(slow_vote_columns),
    ),
    "hip": Case(
        Hip(keep=48, sink=16, local=32, stages=((32, 0, 4), (16, 96, 3)), most=1.0),
        Hip(keep=1.0), False, "own", in_blocks(slow_hip),
        st.builds(
            Hip, keep=BUDGETS, sink=st.integers(0, 70), local=st.integers(0, 70), most=st.just(1.0),
            stages=st.sampled_from((((64, 0, 4), (16, 64, 2)), ((32, 0, 5),), ((64, 0, 8), (8, 100, 8), (4, 30, 16)))),
        ),
    ),
    "hip-share": Case(
        Hip(keep=0.2, sink=0, local=0, stages=((64, 0, 16), (8, 64, 8)), most=1.0),
        Hip(keep=1.0), False, "own", in_blocks(slow_hip),
    ),
    "sign_code": Case(
        SignCode(keep=0.3, bits=12, sink=16, local=16), SignCode(keep=1.0), True, "own",
        row_by_row(lambda *given: slow_sign_code(*given, BLOCK)),
        st.builds(
            SignCode, keep=BUDGETS, bits=st.integers(1, 40), sink=st.integers(0, 70), local=st.integers(0, 70),
            seed=st.integers(0, 9),
        ),
    ),
    "l_mul": Case(
        LMul(keep=0.3, bits=3, sink=16, local=16), LMul(keep=1.0), False, "own",
        row_by_row(lambda *given: slow_l_mul_rows(*given, BLOCK)),
        st.builds(LMul, keep=BUDGETS, bits=st.integers(1, 23), sink=st.integers(0, 70), local=st.integers(0, 70)),
    ),
    "union": Case(
        Union(BlockSparse(keep=0.2, sink=0, local=0), AShape(sink=20, window=50)),
        Union(BlockSparse(keep=1.0), AShape(sink=0, window=1)), False, "own", row_by_row(slow_union),
        st.builds(
            Union, st.builds(BlockSparse, keep=BUDGETS, sink=st.just(0), local=st.just(0)),
            st.builds(AShape, sink=st.integers(0, 90), window=BUDGETS),
        ),
    ),
    "cached": Case(
        Cached(BlockSparse(keep=0.3, sink=16, local=16), similar=0.1, most=3),
        Cached(BlockSparse(keep=1.0), similar=-1.0), False, "own", slow_cached,
        st.builds(
            Cached, st.builds(BlockSparse, keep=BUDGETS, sink=st.just(16), local=st.just(0)),
            similar=st.sampled_from((-1.0, 0.0, 0.2, 0.9, 1.1)), most=st.integers(1, 9),
        ),
    ),
    "layer_carry": Case(
        SecondLayer(BlockSparse(keep=0.3, sink=0, local=0), fall=0.6, least=0.3, probe=24, first=0, near=0),
        SecondLayer(BlockSparse(keep=1.0), fall=0.1, least=1.0), True, "own", slow_second_layer,
    ),
    "progressive": Case(
        Progressive(BlockSparse(keep=0.3, sink=0, local=0), bits=2, flat=0.1), Progressive(BlockSparse(keep=1.0)),
        False, "own", row_by_row(slow_progressive),
        st.builds(
            Progressive, st.builds(BlockSparse, keep=BUDGETS, sink=st.just(16), local=st.just(0)),
            bits=st.integers(2, 8), flat=st.sampled_from((0.01, 0.1, 0.5, 1.0)),
        ),
    ),
    "delta_correct": Case(
        DeltaCorrect(BlockSparse(keep=0.3, sink=0, local=0), every=10), DeltaCorrect(BlockSparse(keep=1.0)), False,
        "own", row_by_row(slow_inner),
    ),
    "skip_softmax": Case(
        SkipSoftmax(AShape(sink=20, window=50), scale=5.0), SkipSoftmax(scale=0.01), False, "identical",
        row_by_row(slow_skip_softmax),
        st.builds(
            SkipSoftmax, st.builds(BlockSparse, keep=BUDGETS, sink=st.just(16), local=st.just(32)),
            scale=st.sampled_from((0.0, 0.1, 10.0, 1000.0)), order=st.sampled_from(("score", "ascending")),
        ),
    ),
    "random": Case(
        RandomBlocks(keep=0.3, sink=16, local=16), RandomBlocks(keep=1.0), False, "identical", None,
        st.builds(
            RandomBlocks, keep=BUDGETS, sink=st.integers(0, 70), local=st.integers(0, 70), seed=st.integers(0, 2**70)
        ),
    ),
}  # fmt: skip
"""By method, or by method and variant: name-variant."""
