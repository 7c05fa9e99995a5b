"""Run many random prefills with the model inside and see whether memory stays flat.

python scripts/soak.py --prefills 500 --out docs/results/soak_cpu.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from sparseprefill.evals.loading import load_model
from sparseprefill.evals.soak import soak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub name or folder; default: the model that ships inside")
    parser.add_argument("--prefills", type=int, default=500)
    parser.add_argument("--shortest", type=int, default=64)
    parser.add_argument("--longest", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of torch; default: what it chooses")
    parser.add_argument("--out", type=Path, help="write what was held as JSON")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model, _ = load_model(args.model)
    with tqdm(total=args.prefills, desc="soak", file=sys.stderr) as bar:
        result = soak(
            model, prefills=args.prefills, shortest=args.shortest, longest=args.longest, seed=args.seed,
            progress=bar.update,
        )  # fmt: skip
    if args.out is not None:
        args.out.write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
    first, last = result.held[result.warm], result.held[-1]
    print(f"{args.prefills} prefills, {result.tokens} tokens in {result.seconds:.0f} s: {result.counts}")
    for name in ("resident", "tensors", "tensor_bytes", "objects"):
        print(f"{name}: {getattr(first, name)} -> {getattr(last, name)}, {result.slope(name):+.3f} a prefill")
    sys.exit(result.why_not_flat())


if __name__ == "__main__":
    main()
