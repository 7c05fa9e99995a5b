"""The report that a GPU is asked for, run on the CPU at sizes that mean nothing: parts, time, failures."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
from test_docs import script

from sparseprefill.evals import bench, gpu_report
from sparseprefill.evals.gpu_report import (
    CORRECTNESS,
    FIRST_TOKEN,
    KERNEL,
    OVERHEAD,
    RIVALS,
    SMALL,
    Step,
    commit_of,
    file_stem,
    read_junit,
    report_markdown,
    run_parts,
    went_wrong,
)

PASSING = "def test_a():\n    pass\n\n\ndef test_b():\n    import pytest\n    pytest.skip('no')\n"


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gpu_report.Sizes:
    """Sizes with tests of their own, and no compiler for FlexAttention."""
    monkeypatch.setattr(bench, "why_no_flex", lambda device: "no compiler here")
    (tmp_path / "test_own.py").write_text(PASSING)
    arguments = ("-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path / "test_own.py"))
    return dataclasses.replace(SMALL, tests=(arguments,))


def named(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {part["name"]: part for part in report["parts"]}


def test_the_script_writes_every_part(
    small: gpu_report.Sizes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_report, "SMALL", small)
    out = tmp_path / "out"
    out.mkdir()
    assert script("gpu_report").main(["--device", "cpu", "--small", "--out", str(out), "--commit", "abc"]) == 0
    (found,) = out.glob("*.json")
    report = json.loads(found.read_text())
    assert found.stem == file_stem(report) == f"cpu_report_{report['provenance']['date']}"
    assert (report["kind"], report["commit"], report["device"]) == ("gpu-report", "abc", "cpu")
    parts = named(report)
    assert list(parts) == [CORRECTNESS, KERNEL, FIRST_TOKEN, RIVALS, OVERHEAD]
    assert all(not part["errors"] and not part["not_run"] and part["results"] for part in parts.values())
    (tests,) = parts[CORRECTNESS]["results"]
    assert (tests["passed"], tests["skipped"], tests["failed"], tests["whole"]) == (1, 1, 0, True)
    assert [each["density"] for each in parts[KERNEL]["results"]][::2] == [1.0, 1.0], "every block listed"
    assert {each["method"] for each in parts[FIRST_TOKEN]["results"]} == {"dense", *small.methods}
    assert {"ours, every block", "sdpa", "sdpa flash", "flash-attn"} <= {
        each["name"] for each in parts[RIVALS]["results"]
    }
    page = (out / f"{found.stem}.md").read_text()
    assert page == report_markdown(report)
    assert all(f"## {name.capitalize()}" in page for name in parts)
    assert page in capsys.readouterr().out


def test_what_raises_is_reported_and_the_rest_goes_on(
    small: gpu_report.Sizes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_own.py").write_text(PASSING + "\n\ndef test_c():\n    assert 1 == 2\n")

    def broken(*_: Any, lengths: list[int], **__: Any) -> list[Any]:
        if lengths == [256]:
            raise RuntimeError("an illegal memory access")
        return []

    monkeypatch.setattr(gpu_report, "kernel_cells", broken)
    monkeypatch.setattr(gpu_report, "SMALL", small)
    options = ["--device", "cpu", "--small", "--out", str(tmp_path), "--part", KERNEL, "--part", CORRECTNESS]
    assert script("gpu_report").main(options) == 1
    said = capsys.readouterr()
    assert f"{KERNEL}, 256 tokens, density 1: RuntimeError: an illegal memory access" in said.err
    assert "test failed: test_own::test_c" in said.err
    assert "Failed: 256 tokens, density 0.3: `RuntimeError: an illegal memory access`" in said.out
    assert "512 tokens, density" not in said.out


class TestTime:
    """`run_parts` with a clock of our own."""

    @pytest.fixture(autouse=True)
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        now = [100.0]
        monkeypatch.setattr(gpu_report.time, "monotonic", lambda: now[0])
        return now

    @staticmethod
    def step(label: str, weight: float, seconds: float, clock: list[float], fails: bool = False) -> Step:
        def run(left: float) -> list[Any]:
            clock[0] += seconds
            if fails:
                raise ValueError(label)
            return [label]

        return Step(label, weight, run)

    def test_a_step_that_would_not_end_in_time_is_not_begun(self, clock: list[float]) -> None:
        steps = [self.step(str(n), n, 10.0 * n, clock) for n in (1, 2, 4, 1)]
        (part,) = run_parts([("a", 1.0, steps)], 60.0)
        assert part.results == ["1", "2", "1"]
        assert part.not_run == ["4"]
        assert part.to_dict()["not_run"] == ["4: out of time"]

    def test_what_a_part_leaves_goes_to_the_next_and_none_takes_anothers(self, clock: list[float]) -> None:
        first = ("first", 0.5, [self.step("a", 1, 10, clock)])
        second = ("second", 0.25, [self.step(name, 1, 30, clock) for name in "bcd"])
        third = ("third", 0.25, [self.step(name, 1, 20, clock) for name in "ef"])
        found = run_parts([first, second, third], 100.0)
        assert [part.results for part in found] == [["a"], ["b", "c"], ["e"]]
        assert [part.not_run for part in found] == [[], ["d"], ["f"]]

    def test_nothing_is_begun_when_the_time_is_over(self, clock: list[float]) -> None:
        slow = ("slow", 0.5, [self.step("a", 0, 200, clock, fails=True), self.step("b", 0, 1, clock)])
        found = run_parts([slow, ("later", 0.5, [self.step("c", 1, 1, clock)])], 100.0)
        assert [part.not_run for part in found] == [["b"], ["c"]]
        assert found[0].errors == {"a": "ValueError: a"}


class TestPytest:
    """The process that tests run in."""

    @pytest.mark.slow
    def test_one_whose_time_is_over_leaves_what_it_has(self, tmp_path: Path) -> None:
        slow = "import time\n\n\ndef test_a():\n    pass\n\n\ndef test_slow():\n    time.sleep(60)\n"
        (tmp_path / "test_own.py").write_text(slow)
        arguments = ("-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path / "test_own.py"))
        began = time.monotonic()
        (found,) = gpu_report._tests(arguments, tmp_path, 1.0, 4.0)
        assert time.monotonic() - began < 50
        assert (found.passed, found.whole) == (1, False)

    def test_one_that_says_nothing_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match="pytest left no results after"):
            gpu_report._tests(("--no-such-option",), tmp_path, 1.0, 30.0)

    def test_errors_in_fixtures_count_as_failures(self) -> None:
        case = '<testcase classname="tests.test_x" name="{}">{}</testcase>'
        cases = [
            case.format(*each) for each in (("a", ""), ("b", "<error/>"), ("c", "<failure/>"), ("d", "<skipped/>"))
        ]
        found = read_junit(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>", "-m gpu", 1.0)
        assert (found.passed, found.failed, found.skipped) == (1, 2, 1)
        assert found.failures == ["tests.test_x::b", "tests.test_x::c"]
        assert went_wrong({"parts": [{"name": CORRECTNESS, "errors": {}, "results": [dataclasses.asdict(found)]}]})


def test_a_commit_that_git_cannot_say_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit_of(tmp_path) == "unknown"


def test_a_part_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no part of the report is called 'speed'"):
        gpu_report.gpu_report(device="cpu", sizes=SMALL, minutes=1.0, root=tmp_path, only=["speed"])


def test_files_are_called_by_device_and_date() -> None:
    about = {"gpu": "NVIDIA H100 80GB HBM3", "date": "2026-11-28"}
    assert file_stem({"device": "cuda", "provenance": about}) == "gpu_nvidia_h100_80gb_hbm3_2026-11-28"
