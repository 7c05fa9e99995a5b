"""Results of several days on one page, and as a picture once there are two dates: what was measured where, and when.

Reads what `sparseprefill bench`, `bench first-token` and `scripts/gpu_report.py` wrote, and lists every other file.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseprefill.reports import number, table

UNDATED = "-"
_EVERY = 0.999  # density from which on a cell is one of dense mode

HEAD = """# Results over time

Written by `python scripts/results_page.py` from the files in [results](results). Times move with the machine, so that
ratios stand here: compare lines of one device and the same versions, and let the file say the rest. Files without a
date are older than dates in results. What the figures mean is in [Performance](performance.md).
"""


@dataclass(frozen=True, slots=True)
class Source:
    """One file and what it says of itself."""

    path: Path
    data: dict[str, Any]

    @property
    def about(self) -> dict[str, Any]:
        """Its provenance, wherever it stands; where there are several, the last."""
        places = [self.data, *(each for each in self.data.values() if isinstance(each, dict))]
        for place in places:
            found = place.get("provenance")
            found = found[-1] if isinstance(found, list) and found else found
            if isinstance(found, dict):
                return found
        entry: dict[str, Any] = next(iter(self.data.get("entries") or ()), {})  # a calibration
        key = entry.get("key", {})
        versions = {name: key[name] for name in ("sparseprefill", "torch", "triton") if name in key}
        return {"versions": self.data.get("versions", versions), "processor": key.get("device_name", UNDATED), **entry}

    @property
    def date(self) -> str:
        """ISO, or a dash."""
        settings = self.data.get("settings")
        said = [
            self.about.get("date"),
            self.data.get("date"),
            settings.get("date") if isinstance(settings, dict) else 0,
        ]
        return next((str(each) for each in said if each), UNDATED)

    @property
    def device(self) -> str:
        """A GPU by its name, else the processor."""
        return str(self.about.get("gpu") or self.about.get("processor") or UNDATED)

    @property
    def versions(self) -> str:
        """Of what decides times."""
        known = self.about.get("versions") or {}
        return ", ".join(f"{name} {known[name]}" for name in ("torch", "triton", "sparseprefill") if name in known)

    @property
    def link(self) -> str:
        """To the file; to its page where it has one."""
        page = self.path.with_suffix(".md")
        return f"[{self.path.stem}](results/{page.name if page.exists() else self.path.name})"

    def part(self, name: str) -> list[dict[str, Any]]:
        """Results of a part of a GPU report."""
        parts = self.data.get("parts") if self.data.get("kind") == "gpu-report" else None
        return next((part["results"] for part in parts or () if part["name"] == name), [])

    @property
    def kernel(self) -> list[dict[str, Any]]:
        """Cells of attention over blocks."""
        return list(self.data.get("kernel") or self.part("kernel"))

    @property
    def overhead(self) -> list[dict[str, Any]]:
        """Cells of finding the blocks."""
        cells = self.data.get("cells")
        own = cells if isinstance(cells, list) and cells and "estimate" in cells[0] else []
        return own or self.part("finding the blocks")

    @property
    def first_token(self) -> list[dict[str, Any]]:
        """Cells of whole models, with what model they are of."""
        model = str((self.about.get("model") or {}).get("name", UNDATED))
        own = self.data.get("first_token") or self.data.get("ttft") or self.part("time to first token")
        return [{"shape": model, **each} for each in own if "out_of_memory" not in each]

    @property
    def correctness(self) -> list[dict[str, Any]]:
        """Runs of pytest on a device."""
        return self.part("correctness")

    @property
    def other(self) -> bool:
        """Whether it has none of these."""
        return not (self.kernel or self.overhead or self.first_token or self.correctness)


def sources(folder: Path) -> list[Source]:
    """Every JSON file of a folder, by date and name, undated ones first."""
    found = [Source(path, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda each: (each.date != UNDATED, each.date, each.path.name))


def geometric(values: Sequence[float]) -> float | None:
    """Mean of ratios; None of none."""
    return math.exp(statistics.fmean(map(math.log, values))) if values else None


@dataclass(frozen=True, slots=True)
class KernelRow:
    """The cells of one file, kernel, dtype, head dim and length."""

    source: Source
    kernel: str
    dtype: str
    head_dim: int
    length: int
    over_ideal: float | None  # geometric mean over the sparse cells
    dense_mode: float | None  # our time with every block listed, over dense attention's
    over_flex: float | None  # geometric mean


def kernel_rows(found: Sequence[Source]) -> Iterator[KernelRow]:
    """In the order of the files."""
    for source in found:
        groups: dict[tuple[str, str, int, int], list[tuple[float, dict[str, Any]]]] = {}
        for cell in source.kernel:
            for kernel, seconds in cell["ours"].items():
                key = (kernel, cell["dtype"], cell["head_dim"], cell["length"])
                groups.setdefault(key, []).append((seconds, cell))
        for key, cells in groups.items():
            sparse = [own / (cell["density"] * cell["dense"]) for own, cell in cells if cell["density"] < _EVERY]
            every = [own / cell["dense"] for own, cell in cells if cell["density"] >= _EVERY]
            flex = [own / cell["flex"] for own, cell in cells if cell.get("flex")]
            yield KernelRow(source, *key, geometric(sparse), geometric(every), geometric(flex))


def page(found: Sequence[Source]) -> str:
    """The whole page."""
    sections: list[tuple[str, str, list[str], list[list[str]]]] = []

    def add(title: str, text: str, head: list[str], rows: list[list[str]]) -> None:
        if rows:
            sections.append((title, text, head, rows))

    add(
        "Correct on a GPU", "What `scripts/gpu_report.py` ran with pytest.",
        ["date", "device", "tests", "passed", "failed", "skipped", "to the end", "versions", "file"],
        [
            [s.date, s.device, f"`pytest {each['arguments']}`", str(each["passed"]), str(each["failed"]),
             str(each["skipped"]), "yes" if each["whole"] else "no", s.versions, s.link]
            for s in found for each in s.correctness
        ],
    )  # fmt: skip
    add(
        "Attention over given blocks",
        "Geometric means over densities: our time over ideal (density x dense) and over FlexAttention on its mask. "
        "Dense mode, with every block listed: our time over dense attention.",
        [
            "date", "device", "kernel", "dtype", "head dim", "length", "ours / ideal", "dense mode", "ours / flex",
            "versions", "file",
        ],
        [
            [row.source.date, row.source.device, row.kernel, row.dtype, str(row.head_dim), str(row.length),
             number(row.over_ideal, 2), number(row.dense_mode, 2), number(row.over_flex, 2), row.source.versions,
             row.source.link]
            for row in kernel_rows(found)
        ],
    )  # fmt: skip
    add(
        "Finding the blocks", "Shares of the time of dense attention on the same queries and keys.",
        ["date", "device", "method", "dtype", "length", "finding", "attention", "together", "versions", "file"],
        [
            [s.date, s.device, f"`{cell['method']}`", cell["dtype"], str(cell["length"]), number(cell["estimate"]),
             number(cell["attention"]), number(cell["estimate"] + cell["attention"]), s.versions, s.link]
            for s in found for cell in s.overhead
        ],
    )  # fmt: skip
    add(
        "Whole models", "Time to first token: dense over the method's, in turns; peak memory beside the weights.",
        ["date", "device", "model", "method", "length", "TTFT s", "speed-up", "peak MiB", "versions", "file"],
        [
            [s.date, s.device, cell["shape"], f"`{cell['method']}`", str(cell["length"]), _seconds(cell),
             "-" if cell["speed_up"] is None else f"{cell['speed_up']:.2f}x", _mebibytes(cell), s.versions, s.link]
            for s in found for cell in s.first_token
        ],
    )  # fmt: skip
    add(
        "Other results",
        "Their pages say what they mean: [Evaluation](evaluation.md), [Choosing a method](compare.md), "
        "[Profiles](profile.md), [The guard](guard.md), [Robustness](robustness.md), [What is supported](support.md).",
        ["date", "device", "versions", "file"],
        [[s.date, s.device, s.versions, s.link] for s in found if s.other],
    )  # fmt: skip
    text = HEAD
    if drawn(found):
        text += "\n![ours over ideal, and dense mode over dense attention, by date](results.png)\n"
    for title, words, head, rows in sections:
        text += f"\n## {title}\n\n{words}\n\n{table(head, rows, markdown=True)}\n"
    return text


def _seconds(cell: dict[str, Any]) -> str:
    extrapolated = cell.get("layers", 0) < cell.get("whole_layers", 0)
    return number(cell.get("whole_seconds", cell["seconds"])) + (" (extrapolated)" if extrapolated else "")


def _mebibytes(cell: dict[str, Any]) -> str:
    return "-" if cell.get("peak_bytes") is None else f"{cell['peak_bytes'] / 2**20:.0f}"


Series = dict[str, list[tuple[str, float]]]


def drawn(found: Sequence[Source]) -> dict[str, Series]:
    """What there is to draw: by ratio, then by line, (date, ratio); only with two dates at least."""
    lines: dict[str, Series] = {"ours / ideal": {}, "dense mode": {}}
    for row in kernel_rows(found):
        name = f"{row.source.device}, {row.kernel}, {row.dtype}, head dim {row.head_dim}, {row.length} tokens"
        for what, value in (("ours / ideal", row.over_ideal), ("dense mode", row.dense_mode)):
            if value is not None and row.source.date != UNDATED:
                lines[what].setdefault(name, []).append((row.source.date, value))
    return {
        what: series for what, series in lines.items()
        if len({date for points in series.values() for date, _ in points}) > 1
    }  # fmt: skip


def picture(found: Sequence[Source], path: Path) -> None:
    """Draw the ratios over the dates."""
    from matplotlib.figure import Figure

    lines = drawn(found)
    dates = sorted({date for series in lines.values() for points in series.values() for date, _ in points})
    figure = Figure(figsize=(9, 3.2 * len(lines)), layout="constrained")
    axes = figure.subplots(len(lines), 1, squeeze=False)[:, 0]
    for axis, (what, series) in zip(axes, lines.items(), strict=True):
        for name, points in sorted(series.items()):
            axis.plot([dates.index(date) for date, _ in points], [v for _, v in points], marker="o", label=name)
        axis.axhline(1.0, color="grey", linewidth=0.6)
        axis.set_xticks(range(len(dates)), dates)
        axis.set_ylabel(what)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
