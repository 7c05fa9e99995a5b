"""Time the Triton kernel's chosen tiling against its neighbours on a GPU, each checked against the chosen one first.

    python scripts/time_tilings.py --head-dim 128 --dtype bfloat16
    python scripts/time_tilings.py --head-dim 128 --dtype float32 --float32-dots tf32x3
    python scripts/time_tilings.py --order          (longest rows first in cache-sized groups of heads, or of all heads)
    python scripts/time_tilings.py --length 4096 --profile          (every device operation of one call)
    python scripts/time_tilings.py --skip -4          (lists whose light tiles are skipped; -1000000 skips none)

Prints medians and their ratio to the chosen tiling's. Raises SystemExit where there is no CUDA device.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

from sparseprefill import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.coverage import coverage
from sparseprefill.kernels import triton_forward
from sparseprefill.kernels.triton_forward import Tiling, choose_tiling, device_limits, triton_attention


def neighbours(chosen: Tiling) -> Iterator[Tiling]:
    """The chosen tiling, then those that differ from it in one field, and half as many queries on 4 warps."""
    yield chosen
    for field, values in {
        "block_q": (chosen.block_q // 2, chosen.block_q * 2),
        "block_k": (chosen.block_k // 2, chosen.block_k * 2),
        "warps": (4, 8),
        "stages": (chosen.stages - 1, chosen.stages + 1),
    }.items():
        for value in values:
            if value != getattr(chosen, field) and value >= (16 if field.startswith("block") else 1):
                yield dataclasses.replace(chosen, **{field: value})
    if chosen.block_q > 16 and chosen.warps != 4:
        yield dataclasses.replace(chosen, block_q=chosen.block_q // 2, warps=4)


def median_ms(run: Callable[[], object], repeats: int = 20) -> float:
    """Milliseconds of one call on the device, after three to warm up."""
    times = []
    for turn in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if turn >= 3:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def make(args: argparse.Namespace) -> tuple[AttentionInputs, BlockIndex]:
    draw = torch.Generator("cuda").manual_seed(0)

    def randn(heads: int) -> Tensor:
        return torch.randn(
            1, heads, args.length, args.head_dim, device="cuda", dtype=getattr(torch, args.dtype), generator=draw
        )

    query, key = randn(args.heads), randn(args.kv_heads)
    if args.skip is not None:  # logits rise by 4 every 64 keys, so that what lies back weighs little
        query[..., 0] = args.head_dim**0.5
        key[..., 0] = torch.linspace(-args.length / 16, 0, args.length, device="cuda")
    inputs = AttentionInputs(query, key, randn(args.kv_heads), args.head_dim**-0.5)
    grid = BlockGrid.of(inputs, args.block, args.block)
    mask = torch.rand(1, args.heads, grid.rows, grid.key_blocks, device="cuda", generator=draw) < args.density
    mask |= torch.eye(grid.rows, grid.key_blocks, dtype=torch.bool, device="cuda")
    index = BlockIndex.from_mask(grid, mask & grid.visible_block_mask(inputs)[:, None])
    if args.skip is not None:
        latest_first = torch.arange(grid.key_blocks, device="cuda").expand(mask.shape)
        index = index.visiting(latest_first).skipping(args.skip)
    return inputs, index


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--float32-dots", choices=["ieee", "tf32x3"], default="ieee")
    parser.add_argument("--skip", type=float, help="natural log of lambda: tiles that weigh less are skipped")
    parser.add_argument("--order", action="store_true", help="time the launch order instead of the tiling")
    parser.add_argument("--profile", action="store_true", help="list the operations of one call instead")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; without one, `python -m sparseprefill.kernels.triton_inspect`")
    inputs, index = make(args)
    limits = device_limits(inputs.device)
    dims = args.head_dim, args.head_dim, inputs.query.dtype
    skip = args.skip is not None
    chosen = choose_tiling(*dims, args.block, args.block, limits.shared, limits.capability, skip)
    if chosen is None:
        raise SystemExit(f"no tiling serves head_dim {args.head_dim} in blocks of {args.block} here")

    def run(tiling: Tiling = chosen) -> Tensor:
        output = triton_attention(inputs, index, tiling=tiling, float32_dots=args.float32_dots).output
        assert output is not None
        return output

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {vars(args)}")
    if skip:
        skipped = triton_attention(inputs, index, tiling=chosen).skipped
        share = coverage(inputs, index, skipped)
        print(f"{float(share.skipped.sum() / share.kept.sum()):.0%} of the listed pairs are skipped")
    if args.profile:
        run()
        with torch.profiler.profile() as profile:
            run()
            torch.cuda.synchronize()
        print(profile.key_averages().table(sort_by="self_device_time_total", row_limit=20))
        return
    if args.order:
        grouped = median_ms(run)
        with mock.patch.object(triton_forward, "heads_that_share", lambda inputs, cache: inputs.query_heads):
            together = median_ms(run)
        print(f"cache-sized groups of heads {grouped:.3f} ms, all heads together {together:.3f} ms")
        return
    exact = run().float()
    base = median_ms(run)
    for tiling in neighbours(chosen):
        if tiling.shared_bytes(*dims) > limits.shared:
            continue
        try:
            error = (run(tiling).float() - exact).abs().max().item()
        except Exception as failure:  # a tiling that does not compile is a result too
            print(f"{tiling}: {type(failure).__name__}: {str(failure).splitlines()[0]}")
            continue
        time = median_ms(lambda tiling=tiling: run(tiling))
        print(f"{tiling}: {time:.3f} ms, {time / base:.2f} x the chosen one, differs by at most {error:.1e}")


if __name__ == "__main__":
    main()
