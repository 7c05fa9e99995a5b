"""`python -m sparseprefill.lm_eval`: the command line of lm-evaluation-harness, with the model type `sparseprefill`.

    python -m sparseprefill.lm_eval run --tasks niah_single_1 --limit 5 --metadata max_seq_lengths=[1024,2048]
        --model_args pretrained=inside method=block_sparse keep=0.2

Three things differ from `lm_eval`: without `--model` the model type is `sparseprefill`; without `--device` that model
goes where there is a GPU, else to the CPU; and tasks that make their own prompts (RULER) find the tokenizer of the
model inside, where that is the model. `--model hf` is the harness' own.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any


def main() -> None:
    """Run the harness on `sys.argv`. What is refused ends the process with one line and status 1."""
    from sparseprefill.evals.lm_eval import register

    try:
        register()
    except ImportError as error:
        sys.exit(f"Error: {error}")
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    setup_logging()
    harness = HarnessCLI()
    arguments = harness.parse_args()
    try:
        if arguments.command == "run":
            complete(arguments)
        harness.execute(arguments)
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.exit(f"Error: {error}")


def complete(arguments: argparse.Namespace) -> None:
    """Fill in what `lm_eval run` would not know: the model type, its device, the tokenizer of the model inside."""
    import torch
    from lm_eval.config.evaluate_config import EvaluatorConfig

    from sparseprefill.evals.lm_eval import INSIDE, MODEL_TYPE
    from sparseprefill.evals.loading import model_folder

    written = EvaluatorConfig.load_yaml_config(arguments.config) if arguments.config else {}
    arguments.model = arguments.model or written.get("model") or MODEL_TYPE
    if arguments.model != MODEL_TYPE:
        return
    if not arguments.device and not written.get("device"):  # the harness would say cuda:0 whatever there is
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    model_args, metadata = (
        _dictionary(getattr(arguments, name) or written.get(name)) for name in ("model_args", "metadata")
    )
    inside = model_args.get("pretrained") in (None, INSIDE)
    if inside and "tokenizer" not in model_args and "tokenizer" not in metadata:
        arguments.metadata = {"tokenizer": model_folder(None), **metadata}


def _dictionary(given: Any) -> dict[str, Any]:
    from lm_eval.utils import simple_parse_args_string

    if isinstance(given, str):
        given = simple_parse_args_string(given)
    return dict(given or {})


if __name__ == "__main__":
    main()
