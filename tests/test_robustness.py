"""Any shape, padding, offset and pattern: kernels against the oracle, and what neither may ever do.

The examples come from hypothesis. The quick profile draws few; the tests marked `slow` draw many, and
ROBUSTNESS_EXAMPLES=1000 any number (docs/robustness.md says what a long run tried).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from method_cases import CASES
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, AttentionOutput, BlockGrid, BlockIndex
from sparseprefill.kernels import block_sparse_attention, why_not
from sparseprefill.kernels.reference import reference_attention
from sparseprefill.patterns import (
    LastRowsDense,
    PerHead,
    RandomBlocks,
)
from sparseprefill.patterns.methods import METHODS
from sparseprefill.prefill import resolve_method
from support import assert_within_budget

LONG = int(os.environ.get("ROBUSTNESS_EXAMPLES", "60"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def examples(count: int) -> Callable[[Any], Any]:
    """That many, always the same ones; what is drawn is large and slow to make on purpose."""
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(max_examples=count, deadline=None, suppress_health_check=quiet)


# ---- what is drawn


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Inputs, the tiles they are cut into, and where the draw of an index starts."""

    inputs: AttentionInputs
    blocks: tuple[int, int]
    seed: int
    density: float

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """For the reports of hypothesis, which would print every tensor."""
        printer.text(self.describe())

    def describe(self) -> str:
        """All that was drawn, in a line."""
        i = self.inputs
        return (
            f"Drawn(query={tuple(i.query.shape)}, key={tuple(i.key.shape)}, value_dim={i.value_dim}, {i.query.dtype}, "
            f"start={i.query_start}, filled={i.filled}, window={i.window}, softcap={i.softcap}, "
            f"sinks={i.sinks is not None}, segments={i.segment is not None}, "
            f"key_valid={None if i.key_valid is None else i.key_valid.int().tolist()}, blocks={self.blocks}, "
            f"seed={self.seed}, density={self.density})"
        )


@st.composite
def drawn(
    draw: Any,
    least_dim: int = 8,
    most_queries: int = 120,
    batches: tuple[int, ...] = (1, 1, 2, 3),
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    square: bool = False,
) -> Drawn:
    """Everything `AttentionInputs` can say, awkward values first among equals; simple at one end, all at once at the
    other."""
    pick: Callable[[Any], Any] = lambda values: draw(st.sampled_from(values))  # noqa: E731
    batch, kv_heads, group = pick(batches), pick((1, 2)), pick((1, 3, 7, 8))
    dims = [d for d in (8, 24, 64, 80, 96, 192) if d >= least_dim]
    head_dim = pick(dims)
    value_dim = pick((head_dim, *dims))
    queries, past = draw(st.integers(1, most_queries)), draw(st.sampled_from((0, 0, 1, 15, 64, 97)))
    unfilled = pick((0, 0, 0, 5, 40))  # a static cache is longer than what it holds
    keys, seed = queries + past + unfilled, draw(st.integers(0, 2**16))
    fill = torch.Generator().manual_seed(seed)
    fields: dict[str, Any] = {"scale": pick((1.0, 0.3, 3.0)) * head_dim**-0.5, "query_start": past}
    if unfilled:
        fields["key_length"] = past + queries
    kinds = {
        name for name in ("padding", "holes", "segments", "window", "softcap", "sinks") if draw(st.integers(0, 3)) == 0
    }
    place = torch.arange(keys)
    valid = torch.ones(batch, keys, dtype=torch.bool)
    if "padding" in kinds:
        left = draw(st.booleans())
        for row in range(batch):
            pad = draw(st.integers(0, past + queries))  # up to a row of padding alone
            valid[row] = place >= pad if left else place < past + queries - pad
    if "holes" in kinds:
        for row in range(batch):
            start = draw(st.integers(0, keys - 1))
            valid[row, start : start + draw(st.integers(1, 40))] = False
    if kinds & {"padding", "holes"}:
        fields["key_valid"] = valid
    if "segments" in kinds:
        cuts = torch.rand(batch, keys, generator=fill) < pick((0.02, 0.1))
        fields["segment"] = cuts.int().cumsum(1).to(pick((torch.int32, torch.int64)))
    if "window" in kinds:
        fields["window"] = pick((1, 2, 17, 64, 10**6))
    if "softcap" in kinds:
        fields["softcap"] = pick((0.5, 5.0, 50.0))
    if "sinks" in kinds:
        fields["sinks"] = torch.randn(kv_heads * group, generator=fill) * 4
    dtype = pick(dtypes)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=fill, dtype=torch.float64).to(dtype)

    inputs = AttentionInputs(
        made(batch, kv_heads * group, queries, head_dim), made(batch, kv_heads, keys, head_dim),
        made(batch, kv_heads, keys, value_dim), **fields,
    )  # fmt: skip
    block_q = pick((16, 32, 64, 1, 7, 48))
    blocks = (block_q, block_q if square else pick((block_q, 16, 32, 64, 5, 40)))
    for name in sorted(kinds) or ["plain"]:
        event(name)
    event("one-shot" if not past else "chunk")
    return Drawn(inputs, blocks, seed, pick((0.0, 0.3, 0.7, 1.0)))


