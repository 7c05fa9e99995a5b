"""MInference's own offline search: which of six patterns, of similar cost by hand, keeps most of a head's attention.

Jiang et al., "MInference 1.0", 2024, arXiv:2407.02490, section 3.2, as its published search computes it: masks of
single tokens, one prompt, and the mean kept mass of the query rows after the first 2500. Here for comparison with
profiles that are chosen by kept mass and cost. What follows there, replacing the winners A-shape and block-sparse by
vertical-slash, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sparseprefill.contracts import AttentionInputs, BlockGrid
from sparseprefill.estimators.mean_pooled import MeanPooled
from sparseprefill.estimators.probe import Probe, ProbeMass
from sparseprefill.patterns.a_shape import AShape
from sparseprefill.patterns.block_sparse import BlockSparse
from sparseprefill.patterns.last_rows import Pattern
from sparseprefill.patterns.vertical_slash import VerticalSlash

FIRST_ROW = 2500
"""Query rows before this one do not count."""

CANDIDATES: tuple[Pattern, ...] = (
    AShape(100, 800),
    VerticalSlash(30, 800),
    VerticalSlash(100, 750),
    VerticalSlash(500, 700),
    VerticalSlash(3500, 100),
    BlockSparse(keep=1 / 8, sink=0, local=0),
)
"""The six candidates in the order of the search, as patterns of this package: blocks where the search has tokens."""


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """The numbers of the search; the defaults are the published ones."""

    first_row: int = FIRST_ROW  # query rows before this one do not count
    stream: tuple[int, int] = (100, 800)  # first keys, and the farthest distance kept
    vertical_slash: tuple[tuple[int, int], ...] = ((30, 800), (100, 750), (500, 700), (3500, 100))  # columns, distances
    probe: int = 64  # last queries whose attention ranks columns and distances
    forced: int = 30  # first columns and nearest distances kept in any case, counted among the kept
    block: int = 32  # tokens a block of block-sparse
    block_share: int = 8  # one of so many blocks is kept


SLAB_ENTRIES = 1 << 25
"""Scores of queries and keys that the search holds at one time."""


def search_peak_bytes(tokens: int, query_heads: int, kv_heads: int, head_dim: int) -> int:
    """An upper bound of what `search_scores` holds at one time beside its inputs, in bytes, as it is published."""
    group = query_heads // kv_heads
    slab = max(min(SLAB_ENTRIES, group * tokens * tokens), group * tokens)
    probe = group * tokens * (64 * 24 + 512)  # last rows, several copies; masks, ranks and sums of columns
    return slab * 24 + probe + 4 * tokens * head_dim * (2 * group + 2)


def search_scores(
    inputs: AttentionInputs, settings: SearchSettings | None = None, *, slab_entries: int = SLAB_ENTRIES
) -> Tensor:
    """float64 [query_heads, 6]: the share of dense attention that each candidate keeps, as the search scores it.

    The mean over batch rows and over query rows from `first_row` on of the softmax mass inside a mask of tokens:

    - stream: the first 100 keys, and distances up to 800.
    - vertical-slash: the columns and the distances with the most attention of the last 64 queries, ties to the lower.
    - block-sparse: for each block of 32 queries the eighth part of all blocks, rounded down, whose mean key fits the
      mean query best, of those that it can see. A ragged last block is divided by its own length.

    Attention is float32 (float64 for such inputs) and complete: queries * keys / 2 products a head. One KV head's group
    is looked at at a time, in slabs of at most `slab_entries` scores, of which a few copies are held; a slab is larger
    only where a single query row is, or the probe.

    Attention sinks take no part, as in kept mass.

    Args:
        inputs: a whole prompt in one call.
        settings: None for the published numbers.
        slab_entries: scores that are held at one time.

    Raises:
        ValueError: not more than `first_row` queries, or inputs with a window, padding, packed segments or a cache.
    """
    settings = settings or SearchSettings()
    _check(inputs, settings)
    if slab_entries < 1:
        raise ValueError(f"slab_entries must be at least 1, got {slab_entries}")
    heads = range(inputs.query_heads)
    groups = (heads[first : first + inputs.group_size] for first in heads[:: inputs.group_size])
    return torch.cat([_group_scores(inputs.select_heads(group), settings, slab_entries) for group in groups])


def choose(scores: Tensor) -> Tensor:
    """int64 [heads]: the candidate with the highest of `search_scores`, of equal ones the earlier.

    Raises ValueError for scores that are no numbers, or not [heads, candidates].
    """
    if scores.dim() != 2 or not scores.numel():
        raise ValueError(f"scores must be [heads, candidates] with at least one of each, got {tuple(scores.shape)}")
    if bool(scores.isnan().any()):
        raise ValueError("scores contain NaN: check the model's weights and dtype")
    return scores.argsort(dim=1, descending=True, stable=True)[:, 0]


def _check(inputs: AttentionInputs, settings: SearchSettings) -> None:
    """Raise ValueError for inputs that are no one-shot causal prefill of more than `first_row` tokens."""
    if inputs.queries <= settings.first_row:
        raise ValueError(
            f"the search scores query rows from {settings.first_row} on: it needs more than {settings.first_row} "
            f"tokens, got {inputs.queries}"
        )
    wrong = [
        reason
        for reason, found in (
            ("a cache before the queries", inputs.query_start > 0),
            ("keys after the queries", inputs.keys > inputs.query_start + inputs.queries),
            ("key slots that are not filled", inputs.filled < inputs.keys),
            ("a window", inputs.window is not None and inputs.window < inputs.keys),
            ("padding (key_valid)", inputs.key_valid is not None),
            ("packed prompts (segment)", inputs.segment is not None),
        )
        if found
    ]
    if wrong:
        raise ValueError(f"the search is for one whole prompt that sees all of itself, these have {', '.join(wrong)}")


def _group_scores(group: AttentionInputs, settings: SearchSettings, slab_entries: int) -> Tensor:
    """float64 [query_heads, candidates] of the query heads that share one KV head, over all batch rows.

    A union of columns and distances keeps what the columns keep and what the distances keep, less what both do: the
    first two are sums over all rows that serve every candidate, the last is a few entries a row.
    """
    unions = _unions(Probe(settings.probe).mass(group), settings)
    by_column = torch.zeros(group.batch, group.query_heads, group.keys, dtype=torch.float64, device=group.device)
    by_distance = torch.zeros_like(by_column)
    both = torch.zeros(len(unions), group.query_heads, dtype=torch.float64, device=group.device)
    in_blocks = torch.zeros_like(both[0])
    rows = max(1, slab_entries // (group.batch * group.query_heads * group.keys))
    for start in range(settings.first_row, group.queries, rows):
        stop = min(start + rows, group.queries)
        share = _attention(group, start, stop)
        by_column[..., :stop] += share.sum(2)
        by_distance[..., :stop] += _sum_by_distance(share)
        for place, union in enumerate(unions):
            both[place] += union.overlap(share, start)
        blocks = functional.pad(share, (0, -stop % settings.block)).unflatten(3, (-1, settings.block)).sum(-1)
        kept = _kept_blocks(group, settings, start, stop)[..., : blocks.shape[-1]]
        in_blocks += blocks.masked_fill(~kept, 0.0).sum((0, 2, 3), dtype=torch.float64)
    kept_columns = torch.stack([(by_column * union.column).sum((0, 2)) for union in unions])
    kept_distances = torch.stack([(by_distance * union.distance).sum((0, 2)) for union in unions])
    total = torch.cat([kept_columns + kept_distances - both, in_blocks[None]])
    return total.T / (group.batch * (group.queries - settings.first_row))


def _attention(group: AttentionInputs, start: int, stop: int) -> Tensor:
    """[batch, heads, stop - start, stop]: dense causal attention of a slab of rows over the keys up to its end."""
    accurate = torch.float64 if group.query.dtype == torch.float64 else torch.float32
    logits = group.query[:, :, start:stop].to(accurate) @ group.key[:, :, :stop].to(accurate).transpose(2, 3)
    logits *= group.scale
    if group.softcap is not None:
        logits = group.softcap * torch.tanh(logits / group.softcap)
    future = torch.ones(stop - start, stop, dtype=torch.bool, device=group.device).triu_(start + 1)
    return logits.masked_fill_(future, -torch.inf).softmax(-1)


def _sum_by_distance(share: Tensor) -> Tensor:
    """[batch, heads, keys]: a slab [batch, heads, rows, keys], whose last row sees all keys, by row - key."""
    rows, keys = share.shape[2:]
    # as in the probe: a row longer by `rows` than its reversed keys, cut one short, shifts each row by one
    skewed = functional.pad(share.flip(-1), (0, rows)).flatten(2)[..., : rows * (keys + rows - 1)]
    total: Tensor = skewed.unflatten(2, (rows, keys + rows - 1)).sum(2)
    return total[..., rows - 1 :]


@dataclass(frozen=True, slots=True, eq=False)
class _Union:
    """Columns and distances that a candidate keeps."""

    column: Tensor  # bool [batch, heads, keys]
    distance: Tensor  # bool [batch, heads, keys]
    listed: Tensor  # int64 [batch, heads, count]: the columns, or the distances where these are fewer
    lists_columns: bool

    def overlap(self, share: Tensor, start: int) -> Tensor:
        """float64 [heads]: what a slab of rows from `start` on keeps twice."""
        row = torch.arange(start, start + share.shape[2], device=share.device)[:, None]
        other = (
            row - self.listed[:, :, None]
        )  # [batch, heads, rows, count]: the distances of the columns, or vice versa
        inside = other >= 0
        other = other.clamp(min=0)
        by_place = (self.distance if self.lists_columns else self.column)[:, :, None].expand(-1, -1, len(row), -1)
        inside &= by_place.gather(3, other)
        key = self.listed[:, :, None].expand_as(other).clamp(max=share.shape[3] - 1) if self.lists_columns else other
        return share.gather(3, key).masked_fill(~inside, 0.0).sum((0, 2, 3), dtype=torch.float64)


def _unions(mass: ProbeMass, settings: SearchSettings) -> list[_Union]:
    """What stream keeps, and what each vertical-slash candidate does."""
    place = torch.arange(mass.column.shape[-1], device=mass.column.device)
    early, near = (-place.to(mass.column.dtype).expand_as(mass.column) for _ in range(2))
    sink, reach = settings.stream
    found = [_union(early, sink, near, reach + 1, 0)]
    for verticals, slashes in settings.vertical_slash:
        found.append(_union(mass.column, verticals, mass.diagonal, slashes, settings.forced))
    return found


def _union(column: Tensor, columns: int, distance: Tensor, distances: int, forced: int) -> _Union:
    column_mask, column_list = _top(column, columns, forced)
    distance_mask, distance_list = _top(distance, distances, forced)
    fewer = column_list.shape[-1] <= distance_list.shape[-1]
    return _Union(column_mask, distance_mask, column_list if fewer else distance_list, fewer)


def _top(score: Tensor, count: int, forced: int) -> tuple[Tensor, Tensor]:
    """The `count` highest of the last dimension, the first `forced` places before all others: bool like `score`, and
    as a list.
    """
    place = torch.arange(score.shape[-1], device=score.device)
    order = score.masked_fill(place < forced, torch.inf).argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, True), order


def _kept_blocks(group: AttentionInputs, settings: SearchSettings, start: int, stop: int) -> Tensor:
    """bool [batch, heads, stop - start, blocks]: the key blocks that block-sparse keeps for each of a slab of rows."""
    grid = BlockGrid.of(group, settings.block, settings.block)
    first, last = start // settings.block, -(-stop // settings.block)
    scores = MeanPooled().scores(group, grid, first, last)
    block = torch.arange(grid.key_blocks, device=group.device)
    visible = block <= block[first:last, None]
    kept, _ = _top(scores.masked_fill(~visible, -torch.inf), grid.key_blocks // settings.block_share, 0)
    row = torch.arange(start, stop, device=group.device)
    return (kept & visible)[:, :, row // settings.block - first]
