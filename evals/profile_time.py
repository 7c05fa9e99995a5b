"""How long profiling will take on this machine, from what was calibrated; seconds never enter a profile."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from sparseprefill.calibration import COMMAND, load_calibration
from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.huggingface import plan_patch
from sparseprefill.huggingface_layers import Settings
from sparseprefill.huggingface_modules import device_of, kernel_for, model_window, unwrap
from sparseprefill.kernels import block_sparse_attention
from sparseprefill.patterns import Dense
from sparseprefill.patterns.candidates import candidates
from sparseprefill.patterns.scores import dense_tiles, score
from sparseprefill.profile import ProfileCost

RATE = "profile_tile"
"""Of a calibration entry: seconds of a tile of one head, with all that goes with it: the product of queries and keys,
the default candidates, and dense attention of the pass.
"""

_WARM = 256  # tokens on which the rest of the model is timed


def tile_seconds(inputs: AttentionInputs, block: int, repeats: int) -> float:
    """`RATE`, median of several, measured on one prompt's layer."""
    patterns = [each.pattern for each in candidates()]
    grid = BlockGrid.of(inputs, block, block)
    taken = []
    for _ in range(repeats + 1):  # the first warms up
        _finish(inputs.device)
        began = time.perf_counter()
        block_sparse_attention(inputs, BlockIndex.dense(inputs, grid))
        score(inputs, patterns, block=block)  # reads its counts back
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:]) / (inputs.query_heads * dense_tiles(inputs.queries, block))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def predicted_seconds(
    model: Any, cost: ProfileCost, block: int, *, search: bool = False, sale: bool = False
) -> tuple[float | None, str]:  # fmt: skip
    """Seconds of what is left to do, and on what that rests; or None, and why there is no saying.

    The rate is that of the default candidates; MInference's search and the candidates of SALE have none.

    Attention and scoring come from the calibration; what the rest of the model takes is timed now, on a few tokens.
    """
    if search:
        return None, "time: unknown, MInference's search has no calibrated rate"
    if sale:
        return None, "time: unknown, the estimate of SALE has no calibrated rate"
    model = unwrap(model)
    plan = plan_patch(model, Dense(), settings=Settings(block_q=block, block_k=block))
    shape = plan.shapes[min(plan.shapes)]
    device = device_of(plan.modules[min(plan.modules)])
    if device is None:
        return None, "time: unknown, the model has no weights yet"
    calibration = load_calibration()
    kernel, reasons = kernel_for(shape, device, model.dtype, "auto", block, block)
    if kernel is None:
        return None, f"time: unknown, no kernel serves these layers ({'; '.join(reasons.values())})"
    key = calibration.key(
        device, model.dtype, kernel, query_heads=shape.query_heads, kv_heads=shape.kv_heads, head_dim=shape.head_dim,
        value_dim=shape.value_dim, block_q=block, block_k=block,
    )  # fmt: skip
    entry, reason = calibration.lookup(key)
    if entry is None or RATE not in entry.rates:
        why = reason or f"the calibration of this layer has no rate for profiling: `{COMMAND}` measures it"
        return None, f"time: uncalibrated ({why})"
    left = cost.tiles - cost.done
    rest = cost.tokens * left / cost.tiles * _seconds_a_token(model)
    return left * entry.rates[RATE] + rest, f"calibrated on {entry.date}, for the default candidates"


@torch.no_grad()
def _seconds_a_token(model: Any) -> float:
    """Of a forward pass so short that attention is next to nothing."""
    tokens = min(_WARM, model_window(model) or _WARM)
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=model.device)
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        model.base_model(input_ids=ids, use_cache=False)
        _finish(model.device)
        taken.append(time.perf_counter() - began)
    return min(taken) / tokens
