"""HyperAttention: the walk of hashes, what is exact and what is drawn by the definition, unbiased in the mean."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest
import torch
from method_cases import BLOCK, PART_INPUTS
from tiny_models import tiny_model
from torch import Tensor

from sparseprefill import patch_model, register
from sparseprefill.contracts import AttentionInputs, BlockGrid
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.guard import Guard
from sparseprefill.kernels.reference import reference_attention
from sparseprefill.patterns import BlockSparse, Dense, LastRowsDense
from sparseprefill.patterns.delta_correct import DeltaCorrect
from sparseprefill.patterns.hyperattention import HyperAttention
from sparseprefill.patterns.parts import attend, estimates, parts_coverage, parts_of
from sparseprefill.prefill import sparse_prefill
from support import left_padding, make_inputs

SMALL = HyperAttention(segment=64, block=16, bits=4)
SHAPES = [name for name in PART_INPUTS if name not in ("window", "packed")]


def run(pattern: Any, inputs: AttentionInputs) -> Any:
    return attend(parts_of(pattern, inputs, BlockGrid.of(inputs, BLOCK, BLOCK)), "reference")


def test_neighbours_on_the_walk_differ_in_one_sign() -> None:
    pattern = HyperAttention(bits=7)
    signs = torch.tensor([[float(n >> bit & 1) * 2 - 1 for bit in reversed(range(7))] for n in range(128)])
    eye = dataclasses.replace(pattern, bits=7)
    draw = torch.Generator().manual_seed(eye.seed * 64)
    direction = torch.randn(7, 7, generator=draw, dtype=torch.float64)
    vectors = signs.double() @ torch.linalg.inv(direction)  # whose signs along the directions are these
    place = eye.ranks(vectors[None, None], 0)[0, 0]
    assert sorted(place.tolist()) == list(range(128))
    walked = signs[place.argsort()]
    assert (walked.diff(dim=0).abs().sum(1) == 2).all(), "one sign of 1 becomes -1, or the other way"


@pytest.mark.parametrize("shape", SHAPES)
def test_one_segment_is_dense(shape: str) -> None:
    inputs = make_inputs(dtype=torch.float64, **PART_INPUTS[shape])
    got, want = run(HyperAttention(segment=512, block=16), inputs), reference_attention(inputs, None)
    seen = want.lse > -torch.inf
    torch.testing.assert_close(got.lse[seen], want.lse[seen])


def slow_weights(inputs: AttentionInputs, b: int, h: int, pattern: HyperAttention) -> Tensor:
    """float64 [queries, keys]: how often each pair counts, from the paper's rule; full halves of queries alone."""
    anchor = 0 if inputs.key_valid is None else int(inputs.key_valid[b].nonzero()[0])
    valid = torch.ones(inputs.keys, dtype=torch.bool) if inputs.key_valid is None else inputs.key_valid[b]
    weight = torch.zeros(inputs.queries, inputs.keys, dtype=torch.float64)
    group, size = h // inputs.group_size, pattern.block
    for q in range(inputs.queries):
        own = (q - anchor) // pattern.segment
        for j in range(anchor, q + 1):
            weight[q, j] = float((j - anchor) // pattern.segment == own)
    half, level = pattern.segment, 0
    while half < inputs.keys:
        direction = torch.randn(inputs.head_dim, pattern.bits, dtype=torch.float64,
                                generator=torch.Generator().manual_seed(pattern.seed * 64 + 2 * level))  # fmt: skip

        def rank(vector: Tensor, direction: Tensor = direction) -> int:
            code = (vector.double() @ direction > 0).tolist()
            place = 0
            for bit in range(len(code)):
                place = 2 * place + (sum(code[: bit + 1]) % 2)
            return place

        halves, blocks = -(-inputs.keys // half), half // size
        share = torch.rand(halves, inputs.kv_heads, blocks, size, dtype=torch.float64,
                           generator=torch.Generator().manual_seed(pattern.seed * 64 + 2 * level + 1))  # fmt: skip
        for n in range(1, halves, 2):
            places = [j for j in range(anchor + (n - 1) * half, anchor + n * half) if j < inputs.keys]
            asked = [q for q in range(anchor + n * half, anchor + (n + 1) * half) if q < inputs.queries]
            if not asked:
                continue
            real = sorted((j for j in places if valid[j]), key=lambda j: (rank(inputs.key[b, group, j]), j))
            left = iter(real)
            laid = [next(left) if valid[j] else None for j in places]  # what does not count stays where it is
            order = sorted(asked, key=lambda q: (rank(inputs.query[b, h, q]) if valid[q] else 1 << 30, q))
            for tile in range(0, len(asked), BLOCK):
                t = tile * blocks // len(asked)
                mine = [j for j in laid[t * size : (t + 1) * size] if j is not None]
                others = [j for p, j in enumerate(laid) if j is not None and not t * size <= p < (t + 1) * size]
                for q in order[tile : tile + BLOCK]:
                    for j in mine:
                        weight[q, j] += 1
                    for u in share[n - 1, group, t].tolist():
                        if others:
                            weight[q, others[math.floor(u * len(others))]] += len(others) / size
        half, level = 2 * half, level + 1
    return weight * valid


@pytest.mark.parametrize(
    "options",
    [{"queries": 256}, {"queries": 200}, {"queries": 150, "softcap": 1.5},
     {"batch": 2, "queries": 300, "key_valid": left_padding(300, [0, 75])},
     {"batch": 2, "queries": 192, "key_valid": torch.arange(384).view(2, 192) % 7 < 5}],
    ids=["full", "plain", "softcap", "padded", "holes"],
)  # fmt: skip
def test_what_is_exact_and_what_is_drawn_is_the_definition(options: dict[str, Any]) -> None:
    inputs = make_inputs(query_heads=4, kv_heads=2, head_dim=8, dtype=torch.float64, seed=3, **options)
    pattern = dataclasses.replace(SMALL, seed=5)
    got = run(pattern, inputs)
    for b in range(inputs.batch):
        for h in range(4):
            weight = slow_weights(inputs, b, h, pattern)
            logits = inputs.query[b, h] @ inputs.key[b, h // 2].T * inputs.scale
            if inputs.softcap is not None:
                logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
            numbers = weight * logits.exp()
            real = torch.arange(inputs.queries) if inputs.key_valid is None else inputs.key_valid[b].nonzero()[:, 0]
            torch.testing.assert_close(got.lse[b, h, real].exp(), numbers.sum(1)[real], rtol=1e-9, atol=1e-12)
            output = numbers @ inputs.value[b, h // 2] / numbers.sum(1, keepdim=True)
            torch.testing.assert_close(got.output[b, h, real], output[real], rtol=1e-8, atol=1e-10)


def test_numerator_and_denominator_are_right_in_the_mean() -> None:
    """Over the draws; the exact parts stay what they are."""
    inputs = make_inputs(query_heads=2, kv_heads=1, queries=256, head_dim=8, dtype=torch.float64)
    dense = reference_attention(inputs, None)
    assert dense.output is not None
    sums, tops = [], []
    for seed in range(150):
        found = run(dataclasses.replace(SMALL, seed=seed), inputs)
        sums.append(found.lse.exp())
        tops.append(found.lse.exp()[..., None] * found.output)
    for drawn, want in ((sums, dense.lse.exp()), (tops, dense.lse.exp()[..., None] * dense.output)):
        all_ = torch.stack(drawn)
        error = all_.std(0) / math.sqrt(len(drawn))
        off = (all_.mean(0) - want).abs() / (error + 1e-9)
        assert float((off < 5).double().mean()) > 0.999
        assert abs(float((all_.mean(0) - want).mean())) < 5 * float(error.mean()) / math.sqrt(want.numel() / 32)


def test_a_prefill_costs_less_the_longer_it_is_and_a_draw_is_repeated() -> None:
    shares = []
    for queries in (128, 512, 1024):
        inputs = make_inputs(queries=queries, head_dim=8)
        parts = parts_of(SMALL, inputs, BlockGrid.of(inputs, BLOCK, BLOCK))
        for number, part in enumerate(parts):
            part.index.validate(part.inputs, empty_rows=number > 0)
        shares.append(float(parts_coverage(parts).density.mean()))
    assert shares == sorted(shares, reverse=True)
    inputs = make_inputs(queries=300, head_dim=8)
    one, two = (sparse_prefill(inputs, SMALL, block_q=BLOCK, block_k=BLOCK).result.output for _ in range(2))
    other = sparse_prefill(inputs, SMALL.for_layer(1), block_q=BLOCK, block_k=BLOCK).result.output
    assert one is not None
    assert two is not None
    assert other is not None
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_batch_rows_are_themselves() -> None:
    valid = left_padding(200, [0, 75])
    inputs = make_inputs(batch=2, queries=200, head_dim=8, key_valid=valid)
    for tensor in (inputs.query, inputs.key, inputs.value):
        tensor.masked_fill_(~valid[:, None, :, None], 7.0)
    row = dataclasses.replace(
        inputs, **{n: getattr(inputs, n)[1:, :, 75:] for n in ("query", "key", "value")}, key_valid=None
    )
    both, alone = run(SMALL, inputs), run(SMALL, row)
    torch.testing.assert_close(both.output[1:, :, 75:], alone.output)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: HyperAttention(segment=100, block=64), "segment=100 must be two blocks of 64 or more"),
        (lambda: HyperAttention(segment=64, block=64), "segment=64 must be two blocks of 64 or more"),
        (lambda: HyperAttention(bits=0), "bits must be at least 1"),
        (lambda: HyperAttention(bits=31), "bits must be at most 30"),
        (lambda: HyperAttention(seed=-1), "seed must be at least 0"),
        (lambda: run(HyperAttention(segment=80, block=40), make_inputs(queries=90)), "choose a multiple of both"),
        (lambda: run(SMALL, make_inputs(queries=90, window=20)), "halves a prompt that is seen as a whole"),
        (lambda: run(SMALL, make_inputs(queries=90, segment=torch.tensor([[0] * 40 + [1] * 50]))), "run packed"),
        (lambda: run(LastRowsDense(SMALL, 10), make_inputs(queries=200)), "leave out last_rows_dense"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make: Any, said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(said)):
        make()


@pytest.mark.parametrize("padding", [7, 15, 31, 63, 100])
def test_right_padding_changes_nothing(padding: int) -> None:
    inputs = make_inputs(queries=97, head_dim=8, dtype=torch.float64)
    longer = make_inputs(queries=97 + padding, head_dim=8, dtype=torch.float64)
    for name in ("query", "key", "value"):
        getattr(longer, name)[:, :, :97] = getattr(inputs, name)
    valid = (torch.arange(97 + padding) < 97)[None]
    got, want = run(SMALL, dataclasses.replace(longer, key_valid=valid)), run(SMALL, inputs)
    torch.testing.assert_close(got.lse[:, :, :97], want.lse)
    torch.testing.assert_close(got.output[:, :, :97], want.output)


def test_keys_that_end_before_the_queries_are_refused() -> None:
    inputs = make_inputs(queries=100, keys=300, query_start=100, key_length=130)
    with pytest.raises(ValueError, match="130 keys end before query 200"):
        run(SMALL, inputs)


def test_no_mass_is_known_to_be_kept_and_nothing_can_be_guarded() -> None:
    inputs = make_inputs(queries=320, head_dim=8)
    seen = sparse_prefill(inputs, SMALL, block_q=BLOCK, block_k=BLOCK, observe=True)
    assert seen.sampled_mass is None
    assert seen.coverage is not None
    for pattern in (SMALL, LastRowsDense(SMALL, 20), DeltaCorrect(Dense()), BlockSparse(keep=0.2)):
        assert estimates(pattern) == ("HyperAttention" in repr(pattern))
    with pytest.raises(ValueError, match=r"estimates what it leaves out.* leave out min_mass"):
        sparse_prefill(inputs, SMALL, block_q=BLOCK, block_k=BLOCK, guard=Guard(0.9))
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"estimates what it leaves out.* leave out min_mass"):
        patch_model(model, "hyperattention", min_mass=0.9)
    assert model.config._attn_implementation == tiny_model("llama").config._attn_implementation
    with pytest.raises(ValueError, match="leave out min_mass"):
        register("hyperattention", min_mass=0.9)
    assert MethodSpec("hyperattention").estimates
    assert not MethodSpec("delta_correct", {"inner": "stem"}).estimates
