"""From block scores to lists of blocks. Any rule can follow any estimator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Budget = int | float
"""An int is tokens; a float in (0, 1] is a share of the keys a row of the grid can see, so it scales with length."""


# far beyond any prompt, and sums and products with it still fit int64
_MOST_TOKENS = 1 << 40


def check_budget(name: str, budget: Budget, *, least: int = 1) -> None:
    """Raise ValueError or TypeError unless `budget` is at least `least` tokens or a share in (0, 1]."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise TypeError(f"{name} must be tokens (int) or a share of the visible keys (float), got {budget!r:.80}")
    if isinstance(budget, float):
        check_share(f"{name} as a share", budget)
    else:
        check_tokens(name, budget, least=least)


def check_tokens(name: str, tokens: int, *, least: int = 1) -> None:
    """Raise ValueError or TypeError unless `tokens` is an int of at least `least`."""
    if isinstance(tokens, bool) or not isinstance(tokens, int):
        raise TypeError(f"{name} must be a number of tokens (int), got {tokens!r:.80}")
    if not least <= tokens <= _MOST_TOKENS:
        shown = tokens if abs(tokens) <= _MOST_TOKENS else f"a number of {tokens.bit_length()} bits"
        raise ValueError(f"{name} must be at least {least} tokens and at most {_MOST_TOKENS}, got {shown}")


def check_count(name: str, count: int, *, least: int = 1) -> None:
    """Raise ValueError or TypeError unless `count` is an int of at least `least`, and small enough to count with."""
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{name} must be an int, got {count!r:.80}")
    if not least <= count <= _MOST_TOKENS:
        raise ValueError(f"{name} must be at least {least} and at most {_MOST_TOKENS}, got {count!r:.80}")


def check_share(name: str, share: float) -> None:
    """Raise ValueError or TypeError unless `share` is a number in (0, 1]."""
    if isinstance(share, bool) or not isinstance(share, (int, float)):
        raise TypeError(f"{name} must be a number in (0, 1], got {share!r:.80}")
    if not 0.0 < share <= 1.0:
        raise ValueError(f"{name} must be in (0, 1], got {share!r:.80}")


def keep_blocks(budget: Budget, visible: Tensor, block_k: int) -> Tensor:
    """How many of `visible` blocks (int64, any shape) a budget pays for: rounded up, at least 1, at most all."""
    if isinstance(budget, float):
        # float64, and a hair less: 0.2 * 10 must be 2 blocks and not 3
        wanted = (visible.double() * budget - 1e-9).ceil().to(torch.int64)
    else:
        wanted = torch.full_like(visible, -(-budget // block_k))
    return torch.minimum(wanted.clamp(min=1), visible)


def most_blocks(budget: Budget, key_blocks: int, block_k: int) -> int:
    """The largest count `keep_blocks` can give, known on the host."""
    wanted = math.ceil(key_blocks * budget) if isinstance(budget, float) else -(-budget // block_k)
    return max(1, min(wanted, key_blocks))


@dataclass(frozen=True, slots=True)
class TopK:
    """Keep the blocks with the highest scores; of equal scores the lower id. Forced blocks count first.

    `keep` = 1.0 keeps all blocks: dense attention. Raises ValueError or TypeError for a budget that is none.
    """

    keep: Budget  # tokens, or a share of the visible keys

    def __post_init__(self) -> None:
        check_budget("keep", self.keep)

    def select(self, scores: Tensor, visible: Tensor, forced: Tensor | None, block_k: int) -> tuple[Tensor, Tensor]:
        """Ids and counts of the kept blocks.

        Args:
            scores: [batch, heads, rows, key_blocks].
            visible: bool [batch, rows, key_blocks], at least one a row.
            forced: bool like `visible` or None; kept always, and first.
            block_k: tokens a block.

        Returns:
            ids int64 [batch, heads, rows, slots], of which the first count int64 [batch, heads, rows] are ascending.
        """
        return self.cut(ranked(scores, visible, forced), visible, forced, block_k)

    def cut(self, order: Tensor, visible: Tensor, forced: Tensor | None, block_k: int) -> tuple[Tensor, Tensor]:
        """`select` from what `ranked` gave for the same blocks: one ranking serves all budgets."""
        key_blocks = order.shape[-1]
        kept = keep_blocks(self.keep, visible.sum(-1), block_k)
        slots = most_blocks(self.keep, key_blocks, block_k)
        if forced is not None:
            kept = torch.maximum(kept, (forced & visible).sum(-1))
            slots = key_blocks if order.device.type != "cpu" else max(slots, int(kept.max()))
        beyond = torch.arange(slots, device=order.device) >= kept[:, None, :, None]
        ids = order[..., :slots].masked_fill(beyond, key_blocks).sort(-1).values
        return ids, kept[:, None].expand(order.shape[:3])


def ranked(scores: Tensor, visible: Tensor, forced: Tensor | None) -> Tensor:
    """int64 [batch, heads, rows, key_blocks]: forced blocks, then visible ones by falling score, then the others.

    Visible ones of -inf or NaN are the last that are visible.
    """
    least = torch.finfo(scores.dtype).min
    best_first = scores.nan_to_num(nan=least, posinf=torch.inf, neginf=least).masked_fill(~visible[:, None], -torch.inf)
    if forced is not None:
        best_first = best_first.masked_fill((forced & visible)[:, None], torch.inf)
    return best_first.argsort(dim=-1, descending=True, stable=True)


def check_threshold(threshold: float) -> None:
    """Raise ValueError or TypeError unless `threshold` is a number in (0, 1)."""
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise TypeError(f"threshold must be a number in (0, 1), got {threshold!r:.80}")
    if not 0.0 < threshold < 1.0:
        raise ValueError(f"threshold must be in (0, 1), got {threshold!r:.80}")


def passed(thresholds: Sequence[float], scores: Tensor) -> Tensor:
    """bool like scores [batch, heads, rows, key_blocks], logarithms of weights: above its head's threshold, or NaN."""
    floor = torch.tensor([math.log(each) for each in thresholds], dtype=scores.dtype)
    floor = floor.to(scores.device, non_blocking=True)  # a GPU is not waited for
    return ~(scores <= floor[:, None, None])
