"""How much attention a few rows give to each key: votes for columns.

One estimator of three papers: the last rows of a prompt vote (SnapKV, Li et al., 2024, arXiv:2404.14469), the mean row
of each stretch of queries (TokenSelect, Wu et al., 2024, arXiv:2411.02886), or recent rows and random ones (ZipVL, He
et al., 2024, arXiv:2410.08584).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sparseprefill.contracts import AttentionInputs
from sparseprefill.estimators.mean_pooled import count_real, range_means, scaled
from sparseprefill.kernels.low_bit import accurate

HEADS = ("head", "group", "all")
"""Whose votes are added: each query head's own, those of the heads that share a KV head, those of all heads."""

_LOGITS = 1 << 22  # of voting rows and keys that are held at one time


@dataclass(frozen=True, slots=True, eq=False)
class Voters:
    """Rows that vote, in `sets` that vote apart: `sets` is 1, or one for each stretch of queries."""

    query: Tensor  # float32 or float64 [batch, query_heads, sets, rows, head_dim]
    low: Tensor  # int64 [batch, sets, rows]: a row votes on keys [low, high) that are valid;
    high: Tensor  # on none where high <= low

    def part(self, start: int, stop: int) -> Voters:
        """Some sets."""
        return Voters(self.query[:, :, start:stop], self.low[:, start:stop], self.high[:, start:stop])


