"""Columns by votes: the right keys for each group, single columns as attention over just them, slabs, refusals."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from method_cases import BLOCK, PART_INPUTS, slow_anchor, slow_row
from slow_vote_columns import chosen_of, slow_scores, tail_of

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.estimators import column_votes as estimator
from sparseprefill.kernels.reference import reference_attention
from sparseprefill.patterns import vote_columns
from sparseprefill.patterns.parts import attend, parts_coverage, parts_of
from sparseprefill.patterns.vote_columns import VoteColumns, snapkv, tokenselect, zipvl
from sparseprefill.prefill import resolve_method, sparse_prefill
from support import make_inputs

TOKENS = VoteColumns(keep=40, sink=16, local=32, probe=24, unit="token")


def index_of(pattern: Any, inputs: AttentionInputs) -> BlockIndex:
    index: BlockIndex = pattern.build_index(inputs, BlockGrid.of(inputs, BLOCK, BLOCK))
    return index


@pytest.mark.parametrize("make", [snapkv, tokenselect, zipvl], ids=lambda make: str(make.__name__))
def test_each_group_votes_on_its_own_keys(make: Any) -> None:
    """Four KV heads, each with one loud key at another place: modulo for division would look at the wrong one."""
    inputs = make_inputs(query_heads=8, kv_heads=4, queries=640, head_dim=8)
    query, key = torch.zeros_like(inputs.query), 0.01 * inputs.key
    for head in range(8):
        query[:, head, :, head // 2] = 4.0
    for kv_head in range(4):
        key[:, kv_head, 100 + 64 * kv_head, kv_head] = 8.0
    loud = dataclasses.replace(inputs, query=query, key=key)
    mask = index_of(make(keep=16, sink=16, local=16, **({} if make is snapkv else {"voters": "group"})), loud).to_mask()
    for head in range(8):
        kept = mask[0, head, -1].nonzero()[:, 0].tolist()
        assert (100 + 64 * (head // 2)) // BLOCK in kept
    everyone = index_of(make(keep=64, sink=16, local=16, voters="all"), loud).to_mask()
    assert torch.equal(everyone, everyone[:, :1].expand_as(everyone)), "one choice for all heads"


def test_the_presets_are_what_they_say() -> None:
    assert resolve_method("snapkv") == VoteColumns(keep=0.2, probe=32, smooth="max", width=7)
    assert resolve_method("tokenselect", keep=2048) == VoteColumns(
        keep=2048, superblock=512, sink=128, local=512, voters="all"
    )
    assert resolve_method("zipvl") == VoteColumns(mass=0.975, probe=64, spread=64, voters="all", fair=True)
    assert resolve_method("vote_columns") == VoteColumns(keep=0.2)


@pytest.mark.parametrize("shape", [name for name in PART_INPUTS if name not in ("one-query", "one-query-late")])
@pytest.mark.parametrize("voters", ["group", "all"])
def test_single_columns_are_attention_over_just_them(shape: str, voters: str) -> None:
    """Each row: sink, local window and the packs of chosen columns that end before it, from the definition."""
    inputs = make_inputs(query_heads=4, kv_heads=2, head_dim=8, dtype=torch.float64, **PART_INPUTS[shape])
    pattern = dataclasses.replace(TOKENS, voters=voters)
    parts = parts_of(pattern, inputs, BlockGrid.of(inputs, BLOCK, BLOCK))
    for number, part in enumerate(parts):
        part.index.validate(part.inputs, empty_rows=number > 0)
    result = attend(parts, "reference")
    assert result.output is not None
    logits = torch.einsum(
        "bhid,bhjd->bhij", inputs.query, inputs.key.repeat_interleave(2, 1)
    ) * inputs.scale  # fmt: skip
    if inputs.softcap is not None:
        logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
    mask = allowed(inputs, pattern) & inputs.visible_mask()[:, None]
    lse = logits.masked_fill(~mask, -torch.inf).logsumexp(-1)
    real = torch.ones(inputs.batch, inputs.queries, dtype=torch.bool)
    if inputs.key_valid is not None:
        real = inputs.key_valid[:, inputs.query_start : inputs.query_start + inputs.queries]
    want, got = lse.transpose(1, 2)[real], result.lse.transpose(1, 2)[real]
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)
    counted = parts_coverage(parts)
    if inputs.key_valid is None:
        assert torch.equal(counted.kept, mask.sum((0, 2, 3)))


def allowed(inputs: AttentionInputs, pattern: VoteColumns) -> torch.Tensor:
    """bool [batch, query_heads, queries, keys], before the causal mask."""
    mask = torch.zeros(inputs.batch, inputs.query_heads, inputs.queries, inputs.keys, dtype=torch.bool)
    for b in range(inputs.batch):
        anchor, tail = slow_anchor(inputs, b), tail_of(inputs, b)
        end = anchor + max(0, tail - pattern.probe - anchor) // BLOCK * BLOCK
        first = anchor + -(-pattern.sink // BLOCK) * BLOCK
        candidates = [
            j for j in range(first, end) if inputs.key_valid is None or bool(inputs.key_valid[b, j])
        ]  # fmt: skip
        for h in range(inputs.query_heads):
            score, votes = slow_scores(inputs, b, h, pattern, None)
            chosen = chosen_of(
                pattern, candidates, dict(enumerate(score)), {j: votes.get(j, 0.0) for j in candidates}, 0.0, 1
            )
            number = -(-len(chosen) // BLOCK) * BLOCK
            whole = number >= len(candidates)
            ranked = [] if whole else sorted(candidates, key=lambda j: (-score[j], j))[:number]
            number = len(ranked)
            packs = [sorted(ranked)[n : n + BLOCK] for n in range(0, number, BLOCK)]
            for m in range((inputs.queries + inputs.query_start) // BLOCK + 1):
                rows = slow_row(inputs, b, m)
                if not rows:
                    continue
                near = min(m + 1 - -(-pattern.local // BLOCK), m)
                kept = min(near, max(0, tail - pattern.probe - anchor) // BLOCK)
                first_low, low = (int(inputs.visible_range()[0][b, rows[n] - inputs.query_start]) for n in (0, -1))
                keys = set(range(anchor, anchor + -(-pattern.sink // BLOCK) * BLOCK))
                keys |= set(range(anchor + max(0, kept) * BLOCK, anchor + (m + 1) * BLOCK))
                before = [pack for pack in packs if pack[-1] < anchor + max(0, near) * BLOCK]
                if whole:
                    keys |= set(range(anchor, anchor + (m + 1) * BLOCK))
                elif any(pack[0] < low and pack[-1] >= first_low for pack in before):  # whole blocks, as far as seen
                    blocks = {(j - anchor) // BLOCK for j in ranked}
                    keys |= {j for n in blocks for j in range(anchor + n * BLOCK, anchor + (n + 1) * BLOCK)}
                else:
                    keys |= {j for pack in before for j in pack if pack[0] >= low}
                place = [p - inputs.query_start for p in rows]
                mask[b, h, place[0] : place[-1] + 1, [j for j in sorted(keys) if j < inputs.keys]] = True
    return mask


@pytest.mark.parametrize("shape", PART_INPUTS)
@pytest.mark.parametrize("budget", [{"keep": 10**6}, {"keep": None, "mass": 1.0}], ids=str)
def test_all_columns_are_everything(shape: str, budget: dict[str, Any]) -> None:
    inputs = make_inputs(query_heads=4, kv_heads=2, head_dim=8, dtype=torch.float64, **PART_INPUTS[shape])
    pattern = dataclasses.replace(TOKENS, sink=0, local=16, probe=8, **budget)
    got = attend(parts_of(pattern, inputs, BlockGrid.of(inputs, BLOCK, BLOCK)), "reference").lse
    want = reference_attention(inputs, None).lse
    seen = want > -torch.inf
    torch.testing.assert_close(got[seen], want[seen])


def test_a_whole_prefill_of_single_columns() -> None:
    inputs = make_inputs(queries=400, head_dim=8)
    found = sparse_prefill(inputs, TOKENS, block_q=BLOCK, block_k=BLOCK, observe=True)
    assert found.coverage is not None
    assert found.coverage.density.max() < 0.5
    assert found.result.output is not None
    exact = reference_attention(inputs, None)
    assert bool((found.result.lse <= exact.lse + 1e-5).all())
    everything = sparse_prefill(inputs, dataclasses.replace(TOKENS, keep=1.0), block_q=BLOCK, block_k=BLOCK)
    torch.testing.assert_close(everything.result.lse.double(), exact.lse.double(), atol=1e-5, rtol=1e-5)


def test_single_columns_keep_more_than_their_blocks_do_where_few_keys_are_loud() -> None:
    """Forty loud keys, one in each block: as tokens they fit into three packs."""
    inputs = make_inputs(query_heads=1, kv_heads=1, queries=800, head_dim=8)
    query, key = torch.zeros_like(inputs.query), 0.01 * inputs.key
    query[..., 0] = 4.0
    key[:, :, torch.arange(40) * BLOCK + 20, 0] = 6.0
    loud = dataclasses.replace(inputs, query=query, key=key)
    kept = {}
    for unit in ("block", "token"):
        pattern = dataclasses.replace(TOKENS, keep=48, unit=unit)
        parts = parts_of(pattern, loud, BlockGrid.of(loud, BLOCK, BLOCK))
        exact = reference_attention(loud, None).lse[:, :, -1]
        kept[unit] = float((attend(parts).lse[:, :, -1].double() - exact).exp())
    assert kept["token"] > 0.95
    assert kept["block"] < 0.3


@pytest.mark.parametrize("pattern", [VoteColumns(keep=0.3, probe=24, spread=9, fair=True), tokenselect(superblock=32)])
def test_slabs_choose_the_same(pattern: VoteColumns, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(queries=300, head_dim=8, dtype=torch.float64)
    want = index_of(pattern, inputs).to_mask()
    monkeypatch.setattr(estimator, "_LOGITS", 1000)
    monkeypatch.setattr(vote_columns, "_VOTES", 1)
    assert torch.equal(index_of(pattern, inputs).to_mask(), want)


def test_a_mass_takes_more_columns_the_larger_it_is() -> None:
    inputs = make_inputs(queries=400, head_dim=8)
    counts = [index_of(zipvl(mass=mass, sink=16, local=16), inputs).count.sum() for mass in (0.2, 0.5, 0.9, 1.0)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == BlockIndex.dense(inputs, BlockGrid.of(inputs, BLOCK, BLOCK)).count.sum()


@pytest.mark.parametrize(
    "pattern", [VoteColumns(keep=0.1, sink=0, local=0), tokenselect(superblock=64, sink=64), TOKENS]
)
def test_votes_that_are_not_finite_keep_everything_and_are_counted(pattern: VoteColumns) -> None:
    inputs = make_inputs(query_heads=4, kv_heads=2, queries=256, head_dim=8)
    inputs.query[0, 3, 250] = torch.nan
    inputs.query[0, 3, 150] = torch.nan
    first = parts_of(pattern, inputs, BlockGrid.of(inputs, BLOCK, BLOCK))[0]
    assert first.index.unjudged is not None
    whole = first.index.unjudged[0].tolist()
    dense = BlockIndex.dense(inputs, first.index.grid).count[0, 3]
    if pattern.voters == "all":
        assert whole == [128] * 4, "two stretches of 64"
    else:
        assert whole == [0, 0, 256, 256]
        assert torch.equal(first.index.count[0, 3], dense)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "by keep or by mass, one of them"),
        ({"keep": 0.1, "mass": 0.5}, "by keep or by mass, one of them"),
        ({"keep": 0}, "keep must be at least 1"),
        ({"mass": 1.5}, "mass must be in (0, 1]"),
        ({"keep": 0.1, "probe": 0}, "probe must be at least 1"),
        ({"keep": 0.1, "spread": -1}, "spread must be at least 0"),
        ({"keep": 0.1, "width": 4}, "width must be odd"),
        ({"keep": 0.1, "superblock": 0}, "superblock must be at least 1"),
        ({"keep": 0.1, "superblock": 64, "probe": 8, "fair": True}, "and probe, fair would change nothing"),
        ({"keep": 0.1, "voters": "none"}, "voters must be one of head, group, all"),
        ({"keep": 0.1, "smooth": "median"}, "smooth must be one of none, max, mean"),
        ({"keep": 0.1, "unit": "page"}, "unit must be one of block, token"),
        ({"keep": 0.1, "fair": 1}, "fair must be True or False"),
        ({"keep": 0.1, "unit": "token", "superblock": 64}, "leave out superblock"),
        ({"keep": 0.1, "unit": "token", "voters": "head"}, "leave out superblock, and take voters='group' or 'all'"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(said)):
        VoteColumns(**options)


def test_keys_that_end_before_the_queries_are_refused() -> None:
    inputs = make_inputs(queries=100, keys=300, query_start=100, key_length=130)
    with pytest.raises(ValueError, match="130 keys end before query 200"):
        parts_of(TOKENS, inputs, BlockGrid.of(inputs, BLOCK, BLOCK))
