"""The calibration file: read back as written, refused when damaged, measured, and what decides when it is there."""

from __future__ import annotations

import builtins
import copy
import dataclasses
import io
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tiny_models import tiny_model, tokens
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparseprefill import calibration, explain, patch_model, register
from sparseprefill.calibration import (
    Calibration,
    CalibrationCell,
    CalibrationEntry,
    Machine,
    default_path,
    load_calibration,
    save_entries,
)
from sparseprefill.cli import main
from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.coverage import coverage
from sparseprefill.evals import bench as benches
from sparseprefill.evals.calibrate import calibrate, calibration_report, fit_cost, fit_overhead, shapes_of
from sparseprefill.huggingface import patched_layers
from sparseprefill.huggingface_masks import NAME
from sparseprefill.huggingface_modules import STATE, LayerShape
from sparseprefill.patterns import BlockSparse, LastRowsDense, PerHead, RandomBlocks, VerticalSlash
from sparseprefill.patterns.expected_density import expected_density
from sparseprefill.patterns.expected_overhead import Overhead, estimator_name, expected_overhead
from sparseprefill.patterns.methods import METHODS
from sparseprefill.patterns.parts import Part
from sparseprefill.prefill import COST_MODELS, CostModel

BLOCKS = {"block_q": 16, "block_k": 16}
ASKED: dict[str, Any] = {"keep": 0.1, "sink": 0, "local": 0, **BLOCKS}  # of block_sparse
SHAPE = {"query_heads": 4, "kv_heads": 2, "head_dim": 16, "value_dim": 16}  # of the tiny llama
CELL = CalibrationCell("block_sparse", 1024, 0.21, 0.01, 0.004, 0.001)
FREE = Overhead()
FREELY = {estimator_name(BlockSparse(keep=0.1, sink=0, local=0)): FREE}  # what `ASKED` finds its blocks with
EAGER, NEVER = CostModel(1.0, 50), CostModel(20.0, 50)  # sparse from about 50 tokens on; never at a density of 0.1
EXACT, FOUND = CostModel(1.25, 77), Overhead(0.01, 3.0)  # what a steady clock shows
LENGTH = 200  # dense by the stated model
CPU = torch.device("cpu")


