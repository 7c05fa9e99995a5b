"""Write docs/results.md from all files in docs/results, and docs/results.png once a ratio was measured on two dates.

python scripts/results_page.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sparseprefill.evals.results_page import drawn, page, picture, sources
from sparseprefill.files import write_text

DOCS = Path(__file__).resolve().parents[1] / "docs"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=DOCS / "results", help="folder of the files")
    parser.add_argument("--out", type=Path, default=DOCS / "results.md", help="the page")
    args = parser.parse_args(arguments)
    found = sources(args.results)
    write_text(args.out, page(found))
    if drawn(found):
        picture(found, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
