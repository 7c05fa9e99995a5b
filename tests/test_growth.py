"""Time against length: slopes of known times, the lists that are written without a mask, every method's overhead."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from sparseprefill import contracts
from sparseprefill.cli import main
from sparseprefill.contracts import AttentionInputs, BlockGrid
from sparseprefill.evals import bench as benches
from sparseprefill.evals import growth as growths
from sparseprefill.evals import overhead as overheads
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.patterns import AShape, VerticalSlash, flexprefill, vertical_slash
from sparseprefill.patterns.flexprefill import FlexPrefill
from sparseprefill.patterns.methods import METHODS
from sparseprefill.prefill import resolve_method
from support import left_padding, make_inputs


def made_seconds(inputs: Any, contenders: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Every call is made; dense takes the square of the tokens, attending the tokens, finding their 1.5th power."""
    taken: dict[str, Callable[[int], float]] = {
        "dense": lambda n: 1e-9 * n**2, "find": lambda n: 1e-7 * n**1.5, "attend": lambda n: 1e-5 * n,
    }  # fmt: skip
    seconds = {}
    for name, run in contenders.items():
        run()
        what, length = [*name.split(), ""][:2]
        seconds[name] = taken.get(what, lambda n: 1e-3)(int(length) if length.isdigit() else inputs.queries)
    return seconds


@pytest.mark.parametrize("slope", [0.5, 1.0, 1.5, 2.0])
def test_slopes_are_recovered(slope: float) -> None:
    lengths = (1024, 2048, 3072, 8192)
    found = growths.slope_of(lengths, [3e-6 * n**slope for n in lengths])
    assert found.slope == pytest.approx(slope)
    assert found.worst == pytest.approx(0, abs=1e-9)
    off = growths.slope_of(lengths, [3e-6 * n**slope * (1.2 if n == 2048 else 1.0) for n in lengths])
    assert 0.1 < off.worst < 0.2
    with pytest.raises(ValueError, match="at least two lengths"):
        growths.slope_of([64, 64], [1.0, 1.0])


def test_the_command_times_prints_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growths, "median_seconds", made_seconds)
    asked = ["bench", "growth", "--device", "cpu", "--lengths", "512,1k", "--repeats", "1", "--heads", "2/1"]
    out, plot = tmp_path / "out.json", tmp_path / "growth.png"
    done = CliRunner().invoke(main, [*asked, "--out", str(out), "--plot", str(plot)])
    assert done.exit_code == 0, done.output
    written = json.loads(out.read_text())
    assert set(written["slopes"]) == {MethodSpec.parse(m).label for m in (*growths.LINEAR, *growths.QUADRATIC)}
    for slopes in written["slopes"].values():
        assert {what: round(each["slope"], 2) for what, each in slopes.items() if what != "total"} == {
            "finding": 1.5,
            "attending": 1.0,
            "dense": 2.0,
        }
    assert plot.read_bytes().startswith(b"\x89PNG")
    for wrong, message in (
        (("--lengths", "512"), "at least two lengths"),
        (("--lengths", "500,1k"), "multiples of 128"),
        (("--heads", "8"), "--heads is query/KV heads"),
        (("--method", "none"), "unknown method"),
        (("--plot", str(tmp_path / "none" / "a.png")), "make it first"),
    ):
        done = CliRunner().invoke(main, [*asked, *wrong])
        assert done.exit_code == 1
        assert message in done.output


def test_budgets_of_the_linear_methods_are_about_as_many_tokens() -> None:
    inputs = make_inputs(query_heads=2, kv_heads=1, queries=8192, head_dim=8)
    grid = BlockGrid.of(inputs, 64, 64)
    for text in growths.LINEAR:
        spec = MethodSpec.parse(text)
        index = resolve_method(spec.name, **spec.options).build_index(inputs, grid)
        assert 8 <= float(index.count[:, :, -1].float().mean()) <= 24


AWKWARD: dict[str, dict[str, Any]] = {
    "plain": {"queries": 500},
    "chunk": {"queries": 90, "keys": 410},
    "window": {"queries": 300, "window": 70},
    "left padding": {"queries": 300, "batch": 2, "key_valid": left_padding(300, [0, 130])},
    "static cache": {"queries": 100, "keys": 300, "key_length": 250, "query_start": 120},
    "short cache": {"queries": 100, "keys": 300, "key_length": 40, "query_start": 120},
    "packed": {"queries": 300, "segment": torch.tensor([[0] * 90 + [1] * 150 + [2] * 60])},
    "one query": {"queries": 1, "keys": 200},
}


