"""PBS: sorted keys, a part of the attention over each, and what a wrapper must never change."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from method_cases import BLOCK, PART_INPUTS, slow_anchor, slow_row, slow_visible
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid
from sparseprefill.guard import Guard
from sparseprefill.kernels.reference import reference_attention
from sparseprefill.patterns import BlockSparse, Dense, LastRowsDense, PerHead, VerticalSlash
from sparseprefill.patterns.expected_density import expected_density
from sparseprefill.patterns.flashprefill import FlashPrefill
from sparseprefill.patterns.parts import Part, attend, parts_coverage, parts_of
from sparseprefill.patterns.pbs import Pbs
from sparseprefill.patterns.xattention import XAttention
from sparseprefill.prefill import keeps_everything, resolve_method, sparse_prefill
from support import left_padding, make_inputs

SMALL = Pbs(segment=32, probe=24)


def parts_for(pattern: Any, inputs: AttentionInputs, block_q: int = BLOCK, block_k: int = BLOCK) -> tuple[Part, ...]:
    return parts_of(pattern, inputs, BlockGrid.of(inputs, block_q, block_k))


def seen_keys(inputs: AttentionInputs, parts: tuple[Part, ...]) -> Tensor:
    """bool [batch, query_heads, queries, keys] by where keys lay at first; each key is its own place, as a value."""
    keys = inputs.keys
    found = torch.zeros(inputs.batch, inputs.query_heads, inputs.queries, keys, dtype=torch.bool)
    for part in parts:
        names = part.inputs.key[..., :1].double().expand(-1, -1, -1, 1)
        assert names.shape == (inputs.batch, inputs.kv_heads, keys, 1)
        rows = part.index.grid.query_rows()
        mask = part.index.to_mask()
        for b in range(inputs.batch):
            past = torch.arange(keys) - part.index.grid.anchor[b]
            block = (past // part.index.grid.block_k).clamp(0, mask.shape[3] - 1)
            for h in range(inputs.query_heads):
                own = names[b, h // inputs.group_size, :, 0].long()
                listed = mask[b, h][rows[b].clamp(min=0)][:, block] & (past >= 0) & (rows[b] >= 0)[:, None]
                listed = listed & part.inputs.visible_mask()[b]
                assert not (found[b, h][:, own] & listed).any(), "no pair is computed twice"
                found[b, h][:, own] |= listed
    return found


def named(inputs: AttentionInputs) -> AttentionInputs:
    """Keys whose first channel is their slot; it counts for nothing, as no query has anything there."""
    inputs = dataclasses.replace(inputs, key=inputs.key.clone(), query=inputs.query.clone())
    inputs.key[..., 0] = torch.arange(inputs.keys, dtype=inputs.key.dtype)
    inputs.query[..., 0] = 0.0
    return inputs


def slow_pbs(inputs: AttentionInputs, b: int, h: int, m: int, pattern: Pbs) -> set[int]:
    """Slots of the keys that row m attends to in part or in whole, from the paper: softmax of block means, top mass."""
    anchor, group = slow_anchor(inputs, b), h // inputs.group_size
    valid = torch.ones(inputs.keys, dtype=torch.bool) if inputs.key_valid is None else inputs.key_valid[b]
    slots = range(inputs.query_start, inputs.query_start + inputs.queries)
    real = [p for p in slots if valid[p]]
    end = real[-1] + 1
    whole = anchor + (end - anchor) // pattern.segment * pattern.segment
    counted = [j for j in range(anchor, whole) if valid[j]]
    importance = torch.zeros(inputs.keys, dtype=torch.float64)
    heads = range(group * inputs.group_size, (group + 1) * inputs.group_size)
    for p in [p for p in range(end - pattern.probe, end) if p in real]:
        for head in heads:
            z = inputs.query[b, head, p - inputs.query_start].double() @ inputs.key[b, group, counted].double().T
            z = z * inputs.scale
            if inputs.softcap is not None:
                z = inputs.softcap * torch.tanh(z / inputs.softcap)
            if counted:
                importance[counted] += z.softmax(-1)
    order: list[int] = []  # order[s]: the slot whose key stands at anchor + s
    for first in range(anchor, whole, pattern.segment):
        own = range(first, first + pattern.segment)
        heaviest = iter(sorted((j for j in own if valid[j]), key=lambda j: (-float(importance[j]), j)))
        order += [next(heaviest) if valid[j] else j for j in own]
    own_segment = anchor + m * BLOCK // pattern.segment * pattern.segment
    blocks = range((own_segment - anchor) // BLOCK)
    asked = [p - inputs.query_start for p in slow_row(inputs, b, m) if valid[p]]
    kept: set[int] = set()
    if len(blocks) and asked:
        query = inputs.query[b, h, asked].double().mean(0)
        scores = []
        for n in blocks:
            members = [j for j in order[n * BLOCK : (n + 1) * BLOCK] if valid[j]]
            if not members:  # a hole has no share
                scores.append(query.new_tensor(-torch.inf))
                continue
            score = query @ inputs.key[b, group, members].double().mean(0) * inputs.scale
            scores.append(inputs.softcap * torch.tanh(score / inputs.softcap) if inputs.softcap else score)
        share = torch.stack(scores).softmax(0).tolist()
        so_far = 0.0
        for n in sorted(blocks, key=lambda n: (-share[n], n)):
            if so_far < pattern.inner.mass:
                kept |= set(order[n * BLOCK : (n + 1) * BLOCK])
            so_far += share[n]
        if pattern.force_first:
            n = order.index(anchor) // BLOCK
            kept |= set(order[n * BLOCK : (n + 1) * BLOCK])
    near = {j for n in slow_visible(inputs, b, m) for j in range(anchor + n * BLOCK, anchor + (n + 1) * BLOCK)}
    return kept | {j for j in near if j >= own_segment}


@pytest.mark.parametrize("name", ["plain", "padded", "right-padded", "holes", "chunk-inside-a-block", "softcap"])
@pytest.mark.parametrize("force_first", [True, False])
def test_equals_the_slow_definition_in_float64(name: str, force_first: bool) -> None:
    shape = {**PART_INPUTS[name], "batch": min(2, PART_INPUTS[name].get("batch", 1))}
    if "key_valid" in shape:
        shape["key_valid"] = shape["key_valid"][:2]
    inputs = named(make_inputs(query_heads=2, kv_heads=1, head_dim=8, dtype=torch.float64, seed=3, **shape))
    pattern = dataclasses.replace(SMALL, force_first=force_first, inner=BlockSparse(mass=0.6, sink=0, local=0))
    found = seen_keys(inputs, parts_for(pattern, inputs))
    visible = inputs.visible_mask()
    grid = BlockGrid.of(inputs, BLOCK, BLOCK)
    for b in range(inputs.batch):
        rows = grid.query_rows()[b]
        for h in range(2):
            for r in rows[rows >= 0].unique().tolist():
                here = [i for i in (rows == r).nonzero()[:, 0].tolist() if visible[b, i].any()]
                if not here or (inputs.key_valid is not None and not inputs.key_valid[b, inputs.query_start + here[0]]):
                    continue
                kept = slow_pbs(inputs, b, h, int(grid.first[b]) + r, pattern)
                wanted = torch.zeros(inputs.keys, dtype=torch.bool)
                wanted[[j for j in kept if j < inputs.keys]] = True
                for i in here:
                    assert torch.equal(found[b, h, i], wanted & visible[b, i]), f"{b=} {h=} {r=} {i=}"


@pytest.mark.parametrize("shape", PART_INPUTS)
@pytest.mark.parametrize("sizes", [(16, 16), (32, 16), (48, 32), (16, 8)], ids=str)
def test_parts_are_disjoint_and_everything_kept_is_dense(shape: str, sizes: tuple[int, int]) -> None:
    inputs = named(make_inputs(head_dim=8, **PART_INPUTS[shape]))
    for inner in (BlockSparse(keep=1.0), BlockSparse(mass=1.0), FlashPrefill(alpha=0.0)):
        parts = parts_for(Pbs(inner, segment=32, probe=24), inputs, *sizes)
        for part in parts:
            part.index.validate(part.inputs, empty_rows=len(parts) > 1)
        assert torch.equal(seen_keys(inputs, parts), inputs.visible_mask()[:, None].expand(-1, 4, -1, -1))
        counts = parts_coverage(parts)
        assert torch.equal(counts.kept, counts.visible.expand(4))
        exact, got = reference_attention(inputs), attend(parts, "reference")
        torch.testing.assert_close(got.lse, exact.lse, rtol=0, atol=1e-12)
        torch.testing.assert_close(got.output, exact.output, rtol=0, atol=1e-12)
        assert got.output is not None
        fast = attend(parts)
        torch.testing.assert_close(fast.output.double(), exact.output, rtol=0, atol=2e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", PART_INPUTS)
def test_around_dense_it_is_the_identity(shape: str) -> None:
    inputs = make_inputs(head_dim=8, **PART_INPUTS[shape])
    plain, wrapped = (sparse_prefill(inputs, pattern, block_q=16, block_k=16) for pattern in (Dense(), Pbs(Dense())))
    assert torch.equal(plain.result.output, wrapped.result.output)  # type: ignore[arg-type]
    assert torch.equal(plain.result.lse, wrapped.result.lse)
    assert keeps_everything(Pbs(Dense()))


def test_a_mass_of_one_is_everything_in_any_rounding() -> None:
    """A cumulative sum of float32 may never reach 1.0; with the rule as published such rows keep nothing."""
    inputs = make_inputs(queries=400, seed=5)
    counts = parts_coverage(parts_for(Pbs(BlockSparse(mass=1.0, sink=0, local=0), segment=32), inputs))
    assert torch.equal(counts.kept, counts.visible.expand(4))


def test_nothing_of_the_future_enters_a_row() -> None:
    """At the edges of segments too: values behind a row may be anything, and the row's output stays what it was."""
    inputs = make_inputs(queries=200, head_dim=8)
    inputs = dataclasses.replace(inputs, value=torch.zeros_like(inputs.value))
    for edge in (31, 32, 33, 63, 64, 65, 128):
        later = inputs.value.clone()
        later[:, :, edge:] = 1e6
        output = attend(parts_for(SMALL, dataclasses.replace(inputs, value=later))).output
        assert output is not None
        assert not output[:, :, :edge].any()


