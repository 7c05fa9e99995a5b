"""One of several processes that share a run of an evaluation: started by torchrun from the tests."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from eval_tasks import SPECS, Parity

from sparseprefill.evals.loading import load_model
from sparseprefill.evals.runner import Workers, run_eval

if __name__ == "__main__":
    torch.set_num_threads(1)
    model, tokenizer = load_model(device="cpu")
    workers = Workers.from_environment()
    result = run_eval(Parity(), model, tokenizer, SPECS, Path(sys.argv[1]))
    assert (result is None) == (workers.rank > 0)
