"""The shapes a head can follow, and what assigns them."""

from sparseprefill.patterns.a_shape import AShape
from sparseprefill.patterns.block_sparse import BlockSparse
from sparseprefill.patterns.dense import Dense
from sparseprefill.patterns.last_rows import LastRowsDense, Pattern
from sparseprefill.patterns.per_head import PerHead
from sparseprefill.patterns.random_blocks import RandomBlocks
from sparseprefill.patterns.sale import Sale
from sparseprefill.patterns.store import HeadScore, ModelPatterns, load_patterns, save_patterns
from sparseprefill.patterns.tri_shape import TriShape
from sparseprefill.patterns.vertical_slash import VerticalSlash

__all__ = [
    "AShape",
    "BlockSparse",
    "Dense",
    "HeadScore",
    "LastRowsDense",
    "ModelPatterns",
    "Pattern",
    "PerHead",
    "RandomBlocks",
    "Sale",
    "TriShape",
    "VerticalSlash",
    "load_patterns",
    "save_patterns",
]
