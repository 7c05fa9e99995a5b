"""Stem: a budget of blocks that falls along the prompt, spent on products along antidiagonals and on long values.

Niu et al., "Stem: Rethinking Causal Information Flow in Sparse Attention", 2026, arXiv:2603.06274. The scores stand in
`sparseprefill.estimators.phase_means`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.estimators.phase_means import PhaseMeans, PreparedPhases
from sparseprefill.estimators.selection import Budget, check_budget, check_share, check_tokens, keep_blocks, ranked
from sparseprefill.patterns.block_sparse import forced_blocks
from sparseprefill.patterns.dense import Dense
from sparseprefill.patterns.expected_density import kept_share
from sparseprefill.patterns.expected_overhead import Overhead, stated_overhead
from sparseprefill.patterns.last_rows import Pattern
from sparseprefill.patterns.own_blocks import with_own_blocks

UNIT = 128
"""Tokens in which the published budget counts, whatever the tiles."""

RATE, BIAS = 0.1, 3840
"""The published budget of a long prompt: a tenth of it, and 30 blocks of 128 tokens."""

DENSE_BELOW, SHORT_BELOW = 56, 160
"""In these units: prompts that keep everything, and those whose budget grows twice as fast."""


@dataclass(frozen=True, slots=True)
class Stem:
    """The blocks of the sink, of the local window, and a budget of those with the highest scores.

    The budget of a call is K tokens. Rows that begin before token K of the prompt have all of it, which is all that
    they see; from there on it falls by a line in the row's place, to `decay` * K in the last row, rounded down to
    blocks and at least one. K is `keep`, or the published rule. That counts the n units of 128 tokens of the prompt:
    all of them below 56 units; 2 * rate * n units and `bias` below 160; rate * n units and `bias` from there on. The
    prompt is all that the call sees, a cached prefix included.

    Scores are those of `PhaseMeans`. Blocks of sink and window, and the row's own, are kept beside the budget's; the
    budget may fall on some of them too. `keep` = 1.0 is dense, and so is `rate` = 1.0. A row that sees a tile whose
    score is not finite keeps all its tiles, and the index counts its queries (`BlockIndex.unjudged`).

    The length of the prompt sets the budget, and the mean length of all values the bonus: it looks ahead, except with
    `keep` in tokens, `decay` = 1.0 and `value_bonus` = 0.

    Stem, arXiv:2603.06274. Raises ValueError or TypeError for options that are none, for `keep` beside a rate or a bias
    of one's own, and for what `PhaseMeans` refuses; `build_index` raises ValueError for tiles that are no multiples of
    `stride`, and where an option that counts layers was not resolved by `for_layer`.
    """

    keep: Budget | None = None  # K: tokens, or a share of all keys of the call; None: by rate and bias
    rate: float = RATE  # K grows by this share of the prompt
    bias: int = BIAS  # tokens of K for any long prompt
    decay: float | tuple[float, ...] = 1.0  # budget of the last row over that of the first ones; or one for each layer
    stride: int = 8  # tokens of a group
    value_bonus: float = 0.2  # weight of the values' length
    sink: int = 512  # first tokens kept always
    local: int = 512  # tokens before the end of a row kept always
    dense_first: int = 0  # first layers that are dense

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_budget("keep", self.keep)
            if (self.rate, self.bias) != (RATE, BIAS):
                raise ValueError("stem takes either keep or rate and bias: with keep, leave the other two out")
        check_share("rate", self.rate)
        check_tokens("bias", self.bias, least=0)
        if isinstance(self.decay, (tuple, list)):
            object.__setattr__(self, "decay", tuple(self.decay))  # a list, from JSON, is not hashable
            if not self.decay:
                raise ValueError("decay has no numbers: give one, or one for each layer")
        for each in self.decay if isinstance(self.decay, tuple) else (self.decay,):
            check_share("decay", each)
        for name in ("sink", "local"):
            check_tokens(name, getattr(self, name), least=0)
        if isinstance(self.dense_first, bool) or not isinstance(self.dense_first, int):
            raise TypeError(f"dense_first must be a number of layers (int), got {self.dense_first!r:.80}")
        if self.dense_first < 0:
            raise ValueError(f"dense_first must be at least 0 layers, got {self.dense_first}")
        _ = self.estimator  # refuses the other options

    @classmethod
    def for_density(cls, density: float, decay: float = 1.0, **options: Any) -> Stem:
        """With the `keep` at which budgets alone come to this share of a prompt's pairs.

        A budget of a share x of the prompt, which falls to decay * x, keeps (1 + decay) * x - decay * x * x of its
        pairs. Sink, window and what rounds up to whole blocks come on top, in short prompts visibly.

        Raises ValueError or TypeError for a density or a decay outside of (0, 1].
        """
        check_share("density", density)
        check_share("decay", decay)
        both = 1 + decay
        share = 2 * density / (both + math.sqrt(max(0.0, both * both - 4 * decay * density)))
        return cls(keep=min(1.0, share), decay=decay, **options)

    @property
    def estimator(self) -> PhaseMeans:
        """What scores the tiles."""
        return PhaseMeans(self.stride, self.value_bonus)

    def for_layer(self, layer: int) -> Pattern:
        """What it is in this layer: dense in the first `dense_first`, and with the layer's own `decay`."""
        if layer < self.dense_first:
            return Dense()
        decay = self.decay
        if isinstance(decay, tuple):
            if layer >= len(decay):
                raise ValueError(f"decay has {len(decay)} numbers, one for each layer, and none for layer {layer}")
            decay = decay[layer]
        return dataclasses.replace(self, decay=decay, dense_first=0)

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        self._check_resolved()
        prepared = self.estimator.prepare(inputs, grid)
        visible = grid.visible_block_mask(inputs)
        return self._index(prepared, visible, lambda start, stop: _ranked(prepared, visible, start, stop))

    @property
    def family(self) -> tuple[Any, ...]:
        """Budgets of any kind share the scores that these options give, and their ranking."""
        return Stem, self.stride, self.value_bonus

    def estimate(self, inputs: AttentionInputs, grid: BlockGrid) -> tuple[Tensor, Tensor, PreparedPhases]:
        """The ranking of blocks, int64 [batch, query_heads, rows, key_blocks], which `choose` cuts at the budget.

        Also the rows that none could choose for, bool [batch, query_heads, rows]. See `sparseprefill.patterns.nested`.
        """
        prepared = self.estimator.prepare(inputs, grid)
        visible = grid.visible_block_mask(inputs)
        order, unknown = zip(*(_ranked(prepared, visible, *slab) for slab in prepared.slabs()), strict=True)
        return torch.cat(order, 2), torch.cat(unknown, 2), prepared

    def choose(
        self, estimate: tuple[Tensor, Tensor, PreparedPhases], inputs: AttentionInputs, grid: BlockGrid
    ) -> BlockIndex:
        """`build_index` from an estimate of its family."""
        self._check_resolved()
        order, unknown, prepared = estimate
        visible = grid.visible_block_mask(inputs)
        return self._index(prepared, visible, lambda start, stop: (order[:, :, start:stop], unknown[:, :, start:stop]))

    def most_density(self, keys: int) -> float:
        """See `sparseprefill.patterns.expected_tiles`; rows round up, and sink and window may lie across blocks."""
        return min(1.0, self.expected_density(keys) + kept_share(192, keys))

    def expected_density(self, keys: int) -> float:
        decay = max(self.decay) if isinstance(self.decay, tuple) else self.decay
        most = min(keys, int(self._budget(torch.tensor([keys]), 64)) * 64)
        forced = -(-self.sink // 64) * 64 + max(64, -(-self.local // 64) * 64)  # beside the budget, in blocks
        least = max(64.0, decay * most)
        slope = (most - least) / (keys - most) if keys > most else 0.0
        whole = most + forced / (1 + slope)  # rows before this token keep all that they see
        if whole >= keys:
            return 1.0
        return min(1.0, (whole * whole + (keys - whole) * (whole + least + forced)) / (keys * keys))

    def estimator_products(self, inputs: AttentionInputs, grid: BlockGrid) -> int:
        """See `sparseprefill.patterns.nested`."""
        return self.estimator.products(inputs, grid)

    def expected_overhead(self, device: torch.device, head_dim: int, block_q: int, block_k: int) -> Overhead:
        """Sums of the groups of all tokens, and every tile scored by `stride` products and ranked."""
        tiles = 1 / (block_q * block_k)
        return stated_overhead(device, head_dim, pairs=self.stride * tiles, keys=24, tiles=tiles, steps=0.64)

    def row_budgets(self, tokens: Tensor, row: Tensor, block_q: int, block_k: int) -> Tensor:
        """int64 [batch, rows]: blocks that each row may choose.

        Args:
            tokens: int64 [batch], what the call sees of each prompt, from its first valid token to its last query.
            row: int64 [batch, rows], numbers of query blocks, counted from the first valid token.
            block_q, block_k: tokens of a query block and of a key block.
        """
        assert not isinstance(self.decay, tuple)
        most = self._budget(tokens, block_k)[:, None]
        begin, start = row * block_q, most * block_k
        last = ((tokens - 1).clamp(min=0) // block_q * block_q)[:, None]
        way = ((begin - start).double() / (last - start).clamp(min=1)).clamp(0, 1)
        # a hair more: 0.7 * 40 must be 28 blocks and not 27
        return (most * (1 - (1 - self.decay) * way) + 1e-9).floor().to(torch.int64).clamp(min=1)

    def _budget(self, tokens: Tensor, block_k: int) -> Tensor:
        """int64 like tokens: K in blocks, rounded up; all blocks at most."""
        blocks = (-(-tokens // block_k)).clamp(min=1)
        if self.keep is not None:
            return keep_blocks(self.keep, blocks, block_k)
        units = -(-tokens // UNIT)
        long = units.double() * self.rate
        wanted = torch.where(units < SHORT_BELOW, 2 * long, long) + self.bias / UNIT
        wanted = torch.where(units < DENSE_BELOW, units, (wanted + 1e-9).floor().to(torch.int64))
        return torch.minimum((-(-wanted * UNIT // block_k)).clamp(min=1), blocks)

    def _check_resolved(self) -> None:
        if isinstance(self.decay, tuple) or self.dense_first:
            raise ValueError(
                "decay for each layer, and dense_first, need to know the layer: take the pattern that for_layer(layer) "
                "gives, as patch_model does"
            )

    def _index(
        self, prepared: PreparedPhases, visible: Tensor, ranking: Callable[[int, int], tuple[Tensor, Tensor]]
    ) -> BlockIndex:
        """Lists of all rows, a slab at a time."""
        inputs, grid = prepared.inputs, prepared.grid
        forced = with_own_blocks(forced_blocks(inputs, grid, self.sink, self.local), inputs, grid)
        row = grid.first[:, None] + torch.arange(grid.rows, device=inputs.device)
        tokens = (inputs.tail().clamp(max=inputs.filled) - grid.anchor).clamp(min=1)
        budget = self.row_budgets(tokens, row, grid.block_q, grid.block_k)
        rank = torch.arange(grid.key_blocks, device=inputs.device)
        unjudged: list[Tensor] = []

        def chosen(start: int, stop: int) -> Tensor:
            order, unknown = ranking(start, stop)
            unjudged.append((unknown * prepared.asked[:, None, start:stop]).sum(-1))
            first = (rank < budget[:, None, start:stop, None]).expand_as(order)
            kept = torch.zeros_like(first, dtype=torch.bool).scatter_(-1, order, first) | unknown[..., None]
            return kept.logical_and_(visible[:, None, start:stop]).logical_or_(forced[:, None, start:stop])

        slabs = list(prepared.slabs())
        if inputs.device.type == "cpu":  # lists as long as they are full
            index = BlockIndex.stack([BlockIndex.from_mask(grid, chosen(*slab)) for slab in slabs])
        else:
            index = BlockIndex.from_slabs(grid, inputs.query_heads, slabs, chosen)
        return dataclasses.replace(index, unjudged=torch.stack(unjudged).sum(0))


def _ranked(prepared: PreparedPhases, visible: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Visible blocks by falling score, and the rows with a query that have one without a finite score."""
    scores, seen = prepared.scores(start, stop), visible[:, start:stop]
    unknown = (~scores.isfinite() & seen[:, None]).any(-1) & (prepared.asked[:, None, start:stop] > 0)
    return ranked(scores, seen, None), unknown
