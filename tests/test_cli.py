"""The commands, as a user types them, on the model inside at small lengths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from sparseprefill.cli import main
from sparseprefill.evals import bench as benches
from sparseprefill.evals.loading import load_model
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.evals.needle_tasks import NeedlesAlong
from sparseprefill.evals.runner import run_eval
from sparseprefill.patterns.context_methods import CONTEXT_METHODS
from sparseprefill.patterns.methods import KINDS, METHODS


def run(*arguments: str) -> str:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def failed(*arguments: str) -> str:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    return result.output


def test_methods_lists_every_method() -> None:
    output = run("methods")
    assert all(name in output for name in (*METHODS, *CONTEXT_METHODS))
    rows = json.loads(run("methods", "--json"))
    assert {row["method"] for row in rows} == {*METHODS, *CONTEXT_METHODS}
    assert {row["kind"] for row in rows} <= set(KINDS)
    assert run("methods", "--markdown").startswith("| method")


def test_a_dense_patch_scores_what_the_stock_model_scores(tmp_path: Path) -> None:
    """The whole walk: the same answers through our kernel as through the stock model."""
    model, tokenizer = load_model()
    specs = [MethodSpec("dense"), MethodSpec("block_sparse", {"keep": 1.0}), MethodSpec("minference", {"density": 1.0})]
    result = run_eval(NeedlesAlong(tokenizer, [1024], samples=2), model, tokenizer, specs, tmp_path)
    assert result is not None
    stock, *ours = ([answer for _, answer in result.answers(spec.label)] for spec in specs)
    assert all(answers == stock for answers in ours)
    assert sum(answer.values["found"] for answer in stock) == 10, "the model inside retrieves at 1k"
    for spec in specs[1:]:
        observed = result.records[0].runs[spec.label].observed
        assert observed is not None
        assert (observed.density, observed.kept_mass) == (pytest.approx(1.0), pytest.approx(1.0, abs=1e-3))


def test_bench_checks_before_it_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benches, "why_no_flex", lambda device: "no compiler here")
    output = run(
        "bench", "--device", "cpu", "--lengths", "512", "--repeats", "1", "--densities", "0.3", "--ttft", "600"
    )
    assert "without FlexAttention: no compiler here" in output
    assert "without native: it is not built" in output
    assert "cpu / ideal over 4 cells" in output
    assert "longest first call: cpu" in output
    assert "vertical_slash" in output

    monkeypatch.setattr(benches, "_error_and_allowed", lambda parts, output: (1.0, 0.0))
    with pytest.raises(ValueError, match="cpu is wrong"):
        benches.kernel_cells(device="cpu", lengths=[256], densities=[0.3], head_dims=[64], dtypes=[torch.float32])


def test_bench_times_every_kernel_that_serves(native: Path) -> None:
    cells = benches.kernel_cells(
        device="cpu", lengths=[256], densities=[0.3, 1.0], head_dims=[64], dtypes=[torch.bfloat16], query_heads=4,
        kv_heads=1, against=["dense"], repeats=1,
    )  # fmt: skip
    assert [list(cell.ours) for cell in cells] == [["native", "cpu"]] * 2
    assert [list(cell.first) for cell in cells] == [["native", "cpu", "dense"]] * 2
    assert all(cell.flex is None for cell in cells)
    assert all(list(cell.error) == list(cell.ours) for cell in cells)
    text = benches.kernel_table(cells, against=["dense"])
    assert "native / ideal over 2 cells" in text
    assert "flex" not in text
    head, line = (text.splitlines()[n] for n in (0, 2))
    assert "native / dense" in head
    assert f"{cells[0].ours['native'] / cells[0].dense:.3f}" in line


def test_bench_times_something_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benches, "kernels_for", lambda inputs: ({}, {"cpu": "it has its reasons"}))
    with pytest.raises(NotImplementedError, match=r"no kernel serves .* cpu: it has its reasons"):
        benches.kernel_cells(device="cpu", lengths=[256], densities=[0.3], head_dims=[64], dtypes=[torch.float32])


def test_bench_names_a_length_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*shape: Any, **options: Any) -> Any:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes")

    monkeypatch.setattr(benches, "available_bytes", lambda device: 100 << 20)
    monkeypatch.setattr(benches, "random_inputs", full)
    with pytest.raises(MemoryError, match=r"65536 tokens at head_dim 64 in float32 do not fit .*: (\d+) tokens should"):
        benches.kernel_cells(device="cpu", lengths=[65536], head_dims=[64], dtypes=[torch.float32])


def test_bench_needs_a_compiler_for_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benches.shutil, "which", lambda name: None)
    assert "no C++ compiler" in (benches.why_no_flex("cpu") or "")
    assert benches.why_no_flex("cuda") is None


def test_errors_are_messages(tmp_path: Path) -> None:
    assert "Did you mean 'a_shape'" in failed("needle", "--method", "a_shap")
    out = ("--out", str(tmp_path / "out"))
    assert "no option 'windows'" in failed("needle", "--lengths", "600", "--method", "a_shape:windows=3", *out)
    assert "exceed the model's window of 32768" in failed("needle", "--lengths", "64k", *out)
    assert "samples must be at least 1" in failed("needle", "--samples", "0", *out)
    assert "multiples of 128" in failed("bench", "--device", "cpu", "--lengths", "500")
    assert "no rival 'flash'" in failed("bench", "--device", "cpu", "--against", "flash")
    assert "--against goes with the kernel" in failed("bench", "--against", "dense", "--calibrate")
    assert "--heads is query/KV heads" in failed("bench", "--device", "cpu", "--heads", "8/0")
    assert "too short" in failed("needle", "--lengths", "50", "--method", "dense", *out)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{")
    assert "cannot be loaded" in failed("needle", "--model", str(tmp_path / "model"))
    assert "is not a list of numbers" in CliRunner().invoke(main, ["needle", "--lengths", "four"]).output


def test_a_corrupt_model_folder_names_itself(tmp_path: Path) -> None:
    model, tokenizer = load_model()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_model(str(tmp_path))[0].num_parameters() == model.num_parameters()
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*cannot be loaded"):
        load_model(str(tmp_path))
    with pytest.raises(ValueError, match="unknown dtype"):
        load_model(dtype="int8")


def test_options_are_parsed() -> None:
    assert MethodSpec.parse("a_shape:sink=64,window=0.2") == MethodSpec("a_shape", {"sink": 64, "window": 0.2})
    assert MethodSpec.parse("minference:budget=paper") == MethodSpec("minference", {"budget": "paper"})
    assert MethodSpec.parse("dense").label == "dense"
    with pytest.raises(ValueError, match="name=value"):
        MethodSpec.parse("a_shape:sink")
    assert MethodSpec.parse("pbs:force_first=False") == MethodSpec.parse("pbs:force_first=false")
    assert MethodSpec.parse(MethodSpec("pbs", {"force_first": False}).label).options == {"force_first": False}
    with pytest.raises(ValueError, match=r"name its options, as in stem:keep=0\.1;"):
        MethodSpec.at_density("stem", 0.2)
    with pytest.raises(ValueError, match="no budget of 'x' is known"):
        MethodSpec.at_density("x", 0.2)
