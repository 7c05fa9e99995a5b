"""What the last queries of a prompt attend to, summed along columns and along diagonals.

Jiang et al., "MInference 1.0", 2024, arXiv:2407.02490, section 3.2: the attention of a few trailing queries tells which
single keys (verticals) and which distances (slashes) matter to a head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sparseprefill.contracts import AttentionInputs, BlockGrid
from sparseprefill.estimators.selection import check_tokens

CPU_ENTRIES = 1 << 21
"""Logits that are held at one time on a CPU, in about four copies."""


@dataclass(frozen=True, slots=True, eq=False)
class ProbeMass:
    """Attention mass of the probe rows; both in float32 (float64 for such inputs)."""

    column: Tensor  # [batch, query_heads, keys] by key slot
    diagonal: Tensor  # [batch, query_heads, keys] by distance query slot - key slot

    def block_columns(self, grid: BlockGrid) -> Tensor:
        """[batch, query_heads, key_blocks]: the mass of each key block."""
        size, blocks, keys = grid.block_k, grid.key_blocks, self.column.shape[-1]
        slot = torch.arange(blocks * size, device=self.column.device) + grid.anchor[:, None]
        inside = (slot < keys)[:, None]
        slot = slot.clamp(max=keys - 1)[:, None].expand(*self.column.shape[:2], -1)
        by_block: Tensor = (self.column.gather(2, slot) * inside).unflatten(2, (blocks, size)).sum(-1)
        return by_block


@dataclass(frozen=True, slots=True)
class Probe:
    """The last `rows` queries, exactly: rows * keys products a head, 2 * rows / keys of dense causal attention.

    MInference, arXiv:2407.02490, section 3.2. Raises ValueError for fewer than one row.
    """

    rows: int = 64  # queries

    def __post_init__(self) -> None:
        check_tokens("probe", self.rows)

    def products(self, inputs: AttentionInputs) -> int:
        """What it costs a head, in products of a query and a key."""
        return min(self.rows, inputs.queries) * inputs.last_key

    def mass(self, inputs: AttentionInputs) -> ProbeMass:
        """Softmax of the probe rows over the keys they see, summed by column and by distance.

        Padding asks nothing: with right padding the probe rows end at each batch row's last valid query, and a query in
        a slot that is not valid is left out.
        """
        if inputs.device.type == "cpu":  # a few heads at a time: fresh memory costs more than the passes over it
            together = max(1, CPU_ENTRIES // (inputs.batch * min(self.rows, inputs.queries) * max(1, inputs.last_key)))
            if together < inputs.query_heads:
                parts = [self._mass(part) for _, _, part in head_slabs(inputs, together)]
                return ProbeMass(torch.cat([p.column for p in parts], 1), torch.cat([p.diagonal for p in parts], 1))
        return self._mass(inputs)

    def _mass(self, inputs: AttentionInputs) -> ProbeMass:
        rows, keys = min(self.rows, inputs.queries), inputs.last_key
        first = (inputs.tail() - rows).clamp(min=inputs.query_start)  # slot of the first probe row
        slot = first[:, None] + torch.arange(rows - 1, -1, -1, device=inputs.device)  # [batch, rows], the last first
        place = slot - inputs.query_start
        accurate = torch.float64 if inputs.query.dtype == torch.float64 else torch.float32
        query = inputs.query.gather(2, place[:, None, :, None].expand(-1, inputs.query_heads, -1, inputs.head_dim))
        query = query.unflatten(1, (inputs.kv_heads, inputs.group_size))
        logits = torch.einsum("bkgid,bkjd->bkgij", query, inputs.key[:, :, :keys]).to(accurate).flatten(1, 2)
        logits = logits.mul_(inputs.scale)
        if inputs.softcap is not None:
            logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
        low, high = (bound.gather(1, place)[..., None] for bound in inputs.visible_range())
        key = torch.arange(keys, device=inputs.device)
        unseen = (key < low) | (key >= high)
        if inputs.key_valid is not None:
            unseen |= ~(inputs.key_valid[:, None, :keys] & inputs.key_valid.gather(1, slot)[..., None])
        unseen = unseen[:, None]
        share = logits.masked_fill_(unseen, -torch.inf).softmax(-1).masked_fill_(unseen, 0)  # NaN: nothing is seen
        # a row longer by `rows`, cut one short, is shifted by one a row: a distance then stands in one column
        skewed = functional.pad(share, (0, rows)).flatten(2)[..., : rows * (keys + rows - 1)]
        by_sum = skewed.unflatten(2, (rows, keys + rows - 1)).sum(2)  # entry e: distance first + rows - 1 - e
        entry = first[:, None] + (rows - 1) - torch.arange(inputs.keys, device=inputs.device)
        inside = (entry >= 0) & (entry < by_sum.shape[-1])
        entry = entry.clamp(0, by_sum.shape[-1] - 1)[:, None].expand(*by_sum.shape[:2], -1)
        diagonal = by_sum.gather(2, entry) * inside[:, None]
        return ProbeMass(functional.pad(share.sum(2), (0, inputs.keys - keys)), diagonal)


def head_slabs(inputs: AttentionInputs, together: int) -> Iterator[tuple[int, int, AttentionInputs]]:
    """(start, stop, views of query heads [start, stop)): at most `together`, whole groups or parts of one group."""
    group = inputs.group_size
    step = together // group * group or together
    start = 0
    while start < inputs.query_heads:
        stop = min(start + step, inputs.query_heads if step >= group else (start // group + 1) * group)
        heads, kv = slice(start, stop), slice(start // group, -(-stop // group))
        sinks = None if inputs.sinks is None else inputs.sinks[heads]
        yield (
            start,
            stop,
            dataclasses.replace(
                inputs, query=inputs.query[:, heads], key=inputs.key[:, kv], value=inputs.value[:, kv], sinks=sinks
            ),
        )
        start = stop
