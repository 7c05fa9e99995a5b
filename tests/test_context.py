"""A fixed context and questions: dense where everything is chosen, read-only, kept in folders, refused by name."""

from __future__ import annotations

import itertools
import json
import math
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tokens
from torch import Tensor
from transformers import PreTrainedModel

from sparseprefill import FixedContext, load_context, patch_model, prepare_context
from sparseprefill.context_store import FACTS, TENSORS
from sparseprefill.contracts import AttentionInputs
from sparseprefill.kernels.reference import reference_attention
from sparseprefill.patterns.fixed_context import ContextKeys, ContextLayer, attend_to_context
from sparseprefill.patterns.retrieval import Retrieval
from sparseprefill.patterns.squeezed import STEPS, Squeezed

LENGTH = 300
EVERYTHING: dict[str, dict[str, Any]] = {
    "squeezed": {"density": 1.0, "sink": 8, "local": 40},
    "retrieval": {"keys": LENGTH, "density": None, "sink": 8, "local": 40},
}
SOME: dict[str, dict[str, Any]] = {
    "squeezed": {"density": 0.4, "clusters": 0.2, "sink": 8, "local": 40},
    "hierarchical": {"density": 0.4, "clusters": 0.2, "coarse": 0.05, "sink": 8, "local": 40},
    "retrieval": {"keys": 5, "density": 0.4, "index": "cells", "sink": 8, "local": 40},
    "graph": {"keys": 5, "density": 0.4, "index": "graph", "effort": 12, "sink": 8, "local": 40},
}
NAMES = {"hierarchical": "squeezed", "graph": "retrieval"}


def prepared(model: PreTrainedModel, kind: str, **changes: Any) -> FixedContext:
    options = {**SOME[kind], **changes}
    return prepare_context(model, tokens(1, LENGTH), NAMES.get(kind, kind), progress=False, **options)


def questions() -> list[Tensor]:
    """Of different lengths, the longest of more than a block of queries."""
    return [tokens(1, n, seed=n)[0] for n in (5, 70, 1, 33)]


@torch.no_grad()
def logits_of(model: PreTrainedModel, context: FixedContext, rows: list[Tensor]) -> Tensor:
    """Of the question tokens and of two more, which are decoded."""
    inputs = context.inputs(rows)
    ids, mask, cache = inputs["input_ids"], inputs["attention_mask"], inputs["past_key_values"]
    place = (mask.cumsum(1) - 1).clamp(min=0)
    found = [
        model(
            input_ids=ids[:, LENGTH:], attention_mask=mask, position_ids=place[:, LENGTH:], past_key_values=cache
        ).logits
    ]
    for step in range(2):
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        ids = torch.full((len(rows), 1), 7 + step)
        position = mask.sum(1, keepdim=True) - 1
        found.append(model(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache).logits)
    return torch.cat(found, 1)


@torch.no_grad()
def dense_logits(model: PreTrainedModel, rows: list[Tensor]) -> list[Tensor]:
    """Each question alone behind the whole context, without any cache."""
    more = torch.tensor([7, 8])
    return [model(input_ids=torch.cat([tokens(1, LENGTH)[0], row, more])[None]).logits[0, LENGTH:] for row in rows]


def assert_dense(found: Tensor, model: PreTrainedModel, rows: list[Tensor]) -> None:
    """error <= 2 * (error of the eager model in float32 + eps * max), against the eager model in float64."""
    plain = dense_logits(model, rows)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the fast one takes no float64
    exact = dense_logits(model.double(), rows)
    model.float()
    eps = torch.finfo(torch.float32).eps
    for own, low, want in zip(found, plain, exact, strict=True):
        budget = 2 * ((low - want).abs().max() + eps * want.abs().max()) + 64 * eps * want.abs().max()
        assert (own[len(own) - len(want) :] - want).abs().max() <= budget


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss", "llama4_text", "deepseek_v3", "mistral"])
@pytest.mark.parametrize("method", EVERYTHING)
def test_everything_is_dense(family: str, method: str) -> None:
    # Llama 4 scales queries by their slot, padding counted
    model = tiny_model(family, **({"attn_temperature_tuning": False} if family == "llama4_text" else {}))
    context = prepare_context(model, tokens(1, LENGTH), method, progress=False, **EVERYTHING[method])
    rows = questions()
    with patch_model(model, method, context=context) as patch:
        found = logits_of(model, context, rows)
        report = patch.report()
    assert_dense(found, model, rows)
    assert report.context_share in (None, pytest.approx(1.0))  # None: every layer is local
    assert report.kept_mass in (None, pytest.approx(1.0, abs=1e-5))
    assert not report.previous_calls


