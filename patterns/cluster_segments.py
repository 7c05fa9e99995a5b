"""Clusters as an ordinary prefill method: of the segments behind a row, the tiles whose clusters promise the most.

The segments and their clustering are those of RetroInfer (arXiv:2505.02922), the score is that of Squeezed Attention
(arXiv:2411.09688); neither paper uses them in the prefill itself.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.estimators.mean_pooled import scaled
from sparseprefill.estimators.segment_clusters import SegmentClusters
from sparseprefill.estimators.selection import Budget, TopK, check_tokens
from sparseprefill.patterns.expected_density import kept_share
from sparseprefill.patterns.expected_overhead import Overhead, stated_overhead
from sparseprefill.patterns.parts import Part
from sparseprefill.patterns.segments import (
    behind_alone,
    check_segment,
    in_order,
    order_inside,
    own_segments,
    segments_behind,
)

_SCORES = 1 << 24  # of queries and clusters that are held at one time


@dataclass(frozen=True, slots=True)
class ClusterSegments:
    """A row's own segment whole, and of those behind it the tiles whose keys get the most of its estimated attention.

    Keys of a finished segment are clustered by direction, for each KV head, and laid out cluster after cluster. What a
    key gets of a query's attention is estimated with its cluster's mean in the place of the keys, as one softmax over
    all segments behind the row; a tile's score is the sum over its keys, averaged over the queries of the row. `keep`
    is a share, or a number, of the keys behind the row.

    It does not look ahead: a segment is clustered by its own keys alone. `keep` = 1.0 is dense attention up to the
    order of keys, and a prompt of at most one segment is dense, which is counted in `BlockIndex.unjudged`. Products:
    each query with 1 / `tokens` as many means as there are keys behind it, and `iterations` + 1 times each key with the
    means of its segment, in every call. Raises ValueError or TypeError for numbers that are none, and in `build_parts`
    ValueError for segments that are no multiple of the key blocks.
    """

    keep: Budget = 0.2  # of the keys behind a row: tokens, or a share
    segment: int = 2048  # tokens
    tokens: int = 16  # keys a cluster, on average
    iterations: int = 9  # of K-means

    in_parts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        TopK(self.keep)
        check_tokens("segment", self.segment)
        check_tokens("tokens", self.tokens)
        check_tokens("iterations", self.iterations, least=0)
        if self.tokens > self.segment:
            raise ValueError(f"clusters of {self.tokens} keys do not fit segments of {self.segment} tokens")

    def build_parts(self, inputs: AttentionInputs, grid: BlockGrid) -> tuple[Part, ...]:
        """A row's own segment with keys as they lie, and what was chosen of the clustered ones behind it."""
        check_segment(self.segment, grid)
        since, until = segments_behind(inputs, grid, self.segment)
        if inputs.last_key <= self.segment:
            asked = grid.real_queries(inputs).sum(-1, keepdim=True).expand(-1, inputs.query_heads)
            return (Part(inputs, dataclasses.replace(BlockIndex.dense(inputs, grid), unjudged=asked)),)
        clusters = SegmentClusters.of(inputs, self.segment, self.segment // self.tokens, self.iterations)
        order = order_inside(inputs, self.segment, _rank(inputs, clusters))
        moved = in_order(inputs, order)
        behind = grid.between(since, until)
        visible = behind.visible_block_mask(moved)
        parts = []
        for start, stop in _slabs(inputs, grid, clusters):
            scores = self._scores(inputs, grid, clusters, order, since, until, start, stop)
            parts.append(BlockIndex.from_slots(
                behind, *TopK(self.keep).select(scores, visible[:, start:stop], None, grid.block_k)
            ))  # fmt: skip
        chosen = behind_alone(BlockIndex.stack(parts), grid, since, until, None, inputs.group_size)
        return Part(inputs, own_segments(inputs, grid, since, until)), Part(moved, chosen)

    def _scores(
        self, inputs: AttentionInputs, grid: BlockGrid, clusters: SegmentClusters, order: Tensor, since: Tensor,
        until: Tensor, start: int, stop: int,
    ) -> Tensor:  # fmt: skip
        """[batch, query_heads, stop - start, key_blocks]: estimated attention of each tile, averaged over queries."""
        _, kv_heads, segments, number, _ = clusters.centroid.shape
        segments = max(1, min(segments, (inputs.query_start + stop * grid.block_q) // self.segment))  # behind any row
        rows, blocks = stop - start, self.segment // grid.block_k
        begin, end = (slots[:, start:stop] - inputs.query_start for slots in grid.row_slots())
        place = begin[:, :, None] + torch.arange(grid.block_q, device=inputs.device)
        real = place < end[:, :, None]  # [batch, rows, block_q]
        place = place.clamp(0, inputs.queries - 1).flatten(1)
        if inputs.key_valid is not None:
            real = real & inputs.key_valid[:, inputs.query_start :].gather(1, place).view_as(real)
        index = place[:, None, :, None].expand(-1, inputs.query_heads, -1, inputs.head_dim)
        query = inputs.query.gather(2, index).to(clusters.centroid.dtype).unflatten(1, (kv_heads, -1))
        flat = clusters.centroid[:, :, :segments].flatten(2, 3)  # [batch, kv_heads, segments * number, head_dim]
        size = clusters.size[:, :, :segments].flatten(2)
        logits = scaled(torch.einsum("bkgqd,bknd->bkgqn", query, flat), inputs).unflatten(3, (rows, grid.block_q))
        segment = torch.arange(segments, device=inputs.device).repeat_interleave(number) * blocks
        legal = (segment >= since[:, start:stop, None]) & (segment < until[:, start:stop, None])
        mask = legal[:, None] & (size > 0)[:, :, None]  # [batch, kv_heads, rows, clusters]
        logits = logits.masked_fill(~mask[:, :, None, :, None], -torch.inf)
        total = (logits + size.clamp(min=1).log()[:, :, None, None, None]).logsumexp(-1, keepdim=True)
        share = (logits - total).exp().nan_to_num_(0.0) * real[:, None, None, :, :, None]
        # [batch, kv_heads, group, rows, clusters]
        mean = share.sum(4) / real.sum(-1).clamp(min=1)[:, None, None, :, None]
        owner = _owner(inputs, clusters, order, grid).clamp(max=segments * number)
        padded = torch.nn.functional.pad(mean, (0, 1))  # keys of no cluster get nothing
        each = padded.gather(4, owner[:, :, None, None].expand(*mean.shape[:4], -1))
        scores: Tensor = each.unflatten(4, (grid.key_blocks, grid.block_k)).sum(5).flatten(1, 2)
        return scores

    def estimator_products(self, inputs: AttentionInputs, grid: BlockGrid) -> float:
        """See `sparseprefill.patterns.nested`."""
        own = inputs.last_key * (self.iterations + 1) * (self.segment // self.tokens) / inputs.group_size
        return own + inputs.queries * (inputs.query_start + inputs.queries / 2) / self.tokens

    def tile_law(self) -> str:
        """See `sparseprefill.patterns.expected_tiles`."""
        return "count"

    def expected_density(self, keys: int) -> float:
        return min(1.0, kept_share(self.keep, keys) + kept_share(self.segment, keys))

    def expected_overhead(self, device: torch.device, head_dim: int, block_q: int, block_k: int) -> Overhead:
        """Clustering every key, and every query compared with the means, which is a softmax of its own; as measured."""
        per_key = 1.6 * (self.iterations + 1) * (self.segment // self.tokens) + 32
        own = stated_overhead(device, head_dim, keys=per_key, tiles=1 / (block_q * block_k), steps=0.5)
        return own + Overhead(share=5 / self.tokens)


def _rank(inputs: AttentionInputs, clusters: SegmentClusters) -> Tensor:
    """[batch, kv_heads, keys]: the lower the cluster's number, the earlier its keys; -inf for what stays in place."""
    _, kv_heads, segments, tokens = clusters.label.shape
    number = clusters.size.shape[3]
    past = torch.arange(inputs.keys, device=inputs.device) - inputs.anchor()[:, None]
    place = past.clamp(0, segments * tokens - 1)[:, None].expand(-1, kv_heads, -1)
    label = clusters.label.flatten(2).gather(2, place)
    outside = ((past < 0) | (past >= segments * tokens))[:, None] | (label == number)
    return (-label).to(torch.float32).masked_fill(outside, -torch.inf)


def _owner(inputs: AttentionInputs, clusters: SegmentClusters, order: Tensor, grid: BlockGrid) -> Tensor:
    """int64 [batch, kv_heads, key_blocks * block_k]: the cluster of the key in each slot of the grid, once sorted."""
    _, kv_heads, segments, tokens = clusters.label.shape
    number = clusters.size.shape[3]
    none = segments * number
    anchor = inputs.anchor()
    slot = anchor[:, None] + torch.arange(grid.key_blocks * grid.block_k, device=inputs.device)
    source = order.gather(2, slot.clamp(max=inputs.keys - 1)[:, None].expand(-1, kv_heads, -1)) - anchor[:, None, None]
    label = clusters.label.flatten(2).gather(2, source.clamp(0, segments * tokens - 1))
    owner = source.clamp(0, segments * tokens - 1) // tokens * number + label
    outside = (slot >= inputs.keys)[:, None] | (source < 0) | (source >= segments * tokens)
    return owner.masked_fill((label == number) | outside, none)


def _slabs(inputs: AttentionInputs, grid: BlockGrid, clusters: SegmentClusters) -> list[tuple[int, int]]:
    """Rows [start, stop), so many together that scores of queries and clusters stay bounded."""
    wide = clusters.size.shape[2] * clusters.size.shape[3]
    entries = inputs.batch * inputs.query_heads * max(grid.block_q * wide, grid.key_blocks * grid.block_k)
    together = max(1, _SCORES // entries)
    return [(start, min(grid.rows, start + together)) for start in range(0, grid.rows, together)]
