"""A plan against what is measured: tiles that were counted, and seconds that were reckoned from a calibration."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparseprefill.contracts import BlockGrid
from sparseprefill.doctor import skeleton
from sparseprefill.evals.bench import checked_parts, dense_attention, median_seconds, random_inputs
from sparseprefill.huggingface import Method, plan_patch
from sparseprefill.huggingface_layers import Settings
from sparseprefill.huggingface_masks import mask_of_layer, masks_of
from sparseprefill.huggingface_modules import layer_shapes, tensor_parallel, text_config
from sparseprefill.patterns.parts import parts_coverage, parts_of
from sparseprefill.plan import check_config, plan
from sparseprefill.prefill import sparse_prefill
from sparseprefill.reports import number, table

TOLD = 0.25
"""A time within this share of what was reckoned is what a plan promises where it has a calibration."""


@dataclass(frozen=True, slots=True)
class PlanCheck:
    """One method at one length, of the first layer that is not local."""

    method: str
    length: int
    low: int  # tiles, at least, as planned
    high: int  # at most
    tiles: int  # measured
    planned: float | None  # seconds of the whole sparse call; None without a calibration
    measured: float
    dense_planned: float | None
    dense_measured: float

    @property
    def holds(self) -> bool:
        """Whether the tiles are what was planned, or in the interval."""
        return self.low <= self.tiles <= self.high

    @property
    def off(self) -> float | None:
        """Measured over planned seconds."""
        return None if self.planned is None else self.measured / self.planned


def check_plan(
    model: str | None, lengths: Sequence[int], methods: Sequence[tuple[str, Method | None, dict[str, Any]]], *,
    calibration: str | Path | None = None, dtype: str = "float32", repeats: int = 3, seed: int = 0,
    progress: Callable[[int], Any] = lambda steps: None,
) -> list[PlanCheck]:  # fmt: skip
    """Plan and measure on random queries and keys of the model's shape, on the CPU.

    A call whose result is not attention over the blocks that it chose is an error, not a time.

    Raises ValueError for what `plan` refuses, and where all layers are local.
    """
    found = plan(model, lengths, methods, dtype=dtype, calibration=calibration)
    bare = skeleton(check_config(model), dtype=dtype)
    config, settings, checks = text_config(bare), Settings(), []
    plans = {(each.method, each.length): each for each in found.plans}
    for length in lengths:
        calls: dict[str, Callable[[], Any]] = {}
        counted: dict[str, tuple[int, Any]] = {}
        inputs = None
        for label, method, options in methods:
            chosen = plan_patch(bare, method, settings=settings, **options)
            shapes, masks = layer_shapes(chosen.modules, config, tensor_parallel(bare)), masks_of(bare, 128)
            layer = next((n for n in sorted(chosen.layers) if mask_of_layer(masks, config, n).local is None), None)
            if layer is None:
                raise ValueError("all layers of this model are local: there is nothing to choose in them")
            shape, pattern = shapes[layer], chosen.layers[layer].pattern
            if inputs is None:
                inputs = random_inputs(
                    shape.query_heads, shape.kv_heads, length, shape.head_dim, getattr(torch, dtype), "cpu", seed,
                    value_dim=shape.value_dim,
                )  # fmt: skip
            parts = parts_of(pattern, inputs, BlockGrid.of(inputs, settings.block_q, settings.block_k))
            result = sparse_prefill(inputs, pattern).result
            assert result.output is not None
            if not hasattr(pattern, "correct"):
                checked_parts(label, parts, result.output)
            own = next(each for each in plans[label, length].layers if layer in each.layers)
            counted[label] = int(parts_coverage(parts).tiles.sum()), own

            calls[label] = functools.partial(sparse_prefill, inputs, pattern, observe=True)
            progress(1)
        assert inputs is not None
        seconds = median_seconds(inputs, {"dense": functools.partial(dense_attention, inputs), **calls}, repeats)
        progress(len(calls))
        for label, (tiles, own) in counted.items():
            checks.append(PlanCheck(
                label, length, own.tiles.low, own.tiles.high, tiles, own.sparse_seconds, seconds[label],
                own.dense_seconds, seconds["dense"],
            ))  # fmt: skip
    return checks


def check_table(checks: Sequence[PlanCheck], *, markdown: bool = False) -> str:
    """One line a method and length."""
    rows = []
    for each in checks:
        planned = str(each.high) if each.low == each.high else f"{each.low} to {each.high}"
        off = each.off
        dense = None if each.dense_planned is None else each.dense_measured / each.dense_planned
        rows.append([
            each.method, str(each.length), planned, str(each.tiles),
            ("equal" if each.low == each.high else "inside") if each.holds else "WRONG",
            number(each.planned), number(each.measured), number(off, 2),
            "-" if off is None else "yes" if abs(off - 1) <= TOLD else "no", number(dense, 2),
        ])  # fmt: skip
    head = ["method", "tokens", "tiles planned", "measured", "", "seconds planned", "measured", "measured / planned",
            "within 25 %", "dense, measured / planned"]  # fmt: skip
    return table(head, rows, markdown=markdown)