def test_heavy_keys_come_to_share_blocks() -> None:
    """Scattered columns: sorted, they lie in the first block of each segment, and little density holds them."""
    inputs = make_inputs(query_heads=1, kv_heads=1, queries=512, head_dim=8)
    heavy = torch.arange(5, 512, 16)
    inputs.query[..., 0] = 4.0
    inputs.key[..., 0] = 0.0
    inputs.key[:, :, heavy, 0] = 6.0
    inner = BlockSparse(keep=0.15, sink=0, local=0)
    exact = reference_attention(inputs)
    mass = []
    for parts in (parts_for(inner, inputs), parts_for(Pbs(inner, segment=128, probe=32), inputs)):
        mass.append(float((attend(parts).lse - exact.lse)[..., 256:].exp().mean()))
    assert mass[1] > mass[0] + 0.3


def test_keys_are_sorted_once_for_a_group() -> None:
    """With one query head a KV head it is the paper's order a query head; grouped heads read their own KV head."""
    grouped = make_inputs(query_heads=6, kv_heads=2, queries=200, head_dim=8)
    parts = parts_for(SMALL, grouped)
    assert parts[1].inputs.key.shape == grouped.key.shape
    alone = [
        dataclasses.replace(
            grouped, query=grouped.query[:, 3 * g : 3 * g + 3], key=grouped.key[:, g : g + 1],
            value=grouped.value[:, g : g + 1],
        )
        for g in range(2)
    ]  # fmt: skip
    for g, one in enumerate(alone):
        assert torch.equal(parts_for(SMALL, one)[1].inputs.key, parts[1].inputs.key[:, g : g + 1])
        assert torch.equal(parts_for(SMALL, one)[1].index.to_mask(), parts[1].index.to_mask()[:, 3 * g : 3 * g + 3])


