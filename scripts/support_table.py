"""Write docs/support.md from the results of tests: every family and way of calling, architecture and refusal.

python scripts/support_table.py NEWEST.xml OLDEST.xml --out docs      # or: make support, which runs the tests too

The files are what `pytest --junitxml` wrote for tests/test_ways.py, test_architectures.py and test_refusals.py, the
newest supported release of transformers first.
"""

from __future__ import annotations

import argparse
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparseprefill.reports import table

MARKS = {
    "right": "✓", "right, on the previous implementation": "✓ₚ", "right in the prefill": "✓ₛ", "refused": "R",
    "transformers": "T", "needs a GPU": "G", "served": "S",
}  # fmt: skip


def read(path: Path) -> dict[str, Any]:
    """{"versions", "cells", "architectures", "refusals"} of one run. Exits where a test failed."""
    found: dict[str, Any] = {"versions": {}, "cells": {}, "architectures": {}, "refusals": {}}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        if any(case.find(kind) is not None for kind in ("failure", "error")):
            raise SystemExit(f"{path}: {case.get('name')} failed; there is no table of a red run")
        said = {str(p.get("name")): str(p.get("value")) for p in case.iter("property")}
        skipped = case.find("skipped") is not None
        if "versions" in said:
            found["versions"] = json.loads(said["versions"])
        elif "way" in said or (skipped and "test_right_or_refused[" in str(case.get("name"))):
            if skipped:
                if "CUDA" not in str(case.find("skipped").get("message")):
                    raise SystemExit(f"{path}: {case.get('name')} was skipped, and not for want of a GPU")
                family, _, way = str(case.get("name")).partition("[")[2].rstrip("]").partition("-")
                found["cells"].setdefault(way, {})[family] = "needs a GPU: not run on this machine"
            else:
                found["cells"].setdefault(said["way"], {})[said["family"]] = said["verdict"]
        elif "architecture" in said:
            found["architectures"][said["architecture"]] = said["outcome"]
        elif "refusal" in said:
            found["refusals"][said["refusal"]] = [said["exception"], said["message"]]
    families = set(found["cells"]["one prompt"])
    for way, cells in found["cells"].items():
        missing = families - set(cells)
        if missing and not way.startswith("image"):  # which is for models that see
            raise SystemExit(f"{path}: {way} was not tried with {', '.join(sorted(missing))}")
    return found


def mark(verdict: str | None) -> str:
    """The sign of a cell; a dash where the way is not for that family."""
    return "-" if verdict is None else MARKS[verdict.partition(":")[0].partition(";")[0]]


def cell_table(runs: list[dict[str, Any]]) -> str:
    """Ways down, families across; two signs where the releases differ."""
    families = list(runs[0]["cells"]["one prompt"])
    rows = []
    for way in runs[0]["cells"]:
        row = [way]
        for family in families:
            marks = [mark(run["cells"].get(way, {}).get(family)) for run in runs]
            row.append(marks[0] if len(set(marks)) == 1 else " / ".join(marks))
        rows.append(row)
    return table(["way of calling", *families], rows, markdown=True)


def notes(runs: list[dict[str, Any]]) -> list[str]:
    """What the cells that are not plainly right say, each once."""
    said: dict[str, list[str]] = {}
    for run in runs:
        for way, cells in run["cells"].items():
            for family, verdict in cells.items():
                if verdict not in ("right", "served", "right, on the previous implementation"):
                    said.setdefault(f"{way}: {verdict}", []).append(family)
    lines = []
    for text, families in sorted(said.items()):
        names = "all families" if len(set(families)) > 12 else ", ".join(sorted(set(families)))
        lines.append(f"- {text} ({names})")
    return lines


def architecture_table(runs: list[dict[str, Any]]) -> tuple[str, str]:
    """(one line of counts, the table) of all causal language models that transformers has."""
    names = sorted({name for run in runs for name in run["architectures"]})
    rows = [[name, *(run["architectures"].get(name, "not in this release") for run in runs)] for name in names]
    counts = []
    for run in runs:
        kinds = [outcome.partition(":")[0] for outcome in run["architectures"].values()]
        each = ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("right", "refused", "not tried"))
        counts.append(f"transformers {run['versions']['transformers']}: {each}")
    head = ["architecture", *(run["versions"]["transformers"] for run in runs)]
    return "; ".join(counts), table(head, [list(map(_cell, row)) for row in rows], markdown=True)


def _cell(text: str) -> str:
    """Text that stays inside one cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").split())


def page(runs: list[dict[str, Any]], date: str) -> str:
    """The whole of docs/support.md."""
    versions = " and ".join(run["versions"]["transformers"] for run in runs)
    others = ", ".join(f"{name} {version}" for name, version in runs[0]["versions"].items() if name != "transformers")
    counts, architectures = architecture_table(runs)
    cells = [verdict for run in runs for way in run["cells"].values() for verdict in way.values()]
    refusals = [[name, kind, _cell(text)] for name, (kind, text) in runs[0]["refusals"].items()]
    signs = {
        "✓": "right: what the stock model gives in eager attention, float32, to a thousandth of the logits' spread",
        "✓ₚ": "right, computed by the implementation the model had before, and counted in the report",
        "✓ₛ": "the prefill is right; decoding is the stock implementation's, which differs from eager there",
        "S": "served, all logits finite; precision is judged by other tests",
        "R": "refused by name, the model left as it was",
        "T": "transformers itself does not do it",
        "G": "transformers needs a GPU for it; not run here",
        "-": "not for this family",
    }
    return "\n".join(
        [
            "# What is supported",
            "",
            f"Made by `make support` from test results of {date}, with transformers {versions}",
            f"({others}). Each family",
            "is a tiny random model made so that a soft-cap, sinks, window, chunk or QK-norm that is dropped shows;",
            "tests drop each of them and look. Every layer runs in our kernel with everything kept. "
            f"{len(cells)} cells, none missing.",
            "",
            *(f"- {sign} {meaning}" for sign, meaning in signs.items()),
            "",
            cell_table(runs),
            "",
            f"Where the releases differ, the first sign is that of {runs[0]['versions']['transformers']}.",
            "",
            *notes(runs),
            "",
            "Tensor parallelism (`tp_plan`, two processes) is tested apart, for llama, qwen3, gpt_oss and phi3: each",
            "process takes its heads' part of a profile, and the logits are those of one process.",
            "",
            "## Every causal language model in transformers",
            "",
            "Small random models of all architectures that could be made small, one batch with and without padding.",
            "Right means equal to eager; a model with more than a language model is represented by its text part.",
            "",
            f"{counts}.",
            "",
            architectures,
            "",
            "## What is refused, and how",
            "",
            "Each leaves the model and its files as they were.",
            "",
            table(["what", "exception", "message"], refusals, markdown=True),
            "",
        ]
    )


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="junit files, the newest release first")
    parser.add_argument("--date", required=True, help="of the run")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    chosen = parser.parse_args(None if arguments is None else list(arguments))
    runs = [read(path) for path in chosen.results]
    for run in runs:
        name = f"support_transformers_{run['versions']['transformers']}.json"
        text = json.dumps({"date": chosen.date, **run}, indent=1, ensure_ascii=False)
        (chosen.out / "results" / name).write_text(text + "\n", encoding="utf-8")
    (chosen.out / "support.md").write_text(page(runs, chosen.date), encoding="utf-8")
    print(f"wrote {chosen.out / 'support.md'}")


if __name__ == "__main__":
    main()
