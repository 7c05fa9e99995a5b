"""All that only a GPU can tell, in one run of under ten minutes, written to docs/results as JSON and as a page.

    python scripts/gpu_report.py                                   # on a machine with a GPU
    python scripts/gpu_report.py --device cpu --small --out build  # the same code at sizes that mean nothing

Correctness by pytest, dense attention by others, the kernel at densities from 0.05 to 0.5 and with every block, finding
the blocks, and the time to first token of two published shapes with random weights. What does not fit into --minutes is
listed as not run. The exit status is 1 where a step raised or a test failed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from sparseprefill.evals import gpu_report as reports
from sparseprefill.evals.loading import check_device
from sparseprefill.files import check_folder, write_text

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that try the run itself")
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--part", action="append", default=[], help="only this part; may be repeated")
    parser.add_argument("--commit", help="of the checkout, where git cannot say")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="folder")
    args = parser.parse_args(arguments)
    sizes = reports.SMALL if args.small else reports.FULL
    check_folder(args.out / "report.json")
    check_device(args.device)

    def keep(report: dict[str, Any]) -> None:
        """After each part: a run that is broken off leaves what it has."""
        stem = reports.file_stem(report)
        write_text(args.out / f"{stem}.json", json.dumps(report, indent=1) + "\n")
        write_text(args.out / f"{stem}.md", reports.report_markdown(report))
        part = report["parts"][-1]
        print(f"{part['name']}: {part['seconds']:.0f} s, {len(part['results'])} results", file=sys.stderr)

    report = reports.gpu_report(
        device=args.device, sizes=sizes, minutes=args.minutes, root=ROOT, commit=args.commit, only=args.part, done=keep
    )
    print(reports.report_markdown(report))
    wrong = reports.went_wrong(report)
    for text in wrong:
        print(text, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
