"""FlexPrefill: per head, either block columns and lines up to a share of attention, or the best tiles of a map.

Lai et al., "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference", 2025,
arXiv:2502.20766. What is looked at stands in `sparseprefill.estimators.flexprefill`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.estimators.flexprefill import BlockMaps, LastBlock, block_maps
from sparseprefill.estimators.mean_pooled import MeanPooled, count_real
from sparseprefill.estimators.probe import Probe
from sparseprefill.estimators.selection import check_share, check_tokens
from sparseprefill.patterns.expected_density import UNKNOWN, kept_share
from sparseprefill.patterns.expected_overhead import Overhead, stated_overhead
from sparseprefill.patterns.vertical_slash import crossed_lists, crossed_tiles, ranks

Maps = Iterable[tuple[int, int, BlockMaps]]


@dataclass(frozen=True, slots=True)
class FlexPrefill:
    """Block columns and block lines that hold a share `gamma` of the last block's attention; or a map's best tiles.

    The last `block` queries are looked at. Where what the block means say of their attention is within `tau`
    (Jensen-Shannon distance) of the truth, the head is query-aware: it keeps the tiles with the most mass in a map of
    block means up to `gamma` of it all, and `min_budget` columns and lines. Any other head keeps columns and lines: as
    many blocks of each as single keys, or single distances, are needed for `gamma`, between `min_budget` and
    `max_budget`. The first column and the diagonal are always among them.

    A batch row with at most 2 blocks or `min_budget` keys, or with one query, is dense, and so is a head whose last
    queries or keys are not finite; the index counts them (`BlockIndex.unjudged`). `gamma` = 1.0 is dense, except for
    heads that `max_budget` holds back; `tau` = 0.0 makes no head query-aware.

    The last queries decide over all rows: it looks ahead. Tiles must be square.

    FlexPrefill, arXiv:2502.20766. Raises ValueError or TypeError for options out of range, and ValueError in
    `build_index` for tiles that are not square.
    """

    gamma: float = 0.9  # share of attention, in (0, 1]
    tau: float = 0.1  # Jensen-Shannon distance in [0, 1]; it is never more than 0.833
    min_budget: int = 512  # tokens, rounded up to blocks, of columns and of lines at least
    max_budget: int | None = None  # tokens, rounded up to blocks, of columns and of lines at most; None: no limit

    def __post_init__(self) -> None:
        check_share("gamma", self.gamma)
        if isinstance(self.tau, bool) or not isinstance(self.tau, (int, float)):
            raise TypeError(f"tau must be a number in [0, 1], got {self.tau!r:.80}")
        if not 0.0 <= self.tau <= 1.0:
            raise ValueError(f"tau must be in [0, 1], got {self.tau!r:.80}")
        check_tokens("min_budget", self.min_budget)
        if self.max_budget is not None:
            check_tokens("max_budget", self.max_budget)
            if self.max_budget < self.min_budget:
                raise ValueError(
                    f"max_budget={self.max_budget} is less than min_budget={self.min_budget}: raise the one or lower "
                    "the other"
                )

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        last = self._look(inputs, grid)
        return self._index(last, block_maps(inputs, grid, self._aware(last)) if self.tau else (), inputs, grid)

    @property
    def family(self) -> tuple[Any, ...]:
        """All options cut the same estimate; where no head can be query-aware there are no maps."""
        return FlexPrefill, self.tau > 0

    def estimate(self, inputs: AttentionInputs, grid: BlockGrid) -> tuple[LastBlock, Maps]:
        """What the last block says, and the maps of all heads; `choose` cuts them."""
        return self._look(inputs, grid), list(block_maps(inputs, grid)) if self.tau else []

    def choose(self, estimate: tuple[LastBlock, Maps], inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        """`build_index` from an estimate of its family."""
        return self._index(*estimate, inputs, grid)

    def estimator_products(self, inputs: AttentionInputs, grid: BlockGrid) -> int:
        """See `sparseprefill.patterns.nested`. As if every head were query-aware: on a GPU every head gets a map."""
        last = Probe(grid.block_k).products(inputs) + grid.key_blocks
        return last + (MeanPooled().products(inputs, grid) if self.tau else inputs.last_key)

    def expected_density(self, keys: int) -> float:
        """Share of a prompt's pairs that the cost model reckons with: one half, as gamma decides, within the budgets.

        In blocks of 64, as for all methods. `max_budget` is a bound only where no head is query-aware.
        """
        least, most = (-(-budget // 64) * 64 for budget in (self.min_budget, self.max_budget or keys))
        bounded = self.max_budget is not None and self.tau == 0
        if keys <= max(2 * 64, least) or (self.gamma == 1.0 and not bounded):
            return 1.0
        expected = 1.0 if self.gamma == 1.0 else max(UNKNOWN, kept_share(2 * least, keys))
        return min(expected, kept_share(2 * most, keys)) if bounded else expected

    def expected_overhead(self, device: torch.device, head_dim: int, block_q: int, block_k: int) -> Overhead:
        """The last block's products, which are sorted token by token; for maps every tile is ranked among all."""
        tiles = 2 / (block_q * block_k) if self.tau else 0.0
        steps = 1.7 if self.tau else 1.1
        return stated_overhead(device, head_dim, keys=1.5 * block_q, tiles=tiles, steps=steps)

    def _look(self, inputs: AttentionInputs, grid: BlockGrid) -> LastBlock:
        if grid.block_q != grid.block_k:
            raise ValueError(
                f"flexprefill needs square tiles, got block_q={grid.block_q} and block_k={grid.block_k}: "
                "choose block_q equal to block_k"
            )
        return LastBlock.of(inputs, grid)

    def _aware(self, last: LastBlock) -> Tensor:
        """bool [batch, query_heads]: heads that choose by their map."""
        return last.divergence < self.tau

    def _blocks(self, together: Tensor, aware: Tensor, grid: BlockGrid) -> Tensor:
        """int64 [batch, query_heads, 1]: how many columns, or lines, a head keeps."""
        least = -(-self.min_budget // grid.block_k)
        most = grid.key_blocks if self.max_budget is None else -(-self.max_budget // grid.block_k)
        if self.gamma == 1.0:  # all, though sums round
            count = torch.full_like(aware, most, dtype=torch.int64)
        else:
            count = covering_blocks(together, self.gamma, grid.block_k).clamp(max=most)
        return torch.where(aware, least, count.clamp(min=least))[..., None]

    def _index(self, last: LastBlock, maps: Maps, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        """Lists of all rows, a slab at a time.

        Beside them and what a slab takes, one byte a tile is held for what maps add: 128 MiB at 128k tokens, 32 heads,
        blocks of 64 x 64.
        """
        aware = self._aware(last)
        first = torch.arange(grid.key_blocks, device=inputs.device) == 0
        in_column = ranks(last.column.masked_fill(first, torch.inf)) < self._blocks(last.column_mass, aware, grid)
        on_line = ranks(last.line.masked_fill(first, torch.inf)) < self._blocks(last.line_mass, aware, grid)

        shape = (inputs.batch, inputs.query_heads, grid.rows)
        added = torch.zeros(*shape, grid.key_blocks if self.tau else 0, dtype=torch.bool, device=inputs.device)
        unknown = torch.zeros(shape, dtype=torch.bool, device=inputs.device)
        for start, stop, tiles in maps:
            chooses = aware[:, start:stop, None]
            added[:, start:stop] = within_share(tiles, self.gamma) & chooses[..., None]
            unknown[:, start:stop] = tiles.unknown & chooses

        begin, end = grid.row_slots()
        real = count_real(inputs, begin, end)[:, None]  # [batch, 1, rows]
        whole = unknown | (self._too_short(inputs, grid)[:, None] | ~last.known)[..., None]
        low, high = grid.visible_blocks(inputs)
        end_block = high - 1  # where a row ends, which is its own
        block = torch.arange(grid.key_blocks, device=inputs.device)

        def chosen(start: int, stop: int) -> Tensor:
            mask = crossed_tiles(in_column, on_line, grid, start, stop)
            visible = (block >= low[:, start:stop, None]) & (block < high[:, start:stop, None])
            if self.tau:
                mask |= added[:, :, start:stop]
            mask |= (block == end_block[:, start:stop, None])[:, None] | whole[:, :, start:stop, None]
            return mask.logical_and_(visible[:, None])

        slabs = list(grid.slabs(inputs.query_heads))
        few = None
        if not self.tau and inputs.device.type == "cpu" and not bool(whole.any()):
            few = crossed_lists(in_column, on_line, end_block, inputs, grid)
        if few is not None:
            index = few
        elif inputs.device.type == "cpu":
            index = BlockIndex.stack([BlockIndex.from_mask(grid, chosen(*slab)) for slab in slabs])
        else:
            index = BlockIndex.from_slabs(grid, inputs.query_heads, slabs, chosen)
        return BlockIndex(grid, index.columns, index.start, index.count, (real * whole).sum(-1))

    def _too_short(self, inputs: AttentionInputs, grid: BlockGrid) -> Tensor:
        """bool [batch]: up to its last real query a batch row has too few keys, or there is one query."""
        size, tail = grid.block_k, inputs.tail()
        few = max(2 * size, -(-self.min_budget // size) * size)
        asked = tail - grid.anchor.clamp(min=inputs.query_start)
        return (tail - grid.anchor <= few) | (asked <= 1)


def covering_blocks(together: Tensor, gamma: float, block: int) -> Tensor:
    """int64 [..]: blocks to keep, from the sums of the 1, 2, ... largest shares of single tokens, [.., tokens].

    Tokens count up to the one that takes the sum above gamma, and it too; their blocks are the whole ones, and one.
    """
    tokens = 1 + (together <= gamma).sum(-1)
    return tokens // block + 1


def within_share(maps: BlockMaps, gamma: float) -> Tensor:
    """bool [batch, heads, rows, key_blocks]: the best tiles, while together they have at most gamma of all mass."""
    if gamma == 1.0:  # all, though sums round
        return torch.ones_like(maps.reach, dtype=torch.bool)
    return maps.reach <= gamma * maps.judged.double()[..., None, None]