@pytest.mark.parametrize("kind", SOME)
def test_a_saved_context_answers_as_the_one_that_was_saved(kind: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    context = prepared(model, kind)
    context.save(tmp_path / "context")
    again = load_context(tmp_path / "context", model, tokens(1, LENGTH))
    assert again.digests() == context.digests()
    rows = questions()
    found = []
    for each in (context, again):
        with patch_model(model, context=each) as patch:
            found.append(logits_of(model, each, rows))
            share = patch.report().context_share
        assert share is not None
        assert 48 / LENGTH < share < 0.75
    assert torch.equal(*found)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("store", [None, "cpu"])
@pytest.mark.parametrize("kind", SOME)
def test_a_gpu_answers_as_the_cpu_does(kind: str, store: str | None) -> None:
    rows, found = questions(), []
    for device in ("cpu", "cuda"):
        model = tiny_model("llama").to(device)  # type: ignore[arg-type]
        context = prepared(model, kind, store=store if device == "cuda" else None)
        for access in ("tokens", "tiles"):
            with context.patch(model, access=access):
                inputs = context.inputs(rows)
                ids = inputs.pop("input_ids")
                found.append(model(input_ids=ids[:, LENGTH:], **inputs).logits[:, -1].float().cpu())
    torch.testing.assert_close(found[2], found[0], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(found[3], found[1], atol=2e-3, rtol=2e-3)


def test_a_stock_model_reads_the_same_cache_densely() -> None:
    model = tiny_model("llama")
    context = prepared(model, "squeezed")
    assert_dense(logits_of(model, context, questions()), model, questions())


@pytest.mark.parametrize("kind", SOME)
def test_a_batch_answers_as_each_question_alone(kind: str) -> None:
    model = tiny_model("llama")
    context = prepared(model, kind)
    together = context.generate(questions(), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert together.shape == (4, 74)
    for row, own in zip(questions(), together, strict=True):
        alone = context.generate(row, max_new_tokens=4, do_sample=False, eos_token_id=None)[0]
        assert torch.equal(alone, own[len(own) - len(alone) :])
        assert torch.equal(alone[: len(row)], row)


def test_ordinary_generate_of_a_patched_model_gives_the_same() -> None:
    model = tiny_model("llama")
    context = prepared(model, "squeezed")
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    own = context.generate(questions(), **settings)
    with patch_model(model, method="squeezed", context=context):
        whole = model.generate(**context.inputs(questions()), **settings)  # type: ignore[operator]
        inside = context.generate(questions(), **settings)
    assert torch.equal(whole[:, LENGTH:], own)
    assert torch.equal(inside, own)


def test_two_threads_may_generate_at_a_time() -> None:
    model = tiny_model("llama")
    context = prepared(model, "squeezed")
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = [context.generate(row, **settings) for row in questions()]
    found: dict[int, Tensor] = {}

    def ask(number: int) -> None:
        found[number] = context.generate(questions()[number], **settings)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], want) for number, want in enumerate(expected))
    assert not hasattr(model.get_submodule("model.layers.0.self_attn"), "_sparseprefill")


