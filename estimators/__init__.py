"""Which key blocks matter for this prompt: estimators score blocks, selection rules turn scores into lists."""

from sparseprefill.estimators.mean_pooled import MeanPooled
from sparseprefill.estimators.probe import Probe, ProbeMass
from sparseprefill.estimators.relative_attention import RelativeAttention
from sparseprefill.estimators.selection import (
    Budget,
    TopK,
    check_budget,
    check_share,
    check_threshold,
    check_tokens,
    keep_blocks,
    passed,
)

__all__ = [
    "Budget",
    "MeanPooled",
    "Probe",
    "ProbeMass",
    "RelativeAttention",
    "TopK",
    "check_budget",
    "check_share",
    "check_threshold",
    "check_tokens",
    "keep_blocks",
    "passed",
]
