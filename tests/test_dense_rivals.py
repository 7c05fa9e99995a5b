"""Dense attention by others: what runs here is attention, what does not says why, nothing is left out in silence."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.evals import dense_rivals
from sparseprefill.evals.bench import checked, random_inputs
from sparseprefill.evals.dense_rivals import RIVALS, Rival, dense_flops, ready, why_not_causal
from support import make_inputs


def drawn() -> AttentionInputs:
    return random_inputs(4, 2, 256, 32, torch.bfloat16, "cpu", 0)


def test_what_runs_here_is_dense_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    without_flex = dataclasses.replace(RIVALS["flex"], why_not=lambda inputs: "compiling takes a minute")
    monkeypatch.setattr(dense_rivals, "RIVALS", RIVALS | {"flex": without_flex})
    inputs = dataclasses.replace(drawn(), scale=0.3)
    calls, reasons = ready(inputs)
    assert sorted([*calls, *reasons]) == sorted(RIVALS)
    assert "sdpa flash" in calls
    index = BlockIndex.dense(inputs, BlockGrid.of(inputs, 64, 64))
    for name, call in calls.items():
        checked(name, inputs, index, call())
    assert reasons["flex"] == "compiling takes a minute"
    if not torch.cuda.is_available():
        assert "needs a CUDA device" in reasons["flash-attn"]
        assert reasons["sdpa cudnn"].startswith("RuntimeError")


@pytest.mark.slow
def test_flex_is_dense_attention() -> None:
    inputs = drawn()
    reason = RIVALS["flex"].why_not(inputs)
    if reason is not None:
        pytest.skip(reason)
    index = BlockIndex.dense(inputs, BlockGrid.of(inputs, 64, 64))
    checked("flex", inputs, index, RIVALS["flex"].prepare(inputs)())


def test_grouped_heads_and_layout_of_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of the interface that both generations have: tokens outside heads, perhaps a tuple."""

    class Package:
        @staticmethod
        def flash_attn_func(query: Any, key: Any, value: Any, softmax_scale: float, causal: bool) -> Any:
            parts = (each.transpose(1, 2) for each in (query, key, value))
            output = torch.nn.functional.scaled_dot_product_attention(
                *parts, is_causal=causal, scale=softmax_scale, enable_gqa=True
            )
            return output.transpose(1, 2), None

    monkeypatch.setattr(dense_rivals.importlib, "import_module", lambda name: Package)
    inputs = drawn()
    index = BlockIndex.dense(inputs, BlockGrid.of(inputs, 64, 64))
    checked("flash-attn 3", inputs, index, RIVALS["flash-attn 3"].prepare(inputs)())
    assert RIVALS["flash-attn"].version() == "flash_attn, version unknown"


def test_a_rival_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(inputs: AttentionInputs) -> Any:
        raise RuntimeError("no kernel for this\nand a trace")

    broken = Rival(fail, lambda: "1", lambda inputs: None)
    monkeypatch.setattr(dense_rivals, "RIVALS", {"broken": broken})
    assert ready(drawn()) == ({}, {"broken": "RuntimeError: no kernel for this"})


def test_only_plain_prompts_are_compared() -> None:
    assert why_not_causal(drawn()) is None
    assert "a window" in (why_not_causal(make_inputs(queries=20, window=4)) or "")
    assert "whole prompts" in (why_not_causal(make_inputs(queries=20, keys=30)) or "")
    with pytest.raises(ValueError, match="a softcap"):
        ready(make_inputs(queries=20, softcap=2.0))


def test_flops_are_those_of_the_triangle() -> None:
    inputs = make_inputs(batch=2, query_heads=3, kv_heads=1, queries=5, head_dim=16)
    assert dense_flops(inputs) == 4 * 2 * 3 * 15 * 16
