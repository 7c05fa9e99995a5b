"""Which share of a prefill attention takes, and what that lets a sparse method gain: a worked example of Amdahl's law.

    python scripts/attention_share.py                    # the model inside, 1k to 16k tokens
    python scripts/attention_share.py --model NAME --lengths 8192 --method block_sparse:keep=0.2

Prints, for each length, the share of attention in the dense prefill (torch.profiler), and then, at the length of the
example, dense and sparse prefills in pairs beside what the share and the kernel's own speed-up promise.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from sparseprefill import patch_model
from sparseprefill.evals import load_model
from sparseprefill.evals.methods import MethodSpec


@torch.no_grad()
def seconds(model: Any, ids: torch.Tensor) -> float:
    """Of one prefill, up to the first token."""
    began = time.perf_counter()
    model(input_ids=ids, logits_to_keep=1).logits.argmax(-1).tolist()
    return time.perf_counter() - began


@torch.no_grad()
def attention_share(model: Any, ids: torch.Tensor) -> float:
    """Of the dense prefill's processor time (on a GPU, of the device's)."""
    seconds(model, ids)
    with torch.profiler.profile() as seen:
        seconds(model, ids)
    on_gpu = ids.device.type != "cpu"
    rows = seen.key_averages()
    spent = sum(row.self_device_time_total if on_gpu else row.self_cpu_time_total for row in rows)
    named = [row for row in rows if row.key == "aten::scaled_dot_product_attention"]
    return sum(row.device_time_total if on_gpu else row.cpu_time_total for row in named) / spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--device")
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384")
    parser.add_argument("--example", type=int, default=8192, help="length of the example")
    parser.add_argument("--method", default="block_sparse:keep=0.2", help="of the example")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of the example")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, _ = load_model(args.model, device=args.device)
    draw = torch.Generator().manual_seed(0)
    longest = max(args.example, *map(int, args.lengths.split(",")))
    ids = torch.randint(1, model.config.vocab_size - 1, (1, longest), generator=draw).to(model.device)
    for length in map(int, args.lengths.split(",")):
        share = attention_share(model, ids[:, :length])
        most = 1 / (1 - share)
        print(f"{length} tokens: attention is {share:.0%} of the prefill; the whole can gain {most:.1f}x at most")

    spec, prompt = MethodSpec.parse(args.method), ids[:, : args.example]
    share = attention_share(model, prompt)
    pairs = []
    for _ in range(args.repeats):
        dense = seconds(model, prompt)
        with patch_model(model, spec.name, **spec.options, min_length=0, observe=False):
            pairs.append((dense, seconds(model, prompt)))
    with patch_model(model, spec.name, **spec.options, min_length=0) as patch:
        seconds(model, prompt)
        layers = patch.report().layers
    estimator, kernel = (sum(getattr(each, f"{part}_seconds") for each in layers) for part in ("estimator", "kernel"))
    whole = statistics.median(dense for dense, _ in pairs)
    faster = share * whole / (estimator + kernel)
    ratios = sorted(dense / sparse for dense, sparse in pairs)
    print(f"{args.method} at {args.example} tokens: dense {whole:.2f} s, of which attention {share * whole:.2f} s")
    print(f"estimator {estimator:.2f} s and kernel {kernel:.2f} s: attention alone is {faster:.1f}x faster")
    print(f"promised for the whole: {1 / (1 - share + share / faster):.1f}x", end="; ")
    print(f"measured in {args.repeats} pairs: {statistics.median(ratios):.1f}x ({ratios[0]:.1f} to {ratios[-1]:.1f})")


if __name__ == "__main__":
    main()