def entry(
    cost: CostModel = EAGER,
    *,
    dtype: torch.dtype = torch.float32,
    overheads: dict[str, Overhead] = FREELY,
    **other: Any,
) -> CalibrationEntry:
    """For the tiny llama on this machine, except where `other` says otherwise."""
    key = Calibration((), Machine.here()).key(CPU, dtype, "cpu", **SHAPE, **BLOCKS)
    rates = {"profile_tile": 2e-6}
    return CalibrationEntry(dataclasses.replace(key, **other), cost, 1e-9, (CELL,), "2026-11-20", rates, overheads)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the default file would be in this test."""
    monkeypatch.setenv(calibration.VARIABLE, str(tmp_path / "calibration.json"))
    return tmp_path / "calibration.json"


def ran_sparsely(model: PreTrainedModel, length: int = LENGTH, **options: Any) -> tuple[bool, str]:
    """(whether every layer did, the decision in words)."""
    with patch_model(model, "block_sparse", **ASKED, **options) as patch, torch.no_grad():
        model(input_ids=tokens(1, length))
        report = patch.report()
    assert report.sparse_calls in (0, len(report.layers))
    return report.sparse_calls > 0, report.decision


# ---- the file


def test_the_tests_have_no_file_of_the_users() -> None:
    assert not default_path().parent.exists()
    assert load_calibration().entries == ()


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(calibration.VARIABLE, "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_path() == tmp_path / "xdg" / "sparseprefill" / "calibration.json"
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert default_path() == tmp_path / ".cache" / "sparseprefill" / "calibration.json"
    assert save_entries([entry()]) == default_path()
    assert load_calibration().entries == (entry(),)
    assert ran_sparsely(tiny_model("llama"))[0]
    monkeypatch.setenv(calibration.VARIABLE, str(tmp_path / "other.json"))
    assert default_path() == tmp_path / "other.json"
    assert not ran_sparsely(tiny_model("llama"))[0]


def test_entries_are_replaced_by_their_key_and_others_stay(here: Path) -> None:
    others = [entry(threads=64), entry(dtype=torch.bfloat16), entry(device="cuda", threads=None)]
    save_entries([entry(), *others])
    assert load_calibration().entries == (entry(), *others)
    save_entries([entry(NEVER), entry(kernel="triton")])
    assert set(map(str, load_calibration(here).entries)) == set(
        map(str, [entry(NEVER), *others, entry(kernel="triton")])
    )


def test_what_would_not_be_read_back_is_not_written(here: Path) -> None:
    save_entries([entry()])
    before = here.read_bytes()
    for wrong in (
        dataclasses.replace(entry(), dense_pair_seconds=0.0),
        dataclasses.replace(entry(), rates={"profile_tile": float("nan")}),
        dataclasses.replace(entry(), cost=CostModel(0.0, 10)),
        dataclasses.replace(entry(), date="yesterday"),
        entry(query_heads=0),
    ):
        with pytest.raises(ValueError, match="calibration"):
            save_entries([wrong])
    with pytest.raises(FileNotFoundError, match="make it first"):
        save_entries([entry()], here.parent / "none" / "calibration.json")
    assert here.read_bytes() == before


def refusal(path: Path) -> str:
    """Why the file is refused, or "" where it is read; always ours, with the path and the way out."""
    reason: ValueError | None = None
    try:
        load_calibration(path)
    except ValueError as error:
        reason = error
    if reason is None:
        return ""
    assert type(reason) is ValueError
    assert str(path) in str(reason)
    assert "Remove it, then write it again with `sparseprefill bench --calibrate`" in str(reason)
    assert len(str(reason)) < 2000
    return str(reason)


def test_every_truncation_is_refused(here: Path) -> None:
    save_entries([entry(), entry(threads=64)])
    whole = here.read_bytes()
    for size in range(0, len(whole) - 2, 5):
        here.write_bytes(whole[:size])
        assert refusal(here), size


def test_flipped_bits_are_refused_or_read_as_what_stands_there(here: Path) -> None:
    save_entries([entry(), entry(threads=64)])
    whole, draw, read = here.read_bytes(), random.Random("flips"), 0
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        here.write_bytes(damaged)
        if not refusal(here):
            read += 1
            found = load_calibration(here).entries
            save_entries(found, here.with_name("again.json"))
            assert load_calibration(here.with_name("again.json")).entries == found
            here.with_name("again.json").unlink()
    assert 0 < read < 250


@pytest.mark.parametrize("value", ["", 0, -1, 1e308, 10**30, True, None, [], {}, [[]], "x" * 5000], ids=repr)
def test_wrong_values_anywhere_are_refused(here: Path, value: Any) -> None:
    """Each place in turn holds something of another kind or size; what may be empty or absent is named here."""
    save_entries([entry()])
    data = json.loads(here.read_text())
    allowed = {
        ("entries", "[]"), ("cells", "[]"), ("rates", "{}"), ("threads", "None"), ("fixed_tokens", "0"),
        ("overheads", "{}"), ("share", "0"), ("per_key", "0"), ("finding", "0"),
    }  # fmt: skip
    places: list[tuple[Any, Any]] = []

    def collect(inner: Any) -> None:
        for key in list(inner) if isinstance(inner, dict) else range(len(inner)):
            places.append((inner, key))
            if isinstance(inner[key], (dict, list)):
                collect(inner[key])

    collect(data)
    assert len(places) > 25
    for holder, key in places:
        before, holder[key] = holder[key], value
        here.write_text(json.dumps(data))
        assert bool(refusal(here)) == ((key, repr(value)) not in allowed), (key, value)
        holder[key] = before


def test_files_that_are_no_calibration(here: Path) -> None:
    save_entries([entry()])
    data = json.loads(here.read_text())
    for wrong, message in (
        ({**data, "schema": 0}, "has schema 0; this version reads schema 2"),
        ({**data, "schema": 1}, "has schema 1; this version reads schema 2"),
        ({**data, "more": 1}, "unknown entry 'more'"),
        ({**data, "entries": data["entries"] * 2}, "two entries of one key"),
        ([data], "has schema None"),
        ({"schema": 2, "layers": []}, "has no 'entries'"),
    ):
        here.write_text(json.dumps(wrong))
        assert message in refusal(here)
        with pytest.raises(ValueError, match="Remove it"):
            save_entries([entry()])
        assert json.loads(here.read_text()) == wrong, "what is not understood is not written over"
        with pytest.raises(ValueError, match="Remove it"):
            patch_model(tiny_model("llama"), "a_shape")
    with pytest.raises(FileNotFoundError, match="there is no calibration file at"):
        patch_model(tiny_model("llama"), "a_shape", calibration=here.parent / "none.json")


# ---- looking up


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"device_name": "Another"}, "no entry for cpu .*, only for cpu Another"),
        ({"query_heads": 8}, "no entry for layers of 4/2 heads of 16/16, only for layers of 8/2 heads of 16/16"),
        ({"value_dim": 8}, "only for layers of 4/2 heads of 16/8"),
        ({"dtype": "bfloat16"}, "no entry in float32, only in bfloat16"),
        ({"kernel": "triton"}, "no entry of the kernel cpu, only of the kernel triton"),
        ({"block_k": 64}, "no entry with tiles of 16 x 16, only with tiles of 16 x 64"),
        ({"threads": 64}, r"no entry with \d+ threads, only with 64 threads"),
        ({"torch": "1.0"}, "no entry of torch .*, only of torch 1.0, triton"),
        ({"triton": "1.0"}, "only of torch .*, triton 1.0"),
        ({"sparseprefill": "0.0.1"}, "sparseprefill 0.0.1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_entry_that_differs_in_anything_is_not_used(other: dict[str, Any], words: str, here: Path) -> None:
    far = entry(device="cuda", device_name="A GPU", threads=None)
    known = Calibration((far, entry(**other)), Machine.here())
    found, why = known.lookup(entry().key)
    assert found is None
    assert "A GPU" not in why or "device_name" in other, "the nearest entry says what differs"
    save_entries(known.entries)
    sparsely, decision = ran_sparsely(tiny_model("llama"))
    assert not sparsely
    assert decision.startswith(f"uncalibrated cost model: {COST_MODELS['cpu', 'cpu'].describe()}")
    assert why in decision
    expect = words if "device_name" not in other else "no entry for cpu .*, only for cpu Another or for cuda A GPU"
    assert_matches(expect, why)
    save_entries([entry()])
    assert load_calibration().lookup(entry().key) == (entry(), "")
    assert ran_sparsely(tiny_model("llama"))[0]


def assert_matches(pattern: str, text: str) -> None:
    with pytest.raises(LookupError, match=pattern):
        raise LookupError(text)


def test_many_entries_make_no_long_reason() -> None:
    known = Calibration(tuple(entry(threads=100 + n) for n in range(50)), Machine.here())
    assert known.lookup(entry().key)[1].endswith("with 102 threads or 47 more")
    empty = Calibration((), Machine.here())
    assert "has no entries" in empty.lookup(entry().key)[1]
    assert "there is no calibration file" in load_calibration().lookup(entry().key)[1]


# ---- what it decides


def test_the_decision_follows_the_calibration(here: Path) -> None:
    """Sparse exactly from the length on that the entry's cost model says, with the default file and a named one."""
    model = tiny_model("llama")
    sparsely, decision = ran_sparsely(model)
    assert not sparsely
    assert "there is no calibration file" in decision
    for cost in (EAGER, CostModel(3.0, 90)):
        named = here.with_name("named.json")
        save_entries([entry(cost)], named)
        start = cost.break_even(0.1)
        assert start is not None
        for options in ({"calibration": named}, {"calibration": str(named)}):
            assert ran_sparsely(model, start, **options)[0]
            assert not ran_sparsely(model, start - 1, **options)[0]
        found = explain(model, "block_sparse", **ASKED, calibration=named)
        assert [layer.break_even for layer in found.layers] == [start] * 3
        assert found.decision == ran_sparsely(model, calibration=named)[1]
        assert found.decision.startswith("calibrated on 2026-11-20 (cpu, float32, ")
        assert cost.describe() in found.decision
    save_entries([entry(NEVER)])
    assert ran_sparsely(model, 1500) == (False, entry(NEVER).describe())
    assert explain(model, "block_sparse", **ASKED).layers[0].break_even is None


