"""Attention over given blocks: one verb, several implementations of one meaning."""

from sparseprefill.kernels.dispatch import IMPLEMENTATIONS, block_sparse_attention, choose_implementation, why_not

__all__ = ["IMPLEMENTATIONS", "block_sparse_attention", "choose_implementation", "why_not"]
