"""FlashPrefill: what its rule promises, and what rounding may do to it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch

from sparseprefill.contracts import AttentionInputs, BlockGrid
from sparseprefill.patterns import flashprefill
from sparseprefill.patterns.flashprefill import FlashPrefill
from support import left_padding, make_inputs

BARE: dict[str, Any] = {"sink": 0, "local": 0}


def mask_of(pattern: FlashPrefill, inputs: AttentionInputs, block: int = 16) -> torch.Tensor:
    return pattern.build_index(inputs, BlockGrid.of(inputs, block, block)).to_mask()


def test_a_larger_alpha_keeps_a_part_of_what_a_smaller_one_keeps() -> None:
    inputs = make_inputs(queries=300, seed=2, scale=1.0)
    masks = [mask_of(FlashPrefill(alpha=alpha, **BARE), inputs) for alpha in (0.0, 0.2, 0.5, 0.7, 0.9, 1.0)]
    for more, fewer in itertools.pairwise(masks):
        assert not (fewer & ~more).any()
        assert int(fewer.sum()) < int(more.sum())
    only_own = mask_of(FlashPrefill(alpha=1.5, **BARE), inputs)
    assert torch.equal(only_own, torch.eye(19, dtype=torch.bool).expand_as(only_own))


def test_energies_are_normalised_away() -> None:
    """A logit that all blocks of a row share changes nothing: the rule is relative."""
    inputs = make_inputs(queries=256, head_dim=8, dtype=torch.float64)
    lifted = inputs.key.clone()
    lifted[..., 0] = 1.0  # one channel that is the same in all keys: every logit of a query moves by the same
    plain = dataclasses.replace(inputs, key=lifted)
    moved = inputs.query.clone()
    moved[:, :, 64:80, 0] += 5.0
    pattern = FlashPrefill(alpha=0.3, **BARE)
    assert torch.equal(mask_of(pattern, plain), mask_of(pattern, dataclasses.replace(plain, query=moved)))


def test_one_loud_query_decides_for_its_row() -> None:
    """Energies are summed as they are, not query by query: the worked example of the rule."""
    query, key = torch.zeros(1, 1, 12, 2), torch.zeros(1, 1, 12, 2)
    key[0, 0, 0:4, 0] = 1.0  # block 0 lies along channel 0, block 1 along channel 1
    key[0, 0, 4:8, 1] = 1.0
    query[0, 0, 8, 0] = math.log(10)  # energies of row 2: exp z summed over queries 8 .. 11
    query[0, 0, 9:12, 1] = math.log(2)
    inputs = AttentionInputs(query, key, key, 1.0)
    grid = BlockGrid.of(inputs, 4, 4)
    energy = FlashPrefill().estimate(inputs, grid)[0, 0, 2]
    # block 0: 10 + 1 + 1 + 1; block 1: 1 + 2 + 2 + 2; its own: exp(0), of its last query alone
    torch.testing.assert_close(energy.exp(), torch.tensor([13.0, 7.0, 1.0]))
    for alpha, kept in ((0.54, [True, False, True]), (0.53, [True, True, True])):  # 7 / 13 = 0.538
        assert mask_of(FlashPrefill(alpha=alpha, **BARE), inputs, 4)[0, 0, 2].tolist() == kept


def test_the_sink_can_be_left_out_of_the_maximum() -> None:
    inputs = make_inputs(query_heads=1, kv_heads=1, queries=256, head_dim=8)
    inputs.key[:, :, :16] = 4 * inputs.query.mean(2, keepdim=True) + 0.5  # a sink that all queries like
    inputs.query[...] = inputs.query.mean(2, keepdim=True) + 0.3 * inputs.query + 0.5
    counted, left_out = (
        mask_of(FlashPrefill(alpha=0.5, sink=16, local=0, sink_counts=counts), inputs) for counts in (True, False)
    )
    assert not (counted & ~left_out).any()
    assert left_out[0, 0, 4:].sum() > 2 * counted[0, 0, 4:].sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_in_run_dtypes_it_differs_only_at_the_cut(dtype: torch.dtype) -> None:
    inputs = make_inputs(query_heads=2, kv_heads=1, queries=320, head_dim=16, dtype=dtype)
    exact = dataclasses.replace(inputs, **{n: getattr(inputs, n).double() for n in ("query", "key", "value")})
    pattern, grid = FlashPrefill(alpha=0.5, **BARE), BlockGrid.of(inputs, 16, 16)
    got, want = (pattern.estimate(each, grid) for each in (inputs, exact))
    seen = want.isfinite()
    assert torch.equal(seen, got.isfinite())
    error = (got - want)[seen].abs().max()
    assert error < 1e-4, "means and energies are taken in float32 at least"
    cut = want.amax(-1, keepdim=True) + math.log(0.5)
    near = seen & ((want - cut).abs() <= 2 * error)
    assert ((mask_of(pattern, inputs) == mask_of(pattern, exact)) | near).all()


def test_a_rounded_sink_is_left_out_whole() -> None:
    """20 tokens are two blocks of 16, kept both and rivals neither."""
    query, key = torch.ones(1, 1, 80, 1), torch.zeros(1, 1, 80, 1)
    key[:, :, 16:32] = 9.0
    inputs = AttentionInputs(query, key, key, 1.0)
    assert mask_of(FlashPrefill(alpha=0.5, sink=20, local=0, sink_counts=False), inputs)[0, 0, 4, :4].all()
    assert not mask_of(FlashPrefill(alpha=0.5, sink=20, local=0), inputs)[0, 0, 4, 2:4].any()


def test_a_query_does_not_speak_for_what_its_window_has_left() -> None:
    """The last query of a row sees its own block alone; the 15 before it reach into the block behind."""
    inputs = AttentionInputs(*(torch.zeros(1, 1, 80, 1) for _ in range(3)), 1.0, window=16)
    energy = FlashPrefill().estimate(inputs, BlockGrid.of(inputs, 16, 16))[0, 0, 4]
    assert energy.tolist() == pytest.approx([-math.inf] * 3 + [math.log(15), 0.0])


def test_slabs_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(batch=2, query_heads=4, kv_heads=2, queries=200, keys=250, query_start=50)
    inputs = dataclasses.replace(inputs, key_valid=left_padding(250, [0, 37]))
    grid = BlockGrid.of(inputs, 16, 16)
    whole = FlashPrefill().estimate(inputs, grid)
    monkeypatch.setattr(flashprefill, "_CPU_SCORES", 1)
    torch.testing.assert_close(FlashPrefill().estimate(inputs, grid), whole)
    assert FlashPrefill().build_index(inputs, grid).start.shape == (2, 4, grid.rows)


def test_padding_may_hold_anything() -> None:
    inputs = make_inputs(batch=2, queries=200, key_valid=left_padding(200, [0, 75]))
    pattern = FlashPrefill(alpha=0.5, **BARE)
    before = pattern.build_index(inputs, BlockGrid.of(inputs, 16, 16))
    for name in ("query", "key", "value"):
        getattr(inputs, name)[1, :, :75] = torch.nan
    after = pattern.build_index(inputs, BlockGrid.of(inputs, 16, 16))
    assert torch.equal(before.to_mask(), after.to_mask())
    assert after.unjudged is not None
    assert not after.unjudged.any()


def test_right_padding_changes_nothing() -> None:
    """The last query of a prompt has its own ragged block behind it, whether padding follows or not."""
    inputs = make_inputs(query_heads=2, kv_heads=1, queries=96, head_dim=8)
    inputs.key[:, :, 64:76] = 4 * inputs.query[:, :1, 75:76]  # the strongest block is that of the last query
    valid = torch.arange(96)[None] < 76
    alone = dataclasses.replace(
        inputs, **{name: getattr(inputs, name)[:, :, :76] for name in ("query", "key", "value")}
    )
    for pattern in (FlashPrefill(alpha=0.5, **BARE), FlashPrefill(alpha=1.5, least=16, **BARE)):
        padded = mask_of(pattern, dataclasses.replace(inputs, key_valid=valid))
        assert torch.equal(padded[:, :, :5, :5], mask_of(pattern, alone))


def test_rows_that_cannot_be_judged_are_whole_and_counted() -> None:
    inputs = make_inputs(query_heads=2, kv_heads=1, queries=160)
    inputs.query[0, 1, 100, 3] = torch.nan
    index = FlashPrefill(alpha=0.9, **BARE).build_index(inputs, BlockGrid.of(inputs, 16, 16))
    assert index.count[0, 1, 6] == 7
    assert index.unjudged is not None
    assert index.unjudged.tolist() == [[0, 16]]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"alpha": -0.1}, ValueError, "at least 0"),
        ({"alpha": math.nan}, ValueError, "at least 0"),
        ({"alpha": "much"}, TypeError, "a number"),
        ({"alpha": 0.1, "keep": 0.2}, ValueError, "alpha or keep"),
        ({"keep": 1.5}, ValueError, "in \\(0, 1\\]"),
        ({"keep": 0.2, "least": 64}, ValueError, "goes with alpha"),
        ({"sink": -1}, ValueError, "sink"),
        ({"local": 0.5}, TypeError, "local"),
        ({"sink_counts": 1}, TypeError, "sink_counts"),
    ],
)
def test_what_is_out_of_range_is_refused(options: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        FlashPrefill(**options)