@pytest.mark.parametrize("case", AWKWARD)
@pytest.mark.parametrize(
    "pattern",
    [
        VerticalSlash(verticals=40, slashes=50), VerticalSlash(density=0.3), VerticalSlash(density=1.0),
        FlexPrefill(gamma=0.3, tau=0.0, min_budget=16), FlexPrefill(gamma=1.0, tau=0.0, min_budget=16),
    ],
    ids=repr,
)  # fmt: skip
def test_lists_without_a_mask_are_those_of_a_mask(pattern: Any, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = awkward(case)
    grid = BlockGrid.of(inputs, 16, 16)
    lists: dict[int, Any] = {}
    written = 0
    few = vertical_slash.crossed_lists

    def counting(*given: Any) -> Any:
        nonlocal written
        found = few(*given)
        written += found is not None
        return found

    monkeypatch.setattr(vertical_slash, "crossed_lists", counting)
    monkeypatch.setattr(flexprefill, "crossed_lists", counting)
    monkeypatch.setattr(contracts, "_SLAB_ENTRIES", 3 * inputs.batch * inputs.query_heads * grid.key_blocks)  # 3 rows
    for share in (1, 1 << 30):  # always where the sum of both is not above all blocks, or never
        monkeypatch.setattr(vertical_slash, "_FEW", share)
        index = pattern.build_index(inputs, grid)
        index.validate(inputs)
        lists[share] = index
    assert torch.equal(lists[1].to_mask(), lists[1 << 30].to_mask())
    if case == "plain" and pattern not in (VerticalSlash(density=1.0), FlexPrefill(gamma=1.0, tau=0.0, min_budget=16)):
        assert written == 1


@pytest.mark.parametrize("case", AWKWARD)
@pytest.mark.parametrize("sizes", [(16, 16), (16, 8), (8, 16)], ids=str)
def test_an_a_shape_is_its_definition(case: str, sizes: tuple[int, int]) -> None:
    """Blocks of the sink and of the window, and the last visible one where neither is."""
    inputs = awkward(case)
    grid = BlockGrid.of(inputs, *sizes)
    for pattern in (AShape(16, 1), AShape(0, 40), AShape(40, 100), AShape(16, 1000), AShape(8, 0.3), AShape(0, 1.0)):
        index = pattern.build_index(inputs, grid)
        index.validate(inputs)
        low, high = grid.visible_blocks(inputs)
        sink = -(-pattern.sink // grid.block_k)
        first = torch.minimum(pattern._first_local(grid, sink), high - 1)[..., None]
        block = torch.arange(grid.key_blocks)
        kept = ((block < sink) | (block >= first)) & (block >= low[..., None]) & (block < high[..., None])
        assert torch.equal(index.to_mask(), kept[:, None].expand(-1, inputs.query_heads, -1, -1))


def awkward(case: str) -> AttentionInputs:
    fields = dict(AWKWARD[case])
    start = fields.pop("query_start", None)
    inputs = make_inputs(head_dim=8, **fields)
    return inputs if start is None else dataclasses.replace(inputs, query_start=start)


class TestOverheads:
    """`sparseprefill bench --estimator`."""

    def test_all_are_timed_wrappers_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(overheads, "median_seconds", made_seconds)
        cells = overheads.overhead_cells(
            ["all"], device="cpu", lengths=(1024,), head_dims=(16,), dtypes=(torch.float32,), query_heads=2, kv_heads=1
        )
        names = [cell.method.partition(":")[0] for cell in cells]
        assert names == [name for name in METHODS if name not in ("dense", "minference")]
        by_name = dict(zip(names, cells, strict=True))
        assert by_name["a_shape"].over_products is None
        xattention = by_name["xattention"]
        assert xattention.products == pytest.approx(1 / 16, rel=0.1)
        assert xattention.over_products == pytest.approx(xattention.estimate / xattention.products)
        assert by_name["pbs"].products > by_name["block_sparse"].products
        table = overheads.overhead_table(cells)
        assert "estimate / products" in table
        assert all(cell.method in table for cell in cells)

    def test_densities_are_about_the_one_that_is_asked_for(self) -> None:
        inputs = benches.random_inputs(2, 1, 8192, 16, torch.float32, "cpu", 0)
        grid = BlockGrid.of(inputs, 64, 64)
        tiles = grid.rows * (grid.rows + 1) / 2
        for spec in overheads.every(["all", "block_sparse:keep=0.5", "all"]):
            if spec.name in ("sale", "sign_code", "clusters", "pbs", "hyperattention"):  # slow, or counted in parts
                continue
            index = resolve_method(spec.name, **spec.options).build_index(inputs, grid)
            density = float(index.count.float().mean(1).sum()) / tiles
            wanted = 0.5 if spec.label == "block_sparse:keep=0.5" else 0.11
            assert 0.5 * wanted <= density <= 2 * wanted, spec.label

    def test_a_wrong_wrapper_is_not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(benches, "_error_and_allowed", lambda parts, output: (1.0, 0.0))
        with pytest.raises(ValueError, match=r"pbs:keep=0\.2 is wrong, so it is not timed"):
            overheads.overhead_cells(["pbs:keep=0.2"], device="cpu", lengths=(512,), head_dims=(16,))
