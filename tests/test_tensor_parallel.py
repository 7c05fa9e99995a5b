"""Two processes, each with half of the heads, give what one process gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tokens
from torch import Tensor

from sparseprefill import patch_model
from sparseprefill.huggingface_modules import HeadSlice
from sparseprefill.patterns import AShape, BlockSparse, Dense, ModelPatterns, VerticalSlash, save_patterns

WORKER = Path(__file__).with_name("tensor_parallel_worker.py")
BLOCKS = {"block_q": 16, "block_k": 16, "min_length": 0}
# every head has a pattern of its own: a process that took another's slice would be far off
PROFILE = ModelPatterns(
    tuple(
        (
            AShape(16, 16 * (layer + 1)),
            Dense(),
            BlockSparse(keep=48, sink=16, local=16),
            VerticalSlash(8, 24 + 8 * layer),
        )
        for layer in range(3)
    )
)
HEADS = [[(0, 3), "a_shape"], [(1, 0), "random"]]


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "gpt_oss", "phi3"))]
)
def test_two_processes_give_what_one_gives(family: str, tmp_path: Path) -> None:
    """The plans of gpt_oss and phi3 leave every process all heads."""
    model, ids = tiny_model(family), tokens(2, 200)
    model.save_pretrained(tmp_path / "model")
    save_patterns(PROFILE, tmp_path / "profile.json")
    torch.save(ids, tmp_path / "ids.pt")
    job: dict[str, Any] = {"blocks": BLOCKS, "heads": HEADS, "query_heads": 4}
    (tmp_path / "job.json").write_text(json.dumps(job))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(WORKER), str(tmp_path)], capture_output=True, text=True, check=False, timeout=300,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": os.environ.get("TENSOR_PARALLEL_DEVICES", ""),
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    with torch.no_grad(), patch_model(model, profile=tmp_path / "profile.json", **BLOCKS) as patch:
        expected = model(input_ids=ids).logits
        whole = patch.report()
        generated = model.generate(ids, max_new_tokens=4, do_sample=False)
    with torch.no_grad(), patch_model(model, "dense", heads=dict(HEADS), **BLOCKS):
        overridden = model(input_ids=ids).logits
    reports = []
    for rank in range(2):
        got: list[Tensor] = torch.load(tmp_path / f"logits{rank}.pt", weights_only=True)
        close(got[0], expected)
        assert torch.equal(got[1], generated)
        close(got[2], overridden)
        read = json.loads((tmp_path / f"report{rank}.json").read_text())
        assert "no query head 4 (heads are 0 to 3)" in read["refusal"]
        reports.append(read["report"]["layers"])
    assert not torch.allclose(expected, overridden, rtol=0.1), "the two ways of patching must differ to mean something"
    for layer, halves in zip(whole.layers, zip(*reports, strict=True), strict=True):
        split = family in ("llama", "qwen3")
        assert [half["first_head"] for half in halves] == ([0, 2] if split else [0, 0])
        for name in ("density", "kept_mass"):
            both = halves[0][name] + halves[1][name] if split else halves[1][name]
            assert both == pytest.approx(getattr(layer, name), abs=1e-3)


def close(got: Tensor, expected: Tensor) -> None:
    assert (got - expected).abs().max() <= 1e-3 * expected.std()


def test_heads_that_cannot_be_divided_are_refused() -> None:
    assert list(HeadSlice(1, 3).of(6)) == [2, 3]
    with pytest.raises(NotImplementedError, match="3 processes does not divide 4 query heads"):
        HeadSlice(0, 3).of(4)