def test_min_length_overrides_and_needs_no_file(here: Path) -> None:
    model = tiny_model("llama")
    save_entries([entry(NEVER)])
    assert ran_sparsely(model, min_length=0) == (True, "sparse from 0 keys on (min_length)")
    here.write_text("{")
    assert ran_sparsely(model, min_length=0)[0]
    with pytest.raises(ValueError, match="Remove it"):
        ran_sparsely(model, min_length=0, calibration=here)
    with pytest.raises(ValueError, match="Remove it"):
        ran_sparsely(model)
    with pytest.raises(ValueError, match="Remove it"):
        explain(model)


def test_layers_of_two_shapes_are_told_apart(here: Path) -> None:
    model = tiny_model("llama")
    other = tiny_model("llama", num_key_value_heads=4).model.layers[1].self_attn
    other.config = model.config
    model.model.layers[1].self_attn = other
    assert shapes_of(model) == {
        LayerShape(4, 2, 16, 16): (0, 2),
        LayerShape(4, 4, 16, 16): (1,),
    }
    save_entries([entry(), entry(NEVER, kv_heads=4)])
    with patch_model(model, "block_sparse", **ASKED) as patch, torch.no_grad():
        model(input_ids=tokens(1, LENGTH))
        report = patch.report()
        running = explain(model)
    assert [layer.sparse_calls for layer in report.layers] == [1, 0, 1]
    assert report.decision == f"layers 0, 2: {entry().describe()}; layer 1: {entry(NEVER).describe()}"
    assert running.decision == explain(model, "block_sparse", **ASKED).decision == report.decision
    here.unlink()
    save_entries([entry()])
    with patch_model(model, "block_sparse", **ASKED, dense_layers=[0]) as patch:
        told = patch.report().decision
    assert told.startswith("layer 1: uncalibrated cost model")
    assert "no entry for layers of 4/4 heads of 16/16, only for layers of 4/2 heads of 16/16" in told
    assert told.endswith(f"layer 2: {entry().describe()}")
    with patch_model(model, "block_sparse", **ASKED, dense_layers=[1]) as patch:
        assert patch.report().decision == entry().describe()
    with patch_model(model, "block_sparse", **ASKED, dense_layers=[0, 1, 2]) as patch:
        assert patch.report().decision == "every layer stays dense"


