"""Heads made up: each attends as its name says, with outlier channels or without, and the seed decides all of it."""

from __future__ import annotations

import pytest
import torch

from sparseprefill.contracts import BlockGrid
from sparseprefill.evals.planted_heads import HEAD_DIM, KINDS, OUTLIER_CHANNELS, PlantedHead, planted_heads
from sparseprefill.kernels.reference import reference_attention
from sparseprefill.patterns import BlockSparse, Sale, VerticalSlash

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
    assert [each.needle for name, each in heads.items() if name != "needle"] == [None] * 6


def test_a_sink_takes_most_of_every_query_and_leaves_the_rest_spread(heads: dict[str, PlantedHead]) -> None:
    weight = weights(heads["sink"])
    assert (weight[:, :4].sum(-1) > 0.5).double().mean() > 0.95
    assert 0.7 < weight[TOKENS // 2 :, :4].sum(-1).mean() < 0.95
    rest = weight[TOKENS // 2 :, 4:]
    assert (rest.amax(-1) / rest.sum(-1)).mean() < 0.1, "what the sink leaves is as spread as a diffuse head"


def test_a_moving_target_is_one_block_a_stretch_and_another_in_the_next(heads: dict[str, PlantedHead]) -> None:
    """Mass by stretches of queries and blocks of keys: each stretch has a block of its own, far before it."""
    weight = weights(heads["moving"])
    by_block = weight.unflatten(0, (-1, 128)).unflatten(2, (-1, 64)).sum(-1)  # [stretches, queries, blocks]
    targets = []
    for number, stretch in list(enumerate(by_block))[2:]:
        target = int(stretch.mean(0).argmax())
        assert target < 2 * number - 2, "at least a stretch lies between"
        assert (stretch.argmax(-1) == target).double().mean() > 0.9
        targets.append(target)
    late = by_block[len(by_block) // 2 :]
    assert late.amax(-1).mean() > 0.5
    assert len(set(targets)) > len(targets) // 2
    columns = weight[TOKENS // 2 :].sum(0)
    assert columns.topk(TOKENS // 100).values.sum() / columns.sum() < 0.25, "no few keys serve all queries"


def test_where_the_last_queries_look_says_nothing_of_a_moving_target(heads: dict[str, PlantedHead]) -> None:
    """What the mean of a block shows each row of tiles, the last rows do not show the others."""
    inputs = heads["moving"].inputs
    kept = {}
    for name, pattern in {"mean": BlockSparse(0.25), "last": VerticalSlash(density=0.25)}.items():
        index = pattern.build_index(inputs, BlockGrid.of(inputs, 64, 64))
        lse = [reference_attention(inputs, each).lse[0, 0, TOKENS // 2 : -128] for each in (index, None)]
        kept[name] = float((lse[0] - lse[1]).exp().mean())
    assert kept["mean"] > 0.7
    assert kept["last"] < 0.5


def test_kinds_that_were_added_leave_the_others_as_they_were() -> None:
    """Each draws from a generator of its own number: recorded results of the first five stay true."""
    assert list(KINDS)[:5] == ["diffuse", "local", "slash", "vertical", "needle"]
    sums = [float(each.inputs.key.double().sum() + each.inputs.query.double().sum()) for each in planted_heads(512)]
    assert sums[:5] == pytest.approx([1573.759, 16629.913, -89.932, 4134.804, 4109.306], abs=0.01)


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