def legal_index(case: Drawn, seed: int = 0) -> BlockIndex:
    """Random legal lists in storage as awkward as the contract allows: slack, any order, equal lists stored once."""
    inputs, grid = case.inputs, BlockGrid.of(case.inputs, *case.blocks)
    roll = torch.Generator().manual_seed(case.seed + seed)
    shape = (inputs.batch, inputs.query_heads, grid.rows)
    low, high = grid.visible_blocks(inputs)
    if case.density == 1.0:
        return BlockIndex.dense(inputs, grid)
    wanted = torch.rand(*shape, grid.key_blocks, generator=roll) < case.density
    chosen = low[:, None] + (torch.rand(shape, generator=roll) * (high - low)[:, None]).long()
    wanted.scatter_(3, chosen.clamp(max=grid.key_blocks - 1)[..., None], True)
    wanted &= grid.visible_block_mask(inputs)[:, None]
    columns: list[int] = [2**31 - 1]  # nobody's: slack may hold anything
    stored: dict[tuple[int, ...], int] = {}
    start = torch.zeros(shape, dtype=torch.int64)
    for flat in torch.randperm(start.numel(), generator=roll).tolist():
        ids = tuple(wanted.flatten(0, 2)[flat].nonzero()[:, 0].tolist())
        if ids not in stored:
            stored[ids] = len(columns)
            columns += [*ids, -7]
        start.view(-1)[flat] = stored[ids]
    index = BlockIndex(grid, torch.tensor(columns, dtype=torch.int32), start, wanted.sum(-1, dtype=torch.int32))
    index.validate(inputs)
    return index


PATTERNS: dict[str, Any] = {name: case.drawn for name, case in CASES.items() if case.drawn is not None} | {
    "minference": st.builds(
        functools.partial(resolve_method, "minference"), density=st.sampled_from((0.2, 0.5)), probe=st.integers(1, 80)
    )
}


