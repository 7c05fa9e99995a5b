"""Which blocks each method names: against slow definitions written from the papers, and the contract all share.

The slow definitions import nothing from the methods. In float64 the lists are equal, ties broken by lower id. In run
dtypes every block that differs lies within the score error of the cut.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseprefill import contracts
from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.coverage import coverage
from sparseprefill.estimators import MeanPooled, Probe, TopK, keep_blocks
from sparseprefill.estimators.relative_attention import scored_blocks
from sparseprefill.kernels import block_sparse_attention
from sparseprefill.patterns import (
    AShape,
    BlockSparse,
    Dense,
    LastRowsDense,
    ModelPatterns,
    PerHead,
    RandomBlocks,
    Sale,
    TriShape,
    VerticalSlash,
    load_patterns,
    save_patterns,
)
from sparseprefill.prefill import METHODS, CostModel, expected_density, kept_mass_sample, resolve_method
from support import assert_within_budget, left_padding, make_inputs

BLOCK = 16


@dataclasses.dataclass(frozen=True)
class Case:
    """A method small enough to drop blocks at a few hundred tokens, and what it is at full budget."""

    pattern: Any
    full: Any
    looks_ahead: bool
    chunked: str  # "identical" or "own", as in the methods table


CASES: dict[str, Case] = {
    "dense": Case(Dense(), Dense(), False, "identical"),
    "a_shape": Case(AShape(sink=20, window=50), AShape(sink=0, window=10**6), False, "identical"),
    "a_shape-share": Case(AShape(sink=16, window=0.3), AShape(sink=0, window=1.0), False, "identical"),
    "tri_shape": Case(TriShape(sink=20, window=50, last=20), TriShape(sink=0, window=10**6), True, "own"),
    "vertical_slash": Case(
        VerticalSlash(verticals=40, slashes=120, probe=24), VerticalSlash(verticals=10**6, slashes=1), True, "own"
    ),
    "vertical_slash-density": Case(VerticalSlash(density=0.85, probe=24), VerticalSlash(density=1.0), True, "own"),
    "block_sparse": Case(BlockSparse(keep=80, sink=16, local=32), BlockSparse(keep=10**6), False, "own"),
    "block_sparse-share": Case(BlockSparse(keep=0.3, sink=0, local=0), BlockSparse(keep=1.0), False, "own"),
    "sale": Case(
        Sale(threshold=0.9, window=32, segment=32, query_block=32, key_block=16), Sale(keep=1.0), True, "own"
    ),
    "sale-tile": Case(
        Sale(threshold=0.9, bits=2, group="tile", window=32, segment=32, query_block=16, key_block=32), Sale(keep=1.0),
        True, "own",
    ),
    "sale-keep": Case(
        Sale(keep=0.4, window=16, segment=16, query_block=16, key_block=16), Sale(keep=10**6), True, "own",
    ),
    "random": Case(RandomBlocks(keep=0.3, sink=16, local=16), RandomBlocks(keep=1.0), False, "identical"),
}  # fmt: skip


def index_of(pattern: Any, inputs: AttentionInputs, block_q: int = BLOCK, block_k: int = BLOCK) -> BlockIndex:
    index: BlockIndex = pattern.build_index(inputs, BlockGrid.of(inputs, block_q, block_k))
    return index


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


def slow_a_shape(inputs: AttentionInputs, b: int, h: int, m: int, pattern: AShape) -> set[int]:
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


@pytest.mark.parametrize("segment", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("window", [0, 1, 2, 4, 5, 8])
def test_the_window_of_sale(window: int, segment: int) -> None:
    """Sink, tested segments and window are all blocks of a row, and the published arithmetic gives the same."""
    blocks = torch.arange(1, 601)
    tested = scored_blocks(blocks, segment, window).tolist()
    for n, own in zip(blocks.tolist(), tested, strict=True):
        local = n - 1 - own
        assert own % segment == 0
        assert local == slow_window(n, segment, window)
        assert min(window, n - 1) <= local < max(window, 0) + segment or local == n - 1
        whole = math.ceil((n - 1) / segment)  # as published: T segments, r <= 0 blocks over, e segments given up
        over = n - 1 - whole * segment
        published_local, published = over, whole
        if over < window:
            given_up = math.ceil((window - over) / segment)
            published_local, published = segment * given_up + over, whole - given_up
        assert 1 + published * segment + published_local == n
        if published >= 0:
            assert (published * segment, published_local) == (own, local)
        else:
            assert own == 0


INPUTS: dict[str, dict[str, Any]] = {
    "plain": {"queries": 250},
    "one-block": {"queries": 9},
    "padded": {"batch": 2, "queries": 200, "key_valid": left_padding(200, [0, 75])},
    "right-padded": {"batch": 2, "queries": 200, "key_valid": left_padding(200, [0, 75]).flip(1)},
    "chunk": {"queries": 90, "keys": 250},
    "softcap": {"queries": 150, "softcap": 1.5},
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("method", [m for m in CASES if m not in ("dense", "random")])
def test_equals_the_slow_definition_in_float64(method: str, name: str) -> None:
    pattern = CASES[method].pattern
    inputs = make_inputs(query_heads=2, kv_heads=1, head_dim=8, dtype=torch.float64, seed=3, **INPUTS[name])
    index = index_of(pattern, inputs)
    mask = index.to_mask()
    for b in range(inputs.batch):
        first = int(index.grid.first[b])
        asked = [m for m in range(first, first + index.grid.rows) if slow_row(inputs, b, m)]
        end = int(inputs.tail()[b])
        real = range(asked[0], 1 + max(m for m in asked if slow_row(inputs, b, m)[0] < end))
        for h in range(2):
            by_row = {}
            if isinstance(pattern, (Sale, VerticalSlash)):
                slow_rows: Any = slow_sale_rows if isinstance(pattern, Sale) else slow_vertical_slash_rows
                by_row = slow_rows(inputs, b, h, real, pattern)
            for m in real:
                if isinstance(pattern, (Sale, VerticalSlash)):
                    expected = by_row[m]
                elif isinstance(pattern, BlockSparse):
                    expected = slow_block_sparse(inputs, b, h, m, pattern)
                elif isinstance(pattern, TriShape):
                    dense = slow_last_rows(inputs, b, m, pattern.last)
                    shape = AShape(pattern.sink, pattern.window)
                    expected = set(slow_visible(inputs, b, m)) if dense else slow_a_shape(inputs, b, h, m, shape)
                else:
                    expected = slow_a_shape(inputs, b, h, m, pattern)
                got = set(mask[b, h, m - first].nonzero()[:, 0].tolist())
                assert got == expected, f"batch row {b}, head {h}, grid row {m}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_block_sparse_in_run_dtypes_differs_only_at_the_cut(dtype: torch.dtype) -> None:
    inputs = make_inputs(query_heads=2, kv_heads=1, queries=320, head_dim=16, dtype=dtype)
    exact = dataclasses.replace(inputs, **{n: getattr(inputs, n).double() for n in ("query", "key", "value")})
    pattern = BlockSparse(keep=80, sink=0, local=0)
    grid = BlockGrid.of(inputs, BLOCK, BLOCK)
    scores, wanted = (MeanPooled().scores(i, grid, 0, grid.rows) for i in (inputs, exact))
    error = (scores - wanted).abs().max()
    got, want = (index_of(pattern, i).to_mask() for i in (inputs, exact))
    cut = wanted.masked_fill(~want, torch.inf).amin(-1, keepdim=True)
    assert ((got == want) | ((wanted - cut).abs() <= 2 * error)).all()
    assert error < 1e-5, "means are taken in float32 at least"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_probe_in_run_dtypes_is_close_to_exact(dtype: torch.dtype) -> None:
    inputs = make_inputs(query_heads=2, kv_heads=1, queries=320, head_dim=16, dtype=dtype)
    exact = dataclasses.replace(inputs, **{n: getattr(inputs, n).double() for n in ("query", "key", "value")})
    low, high = Probe(24).mass(inputs), Probe(24).mass(exact)
    assert (low.column - high.column).abs().max() <= 24 * 4 * torch.finfo(dtype).eps
    assert (low.diagonal - high.diagonal).abs().max() <= 24 * 4 * torch.finfo(dtype).eps
    for mass in (low, high):  # each probe row spreads a mass of 1
        torch.testing.assert_close(mass.column.sum(-1), torch.full_like(mass.column[..., 0], 24), rtol=1e-2, atol=0)
        torch.testing.assert_close(mass.diagonal.sum(-1), mass.column.sum(-1))


SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"queries": 250},
    "one-query": {"queries": 1},
    "one-query-late": {"queries": 1, "keys": 100},
    "block": {"queries": BLOCK},
    "padded": {"batch": 3, "queries": 200, "key_valid": left_padding(200, [0, 75, 199])},
    "right-padded": {"batch": 2, "queries": 200, "key_valid": left_padding(200, [0, 75]).flip(1)},
    "window": {"queries": 250, "window": 100},
    "packed": {"queries": 200, "segment": torch.tensor([[0] * 90 + [1] * 110])},
    "chunk-inside-a-block": {"queries": 75, "keys": 250},
    "static-cache": {"queries": 100, "keys": 300, "query_start": 50, "key_length": 150},
}  # fmt: skip


class TestSelectorContract:
    """What every method promises."""

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("method", CASES)
    def test_lists_are_legal(self, method: str, shape: str) -> None:
        inputs = make_inputs(head_dim=8, **SHAPES[shape])
        index = index_of(CASES[method].pattern, inputs)
        index.validate(inputs)  # never empty, ascending, unique, nothing of the future
        assert_within_budget(block_sparse_attention(inputs, index), inputs, index)

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("method", CASES)
    def test_full_budget_is_dense(self, method: str, shape: str) -> None:
        inputs = make_inputs(head_dim=8, **SHAPES[shape])
        index = index_of(CASES[method].full, inputs)
        assert torch.equal(index.to_mask(), index_of(Dense(), inputs).to_mask())

    @pytest.mark.parametrize("method", [m for m in CASES if not m.startswith("vertical")])
    def test_rectangular_tiles(self, method: str) -> None:
        inputs = make_inputs(queries=250, head_dim=8)
        for sizes in ((32, 16), (16, 32), (48, 20)):
            index_of(CASES[method].pattern, inputs, *sizes).validate(inputs)
            full = index_of(CASES[method].full, inputs, *sizes)
            assert torch.equal(full.to_mask(), index_of(Dense(), inputs, *sizes).to_mask())

    @pytest.mark.parametrize("method", CASES)
    def test_batch_rows_are_independent(self, method: str) -> None:
        inputs = make_inputs(batch=3, queries=200, head_dim=8, key_valid=left_padding(200, [0, 75, 30]))
        index = index_of(CASES[method].pattern, inputs)
        for b, pad in enumerate((0, 75, 30)):
            row = dataclasses.replace(
                inputs, **{n: getattr(inputs, n)[b : b + 1, :, pad:] for n in ("query", "key", "value")}, key_valid=None
            )
            alone = index_of(CASES[method].pattern, row)
            rows, blocks = alone.grid.rows, alone.grid.key_blocks
            assert torch.equal(index.to_mask()[b : b + 1, :, :rows, :blocks], alone.to_mask())

    @pytest.mark.parametrize("method", [m for m in CASES if m != "random"])  # random draws by head on purpose
    def test_grouped_heads_read_the_right_keys(self, method: str) -> None:
        grouped = make_inputs(query_heads=6, kv_heads=2, queries=200, head_dim=8)
        repeated = dataclasses.replace(
            grouped, key=grouped.key.repeat_interleave(3, 1), value=grouped.value.repeat_interleave(3, 1)
        )
        a, b = (index_of(CASES[method].pattern, i).to_mask() for i in (grouped, repeated))
        assert torch.equal(a, b)
        heads = [4, 1, 0]
        part = index_of(CASES[method].pattern, grouped.select_heads(heads)).to_mask()
        assert torch.equal(part, a[:, heads])

    @pytest.mark.parametrize("method", CASES)
    def test_chunks(self, method: str) -> None:
        case = CASES[method]
        inputs = make_inputs(queries=256, head_dim=8)
        whole = index_of(case.pattern, inputs).to_mask()
        edges = [0, 96, 160, 256] if "block_sparse" in method else [0, 90, 101, 256]
        for start, stop in itertools.pairwise(edges):
            chunk = dataclasses.replace(
                inputs, query=inputs.query[:, :, start:stop], key=inputs.key[:, :, :stop],
                value=inputs.value[:, :, :stop], query_start=start,
            )  # fmt: skip
            index = index_of(case.pattern, chunk)
            index.validate(chunk)
            first, rows, blocks = start // BLOCK, index.grid.rows, index.grid.key_blocks
            if case.chunked == "identical" or "block_sparse" in method:
                assert torch.equal(index.to_mask(), whole[:, :, first : first + rows, :blocks])
        # "own": test_equals_the_slow_definition_in_float64[...-chunk] holds it

    @pytest.mark.parametrize("method", CASES)
    def test_looking_ahead(self, method: str) -> None:
        """Tokens after query block m are changed: do the blocks of rows up to m change?"""
        case = CASES[method]
        before = make_inputs(queries=256, head_dim=8, seed=1)
        other = make_inputs(queries=256, head_dim=8, seed=2)
        changed = False
        for m in (3, 7, 11):
            edge = (m + 1) * BLOCK
            mixed = {
                n: torch.cat([getattr(before, n)[:, :, :edge], getattr(other, n)[:, :, edge:] * 3], 2)
                for n in ("query", "key", "value")
            }
            after = dataclasses.replace(before, **mixed)
            a, b = (index_of(case.pattern, i).to_mask()[:, :, : m + 1] for i in (before, after))
            changed |= not torch.equal(a, b)
            # a prompt that ends there: what its rows would choose without any later token
            short = dataclasses.replace(before, **{n: getattr(before, n)[:, :, :edge] for n in mixed})
            c = index_of(case.pattern, short).to_mask()
            changed |= not torch.equal(a[..., : m + 1], c)
        assert changed == case.looks_ahead

    @pytest.mark.parametrize("sizes", [(16, 32), (32, 48), (48, 20), (16, 16)], ids=str)
    def test_block_means_hold_nothing_of_the_future(self, sizes: tuple[int, int]) -> None:
        """Where a row ends inside a key block, the keys behind its end do not enter the block's mean."""
        before = make_inputs(queries=250, head_dim=8, seed=1)
        pattern = BlockSparse(keep=1, sink=0, local=0)
        rows = -(-250 // sizes[0])
        for m in range(rows - 1):
            edge = (m + 1) * sizes[0]
            later = {n: getattr(before, n).clone() for n in ("query", "key", "value")}
            for tensor in later.values():
                tensor[:, :, edge:] = 3.0 - 7.0 * tensor[:, :, edge:]
            after = dataclasses.replace(before, **later)
            a, b = (index_of(pattern, i, *sizes).to_mask()[:, :, : m + 1] for i in (before, after))
            assert torch.equal(a, b), f"row {m}"

    def test_the_table_says_the_same(self) -> None:
        for name, case in CASES.items():
            row = METHODS[name.partition("-")[0]]
            assert (row.looks_ahead, row.chunked) == (case.looks_ahead, case.chunked), name
        assert {name.partition("-")[0] for name in CASES} | {"minference"} == set(METHODS)
        assert METHODS["minference"].looks_ahead

    @pytest.mark.parametrize("method", CASES)
    def test_last_rows_dense_is_an_option_of_every_method(self, method: str) -> None:
        inputs = make_inputs(queries=250, head_dim=8)
        plain = index_of(CASES[method].pattern, inputs).to_mask()
        index = index_of(LastRowsDense(CASES[method].pattern, 20), inputs)
        index.validate(inputs)
        dense = index_of(Dense(), inputs).to_mask()
        assert torch.equal(index.to_mask()[:, :, -2:], dense[:, :, -2:])
        assert torch.equal(index.to_mask()[:, :, :-2], plain[:, :, :-2])


@pytest.mark.parametrize("density", [0.3, 0.5, 0.8])
def test_vertical_slash_fills_its_density_and_no_more(density: float) -> None:
    inputs = make_inputs(queries=3200, head_dim=8)
    work = coverage(inputs, index_of(VerticalSlash(density=density), inputs)).tile_work
    assert (work <= density).all()
    assert (work > density - 0.05).all()


def test_shares_keep_their_density() -> None:
    inputs = make_inputs(queries=3200, head_dim=8)
    for pattern in (BlockSparse(keep=0.2), RandomBlocks(keep=0.2), AShape(sink=16, window=0.2)):
        work = coverage(inputs, index_of(pattern, inputs)).tile_work
        assert ((work >= 0.2) & (work < 0.23)).all(), pattern
        assert abs(expected_density(pattern, 3200) - 0.2) < 1e-9


def test_ties_go_to_the_lower_id() -> None:
    scores = torch.tensor([[[[1.0, 2.0, 2.0, 2.0, 1.0]]]])
    visible = torch.tensor([[[True, True, True, True, True]]])
    ids, count = TopK(2 * BLOCK).select(scores, visible, None, BLOCK)
    assert ids[..., :2].flatten().tolist() == [1, 2]
    assert count.flatten().tolist() == [2]
    forced = torch.tensor([[[False, False, False, False, True]]])
    assert TopK(2 * BLOCK).select(scores, visible, forced, BLOCK)[0][..., :2].flatten().tolist() == [1, 4]


def test_budgets_round_up_and_stay_inside() -> None:
    visible = torch.tensor([1, 3, 10, 40])
    assert keep_blocks(0.2, visible, BLOCK).tolist() == [1, 1, 2, 8]
    assert keep_blocks(33, visible, BLOCK).tolist() == [1, 3, 3, 3]
    assert keep_blocks(1.0, visible, BLOCK).tolist() == [1, 3, 10, 40]


@pytest.mark.parametrize("method", ["vertical_slash", "block_sparse", "random"])
def test_rows_in_slabs_are_the_same_rows(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pattern holds a bounded number of entries at a time; where it cuts must not show."""
    inputs = make_inputs(batch=2, query_heads=4, kv_heads=2, queries=150, keys=200, query_start=50)
    inputs = dataclasses.replace(inputs, key_valid=left_padding(200, [0, 37]))
    grid = BlockGrid.of(inputs, BLOCK, BLOCK)
    whole = CASES[method].pattern.build_index(inputs, grid)
    monkeypatch.setattr(contracts, "_SLAB_ENTRIES", 3 * 2 * 4 * grid.key_blocks)
    assert len(list(grid.slabs(4))) == -(-grid.rows // 3) > 1
    cut = CASES[method].pattern.build_index(inputs, grid)
    cut.validate(inputs)
    assert torch.equal(cut.to_mask(), whole.to_mask())


def test_per_head_patterns() -> None:
    inputs = make_inputs(query_heads=6, kv_heads=2, queries=200, head_dim=8)
    patterns = (Dense(), AShape(16, 32), BlockSparse(keep=48), AShape(16, 32), BlockSparse(keep=48), Dense())
    mask = index_of(PerHead(patterns), inputs).to_mask()
    for head, pattern in enumerate(patterns):
        assert torch.equal(mask[:, head], index_of(pattern, inputs).to_mask()[:, head])
    with pytest.raises(ValueError, match="5 patterns for 6"):
        index_of(PerHead(patterns[:5]), inputs)


def test_profiles_are_kept_in_a_file(tmp_path: Any) -> None:
    heads = (AShape(16, 32), VerticalSlash(verticals=100, slashes=200), BlockSparse(keep=0.2), Dense())
    patterns = ModelPatterns((heads, heads[::-1], (Dense(),) * 4), {"layers": 3, "query_heads": 4})
    save_patterns(patterns, tmp_path / "p.json")
    assert load_patterns(tmp_path / "p.json") == patterns
    assert patterns.for_layer(2) == Dense()
    assert patterns.for_layer(0) == PerHead(heads)
    resolved = resolve_method("minference", profile=tmp_path / "p.json", last_rows_dense=5)
    assert isinstance(resolved, ModelPatterns)
    assert resolved.for_layer(2) == LastRowsDense(Dense(), 5)
    for text, message in (
        ('{"schema": 9}', "schema 9"),
        ('{"schema": 2, "layers": []}', "list of layers"),
        ('{"schema": 2, "layers": [[{"type": "star"}]]}', "layer 0, head 0: a pattern needs a `type`"),
        ('{"schema": 2, "layers": [[{"type": "a_shape", "window": -1}]]}', "layer 0, head 0: window"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_patterns(tmp_path / "bad.json")


def test_minference_without_a_profile() -> None:
    assert resolve_method("minference") == VerticalSlash(density=0.2)
    assert resolve_method("minference", budget="paper") == VerticalSlash(verticals=1000, slashes=6096)
    with pytest.raises(ValueError, match="either a budget or a density"):
        resolve_method("minference", budget="paper", density=0.1)


def test_kept_mass_is_measured_exactly() -> None:
    inputs = make_inputs(queries=200, head_dim=8, key_valid=left_padding(200, [30]))
    index = index_of(AShape(16, 32), inputs)
    result = block_sparse_attention(inputs, index)
    sums = kept_mass_sample(inputs, result.lse, 200)
    dense = block_sparse_attention(inputs, index_of(Dense(), inputs))
    exact = (result.lse - dense.lse)[:, :, 30:].double().exp().sum((0, 2))
    torch.testing.assert_close(sums[:, 0], exact, rtol=1e-4, atol=1e-4)
    assert sums[:, 1].tolist() == [170.0] * 4


def test_the_cost_model_has_a_break_even() -> None:
    model = CostModel(tile_factor=2.5, fixed_tokens=512)
    assert not model.sparse_is_cheaper(1 << 20, 1 << 20, 0.5)  # 2.5 x 0.5 is more than dense at any length
    assert model.sparse_is_cheaper(4096, 4096, 0.2)
    assert not model.sparse_is_cheaper(512, 512, 0.1)
    assert model.sparse_is_cheaper(128, 1 << 16, 0.1)  # a chunk far into a long cache
