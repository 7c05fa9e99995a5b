"""The commands, as a user types them, on the model inside at small lengths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from sparseprefill.cli import main
from sparseprefill.evals import bench as benches
from sparseprefill.evals.loading import load_model
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.evals.needle import run_needle
from sparseprefill.prefill import METHODS


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
    assert all(name in output for name in METHODS)
    rows = json.loads(run("methods", "--json"))
    assert {row["method"] for row in rows} == set(METHODS)
    assert {row["kind"] for row in rows} <= {"selector", "static"}
    assert run("methods", "--markdown").startswith("| method")


def test_needle_writes_every_cell_and_a_picture(tmp_path: Path) -> None:
    output = run(
        "needle", "--lengths", "1k", "--samples", "2", "--generated", "1", "--depths", "3", "--out", str(tmp_path),
        "--method", "dense", "--method", "a_shape:sink=64,window=128", "--method", "random",
    )  # fmt: skip
    assert "a_shape:sink=64,window=128" in output
    data = json.loads((tmp_path / "needle.json").read_text())
    assert [s["method"] for s in data["scores"]] == ["dense", "a_shape:sink=64,window=128", "random:keep=0.2"]
    dense, a_shape, _ = data["scores"]
    assert sum(dense["asked"]) == 6
    assert dense["asked"] == [2, 2, 2]
    assert sum(dense["right"]) == 6, "the model inside retrieves at 1k"
    assert dense["generated_right"] == 1
    assert dense["density"] is None
    assert 0 < a_shape["density"] < 0.5
    assert a_shape["kernels"] == {"cpu": 4}
    assert len(a_shape["seconds"]) == 1
    assert data["provenance"]["versions"]["torch"]
    assert (tmp_path / "needle.png").read_bytes().startswith(b"\x89PNG")


def test_needle_reads_a_haystack(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The rain fell on the hills. " * 50)
    run(
        "needle", "--lengths", "600", "--samples", "1", "--depths", "2", "--method", "dense", "--generated", "0",
        "--haystack", str(tmp_path / "text.txt"), "--out", str(tmp_path),
    )  # fmt: skip
    data = json.loads((tmp_path / "needle.json").read_text())
    assert data["settings"]["haystack"] == "file"
    assert data["scores"][0]["seconds"] == [], "one prompt warms up and is not timed"


def test_a_dense_patch_scores_what_the_stock_model_scores() -> None:
    """The whole walk: the same answers through our kernel as through the stock model."""
    model, tokenizer = load_model()
    specs = [MethodSpec("dense"), MethodSpec("block_sparse", {"keep": 1.0}), MethodSpec("minference", {"density": 1.0})]
    result = run_needle(model, tokenizer, specs, [1024], samples=2)
    stock, blocks, slashes = result.scores
    assert stock.right == blocks.right == slashes.right
    assert blocks.kept_mass == pytest.approx(1.0, abs=1e-3)
    assert blocks.density == pytest.approx(1.0)
    assert result.speed_up(stock) == 1.0


def test_bench_checks_before_it_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benches, "why_no_flex", lambda device: "no compiler here")
    output = run(
        "bench", "--device", "cpu", "--lengths", "512", "--repeats", "1", "--densities", "0.3", "--ttft", "600"
    )
    assert "without FlexAttention: no compiler here" in output
    assert output.count("cpu") >= 4
    assert "vertical_slash" in output

    monkeypatch.setattr(benches, "_error", lambda inputs, index, output: 1.0)
    with pytest.raises(ValueError, match="ours is wrong"):
        benches.kernel_cells(device="cpu", lengths=[256], densities=[0.3], head_dims=[64], dtypes=[torch.float32])


def test_bench_needs_a_compiler_for_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benches.shutil, "which", lambda name: None)
    assert "no C++ compiler" in (benches.why_no_flex("cpu") or "")
    assert benches.why_no_flex("cuda") is None


def test_errors_are_messages(tmp_path: Path) -> None:
    assert "Did you mean 'a_shape'" in failed("needle", "--method", "a_shap")
    assert "no option 'windows'" in failed(
        "needle", "--lengths", "600", "--depths", "2", "--method", "a_shape:windows=3"
    )
    assert "exceed the model's window of 32768" in failed("needle", "--lengths", "64k")
    assert "samples must be at least 1" in failed("needle", "--samples", "0")
    assert "multiples of 128" in failed("bench", "--device", "cpu", "--lengths", "500")
    assert "too short" in failed("needle", "--lengths", "50")
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
    with pytest.raises(ValueError, match="no budget of 'x' is known"):
        MethodSpec.at_density("x", 0.2)
