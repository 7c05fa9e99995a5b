"""What a method keeps and what it costs, always next to dense attention on the same items."""

from sparseprefill.evals.compare import summarise
from sparseprefill.evals.loading import MODEL_INSIDE, load_model
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.evals.results import EvalResult
from sparseprefill.evals.runner import run_eval

__all__ = ["MODEL_INSIDE", "EvalResult", "MethodSpec", "load_model", "run_eval", "summarise"]
