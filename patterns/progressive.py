"""Progressive precision: rows are judged with few bits, and again with all of them where that leaves them undecided.

Wang, Zhang and Han, "SpAtten", 2021, arXiv:2012.09852: the high bits of queries and keys decide where attention has a
peak; where it is flat, the low bits are fetched too.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.estimators.mean_pooled import query_block_means, scaled
from sparseprefill.estimators.selection import check_count, check_share
from sparseprefill.kernels.low_bit import accurate
from sparseprefill.patterns.expected_density import expected_density
from sparseprefill.patterns.expected_overhead import Overhead, expected_overhead, stated_overhead
from sparseprefill.patterns.expected_tiles import tile_law
from sparseprefill.patterns.nested import products_of
from sparseprefill.patterns.wrapping import (
    check_asked_often,
    check_inner,
    check_no_skip,
    index_of_rows,
    inner_for_layer,
    keeps_everything,
    rows_stand_alone,
)

_LOGITS = 1 << 22  # of rows and keys that are held at one time


@dataclass(frozen=True, slots=True)
class Progressive:
    """The blocks that `inner` names for queries and keys of `bits` bits, and for flat rows those for exact ones.

    Each token has a scale of its own: the largest number becomes 2 ** (bits - 1) - 1, and numbers are rounded to whole
    ones. A row of a head is flat where the largest weight of a softmax over the keys that it sees, for the mean of its
    queries, both of so few bits, is below `flat`. `flat` = 1 asks for nearly all rows again. What `inner` cannot judge
    with few bits, or with all where that is more, is counted as unjudged.

    SpAtten, arXiv:2012.09852, single queries in place of rows of tiles. Raises ValueError or TypeError for bits that
    are none, a threshold that is no share, and for what names no blocks of keys as they lie.
    """

    inner: Any  # anything with `build_index`
    bits: int = 4  # of each number, its sign among them; 2 to 16
    flat: float = 0.1  # weight of the peak

    def __post_init__(self) -> None:
        check_count("bits", self.bits, least=2)
        if self.bits > 16:
            raise ValueError(f"bits must be at most 16, got {self.bits}: with more nothing is saved")
        check_share("flat", self.flat)
        check_inner("progressive", self.inner)
        check_asked_often("progressive", self.inner)

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        if keeps_everything(self.inner) or not inputs.last_key:
            whole: BlockIndex = self.inner.build_index(inputs, grid)
            return whole
        coarse = rounded(inputs, self.bits)
        index: BlockIndex = self.inner.build_index(coarse, grid)
        check_no_skip("progressive", index)
        flat = self.peaks(coarse, grid) < self.flat  # [batch, query_heads, rows]
        wanted = flat.any(1)
        if inputs.device.type == "cpu" and not bool(wanted.any()):
            return index
        fine = index_of_rows("progressive", self.inner, inputs, grid, wanted)
        parts = []
        for start, stop in grid.slabs(inputs.query_heads):
            again = flat[:, :, start:stop, None]
            parts.append(
                BlockIndex.from_mask(grid, torch.where(again, fine.to_mask(start, stop), index.to_mask(start, stop)))
            )
        counted = [each.unjudged for each in (index, fine) if each.unjudged is not None]
        return dataclasses.replace(
            BlockIndex.stack(parts), unjudged=torch.stack(counted).amax(0) if counted else None
        )  # fmt: skip

    def peaks(self, inputs: AttentionInputs, grid: BlockGrid) -> Tensor:
        """[batch, query_heads, rows]: the largest weight that the mean query of a row gives a key; NaN counts as 0."""
        keys, found = inputs.last_key, []
        key = inputs.key[:, :, :keys].to(accurate(inputs.key))
        low, high = inputs.visible_range()
        begin, end = (slots - inputs.query_start for slots in grid.row_slots())
        last = (end - 1).clamp(0, inputs.queries - 1)
        low, high = low.gather(1, last), high.gather(1, last)
        slot = torch.arange(keys, device=inputs.device)
        together = max(1, _LOGITS // (inputs.batch * inputs.query_heads * max(1, keys)))
        for start in range(0, grid.rows, together):
            stop = min(grid.rows, start + together)
            query = query_block_means(inputs, grid, start, stop).unflatten(1, (inputs.kv_heads, -1))
            logits = scaled(torch.einsum("bkgid,bkjd->bkgij", query, key), inputs)
            unseen = (slot < low[:, start:stop, None]) | (slot >= high[:, start:stop, None])
            if inputs.key_valid is not None:
                unseen = unseen | ~inputs.key_valid[:, None, :keys]
            logits = logits.masked_fill(unseen[:, None, None], -torch.inf)
            found.append((logits.amax(-1) - logits.logsumexp(-1)).exp().nan_to_num(0.0).flatten(1, 2))
        peak = torch.cat(found, 2)
        found_peaks: Tensor = peak.masked_fill((end <= begin)[:, None], 1.0)  # rows without queries: no second look
        return found_peaks

    @property
    def rows_alone(self) -> bool:
        """As of `inner`: each token has a scale of its own."""
        return rows_stand_alone(self.inner)

    def keeps_everything(self) -> bool:
        """Whether `inner` is dense by its kind."""
        return keeps_everything(self.inner)

    def for_layer(self, layer: int) -> Progressive:
        """What `inner` is in this layer."""
        return dataclasses.replace(self, inner=inner_for_layer(self.inner, layer))

    def estimator_products(self, inputs: AttentionInputs, grid: BlockGrid) -> float:
        """See `sparseprefill.patterns.nested`: `inner`'s twice, if all rows are flat, and each row with each key."""
        return 2 * products_of(self.inner, inputs, grid) + grid.rows * inputs.last_key

    def tile_law(self) -> str:
        """See `sparseprefill.patterns.expected_tiles`."""
        return tile_law(self.inner)

    def expected_density(self, keys: int) -> float:
        return expected_density(self.inner, keys)

    def expected_overhead(self, device: torch.device, head_dim: int, block_q: int, block_k: int) -> Overhead:
        """That of `inner` twice, as nobody knows how many rows are flat, and each row with each key."""
        inner = expected_overhead(self.inner, device, head_dim, block_q, block_k)
        own = stated_overhead(
            device, head_dim, pairs=2 / block_q, keys=32, tiles=1 / (block_q * block_k), steps=1.0
        )  # fmt: skip
        return own + inner + inner


def rounded(inputs: AttentionInputs, bits: int) -> AttentionInputs:
    """Queries and keys that `bits` bits and a scale for each token can hold, in the dtype they had."""
    most = 2 ** (bits - 1) - 1

    def few(tensor: Tensor) -> Tensor:
        wide = tensor.to(accurate(tensor))
        scale = wide.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(wide.dtype).tiny) / most
        made: Tensor = ((wide / scale).round() * scale).to(tensor.dtype)
        return made

    return dataclasses.replace(inputs, query=few(inputs.query), key=few(inputs.key))