def rows_that_vote(inputs: AttentionInputs, recent: int, spread: int, seed: int) -> Voters:
    """One set: the last `recent` valid queries, and one from each of `spread` equal stretches before, drawn.

    They vote on all keys that they see. A query in a slot that is not valid does not vote.
    """
    tail = inputs.tail()[:, None]
    start = inputs.anchor()[:, None].clamp(min=inputs.query_start)
    last = (tail - recent).clamp(min=inputs.query_start) + torch.arange(recent, device=inputs.device)
    slot = torch.where(last < tail, last, -1)
    if spread:
        before = (tail - recent - start).clamp(min=0)
        draw = torch.rand(spread, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        stretch = torch.arange(spread, dtype=torch.float64) + draw
        place = (before.double() * (stretch / spread).to(inputs.device, non_blocking=True)).floor().to(torch.int64)
        slot = torch.cat([torch.where(place < before, start + place, -1), slot], 1)
    asked = slot >= start
    place = (slot - inputs.query_start).clamp(min=0)
    if inputs.key_valid is not None:
        asked = asked & inputs.key_valid.gather(1, slot.clamp(min=0))
    query = inputs.query.gather(2, place[:, None, :, None].expand(-1, inputs.query_heads, -1, inputs.head_dim))
    low, high = (bound.gather(1, place) for bound in inputs.visible_range())
    return Voters(query.to(accurate(inputs.query))[:, :, None], low[:, None], torch.where(asked, high, 0)[:, None])


def mean_rows_that_vote(inputs: AttentionInputs, stretch: int, sink: int) -> tuple[Voters, Tensor]:
    """A set for each stretch of `stretch` tokens, counted from the first valid key: the mean of its valid queries.

    It votes on the keys that lie before the stretch, behind the first `sink` ones, and that all of its queries see. The
    second is int64 [batch, sets]: the number of each stretch; the first is the one in which a call begins.
    """
    anchor = inputs.anchor()[:, None]
    end = inputs.query_start + inputs.queries
    number = (inputs.query_start - anchor).clamp(min=0) // stretch
    number = number + torch.arange(-(-inputs.queries // stretch) + 1, device=inputs.device)
    start = anchor + number * stretch
    begin = (start.clamp(inputs.query_start, end) - inputs.query_start).clamp(max=inputs.queries)
    stop = torch.maximum((start + stretch).clamp(inputs.query_start, end) - inputs.query_start, begin)
    real = None if inputs.key_valid is None else inputs.key_valid[:, inputs.query_start :]
    query = range_means(inputs.query, begin, stop, real, stretch)
    count = stop - begin if real is None else count_real(inputs, begin + inputs.query_start, stop + inputs.query_start)
    seen, _ = inputs.visible_range()
    last = (stop - 1).clamp(0, inputs.queries - 1)
    low = torch.maximum(seen.gather(1, last), anchor + sink)  # what the last query sees, all before it see too
    high = torch.where(count > 0, start.clamp(max=inputs.filled), 0)
    return Voters(query[:, :, :, None], low[..., None], high[..., None]), number


def column_votes(inputs: AttentionInputs, voters: Voters, heads: str) -> tuple[Tensor, Tensor]:
    """Votes [batch, heads, sets, keys], sums of each row's softmax over the keys that it votes on; and the voters.

    Heads are query heads, KV heads or one, by `heads` (one of `HEADS`). The second is int64 [batch, sets, keys]: how
    many rows vote on a key. Keys are taken a slab at a time, twice: for the sums that the softmax divides by, and for
    the shares.
    """
    batch, query_heads, sets, rows, _ = voters.query.shape
    kv_heads, keys = inputs.kv_heads, inputs.last_key
    query = voters.query.unflatten(1, (kv_heads, -1)).flatten(3, 4)  # [batch, kv_heads, group, sets * rows, head_dim]
    low, high = voters.low.flatten(1)[..., None], voters.high.flatten(1)[..., None]
    together = max(1, _LOGITS // (batch * query_heads * sets * rows))
    slabs = [(start, min(keys, start + together)) for start in range(0, keys, together)]

    def logits(start: int, stop: int) -> tuple[Tensor, Tensor]:
        """[batch, kv_heads, group, sets * rows, stop - start], -inf where a row does not vote; and where it does."""
        key = torch.arange(start, stop, device=inputs.device)
        votes = (key >= low) & (key < high)
        if inputs.key_valid is not None:
            votes = votes & inputs.key_valid[:, None, start:stop]
        found = torch.einsum("bkgid,bkjd->bkgij", query, inputs.key[:, :, start:stop].to(query.dtype))
        return scaled(found, inputs).masked_fill(~votes[:, None, None], -torch.inf), votes

    lse = torch.full(query.shape[:-1], -torch.inf, dtype=query.dtype, device=inputs.device)
    for slab in slabs:
        lse = torch.logaddexp(lse, logits(*slab)[0].logsumexp(-1))
    lse = lse.masked_fill(lse == -torch.inf, 0.0)[..., None]  # a row that votes on nothing: exp(-inf) stays 0
    summed = {"head": query_heads, "group": kv_heads, "all": 1}[heads]
    votes = torch.zeros(batch, summed, sets, inputs.keys, dtype=query.dtype, device=inputs.device)
    voted = torch.zeros(batch, sets, inputs.keys, dtype=torch.int64, device=inputs.device)
    for start, stop in slabs:
        found, real = logits(start, stop)
        share = found.sub_(lse).exp_().unflatten(3, (sets, rows)).sum(4)  # [batch, kv_heads, group, sets, keys]
        if heads == "head":
            share = share.flatten(1, 2)
        elif heads == "group":
            share = share.sum(2)
        else:
            share = share.sum((1, 2))[:, None]
        votes[..., start:stop] = share
        voted[..., start:stop] = real.unflatten(1, (sets, rows)).sum(2)
    return votes, voted


def smoothed(votes: Tensor, kind: str, width: int) -> Tensor:
    """The largest ("max") or the mean of `width` neighbours, odd; beyond an end is 0. `kind` "none": as they are."""
    if kind == "none" or width == 1:
        return votes
    flat = functional.pad(votes.flatten(0, -2)[:, None], (width // 2, width // 2))
    pooled = functional.max_pool1d(flat, width, 1) if kind == "max" else functional.avg_pool1d(flat, width, 1)
    return pooled[:, 0].view_as(votes)


def set_slabs(inputs: AttentionInputs, sets: int, heads: int, entries: int) -> Iterator[tuple[int, int]]:
    """Sets [start, stop), so many together that their votes on all keys stay below `entries`."""
    together = max(1, entries // (inputs.batch * heads * inputs.keys))
    for start in range(0, sets, together):
        yield start, min(sets, start + together)
