"""Which blocks cover a share of a row's estimated mass, the forced ones counted first.

Xu et al., "XAttention", 2025, arXiv:2503.16428: the smallest set of blocks, by falling mass, that reaches the share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sparseprefill.estimators.selection import ranked


@dataclass(frozen=True, slots=True)
class CoveredMass:
    """Keep the forced blocks, and of the others those of most mass until the threshold's share of all is reached.

    The block that reaches it is kept; of equal masses the lower id comes first. 0 keeps what is forced, 1 keeps all
    blocks whatever their mass. XAttention, arXiv:2503.16428. Raises ValueError or TypeError for what is no share.
    """

    thresholds: tuple[float, ...]  # one for each head, or one for all; in [0, 1]

    def __post_init__(self) -> None:
        for each in self.thresholds:
            check_mass("threshold", each)

    def select(self, mass: Tensor, visible: Tensor, forced: Tensor) -> Tensor:
        """bool like mass: the kept blocks.

        Args:
            mass: [batch, heads, rows, key_blocks], not negative; no row holds a NaN that shall count.
            visible: bool [batch, rows, key_blocks].
            forced: bool like `visible`, a part of it.
        """
        order = ranked(mass, visible, forced)
        reached = mass.masked_fill(~visible[:, None], 0).gather(-1, order).cumsum(-1)
        before = functional.pad(reached[..., :-1], (1, 0))
        needed = self._per_head(mass, self.thresholds) * reached[..., -1:]
        # counted, as a sum in another order may fall by a rounding and leave a gap
        count = (before < needed).sum(-1, keepdim=True)
        first = torch.arange(mass.shape[-1], device=mass.device) < count
        kept = torch.zeros_like(first.expand_as(mass), dtype=torch.bool).scatter_(-1, order, first)
        kept |= self._per_head(mass, [each == 1 for each in self.thresholds]).to(torch.bool)
        return kept.logical_and_(visible[:, None]).logical_or_(forced[:, None])

    @staticmethod
    def _per_head(mass: Tensor, values: object) -> Tensor:
        tensor = torch.tensor(values, dtype=mass.dtype).to(mass.device, non_blocking=True)  # a GPU is not waited for
        return tensor[:, None, None]


def check_mass(name: str, share: float) -> None:
    """Raise ValueError or TypeError unless `share` is a number in [0, 1]."""
    if isinstance(share, bool) or not isinstance(share, (int, float)):
        raise TypeError(f"{name} must be a number in [0, 1], got {share!r:.80}")
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {share!r:.80}")