def test_batch_rows_are_independent_and_padding_may_hold_anything() -> None:
    inputs = make_inputs(batch=3, queries=200, head_dim=8, key_valid=left_padding(200, [0, 75, 30]))
    for name in ("query", "key", "value"):
        getattr(inputs, name)[1, :, :75] = torch.nan
        getattr(inputs, name)[2, :, :30] = torch.nan
    output = attend(parts_for(SMALL, inputs)).output
    assert output is not None
    for b, pad in enumerate((0, 75, 30)):
        row = dataclasses.replace(
            inputs, **{n: getattr(inputs, n)[b : b + 1, :, pad:] for n in ("query", "key", "value")}, key_valid=None
        )
        alone = attend(parts_for(SMALL, row)).output
        torch.testing.assert_close(output[b : b + 1, :, pad:], alone)


def test_short_prompts_run_dense_and_are_counted() -> None:
    inputs = make_inputs(batch=2, queries=60, key_valid=left_padding(60, [0, 11]))
    parts = parts_for(Pbs(segment=64), inputs)
    assert len(parts) == 1
    assert parts[0].index.unjudged is not None
    assert parts[0].index.unjudged.tolist() == [[60] * 4, [49] * 4]
    longer = parts_for(Pbs(segment=64), make_inputs(queries=200))
    assert longer[0].index.unjudged is not None
    assert not longer[0].index.unjudged.any()
    beside = parts_for(Pbs(segment=64), make_inputs(batch=2, queries=200, key_valid=left_padding(200, [0, 140])))
    assert beside[0].index.unjudged is not None
    assert beside[0].index.unjudged.tolist() == [[0] * 4, [60] * 4]


