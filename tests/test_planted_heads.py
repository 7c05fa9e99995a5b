"""Heads made up: each attends as its name says, with outlier channels or without, and the seed decides all of it."""

from __future__ import annotations

import pytest
import torch

from sparseprefill.contracts import BlockGrid
from sparseprefill.evals.planted_heads import HEAD_DIM, KINDS, OUTLIER_CHANNELS, PlantedHead, planted_heads
from sparseprefill.patterns import BlockSparse, Sale

TOKENS = 1536


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "outliers"])
def heads(request: pytest.FixtureRequest) -> dict[str, PlantedHead]:
    made = planted_heads(TOKENS, seed=3, outliers=request.param)
    return {each.name.removesuffix(" with outliers"): each for each in made}


def weights(head: PlantedHead) -> torch.Tensor:
    """[queries, keys] of dense attention."""
    inputs = head.inputs
    logits = inputs.scale * inputs.query[0, 0].double() @ inputs.key[0, 0].double().T
    return logits.masked_fill(~inputs.visible_mask()[0], -torch.inf).softmax(-1)


def test_each_kind_attends_as_it_says(heads: dict[str, PlantedHead]) -> None:
    assert list(heads) == list(KINDS)
    weight = {name: weights(head)[TOKENS // 2 :] for name, head in heads.items()}  # of the later half of the queries
    place = torch.arange(TOKENS // 2, TOKENS)
    assert weight["diffuse"].amax(-1).mean() < 0.1
    near = (place[:, None] - torch.arange(TOKENS)).abs() < 64
    assert (weight["local"] * near).sum(-1).mean() + weight["local"][:, :4].sum(-1).mean() > 0.5
    distance = int((place - weight["slash"].argmax(-1)).mode().values)
    assert distance >= 128
    assert weight["slash"].diagonal(TOKENS // 2 - distance)[:1].numel() == 1
    assert ((place - weight["slash"].argmax(-1)) == distance).double().mean() > 0.9
    columns = weight["vertical"].sum(0)
    assert columns.topk(TOKENS // 100).values.sum() / columns.sum() > 0.5
    needle = heads["needle"].needle
    assert needle is not None
    assert weight["needle"][:, needle].min() > 0.3
    assert weight["needle"][:, needle].mean() > 0.6
    assert [each.needle for name, each in heads.items() if name != "needle"] == [None] * 4


def test_the_needles_block_has_nothing_else_to_it(heads: dict[str, PlantedHead]) -> None:
    """Without the needle the mass of its block is ordinary, and its mean key is no better than half of the others."""
    head = heads["needle"]
    assert head.needle is not None
    weight = weights(head)[TOKENS // 2 :]
    weight[:, head.needle] = 0
    by_block = weight.unflatten(1, (-1, 64)).sum(-1).mean(0)[: TOKENS // 128]
    own = by_block[head.needle // 64]
    assert own < 2 * by_block.mean()


def test_a_needle_is_found_by_its_logit_and_missed_by_the_mean(heads: dict[str, PlantedHead]) -> None:
    head = heads["needle"]
    assert head.needle is not None
    grid = BlockGrid.of(head.inputs, 64, 64)
    found = {}
    for name, pattern in {"sale": Sale(keep=0.35), "mean": BlockSparse(0.35)}.items():
        # late rows, whose budget is more than what SALE keeps in any case
        mask = pattern.build_index(head.inputs, grid).to_mask()[0, 0, -grid.rows // 4 :]
        found[name] = float(mask[:, head.needle // 64].double().mean()), int(mask.sum())
    assert found["sale"][0] == 1
    assert found["mean"][0] < 0.7
    assert found["sale"][1] == found["mean"][1]


def test_outliers_are_large_and_change_little() -> None:
    plain, outliers = planted_heads(TOKENS, seed=3), planted_heads(TOKENS, seed=3, outliers=True)
    for first, second in zip(plain, outliers, strict=True):
        assert second.name == f"{first.name} with outliers"
        own = slice(0, HEAD_DIM - OUTLIER_CHANNELS)
        for name in ("query", "key"):
            before, after = getattr(first.inputs, name)[0, 0], getattr(second.inputs, name)[0, 0]
            assert torch.equal(before[:, own], after[:, own])
            channels = after.mean(0).abs()
            usual = after[:, 32:60].std()
            assert (channels[-OUTLIER_CHANNELS:] > 8 * usual).sum() == OUTLIER_CHANNELS // 2
        kept = (weights(first) - weights(second)).abs().sum(-1).mean() / 2
        assert kept < 0.35, "the share of the mass that outliers move"


def test_the_seed_decides() -> None:
    first, again, other = (planted_heads(512, seed=seed) for seed in (1, 1, 2))
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a.inputs.key, b.inputs.key)
        assert not torch.equal(a.inputs.key, c.inputs.key)


@pytest.mark.parametrize(("tokens", "block"), [(511, 64), (512, 0), (512, 65)])
def test_what_has_no_room_is_refused(tokens: int, block: int) -> None:
    with pytest.raises(ValueError, match="at least 512 tokens"):
        planted_heads(tokens, block=block)
