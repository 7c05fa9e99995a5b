"""Generalised neighbourhood attention: a window with a stride and a dilation, along the text and inside images.

Hassani et al., "Generalized Neighborhood Attention", 2025, arXiv:2504.16922; neighbourhoods arXiv:2204.07143, dilation
arXiv:2209.15001. A stride lets that many neighbouring queries share one window, which is what tiles like; dilation
looks at each n-th token.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.estimators.selection import Budget, check_budget, check_count, check_tokens
from sparseprefill.patterns.expected_overhead import Overhead, stated_overhead
from sparseprefill.patterns.expected_tiles import count_tiles

_COUNTED = 1 << 16  # tokens up to which tiles of 64 are counted for the cost model, and larger ones beyond
_PLACES = 1 << 22  # keys of neighbourhoods that are listed at one time


@dataclass(frozen=True, slots=True)
class Span:
    """An image or a video inside a prompt: tokens in row-major order, and the neighbourhood that each of them sees.

    Token (y, x), or (t, y, x), sees those whose coordinates lie in its window in every dimension; a window keeps its
    whole size at an edge, where it moves inwards. In a dimension that is causal it ends at the token itself.

    Raises ValueError or TypeError where the numbers of dimensions differ, a window is larger than its dimension, a
    stride larger than its window, or a dilated window larger than its dimension.
    """

    start: int  # tokens before it, from the prompt's first
    shape: tuple[int, ...]  # tokens in each dimension, slowest first; 1 to 3 of them
    window: tuple[int, ...]  # tokens of a window
    stride: tuple[int, ...] = ()  # neighbouring queries that share a window; none: 1
    dilation: tuple[int, ...] = ()  # tokens from one token of a window to the next; none: 1
    causal: tuple[bool, ...] = ()  # none: no dimension

    def __post_init__(self) -> None:
        check_count("start of a span", self.start, least=0)
        for name, usual in (("shape", None), ("window", None), ("stride", 1), ("dilation", 1), ("causal", False)):
            given = getattr(self, name)
            if isinstance(given, (str, bytes)) or not hasattr(given, "__iter__"):
                raise TypeError(f"{name} of a span is a number for each dimension, got {given!r:.80}")
            numbers = tuple(given)
            if not numbers and usual is not None:
                numbers = (usual,) * len(self.shape)
            object.__setattr__(self, name, numbers)
        if not 1 <= len(self.shape) <= 3:
            raise ValueError(f"a span has 1 to 3 dimensions, got shape={self.shape!r:.80}")
        for name in ("window", "stride", "dilation", "causal"):
            if len(getattr(self, name)) != len(self.shape):
                raise ValueError(
                    f"{name} of a span has a number for each of its {len(self.shape)} dimensions, "
                    f"got {getattr(self, name)!r:.80}"
                )
        if not all(isinstance(each, bool) for each in self.causal):
            raise TypeError(f"causal of a span is True or False for each dimension, got {self.causal!r:.80}")
        for size, window, stride, dilation in zip(self.shape, self.window, self.stride, self.dilation, strict=True):
            check_count("a dimension of a span", size)
            _check_window(window, stride, dilation)
            if window * dilation > size:
                raise ValueError(
                    f"a window of {window} tokens{f', {dilation} apart,' if dilation > 1 else ''} does not fit into a "
                    f"dimension of {size}"
                )

    @property
    def tokens(self) -> int:
        """In all dimensions."""
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        """One past its last token."""
        return self.start + self.tokens


@dataclass(frozen=True, slots=True)
class Gna:
    """Key j is kept for query p iff it lies in p's window, counted from the first valid key, or j < `sink`.

    Tokens that are equal modulo `dilation` form a group, in which c = p // dilation counts; the queries with the same
    c // `stride` share a window that ends where the last of them stands, or at the group's last token, and each of them
    ends at itself: keys from max(0, that end - window + 1) to c. So with a stride the first query of each sees window -
    stride + 1 keys. `window` = all keys is dense where `dilation` is 1; as a share, it is of the prompt.

    Two tokens of one span see each other as `Span` says instead of that window, if the key is not behind the query.
    Tiles that hold a kept pair are computed whole. Where the prompt ends decides the windows of the last stride, so
    that these look ahead, by that alone. A span that is not there yet, as in the first chunks of a long prompt, changes
    nothing.

    Rules of arXiv:2504.16922. Raises ValueError or TypeError for numbers that are none, a stride larger than its
    window, and spans that overlap.
    """

    window: Budget = 4096  # tokens, or a share of the prompt, which is at least the stride
    stride: int = 1  # queries
    dilation: int = 1  # tokens
    sink: int = 64  # tokens
    spans: tuple[Span, ...] = ()  # of images and videos, in every prompt of a batch; or dictionaries of their fields

    def __post_init__(self) -> None:
        check_budget("window", self.window)
        _check_window(self.window if isinstance(self.window, int) else None, self.stride, self.dilation)
        check_tokens("sink", self.sink, least=0)
        if isinstance(self.spans, (str, bytes, Mapping)) or not hasattr(self.spans, "__iter__"):
            raise TypeError(f"spans is a list of Span(start, shape, window), got {self.spans!r:.80}")
        spans = sorted(map(_span, self.spans), key=lambda span: span.start)
        object.__setattr__(self, "spans", tuple(spans))
        for one, two in itertools.pairwise(self.spans):
            if two.start < one.stop:
                raise ValueError(
                    f"spans overlap: one from {one.start} has {one.tokens} tokens, and the next begins at {two.start}"
                )

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        length = (inputs.tail() - inputs.anchor())[:, None]
        row = grid.first[:, None] + torch.arange(grid.rows, device=inputs.device)
        begin, end = row * grid.block_q, (row + 1) * grid.block_q
        end = torch.where(begin < length, torch.minimum(end, length), end)  # rows of right padding go on as they are
        block = torch.arange(grid.key_blocks, device=inputs.device)
        mask = (block * grid.block_k < self.sink).expand(*row.shape, -1)
        edges = [0, *itertools.chain.from_iterable((span.start, span.stop) for span in self.spans), 1 << 62]
        for place, (low, high) in enumerate(itertools.pairwise(edges)):  # texts and spans in turn
            before = low if place % 2 else high
            mask = mask | self._along(begin.clamp(min=low), end.clamp(max=high), before, length, grid)
        for span in self.spans:
            rows = -(-(grid.query_start + grid.queries) // grid.block_q)
            inside = _tiles_of(span, grid.block_q, grid.block_k, rows, grid.key_blocks).to(
                inputs.device, non_blocking=True
            )
            mask = mask | (inside[row.clamp(max=rows - 1)] & (row < rows)[..., None])
        visible = grid.visible_block_mask(inputs)
        mask = mask & visible
        mask = mask | (visible & ~mask.any(-1, keepdim=True))  # rows without queries have a list too
        return BlockIndex.from_mask(grid, mask[:, None]).for_heads(inputs.query_heads)

    def tile_law(self) -> str:
        """See `sparseprefill.patterns.expected_tiles`."""
        return "positions"

    def expected_density(self, keys: int) -> float:
        return _share_of_tiles(self, keys)

    def expected_overhead(self, device: torch.device, head_dim: int, block_q: int, block_k: int) -> Overhead:
        """It looks at nothing; a dilation goes over the tiles as often as it says."""
        tiles = 0.1 * min(self.dilation, block_q) / (block_q * block_k)
        return stated_overhead(device, head_dim, tiles=tiles, steps=0.2)

    def _along(self, begin: Tensor, end: Tensor, before: int, length: Tensor, grid: BlockGrid) -> Tensor:
        """bool [batch, rows, key_blocks]: the window of the queries [begin, end) holds a key of the block, below
        `before`; int64 [batch, rows] both, and [batch, 1] tokens of the prompt.
        """
        window: Tensor | int
        if isinstance(self.window, int):
            window = self.window
        else:
            group = -(-length // self.dilation)
            window = (group.double() * self.window - 1e-9).ceil().to(torch.int64).clamp(min=self.stride)
        block = torch.arange(grid.key_blocks, device=begin.device) * grid.block_k
        found = torch.zeros(*begin.shape, grid.key_blocks, dtype=torch.bool, device=begin.device)
        for step in range(min(self.dilation, grid.block_q)):  # queries a dilation apart share a group
            first = begin + step
            last = first + (end - 1 - first) // self.dilation * self.dilation
            residue = first % self.dilation
            group = (length - residue + self.dilation - 1) // self.dilation
            leader = torch.minimum(first // self.dilation // self.stride * self.stride + self.stride, group) - 1
            low = (leader - window + 1).clamp(min=0) * self.dilation + residue
            reach = torch.maximum(low[..., None], block)
            reach = reach + (residue[..., None] - reach) % self.dilation  # the first key of the group from there on
            stop = torch.minimum(last.clamp(max=before - 1)[..., None], block + grid.block_k - 1)
            found |= (reach <= stop) & (first < end)[..., None]
        return found


@functools.lru_cache(maxsize=256)
def _share_of_tiles(pattern: Gna, keys: int) -> float:
    """Larger tiles hold more, so that of a long prompt this is at most too much."""
    block = 64 << max(0, (keys - 1) // _COUNTED).bit_length()
    return count_tiles(pattern, keys=keys, query_heads=1, kv_heads=1, block_q=block, block_k=block).share()


@functools.lru_cache(maxsize=64)
def _tiles_of(span: Span, block_q: int, block_k: int, rows: int, key_blocks: int) -> Tensor:
    """bool [rows, key_blocks]: tiles in which a token of the span sees another; by itself, from the prompt's start."""
    found = torch.zeros(rows * key_blocks, dtype=torch.bool)
    axes = [
        _windows(*each) for each in zip(span.shape, span.window, span.stride, span.dilation, span.causal, strict=True)
    ]
    steps = [math.prod(span.shape[place + 1 :]) for place in range(len(span.shape))]
    together = max(1, _PLACES // math.prod(span.window))
    for token in torch.arange(span.tokens).split(together):
        key, real = torch.zeros(len(token), 1, dtype=torch.int64), torch.ones(len(token), 1, dtype=torch.bool)
        for (place, inside), step, size in zip(axes, steps, span.shape, strict=True):
            own = token // step % size
            key = (key[:, :, None] + step * place[own][:, None]).flatten(1)
            real = (real[:, :, None] & inside[own][:, None]).flatten(1)
        row = ((token + span.start) // block_q)[:, None].expand_as(key)
        block = (key + span.start) // block_k
        real &= (key <= token[:, None]) & (row < rows) & (block < key_blocks)
        found[(row * key_blocks + block)[real]] = True
    return found.view(rows, key_blocks)


def _windows(size: int, window: int, stride: int, dilation: int, causal: bool) -> tuple[Tensor, Tensor]:
    """int64 [size, window] keys that each token sees in one dimension, and bool: which of them are there."""
    token = torch.arange(size)
    place, residue = token // dilation, token % dilation
    group = (size - residue + dilation - 1) // dilation
    before, middle = (window - 1, stride - 1) if causal else (window // 2, stride // 2)
    leader = torch.minimum(place // stride * stride + middle, group - 1)
    first = torch.minimum((leader - before).clamp(min=0), group - window)
    if causal:
        first = (leader - before).clamp(min=0)
    own = first[:, None] + torch.arange(window)
    return own * dilation + residue[:, None], own < (place[:, None] + 1 if causal else group[:, None])


def _check_window(window: int | None, stride: int, dilation: int) -> None:
    """Raise ValueError or TypeError where these are none; a window that is a share is None."""
    if window is not None:
        check_tokens("window", window)
    check_count("stride", stride)
    check_count("dilation", dilation)
    if window is not None and stride > window:
        raise ValueError(f"stride={stride} queries share a window of {window} keys: a stride is at most its window")


def _span(given: Any) -> Span:
    if isinstance(given, Span):
        return given
    if isinstance(given, Mapping):
        try:
            return Span(**given)
        except TypeError as error:
            if "argument" not in str(error):
                raise
            raise TypeError(f"a span is made of start, shape, window, stride, dilation and causal: {error}") from None
    raise TypeError(f"a span is Span(start, shape, window), got {given!r:.80}")
