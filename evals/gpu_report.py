"""Everything that only a GPU can tell, in one run of under ten minutes: is it right, how fast, next to whom.

The run is a list of parts, a part a list of steps. A step that would not end in its part's time is not begun, and
stands in the report as not run; one that raises is reported with its error, and the rest goes on.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from sparseprefill import __version__
from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.evals.bench import KernelCell, dense_attention, kernel_cells, kernel_table, median_seconds
from sparseprefill.evals.bench import random_inputs as drawn
from sparseprefill.evals.dense_rivals import RIVALS as DENSE_RIVALS
from sparseprefill.evals.dense_rivals import dense_flops, ready
from sparseprefill.evals.first_token import FirstTokenCell, ModelSetup, OutOfMemory, first_token_table, first_tokens
from sparseprefill.evals.loading import provenance
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.evals.overhead import OverheadCell, overhead_cells, overhead_table
from sparseprefill.kernels import block_sparse_attention
from sparseprefill.reports import number, table

_BLOCK = 64
_GRACE = 20.0  # seconds in which an interrupted pytest may write what it has


@dataclass(frozen=True, slots=True)
class Sizes:
    """What each part goes through."""

    tests: tuple[tuple[str, ...], ...]  # arguments of pytest, a process each
    heads: tuple[int, int]  # of queries, of keys
    head_dim: int
    lengths: tuple[int, ...]  # of kernels and estimators, tokens
    densities: tuple[float, ...]  # 1.0 is dense mode: every block listed
    estimators: tuple[str, ...]  # methods with options
    shapes: tuple[str, ...]  # of whole models, see `SHAPES`
    layers: int | None  # of them; None for all
    prompts: tuple[int, ...]  # of whole models, tokens
    methods: tuple[str, ...]  # of whole models, dense beside
    repeats: int


FULL = Sizes(
    tests=(("-m", "gpu", "tests"), ("-m", "not slow", "tests/test_triton.py", "tests/test_triton_low_bit.py",
                                    "tests/test_triton_antidiagonal.py", "tests/test_tile_skip.py")),
    heads=(32, 8), head_dim=128, lengths=(32768, 65536, 131072), densities=(1.0, 0.1, 0.2, 0.5, 0.05, 0.3),
    estimators=(
        "stem:keep=0.12,decay=0.7,sink=64,local=128", "block_sparse:keep=0.2", "vertical_slash:density=0.2",
        "xattention:keep=0.2", "flexprefill:gamma=0.5", "sale:keep=0.2",
    ),
    shapes=("llama-3.1-8b", "qwen3-8b"), layers=None, prompts=(32768, 131072),
    methods=("stem:keep=0.12,decay=0.7,sink=64,local=128", "block_sparse:keep=0.1"), repeats=3,
)  # fmt: skip
"""On a GPU."""

SMALL = Sizes(
    tests=(("tests/test_index_storage.py",),), heads=(2, 1), head_dim=64, lengths=(256, 512), densities=(1.0, 0.3),
    estimators=("block_sparse:keep=0.3",), shapes=("inside",), layers=1, prompts=(256, 512),
    methods=("block_sparse:keep=0.3",), repeats=1,
)  # fmt: skip
"""To try the run itself, anywhere."""


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do."""

    label: str
    weight: float  # how long it takes, beside the other steps of its part; 0 for one that keeps to the time by itself
    run: Callable[[float], list[Any]]  # of the seconds that are left; dataclasses or dictionaries


