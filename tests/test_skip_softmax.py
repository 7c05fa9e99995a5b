"""Skip-softmax as a method: what it may lose, what it leaves alone, and what it does to lists and densities."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseprefill.contracts import AttentionInputs, BlockGrid
from sparseprefill.kernels.reference import reference_attention
from sparseprefill.patterns import AShape, BlockSparse, Dense, LastRowsDense, PerHead
from sparseprefill.patterns.expected_density import expected_density
from sparseprefill.patterns.flashprefill import FlashPrefill
from sparseprefill.patterns.parts import attend, parts_of
from sparseprefill.patterns.pbs import Pbs
from sparseprefill.patterns.skip_softmax import SkipSoftmax
from sparseprefill.patterns.spargeattn import SpargeAttn
from sparseprefill.prefill import keeps_everything, resolve_method, sparse_prefill
from support import left_padding, make_inputs

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"queries": 250},
    "padded": {"batch": 2, "queries": 200, "key_valid": left_padding(200, [0, 75])},
    "window": {"queries": 250, "window": 100},
    "packed": {"queries": 200, "segment": torch.tensor([[0] * 90 + [1] * 110])},
    "chunk-inside-a-block": {"queries": 75, "keys": 250},
    "softcap": {"queries": 150, "softcap": 1.5},
}


def run(inputs: AttentionInputs, pattern: Any, **options: Any) -> Any:
    return sparse_prefill(inputs, pattern, block_q=16, block_k=16, observe=True, **options)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_scale_of_0_is_the_inner_method_bit_for_bit(shape: str) -> None:
    inputs = make_inputs(head_dim=8, **SHAPES[shape])
    for inner in (Dense(), BlockSparse(keep=64)):
        plain, off = (run(inputs, pattern) for pattern in (inner, SkipSoftmax(inner, scale=0.0)))
        assert torch.equal(plain.result.output, off.result.output)
        assert torch.equal(plain.result.lse, off.result.lse)
        assert off.index.skip is None


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.01, 0.05, 0.3, 1.0, 5.0, 50.0]),
    spread=st.sampled_from([0.3, 2.0, 6.0]),
    order=st.sampled_from(["score", "ascending"]),
    shape=st.sampled_from(sorted(SHAPES)),
)
def test_no_query_loses_more_than_the_bound(seed: int, scale: float, spread: float, order: str, shape: str) -> None:
    inputs = make_inputs(head_dim=8, seed=seed, dtype=torch.float64, scale=spread, **SHAPES[shape])
    index = SkipSoftmax(scale=scale, order=order).build_index(inputs, BlockGrid.of(inputs, 16, 16))
    index.validate(inputs)
    kept = (reference_attention(inputs, index).lse - reference_attention(inputs).lse).exp()
    real = reference_attention(inputs).lse > -torch.inf
    if inputs.key_valid is not None:  # a padded query has no say in what is skipped
        real &= inputs.key_valid[:, None, inputs.query_start : inputs.query_start + inputs.queries]
    assert (1 - kept[real] <= scale / (1 + scale) + 1e-12).all()
    assert (kept[real] <= 1 + 1e-12).all()


def test_a_larger_scale_skips_more_and_the_density_says_so() -> None:
    inputs = make_inputs(queries=512, head_dim=8, scale=6.0)
    density = [run(inputs, SkipSoftmax(scale=scale)).coverage.density.mean() for scale in (0.0, 0.01, 1.0, 30.0, 512.0)]
    assert density[0] == 1.0
    assert all(more > fewer for more, fewer in itertools.pairwise(density))
    assert density[-1] >= 0.5, "logits are computed, which is half of a tile"


def test_lambda_is_for_the_keys_of_a_window() -> None:
    inputs = make_inputs(queries=64, window=20)
    index = SkipSoftmax(scale=2.0).build_index(inputs, BlockGrid.of(inputs, 16, 16))
    assert index.skip is not None
    torch.testing.assert_close(index.skip[0, 0].exp(), torch.tensor([2 / 16, 2 / 20, 2 / 20, 2 / 20]))


def test_chunks_and_one_prefill_decide_alike() -> None:
    """lambda follows from what a row can see, whatever comes later."""
    inputs = make_inputs(queries=256, head_dim=8, scale=2.0)
    whole = run(inputs, SkipSoftmax(scale=5.0)).result
    for start, stop in ((0, 96), (96, 160), (160, 256)):
        chunk = dataclasses.replace(
            inputs, query=inputs.query[:, :, start:stop], key=inputs.key[:, :, :stop], value=inputs.value[:, :, :stop],
            query_start=start,
        )  # fmt: skip
        part = run(chunk, SkipSoftmax(scale=5.0)).result
        torch.testing.assert_close(part.output, whole.output[:, :, start:stop])
        torch.testing.assert_close(part.lse, whole.lse[:, :, start:stop])


def test_visiting_the_best_first_skips_more() -> None:
    """A local head: by ascending blocks it meets its maximum last."""
    inputs = make_inputs(query_heads=2, kv_heads=1, queries=512, head_dim=16, seed=4)
    place = torch.arange(512)[:, None] / torch.logspace(1.5, 3, 8)
    waves = 3 * torch.cat([place.cos(), place.sin()], 1)
    inputs = dataclasses.replace(inputs, query=inputs.query + waves, key=inputs.key + waves)
    by_score, ascending = (
        float(run(inputs, SkipSoftmax(scale=5.0, order=order)).coverage.density.mean())
        for order in ("score", "ascending")
    )
    assert by_score < ascending - 0.05


def test_it_goes_with_the_other_wrappers() -> None:
    inputs = make_inputs(queries=300, head_dim=8, scale=2.0)
    exact = reference_attention(inputs)
    last = run(inputs, LastRowsDense(SkipSoftmax(scale=100.0), 20)).result
    torch.testing.assert_close(last.lse[..., -20:].double(), exact.lse[..., -20:], rtol=0, atol=1e-5)
    mixed = run(inputs, PerHead((Dense(), SkipSoftmax(scale=100.0), Dense(), SkipSoftmax(scale=100.0))))
    assert mixed.coverage.density[0] == mixed.coverage.density[2] == 1.0
    assert mixed.coverage.density[1] < 1.0
    inside = parts_of(Pbs(SkipSoftmax(scale=50.0), segment=64), inputs, BlockGrid.of(inputs, 16, 16))
    assert inside[1].index.skip is not None
    kept = (attend(inside).lse.double() - exact.lse).exp()
    assert kept.max() <= 1 + 1e-5
    assert kept.min() < 1 - 1e-5
    assert not keeps_everything(SkipSoftmax())
    assert keeps_everything(SkipSoftmax(scale=0))


def test_spargeattn_skips_values_with_it() -> None:
    """Its threshold is in units of log2, and none is none."""
    inputs = make_inputs(queries=300, head_dim=8, scale=2.0)
    grid = BlockGrid.of(inputs, 16, 16)
    index = SpargeAttn(topk=1.0, pv_skip=4.0).build_index(inputs, grid)
    assert index.skip is not None
    assert index.visit is None, "it walks its blocks as they lie"
    torch.testing.assert_close(index.skip, torch.full_like(index.skip, -4 * math.log(2)))
    assert SpargeAttn(topk=1.0).build_index(inputs, grid).skip is None
    densities = [
        float(run(inputs, SpargeAttn(topk=1.0, pv_skip=skip)).coverage.density.mean()) for skip in (0.0, 4.0, 50.0)
    ]
    assert densities[0] < densities[1] < densities[2] == 1.0


def test_names_and_expectations() -> None:
    assert resolve_method("skip_softmax", scale=5) == SkipSoftmax(scale=5)
    assert resolve_method("skip_softmax", inner="flashprefill", alpha=0.3) == SkipSoftmax(FlashPrefill(alpha=0.3))
    assert expected_density(SkipSoftmax(), 1 << 20) == pytest.approx(0.75)
    assert expected_density(SkipSoftmax(AShape(window=0.2)), 1 << 20) == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"scale": -1.0}, ValueError, "at least 0"),
        ({"scale": math.inf}, ValueError, "finite"),
        ({"scale": "big"}, TypeError, "a number"),
        ({"order": "random"}, ValueError, "score, ascending"),
        ({"inner": Pbs()}, TypeError, "works in parts"),
        ({"inner": 3}, TypeError, "build_index"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        SkipSoftmax(**options)
