"""The sweep that shows whether a patched model is slower than the stock one, on a clock of its own."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tiny_models import tiny_model, tokens

from sparseprefill import patch_model
from sparseprefill.cli import main
from sparseprefill.evals import never_slower as sweep
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.huggingface import patched_layers
from sparseprefill.huggingface_layers import PatchedLayer

CELL = sweep.Slowdown("default", "float32", 1024, 30, 4, 0.1, 0.1, 0.0, -0.001, 0.001, 0, {}, "stated")
EAGER = MethodSpec(
    "block_sparse", {"keep": 0.1, "sink": 0, "local": 0, "block_q": 16, "block_k": 16, "min_length": 100}
)


class Clock:
    """Runs every prefill, and lets it take what it is told: by whether the model is patched, and whether sparsely."""

    def __init__(self, stock: float, dense: float, sparse: float, noise: float = 0.0) -> None:
        self.stock, self.dense, self.sparse = stock, dense, sparse
        self.draw, self.noise = random.Random("noise"), noise
        self.order: list[bool] = []

    def __call__(self, model: Any, ids: torch.Tensor) -> float:
        layers = patched_layers(model)
        before = sum(layer.sparse_calls for layer in (layers or {}).values())
        with torch.no_grad():
            model(input_ids=ids, use_cache=True, logits_to_keep=1)
        after = sum(layer.sparse_calls for layer in (layers or {}).values())
        self.order.append(layers is not None)
        spent = self.stock if layers is None else self.sparse if after > before else self.dense
        return spent * (1 + self.draw.uniform(-self.noise, self.noise))


@pytest.mark.parametrize(
    ("clock", "passes"),
    [
        (Clock(1.0, 1.0, 0.5, 0.1), (True, True)),
        (Clock(1.0, 1.02, 0.5), (True, True)),  # 3 % are allowed
        (Clock(1.0, 1.05, 0.5), (False, True)),
        (Clock(1.0, 1.0, 1.2, 0.05), (True, False)),
        (Clock(1.0, 1.02, 1.05, 1.0), (True, True)),  # nothing is sure of times like these
        (Clock(1e-4, 1.6e-4, 1.8e-4), (True, True)),  # of three layers with 30 microseconds each
        (Clock(1e-4, 2e-4, 1.8e-4), (False, True)),
    ],
    ids=lambda value: f"{value.dense}-{value.sparse}-{value.noise}" if isinstance(value, Clock) else "",
)
def test_verdicts(clock: Clock, passes: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "prefill_seconds", clock)
    model = tiny_model("llama")
    found = sweep.never_slower(model, [EAGER], lengths=(128, 64), pairs=6)
    assert [cell.length for cell in found] == [64, 128]
    assert tuple(cell.passes for cell in found) == passes
    assert [cell.sparse_calls for cell in found] == [0, 3]
    assert found[0].reasons == {"fewer keys than min_length=100": 3}
    assert found[1].reasons == {}
    assert patched_layers(model) is None, "the stock model stays one"
    (crossing,) = sweep.crossings(found)
    assert (crossing.stays, crossing.runs) == (64, 128)
    table = sweep.never_slower_table(found)
    assert ("SLOWER" in table) == (False in passes)
    assert "sparse from 128 tokens on, dense up to 64" in table


def test_the_order_inside_a_pair_alternates_and_the_twin_shares_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(1.0, 1.0, 1.0)
    monkeypatch.setattr(sweep, "prefill_seconds", clock)
    model = tiny_model("llama")
    sweep.never_slower(model, [EAGER], lengths=(64,), pairs=4)
    assert clock.order[3:] == [True, False, False, True] * 2
    held = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    ids, config = tokens(1, 256), model.config
    with sweep.patched_twin(model, EAGER) as patch, torch.no_grad():
        assert patch.model is not model
        assert {id(tensor) for tensor in (*patch.model.parameters(), *patch.model.buffers())} == held
        sparse, dense = patch.model(input_ids=ids).logits, model(input_ids=ids).logits
        assert not torch.equal(sparse, dense)
        assert patch.report().sparse_calls == 3
    assert model.config is config
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, dense)


def test_bounds_are_those_of_a_median() -> None:
    """Of samples of a known median the lower bound lies below it in about 95 of 100, and the upper one above."""
    draw = random.Random("bounds")
    below = above = 0
    for turn in range(60):
        values = [draw.expovariate(1.0) for _ in range(25)]
        low, high = sweep.median_bounds(values, turn)
        assert low <= statistics.median(values) <= high
        below, above = below + (low <= 0.6931), above + (high >= 0.6931)
    assert 50 <= below <= 60
    assert 50 <= above <= 60
    assert sweep.median_bounds([3.0] * 7, 0) == (3.0, 3.0)
    assert sweep.median_bounds([1.0, 2.0, 9.0], 5) == sweep.median_bounds([1.0, 2.0, 9.0], 5)


def test_where_sparse_begins_is_told_from_what_ran() -> None:
    def ran(*calls: int) -> sweep.Crossing:
        cells = [dataclasses.replace(CELL, length=128 * (n + 1), sparse_calls=each) for n, each in enumerate(calls)]
        (found,) = sweep.crossings(cells)
        return found

    assert (ran(0, 0, 4, 4).stays, ran(0, 0, 4, 4).runs) == (256, 384)
    assert (ran(0, 4, 0, 4).stays, ran(0, 4, 0, 4).runs) == (384, 512), "from there on, and not once"
    assert (ran(0, 0).stays, ran(0, 0).runs) == (None, None)
    assert (ran(4, 4).stays, ran(4, 4).runs) == (None, 128)
    assert (ran(0, 2, 2).stays, ran(0, 2, 2).runs) == (128, 256), "some layers are local and never do"
    assert "no length ran sparsely" in sweep.never_slower_table([CELL])


def test_a_call_that_stays_dense_asks_once_for_each_length(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    why = PatchedLayer.why_dense

    def counting(self: PatchedLayer, queries: int, *others: Any) -> str | None:
        asked.append(queries)
        return why(self, queries, *others)

    monkeypatch.setattr(PatchedLayer, "why_dense", counting)
    model = tiny_model("llama")
    with patch_model(model, "stem", keep=0.1) as patch, torch.no_grad():
        for length in (100, 120, 100, 120, 100):
            model(input_ids=tokens(1, length))
        assert sorted(asked) == [100] * 3 + [120] * 3
        assert patch.report().sparse_calls == 0
        assert sum(patch.report().previous_calls.values()) == 15
        layer = (patched_layers(model) or {})[0]
        monkeypatch.setattr("sparseprefill.huggingface_layers._MOST_CHOICES", 2)
        model(input_ids=tokens(1, 130))
        assert len(layer.choices) == 1, "what is remembered is bounded"


def test_the_patch_itself_is_timed_beside_the_stock_call() -> None:
    found = sweep.pass_through(tiny_model("llama"), calls=5)
    assert found.stock > 0
    assert found.dtype == "float32"
    assert "microseconds a layer" in sweep.pass_through_report(found)
    with pytest.raises(NotImplementedError, match="run sparsely here"):
        sweep.pass_through(tiny_model("llama"), calls=5, min_length=0)


class TestCommand:
    """`sparseprefill bench never-slower`."""

    def run(self, *arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(main, ["bench", "never-slower", "--device", "cpu", *arguments])
        assert done.exit_code == code, done.output
        assert "Traceback" not in done.output
        return done.output

    def test_end_to_end(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sparse, out = "block_sparse:keep=0.1,min_length=100", tmp_path / "out.json"
        monkeypatch.setattr(sweep, "prefill_seconds", Clock(1.0, 1.0, 0.5))
        monkeypatch.setattr(sweep, "pass_through", functools.partial(sweep.pass_through, calls=3))
        asked = ("--lengths", "64,128", "--pairs", "2", "--method", sparse)
        output = self.run(*asked, "--method", "default", "--dtypes", "float32", "--out", str(out))
        assert f"{sparse}, float32: sparse from 128 tokens on, dense up to 64" in output
        assert "default, float32: no length ran sparsely" in output
        assert output.count("a call that stays dense takes") == 1
        written = json.loads(out.read_text())
        assert [cell["passes"] for cell in written["cells"]] == [True] * 4
        assert {cell["decision"][:12] for cell in written["cells"]} == {"uncalibrated", "sparse from "}
        assert len(written["crossings"]) == 2
        monkeypatch.setattr(sweep, "prefill_seconds", Clock(1.0, 1.0, 2.0))
        output = self.run(*asked, "--dtypes", "bfloat16", code=1)
        assert f"slower than dense: {sparse} bfloat16 at 128" in output

    def test_refusals(self, tmp_path: Path) -> None:
        for options, message in (
            (("--dtypes", "float64"), "--dtypes are float32"),
            (("--pairs", "1"), "at least 2 pairs"),
            (("--method", "none", "--pairs", "2"), "unknown method 'none'"),
            (("--out", str(tmp_path / "none" / "out.json")), "make it first"),
            (("--calibration", str(tmp_path / "none.json")), "there is no calibration file"),
        ):
            assert message in self.run("--lengths", "64", *options, code=1)
