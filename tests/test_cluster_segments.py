"""Clusters inside segments: dense at full budget, no pair twice, causal, and the definition of the score."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from method_cases import BLOCK, PART_INPUTS, slow_anchor, slow_row
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid
from sparseprefill.estimators.segment_clusters import SegmentClusters
from sparseprefill.kernels.reference import reference_attention
from sparseprefill.patterns.cluster_segments import ClusterSegments
from sparseprefill.patterns.parts import Part, attend, parts_coverage, parts_of
from sparseprefill.prefill import sparse_prefill
from support import left_padding, make_inputs

SMALL = ClusterSegments(keep=0.4, segment=32, tokens=4, iterations=3)


def parts_for(pattern: Any, inputs: AttentionInputs) -> tuple[Part, ...]:
    return parts_of(pattern, inputs, BlockGrid.of(inputs, BLOCK, BLOCK))


@pytest.mark.parametrize("shape", PART_INPUTS)
def test_everything_is_dense(shape: str) -> None:
    inputs = make_inputs(**PART_INPUTS[shape])
    parts = parts_for(dataclasses.replace(SMALL, keep=1.0), inputs)
    result, exact = attend(parts), reference_attention(inputs, None)
    plain = reference_attention(inputs, None, dtype=torch.float32)
    for got, low, want in ((result.output, plain.output, exact.output), (result.lse, plain.lse, exact.lse)):
        assert got is not None
        assert low is not None
        assert want is not None
        seen = want > -torch.inf
        budget = 2 * ((low - want)[seen].abs().max() + torch.finfo(torch.float32).eps * want[seen].abs().max())
        assert (got.double() - want)[seen].abs().max() <= budget + 1e-6
    counted = parts_coverage(parts)
    assert bool((counted.kept == counted.visible).all()), "every pair once"


@pytest.mark.parametrize("shape", PART_INPUTS)
def test_lists_are_valid_and_leave_something_out(shape: str) -> None:
    inputs = make_inputs(**PART_INPUTS[shape])
    parts = parts_for(SMALL, inputs)
    for number, part in enumerate(parts):
        part.index.validate(part.inputs, empty_rows=len(parts) > 1)
        if number:
            assert sorted(part.inputs.key[0, 0, :, 0].tolist()) == sorted(inputs.key[0, 0, :, 0].tolist())
    counted = parts_coverage(parts)
    assert bool((counted.kept <= counted.visible).all())
    if shape in ("plain", "softcap", "sinks"):
        assert bool((counted.density < 0.8).all())


def test_a_part_is_no_larger_than_the_whole() -> None:
    """Kept mass, which two parts that share a pair would push above 1."""
    inputs = make_inputs(queries=250, batch=2)
    result, dense = attend(parts_for(SMALL, inputs)), reference_attention(inputs, None)
    assert bool((result.lse.double() <= dense.lse + 1e-5).all())


def test_later_tokens_change_nothing() -> None:
    inputs = make_inputs(queries=250)
    later = dataclasses.replace(inputs, query=inputs.query.clone(), key=inputs.key.clone())
    for tensor in (later.query, later.key):
        tensor[:, :, 200:] = torch.randn(tensor[:, :, 200:].shape, generator=torch.Generator().manual_seed(5))
    before, after = (attend(parts_for(SMALL, each)) for each in (inputs, later))
    torch.testing.assert_close(before.lse[:, :, :192], after.lse[:, :, :192], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(before.lse[:, :, 200:], after.lse[:, :, 200:])


@pytest.mark.parametrize("shape", ["plain", "padded", "softcap", "chunk-inside-a-block", "holes"])
def test_choice_is_that_of_the_definition(shape: str) -> None:
    inputs = make_inputs(**{**PART_INPUTS[shape], "dtype": torch.float64})
    parts = parts_for(SMALL, inputs)
    clusters = SegmentClusters.of(inputs, SMALL.segment, SMALL.segment // SMALL.tokens, SMALL.iterations)
    behind = parts[1]
    mask = behind.index.to_mask()
    grid = behind.index.grid
    for b in range(inputs.batch):
        anchor = slow_anchor(inputs, b)
        for row in range(grid.rows):
            m = int(grid.first[b]) + row
            slots = slow_row(inputs, b, m)
            valid = torch.ones(inputs.keys, dtype=torch.bool) if inputs.key_valid is None else inputs.key_valid[b]
            asked = [p - inputs.query_start for p in slots if valid[p]]
            segments = m * BLOCK // SMALL.segment if slots else 0
            if not segments or not asked:
                continue
            for h in range(inputs.query_heads):
                group = h // inputs.group_size
                scores = slow_scores(inputs, clusters, behind.inputs, b, h, asked, segments, anchor)
                wanted = max(1, -(-len(scores) * 4 // 10))
                best = sorted(range(len(scores)), key=lambda n: (-scores[n], n))[:wanted]
                found = mask[b, h, row].nonzero()[:, 0].tolist()
                assert found == sorted(best), (b, group, row)


def slow_scores(
    inputs: AttentionInputs, clusters: SegmentClusters, moved: AttentionInputs, b: int, h: int, asked: list[int],
    segments: int, anchor: int,
) -> list[float]:  # fmt: skip
    """What each tile behind a row gets of the attention of its queries, keys told by their values."""
    group = h // inputs.group_size
    label = {
        tuple(inputs.key[b, group, anchor + s * SMALL.segment + t].tolist()): (s, int(clusters.label[b, group, s, t]))
        for s in range(segments) for t in range(SMALL.segment)
    }  # fmt: skip
    number = SMALL.segment // SMALL.tokens
    total = [0.0] * (segments * SMALL.segment // BLOCK)
    for i in asked:
        z = torch.stack([
            inputs.query[b, h, i] @ clusters.centroid[b, group, s, c] * inputs.scale
            for s in range(segments) for c in range(number)
        ])  # fmt: skip
        if inputs.softcap is not None:
            z = inputs.softcap * torch.tanh(z / inputs.softcap)
        size = clusters.size[b, group, :segments].flatten()
        share = z.exp() / (size * z.exp())[size > 0].sum()
        for n in range(len(total)):
            for slot in range(anchor + n * BLOCK, anchor + (n + 1) * BLOCK):
                if inputs.key_valid is not None and not inputs.key_valid[b, slot]:
                    continue
                s, c = label[tuple(moved.key[b, group, slot].tolist())]
                total[n] += float(share[s * number + c]) / len(asked)
    return total


@pytest.mark.parametrize("iterations", [0, 1, 4])
def test_clusters_are_of_directions(iterations: int) -> None:
    inputs = make_inputs(queries=200, dtype=torch.float64)
    longer = dataclasses.replace(inputs, key=inputs.key * 8)
    first, second = (SegmentClusters.of(each, 32, 8, iterations) for each in (inputs, longer))
    assert torch.equal(first.label, second.label)


@pytest.mark.parametrize("queries", [20, 32, 33, 200])
def test_a_prompt_of_one_segment_is_dense_and_counted(queries: int) -> None:
    inputs = make_inputs(queries=queries)
    parts = parts_for(SMALL, inputs)
    if queries > SMALL.segment:
        assert all(part.index.unjudged is None for part in parts)
    else:
        assert parts[0].index.unjudged is not None
        assert bool((parts[0].index.unjudged == queries).all())


def test_clusters_are_of_their_own_segment_and_nearest() -> None:
    inputs = make_inputs(queries=200, batch=2, key_valid=left_padding(200, [0, 30]), dtype=torch.float64)
    found = SegmentClusters.of(inputs, 32, 8, 20)
    assert bool((found.size.sum(-1)[0, 0, :6] == 32).all())
    for s in range(6):
        key = inputs.key[0, 0, s * 32 : (s + 1) * 32]
        for c in range(8):
            members = key[found.label[0, 0, s] == c]
            assert len(members) == found.size[0, 0, s, c]
            if len(members):
                torch.testing.assert_close(found.centroid[0, 0, s, c], members.mean(0))
    mean = inputs.key[0, 0, :32].mean(0)
    centred = inputs.key[0, 0, :32] - mean
    same: Tensor = torch.stack([
        torch.nn.functional.normalize(centred[found.label[0, 0, 0] == c].mean(0), dim=-1) for c in range(8)
    ])  # fmt: skip
    agree = (centred @ same.nan_to_num(0.0).T).argmax(-1) == found.label[0, 0, 0]
    assert float(agree.double().mean()) > 0.9


def test_a_whole_prefill_and_refusals() -> None:
    inputs = make_inputs(queries=300)
    prefill = sparse_prefill(inputs, SMALL, block_q=16, block_k=16, observe=True)
    assert prefill.sampled_mass is not None
    for options, message in (
        ({"keep": 0.0}, "keep as a share"), ({"segment": 0}, "segment must be"), ({"tokens": 64}, "do not fit"),
        ({"iterations": -1}, "iterations must be"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ClusterSegments(**{**{"segment": 32, "tokens": 4}, **options})
    with pytest.raises(ValueError, match="no multiple of key blocks"):
        parts_of(SMALL, inputs, BlockGrid.of(inputs, 64, 64))
