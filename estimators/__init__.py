"""Which key blocks matter for this prompt: estimators score blocks, selection rules turn scores into lists."""

from sparseprefill.estimators.flexprefill import LastBlock
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
from sparseprefill.estimators.self_similarity import SelfSimilarity

__all__ = [
    "Budget",
    "LastBlock",
    "MeanPooled",
    "Probe",
    "ProbeMass",
    "RelativeAttention",
    "SelfSimilarity",
    "TopK",
    "check_budget",
    "check_share",
    "check_threshold",
    "check_tokens",
    "keep_blocks",
    "passed",
]
