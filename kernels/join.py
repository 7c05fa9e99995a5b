"""Attention over several disjoint sets of keys, each computed by itself, joined by logsumexp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionOutput


def join_outputs(parts: Sequence[AttentionOutput], sinks: Tensor | None = None) -> AttentionOutput:
    """What attention over all the keys gives, from attention over each disjoint set of them.

    Args:
        parts: of the same queries, computed without sinks; all with an output, or all without.
        sinks: [query_heads] logits without values that take their share of the joined mass.

    Returns:
        The output in the dtype of the parts' and lse; both are float32 inside (float64 from the oracle). A query that
        sees nothing in a part takes nothing from it, and one that sees nothing at all has lse -inf and output 0. A
        single part without sinks comes back as it is, bit for bit.

    Raises:
        ValueError: no parts.
    """
    if not parts:
        raise ValueError("there is nothing to join: give at least one part")
    if len(parts) == 1 and sinks is None:
        return parts[0]
    lse = torch.logsumexp(torch.stack([part.lse for part in parts]), 0)
    total = lse if sinks is None else torch.logaddexp(lse, sinks.to(lse.dtype)[None, :, None])
    output = None
    first = parts[0].output
    if first is not None:
        output = torch.zeros_like(first, dtype=lse.dtype)
        for part in parts:
            assert part.output is not None
            share = (part.lse - total).exp().masked_fill(part.lse == -torch.inf, 0.0)  # -inf - -inf is NaN
            output += share[..., None] * part.output
        output = output.to(first.dtype)
    counts = [part.skipped for part in parts if part.skipped is not None]
    return AttentionOutput(output, lse, torch.stack(counts).sum(0) if counts else None)
