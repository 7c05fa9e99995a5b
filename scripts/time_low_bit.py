"""Time what SALE adds to a layer: keys as codes, scores of all tiles, the lists; beside the least it could take.

    python scripts/time_low_bit.py --length 65536
    python scripts/time_low_bit.py --length 131072 --profile          (every device operation of one selection)
    python scripts/time_low_bit.py --device cpu --length 2048 --heads 4 --kv-heads 2 --product torch

The floor is half of dense attention's multiply-adds at the rate of torch's int8 product of head_dim wide vectors, in
the same run. Prints medians and ratios, and on a GPU the peak of memory. Inputs are random: times do not depend on
them, except of attention over the lists, which is not timed here.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from sparseprefill import AttentionInputs, BlockGrid
from sparseprefill.patterns import Sale


def median_ms(run: Callable[[], object], device: str, repeats: int) -> float:
    """Milliseconds of one call, after one to warm up."""
    times = []
    for turn in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if turn:
            times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


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
    draw = torch.Generator(args.device).manual_seed(0)

    def randn(heads: int) -> Tensor:
        shape = 1, heads, args.length, args.head_dim
        return torch.randn(shape, device=args.device, dtype=torch.bfloat16, generator=draw)

    inputs = AttentionInputs(randn(args.heads), randn(args.kv_heads), randn(args.kv_heads), args.head_dim**-0.5)
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
    slabs = list(grid.slabs(args.heads, 1 << 22))
    few = min(4096, args.length)
    codes = torch.randint(-7, 8, (args.length, args.head_dim), device=args.device, generator=draw).to(torch.int8)
    floor = median_ms(lambda: torch._int_mm(codes[:few], codes.T), args.device, args.repeats)
    floor *= args.heads * (args.length / 2) / few
    dense = median_ms(
        lambda: functional.scaled_dot_product_attention(
            inputs.query, inputs.key, inputs.value, is_causal=True, enable_gqa=True
        ),
        args.device, args.repeats,
    )  # fmt: skip
    times = {
        "keys as codes, mass of sink and window": lambda: pattern.estimator.prepare(inputs, grid),
        "scores of all tiles": lambda: [prepared.scores(*slab) for slab in slabs],
        "the whole selection": lambda: pattern.build_index(inputs, grid),
    }
    print(f"floor {floor:.2f} ms, dense (torch, bfloat16) {dense:.2f} ms")
    for name, run in times.items():
        took = median_ms(run, args.device, args.repeats)
        print(f"{name}: {took:.2f} ms, {took / floor:.2f} x the floor, {took / dense:.3f} x dense")
    if args.device == "cuda":
        del prepared
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        pattern.build_index(inputs, grid)
        print(f"peak of the selection: {(torch.cuda.max_memory_allocated() - before) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
