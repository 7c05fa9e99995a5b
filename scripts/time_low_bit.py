"""Where the time of SALE's selection goes in a layer, and on a GPU what memory it takes.

    python scripts/time_low_bit.py --length 65536
    python scripts/time_low_bit.py --length 131072 --profile          (every device operation of one selection)
    python scripts/time_low_bit.py --device cpu --length 2048 --heads 4 --kv-heads 2 --product torch

`sparseprefill bench --estimator sale` sets the whole beside dense attention and its floor. Inputs are random: times of
the selection do not depend on them.
"""

from __future__ import annotations

import argparse

import torch

from sparseprefill import BlockGrid
from sparseprefill.evals.bench import median_seconds, random_inputs
from sparseprefill.patterns import Sale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--product", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="list the operations of one selection instead")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; without one, `python -m sparseprefill.kernels.triton_inspect`")
    inputs = random_inputs(args.heads, args.kv_heads, args.length, args.head_dim, torch.bfloat16, args.device, 0)
    grid = BlockGrid.of(inputs, args.block, args.block)
    pattern = Sale(threshold=0.004, bits=args.bits, product=args.product)
    print(
        f"{torch.cuda.get_device_name() if args.device == 'cuda' else 'cpu'}, torch {torch.__version__}, {vars(args)}"
    )
    if args.profile:
        pattern.build_index(inputs, grid)
        with torch.profiler.profile() as profile:
            pattern.build_index(inputs, grid)
        by = "self_device_time_total" if args.device == "cuda" else "self_cpu_time_total"
        print(profile.key_averages().table(sort_by=by, row_limit=25))
        return

    prepared = pattern.estimator.prepare(inputs, grid)
    seconds = median_seconds(
        inputs,
        {
            "keys as codes, mass of sink and window": lambda: pattern.estimator.prepare(inputs, grid),
            "scores of all tiles": lambda: [prepared.scores(*slab) for slab in prepared.slabs()],
            "the whole selection": lambda: pattern.build_index(inputs, grid),
        },
        args.repeats,
    )
    for name, took in seconds.items():
        print(f"{name}: {took * 1e3:.2f} ms")
    if args.device == "cuda":
        del prepared
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        pattern.build_index(inputs, grid)
        print(f"peak of the selection: {(torch.cuda.max_memory_allocated() - before) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