def test_beams_share_the_context() -> None:
    model = tiny_model("llama")
    context = prepare_context(model, tokens(1, LENGTH), "squeezed", progress=False, **EVERYTHING["squeezed"])
    settings: dict[str, Any] = {"max_new_tokens": 3, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    row = questions()[1]
    dense = model.generate(torch.cat([tokens(1, LENGTH)[0], row])[None], **settings)  # type: ignore[operator]
    assert torch.equal(context.generate(row, **settings), dense[:, LENGTH:])


@pytest.mark.parametrize("kind", SOME)
def test_nothing_of_a_context_is_ever_changed(kind: str) -> None:
    model = tiny_model("llama")
    context = prepared(model, kind)
    before = context.digests()
    context.generate(questions(), max_new_tokens=3)
    context.generate(questions()[0], max_new_tokens=3, num_beams=2)

    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    with patch_model(model, context=context):
        hook = model.get_submodule("model.layers.1.mlp").register_forward_hook(broken)
        with pytest.raises(KeyboardInterrupt):
            logits_of(model, context, questions())
        hook.remove()
        expected = logits_of(model, context, questions())
        found: list[Any] = []

        def ask(rows: list[Tensor]) -> None:
            found.append((rows, logits_of(model, context, rows)))

        threads = [threading.Thread(target=ask, args=([row],)) for row in questions()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 4
    for (row,), own in found:
        place = [len(each) for each in questions()].index(len(row))
        torch.testing.assert_close(own[0], expected[place][-len(own[0]) :], atol=2e-4, rtol=1e-4)
    assert context.digests() == before


def test_a_cache_of_two_threads_has_tails_of_its_own() -> None:
    context = prepared(tiny_model("llama"), "squeezed")
    first, second = context.cache(), context.cache()
    assert first.get_seq_length() == second.get_seq_length() == LENGTH
    with pytest.raises(ValueError, match="read-only"):
        first.crop(-1)
    key = torch.zeros(1, 2, 3, 16)
    for number in range(3):
        first.update(key, key, number)
    assert (first.get_seq_length(), second.get_seq_length()) == (LENGTH + 3, LENGTH)
    first.crop(-2)
    assert first.get_seq_length() == LENGTH + 1
    with pytest.raises(ValueError, match="read-only"):
        first.crop(-2)
    assert first.get_seq_length() == LENGTH + 1
    with pytest.raises(ValueError, match="belongs to 1 questions"):
        first.update(key.expand(2, -1, -1, -1), key.expand(2, -1, -1, -1), 0)
    first.reset()
    assert first.get_seq_length() == LENGTH
    with pytest.raises(ValueError, match="prepared in"):
        first.update(key.double(), key.double(), 0)


@pytest.mark.parametrize("access", ["tokens", "tiles"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("kind", SOME)
def test_attention_is_exact_over_what_was_chosen(kind: str, softcap: float | None, access: str) -> None:
    """Against the oracle on a mask, in float64: context keys that were chosen, and the tail causally."""
    layer, query, tail, key, value = made_layer(kind, softcap)
    lead = (0, 15)  # padding of each question
    result, counts = attend_to_context(layer, query, tail, block_q=16, access=access, block_k=16)
    chosen = made_choice(layer, query, tail, access)
    size = 16
    for b in range(2):
        for i in range(query.shape[2]):
            if not bool(tail.key_valid[b, tail.query_start + i]):  # type: ignore[index]
                continue
            for head in range(4):
                own = chosen[head // 2, b * math.ceil(query.shape[2] / size) + (i - lead[b]) // size]
                seen = tail.key_valid[b].clone()  # type: ignore[index]
                seen[tail.query_start + i + 1 :] = False
                keys = torch.cat([key[head // 2][own], tail.key[b, head // 2][seen]])
                values = torch.cat([value[head // 2][own], tail.value[b, head // 2][seen]])
                alone = AttentionInputs(
                    query[b, head, i][None, None, None].double(), keys[None, None].double(),
                    values[None, None].double(), scale=tail.scale, softcap=softcap, query_start=len(keys) - 1,
                )  # fmt: skip
                exact = reference_attention(alone, None)
                assert exact.output is not None
                assert result.output is not None
                torch.testing.assert_close(
                    result.output[b, head, i].double(), exact.output[0, 0, 0], atol=1e-5, rtol=1e-4
                )
                torch.testing.assert_close(result.lse[b, head, i].double(), exact.lse[0, 0, 0], atol=1e-5, rtol=1e-5)
    assert int(counts.visible) == int(tail.key_valid[:, tail.query_start :].sum()) * layer.length  # type: ignore[index]


def made_layer(kind: str, softcap: float | None) -> tuple[ContextLayer, Tensor, AttentionInputs, Tensor, Tensor]:
    """A layer of random keys, two questions of 40 tokens (one with padding) and a tail of 50."""
    draw = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    key, value, queries = 2 * normal(2, 200, 16), normal(2, 200, 12), normal(4, 200, 16)
    sink, local = 8, 40
    options = {**SOME[kind], "sink": sink, "local": local}
    method = Squeezed(**options) if NAMES.get(kind, kind) == "squeezed" else Retrieval(**options)
    edge = torch.cat([key[:, :sink], key[:, -local:]], 1)
    index = method.index_layer(ContextKeys(key[:, sink:-local], edge, queries, queries[:, -local:], 0.25, softcap))
    method.calibrate([index], 200)
    layer = ContextLayer.of(key, value, sink, local, index)
    query = normal(2, 4, 40, 16)
    valid = torch.ones(2, 50, dtype=torch.bool)
    valid[1, :25] = False
    tail = AttentionInputs(
        query, normal(2, 2, 50, 16), normal(2, 2, 50, 12), scale=0.25, softcap=softcap, key_valid=valid, query_start=10
    )
    return layer, query, tail, key, value


def made_choice(layer: ContextLayer, query: Tensor, tail: AttentionInputs, access: str) -> Tensor:
    """bool [kv_heads, batch * blocks, length] in the order of the tokens, by the index itself."""
    seen: list[Tensor] = []
    choose = layer.index.choose  # type: ignore[union-attr]

    class Spy:
        order = layer.order

        def choose(self, *given: Tensor) -> Tensor:
            seen.append(choose(*given))
            return seen[-1]

    spied = ContextLayer(layer.edge_key, layer.edge_value, layer.key, layer.value, layer.sink, layer.order, Spy())
    attend_to_context(spied, query, tail, block_q=16, access="tokens", block_k=16)
    marked = seen[0]
    if access == "tiles":
        middle = marked.shape[-1]
        tiles = torch.nn.functional.pad(marked, (0, -middle % 16)).unflatten(-1, (-1, 16)).any(-1)
        marked = tiles.repeat_interleave(16, -1)[..., :middle]
    chosen = torch.ones(2, marked.shape[1], layer.length, dtype=torch.bool)
    own = torch.zeros_like(marked).scatter_(2, layer.order[:, None].expand_as(marked), marked)
    chosen[:, :, layer.sink : layer.sink + own.shape[2]] = own
    return chosen


class TestSqueezed:
    """The selection, against a slow reading of its definition."""

    @pytest.mark.parametrize("even", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("reduce", ["max", "mean"])
    @pytest.mark.parametrize("kind", ["squeezed", "hierarchical"])
    def test_choice_is_that_of_the_definition(self, kind: str, reduce: str, even: float) -> None:
        draw = torch.Generator().manual_seed(2)
        key, queries = 2 * torch.randn(2, 150, 16, generator=draw), torch.randn(4, 198, 16, generator=draw)
        edge = torch.randn(2, 48, 16, generator=draw)
        method = Squeezed(**{**SOME[kind], "reduce": reduce, "even": even})
        index = method.index_layer(ContextKeys(key, edge, queries, queries[:, -40:], 0.25, None))
        method.calibrate([index], 198)
        clusters = index.fine
        assert index.thresholds is not None
        query = torch.randn(2, 3, 14, 16, generator=draw)  # 7 queries of 2 heads
        real = torch.ones(3, 14, dtype=torch.bool)
        real[1, 4:7] = real[1, 11:] = False
        count = torch.tensor([7, 4, 7])
        edge_lse = (torch.einsum("hbrd,hkd->hbrk", query, edge) * 0.25).logsumexp(-1)
        found = index.choose(query, real, count, edge_lse)
        assert (found.sum(-1) > 0).any()
        assert not found.all()
        owner = [torch.repeat_interleave(torch.arange(len(size)), size) for size in clusters.size]
        lonely = 0
        for head in range(2):
            for block in range(3):
                step = next(n for n, size in enumerate(STEPS) if size >= count[block])
                rows = query[head, block][real[block]].double()
                z = rows @ clusters.centroid[head].double().T * 0.25
                others = edge_lse[head, block][real[block]].double().exp()
                if clusters.coarse is None:
                    total = (z.exp() * clusters.size[head]).sum(-1) + others
                    allowed = torch.ones(len(clusters.size[head]), dtype=torch.bool)
                else:
                    wide = rows @ clusters.coarse[head].double().T * 0.25
                    total = (wide.exp() * clusters.coarse_size[head]).sum(-1) + others
                    share = wide.exp() / total[:, None]
                    score = share.amax(0) if reduce == "max" else share.mean(0)
                    allowed = (score > index.thresholds[1][step].exp())[clusters.parent[head]]  # type: ignore[index]
                share = z.exp() / total[:, None]
                score = share.amax(0) if reduce == "max" else share.mean(0)
                allowed &= clusters.size[head] > 0
                wanted = (score > index.thresholds[0][step].exp()) & allowed
                room = even * (0.4 * 198 - 48)  # keys
                for best in score.masked_fill(~allowed, -1).argsort(descending=True).tolist():
                    room -= int(clusters.size[head][best])
                    if room < -1e-6 or not allowed[best]:
                        break
                    lonely += not wanted[best]
                    wanted[best] = True
                assert torch.equal(found[head, block], wanted[owner[head]])
        assert (lonely > 0) == (even == 1.0), "some are there for what is even alone"

    def test_centroids_are_means_of_their_keys_as_they_are(self) -> None:
        key = torch.randn(2, 150, 16, generator=torch.Generator().manual_seed(3)) * torch.linspace(1, 9, 150)[:, None]
        method = Squeezed(**SOME["hierarchical"])
        index = method.index_layer(
            ContextKeys(key, key[:, :9], key.repeat(2, 1, 1), key.repeat(2, 1, 1)[:, -40:], 1.0, None)
        )
        clusters = index.fine
        for head in range(2):
            assert sorted(index.order[head].tolist()) == list(range(150))
            edges = [0, *clusters.size[head].cumsum(0).tolist()]
            for place, (start, stop) in enumerate(itertools.pairwise(edges)):
                if stop > start:
                    mean = key[head, index.order[head, start:stop]].mean(0)
                    torch.testing.assert_close(clusters.centroid[head, place], mean)
            parent = clusters.parent[head][clusters.size[head] > 0]  # type: ignore[index]
            assert bool((parent.diff() >= 0).all()), "clusters of one coarse cluster lie together"

    def test_density_is_met_on_the_held_out_queries(self) -> None:
        draw = torch.Generator().manual_seed(4)
        indexes, method = [], Squeezed(density=0.3, clusters=0.25, sink=8, local=64)
        query = torch.randn(4, 64, 16, generator=draw)
        for _ in range(3):
            key, edge = torch.randn(2, 800, 16, generator=draw), torch.randn(2, 72, 16, generator=draw)
            indexes.append((method.index_layer(ContextKeys(key, edge, query, query, 0.25, None)), edge))
        method.calibrate([index for index, _ in indexes], 872)
        for step in (1, 8, 64):
            chosen = []
            for index, edge in indexes:
                rows = query.unflatten(0, (2, 2)).unflatten(2, (64 // step, step)).transpose(1, 2).flatten(2, 3)
                edge_lse = (torch.einsum("hbrd,hkd->hbrk", rows, edge) * 0.25).logsumexp(-1)
                real, count = torch.ones(rows.shape[1:3], dtype=torch.bool), torch.full((rows.shape[1],), step)
                chosen.append(index.choose(rows, real, count, edge_lse).float().mean())
            share = (sum(map(float, chosen)) / 3 * 800 + 72) / 872
            assert abs(share - 0.3) < 0.02, (step, share)

    def test_duplicate_keys_leave_no_empty_cluster_that_is_chosen(self) -> None:
        key = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(5)).repeat(1, 40, 1)
        method = Squeezed(density=0.5, clusters=0.2, sink=8, local=40)
        query = torch.randn(4, 40, 16, generator=torch.Generator().manual_seed(6))
        index = method.index_layer(ContextKeys(key, key[:, :48], query, query, 0.25, None))
        method.calibrate([index], 248)
        assert index.fine.size.shape[1] < 40, "of five different keys there are not forty clusters"
        assert bool((index.fine.size.sum(1) == 200).all())
        found = index.choose(
            query[:2, None], torch.ones(1, 40, dtype=torch.bool), torch.tensor([40]), torch.zeros(2, 1, 40)
        )
        assert found.shape == (2, 1, 200)


BAD_OPTIONS = [
    ("squeezed", {"density": 0.0}, "density must be in"), ("squeezed", {"density": 0.1}, "leaves nothing"),
    ("squeezed", {"clusters": 1.5}, "clusters must be in"), ("squeezed", {"coarse": 0.5}, "fewer than clusters"),
    ("squeezed", {"reduce": "sum"}, "'max' or 'mean'"), ("squeezed", {"backend": "cuml"}, "backend is one of"),
    ("squeezed", {"sink": -1}, "sink must be at least 0"), ("squeezed", {"local": 0}, "local must be at least 1"),
    ("squeezed", {"local": 400}, "no longer than its sink"), ("squeezed", {"cluster": 0.1}, "Did you mean 'clusters'"),
    ("retrieval", {"index": "lsh"}, "index is one of"), ("retrieval", {"keys": 0}, "keys must be at least 1"),
    ("retrieval", {"density": 0.1}, "leaves nothing"), ("retrieval", {"effort": 0}, "effort must be at least 1"),
    ("squeezd", {}, "Did you mean 'squeezed'"),
]  # fmt: skip


class TestRefusals:
    """What cannot be done is said before anything is done."""

    @pytest.mark.parametrize(("method", "options", "message"), BAD_OPTIONS)
    def test_options(self, method: str, options: dict[str, Any], message: str) -> None:
        model = tiny_model("llama")
        given = {**({"sink": 8, "local": 40} if method in EVERYTHING else {}), **options}
        with pytest.raises(ValueError, match=message):
            prepare_context(model, tokens(1, LENGTH), method, progress=False, **given)

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            (tokens(2, 300), "one row of tokens"), (tokens(1, 40), "at least 64 tokens"),
            (tokens(1, 2048), "leaves no room"), (torch.zeros(1, 300), "whole numbers"),
            (tokens(1, 0), "one row of tokens"),
        ],
    )  # fmt: skip
    def test_contexts(self, ids: Tensor, message: str) -> None:
        with pytest.raises((TypeError, ValueError), match=message):
            prepare_context(tiny_model("llama"), ids, "squeezed", progress=False, density=1.0, sink=4, local=8)

    def test_models_that_keep_something_else(self) -> None:
        for family in ("qwen3_next", "lfm2"):
            model = tiny_model(family)
            with pytest.raises(NotImplementedError):
                prepare_context(model, tokens(1, LENGTH), "squeezed", progress=False, **SOME["squeezed"])
            assert model(tokens(1, 10)).logits.isfinite().all()  # as it was

    def test_questions(self) -> None:
        model = tiny_model("llama")
        context = prepared(model, "squeezed")
        for questions, message in (
            (tokens(1, 1748), "does not fit"), ([], "one row of tokens"), (torch.zeros(3), "whole numbers"),
            ([tokens(1, 4)[0], tokens(1, 0)[0]], "one row of tokens"),
        ):  # fmt: skip
            with pytest.raises((TypeError, ValueError), match=message):
                context.inputs(questions)
        with pytest.raises(ValueError, match="do not fit"):
            context.generate(tokens(1, 1740), max_new_tokens=20)
        with pytest.raises(ValueError, match="takes no past_key_values"):
            context.generate(tokens(1, 4), past_key_values=context.cache())
        with pytest.raises(ValueError, match="of the questions' shape"):
            context.inputs(tokens(2, 4), torch.ones(2, 5))

    def test_patched_models(self) -> None:
        model = tiny_model("llama")
        context = prepared(model, "squeezed")
        with pytest.raises(ValueError, match="prepared for the method 'squeezed'"):
            patch_model(model, "retrieval", context=context)
        with pytest.raises(ValueError, match="min_mass, block_q"):
            patch_model(model, context=context, min_mass=0.9, block_q=32)
        with pytest.raises(ValueError, match="fixed context"):
            patch_model(model, "squeezed", density=0.3)
        with pytest.raises(ValueError, match="prepared with another model"):
            patch_model(tiny_model("llama", seed=1), context=context)
        with patch_model(tiny_model("llama"), context=context):  # the same weights elsewhere will do
            pass
        with patch_model(model, context=context):
            with pytest.raises(ValueError, match="called without it"):
                model(tokens(1, 20))
            hidden = context.inputs(tokens(1, 20))
            hidden["attention_mask"][0, 5] = 0
            with pytest.raises(ValueError, match="hides a part of the context"):
                model.generate(**hidden, max_new_tokens=1)  # type: ignore[operator]
        assert not hasattr(model.get_submodule("model.layers.0.self_attn"), "_sparseprefill")
        assert not model.get_submodule("model.layers.0.self_attn")._forward_pre_hooks

    def test_another_context_of_the_same_model(self) -> None:
        model = tiny_model("llama")
        context, other = (
            prepare_context(model, tokens(1, n), "squeezed", progress=False, **SOME["squeezed"]) for n in (300, 310)
        )
        with patch_model(model, context=context), pytest.raises(ValueError, match="another context"):
            model(tokens(1, 70), past_key_values=other.cache())
        sparse = prepared(model, "squeezed", prefill="a_shape")
        assert sparse.key != prepared(model, "squeezed").key, "other keys and values"


class TestFolders:
    """What was saved is whole and belongs to the model, or is refused; what stood there is never lost."""

    def test_refused_folders(self, tmp_path: Path) -> None:
        model = tiny_model("llama")
        context = prepared(model, "squeezed")
        place = tmp_path / "context"
        context.save(place)
        with pytest.raises(FileExistsError, match="overwrite"):
            context.save(place)
        context.save(place, overwrite=True)
        (place / "notes.txt").write_text("mine")
        with pytest.raises(ValueError, match="something else"):
            context.save(place, overwrite=True)
        (place / "notes.txt").unlink()
        with pytest.raises(FileNotFoundError, match="make it first"):
            context.save(tmp_path / "none" / "context")
        with pytest.raises(ValueError, match="another model"):
            load_context(place, tiny_model("llama", seed=1))
        with pytest.raises(ValueError, match="another model"):
            load_context(place, tiny_model("llama").bfloat16())
        with pytest.raises(ValueError, match="other tokens"):
            load_context(place, model, tokens(1, LENGTH, seed=1))
        with pytest.raises(FileNotFoundError):
            load_context(tmp_path / "elsewhere", model)
        assert sorted(each.name for each in tmp_path.iterdir()) == ["context"]
        place.rename(tmp_path / ".context.0123.old")  # as a machine that stops between two renames leaves it
        with pytest.raises(FileNotFoundError, match=r"context\.0123\.old; rename it"):
            load_context(place, model)

    @pytest.mark.parametrize(
        "damage", ["a bit", "cut", "no tensors", "format", "method", "fewer layers", "no json", "threshold"]
    )
    def test_damaged_folders(self, damage: str, tmp_path: Path) -> None:
        model = tiny_model("llama")
        place = tmp_path / "context"
        prepared(model, "squeezed").save(place)
        path, facts = place / TENSORS, json.loads((place / FACTS).read_text())
        data = bytearray(path.read_bytes())
        match damage:
            case "a bit":
                data[-100] ^= 1
            case "cut":
                del data[len(data) // 2 :]
            case "format":
                facts["format"] = 2
            case "method":
                facts["method"] = "unknown"
            case "fewer layers":
                facts["layers"] = 9
            case "threshold":
                facts["scales"] = 3
        path.write_bytes(data)
        (place / FACTS).write_text(json.dumps(facts) if damage != "no json" else "{")
        if damage == "no tensors":
            path.unlink()
        with pytest.raises(
            (ValueError, FileNotFoundError), match=r"prepare it again|damaged|not known here|not a JSON"
        ):
            load_context(place, model)

    def test_a_disk_that_fills_loses_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_model("llama")
        context = prepared(model, "squeezed")
        place = tmp_path / "context"
        context.save(place)
        before = {each.name: each.read_bytes() for each in place.iterdir()}

        def full(handle: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="unchanged"):
            context.save(place, overwrite=True)
        assert {each.name: each.read_bytes() for each in place.iterdir()} == before
        assert sorted(each.name for each in tmp_path.iterdir()) == ["context"]

    def test_methods_of_ones_own_are_not_saved(self, tmp_path: Path) -> None:
        model = tiny_model("llama")
        context = prepare_context(model, tokens(1, LENGTH), Squeezed(**SOME["squeezed"]), progress=False)
        with pytest.raises(ValueError, match="can be saved"):
            context.save(tmp_path / "context")
