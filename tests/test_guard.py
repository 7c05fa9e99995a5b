"""The guard: what keeps too little is found on sampled rows and runs again; what keeps enough is not touched."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparseprefill import patch_model, register
from sparseprefill.contracts import AttentionInputs, AttentionOutput, BlockGrid, BlockIndex
from sparseprefill.evals import guard as evals
from sparseprefill.evals.loading import load_model
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.evals.needle_tasks import NeedlesAlong
from sparseprefill.evals.runner import run_eval
from sparseprefill.guard import Guard, check, fails, guarded, sampled_rows
from sparseprefill.huggingface_masks import NAME
from sparseprefill.kernels import block_sparse_attention
from sparseprefill.kernels.reference import reference_attention
from sparseprefill.patterns import AShape, Dense, LastRowsDense, PerHead
from sparseprefill.prefill import Prefill, keeps_everything, sparse_prefill
from support import assert_within_budget, left_padding, make_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCKS = {"block_q": 16, "block_k": 16, "min_length": 0}
TRITON = pytest.mark.skipif(sys.platform != "linux", reason="triton is published for Linux only")


@dataclass(frozen=True)
class Planted:
    """All but one early block for good heads, the diagonal alone for bad ones, (batch row, head) each."""

    bad: tuple[tuple[int, int], ...]
    since: int = 0  # first row of the grid that is bad

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        visible = grid.visible_block_mask(inputs)[:, None].expand(-1, inputs.query_heads, -1, -1)
        _, high = grid.visible_blocks(inputs)
        own = torch.arange(grid.key_blocks, device=inputs.device) >= (high - 1)[:, None, :, None]
        own = (own & visible).expand_as(visible)
        mask = visible.clone()
        mask[..., 1] = own[..., 1]
        for b, h in self.bad:
            mask[b, h, self.since :] = own[b, h, self.since :]
        return BlockIndex.from_mask(grid, mask)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "groups-of-4": {"kv_heads": 1},
    "chunk-inside-a-block": {"queries": 150, "keys": 230},
    "left-padding": {"key_valid": left_padding(200, [0, 70])},
    "right-padding": {"key_valid": left_padding(200, [0, 70]).flip(1)},
    "second-turn-with-holes": {
        "queries": 120, "keys": 230, "key_valid": left_padding(230, [0, 30]) & ~left_padding(230, [100, 95]) | (
            left_padding(230, [110, 140])
        ),
    },
    "static-cache": {"queries": 120, "keys": 300, "query_start": 64, "key_length": 184},
    "sinks": {"sinks": torch.tensor([-1.0, 0.0, 2.0, 30.0])},
    "softcap": {"softcap": 2.0},
    "value-dim-48": {"value_dim": 48},
    "bfloat16": {"dtype": torch.bfloat16},
    "packed": {"segment": torch.repeat_interleave(torch.arange(2), 100).expand(2, -1)},
    "everything": {
        "queries": 120, "keys": 230, "key_valid": left_padding(230, [0, 30]), "softcap": 4.0, "value_dim": 16,
        "sinks": torch.tensor([0.5, -2.0, 1.0, 0.0]),
    },
}  # fmt: skip


def inputs_of(name: str) -> AttentionInputs:
    fields = {"batch": 2, "queries": 200, "device": DEVICE, **CASES[name]}
    return make_inputs(**{k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in fields.items()})


def on(inputs: AttentionInputs, device: str) -> AttentionInputs:
    fields = {f.name: getattr(inputs, f.name) for f in dataclasses.fields(inputs)}
    return AttentionInputs(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in fields.items()})


def true_mass(inputs: AttentionInputs, index: BlockIndex) -> Tensor:
    """float64 [batch, query_heads, queries] from the oracle."""
    return (reference_attention(inputs, index).lse - reference_attention(inputs).lse).exp()


def run(inputs: AttentionInputs, pattern: Any, guard: Guard | None, impl: str = "auto", **more: Any) -> Prefill:
    return sparse_prefill(inputs, pattern, block_q=16, block_k=16, impl=impl, observe=True, guard=guard, **more)


def some(result: AttentionOutput, b: int, h: int) -> AttentionOutput:
    assert result.output is not None
    return AttentionOutput(result.output[b : b + 1, h : h + 1], result.lse[b : b + 1, h : h + 1])


def row_alone(inputs: AttentionInputs, b: int, heads: list[int]) -> AttentionInputs:
    cut = {
        name: None if getattr(inputs, name) is None else getattr(inputs, name)[b : b + 1]
        for name in ("query", "key", "value", "key_valid", "segment")
    }
    return dataclasses.replace(inputs, **cut).select_heads(heads)


class TestRunningAgain:
    @pytest.mark.parametrize("impl", ["auto", "reference"])
    @pytest.mark.parametrize("name", CASES)
    def test_a_planted_head_becomes_dense_and_the_others_keep_their_bits(self, name: str, impl: str) -> None:
        inputs, bad = inputs_of(name), (1, 2)
        pattern = Planted((bad,))
        unguarded = run(inputs, pattern, None, impl)
        mass = check(inputs, unguarded.result.lse, Guard(0.5)).mass.mean(2)
        good = torch.ones(2, 4, dtype=torch.bool, device=DEVICE)
        good[bad] = False
        floor = float((mass[bad] + mass[good].min()) / 2)
        assert mass[bad] < floor < mass[good].min(), "the planted head must stand out"
        result = run(inputs, pattern, Guard(floor), impl)
        assert result.guarded is not None
        assert torch.equal(result.guarded.check.failed, ~good)
        for b in range(2):
            for h in range(4):
                if good[b, h]:
                    assert torch.equal(result.result.output[b, h], unguarded.result.output[b, h])
                    assert torch.equal(result.result.lse[b, h], unguarded.result.lse[b, h])
        if impl == "reference":
            exact = reference_attention(inputs)
            assert torch.equal(result.result.output[bad], exact.output[bad])
        else:
            assert_within_budget(some(result.result, *bad), row_alone(inputs, bad[0], [bad[1]]), None)
        dense = BlockIndex.dense(inputs, result.index.grid).to_mask()
        result.index.validate(inputs)
        assert torch.equal(result.index.to_mask()[bad], dense[bad])
        assert torch.equal(result.index.to_mask()[good], unguarded.index.to_mask()[good])
        assert result.coverage.kept[2] > unguarded.coverage.kept[2]
        assert torch.equal(result.coverage.kept[:2], unguarded.coverage.kept[:2])

    @TRITON
    def test_triton_decides_and_runs_as_the_cpu_does(self) -> None:
        """On a GPU where there is one, else in the interpreter, which wants it small."""
        inputs = make_inputs(
            batch=2, query_heads=2, queries=50, keys=90, key_valid=left_padding(90, [0, 50]), softcap=4.0, value_dim=16,
            sinks=torch.tensor([0.5, -2.0]),
        )  # fmt: skip
        moved = on(inputs, DEVICE)
        pattern = Planted(((0, 1),))
        guard = Guard(0.6, rows=16)
        here, there = run(inputs, pattern, guard, "cpu"), run(moved, pattern, guard, "triton")
        assert here.guarded.check.failed.nonzero().tolist() == [[0, 1]]
        assert torch.equal(there.guarded.check.failed.cpu(), here.guarded.check.failed)
        assert torch.equal(there.index.to_mask().cpu(), here.index.to_mask())
        assert_within_budget(there.result, moved, there.index)
        unguarded = run(moved, pattern, None, "triton").result
        for b, h in ((0, 0), (1, 0), (1, 1)):
            assert torch.equal(there.result.output[b, h], unguarded.output[b, h])
            assert torch.equal(there.result.lse[b, h], unguarded.lse[b, h])

    @pytest.mark.parametrize("name", ["plain", "everything", "second-turn-with-holes"])
    def test_a_floor_of_1_is_dense_attention(self, name: str) -> None:
        inputs = inputs_of(name)
        result = run(inputs, AShape(sink=16, window=32), Guard(1.0))
        assert_within_budget(result.result, inputs, None)
        assert torch.equal(result.index.to_mask(), BlockIndex.dense(inputs, result.index.grid).to_mask())

    def test_a_floor_near_0_changes_no_bit(self) -> None:
        inputs = inputs_of("everything")
        plain, watched = (run(inputs, AShape(sink=16, window=32), g) for g in (None, Guard(1e-9)))
        assert torch.equal(plain.result.output, watched.result.output)
        assert torch.equal(plain.result.lse, watched.result.lse)
        assert watched.index.columns is not None
        assert not watched.guarded.check.failed.any()

    def test_a_nan_fails(self) -> None:
        guard = Guard(0.5, rows=2, last=1)
        mass = torch.tensor([[0.9, torch.nan, 0.9], [0.9, 0.9, torch.nan], [0.9, 0.9, 0.9]])
        assert fails(mass, torch.ones(3, 3, dtype=torch.bool), guard).tolist() == [True, True, False]
        inputs = inputs_of("plain")
        lse = block_sparse_attention(inputs, BlockIndex.dense(inputs, BlockGrid.of(inputs, 16, 16))).lse
        inputs.key[1, 0, 3] = torch.nan
        assert check(inputs, lse, guard).failed.tolist() == [[False] * 4, [True, True, False, False]]

    def test_the_last_rows_and_the_drawn_ones_are_judged_apart(self) -> None:
        guard = Guard(0.9, rows=4, last=2)
        mass = torch.tensor([[1, 1, 1, 1, 0.9, 0.8], [1, 1, 1, 0.5, 1, 1], [1, 1, 1, 0.7, 1, 0.9]])
        real = torch.ones(3, 6, dtype=torch.bool)
        assert fails(mass, real, guard).tolist() == [True, True, False]
        assert fails(mass, real & (mass == 1), guard).tolist() == [False] * 3, "what is not there is not judged"
        assert not fails(mass, real & False, Guard(1.0, rows=4, last=2)).any()

    @pytest.mark.parametrize("pattern", [Dense(), PerHead((Dense(),) * 4), LastRowsDense(Dense(), 8)], ids=str)
    def test_what_computes_everything_is_not_guarded(self, pattern: Any) -> None:
        assert keeps_everything(pattern)
        assert run(inputs_of("plain"), pattern, Guard(1.0)).guarded is None
        assert not keeps_everything(PerHead((Dense(), AShape(16, 16))))

    def test_the_last_rows_alone_are_enough_to_fail(self) -> None:
        """200 tokens: 13 rows of the grid, of which the last holds the last 8 queries; draws see it a few times."""
        inputs = make_inputs(queries=208, batch=2, device=DEVICE)
        late = Planted(((0, 1),), since=12)
        result = run(inputs, late, Guard(0.6))
        assert result.guarded.check.failed.nonzero().tolist() == [[0, 1]]


class TestSampling:
    def test_one_row_of_each_stratum_and_the_last_ones(self) -> None:
        inputs = make_inputs(queries=1000, batch=2, device=DEVICE)
        place, real = sampled_rows(inputs, Guard(0.9, rows=50, last=16))
        assert real.all()
        assert torch.equal(place[0], place[1])
        assert (place[0, :50] // 20).tolist() == list(range(50))
        assert place[0, 50:].tolist() == list(range(984, 1000))

    @pytest.mark.parametrize("name", CASES)
    def test_rows_are_valid_queries_and_the_same_alone(self, name: str) -> None:
        inputs, guard = inputs_of(name), Guard(0.9, rows=20, last=5)
        place, real = sampled_rows(inputs, guard, "3/1")
        for b in range(2):
            valid = torch.ones(inputs.queries, dtype=torch.bool, device=DEVICE)
            if inputs.key_valid is not None:
                valid = inputs.key_valid[b, inputs.query_start : inputs.query_start + inputs.queries]
            assert valid[place[b]].all()
            assert place[b, 20:].tolist() == valid.nonzero()[-5:, 0].tolist()
            rank = valid.cumsum(0)[place[b, :20]] - 1
            if valid.sum() >= 20:
                assert (rank.diff() > 0).all()
            alone, _ = sampled_rows(row_alone(inputs, b, [0, 1, 2, 3]), guard, "3/1")
            assert torch.equal(alone[0], place[b])
        assert real.all()

    def test_fewer_queries_than_rows(self) -> None:
        inputs = make_inputs(batch=3, queries=40, key_valid=left_padding(40, [0, 37, 40], DEVICE), device=DEVICE)
        place, real = sampled_rows(inputs, Guard(0.9, rows=64, last=16))
        assert set(place[0, :64].tolist()) == set(range(40)), "every query is drawn"
        assert set(place[1].tolist()) == {37, 38, 39}
        assert real.sum(1).tolist() == [80, 67, 0]
        lse = block_sparse_attention(inputs, BlockIndex.dense(inputs, BlockGrid.of(inputs, 16, 16))).lse
        seen = check(inputs, lse, Guard(1.0))
        assert seen.failed.all(1).tolist() == [True, True, False], "a row of padding is not judged"
        assert seen.checked.tolist() == [True, True, False]

    def test_draws_depend_on_seed_and_name_alone(self) -> None:
        inputs = make_inputs(queries=1000, device=DEVICE)
        draws = [sampled_rows(inputs, Guard(0.9, seed=s), d)[0] for s, d in ((0, "0/0"), (0, "0/1"), (1, "0/0"))]
        again = sampled_rows(inputs, Guard(0.3, seed=0), "0/0")[0]
        assert torch.equal(draws[0], again)
        assert not torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])

    @pytest.mark.parametrize("name", CASES)
    def test_sampled_mass_is_the_oracles(self, name: str) -> None:
        """exp(lse - lse) is as exact as the two lse are: each may be off by its own budget."""
        inputs = inputs_of(name)
        index = Planted(((1, 2),)).build_index(inputs, BlockGrid.of(inputs, 16, 16))
        seen = check(inputs, block_sparse_attention(inputs, index).lse, Guard(0.5, rows=20))
        place = seen.place[:, None].expand(-1, 4, -1)
        exact = true_mass(inputs, index).gather(2, place)
        eps = torch.finfo(inputs.query.dtype).eps
        budget = 0.0
        for each in (index, None):
            want = reference_attention(inputs, each).lse.gather(2, place)
            plain = reference_attention(inputs, each, dtype=inputs.query.dtype).lse.gather(2, place).double()
            budget += float(2 * ((plain - want).abs().max() + eps * want.abs().max()))
        assert seen.real.all()
        assert (seen.mass - exact).abs().max() <= budget


class TestThroughAModel:
    def logits(self, model: PreTrainedModel, **inputs: Any) -> Tensor:
        with torch.no_grad():
            return model(**inputs).logits

    def test_a_floor_of_1_gives_the_dense_model(self) -> None:
        model, ids = tiny_model("llama"), tokens(2, 200)
        with patch_model(model, "dense", **BLOCKS):
            dense = self.logits(model, input_ids=ids)
        with patch_model(model, "a_shape", sink=16, window=32, min_mass=1.0, **BLOCKS) as patch:
            torch.testing.assert_close(self.logits(model, input_ids=ids), dense)
            report = patch.report()
        assert (report.guard_checks, report.guard_reruns) == (24, 24)
        assert report.density == pytest.approx(1.0)
        assert report.kept_mass == pytest.approx(1.0, abs=1e-4)

    def test_the_report_counts_and_forgets(self) -> None:
        model, ids = tiny_model("llama"), tokens(2, 200)
        with patch_model(
            model, "a_shape", sink=16, window=80, dense_layers=[0], heads={(2, 3): Dense()}, min_mass=0.55, **BLOCKS
        ) as patch:
            self.logits(model, input_ids=ids)
            first = patch.report()
            self.logits(model, input_ids=ids)
            second = patch.report()
            patch.reset()
            assert patch.report().guard_checks == 0
            self.logits(model, input_ids=ids)
            again = patch.report()
        dense, _, mixed = first.layers
        assert (dense.guard_checks, dense.guard_reruns, dense.guard_lowest_mass) == (0, None, None)
        assert mixed.guard_checks == 2
        assert mixed.guard_reruns[3] == 0
        assert mixed.guard_lowest_mass[3] == pytest.approx(1.0, abs=1e-4)
        assert 0 < sum(mixed.guard_reruns) < 6
        assert first.guard_checks == 16
        assert second.guard_checks == 32
        assert [x.guard_reruns for x in again.layers] == [x.guard_reruns for x in first.layers]
        assert mixed.guard_seconds > 0
        text = str(first)
        assert f"guard: {first.guard_reruns} of 16 checked heads ran again" in text
        assert "lowest row" in text
        assert json.loads(json.dumps(first.to_dict()))["layers"][2]["guard_reruns"] == mixed.guard_reruns

    def test_without_a_guard_nothing_is_said_of_it(self) -> None:
        model, ids = tiny_model("llama"), tokens(1, 100)
        with patch_model(model, "a_shape", sink=16, window=32, **BLOCKS) as patch:
            self.logits(model, input_ids=ids)
            assert patch.report().guard_checks == 0
            assert "guard" not in str(patch.report())

    @pytest.mark.parametrize(("family", "guarded_layers"), [("mistral", []), ("gemma2", [1]), ("gpt_oss", [0, 2])])
    def test_windowed_layers_are_not_guarded(self, family: str, guarded_layers: list[int]) -> None:
        model, ids = tiny_model(family), tokens(1, 200)
        with patch_model(model, "a_shape", sink=16, window=32, min_mass=1.0, **BLOCKS) as patch:
            self.logits(model, input_ids=ids)
            layers = patch.report().layers
        assert [layer.layer for layer in layers if layer.guard_checks] == guarded_layers
        assert all(layer.guard_reruns == [1] * 4 for layer in layers if layer.guard_checks)

    def test_a_padded_row_gets_what_it_gets_alone(self) -> None:
        """Flags of a row do not depend on its neighbours, so neither does the output."""
        model, ids = tiny_model("llama"), tokens(2, 200)
        batch = torch.zeros(2, 200, dtype=torch.int64)
        for side in ("left", "right"):
            mask = torch.ones(2, 200, dtype=torch.int64)
            mask[1, slice(0, 60) if side == "left" else slice(140, 200)] = 0
            batch = torch.where(mask.bool(), ids, 0)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            with patch_model(model, "a_shape", sink=16, window=80, min_mass=0.75, **BLOCKS) as patch:
                both = self.logits(model, input_ids=batch, attention_mask=mask, position_ids=positions)
                reruns, apart = patch.report().guard_reruns, 0
                patch.reset()
                alone = []
                for b in range(2):
                    alone.append(self.logits(model, input_ids=ids[b][mask[b].bool()][None]))
                    apart += patch.report().guard_reruns
                    patch.reset()  # the draw depends on the number of the call
            assert 0 < reruns == apart < 24
            for b in range(2):
                torch.testing.assert_close(both[b][mask[b].bool()], alone[b][0], atol=1e-4, rtol=1e-4)

    def test_every_chunk_is_guarded(self) -> None:
        model, ids = tiny_model("llama"), tokens(1, 200)
        dense = self.logits(model, input_ids=ids)
        with patch_model(model, "a_shape", sink=16, window=32, min_mass=1.0, **BLOCKS) as patch, torch.no_grad():
            first = model(input_ids=ids[:, :110], use_cache=True)
            second = model(input_ids=ids[:, 110:], past_key_values=first.past_key_values, use_cache=True)
            assert patch.report().guard_checks == 24
        together = torch.cat([first.logits, second.logits], 1)
        assert (together - dense).abs().max() <= 1e-3 * dense.std()

    def test_register_guards_too(self, tmp_path: Any) -> None:
        model, ids = tiny_model("llama", implementation="sdpa"), tokens(1, 200)
        model.save_pretrained(tmp_path)
        register("a_shape", sink=16, window=16, min_mass=1.0, **BLOCKS)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME).eval()
        with patch_model(model, "dense", **BLOCKS):
            torch.testing.assert_close(self.logits(loaded, input_ids=ids), self.logits(model, input_ids=ids))

    @pytest.mark.parametrize(
        ("floor", "error"),
        [(0.0, ValueError), (-0.1, ValueError), (1.01, ValueError), (float("nan"), ValueError), ("0.9", TypeError),
         (True, TypeError)],
        ids=str,
    )  # fmt: skip
    def test_bad_floors_are_refused(self, floor: Any, error: type[Exception]) -> None:
        model = tiny_model("llama")
        config = model.config
        with pytest.raises(error, match=r"min_mass must be .*in \(0, 1\]"):
            patch_model(model, "a_shape", min_mass=floor)
        assert model.config is config
        with pytest.raises(error, match="min_mass"):
            register("a_shape", min_mass=floor)


@pytest.mark.parametrize(("name", "value", "error"), [("rows", 0, ValueError), ("last", 1.5, TypeError)])
def test_row_counts_are_checked(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"guard {name}"):
        Guard(0.9, **{name: value})


@pytest.mark.gpu
def test_nothing_is_read_back_to_the_host() -> None:
    valid = left_padding(512, [0, 100], DEVICE)
    inputs = make_inputs(
        batch=2, queries=256, keys=512, head_dim=64, dtype=torch.bfloat16, device=DEVICE, key_valid=valid
    )
    index = Planted(((1, 2),)).build_index(inputs, BlockGrid.of(inputs, 64, 64))
    for mode in ("default", "error"):  # the first turn compiles
        result = block_sparse_attention(inputs, index)
        torch.cuda.set_sync_debug_mode(mode)
        try:
            guarded(inputs, index, result, Guard(0.6), timed=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_flags_on_a_gpu_are_those_of_the_cpu(name: str) -> None:
    inputs = inputs_of(name)
    here, there = (run(each, Planted(((1, 2),)), Guard(0.6)).guarded.check for each in (inputs, on(inputs, "cpu")))
    assert torch.equal(here.place.cpu(), there.place)
    assert torch.equal(here.failed.cpu(), there.failed)


class TestEvals:
    def test_what_is_planted_is_found_or_missed_as_counted(self) -> None:
        cases = evals.planted_failures(length=1024, bad_heads=(1, 8), shares=(0.001, 1.0), rows=(16, 64), seeds=1)
        assert len(cases) == 2 * 2 * 2 * 2
        for case in cases:
            assert len(case.mass) == case.bad_heads
            assert all(alarms == 0 for alarms in case.false_alarms.values())
            if case.share == 1:
                assert max(case.mass) < 0.95
                assert all(flags == [True] * case.bad_heads for flags in case.found.values())
            else:
                assert min(case.mass) > 0.95, "one row in a thousand does not move a mean: not the guard's business"
        assert "100%" in evals.miss_table(cases, markdown=True)
        assert len(evals.miss_table(cases, severity="lost").splitlines()) == 4
        assert "-" in evals.miss_table(cases, below=0.95).splitlines()[2].split(), "no head is below with 0.1 %"

    def test_rows_put_together_are_what_the_kernels_compute(self) -> None:
        """The planted rows of a case, through the real guard, and picked from masses computed before."""
        inputs, good, bad = evals._row_masses(1024, 0)
        where = evals.bad_rows(1024, 3, 0.3, "together", torch.Generator().manual_seed(1))
        worse = evals.worse_queries(inputs, 0, "lost")
        mixed = dataclasses.replace(inputs, query=torch.where(where[None, :, :, None], worse, inputs.query))
        seen = sparse_prefill(mixed, evals._SKIPPING, guard=Guard(0.95), draw="x").guarded.check
        mass = torch.where(where, bad["lost"], good)
        assert torch.equal(seen.failed[0], where.any(1))
        picked = mass.gather(1, seen.place.expand(8, -1))
        torch.testing.assert_close(seen.mass[0], picked, atol=1e-4, rtol=1e-4)

    def test_false_alarms_are_counted_over_draws(self) -> None:
        inputs = make_inputs(queries=1000)
        mass = torch.full((3, 1000), 0.96)
        mass[1, 100:300] = 0.0  # bad: 0.77
        mass[2, 5:20] = 0.0  # good by its mean, 0.9456 + a hair: at this floor
        results = evals.false_alarms(inputs, mass, floors=(0.9,), rows=(64,), draws=20)
        rules = {each.rule: each for each in results}
        plain = rules["means"]
        assert (plain.good_heads, plain.bad_heads, plain.missed) == (2, 1, 0.0)
        assert plain.flagged == 0.0
        assert 0 < rules["means, or a row below a tenth of the floor"].flagged <= 0.5
        assert "false alarms" in evals.false_alarm_table(results)
        with pytest.raises(ValueError, match=r"no head keeps 0\.99"):
            evals.false_alarms(inputs, mass, floors=(0.99,))

    def test_masses_and_cost_of_the_model_inside(self) -> None:
        model, tokenizer = load_model()
        specs = [MethodSpec("a_shape", {"sink": 64, "window": 0.5}), MethodSpec("block_sparse", {"keep": 1.0})]
        inputs, mass = evals.head_masses(model, tokenizer, length=512, prompts=1, profiles=specs)
        assert (inputs.queries, mass.shape) == (512, (5 * 2 * 8, 512))
        assert (mass.unflatten(0, (5, 2, 8))[:, 1] > 0.999).all()
        (cost,) = evals.guard_cost(model, specs[:1], length=512, repeats=1, min_mass=1.0)
        assert cost.reran == cost.checked == 32
        assert min(cost.checks, cost.reruns, cost.attention, cost.first_token) > 0
        assert "32/32" in evals.cost_table([cost])

    def test_an_evaluation_takes_a_floor_as_an_option(self, tmp_path: Path) -> None:
        model, tokenizer = load_model()
        spec = MethodSpec.parse("a_shape:sink=64,window=64,min_mass=1.0")
        task = NeedlesAlong(tokenizer, [600], needles=2, samples=1)
        result = run_eval(task, model, tokenizer, [MethodSpec("dense"), spec], tmp_path)
        assert result is not None
        observed = result.records[0].runs[spec.label].observed
        assert observed is not None
        assert observed.density == pytest.approx(1.0)