def test_last_rows_and_the_guard_go_with_it() -> None:
    inputs = make_inputs(queries=250, head_dim=8)
    exact = reference_attention(inputs)
    last = attend(parts_for(LastRowsDense(SMALL, 20), inputs))
    plain = attend(parts_for(SMALL, inputs))
    torch.testing.assert_close(last.lse[..., -20:].double(), exact.lse[..., -20:], rtol=0, atol=1e-5)
    assert torch.equal(last.lse[..., :224], plain.lse[..., :224])
    run = sparse_prefill(inputs, SMALL, block_q=16, block_k=16, guard=Guard(1.0), observe=True)
    torch.testing.assert_close(run.result.output.double(), exact.output, rtol=0, atol=1e-5)  # type: ignore[union-attr]
    assert run.coverage is not None
    assert run.coverage.density.tolist() == [1.0] * 4


def test_any_method_can_be_inside() -> None:
    inputs = make_inputs(queries=300, head_dim=8)
    for inner in (FlashPrefill(alpha=0.5, sink=0, local=0), VerticalSlash(density=0.3), PerHead((Dense(),) * 4)):
        parts = parts_for(Pbs(inner, segment=64), inputs)
        for part in parts:
            part.index.validate(part.inputs, empty_rows=True)
        assert not attend(parts).output.isnan().any()  # type: ignore[union-attr]
    assert resolve_method("pbs") == resolve_method("pbs", inner="block_sparse") == Pbs()
    assert resolve_method("pbs", keep=0.2, segment=128) == Pbs(BlockSparse(keep=0.2, sink=0, local=0), segment=128)
    assert resolve_method("pbs", inner="flashprefill", alpha=0.3) == Pbs(FlashPrefill(alpha=0.3))
    assert expected_density(Pbs(BlockSparse(keep=0.2)), 1 << 20) == pytest.approx(0.2, abs=1e-3)


def test_only_what_was_filled_is_sorted() -> None:
    inputs = make_inputs(queries=20, keys=80, key_length=40)  # a cache that ends inside its second segment
    inputs.key[:, :, 40:] = 3 * inputs.query[:, ::2].mean(2, keepdim=True)
    parts = parts_for(Pbs(BlockSparse(mass=1.0, sink=0, local=0), segment=32), inputs)
    torch.testing.assert_close(attend(parts).lse.double(), reference_attention(inputs).lse, rtol=0, atol=1e-5)


def test_what_cannot_be_is_refused() -> None:
    inputs = make_inputs(queries=200)
    with pytest.raises(ValueError, match=r"no multiple of key blocks of 16"):
        parts_for(Pbs(segment=40), inputs)
    for length in (200, 30):  # of no more than a segment too: that is what a model is tried on before it is patched
        with pytest.raises(ValueError, match="has 2 numbers for 4 query heads"):
            parts_for(Pbs(XAttention((0.5, 0.9)), segment=64), make_inputs(queries=length))
    with pytest.raises(TypeError, match="sorted twice"):
        Pbs(Pbs())
    with pytest.raises(TypeError, match="build_index"):
        Pbs("block_sparse")
    with pytest.raises(ValueError, match="segment"):
        Pbs(segment=0)
    with pytest.raises(TypeError, match="force_first"):
        Pbs(force_first=1)
    with pytest.raises(ValueError, match="whole layer"):
        PerHead((Pbs(), Dense()))
    with pytest.raises(ValueError, match=r"neither 'pbs' nor 'block_sparse', .* 'sgment'. Did you mean 'segment'"):
        resolve_method("pbs", sgment=128)
    with pytest.raises(ValueError, match="unknown method 'block_spares'"):
        resolve_method("pbs", inner="block_spares", keep=0.2)
    with pytest.raises(ValueError, match="options go with a method's name"):
        resolve_method("pbs", inner=Dense(), keep=0.2)
    with pytest.raises(ValueError, match="a pattern for each head"):
        resolve_method("pbs", inner="minference", profile="inside")
