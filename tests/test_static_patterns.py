"""Static patterns by their closed forms: how many blocks they keep, which keys, and what they refuse."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from sparseprefill.contracts import BlockGrid
from sparseprefill.coverage import coverage
from sparseprefill.patterns.expected_tiles import count_tiles
from sparseprefill.patterns.gna import Gna, Span
from sparseprefill.patterns.hip import Hip
from sparseprefill.patterns.local_stride import LocalStride
from support import left_padding, make_inputs


def mask_of(pattern: Any, block: int, **options: Any) -> torch.Tensor:
    """bool [batch, query_heads, rows, key_blocks]."""
    inputs = make_inputs(head_dim=2, **options)
    index = pattern.build_index(inputs, BlockGrid.of(inputs, block, block))
    index.validate(inputs)
    return index.to_mask()


def test_strided_columns_are_those_of_the_formula() -> None:
    """Heads in groups of two, four KV heads: columns 0, 2, 4, 6 to the front."""
    blocks, local, stride = 40, 3, 8
    mask = mask_of(
        LocalStride(local=local * 8, stride=stride, block=8), 8, queries=blocks * 8, query_heads=8, kv_heads=4
    )
    i, j = torch.arange(blocks)[:, None], torch.arange(blocks)
    for head in range(8):
        wanted = ((i - j < local) | ((j + head // 2 * 2) % stride == 0)) & (j <= i)
        assert torch.equal(mask[0, head], wanted)


def test_as_many_heads_as_the_stride_see_everything_together() -> None:
    shared = mask_of(LocalStride(local=8, stride=4, block=8), 8, queries=320, query_heads=4, kv_heads=4)
    assert torch.equal(shared.any(1)[0], torch.ones(40, 40, dtype=torch.bool).tril())
    same = mask_of(LocalStride(local=8, stride=4, block=8, homogeneous=True), 8, queries=320, query_heads=4, kv_heads=4)
    assert not same.any(1)[0, 39, 1]
    dense = mask_of(LocalStride(local=8, stride=4, block=8, dense_heads=2), 8, queries=320, query_heads=4, kv_heads=4)
    assert dense[0, 2:].sum() == 2 * 40 * 41 / 2


def test_a_kept_column_is_kept_by_all_later_rows_and_a_window_lets_go_once() -> None:
    """What makes a cache able to forget: outside of the window no block comes back."""
    mask = mask_of(LocalStride(local=24, stride=5, block=8), 8, queries=320)
    for column in mask[0, 0].T:
        kept = column.long().diff()
        assert (kept == -1).sum() <= 1
        assert (kept == 1).sum() <= 1


def test_a_sliding_window_visits_as_many_tiles_as_the_paper_reckons() -> None:
    """32k tokens, a window of 2k, tiles of 128: 7.8 times fewer than dense causal attention has."""
    mask = mask_of(Gna(window=2048, sink=0), 128, queries=32768, query_heads=1, kv_heads=1)
    assert int(mask.sum()) == 17 * 256 - 17 * 16 // 2
    assert 256 * 257 / 2 / int(mask.sum()) == pytest.approx(7.8, abs=0.05)
    aligned = mask_of(Gna(window=2048, stride=128, sink=0), 128, queries=32768, query_heads=1, kv_heads=1)
    assert int(aligned.sum()) == 16 * 256 - 16 * 15 // 2, "a stride of whole tiles leaves out the half tile"


def test_a_stride_as_large_as_its_window_is_attention_inside_of_blocks() -> None:
    mask = mask_of(Gna(window=64, stride=64, sink=0), 16, queries=256, query_heads=1, kv_heads=1)
    i, j = torch.arange(16)[:, None], torch.arange(16)
    assert torch.equal(mask[0, 0], (i // 4 == j // 4) & (j <= i))


def test_strided_windows_shrink_and_dilated_ones_skip() -> None:
    """A window of 8 and a stride of 4: 5, 6, 7 and 8 keys. Tiles of one token show single keys."""
    mask = mask_of(Gna(window=8, stride=4, sink=0), 1, queries=40, query_heads=1, kv_heads=1)[0, 0]
    assert mask.sum(-1)[16:20].tolist() == [5, 6, 7, 8]
    mask = mask_of(Gna(window=3, dilation=5, sink=0), 1, queries=40, query_heads=1, kv_heads=1)[0, 0]
    assert mask[33].nonzero()[:, 0].tolist() == [23, 28, 33]


def test_a_window_of_an_image_keeps_its_size_at_the_edges() -> None:
    """Of the keys that a causal mask leaves, the last token sees its window whole; outside of it text sees as text."""
    span = Span(start=7, shape=(5, 6), window=(3, 4))
    mask = mask_of(Gna(window=2, sink=0, spans=(span,)), 1, queries=45, query_heads=1, kv_heads=1)[0, 0]
    own = [7 + 6 * y + x for y in (2, 3, 4) for x in (2, 3, 4, 5)]
    assert mask[7 + 29].nonzero()[:, 0].tolist() == own, "token (4, 5), the last one"
    assert mask[7].nonzero()[:, 0].tolist() == [6, 7], "the first one: itself, and the text before it"
    assert mask[7 + 7].nonzero()[:, 0].tolist() == [7, 8, 9, 10, 13, 14], "token (1, 1)"
    assert mask[37].nonzero()[:, 0].tolist() == [36, 37], "the text behind sees it as text"


def test_a_video_that_is_causal_in_time_and_blocked_in_space() -> None:
    span = Span(start=0, shape=(4, 4, 4), window=(2, 2, 2), stride=(1, 2, 2), causal=(True, False, False))
    mask = mask_of(Gna(window=1, sink=0, spans=(span,)), 1, queries=64, query_heads=1, kv_heads=1)[0, 0]
    t, y, x = (torch.arange(64) // 16, torch.arange(64) // 4 % 4, torch.arange(64) % 4)
    near = (t[:, None] - t).clamp(min=0) < 2
    block = (y[:, None] // 2 == y // 2) & (x[:, None] // 2 == x // 2)
    order = torch.arange(64)
    assert torch.equal(mask, near & block & (t[:, None] >= t) & (order[:, None] >= order))


def test_spans_are_counted_from_the_first_valid_key() -> None:
    span = {"start": 3, "shape": (6, 6), "window": (2, 3)}
    pattern = Gna(window=4, sink=0, spans=[span])  # type: ignore[arg-type]
    padded = mask_of(pattern, 4, queries=64, batch=2, key_valid=left_padding(64, [0, 13]))
    alone = mask_of(pattern, 4, queries=51)
    assert torch.equal(padded[1, 0, :12, :12], alone[0, 0, :12, :12])
    assert Gna(spans=(Span(**span),)) == Gna(spans=(span,))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LocalStride(stride=0), "stride must be at least 1"),
        (lambda: LocalStride(stride=2.0), "stride must be an int"),  # type: ignore[arg-type]
        (lambda: LocalStride(local=0), "local must be at least 1"),
        (lambda: LocalStride(block=0), "block must be at least 1"),
        (lambda: LocalStride(offset=-1), "offset must be at least 0"),
        (lambda: LocalStride(homogeneous=1), "homogeneous must be True or False"),  # type: ignore[arg-type]
        (lambda: Gna(window=8, stride=9), "stride=9 queries share a window of 8 keys"),
        (lambda: Gna(window=1.5), "window as a share must be in (0, 1]"),
        (lambda: Gna(dilation=0), "dilation must be at least 1"),
        (lambda: Gna(spans="image"), "spans is a list of Span"),
        (lambda: Gna(spans=(3,)), "a span is Span(start, shape, window)"),
        (lambda: Gna(spans=({"begin": 3},)), "a span is made of start, shape, window"),
        (lambda: Gna(spans=(Span(0, (4, 4), (2, 2)), Span(15, (4,), (2,)))), "spans overlap: one from 0 has 16 tokens"),
        (lambda: Span(0, (4, 4), (2,)), "window of a span has a number for each of its 2 dimensions"),
        (lambda: Span(0, (2, 2, 2, 2), (1, 1, 1, 1)), "a span has 1 to 3 dimensions"),
        (lambda: Span(0, (4,), (5,)), "a window of 5 tokens does not fit into a dimension of 4"),
        (lambda: Span(0, (7,), (4,), (), (2,)), "a window of 4 tokens, 2 apart, does not fit into a dimension of 7"),
        (lambda: Span(0, (4,), (2,), (3,)), "stride=3 queries share a window of 2 keys"),
        (lambda: Span(-1, (4,), (2,)), "start of a span must be at least 0"),
        (lambda: Span(0, 16, (2,)), "shape of a span is a number for each dimension"),  # type: ignore[arg-type]
        (lambda: Span(0, (4,), (2,), causal=(1,)), "causal of a span is True or False"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make: Any, said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(said)):
        make()


def test_more_dense_heads_than_there_are_are_refused() -> None:
    with pytest.raises(ValueError, match="there are 2 KV heads"):
        mask_of(LocalStride(dense_heads=3), 16, queries=64, query_heads=4, kv_heads=2)


@pytest.mark.parametrize(
    "pattern",
    [
        LocalStride(), LocalStride(block=7), LocalStride(block=96, stride=3), LocalStride(dense_heads=1),
        LocalStride(dense_heads=8),
        Gna(window=1024), Gna(window=0.1, stride=64), Gna(window=0.01, stride=4096),
        Gna(window=64, spans=(Span(64, (64, 128), (64, 128)),)), Hip(0.1, sink=64, local=256, most=0.001),
    ],
    ids=repr,
)  # fmt: skip
def test_the_cost_model_reckons_with_at_least_what_is_computed(pattern: Any) -> None:
    """With the eight KV heads that `dense_heads` are taken to be of; tiles of 64, of which diagonals count whole."""
    keys = 8192
    inputs = make_inputs(queries=keys, query_heads=8, kv_heads=8, head_dim=2)
    found = coverage(inputs, pattern.build_index(inputs, BlockGrid.of(inputs, 64, 64)))
    assert float(found.density.mean()) <= pattern.expected_density(keys) + 64 / keys


def test_spans_of_long_prompts_are_counted_too() -> None:
    pattern = Gna(window=1024, spans=(Span(64, (16, 64, 64), (4, 16, 16)),))
    for keys in (66_000, 200_000):
        exact = count_tiles(pattern, keys=keys, query_heads=1, kv_heads=1, block_q=64, block_k=64).share()
        assert exact <= pattern.expected_density(keys) < 3 * exact
