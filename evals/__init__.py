"""What a method keeps and what it costs, always next to dense attention on the same items."""

from sparseprefill.evals.loading import MODEL_INSIDE, load_model
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.evals.needle import NeedleResult, NeedleScore, run_needle

__all__ = ["MODEL_INSIDE", "MethodSpec", "NeedleResult", "NeedleScore", "load_model", "run_needle"]