def test_another_device_or_dtype_keeps_the_stated_model(here: Path) -> None:
    model = tiny_model("llama")
    save_entries([entry()])
    with patch_model(model, "block_sparse", **ASKED) as patch:
        layer = (patched_layers(model) or {})[0]
        assert layer.decision(CPU, torch.float32)[0] == EAGER
        cost, words = layer.decision(torch.device("cuda:0"), torch.float32)
        assert cost == COST_MODELS["cuda", "triton"]
        assert "patched for float32 on cpu, and runs in float32 on cuda:0" in words
        assert copy.deepcopy(layer).cost == layer.cost
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            model(input_ids=tokens(1, LENGTH))
        assert patch.report().sparse_calls == 0
        assert sum(patch.report().previous_calls.values()) == 3
        assert "patched for float32 on cpu, and runs in bfloat16 on cpu" in patch.report().decision
        patch.reset()
        assert patch.report().decision == entry().describe()
        model.bfloat16()
        assert "runs in bfloat16" in patch.report().decision
    with patch_model(model, "block_sparse", **ASKED) as patch:
        assert "no entry in bfloat16, only in float32" in patch.report().decision
    assert "no entry in bfloat16" in patch.report().decision, "also after it was removed"


def test_the_stated_model_is_that_of_the_kernel_which_serves_the_layer() -> None:
    model = tiny_model("llama")
    with patch_model(model, "block_sparse", **ASKED):
        layer = (patched_layers(model) or {})[0]
        assert layer.cost is not None
        assert layer.cost.kernel == "cpu"
        for kernel, stated in (("cpu", "cpu"), ("native", "native"), ("reference", "cpu"), (None, "cpu")):
            layer.cost = dataclasses.replace(layer.cost, kernel=kernel)
            assert layer.decision(CPU, torch.float32)[0] == COST_MODELS["cpu", stated]
        layer.cost = None
        assert layer.decision(CPU, torch.float32)[0] == COST_MODELS["cpu", "cpu"]
        assert layer.decision(torch.device("cuda"), torch.float32)[0] == COST_MODELS["cuda", "triton"]


def test_a_users_object_may_say_a_share_alone() -> None:
    class Own:
        def expected_overhead(self, device: torch.device, head_dim: int, block_q: int, block_k: int) -> float:
            return 16 / head_dim

    assert expected_overhead(Own(), CPU, 64, 64, 64) == Overhead(share=0.25)
    assert expected_overhead(object(), CPU, 64, 64, 64) == FREE


def test_no_forward_pass_reads_a_file(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of a patched model nor of one that was loaded under our name, whose layers are met in its first call."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    save_entries([entry()])
    ran_sparsely(model)  # what is loaded lazily is loaded
    register("block_sparse", **ASKED)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation=NAME).eval()
    with patch_model(model, "block_sparse", **ASKED) as patch, monkeypatch.context() as closed:
        here.unlink()
        for owner, name in ((builtins, "open"), (io, "open"), (os, "open"), (os, "stat")):
            closed.setattr(owner, name, forbidden)
        with torch.no_grad():
            model(input_ids=tokens(1, LENGTH))
            loaded(input_ids=tokens(1, LENGTH))
        assert patch.report().sparse_calls == 3
    states = [getattr(module, STATE) for module in loaded.modules() if hasattr(module, STATE)]
    assert [state.sparse_calls for state in states] == [1, 1, 1]


def forbidden(*arguments: Any, **options: Any) -> Any:
    raise AssertionError(f"a forward pass looks at the file {arguments}")


def test_register_takes_a_calibration(tmp_path: Path) -> None:
    model, path = tiny_model("llama"), tmp_path / "calibration.json"
    model.save_pretrained(tmp_path / "model")

    def ran() -> list[int]:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation=NAME).eval()
        with torch.no_grad():
            loaded(input_ids=tokens(1, LENGTH))
        return [getattr(m, STATE).sparse_calls for m in loaded.modules() if hasattr(m, STATE)]

    save_entries([entry()], path)
    register("block_sparse", **ASKED, calibration=path)
    assert ran() == [1, 1, 1]
    register("block_sparse", **ASKED)
    assert ran() == [0, 0, 0]
    path.write_text("")
    with pytest.raises(ValueError, match="Remove it"):
        register("block_sparse", **ASKED, calibration=path)


def test_a_patched_model_is_explained_without_another_calibration(here: Path) -> None:
    model = tiny_model("llama")
    save_entries([entry()])
    with patch_model(model, "block_sparse", **ASKED):
        here.write_text("damaged after it was read")
        assert explain(model).decision == entry().describe()
        with pytest.raises(ValueError, match="this model is patched"):
            explain(model, calibration=here)


# ---- measuring


