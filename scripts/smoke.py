"""What a fresh install must be able to do, without network and without a checkout beside it.

python -I scripts/smoke.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparseprefill


def command(*arguments: str) -> str:
    """What the installed command prints."""
    script = Path(sys.executable).with_name("sparseprefill")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([script, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@torch.no_grad()
def dense_is_eager() -> tuple[float, float]:
    """(error, budget) of a tiny random Llama, patched dense, against itself in float64 and eager.

    The budget is twice what eager makes in float32, and one rounding of the largest logit.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).train(False)
    ids = torch.randint(3, 64, (2, 300), generator=torch.Generator().manual_seed(1))
    plain = model(input_ids=ids).logits
    with sparseprefill.patch_model(model, "dense", min_length=0) as patch:
        patched = model(input_ids=ids).logits
        assert patch.report().sparse_calls == 2, patch.report().previous_calls
    assert torch.equal(model(input_ids=ids).logits, plain), "removing the patch did not restore the model"
    exact = model.double()(input_ids=ids).logits
    error, plain_error = (float((each - exact).abs().max()) for each in (patched, plain))
    return error, 2 * (plain_error + torch.finfo(torch.float32).eps * float(exact.abs().max()))


def main() -> None:
    at = Path(sparseprefill.__file__).resolve()
    assert Path(sys.prefix).resolve() in at.parents, f"imported from {at}, which is not this environment"
    listed = command("methods")
    assert "minference" in listed, listed
    error, budget = dense_is_eager()
    assert error <= budget, f"dense and eager differ by {error:.2e}, the budget is {budget:.2e}"
    with tempfile.TemporaryDirectory() as folder:
        asked = ("--kind", "along", "--lengths", "1k", "--samples", "1", "--method", "dense", "--out", folder)
        found = command("needle", *asked)
    assert "100.0" in found, found
    print(
        f"sparseprefill {sparseprefill.__version__} with torch {torch.__version__}: commands work, the model inside "
        f"retrieves, dense against eager {error:.1e} of {budget:.1e} allowed"
    )


if __name__ == "__main__":
    main()
