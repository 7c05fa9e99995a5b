"""Time the Triton kernel on a GPU: its tilings, what it may share and fetch, against dense attention by others.

    python scripts/time_tilings.py --head-dim 128 --dtype bfloat16
    python scripts/time_tilings.py --head-dim 128 --dtype float32 --float32-dots tf32x3
    python scripts/time_tilings.py --density 1 --sharing       (heads that share a list in one tile, or alone)
    python scripts/time_tilings.py --density 1 --descriptors   (tiles fetched by the copy engine, or by pointers)
    python scripts/time_tilings.py --density 1 --specialise    (warps that do nothing but fetch; capability 10.0)
    python scripts/time_tilings.py --order          (longest rows first in cache-sized groups of heads, or of all heads)
    python scripts/time_tilings.py --length 4096 --profile          (every device operation of one call)
    python scripts/time_tilings.py --skip -4          (lists whose light tiles are skipped; -1000000 skips none)

Every contender is checked before it is timed: ours and the rivals against the oracle on sampled rows, other tilings
against the chosen one. Prints medians, TFLOP/s of the pairs that are computed, and ratios. A density of 1 is dense.
Raises SystemExit where there is no CUDA device.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import triton
from torch import Tensor

from sparseprefill import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.coverage import coverage
from sparseprefill.evals.bench import checked
from sparseprefill.evals.dense_rivals import RIVALS, dense_flops, ready
from sparseprefill.kernels import triton_forward
from sparseprefill.kernels.triton_forward import (
    DeviceLimits,
    Tiling,
    choose_for,
    choose_tiling,
    device_limits,
    triton_attention,
    why_not_descriptors,
    why_not_specialised,
)


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
            least = 16 * (chosen.heads if field == "block_q" else 1) if field.startswith("block") else 1
            if value != getattr(chosen, field) and value >= least:
                yield dataclasses.replace(chosen, **{field: value})
    if chosen.block_q > 16 * chosen.heads and chosen.warps != 4:
        yield dataclasses.replace(chosen, block_q=chosen.block_q // 2, warps=4)


def variants(args: argparse.Namespace, chosen: Tiling, inputs: AttentionInputs, limits: DeviceLimits) -> list[Tiling]:
    """The chosen tiling and what it is weighed against. Raises SystemExit where there is nothing to weigh."""
    if args.sharing:
        if chosen.heads == 1:
            raise SystemExit(f"heads are not stacked here: {chosen} is full with one; give a smaller --block")
        alone = choose_tiling(
            args.head_dim, args.head_dim, inputs.query.dtype, args.block, args.block, limits.shared, limits.capability
        )
        assert alone is not None
        return [chosen, dataclasses.replace(alone, descriptors=chosen.descriptors)]
    if args.descriptors:
        reason = why_not_descriptors(inputs, limits.capability)
        if reason is not None:
            raise SystemExit(f"nothing can be fetched by descriptors here: {reason}")
        return [chosen, dataclasses.replace(chosen, descriptors=False)]
    if args.specialise:
        reason = why_not_specialised(chosen, limits.capability)
        if reason is not None:
            raise SystemExit(f"warps cannot be specialised here: {reason}")
        return [chosen, *(dataclasses.replace(chosen, specialise=True, warps=warps) for warps in (8, 4))]
    return list(neighbours(chosen))


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
    if args.density >= 1:
        index = BlockIndex.dense(inputs, grid)
    else:
        lists = args.kv_heads if args.sharing else args.heads  # one list a KV head, or one a head
        mask = torch.rand(1, lists, grid.rows, grid.key_blocks, device="cuda", generator=draw) < args.density
        mask |= torch.eye(grid.rows, grid.key_blocks, dtype=torch.bool, device="cuda")
        index = BlockIndex.from_mask(grid, mask & grid.visible_block_mask(inputs)[:, None]).for_heads(args.heads)
    if args.skip is not None:
        latest_first = torch.arange(grid.key_blocks, device="cuda").expand(*index.count.shape, -1)
        index = index.visiting(latest_first).skipping(args.skip)
    return inputs, index


def fastest_rival(inputs: AttentionInputs) -> float | None:
    """Check and time dense attention by others, a line each; milliseconds of the fastest, None where none runs."""
    dense = BlockIndex.dense(inputs, BlockGrid.of(inputs, 64, 64))
    calls, reasons = ready(inputs)
    times = []
    for name, call in calls.items():
        version = RIVALS[name].version()
        try:
            error = checked(name, inputs, dense, call())
        except ValueError as wrong:
            print(f"{name} ({version}): {wrong}")
            continue
        times.append(median_ms(call))
        print(f"{name} ({version}): {times[-1]:.3f} ms, {rate(inputs, times[-1]):.0f} TFLOP/s, error {error:.1e}")
    for name, reason in reasons.items():
        print(f"{name}: not here: {reason}")
    return min(times, default=None)


def rate(inputs: AttentionInputs, milliseconds: float, density: float = 1.0) -> float:
    """TFLOP/s of the pairs that were computed."""
    return dense_flops(inputs) * density / milliseconds / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--density", type=float, default=0.2, help="1: every block, the dense mode")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--float32-dots", choices=["ieee", "tf32x3"], default="ieee")
    parser.add_argument("--skip", type=float, help="natural log of lambda: tiles that weigh less are skipped")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--sharing", action="store_true", help="lists of whole KV groups: heads stacked, and not")
    mode.add_argument("--descriptors", action="store_true", help="tiles by descriptors (TMA), and by pointers")
    mode.add_argument("--specialise", action="store_true", help="warp specialisation, and none")
    mode.add_argument("--order", action="store_true", help="time the launch order instead of the tiling")
    mode.add_argument("--profile", action="store_true", help="list the operations of one call instead")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; without one, `python -m sparseprefill.kernels.triton_inspect`")
    inputs, index = make(args)
    limits = device_limits(inputs.device)
    chosen = choose_for(inputs, index, None, limits)
    if chosen is None:
        raise SystemExit(f"no tiling serves head_dim {args.head_dim} in blocks of {args.block} here")

    def run(tiling: Tiling = chosen) -> Tensor:
        output = triton_attention(inputs, index, tiling=tiling, float32_dots=args.float32_dots).output
        assert output is not None
        return output

    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    print(f"{torch.cuda.get_device_name()}, {versions}, {vars(args)}")
    share = coverage(inputs, index)
    density = float(share.density.mean())
    if args.skip is not None:
        share = coverage(inputs, index, triton_attention(inputs, index, tiling=chosen).skipped)
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
    fastest = fastest_rival(inputs)
    exact = run()
    if args.skip is None:  # what is skipped is not in the oracle's rows
        print(f"ours on density {density:.3f}: error {checked('ours', inputs, index, exact):.1e}")
    base = median_ms(run)
    dims = args.head_dim, args.head_dim, inputs.query.dtype
    for tiling in variants(args, chosen, inputs, limits):
        if tiling.shared_bytes(*dims) > limits.shared:
            continue
        try:
            error = (run(tiling).float() - exact.float()).abs().max().item()
        except Exception as failure:  # a tiling that does not compile is a result too
            print(f"{tiling}: {type(failure).__name__}: {str(failure).splitlines()[0]}")
            continue
        time = median_ms(lambda tiling=tiling: run(tiling))
        said = f"{time:.3f} ms, {rate(inputs, time, density):.0f} TFLOP/s, {time / base:.2f} x the chosen one"
        if fastest is not None:
            said += f", {time / (density * fastest):.2f} x density x the fastest rival"
        print(f"{tiling}: {said}, differs by at most {error:.1e}")


if __name__ == "__main__":
    main()
