"""Measure the guard: planted failures, false alarms, cost. Writes each part into one JSON file as it is done.

    python scripts/measure_guard.py --out docs/results/guard_cpu.json
    python scripts/measure_guard.py --device cuda --part cost --out docs/results/guard_cuda.json

Prints Markdown tables. Parts that are not measured keep what the file says of them.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sparseprefill.evals import guard as evals
from sparseprefill.evals.loading import load_model, provenance
from sparseprefill.evals.methods import MethodSpec

PARTS = ("planted", "false_alarms", "cost")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--device")
    parser.add_argument("--length", type=int, default=32768, help="of the cost")
    parser.add_argument("--repeats", type=int, default=3, help="of the cost")
    parser.add_argument("--density", type=float, default=0.2, help="of the cost")
    args = parser.parse_args()
    written: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    model, tokenizer = load_model(device=args.device)
    for part in args.part or PARTS:
        load = os.getloadavg()[0]
        if part == "planted":
            with tqdm(desc=part) as bar:
                cases = evals.planted_failures(progress=bar.update)
            print(f"{len(cases)} planted failures, all and by what a bad row keeps")
            for severity in (None, *evals.SEVERITIES):
                print(severity or "all", evals.miss_table(cases, severity=severity, markdown=True), sep="\n\n")
            print("heads below the floor", evals.miss_table(cases, below=0.95, markdown=True), sep="\n\n")
            alarms = {n: sum(case.false_alarms[n] for case in cases) for n in evals.ROWS}
            print("good heads flagged, by drawn rows:", alarms, "of", sum(8 - case.bad_heads for case in cases))
            found = [asdict(case) for case in cases]
        elif part == "false_alarms":
            with tqdm(desc=part) as bar:
                inputs, mass = evals.head_masses(model, tokenizer, progress=bar.update)
            results = evals.false_alarms(inputs, mass)
            print(evals.false_alarm_table(results, markdown=True))
            found = [asdict(each) for each in results]
        else:
            specs = [MethodSpec.at_density(name, args.density) for name in ("vertical_slash", "block_sparse")]
            with tqdm(desc=part, total=len(specs) * args.repeats) as bar:
                costs = evals.guard_cost(model, specs, length=args.length, repeats=args.repeats, progress=bar.update)
            print(evals.cost_table(costs, markdown=True))
            found = [asdict(each) for each in costs]
        about = provenance(model if part != "planted" else None) | {"load_before": round(load, 2)}
        written[part] = {"provenance": about, "results": found}
        args.out.write_text(_one_line_a_result(written), encoding="utf-8")


def _one_line_a_result(written: dict[str, Any]) -> str:
    parts = []
    for part, content in written.items():
        results = ",\n".join(f"   {json.dumps(each)}" for each in content["results"])
        about = json.dumps(content["provenance"])
        parts.append(f' "{part}": {{\n  "provenance": {about},\n  "results": [\n{results}\n  ]\n }}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    main()
