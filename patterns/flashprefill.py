"""FlashPrefill: blocks whose mean key is nearly as strong as the strongest, for any query of the row.

Fan et al., "FlashPrefill", 2026, arXiv:2603.06199. Every query is scored against the mean key of each block that lies
wholly in its past; a block's energy for a row of queries is the logsumexp of these scores, and a block stays if its
energy is at least `alpha` times that of the strongest. One product and a maximum: no sort, no cumulative sum.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.estimators.mean_pooled import key_block_means, real_key_blocks
from sparseprefill.estimators.selection import Budget, TopK, check_tokens
from sparseprefill.patterns.block_sparse import forced_blocks
from sparseprefill.patterns.expected_density import UNKNOWN, in_blocks, kept_share
from sparseprefill.patterns.expected_overhead import Overhead, stated_overhead
from sparseprefill.patterns.own_blocks import with_own_blocks

PUBLISHED = 0.12
"""The alpha of the paper's code for Qwen3-30B-A3B; 0.18 for Llama-3.1-8B, 0.08 for Qwen2.5."""

# scores of queries and mean keys that are held at a time: on a CPU what stays in its cache
_CPU_SCORES, _GPU_SCORES = 1 << 20, 1 << 25


@dataclass(frozen=True, slots=True)
class FlashPrefill:
    """Blocks whose energy is at least `alpha` times the row's largest, beside sink, window and `least`.

    The energy of block n for a row of queries is log sum exp(scale * query . mean key of n), over those queries of the
    row that have all of n behind them: of a row's own block, its last query. With `keep` instead of `alpha` the blocks
    of highest energy are kept up to a budget, sink and window first. An alpha of 0 and a `keep` of 1.0 are dense; one
    above 1 leaves sink, window and `least`.

    A row whose energies are not finite keeps all its blocks and is counted in `BlockIndex.unjudged`. It does not look
    ahead. The paper's dense last rows are `last_rows_dense=256` of any method here.

    FlashPrefill, arXiv:2603.06199, where tiles are 128 x 128. Raises ValueError or TypeError for options out of range.
    """

    rows_alone: ClassVar[bool] = True  # rows choose without each other; see `sparseprefill.patterns.wrapping`

    alpha: float | None = None  # share of the strongest block's energy; None without `keep`: 0.12
    keep: Budget | None = None  # instead: tokens, or a share of the visible keys
    sink: int = 256  # first tokens kept always
    local: int = 512  # tokens before the end of a row kept always
    least: int = 0  # tokens of the blocks of highest energy that are kept whatever alpha says
    sink_counts: bool = True  # may the sink be the strongest block?

    def __post_init__(self) -> None:
        if self.alpha is not None and self.keep is not None:
            raise ValueError(f"flashprefill takes alpha or keep, got {self.alpha!r:.80} and {self.keep!r:.80}")
        if self.keep is not None:
            TopK(self.keep)
            if self.least:
                raise ValueError("least goes with alpha: a budget to keep has no other least")
        check_ratio("alpha", self.ratio)
        for name in ("sink", "local", "least"):
            check_tokens(name, getattr(self, name), least=0)
        if not isinstance(self.sink_counts, bool):
            raise TypeError(f"sink_counts must be True or False, got {self.sink_counts!r:.80}")

    @property
    def ratio(self) -> float:
        """Alpha, where no budget decides."""
        return PUBLISHED if self.alpha is None else self.alpha

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        keys, rows = _Keys.of(inputs, grid), self._rows(inputs, grid)
        slabs = ((keys.energy(start, stop), start, stop) for start, stop in keys.slabs())
        return BlockIndex.stack([self._choose(*slab, *rows, grid) for slab in slabs])

    @property
    def family(self) -> tuple[Any, ...]:
        """All are cut from the same energies."""
        return (FlashPrefill,)

    def estimate(self, inputs: AttentionInputs, grid: BlockGrid) -> Tensor:
        """Energies, [batch, query_heads, rows, key_blocks], which `choose` cuts."""
        keys = _Keys.of(inputs, grid)
        return torch.cat([keys.energy(*slab) for slab in keys.slabs()], 2)

    def choose(self, estimate: Tensor, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        """`build_index` from an estimate of its family."""
        return self._choose(estimate, 0, grid.rows, *self._rows(inputs, grid), grid)

    def estimator_products(self, inputs: AttentionInputs, grid: BlockGrid) -> float:
        """See `sparseprefill.patterns.nested`. Half of the pairs of a query and a block lie in the future."""
        behind = inputs.queries * (inputs.query_start + inputs.queries / 2) / grid.block_k
        return behind + inputs.last_key

    def tile_law(self) -> str:
        """See `sparseprefill.patterns.expected_tiles`."""
        return "count" if self.keep is not None else "content"

    def expected_density(self, keys: int) -> float:
        forced = kept_share(in_blocks(self.sink) + 64 + in_blocks(self.local), keys)
        return max(UNKNOWN if self.keep is None else kept_share(self.keep, keys), forced)

    def expected_overhead(self, device: torch.device, head_dim: int, block_q: int, block_k: int) -> Overhead:
        """Each query with the mean of each block behind it, and every tile listed."""
        tiles = 1 / (block_q * block_k)
        return stated_overhead(device, head_dim, pairs=1 / block_k, keys=24, tiles=tiles, steps=0.64)

    def _rows(self, inputs: AttentionInputs, grid: BlockGrid) -> tuple[Tensor, Tensor, Tensor]:
        """Of all rows: visible blocks, those kept always, and how many queries are no padding."""
        forced = with_own_blocks(forced_blocks(inputs, grid, self.sink, self.local), inputs, grid)
        return grid.visible_block_mask(inputs), forced, grid.real_queries(inputs)

    def _choose(
        self, energy: Tensor, start: int, stop: int, visible: Tensor, forced: Tensor, asked: Tensor, grid: BlockGrid
    ) -> BlockIndex:
        visible, forced, asked = visible[:, start:stop], forced[:, start:stop], asked[:, None, start:stop]
        lost = ~energy.amax(-1).isfinite() & (energy > -torch.inf).any(-1)
        lost |= energy.isnan().any(-1)
        if self.keep is not None:
            mask = BlockIndex.from_slots(grid, *TopK(self.keep).select(energy, visible, forced, grid.block_k)).to_mask()
        else:
            mask = self._strong(energy, visible, grid) | forced[:, None]
        mask = (mask | lost[..., None]) & visible[:, None]
        return dataclasses.replace(BlockIndex.from_mask(grid, mask), unjudged=(asked * lost).sum(-1))

    def _strong(self, energy: Tensor, visible: Tensor, grid: BlockGrid) -> Tensor:
        seen = energy.masked_fill(~visible[:, None], -torch.inf)
        rivals = seen
        if not self.sink_counts:
            sink = torch.arange(grid.key_blocks, device=energy.device) < -(-self.sink // grid.block_k)
            rivals = seen.masked_fill(sink, -torch.inf)
        floor = rivals.amax(-1, keepdim=True) + (math.log(self.ratio) if self.ratio else -math.inf)
        strong = (seen >= floor) & (seen > -torch.inf) if self.ratio else torch.ones_like(seen, dtype=torch.bool)
        if self.least:
            best = TopK(self.least).select(seen, visible, None, grid.block_k)
            strong |= BlockIndex.from_slots(grid, *best).to_mask()
        return strong


def check_ratio(name: str, ratio: float) -> None:
    """Raise ValueError or TypeError unless `ratio` is a finite number of at least 0."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise TypeError(f"{name} must be a number, got {ratio!r:.80}")
    if not 0.0 <= ratio <= sys.float_info.max:
        raise ValueError(f"{name} must be at least 0 and finite, got {ratio!r:.80}")


@dataclass(frozen=True, slots=True, eq=False)
class _Keys:
    """Mean keys, and from where on a query has a block behind it."""

    inputs: AttentionInputs
    grid: BlockGrid
    mean: Tensor  # [batch, kv_heads, key_blocks, head_dim]
    end: Tensor  # int64 [batch, key_blocks], one past the last real key of each block; beyond any where there is none
    low: Tensor  # int64 [batch, queries], the first key each query sees

    @staticmethod
    def of(inputs: AttentionInputs, grid: BlockGrid) -> _Keys:
        edge = grid.anchor[:, None] + torch.arange(1, grid.key_blocks + 1, device=inputs.device) * grid.block_k
        end = edge.clamp(max=inputs.last_key)
        if inputs.key_valid is not None:  # padding and holes at the end of a block do not keep it in the future
            key = torch.arange(1, inputs.keys + 1, device=inputs.device)
            end = (key * inputs.key_valid).cummax(1).values.gather(1, (end - 1).clamp(min=0))
            end = end.masked_fill(~real_key_blocks(inputs, grid), inputs.keys + 1)
        return _Keys(inputs, grid, key_block_means(inputs, grid), end, inputs.visible_range()[0])

    def slabs(self) -> Any:
        """Slabs of rows whose scores fit into a cache."""
        most = _CPU_SCORES if self.inputs.device.type == "cpu" else _GPU_SCORES
        return self.grid.slabs(self.inputs.query_heads * self.grid.block_q, most)

    def energy(self, start: int, stop: int) -> Tensor:
        """[batch, query_heads, stop - start, key_blocks], -inf where no query of the row has the block behind it."""
        inputs, grid = self.inputs, self.grid
        blocks = grid.reach(stop - 1)
        block = grid.first[:, None, None] + torch.arange(start, stop, device=inputs.device)[:, None]
        slot = grid.anchor[:, None, None] + block * grid.block_q + torch.arange(grid.block_q, device=inputs.device)
        asked = (slot >= inputs.query_start) & (slot < inputs.query_start + inputs.queries)
        place = (slot - inputs.query_start).clamp(0, inputs.queries - 1).flatten(1)
        if inputs.key_valid is not None:
            asked &= inputs.key_valid.gather(1, slot.clamp(max=inputs.keys - 1).flatten(1)).view_as(asked)
        query, whole = self._queries(start, stop, place, asked)
        scores = query.unflatten(1, (inputs.kv_heads, inputs.group_size)).flatten(2, 3) @ self.mean[:, :, :blocks].mT
        if inputs.softcap is not None:
            scores.div_(inputs.softcap).tanh_().mul_(inputs.softcap)
        scores = scores.view(inputs.batch, inputs.query_heads, stop - start, grid.block_q, blocks)
        clear = 0  # blocks that every query here has behind it need no mask
        if inputs.key_valid is None and inputs.window is None and inputs.segment is None:
            clear = min(blocks, (inputs.query_start // grid.block_q + start) * grid.block_q // grid.block_k)
        end, low = self.end[:, None, None, clear:blocks], self.low.gather(1, place).view_as(slot)[..., None]
        behind = (end <= slot[..., None] + 1) & (end > low) & asked[..., None]
        scores[..., clear:].masked_fill_(~behind[:, None], -torch.inf)
        if clear and not whole:
            scores[..., :clear].masked_fill_(~asked[:, None, :, :, None], -torch.inf)
        peak = scores.amax(-2, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)  # nothing is behind a row
        energy = scores.sub_(peak).exp_().sum(-2).log_().add_(peak[..., 0, :])
        return torch.nn.functional.pad(energy, (0, grid.key_blocks - blocks), value=-torch.inf)

    def _queries(self, start: int, stop: int, place: Tensor, asked: Tensor) -> tuple[Tensor, bool]:
        """[batch, query_heads, (stop - start) * block_q, head_dim], scaled, zeros where nothing is asked; is all?"""
        inputs, grid = self.inputs, self.grid
        begin = start * grid.block_q
        if (
            inputs.key_valid is None
            and inputs.query_start % grid.block_q == 0
            and stop * grid.block_q <= inputs.queries
        ):
            query = inputs.query[:, :, begin : stop * grid.block_q]
            return query.to(self.mean.dtype) * inputs.scale, True
        query = inputs.query.gather(2, place[:, None, :, None].expand(-1, inputs.query_heads, -1, inputs.head_dim))
        query = query.to(self.mean.dtype) * inputs.scale
        return query.masked_fill(~asked.flatten(1)[:, None, :, None], 0.0), False