@pytest.mark.parametrize("length", [64, 200, 512, 1024, 4096])
@pytest.mark.parametrize(
    "pattern",
    [
        BlockSparse(keep=0.1), BlockSparse(keep=0.3, sink=0, local=0), BlockSparse(keep=300), RandomBlocks(keep=0.1),
        VerticalSlash(density=0.1), VerticalSlash(density=0.3), VerticalSlash(verticals=1, slashes=1),
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_expected_is_what_is_computed_at_most(pattern: Any, length: int) -> None:
    """The density that the decision is given, up to a block a row that budgets are rounded up to."""
    inputs = benches.random_inputs(2, 1, length, 16, torch.float32, "cpu", 0)
    index = pattern.build_index(inputs, BlockGrid.of(inputs, 64, 64))
    computed = float(coverage(inputs, index).density.mean())
    assert computed <= min(1.0, expected_density(pattern, length) + 2 * 64 / length) + 1e-6
    if length <= 256:  # the sink, the band and the row's own block are everything
        assert expected_density(VerticalSlash(density=0.1), length) == 1.0


def test_break_even_is_where_sparse_begins_to_be_cheaper() -> None:
    draw = random.Random("break-even")
    for _ in range(300):
        cost = CostModel(draw.uniform(0.5, 4), draw.choice((0, 1, 7, 64, 500, 3000)))
        density = draw.choice((0.05, 0.1, 0.2, 0.25, 0.5, 1.0))
        overhead = Overhead(draw.choice((0.0, 0.05, 0.6)), draw.choice((0.0, 20.0, 700.0)), draw.choice((0, 300)))
        found = cost.break_even(density, overhead)
        if found is None:
            assert cost.tile_factor * density + overhead.share >= 1
            assert not cost.sparse_is_cheaper(1 << 20, 1 << 20, density, overhead)
        else:
            assert cost.sparse_is_cheaper(found, found, density, overhead)
            assert found == 1 or not cost.sparse_is_cheaper(found - 1, found - 1, density, overhead)


def made_cells(
    models: dict[str, tuple[float, int]], pair: float = 2e-9, noise: Callable[[], float] = lambda: 1.0
) -> list[CalibrationCell]:
    """What would be measured where each selector costs exactly (tile factor, fixed tokens)."""
    cells = []
    for length in (1024, 2048, 4096, 8192):
        dense = pair * length * (length + 1) / 2
        for name, (factor, fixed) in models.items():
            for density in (0.1, 0.2, 0.5):
                sparse = factor * density * dense + fixed**2 / 2 * pair
                cells.append(CalibrationCell(name, length, density, dense, sparse * noise()))
    return cells


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.7, 6.0])
@pytest.mark.parametrize("fixed", [0, 1, 300, 512, 4096])
def test_the_fit_recovers_a_known_model(factor: float, fixed: int) -> None:
    for pair in (1e-12, 2e-9, 1e-6):
        cost, found, worst = fit_cost(made_cells({"block_sparse": (factor, fixed)}, pair))
        assert cost.tile_factor == pytest.approx(factor, rel=1e-9)
        assert cost.fixed_tokens == pytest.approx(fixed, abs=0 if fixed else 1)
        assert found == pytest.approx(pair, rel=1e-12)
        assert worst < 1e-9


def test_the_fit_is_as_cautious_as_each_selector() -> None:
    cells = made_cells({"vertical_slash": (1.5, 900), "block_sparse": (2.5, 200)})
    assert fit_cost(cells)[0].fixed_tokens == 900
    assert fit_cost(cells)[0].tile_factor == pytest.approx(2.5)
    draw = random.Random("noise")
    for _ in range(50):
        models = {name: (draw.uniform(0.5, 4), draw.randrange(0, 2000)) for name in ("a", "b", "c")}
        noisy = made_cells(models, noise=lambda: draw.uniform(0.9, 1.1))
        cost, _, worst = fit_cost(noisy)
        assert worst < 0.25
        for name in models:
            own, _, _ = fit_cost([cell for cell in noisy if cell.selector == name])
            for density in (0.05, 0.2, 0.5, 1.0):
                alone, together = own.break_even(density), cost.break_even(density)
                assert together is None or (alone is not None and alone <= together)


@pytest.mark.parametrize("overhead", [Overhead(0.05, 30.0, 300), Overhead(0.3), Overhead(0.0, 12.0), FREE], ids=repr)
def test_the_fit_of_an_overhead_recovers_it_and_is_never_below_a_time(overhead: Overhead) -> None:
    draw, pair = random.Random("overhead"), 2e-9

    def cells(noise: Callable[[], float]) -> list[CalibrationCell]:
        made = []
        for length in (512, 1024, 2048, 4096, 8192):
            dense = length * (length + 1) / 2
            finding = overhead.pairs(dense, length) * pair * noise()
            made += [CalibrationCell("a", length, 0.2, dense * pair, dense * pair + finding, finding)] * 2
        return made

    found = fit_overhead(cells(lambda: 1.0), pair)
    assert (found.share, found.per_key) == (pytest.approx(overhead.share), pytest.approx(overhead.per_key, abs=1e-6))
    assert found.fixed_tokens == pytest.approx(overhead.fixed_tokens, abs=1)
    for _ in range(20):
        noisy = cells(lambda: draw.uniform(0.7, 1.5))
        found = fit_overhead(noisy, pair)
        for cell in noisy:
            assert found.pairs(cell.length * (cell.length + 1) / 2, cell.length) * pair >= cell.finding * (1 - 1e-9)
            assert found.pairs(cell.length * (cell.length + 1) / 2, cell.length) * pair <= 4 * cell.finding


