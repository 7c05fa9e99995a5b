"""The soak: what it counts, that it finds leaks, and a short one."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from tiny_models import tiny_model

from sparseprefill.evals import soak as soaks
from sparseprefill.evals.soak import Held, SoakResult, soak

linux = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")


def result(**grows: int) -> SoakResult:
    """Fifty samples, one every ten prefills, of which some fields grow by a number a prefill."""
    flat = Held(0, 500 << 20, 56, 14 << 20, 366_000)
    held = [
        dataclasses.replace(
            flat, prefills=n, **{name: getattr(flat, name) + step * n for name, step in grows.items()}
        )
        for n in range(10, 510, 10)
    ]  # fmt: skip
    return SoakResult({}, {}, 1.0, 1, {}, held, 10, 32 << 20)


def test_flat_is_flat_and_leaks_are_named() -> None:
    assert result().why_not_flat() is None
    assert "390 tensors and 0 bytes" in (result(tensors=1).why_not_flat() or "")
    assert "0 tensors and 390 bytes" in (result(tensor_bytes=1).why_not_flat() or "")
    assert "1.00 Python objects a prefill" in (result(objects=1).why_not_flat() or "")
    assert "resident memory grows by" in (result(resident=100 << 10).why_not_flat() or "")
    assert result(resident=1 << 10).why_not_flat() is None
    assert result().to_dict()["slopes"]["resident"] == 0


@linux
@pytest.mark.slow
def test_a_kept_tensor_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest leak: one number that every fifth prefill leaves behind."""
    kept: list[Any] = []
    step = soaks._Walk.step

    def leaking(self: Any, shortest: int, longest: int) -> None:
        step(self, shortest, longest)
        kept.extend([torch.zeros(1)] if self.counts["prefills"] % 5 == 0 else [])

    model = tiny_model("llama", implementation="sdpa")
    clean = soak(model, prefills=20, shortest=64, longest=96, samples=10)
    assert clean.why_not_flat() is None or "resident" in clean.why_not_flat()
    monkeypatch.setattr(soaks._Walk, "step", leaking)
    leaked = soak(model, prefills=20, shortest=64, longest=96, samples=10)
    assert "tensors and" in (leaked.why_not_flat() or "")


@linux
@pytest.mark.slow
def test_memory_is_flat() -> None:
    """The long one is scripts/soak.py; docs/robustness.md has what it found."""
    # in a process of its own: the allocator of one that has run other tests gives back and takes what it likes
    code = (
        "import json; from sparseprefill.evals.loading import load_model; from sparseprefill.evals.soak import soak; "
        "found = soak(load_model()[0], prefills=100, longest=512); "
        "print(json.dumps([found.why_not_flat(), found.counts]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    reason, counts = json.loads(done.stdout.splitlines()[-1])
    assert reason is None
    assert counts["prefills"] == 100
    assert {*soaks.NAMES, "stock", "chunks", "generate", "report", "left padding", "right padding"} <= {*counts}


def test_what_cannot_be_soaked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    for arguments, message in (
        ({"longest": 4096}, "lengths must lie between 8 and the model's 2048"),
        ({"longest": 128, "prefills": 5}, "samples must be 10 to 5"),
    ):
        with pytest.raises(ValueError, match=message):
            soak(model, **arguments)
    monkeypatch.setattr(soaks, "why_no_soak", lambda: "there is no /proc")
    with pytest.raises(NotImplementedError, match="no /proc"):
        soak(model)
