"""Which tiles of a list are computed where a kernel may skip those of no weight: `BlockIndex.skip`, decided at once.

BLASST (arXiv:2512.12087) and SpargeAttn (arXiv:2502.18137) decide while they walk. A skipped tile raises no query's
maximum, as lambda is at most 1, so that the maximum over the computed tiles is the one over all tiles before.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def tiles_to_compute(peaks: Tensor, counts: Tensor, threshold: Tensor) -> Tensor:
    """bool [lists, tiles]: not skipped.

    Args:
        peaks: [lists, tiles, queries], each query's largest logit in each tile, tiles in the order of visits; -inf
            where it sees nothing of the tile, NaN where a logit is.
        counts: bool [lists, queries], False for queries that keep no tile: padding, and what nobody asked.
        threshold: [lists], natural log of lambda, 0 at most. With -inf nothing is skipped.
    """
    before = functional.pad(peaks.cummax(1).values[:, :-1], (0, 0, 1, 0), value=-torch.inf)
    negligible = (peaks == -torch.inf) | (peaks <= before + threshold[:, None, None])  # NaN is neither
    return (~negligible & counts[:, None]).any(2) | (threshold == -torch.inf)[:, None]
