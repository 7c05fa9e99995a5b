"""Plot the log of a training run of the model inside.

python scripts/plot_curves.py build/needle/log.jsonl --out docs/model_curves.png
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

from matplotlib.figure import Figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("docs/model_curves.png"))
    args = parser.parse_args()
    rows = {row["step"]: row for path in args.log for row in map(json.loads, path.read_text().splitlines())}
    steps = sorted(rows)
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axis = figure.subplots()
    known = [s for s in steps if rows[s]["needle_loss"]]  # none, or 0 in older logs: no needle since the phase began
    axis.plot(known, [rows[s]["needle_loss"] for s in known], label="needle answers (mean of 20 batches)")
    axis.plot(steps, [rows[s]["text_loss"] for s in steps], label="all tokens", alpha=0.35)
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("loss (nats a token)")
    bounds = [s for before, s in itertools.pairwise(steps) if rows[before]["length"] != rows[s]["length"]]
    for number, s in enumerate([steps[0], *bounds]):
        axis.axvline(s, color="grey", linewidth=0.6)
        height = 0.98 - 0.06 * (number % 3)  # phases can be short: neighbouring labels stand at different heights
        axis.text(
            s, height, f" {rows[s]['length']}", va="top", fontsize=8, color="grey", transform=axis.get_xaxis_transform()
        )
    axis.legend(loc="lower left")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