@dataclass(slots=True)
class Part:
    """What came of a list of steps."""

    name: str
    results: list[Any] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)  # out of time
    errors: dict[str, str] = field(default_factory=dict)  # by step
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        plain = [asdict(each) if is_dataclass(each) and not isinstance(each, type) else each for each in self.results]
        return {
            "name": self.name, "seconds": round(self.seconds, 1), "results": plain, "errors": self.errors,
            "not_run": [f"{label}: out of time" for label in self.not_run],
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class PytestRun:
    """One process of pytest."""

    arguments: str
    passed: int
    failed: int  # errors outside a test's body among them
    skipped: int
    failures: list[str]  # names
    seconds: float
    whole: bool  # False where its time was over first


@dataclass(frozen=True, slots=True)
class RivalCell:
    """One way of dense causal attention on the same queries, keys and values."""

    name: str
    version: str
    length: int  # tokens
    seconds: float | None  # median; None where it does not run here
    teraflops: float | None  # a second, over the pairs that a causal mask leaves
    why_not: str  # or ""


def run_parts(
    parts: Sequence[tuple[str, float, Sequence[Step]]], seconds: float, done: Callable[[Part], Any] = lambda part: None
) -> list[Part]:
    """Run (name, share of the time, steps) one after the other; time that a part leaves goes to those behind it.

    A step is expected to take as long as its weight says next to the last one of its part.
    """
    began = time.monotonic()
    found, shares = [], 0.0
    for name, share, steps in parts:
        shares += share
        until = began + seconds * min(1.0, shares)
        part = Part(name)
        pace = 0.0  # seconds a weight, of the last step
        part_began = time.monotonic()
        for step in steps:
            step_began = time.monotonic()
            left = until - step_began
            if left <= pace * step.weight or left <= 0:
                part.not_run.append(step.label)
                continue
            try:
                part.results += step.run(left)
            except Exception as error:  # whatever a driver, a compiler or a test finds
                part.errors[step.label] = f"{type(error).__name__}: {error}"[:2000]
            if step.weight:
                pace = (time.monotonic() - step_began) / step.weight
        part.seconds = time.monotonic() - part_began
        found.append(part)
        done(part)
    return found


def all_parts(sizes: Sizes, device: str, root: Path) -> list[tuple[str, float, list[Step]]]:
    """The parts of the report, with their shares of the time, what matters most first.

    What compilers and the oracle take does not grow with a prompt's square, so that steps are weighed by less.
    """
    tests = [
        Step(" ".join(each), 0.0, functools.partial(_tests, each, root, 1.0 if each is sizes.tests[-1] else 0.6))
        for each in sizes.tests
    ]
    kernel = [
        Step(f"{n} tokens, density {density:g}", n, functools.partial(_kernel, sizes, device, n, density))
        for n in sizes.lengths
        for density in sizes.densities
    ]
    rivals = [Step(f"{n} tokens", n, functools.partial(_rivals, sizes, device, n)) for n in sizes.lengths]
    overhead = [Step(f"{n} tokens", n, functools.partial(_overhead, sizes, device, n)) for n in sizes.lengths]
    return [
        (CORRECTNESS, 0.3, tests),
        (KERNEL, 0.3, kernel),
        (FIRST_TOKEN, 0.25, list(_first_token_steps(sizes, device))),
        (RIVALS, 0.05, rivals),
        (OVERHEAD, 0.1, overhead),
    ]


CORRECTNESS, RIVALS, KERNEL = "correctness", "dense attention by others", "kernel"
OURS = "ours, every block"
OVERHEAD, FIRST_TOKEN = "finding the blocks", "time to first token"


def _tests(arguments: Sequence[str], root: Path, share: float, left: float) -> list[Any]:
    """Run pytest in a process of its own. RuntimeError where it cannot run, or says nothing."""
    allowed = max(1.0, share * left)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        # as the command `pytest` would: the folder it starts in is not to be searched for modules
        code = "import sys; sys.path[:] = filter(None, sys.path); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-c", code, "-q", f"--junitxml={report}", *arguments],
            cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        whole = True
        try:
            said, _ = process.communicate(timeout=allowed)
        except subprocess.TimeoutExpired:
            whole = False
            process.send_signal(signal.SIGINT)  # it writes what it has
            try:
                said, _ = process.communicate(timeout=_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                said, _ = process.communicate()
        seconds = time.monotonic() - began
        if not report.exists():
            last = (said.strip().splitlines() or ["it said nothing"])[-1]
            raise RuntimeError(
                f"pytest left no results after {seconds:.0f} seconds (status {process.returncode}): {last}"
            )
        found = read_junit(report.read_text(encoding="utf-8"), " ".join(arguments), seconds, whole)
    return [found]


def read_junit(text: str, arguments: str, seconds: float, whole: bool = True) -> PytestRun:
    """What pytest's XML says."""
    passed, skipped, failures = 0, 0, []
    cases = list(ElementTree.fromstring(text).iter("testcase"))
    if not whole and cases and not len(cases[-1]):
        cases.pop()  # the one that was interrupted looks like one that passed
    for case in cases:
        if case.find("failure") is not None or case.find("error") is not None:
            failures.append(f"{case.get('classname')}::{case.get('name')}")
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return PytestRun(arguments, passed, len(failures), skipped, failures, round(seconds, 1), whole)


def _inputs(sizes: Sizes, device: str, length: int) -> AttentionInputs:
    return drawn(*sizes.heads, length, sizes.head_dim, torch.bfloat16, device, 0)


def _kernel(sizes: Sizes, device: str, length: int, density: float, left: float) -> list[Any]:
    try:
        found: list[Any] = kernel_cells(
            device=device, lengths=[length], densities=[density], head_dims=[sizes.head_dim], dtypes=[torch.bfloat16],
            query_heads=sizes.heads[0], kv_heads=sizes.heads[1], repeats=sizes.repeats,
        )  # fmt: skip
    finally:
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # what was compiled holds its mask, and so many compilations are allowed
    return found


def _rivals(sizes: Sizes, device: str, length: int, left: float) -> list[Any]:
    """Rivals and our kernel with every block listed, in turns; `KERNEL` holds that to the oracle."""
    inputs = _inputs(sizes, device, length)
    index = BlockIndex.dense(inputs, BlockGrid.of(inputs, _BLOCK, _BLOCK))
    calls, reasons = ready(inputs)
    contenders: dict[str, Callable[[], Any]] = {
        OURS: lambda: block_sparse_attention(inputs, index), "sdpa": functools.partial(dense_attention, inputs), **calls
    }  # fmt: skip
    found = median_seconds(inputs, contenders, sizes.repeats)
    flops = dense_flops(inputs)
    timed = [RivalCell(name, _rival_version(name), length, s, flops / s / 1e12, "") for name, s in found.items()]
    return [*timed, *(RivalCell(name, "-", length, None, None, reason) for name, reason in reasons.items())]


def _rival_version(name: str) -> str:
    if name in DENSE_RIVALS:
        return DENSE_RIVALS[name].version()
    return f"sparseprefill {__version__}" if name == OURS else f"torch {torch.__version__}"


def _overhead(sizes: Sizes, device: str, length: int, left: float) -> list[Any]:
    found: list[Any] = overhead_cells(
        sizes.estimators, device=device, lengths=[length], head_dims=[sizes.head_dim], dtypes=[torch.bfloat16],
        query_heads=sizes.heads[0], kv_heads=sizes.heads[1], repeats=sizes.repeats,
    )  # fmt: skip
    return found


def _first_token_steps(sizes: Sizes, device: str) -> Iterator[Step]:
    made: dict[str, Any] = {}  # the model of one shape at a time

    def run(shape: str, length: int, left: float) -> list[Any]:
        if shape not in made:
            made.clear()
            gc.collect()
            made[shape] = ModelSetup(shape=shape, layers=sizes.layers, device=device).made()
        model, whole = made[shape]
        specs = [MethodSpec("dense"), *map(MethodSpec.parse, sizes.methods)]
        cells = list(first_tokens(model, specs, [length], whole_layers=whole, repeats=sizes.repeats))
        lost = [str(each) for each in cells if isinstance(each, OutOfMemory)]
        if (shape, length) == (sizes.shapes[-1], sizes.prompts[-1]):
            made.clear()  # other parts follow
        return [*({"shape": shape, **asdict(each)} for each in cells if isinstance(each, FirstTokenCell)),
                *({"shape": shape, "length": length, "out_of_memory": said} for said in lost)]  # fmt: skip

    for shape in sizes.shapes:
        for length in sizes.prompts:
            yield Step(f"{shape}, {length} tokens", length**1.5, functools.partial(run, shape, length))


def gpu_report(
    *, device: str, sizes: Sizes, minutes: float, root: Path, commit: str | None = None, only: Sequence[str] = (),
    done: Callable[[dict[str, Any]], Any] = lambda report: None,
) -> dict[str, Any]:  # fmt: skip
    """Run all parts, or `only` some, and give the report; `done` gets what there is after each part.

    Args:
        device: cuda or cpu.
        sizes: what to go through.
        minutes: that it may take; a step that has begun is not broken off, pytest aside.
        root: of the checkout, where the tests are.
        commit: of the checkout; None to ask git.
        only: names of parts.
        done: called after each part.

    Raises ValueError for a part that is none.
    """
    parts = all_parts(sizes, device, root)
    names = [name for name, *_ in parts]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise ValueError(f"no part of the report is called {unknown[0]!r}: choose among {', '.join(names)}")
    parts = [part for part in parts if not only or part[0] in only]
    share = sum(share for _, share, _ in parts)
    report: dict[str, Any] = {
        "kind": "gpu-report", "provenance": provenance(), "device": device, "commit": commit or commit_of(root),
        "minutes": minutes, "heads": list(sizes.heads), "parts": [],
    }  # fmt: skip

    def add(part: Part) -> None:
        report["parts"].append(part.to_dict())
        done(report)

    run_parts([(name, own / share, steps) for name, own, steps in parts], minutes * 60, add)
    return report


def commit_of(root: Path) -> str:
    """Of a checkout, with "+ changes" where files differ; "unknown" where git cannot say."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return git("rev-parse", "--short", "HEAD") + (" + changes" if git("status", "--porcelain") else "")
    return "unknown"


def went_wrong(report: dict[str, Any]) -> list[str]:
    """What a report has to be ashamed of: steps that raised, and tests that failed. What was not run is neither."""
    said = []
    for part in report["parts"]:
        said += [f"{part['name']}, {label}: {error}" for label, error in part["errors"].items()]
        said += [f"test failed: {name}" for each in part["results"] for name in each.get("failures", ())]
    return said


def file_stem(report: dict[str, Any]) -> str:
    """What the files of a report are called."""
    where = report["provenance"].get("gpu", "gpu") if report["device"] != "cpu" else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "_", where.lower()).strip("_")
    return f"{'cpu_report' if slug == 'cpu' else f'gpu_{slug}'}_{report['provenance']['date']}"


def report_markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    about = report["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    where = f"{about['gpu']}, driver {about['driver']}" if report["device"] != "cpu" else about["processor"]
    title = "GPU report" if report["device"] != "cpu" else "The GPU report, tried on a CPU"
    lines = [
        f"# {title}: {about['date']}", "",
        f"{where}; {versions}; commit {report['commit']}; {'/'.join(map(str, report['heads']))} query/KV heads.",
    ]  # fmt: skip
    for part in report["parts"]:
        lines += ["", f"## {part['name'].capitalize()}", "", f"{part['seconds']:.0f} seconds."]
        if part["results"]:
            lines += ["", _RENDER[part["name"]](part["results"])]
        lines += [f"\nFailed: {label}: `{error.partition(chr(10))[0]}`" for label, error in part["errors"].items()]
        lines += [f"\nNot run: {label}" for label in part["not_run"]]
    return re.sub(r"\|\n(?=[^|\n])", "|\n\n", "\n".join(lines)) + "\n"  # what stands below a table is no row of it


def _render_tests(results: list[dict[str, Any]]) -> str:
    rows = [
        [f"`pytest {each['arguments']}`", str(each["passed"]), str(each["failed"]), str(each["skipped"]),
         number(each["seconds"], 0), "yes" if each["whole"] else "no: out of time"]
        for each in results
    ]  # fmt: skip
    text = table(["tests", "passed", "failed", "skipped", "seconds", "to the end"], rows, markdown=True)
    return "\n".join([text, *(f"\n- `{name}` failed" for each in results for name in each["failures"])])


def _render_rivals(results: list[dict[str, Any]]) -> str:
    best = {
        n: min(each["seconds"] for each in results if each["length"] == n and each["seconds"] is not None)
        for n in {each["length"] for each in results}
    }
    rows = [
        [str(each["length"]), each["name"], each["version"], number(each["seconds"], 5), number(each["teraflops"], 1),
         each["why_not"] or f"{each['seconds'] / best[each['length']]:.2f}"]
        for each in results
    ]  # fmt: skip
    return table(
        ["length", "dense attention", "version", "seconds", "TFLOP/s", "over the fastest"], rows, markdown=True
    )


def _render_first_token(results: list[dict[str, Any]]) -> str:
    texts = []
    for shape in dict.fromkeys(each["shape"] for each in results):
        own = [{k: v for k, v in each.items() if k != "shape"} for each in results if each["shape"] == shape]
        cells = [FirstTokenCell(**each) for each in own if "out_of_memory" not in each]
        texts.append(f"{shape}, random weights:\n\n{first_token_table(cells, markdown=True)}")
        texts += [f"- {each['out_of_memory']}" for each in own if "out_of_memory" in each]
    return "\n\n".join(texts)


def _as(cls: Any, render: Callable[..., str], results: list[dict[str, Any]]) -> str:
    return render([cls(**each) for each in results], markdown=True)


_RENDER: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    CORRECTNESS: _render_tests,
    RIVALS: _render_rivals,
    KERNEL: functools.partial(_as, KernelCell, kernel_table),
    OVERHEAD: functools.partial(_as, OverheadCell, overhead_table),
    FIRST_TOKEN: _render_first_token,
}
