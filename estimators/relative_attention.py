"""Score a tile by its largest estimated weight, relative to the mass of the first block and of the local window.

Ji et al., "SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM Prefilling", 2025,
arXiv:2505.24179. The weight of key j for query i is exp(z - lse): z estimates their logit, lse is the exact logsumexp
over the visible keys of the sink block and of the local window. As that mass is only a part of all, the weight is an
upper bound of the attention weight, up to the error of z.

Every pair is looked at, and only what varies in a product is rounded. With k the mean key and q the mean query,

    Q.K = (Q - q).(K - k) + q.(K - k) + Q.k

where the first term is estimated, the second is a number for each key and the third one for each query, both exact.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.estimators.selection import check_tokens
from sparseprefill.kernels import block_sparse_attention
from sparseprefill.kernels.low_bit import (
    EstimatedLogits,
    LowBit,
    accurate,
    check_bits,
    token_means,
)
from sparseprefill.kernels.products import ProductShape, check_product, choose_product, low_bit_codes, tile_scores

GROUPS = ("token", "tile")
"""What shares a scale: nothing, or the 16 queries and the keys of a block that make a tile of tensor cores."""

_SLAB_NUMBERS = 1 << 23  # of queries or keys that are copied or widened at a time
_SLAB_ENTRIES = 1 << 22  # scores that are held at a time
_QUERIES_TOGETHER = 16  # share a scale in a "tile"
_MOST_TOGETHER = 4096  # tokens of a block; a short prompt is filled up to one


def scored_blocks(blocks: Tensor, segment: int, window: int) -> Tensor:
    """How many blocks between the sink block and the local window are scored.

    Blocks are tested in whole segments from block 1 on; what is left before the row's end is the local window, of at
    least `window` blocks where there are so many. 1 + tested + local = blocks (arXiv:2505.24179).

    Args:
        blocks: int64, any shape: blocks up to a row's end, at least 1.
        segment: blocks of a segment, at least 1.
        window: blocks that the local window has at least, 0 or more.
    """
    others = blocks - 1
    segments = -(-others // segment)
    over = segments * segment - others  # blocks of the last segment beyond the row's end
    given_up = -(-(window + over) // segment)  # segments that become window
    return (segments - given_up).clamp(min=0) * segment


@dataclass(frozen=True, slots=True)
class RelativeAttention:
    """Natural logarithm of the largest estimated weight in each tile, relative to the mass of sink and window.

    Blocks are scored, and the window is laid, in steps of `query_block` x `key_block`, counted from each batch row's
    first valid key; a tile of the grid that is larger takes the largest score of what it holds. SALE,
    arXiv:2505.24179, whose values the defaults are. Raises ValueError or TypeError for what cannot be.
    """

    bits: int = 4  # of a code: 2, 4 or 8; 16 rounds nothing
    group: str = "token"  # what shares a scale: see GROUPS
    window: int = 128  # tokens before a row's end that are exact, at least
    segment: int = 128  # tokens in whose multiples blocks are tested
    query_block: int = 64  # queries that share a window
    key_block: int = 32  # keys: of the sink, of a step of the window, and of a group of scales
    product: str = "auto"  # which implementation multiplies: see `sparseprefill.kernels.products`

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.group not in GROUPS:
            raise ValueError(f"group must be one of {', '.join(GROUPS)}, got {self.group!r:.80}")
        for name in ("window", "segment", "query_block", "key_block"):
            check_tokens(name, getattr(self, name))
        for name in ("query_block", "key_block"):
            if getattr(self, name) > _MOST_TOGETHER:
                raise ValueError(f"{name} must be at most {_MOST_TOGETHER} tokens, got {getattr(self, name)}")
        for name in ("window", "segment"):
            if getattr(self, name) % self.key_block:
                raise ValueError(
                    f"{name} must be a multiple of key_block={self.key_block} tokens, got {getattr(self, name)}"
                )
        check_product(self.product)
        # a row that ends inside a key block has the rest of that block in its window, and no query there
        least = self.query_block + self.key_block - math.gcd(self.query_block, self.key_block)
        if self.window < least:
            raise ValueError(
                f"window must be at least {least} tokens with query_block={self.query_block} and "
                f"key_block={self.key_block}, so that each query sees itself, got {self.window}"
            )

    def prepare(self, inputs: AttentionInputs, grid: BlockGrid) -> PreparedKeys:
        """What is computed once for all rows: keys as codes, and the exact mass of sink and window of each query."""
        keys, heads = inputs.last_key, (inputs.kv_heads, inputs.group_size)
        real = None if inputs.key_valid is None else inputs.key_valid[:, :keys]
        asked = None
        if inputs.key_valid is not None:
            asked = inputs.key_valid[:, inputs.query_start : inputs.query_start + inputs.queries]
        key = inputs.key[:, :, :keys]
        key_mean, query_mean = token_means(key, real), token_means(inputs.query, asked)
        by_group = query_mean.unflatten(1, heads)
        bias = products(by_group, key) - torch.einsum("bkgd,bkd->bkg", by_group, key_mean)[..., None]
        bias = bias.flatten(1, 2).nan_to_num_(0, 0, 0)
        if real is not None:
            bias = bias.masked_fill_(~real[:, None], -torch.inf)
        # head by head: queries whose tokens lie outside of heads would be copied to lay groups in a row
        shift = products(key_mean.repeat_interleave(inputs.group_size, 1)[:, :, None], inputs.query)[:, :, 0]
        reference = self._exact_mass(inputs, grid)
        known = query_mean.isfinite().all(-1) & key_mean.isfinite().all(-1).repeat_interleave(inputs.group_size, 1)
        known = known[..., None] & reference.isfinite() & shift.isfinite()
        low, high = self._tested_keys(inputs, grid)
        return PreparedKeys(
            self, inputs, grid, self.codes(key, key_mean, grid, self.key_block, grid.anchor, real), query_mean, bias,
            shift.nan_to_num_(0, 0, 0), reference.nan_to_num_(0, 0, 0), low, high, known,
        )  # fmt: skip

    def codes(
        self, vectors: Tensor, mean: Tensor, grid: BlockGrid, together: int, anchor: Tensor, real: Tensor | None
    ) -> LowBit:
        """Vectors as codes, `together` from `anchor` on with one scale if `group` is "tile"."""
        shape = ProductShape(
            vectors.device, accurate(vectors), self.bits, vectors.shape[-1], grid.block_q, grid.block_k
        )  # fmt: skip
        return low_bit_codes(
            vectors, mean, self.bits, choose_product(shape, self.product),
            group_size=together if self.group == "tile" else 1, anchor=anchor, real=real,
        )  # fmt: skip

    def forced(self, inputs: AttentionInputs, grid: BlockGrid) -> Tensor:
        """bool [batch, rows, key_blocks]: tiles with a key of the sink block or of a query's window, if it is seen."""
        begin, end = grid.row_slots()
        first = (begin - inputs.query_start).clamp(max=inputs.queries - 1)
        start = self._window_start(inputs, grid).gather(1, first)  # windows of later queries begin later
        block = torch.arange(grid.key_blocks, device=inputs.device)
        low, high = grid.visible_blocks(inputs)
        sink = block < -(-self.key_block // grid.block_k)
        near = block >= ((start - grid.anchor[:, None]) // grid.block_k)[..., None]
        near = near | (end <= begin)[..., None]
        own = (sink | near) & (block >= low[..., None]) & (block < high[..., None])
        # behind a window of the model there may be neither; a row is never empty
        return own | ((block == high[..., None] - 1) & ~own.any(-1, keepdim=True))

    def products_of_pairs(self, inputs: AttentionInputs, grid: BlockGrid) -> int:
        """What estimating costs a head, in products of a query and a key: every pair, at the weight of its bits."""
        return int(inputs.queries * (inputs.last_key - inputs.queries / 2) * WORK_OF_BITS[self.bits])

    def _window_start(self, inputs: AttentionInputs, grid: BlockGrid) -> Tensor:
        """int64 [batch, queries]: the slot from which on a query's keys are exact."""
        slot = torch.arange(inputs.query_start, inputs.query_start + inputs.queries, device=inputs.device)
        row = (slot - grid.anchor[:, None]).clamp(min=0) // self.query_block
        blocks = -(-(row + 1) * self.query_block // self.key_block)
        tested = scored_blocks(blocks, self.segment // self.key_block, self.window // self.key_block)
        return grid.anchor[:, None] + self.key_block + tested * self.key_block

    def _tested_keys(self, inputs: AttentionInputs, grid: BlockGrid) -> tuple[Tensor, Tensor]:
        """int64 [batch, queries] twice: a query's visible keys in [low, high) lie between its sink and its window."""
        low, high = inputs.visible_range()
        low = torch.maximum(low, grid.anchor[:, None] + self.key_block)
        return low, torch.maximum(torch.minimum(high, self._window_start(inputs, grid)), low)

    def _exact_mass(self, inputs: AttentionInputs, grid: BlockGrid) -> Tensor:
        """[batch, query_heads, queries]: logsumexp over sink and window, by the attention kernels."""
        impl = "reference" if inputs.query.dtype == torch.float64 else "auto"
        parts = []
        for start, stop in self._query_slabs(inputs):
            some = dataclasses.replace(
                inputs, query=inputs.query[:, :, start:stop], query_start=inputs.query_start + start
            )
            own = BlockGrid.of(some, self.query_block, self.key_block)
            index = BlockIndex.from_mask(own, self.forced(some, own)[:, None])
            shape = (inputs.batch, inputs.query_heads, own.rows)
            index = BlockIndex(own, index.columns, index.start.expand(shape), index.count.expand(shape))
            parts.append(block_sparse_attention(some, index, impl, values=False).lse)
        return torch.cat(parts, 2).to(accurate(inputs.query))

    def _query_slabs(self, inputs: AttentionInputs) -> list[tuple[int, int]]:
        """Queries [start, stop): all at once on a GPU; whole blocks on the CPU, whose kernel may copy them."""
        if inputs.device.type != "cpu":
            return [(0, inputs.queries)]
        a_block = inputs.batch * inputs.query_heads * self.query_block * inputs.head_dim
        together = max(1, _SLAB_NUMBERS // a_block) * self.query_block
        edge = together - inputs.query_start % self.query_block  # of the first slab, so that the others are whole
        edges = [0, *range(edge, inputs.queries, together), inputs.queries]
        return list(itertools.pairwise(edges))


WORK_OF_BITS = {2: 0.5, 4: 0.5, 8: 0.5, 16: 1.0}
"""Work of a multiplication next to one of 16 bits.

Codes of up to 8 bits are multiplied as int8, twice as fast where the hardware has such products; native 4-bit products,
which the paper reckons with, would be 0.25.
"""


@dataclass(frozen=True, slots=True, eq=False)
class PreparedKeys:
    """Made by `RelativeAttention.prepare`; scores slabs of rows."""

    estimator: RelativeAttention
    inputs: AttentionInputs
    grid: BlockGrid
    key: LowBit  # [batch, kv_heads, keys that may be seen, ...]
    query_mean: Tensor  # [batch, query_heads, head_dim]
    bias: Tensor  # [batch, query_heads, keys], -inf for padding
    shift: Tensor  # [batch, query_heads, queries], query . mean key
    reference: Tensor  # [batch, query_heads, queries], lse of sink and window
    low: Tensor  # int64 [batch, queries]: keys [low, high) are tested
    high: Tensor
    known: Tensor  # bool [batch, query_heads, queries]: all that the scores of this query rest on is finite

    def slabs(self) -> Iterator[tuple[int, int]]:
        """Rows [start, stop) that are scored together, so that queries and scores of a slab stay small."""
        inputs, grid = self.inputs, self.grid
        queries = _SLAB_NUMBERS // (grid.block_q * inputs.head_dim)  # rows of one head
        return grid.slabs(inputs.query_heads, min(_SLAB_ENTRIES, queries * grid.key_blocks))

    def scores(self, start: int, stop: int) -> Tensor:
        """[batch, query_heads, stop - start, key_blocks]: of a slab of rows.

        -inf where nothing is tested; +inf in all tiles of a row with a query that cannot be judged: its keys or queries
        are not finite, or nothing of its sink and window has mass. float32 (float64 for such inputs).
        """
        logits, unknown = self.estimated(start, stop)
        scores = tile_scores(logits, self.estimator.product)
        return scores.masked_fill_(unknown[..., None], torch.inf)

    def estimated(self, start: int, stop: int) -> tuple[EstimatedLogits, Tensor]:
        """What the scores of a slab of rows are made of, and the rows that have none, bool [batch, heads, rows]."""
        inputs, grid = self.inputs, self.grid
        begin, end = (slots[:, start:stop, None] for slots in grid.row_slots())
        edge = (
            grid.anchor[:, None]
            + (grid.first[:, None] + torch.arange(start, stop, device=inputs.device)) * grid.block_q
        )
        slot = edge[..., None] + torch.arange(grid.block_q, device=inputs.device)
        asked = ((slot >= begin) & (slot < end)).flatten(1)  # [batch, rows * block_q]
        if inputs.key_valid is not None:
            asked &= inputs.key_valid.gather(1, slot.flatten(1).clamp(0, inputs.keys - 1))
        place = (slot - inputs.query_start).clamp(0, inputs.queries - 1).flatten(1)
        by_head = place[:, None].expand(-1, inputs.query_heads, -1)
        query = inputs.query.gather(2, by_head[..., None].expand(-1, -1, -1, inputs.head_dim))
        before = -(grid.first + start) * grid.block_q  # where the grid begins, counted from the slab's first query
        logits = EstimatedLogits(
            query=self.estimator.codes(query, self.query_mean, grid, _QUERIES_TOGETHER, before, asked),
            key=self.key, bias=self.bias, shift=self.shift.gather(2, by_head),
            reference=self.reference.gather(2, by_head),
            low=torch.where(asked, self.low.gather(1, place), 0).to(torch.int32),
            high=torch.where(asked, self.high.gather(1, place), 0).to(torch.int32),
            anchor=grid.anchor, block_q=grid.block_q, block_k=grid.block_k, key_blocks=grid.key_blocks,
            scale=inputs.scale, softcap=inputs.softcap,
        )  # fmt: skip
        unknown = (~self.known.gather(2, by_head) & asked[:, None]).unflatten(2, (-1, grid.block_q)).any(-1)
        return logits, unknown

    def unjudged(self) -> Tensor:
        """int64 [batch, query_heads]: queries that cannot be judged, so that their whole row of tiles is kept."""
        unknown = ~self.known
        if self.inputs.key_valid is not None:
            start = self.inputs.query_start
            unknown &= self.inputs.key_valid[:, None, start : start + self.inputs.queries]
        return unknown.sum(-1)


def products(few: Tensor, many: Tensor) -> Tensor:
    """[batch, heads, rows, tokens]: products of few [.., rows, dim], in float32, and many [.., tokens, dim].

    `many` is widened a slab at a time.
    """
    tokens, dim = many.shape[2:]
    together = max(1, _SLAB_NUMBERS // (many.shape[0] * many.shape[1] * dim))
    found = few.new_empty(*few.shape[:3], tokens)
    for start in range(0, tokens, together):
        found[..., start : start + together] = few @ many[:, :, start : start + together].to(few.dtype).mT
    return found
