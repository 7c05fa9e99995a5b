"""docs/results.md is what its script makes of the files that are there, and what the script makes of others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_docs import ROOT, script

from sparseprefill.evals import results_page
from sparseprefill.evals.gpu_report import CORRECTNESS, FIRST_TOKEN, KERNEL, OVERHEAD

CELL = {"dtype": "bfloat16", "head_dim": 128, "length": 1024, "dense": 2.0, "flex": None}
TOKEN = {"method": "dense", "length": 64, "seconds": 1.0, "speed_up": 1.0}


def about(date: str, **others: Any) -> dict[str, Any]:
    return {"date": date, "versions": {"torch": "2.13"}, "processor": "a processor", **others}


def keep(folder: Path, name: str, data: dict[str, Any]) -> None:
    (folder / f"{name}.json").write_text(json.dumps(data))


def test_the_page_is_what_the_script_makes() -> None:
    """After a change of docs/results: `python scripts/results_page.py`."""
    assert (
        results_page.page(results_page.sources(ROOT / "docs" / "results")) == (ROOT / "docs" / "results.md").read_text()
    )


def test_every_result_file_stands_on_it() -> None:
    text = (ROOT / "docs" / "results.md").read_text()
    for path in (ROOT / "docs" / "results").glob("*.json"):
        assert f"[{path.stem}](results/{path.stem}." in text


def test_ratios_by_date(tmp_path: Path) -> None:
    sparse = [
        {**CELL, "density": density, "ours": {"cpu": ours}, "flex": 1.0} for density, ours in ((0.1, 0.4), (0.5, 8.0))
    ]
    keep(
        tmp_path,
        "second",
        {"provenance": about("2026-02-01"), "kernel": [{**CELL, "density": 1.0, "ours": {"cpu": 3.0}}]},
    )
    keep(tmp_path, "first", {"provenance": about("2026-01-01"), "kernel": sparse})
    keep(tmp_path, "undated", {"provenance": {"versions": {}}, "kernel": sparse})
    found = results_page.sources(tmp_path)
    assert [each.path.stem for each in found] == ["undated", "first", "second"]
    rows = list(results_page.kernel_rows(found))
    assert [(row.over_ideal, row.dense_mode, row.over_flex) for row in rows] == [
        (pytest.approx(4.0), None, pytest.approx(3.2**0.5)), (pytest.approx(4.0), None, pytest.approx(3.2**0.5)),
        (None, pytest.approx(1.5), None),
    ]  # fmt: skip
    assert results_page.drawn(found) == {}, "one date each"
    keep(tmp_path, "third", {"provenance": about("2026-03-01"), "kernel": sparse})
    script("results_page").main(["--results", str(tmp_path), "--out", str(tmp_path / "results.md")])
    assert (tmp_path / "results.png").stat().st_size > 1000
    assert "](results.png)" in (tmp_path / "results.md").read_text()
    assert list(results_page.drawn(results_page.sources(tmp_path))) == ["ours / ideal"]


def test_a_gpu_report_stands_in_every_table(tmp_path: Path) -> None:
    parts = {
        CORRECTNESS: [{"arguments": "-m gpu tests", "passed": 5, "failed": 1, "skipped": 2, "whole": False}],
        KERNEL: [{**CELL, "density": 0.1, "ours": {"triton": 0.3}}],
        FIRST_TOKEN: [
            {**TOKEN, "shape": "qwen3-8b", "layers": 1, "whole_layers": 36, "whole_seconds": 36.0, "peak_bytes": 2**21},
            {"shape": "qwen3-8b", "length": 128, "out_of_memory": "dense ran out of memory"},
        ],
        OVERHEAD: [{"method": "stem", "dtype": "bfloat16", "length": 64, "estimate": 0.25, "attention": 0.5}],
    }
    report = {
        "kind": "gpu-report", "provenance": about("2026-01-01", gpu="NVIDIA H100"),
        "parts": [{"name": name, "results": results} for name, results in parts.items()],
    }  # fmt: skip
    keep(tmp_path, "gpu", report)
    (tmp_path / "gpu.md").write_text("# A page\n")
    text = results_page.page(results_page.sources(tmp_path))
    assert text.count("NVIDIA H100") == 4
    assert text.count("[gpu](results/gpu.md)") == 4
    cells = [line.split("|")[3:-3] for line in text.splitlines() if "NVIDIA" in line]
    said = [[cell.strip() for cell in row] for row in cells]
    assert said == [
        ["`pytest -m gpu tests`", "5", "1", "2", "no"],
        ["triton", "bfloat16", "128", "1024", "1.50", "-", "-"],
        ["`stem`", "bfloat16", "64", "0.250", "0.500", "0.750"],
        ["qwen3-8b", "`dense`", "64", "36.000 (extrapolated)", "1.00x", "2"],
    ]
    assert "Other results" not in text


def test_dates_wherever_they_stand(tmp_path: Path) -> None:
    keep(tmp_path, "a", {"provenance": [about("2026-01-01"), about("2026-01-02")]})
    keep(tmp_path, "b", {"settings": {"date": "2026-01-03"}, "provenance": {"versions": {}}})
    keep(tmp_path, "c", {"date": "2026-01-04", "versions": {"torch": "2.9"}})
    keep(tmp_path, "d", {"cost": {"provenance": about("2026-01-05")}})
    keep(tmp_path, "e", {"entries": [{"key": {"torch": "2.8", "device_name": "x"}, "date": "2026-01-06"}]})
    found = results_page.sources(tmp_path)
    assert [each.date for each in found] == [f"2026-01-0{n}" for n in range(2, 7)]
    assert [each.versions for each in found] == ["torch 2.13", "", "torch 2.9", "torch 2.13", "torch 2.8"]
    assert found[-1].device == "x"
    assert all(each.other for each in found)
