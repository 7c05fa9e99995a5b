"""MInference's search against a slow definition, token by token, in float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs
from sparseprefill.patterns import AShape, BlockSparse, VerticalSlash
from sparseprefill.patterns.minference_search import CANDIDATES, FIRST_ROW, SearchSettings, choose, search_scores
from support import make_inputs

# everything small enough that each rule decides: budgets below the prompt, blocks of which an eighth is not all
SMALL = SearchSettings(
    first_row=70,
    stream=(5, 11),
    vertical_slash=((6, 20), (9, 17), (25, 12), (60, 6)),
    probe=16,
    forced=4,
    block=8,
    block_share=5,
)


def highest(scores: list[float], count: int) -> set[int]:
    """Places of the highest scores, ties to the lower place."""
    return set(sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:count])


def slow_scores(inputs: AttentionInputs, settings: SearchSettings) -> Tensor:
    """The definition, one head, one row and one key at a time."""
    tokens = inputs.queries
    result = torch.zeros(inputs.query_heads, 2 + len(settings.vertical_slash), dtype=torch.float64)
    for batch in range(inputs.batch):
        for head in range(inputs.query_heads):
            query = inputs.query[batch, head].double()
            key = inputs.key[batch, head // inputs.group_size].double()
            logits = query @ key.T * inputs.scale
            if inputs.softcap is not None:
                logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
            share = torch.stack([
                torch.cat([logits[row, : row + 1].softmax(0), torch.zeros(tokens - row - 1, dtype=torch.float64)])
                for row in range(tokens)
            ]).tolist()  # fmt: skip
            masks = slow_masks(share, query, key, settings)
            for place, mask in enumerate(masks):
                kept = [
                    math.fsum(share[row][other] for other in range(row + 1) if (row, other) in mask)
                    for row in range(settings.first_row, tokens)
                ]
                result[head, place] += math.fsum(kept) / len(kept) / inputs.batch
    return result


def slow_masks(
    share: list[list[float]], query: Tensor, key: Tensor, settings: SearchSettings
) -> list[set[tuple[int, int]]]:
    """For each candidate the (query, key) pairs it keeps, those of the future among them."""
    tokens = len(share)
    everything = [(row, other) for row in range(tokens) for other in range(tokens)]
    sink, reach = settings.stream
    masks = [{(i, j) for i, j in everything if j < sink or 0 <= i - j <= reach}]
    last = range(tokens - settings.probe, tokens)
    for verticals, slashes in settings.vertical_slash:
        column = [math.fsum(share[i][j] for i in last) for j in range(tokens)]
        diagonal = [math.fsum(share[i][i - d] for i in last if i >= d) for d in range(tokens)]
        forced = [math.inf] * settings.forced
        kept_columns = highest(forced + column[settings.forced :], verticals)
        kept_distances = highest(forced + diagonal[settings.forced :], slashes)
        masks.append({(i, j) for i, j in everything if j in kept_columns or i - j in kept_distances})
    size = settings.block
    blocks = -(-tokens // size)
    mean_query, mean_key = (
        torch.stack([tensor[n * size : (n + 1) * size].mean(0) for n in range(blocks)]) for tensor in (query, key)
    )
    fit = (mean_query @ mean_key.T).tolist()
    kept_blocks = [highest(row[: m + 1], blocks // settings.block_share) for m, row in enumerate(fit)]
    masks.append({(i, j) for i, j in everything if j // size in kept_blocks[i // size]})
    return masks


CASES: dict[str, dict[str, Any]] = {
    "grouped heads": {"queries": 112},
    "a ragged last block": {"queries": 109, "query_heads": 3, "kv_heads": 1},
    "one row that counts": {"queries": 71, "query_heads": 2},
    "two prompts": {"queries": 96, "batch": 2},
    "a softcap": {"queries": 90, "softcap": 0.7, "query_heads": 2},
    "a window that is no limit": {"queries": 90, "query_heads": 2, "window": 90},
    "budgets beyond the prompt": {"queries": 75, "query_heads": 2},
}


@pytest.mark.parametrize("name", CASES)
def test_the_slow_definition_agrees(name: str) -> None:
    inputs = make_inputs(dtype=torch.float64, head_dim=8, scale=1.5, seed=len(name), **CASES[name])
    settings = SMALL
    if name == "budgets beyond the prompt":
        settings = dataclasses.replace(SMALL, vertical_slash=((80, 6), (6, 80)), stream=(3, 20), block_share=1)
    expected = slow_scores(inputs, settings)
    assert expected.std() > 0
    assert torch.allclose(search_scores(inputs, settings), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("slab_entries", [1, 1000, 4567])
def test_slabs_do_not_matter(slab_entries: int) -> None:
    inputs = make_inputs(dtype=torch.float64, queries=101, head_dim=8)
    whole = search_scores(inputs, SMALL)
    assert torch.allclose(search_scores(inputs, SMALL, slab_entries=slab_entries), whole, rtol=0, atol=1e-12)


def test_what_is_held_follows_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = []
    softmax = Tensor.softmax

    def watched(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        largest.append(self.numel())
        return softmax(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "softmax", watched)
    inputs = make_inputs(queries=128, head_dim=8)
    search_scores(inputs, SMALL, slab_entries=5000)
    assert 2500 < max(largest) <= 5000


def test_half_precision_is_near() -> None:
    inputs = make_inputs(queries=128, head_dim=16, dtype=torch.bfloat16)
    exact = dataclasses.replace(
        inputs, query=inputs.query.double(), key=inputs.key.double(), value=inputs.value.double()
    )
    statics = search_scores(inputs, SMALL)[:, 0], search_scores(exact, SMALL)[:, 0]
    assert torch.allclose(*statics, rtol=0, atol=1e-6)


def test_heads_that_follow_a_shape_choose_it() -> None:
    """Planted: a head of near keys, one of a few columns, and one of far blocks that change from row to row."""
    tokens, dim = 256, 64
    draw = torch.Generator().manual_seed(0)
    settings = dataclasses.replace(
        SMALL, first_row=128, stream=(4, 20), vertical_slash=((12, 4), (12, 6), (12, 8), (16, 4)), block_share=8
    )
    noise = 0.1 * torch.randn(3, 2, tokens, dim, generator=draw, dtype=torch.float64)
    query, key = noise.unbind(1)
    angle = torch.arange(tokens)[:, None] * torch.linspace(0.02, 0.5, dim // 2)
    wave = torch.cat([angle.cos(), angle.sin()], 1).double()
    query[0] += wave
    key[0] += wave  # products fall with the distance
    query[1, :, 0] += 6
    key[1, 9:78:7, 0] += 6  # in as many blocks
    own = torch.randperm(32, generator=draw)  # block m asks for a block of its own among the earlier ones
    for block in range(32):
        key[2, block * 8 : block * 8 + 8, block] += 4
        query[2, block * 8 : block * 8 + 8, int(own[block]) % (block + 1)] += 4
    inputs = AttentionInputs(query[None], key[None], key[None], 1.0)
    assert [settings_name(settings, int(n)) for n in choose(search_scores(inputs, settings))] == [
        "stream", "vertical_slash", "block_sparse",
    ]  # fmt: skip


def settings_name(settings: SearchSettings, candidate: int) -> str:
    if candidate == 0:
        return "stream"
    return "vertical_slash" if candidate <= len(settings.vertical_slash) else "block_sparse"


def test_the_candidates_are_those_of_the_published_search() -> None:
    settings = SearchSettings()
    assert CANDIDATES[0] == AShape(*settings.stream)
    assert CANDIDATES[1:-1] == tuple(VerticalSlash(*budgets) for budgets in settings.vertical_slash)
    assert CANDIDATES[-1] == BlockSparse(keep=1 / settings.block_share, sink=0, local=0)
    assert (settings.first_row, settings.probe, settings.forced, settings.block) == (FIRST_ROW, 64, 30, 32)
    assert settings.vertical_slash == ((30, 800), (100, 750), (500, 700), (3500, 100))


def test_the_published_numbers_on_a_prompt_of_their_size() -> None:
    inputs = make_inputs(queries=2600, query_heads=2, kv_heads=1, head_dim=4, scale=1e-9)
    scores = search_scores(inputs)
    assert scores.shape == (2, len(CANDIDATES))
    assert scores.dtype == torch.float64
    # attention is uniform, so kept mass is the share of visible keys that a mask keeps
    rows = torch.arange(2500, 2600).double()
    assert torch.allclose(scores[:, 0], ((100 + 801) / (rows + 1)).mean().expand(2), atol=1e-6)
    assert torch.allclose(scores[:, 4], torch.ones(2).double(), atol=1e-6), "3500 columns are all of them"
    assert bool(((scores[:, 5] - (10 * 32 / (rows + 1)).mean()).abs() < 0.02).all())
    assert bool((choose(scores) == 4).all())


def test_the_earlier_candidate_wins_ties() -> None:
    scores = torch.tensor([[0.5, 0.7, 0.7, 0.1], [0.9, 0.9, 0.9, 0.9], [0.0, 0.1, 0.2, 0.3]], dtype=torch.float64)
    assert choose(scores).tolist() == [1, 0, 3]
    assert choose(scores).dtype == torch.int64
    for bad, message in ((scores[0], "heads, candidates"), (scores * math.nan, "NaN"), (scores[:0], "at least one")):
        with pytest.raises(ValueError, match=message):
            choose(bad)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"queries": 70}, "more than 70 tokens, got 70"),
        ({"queries": 80, "keys": 90}, "a cache before the queries"),
        ({"queries": 80, "keys": 90, "query_start": 0}, "keys after the queries"),
        ({"queries": 80, "key_length": 79}, "key slots that are not filled"),
        ({"queries": 80, "window": 79}, "a window"),
        ({"queries": 80, "key_valid": torch.ones(1, 80, dtype=torch.bool)}, "padding"),
        ({"queries": 80, "segment": torch.zeros(1, 80, dtype=torch.int64)}, "packed"),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search_scores(make_inputs(head_dim=8, **fields), SMALL)


def test_a_slab_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="slab_entries"):
        search_scores(make_inputs(head_dim=8), SMALL, slab_entries=0)


@pytest.mark.gpu
def test_a_gpu_finds_the_same() -> None:
    exact, there = (make_inputs(queries=2700, head_dim=64, device=device) for device in ("cpu", "cuda"))
    assert torch.allclose(search_scores(there).cpu(), search_scores(exact), rtol=0, atol=1e-4)
