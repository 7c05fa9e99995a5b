"""What the last queries of a prompt attend to, summed along columns and along diagonals.

Jiang et al., "MInference 1.0", 2024, arXiv:2407.02490, section 3.2: the attention of a few trailing queries tells which
single keys (verticals) and which distances (slashes) matter to a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sparseprefill.contracts import AttentionInputs, BlockGrid
from sparseprefill.estimators.selection import check_tokens


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
        rows, keys = min(self.rows, inputs.queries), inputs.last_key
        first = (inputs.tail() - rows).clamp(min=inputs.query_start)  # slot of probe row 0
        slot = first[:, None] + torch.arange(rows, device=inputs.device)  # [batch, rows]
        place = slot - inputs.query_start
        accurate = torch.float64 if inputs.query.dtype == torch.float64 else torch.float32
        query = inputs.query.gather(2, place[:, None, :, None].expand(-1, inputs.query_heads, -1, inputs.head_dim))
        query = query.unflatten(1, (inputs.kv_heads, inputs.group_size))
        logits = torch.einsum("bkgid,bkjd->bkgij", query, inputs.key[:, :, :keys]).to(accurate).flatten(1, 2)
        logits = logits * inputs.scale
        if inputs.softcap is not None:
            logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
        low, high = (bound.gather(1, place)[..., None] for bound in inputs.visible_range())
        key = torch.arange(keys, device=inputs.device)
        seen = (key >= low) & (key < high)
        if inputs.key_valid is not None:
            seen &= inputs.key_valid[:, None, :keys] & inputs.key_valid.gather(1, slot)[..., None]
        seen = seen[:, None]
        share = logits.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0)  # NaN where nothing is seen
        # reversed keys are distances, shifted by one a row; a row longer by `rows`, cut one short, undoes the shift
        skewed = functional.pad(share.flip(-1), (0, rows)).flatten(2)[..., : rows * (keys + rows - 1)]
        by_sum = skewed.unflatten(2, (rows, keys + rows - 1)).sum(2)  # entry e: distance first - (keys - 1) + e
        entry = torch.arange(inputs.keys, device=inputs.device) - first[:, None] + (keys - 1)
        inside = (entry >= 0) & (entry < by_sum.shape[-1])
        entry = entry.clamp(0, by_sum.shape[-1] - 1)[:, None].expand(*by_sum.shape[:2], -1)
        diagonal = by_sum.gather(2, entry) * inside[:, None]
        return ProbeMass(functional.pad(share.sum(2), (0, inputs.keys - keys)), diagonal)