def test_a_measured_overhead_decides_for_its_own_estimator(here: Path) -> None:
    """And for no other; budgets alone make no other estimator."""
    model = tiny_model("llama")
    slow = {estimator_name(BlockSparse(keep=0.5, sink=0, local=0)): Overhead(0.0, 0.0, 400)}
    save_entries([entry(overheads=slow)])
    assert not ran_sparsely(model, 200)[0]
    assert ran_sparsely(model, 600)[0]
    save_entries([entry(overheads={"BlockSparse(64, 0, True)": Overhead(0.0, 0.0, 400), **FREELY})])
    assert ran_sparsely(model, 200)[0]
    asked = (CPU, 64, 64, 64)
    of_stem = METHODS["stem"].build(keep=0.1)
    measured = {estimator_name(METHODS["stem"].build(keep=0.3, sink=0)): Overhead(0.5)}
    assert expected_overhead(of_stem, *asked, measured) == Overhead(0.5)
    assert expected_overhead(METHODS["stem"].build(keep=0.1, stride=16), *asked, measured).share < 0.5


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if name not in ("dense", "minference")])
def test_every_method_says_what_finding_takes(method: str, device: str) -> None:
    """In one form, and before anything was measured; a method that looks at tokens alone has no share of the pairs."""
    if method == "sale" and device == "cuda" and not torch.cuda.is_available():
        pytest.skip("asks the GPU what can multiply its codes")
    pattern = METHODS[method].build(**({"inner": BlockSparse(keep=0.1)} if METHODS[method].wraps else {}))
    stated = expected_overhead(pattern, torch.device(device), 64, 64, 64)
    assert stated.share < (8 if method == "sign_code" else 3)  # its page says that it takes longer than attention
    assert stated.fixed_tokens > 0
    if METHODS[method].kind != "static":
        assert stated.share + stated.per_key > 0


def test_groups_of_heads_share_what_grows_and_add_what_is_fixed() -> None:
    one, other = METHODS["vertical_slash"].build(density=0.1), BlockSparse(keep=0.1)
    asked = (CPU, 64, 64, 64)
    alone = [expected_overhead(each, *asked) for each in (one, other)]
    mixed = expected_overhead(PerHead((one, one, one, other)), *asked)
    assert mixed.share == pytest.approx((3 * alone[0].share + alone[1].share) / 4)
    assert mixed.per_key == pytest.approx((3 * alone[0].per_key + alone[1].per_key) / 4)
    assert mixed.fixed_tokens**2 == pytest.approx(sum(each.fixed_tokens**2 for each in alone), rel=0.01)
    assert expected_overhead(LastRowsDense(one, 64), *asked) == alone[0]


def test_times_that_tell_nothing_are_refused() -> None:
    same = [CalibrationCell("a", 1024, 0.2, 0.01, 0.004)] * 4
    with pytest.raises(ValueError, match="too much alike"):
        fit_cost(same)
    with pytest.raises(ValueError, match="no cell was measured"):
        fit_cost([])
    falling = [dataclasses.replace(cell, sparse=1 / cell.density / cell.dense) for cell in made_cells({"a": (1, 1)})]
    with pytest.raises(ValueError, match="did not take longer"):
        fit_cost(falling)
    gaining = [  # less than nothing is fixed
        dataclasses.replace(cell, sparse=2 * cell.density * cell.dense * (1 - 200 / cell.length))
        for cell in made_cells({"a": (1, 1)})
    ]
    cost, _, _ = fit_cost(gaining)
    assert cost.fixed_tokens == 0
    assert 1.5 < cost.tile_factor < 2


def test_calls_are_timed_interleaved_and_the_first_turn_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = benches.random_inputs(2, 1, 128, 16, torch.float32, "cpu", 0, value_dim=8)
    assert inputs.value.shape == (1, 1, 128, 8)
    clock, ran = [0.0], []

    def call(name: str, *seconds: float) -> Callable[[], None]:
        def run() -> None:
            clock[0] += seconds[ran.count(name)]
            ran.append(name)

        return run

    monkeypatch.setattr(benches.time, "perf_counter", lambda: clock[0])
    found = benches.median_seconds(inputs, {"a": call("a", 100, 1, 9, 2), "b": call("b", 50, 4, 4, 5)}, 3)
    assert ran == ["a", "b"] * 4
    assert found == {"a": pytest.approx(2), "b": pytest.approx(4)}
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        benches.median_seconds(inputs, {}, 0)


