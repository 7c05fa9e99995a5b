"""One process of a tensor-parallel model; started by torchrun in test_tensor_parallel.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed
from transformers import AutoModelForCausalLM

from sparseprefill import patch_model


def run(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder / "model", tp_plan="auto", attn_implementation="eager").eval()
    rank = torch.distributed.get_rank()
    ids = torch.load(folder / "ids.pt", weights_only=True).to(model.device)
    with torch.no_grad(), patch_model(model, profile=folder / "profile.json", **job["blocks"]) as patch:
        logits = model(input_ids=ids).logits
        report = patch.report().to_dict()
        generated = model.generate(ids, max_new_tokens=4, do_sample=False)
    heads = {tuple(override): method for override, method in job["heads"]}
    with torch.no_grad(), patch_model(model, "dense", heads=heads, **job["blocks"]) as patch:
        overridden = model(input_ids=ids).logits
    try:
        patch_model(model, "dense", heads={(0, job["query_heads"]): "a_shape"})
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    torch.save([logits.cpu(), generated.cpu(), overridden.cpu()], folder / f"logits{rank}.pt")
    (folder / f"report{rank}.json").write_text(json.dumps({"report": report, "refusal": refusal}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run(Path(sys.argv[1]))