def built(pattern: Any, case: Drawn, inputs: AttentionInputs | None = None) -> BlockIndex:
    inputs = case.inputs if inputs is None else inputs
    block_q, block_k = case.blocks
    case_of = next(own for own in CASES.values() if own.drawn is not None and type(own.pattern) is type(pattern))
    block_q, block_k = (-(-size // case_of.steps) * case_of.steps for size in (block_q, block_k))
    if case_of.square:
        block_k = block_q  # it refuses other tiles
    index: BlockIndex = pattern.build_index(inputs, BlockGrid.of(inputs, block_q, block_k))
    return index


def same_bits(a: AttentionOutput, b: AttentionOutput) -> bool:
    return torch.equal(a.lse, b.lse) and torch.equal(a.output, b.output)  # type: ignore[arg-type]


# ---- every implementation is attention over the listed blocks


def hold_to_the_oracle(case: Drawn, impl: str) -> None:
    index = legal_index(case)
    result = block_sparse_attention(case.inputs, index, impl=impl)
    assert_within_budget(result, case.inputs, index)
    alone = block_sparse_attention(case.inputs, index, impl=impl, values=False)
    assert alone.output is None
    assert_within_budget(alone, case.inputs, index)


@examples(25)
@given(drawn())
def test_cpu_is_attention(case: Drawn) -> None:
    hold_to_the_oracle(case, "cpu")


@pytest.mark.slow
@examples(LONG)
@given(drawn(most_queries=300))
def test_cpu_is_attention_many(case: Drawn) -> None:
    hold_to_the_oracle(case, "cpu")


@pytest.mark.slow
@examples(max(1, LONG // 5))
@given(drawn(least_dim=24, most_queries=60, batches=(1, 2)))
def test_triton_is_attention_many(case: Drawn) -> None:
    """In the interpreter without a GPU, which takes seconds for what the CPU path does in milliseconds."""
    if torch.cuda.is_available():
        moved = {
            field.name: value.cuda()
            for field in dataclasses.fields(case.inputs)
            if isinstance(value := getattr(case.inputs, field.name), Tensor)
        }
        case = dataclasses.replace(case, inputs=dataclasses.replace(case.inputs, **moved))
    assert why_not("triton", case.inputs) is None
    hold_to_the_oracle(case, "triton")


@examples(10)
@given(drawn(most_queries=40, dtypes=(torch.float32,)))
def test_the_oracle_is_the_definition(case: Drawn) -> None:
    """Query by query and key by key, as the contract words it; no tensor code shared with the oracle."""
    inputs, index = case.inputs, legal_index(case)
    exact = reference_attention(inputs, index)
    mask = index.to_mask()
    grid = index.grid
    for b in range(inputs.batch):
        valid = inputs.key_valid[b].tolist() if inputs.key_valid is not None else [True] * inputs.keys
        segment = inputs.segment[b].tolist() if inputs.segment is not None else [0] * inputs.keys
        anchor = valid.index(True) if True in valid else inputs.keys
        for i in range(0, inputs.queries, 7):
            slot = inputs.query_start + i
            row = (slot - anchor) // grid.block_q - int(grid.first[b])
            seen = [
                j
                for j in range(anchor, min(slot + 1, inputs.filled))
                if valid[j] and segment[j] == segment[slot] and (inputs.window is None or slot - j < inputs.window)
                and slot >= anchor and mask[b, 0, row, (j - anchor) // grid.block_k]
            ]  # fmt: skip
            if not seen:
                assert exact.lse[b, 0, i] == -torch.inf
                continue
            logits = (inputs.key[b, 0, seen].double() @ inputs.query[b, 0, i].double()) * inputs.scale
            if inputs.softcap is not None:
                logits = inputs.softcap * (logits / inputs.softcap).tanh()
            weights = logits.exp()
            mass = weights.sum()
            torch.testing.assert_close(exact.lse[b, 0, i], mass.log())
            total = mass + (inputs.sinks[0].double().exp() if inputs.sinks is not None else 0.0)
            assert exact.output is not None
            torch.testing.assert_close(exact.output[b, 0, i], weights @ inputs.value[b, 0, seen].double() / total)


# ---- properties of a kernel, bit for bit


def hold_kernel_properties(case: Drawn, cut: float, impl: str = "cpu") -> None:
    """Nothing leaks from the future or from another row, and the same input gives the same bits."""
    inputs, index = case.inputs, legal_index(case)
    result = block_sparse_attention(inputs, index, impl=impl)

    place = int(cut * inputs.queries)  # queries before it must not notice what comes from it on
    slot = inputs.query_start + place
    later = {
        "query": (inputs.query, place), "key": (inputs.key, slot), "value": (inputs.value, slot)
    }  # fmt: skip
    changed = {}
    for name, (tensor, begin) in later.items():
        changed[name] = tensor.clone()
        changed[name][:, :, begin:] = 3.0 - 7.0 * tensor[:, :, begin:]
    after = block_sparse_attention(dataclasses.replace(inputs, **changed), index, impl=impl)
    assert torch.equal(result.output[:, :, :place], after.output[:, :, :place])  # type: ignore[index]
    assert torch.equal(result.lse[:, :, :place], after.lse[:, :, :place])

    again = block_sparse_attention(inputs, index, impl=impl)  # other work has come between
    assert same_bits(result, again)

    for b in range(inputs.batch if inputs.batch > 1 else 0):
        others = {}
        for name in ("query", "key", "value"):
            others[name] = torch.full_like(getattr(inputs, name), 5.0)
            others[name][b] = getattr(inputs, name)[b]
        beside = block_sparse_attention(dataclasses.replace(inputs, **others), index, impl=impl)
        assert torch.equal(result.output[b], beside.output[b])  # type: ignore[index]
        assert torch.equal(result.lse[b], beside.lse[b])


@examples(25)
@given(drawn(), st.floats(0, 1))
def test_kernel_properties(case: Drawn, cut: float) -> None:
    hold_kernel_properties(case, cut)


@pytest.mark.slow
@examples(LONG)
@given(drawn(most_queries=300), st.floats(0, 1))
def test_kernel_properties_many(case: Drawn, cut: float) -> None:
    hold_kernel_properties(case, cut)


@pytest.mark.slow
@examples(max(1, LONG // 10))
@given(drawn(least_dim=24, most_queries=50, batches=(1, 2)), st.floats(0, 1))
def test_triton_kernel_properties_many(case: Drawn, cut: float) -> None:
    hold_kernel_properties(case, cut, "triton")


def hold_lse_merges(case: Drawn, impl: str = "cpu") -> None:
    """Disjoint selections joined by their lse are the selection of their union, but for the errors that they bring."""
    inputs, index = dataclasses.replace(case.inputs, sinks=None), legal_index(case)
    listed = index.to_mask()
    place = listed.cumsum(-1) % 2 == 0
    halves = [listed & side for side in (place, ~place)]
    assert not (halves[0] & halves[1]).any()
    # a list is never empty: a row without a block of its own gets one, and what that adds is taken out again
    parts, errors = [], []
    for half in halves:
        empty = ~half.any(-1)
        filled = BlockIndex.from_mask(index.grid, half | (listed & empty[..., None]))
        part, exact = block_sparse_attention(inputs, filled, impl=impl), reference_attention(inputs, filled)
        rows = index.grid.query_rows()
        gone = empty.gather(2, rows.clamp(min=0)[:, None].expand(-1, inputs.query_heads, -1)) & (rows >= 0)[:, None]
        assert part.output is not None
        assert exact.output is not None
        parts.append((part.lse.double().masked_fill(gone, -torch.inf), part.output.double()))
        errors.append((_difference(part.lse, exact.lse), _difference(part.output, exact.output)))
    (lse_a, output_a), (lse_b, output_b) = parts
    lse = torch.logaddexp(lse_a, lse_b)
    share = (lse_b - lse).exp().nan_to_num(0.0)[..., None]
    output = torch.where(share > 0, share * output_b, 0.0) + torch.where(share < 1, (1 - share) * output_a, 0.0)
    output = output.masked_fill(lse[..., None] == -torch.inf, 0.0)

    exact = reference_attention(inputs, index)
    assert exact.output is not None
    assert torch.equal(lse == -torch.inf, exact.lse == -torch.inf)
    # the sum weights the errors of its parts; a share s moves by s (1 - s) times theirs at most; and float64 rounds
    (lse_error_a, output_error_a), (lse_error_b, output_error_b) = errors
    largest = float(inputs.value.double().abs().max())
    rounding = 1024 * torch.finfo(torch.float64).eps * max(1.0, largest)  # sums of a few hundred terms in the oracle
    assert _difference(lse, exact.lse) <= max(lse_error_a, lse_error_b) + rounding
    moved = 2 * largest * (lse_error_a + lse_error_b) / 4
    assert _difference(output, exact.output) <= max(output_error_a, output_error_b) + moved + rounding


def _difference(got: Tensor, want: Tensor) -> float:
    """The largest, where something is seen."""
    seen = want > -torch.inf
    return float((got.double() - want)[seen].abs().max()) if seen.any() else 0.0


@examples(15)
@given(drawn(dtypes=(torch.float32,)))
def test_lse_merges(case: Drawn) -> None:
    hold_lse_merges(case)


@pytest.mark.slow
@examples(LONG)
@given(drawn(dtypes=(torch.float32,), most_queries=300))
def test_lse_merges_many(case: Drawn) -> None:
    hold_lse_merges(case)


# ---- properties of a selection


def hold_selection_properties(method: str, pattern: Any, case: Drawn, cut: float) -> None:
    inputs = case.inputs
    index = built(pattern, case)
    index.validate(inputs)  # legal, whatever was drawn
    mask = index.to_mask()
    assert torch.equal(built(pattern, case).to_mask(), mask), "the same input, the same blocks"

    for b in range(inputs.batch if inputs.batch > 1 else 0):
        others = {}
        for name in ("query", "key", "value"):
            others[name] = getattr(inputs, name).flip(2).clone()
            others[name][b] = getattr(inputs, name)[b]
        beside = built(pattern, case, dataclasses.replace(inputs, **others)).to_mask()
        assert torch.equal(beside[b], mask[b]), "batch rows choose by themselves"

    if METHODS[method.partition("-")[0]].looks_ahead:
        return
    # whole query blocks up to a slot: neither what stands behind them nor whether it is there may matter
    grid = index.grid
    row = int(cut * grid.rows)
    stop = int(grid.row_slots()[1][:, row].min()) if (grid.row_slots()[1][:, row] > inputs.query_start).all() else 0
    whole = grid.row_slots()[1] <= stop  # [batch, rows]
    if stop <= inputs.query_start:
        return
    changed = {}
    for name, begin in (("query", stop - inputs.query_start), ("key", stop), ("value", stop)):
        changed[name] = getattr(inputs, name).clone()
        changed[name][:, :, begin:] = 3.0 - 7.0 * changed[name][:, :, begin:]
    after = built(pattern, case, dataclasses.replace(inputs, **changed)).to_mask()
    settled = whole[:, None].expand(mask.shape[:3])
    assert torch.equal(after[settled], mask[settled]), "the blocks of a row depend on later tokens"


@pytest.mark.parametrize("method", PATTERNS)
def test_selection_properties(method: str) -> None:
    @examples(8)
    @given(st.data())
    def run(data: Any) -> None:
        hold_selection_properties(
            method, data.draw(PATTERNS[method]), data.draw(drawn()), data.draw(st.floats(0, 0.99))
        )

    run()


@pytest.mark.slow
@pytest.mark.parametrize("method", PATTERNS)
def test_selection_properties_many(method: str) -> None:
    @examples(LONG)
    @given(st.data())
    def run(data: Any) -> None:
        case = data.draw(drawn(most_queries=300))
        hold_selection_properties(method, data.draw(PATTERNS[method]), case, data.draw(st.floats(0, 0.99)))

    run()


@pytest.mark.slow
@examples(LONG)
@given(st.data())
def test_wrapped_and_mixed_patterns_many(data: Any) -> None:
    """Each head its own pattern, some with dense last rows, on square tiles: what a profile makes."""
    case = data.draw(drawn(square=True))
    served = [name for name in PATTERNS if name not in CASES or not case.blocks[0] % CASES[name].steps]
    any_pattern = st.sampled_from(sorted(served)).flatmap(PATTERNS.__getitem__)
    wrapped = st.one_of(any_pattern, st.builds(LastRowsDense, any_pattern, st.integers(1, 50)))
    heads = data.draw(st.lists(wrapped, min_size=case.inputs.query_heads, max_size=case.inputs.query_heads))
    index = PerHead(tuple(heads)).build_index(case.inputs, BlockGrid.of(case.inputs, *case.blocks))
    index.validate(case.inputs)
    for head in (0, case.inputs.query_heads - 1):
        if not isinstance(heads[head], RandomBlocks):  # draws by head number
            own = heads[head].build_index(case.inputs.select_heads([head]), index.grid)
            same = not any(isinstance(p, LastRowsDense) and isinstance(p.pattern, RandomBlocks) for p in heads)
            assert not same or torch.equal(own.to_mask()[:, 0], index.to_mask()[:, head])
    result = block_sparse_attention(case.inputs, index)
    assert_within_budget(result, case.inputs, index)


@pytest.mark.parametrize("method", [name for name in PATTERNS if METHODS[name.partition("-")[0]].looks_ahead])
def test_a_witness_for_each_method_that_looks_ahead(method: str) -> None:
    """ "yes" in the table is needed: here a later token does change the blocks of an earlier row."""
    cases = ["vertical_slash"] if method == "minference" else [n for n in CASES if n.partition("-")[0] == method]
    assert any(earlier_rows_change(CASES[name].pattern, by_length) for name in cases for by_length in (True, False))


def earlier_rows_change(pattern: Any, by_length: bool) -> bool:
    """A prompt that ends earlier, or one with other tokens behind some row: are the blocks up to that row others?"""
    fill = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 2, 640, 8, generator=fill) * 2
    whole = AttentionInputs(query, key, key, 1.0)
    before = pattern.build_index(whole, BlockGrid.of(whole, 16, 16)).to_mask()
    edge = 608  # rows before it are compared
    if by_length:
        other = AttentionInputs(query[:, :, :edge], key[:, :, :edge], key[:, :, :edge], 1.0)
    else:
        query, key = query.clone(), key.clone()
        query[:, :, edge:], key[:, :, edge:] = query[:, :, edge:].flip(-1), -key[:, :, edge:]
        other = AttentionInputs(query, key, key, 1.0)
    after = pattern.build_index(other, BlockGrid.of(other, 16, 16)).to_mask()
    rows = edge // 16
    return not torch.equal(before[:, :, :rows, :rows], after[:, :, :rows, :rows])


# ---- determinism across a process


@examples(6)
@given(st.lists(drawn(most_queries=60), min_size=2, max_size=4), st.randoms())
def test_the_same_bits_whatever_ran_before(cases: list[Drawn], order: Any) -> None:
    """Workspaces, caches and the shapes before leave no trace."""
    first = [block_sparse_attention(case.inputs, legal_index(case)) for case in cases]
    places = list(range(len(cases))) * 2
    order.shuffle(places)
    for place in places:
        assert same_bits(block_sparse_attention(cases[place].inputs, legal_index(cases[place])), first[place])


def test_the_draws_cover_what_they_are_for() -> None:
    """A strategy that stops drawing something would go unnoticed."""
    seen: collections.Counter[str] = collections.Counter()

    @examples(200)
    @given(drawn(most_queries=20))
    def run(case: Drawn) -> None:
        i = case.inputs
        valid = i.key_valid if i.key_valid is not None else torch.ones(1, i.keys, dtype=torch.bool)
        shape = {
            "a row of padding": not valid.any(1).all(), "padding": not valid.all(), "holes": _has_hole(valid),
            "softcap": i.softcap is not None, "sinks": i.sinks is not None, "window": i.window is not None,
            "segments": i.segment is not None, "past": i.query_start > 0, "static cache": i.filled < i.keys,
            "narrow values": i.value_dim < i.head_dim, "wide values": i.value_dim > i.head_dim,
            "sevens": i.group_size == 7, "eights": i.group_size == 8, "odd tiles": bool(case.blocks[0] % 16),
            "batch": i.batch > 1, **{str(dtype): i.query.dtype == dtype for dtype in DTYPES},
        }  # fmt: skip
        seen.update(name for name, here in shape.items() if here)
        seen.update(dict.fromkeys(shape, 0))

    run()
    assert min(seen.values()) >= 3, seen


def _has_hole(valid: Tensor) -> bool:
    inside = valid.int().cummax(1).values * valid.int().flip(1).cummax(1).values.flip(1)
    return bool((inside.bool() & ~valid).any())


# ---- fresh memory


def test_fresh_memory_of_the_package_is_poisoned() -> None:
    code = """
made = [torch.empty(3), torch.empty_like(a), torch.empty_strided((3,), (1,)), a.new_empty(3),
        torch.empty_permuted((1, 3), (0, 1)), a.new_empty_strided((3,), (1,))]
ids = torch.empty(3, dtype=torch.int32)
"""
    for module, poisoned in (("sparseprefill.kernels.of_a_test", True), ("of_a_test", False)):
        names: dict[str, Any] = {"__name__": module, "torch": torch, "a": torch.zeros(3)}
        exec(code, names)
        if poisoned:
            assert all(bool(tensor.isnan().all()) for tensor in names["made"])
            assert (names["ids"] == torch.iinfo(torch.int32).min).all()


def test_nothing_allocates_past_the_poison() -> None:
    """Memory comes from calls that tests/conftest.py knows, or is initialised."""
    calls = r"\b(resize_|resize_as_|empty_quantized|UntypedStorage|from_blob|FloatTensor|np\.empty|numpy\.empty)\b"
    root = Path(__file__).parents[1]
    found = [
        f"{path.relative_to(root)}: {call}"
        for room in ("sparseprefill", "kernels", "estimators", "patterns", "evals")
        for path in sorted((root / room).rglob("*.py"))
        for call in re.findall(calls, path.read_text(encoding="utf-8"))
    ]
    assert not found