def test_what_is_measured_is_what_a_patch_would_run(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    """Both selectors at each length and density, under the key that patching the model looks up."""
    monkeypatch.setattr("sparseprefill.evals.calibrate.median_seconds", by_the_length)
    model = tiny_model("deepseek_v3")  # values are of another width
    steps: list[int] = []
    found = calibrate(
        shapes_of(model), device="cpu", dtype=torch.float32, lengths=(256, 384), densities=(0.1, 0.5), **BLOCKS,
        progress=steps.append,
    )  # fmt: skip
    assert sum(steps) == 2
    assert [each.layers for each in found] == [(0, 1, 2)]
    cells = found[0].entry.cells
    assert [(c.length, c.selector) for c in cells] == [
        (length, name)
        for length in (256, 384)
        for name in ("vertical_slash", "block_sparse", "stem")
        for _ in (0.1, 0.5)
    ]
    assert [c.density for c in cells if c.selector == "block_sparse" and c.length == 384] == [
        pytest.approx(float(coverage(inputs, index).density.mean())) for inputs, index in expected_indices()
    ]
    assert found[0].entry.cost.tile_factor == pytest.approx(EXACT.tile_factor)
    assert found[0].entry.cost.fixed_tokens == EXACT.fixed_tokens
    assert list(found[0].entry.overheads) == ["VerticalSlash(64)", "BlockSparse(64, 128, True)", "Stem(8, 0.2)"]
    for overhead in found[0].entry.overheads.values():
        assert (overhead.share, overhead.per_key) == (pytest.approx(FOUND.share), pytest.approx(FOUND.per_key))
    save_entries(each.entry for each in found)
    with patch_model(model, "block_sparse", **ASKED) as patch:
        assert patch.report().decision == found[0].entry.describe()
    assert "layers 0-2: 4 query heads, 4 KV heads, head_dim 24/12" in calibration_report(found[0])


def test_two_names_of_one_estimator_share_the_more_cautious_overhead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is named last: none of the measured times is above what is kept."""

    def slow(inputs: Any, contenders: dict[str, Any], repeats: int) -> dict[str, float]:
        seconds = by_the_length(inputs, contenders, repeats)
        more = next(iter(seconds.values()))
        return {name: took + more * ("keep=0.3" not in name and name != "dense") for name, took in seconds.items()}

    monkeypatch.setattr("sparseprefill.evals.calibrate.median_seconds", slow)
    for methods in (("block_sparse", "block_sparse:keep=0.3"), ("block_sparse:keep=0.3", "block_sparse")):
        (found,) = calibrate(
            {LayerShape(2, 1, 16, 16): (0,)}, device="cpu", dtype=torch.float32, lengths=(256, 384),
            densities=(0.1, 0.5), methods=methods, **BLOCKS,
        )  # fmt: skip
        (overhead,) = found.entry.overheads.values()
        for cell in found.entry.cells:
            told = overhead.pairs(cell.length * (cell.length + 1) / 2, cell.length) * found.entry.dense_pair_seconds
            assert cell.finding <= told * (1 + 1e-6)


def expected_indices() -> Iterator[tuple[AttentionInputs, BlockIndex]]:
    inputs = benches.random_inputs(4, 4, 384, 24, torch.float32, "cpu", 0, value_dim=12)
    for density in (0.1, 0.5):
        yield inputs, BlockSparse(keep=density).build_index(inputs, BlockGrid.of(inputs, 16, 16))


def by_the_length(inputs: Any, contenders: dict[str, Any], repeats: int) -> dict[str, float]:
    """Every call is made; what it takes is EXACT, whatever else the machine does."""
    dense = inputs.queries * (inputs.queries + 1) / 2 * 1e-9
    finding = FOUND.pairs(dense / 1e-9, inputs.queries) * 1e-9
    seconds = {}
    for name, run in contenders.items():
        done = run()
        if name == "dense":
            seconds[name] = dense
        elif name.startswith("find "):
            assert all(isinstance(part, Part) for part in done)
            seconds[name] = finding
        else:
            density = float(coverage(inputs, done.index).density.mean())
            seconds[name] = EXACT.tile_factor * density * dense + EXACT.fixed_tokens**2 / 2 * 1e-9 + finding
    return seconds


def test_what_cannot_be_measured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {LayerShape(2, 1, 16, 16): (0,)}
    for options, message in (
        ({"lengths": (100, 256)}, "multiples of 128 tokens, got 100"),
        ({"lengths": (128, 256), "block_q": 128, "block_k": 128}, "multiples of 128 tokens, got 128"),
        ({"lengths": (256, 256)}, "at least two lengths"),
        ({"lengths": (256, 384), "repeats": 0}, "repeats must be"),
        ({"lengths": (256, 384), "densities": (2.0,)}, "density"),
        ({"lengths": (256, 384), "densities": ()}, "at least one density"),
        ({"lengths": (256, 384), "block_q": 32}, "square"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(shapes, device="cpu", dtype=torch.float32, **options)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="cannot be served"):
        calibrate(shapes, device="cpu", dtype=torch.float64, lengths=(256, 384))
    monkeypatch.setattr(benches, "_error_and_allowed", lambda parts, output: (1.0, 0.0))
    with pytest.raises(ValueError, match=r"vertical_slash at density 0\.1, 256 tokens is wrong, so it is not timed"):
        calibrate(shapes, device="cpu", dtype=torch.float32, lengths=(256, 384))


def test_a_method_that_another_kernel_serves_is_not_calibrated(native: Path) -> None:
    """The native kernel skips tiles of at most 64 queries: with more, its cost says nothing of such a method."""
    shapes = {LayerShape(2, 1, 16, 16): (0,)}
    asked: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "lengths": (256, 384), "densities": (0.5,)}
    with pytest.raises(ValueError, match=r"skip_softmax.* lets its kernel skip tiles, which native does not"):
        calibrate(shapes, methods=("block_sparse", "skip_softmax"), block_q=128, block_k=128, **asked)


def test_a_registered_layer_that_skips_goes_by_the_kernel_that_will_run(native: Path, tmp_path: Path) -> None:
    """An entry of the native kernel is not one for a method that runs on another at this size of rows."""
    model, path = tiny_model("llama"), tmp_path / "calibration.json"
    model.save_pretrained(tmp_path / "model")
    long = {"block_q": 128, "block_k": 64}
    key = Calibration((), Machine.here()).key(CPU, torch.float32, "native", **SHAPE, **long)
    save_entries([dataclasses.replace(entry(), key=key)], path)
    found = {}
    for method in ("block_sparse", "skip_softmax"):
        register(method, **long, calibration=path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation=NAME).eval()
        with torch.no_grad():
            loaded(input_ids=tokens(1, 300))
        costs = [getattr(m, STATE).cost for m in loaded.modules() if hasattr(m, STATE)]
        found[method] = {(cost.kernel, cost.entry is not None) for cost in costs}
    assert found == {"block_sparse": {("native", True)}, "skip_softmax": {("cpu", False)}}


class TestCommand:
    """`sparseprefill bench --calibrate` and `sparseprefill doctor` after it."""

    @pytest.fixture(autouse=True)
    def _steady_clock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sparseprefill.evals.calibrate.median_seconds", by_the_length)

    def run(self, *arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(main, list(arguments))
        assert done.exit_code == code, done.output
        assert "Traceback" not in done.output
        return done.output

    def test_end_to_end(self, here: Path, tmp_path: Path) -> None:
        model = tiny_model("llama", head_dim=64)
        model.save_pretrained(tmp_path / "model")
        small = ("bench", "--calibrate", "--device", "cpu", "--lengths", "256,1k", "--repeats", "1")
        output = self.run(*small, "--model", str(tmp_path / "model"))
        assert f"wrote {here}\n" in output
        assert "layers 0-2: 4 query heads, 2 KV heads, head_dim 64, kernel cpu, tiles of 64 x 64" in output
        assert EXACT.describe() in output
        told = ", ".join(f"{EXACT.break_even(density, FOUND)} tokens at {density}" for density in (0.1, 0.2, 0.5))
        for method in ("vertical_slash", "block_sparse", "stem"):
            assert f"{method}: finding the blocks costs {FOUND.describe()}; break-even: {told}\n" in output
        assert "largest relative error" in output
        (found,) = load_calibration().entries
        assert len(found.cells) == 18
        assert found.describe() in output
        decision = self.run("doctor", str(tmp_path / "model"), "--device", "cpu")
        assert f"decision   {found.describe()}\n" in decision
        with patch_model(model, "block_sparse", keep=0.1) as patch:
            assert patch.report().decision == found.describe()

        named = tmp_path / "named.json"
        output = self.run(*small, "--out", str(named), "--dtype", "bfloat16", "--densities", "0.3", "--markdown")
        assert f"wrote {named}\n" in output
        assert f"patch_model(model, calibration={str(named)!r})" in output
        assert "| selector" in output
        assert [each.key.dtype for each in load_calibration(named).entries] == ["bfloat16"]
        told = self.run("doctor", "--device", "cpu", "--dtype", "bfloat16", "--calibration", str(named))
        assert "decision   calibrated on" in told
        assert len(load_calibration().entries) == 1

    def test_the_model_inside_is_taken_for_what_it_is_loaded_as(self, here: Path) -> None:
        self.run("bench", "--calibrate", "--device", "cpu", "--lengths", "128,512", "--repeats", "1")
        assert [each.key.dtype for each in load_calibration().entries] == ["float32"]
        assert "decision   calibrated on" in self.run("doctor", "--device", "cpu")

    def test_times_that_do_not_fit_are_not_written(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def busy(inputs: Any, contenders: dict[str, Any], repeats: int) -> dict[str, float]:
            steady = by_the_length(inputs, contenders, repeats)
            return {name: seconds * (5 if "0.2" in name else 1) for name, seconds in steady.items()}

        monkeypatch.setattr("sparseprefill.evals.calibrate.median_seconds", busy)
        output = self.run("bench", "--calibrate", "--device", "cpu", "--lengths", "128,512", code=1)
        assert "the times of layers 0-3 do not fit together" in output
        assert "break-even: " in output, "what was measured is still shown"
        assert not here.exists()

    def test_refusals(self, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sparseprefill.evals.calibrate.calibrate", forbidden)  # all of it before measuring
        for options, message in (
            (("--ttft", "1k"), "leave out --ttft and --density"),
            (("--density", "0.2"), "leave out --ttft and --density"),
            (("--model", str(tmp_path / "none")), "no model can be made of"),
            (("--out", str(tmp_path / "none" / "calibration.json")), "make it first"),
        ):
            assert message in self.run("bench", "--calibrate", "--device", "cpu", *options, code=1)
        assert "--dtype is for --calibrate" in self.run("bench", "--device", "cpu", "--dtype", "bfloat16", code=1)
        here.write_text("[]")
        assert "Remove it" in self.run("bench", "--calibrate", "--device", "cpu", code=1)
        assert "Remove it" in self.run("doctor", "--device", "cpu", code=1)
        assert here.read_text() == "[]"
