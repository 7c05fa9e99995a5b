"""SALE's own calibration: each head's threshold halves until its output is near enough to that of dense attention.

Ji et al., 2025, arXiv:2505.24179. The error of a head on a prompt is the sum of |output - output of dense attention|
over tokens and channels, and it is near enough below an allowed error a token. Each layer sees what dense attention
gives it, so that errors do not add up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.kernels import block_sparse_attention
from sparseprefill.patterns.last_rows import Pattern
from sparseprefill.patterns.nested import build_indexes
from sparseprefill.patterns.sale import Sale

FIRST = 0.008
"""The threshold that every head begins with."""

LEAST = 1e-4
"""A head whose threshold would be this or less is dense."""

ERROR = 0.4
"""The error a token that is allowed, as published."""


def ladder(first: float = FIRST, least: float = LEAST) -> tuple[float, ...]:
    """The thresholds above `least` that halving `first` comes to, largest first."""
    if not 0 < least < first < 1:
        raise ValueError(f"a ladder goes from a threshold below 1 to a lower one above 0, got {first!r} to {least!r}")
    steps = [first]
    while steps[-1] / 2 > least:
        steps.append(steps[-1] / 2)
    return tuple(steps)


def check_error(error: float) -> None:
    """Raise ValueError or TypeError unless `error` is a finite number above 0."""
    if isinstance(error, bool) or not isinstance(error, (int, float)):
        raise TypeError(f"the error must be a number above 0, got {error!r:.80}")
    if not 0 < error < math.inf:
        raise ValueError(f"the error must be a finite number above 0, got {error!r:.80}")


def choose(errors: Tensor, tokens: Sequence[int], error: float = ERROR) -> Tensor:
    """int64 [heads]: the step of the ladder that each head ends on, the number of steps for a dense one.

    Prompt after prompt a head goes down from where the one before has left it, to the first step whose error is below
    what is allowed; it never goes up again.

    Args:
        errors: float64 [prompts, heads, steps], largest threshold first; see `output_errors`.
        tokens: of each prompt.
        error: allowed a token.

    Raises:
        ValueError, TypeError: errors that are no numbers, or of another shape; an error that is none.
    """
    check_error(error)
    if errors.dim() != 3 or len(errors) != len(tokens) or not errors.numel():
        raise ValueError(f"errors must be [{len(tokens)} prompts, heads, steps], got {tuple(errors.shape)}")
    if bool(errors.isnan().any()):
        raise ValueError("errors contain NaN: check the model's weights and dtype")
    prompts, heads, steps = errors.shape
    allowed = error * torch.tensor(tokens, dtype=torch.float64)[:, None, None]
    near = torch.cat([errors < allowed, torch.ones(prompts, heads, 1, dtype=torch.bool)], 2)  # a dense head is
    step = torch.arange(steps + 1)
    state = torch.zeros(heads, 1, dtype=torch.int64)
    for each in near:
        state = (each & (step >= state)).to(torch.uint8).argmax(1, keepdim=True)  # of equal ones the first
    return state[:, 0]


def output_errors(inputs: AttentionInputs, patterns: Sequence[Pattern], *, block: int = 64) -> Tensor:
    """float64 [query_heads, patterns], on the CPU: sum of |output - output of dense attention| over all else.

    Outputs are those of the attention kernels, in the dtype of the inputs. One KV head's group is looked at at a time,
    and of its outputs two are held; see `error_peak_bytes`.

    Args:
        inputs: of one prompt: batch 1, no padding.
        patterns: one for all heads each; those of one family share an estimate.
        block: tokens of a tile, both ways.

    Raises:
        ValueError: a batch, padding, or what a pattern refuses.
    """
    if inputs.batch != 1 or inputs.key_valid is not None:
        raise ValueError(f"errors are those of one prompt without padding, got a batch of {inputs.batch}")
    heads = range(inputs.query_heads)
    found = torch.zeros(len(heads), len(patterns), dtype=torch.float64, device=inputs.device)
    for first in heads[:: inputs.group_size]:
        group = inputs.select_heads(heads[first : first + inputs.group_size])
        grid = BlockGrid.of(group, block, block)
        everything = BlockIndex.dense(group, grid)
        dense = _output(group, everything)
        last, error = everything, torch.zeros(inputs.group_size, dtype=torch.float64, device=inputs.device)
        for place, index in build_indexes(patterns, group, grid):
            if torch.equal(index.count, everything.count):
                error = torch.zeros_like(error)
            elif not _equal(index, last):  # where the lowest thresholds keep the same, it is computed once
                error = _output(group, index).sub_(dense).abs_().sum((0, 2, 3), dtype=torch.float64)
            last, found[first : first + inputs.group_size, place] = index, error
    return found.cpu()


def _equal(one: BlockIndex, other: BlockIndex) -> bool:
    """Whether two indexes of the same grid hold the same lists in the same places."""
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("count", "start", "columns"))


def _output(inputs: AttentionInputs, index: BlockIndex) -> Tensor:
    """[1, heads, queries, value_dim], widened, so that the difference of two is not rounded again."""
    output = block_sparse_attention(inputs, index).output
    assert output is not None
    return output.to(torch.promote_types(output.dtype, torch.float32))


def error_peak_bytes(tokens: int, query_heads: int, kv_heads: int, head_dim: int, block: int = 64) -> int:
    """An upper bound of what `output_errors` holds at one time beside its inputs, in bytes, for patterns of SALE."""
    group, blocks = query_heads // kv_heads, -(-tokens // block)
    outputs = group * tokens * (head_dim + 8) * 4 * 6  # dense, sparse and its parts; queries as codes, widened
    keys = tokens * head_dim * 4 * 6 + group * tokens * 64  # as codes, widened; a bias, and what is asked of a query
    tiles = group * blocks * blocks * 48  # scores, masks, lists of blocks with the places that made them
    return outputs + keys + tiles + _WORKSPACE


_WORKSPACE = 192 << 20  # slabs of a fixed size: products of the estimate, tiles of the kernels


def least_tokens(pattern: Sale) -> int:
    """The length of the shortest prompt of which any block is tested: in a shorter one every threshold keeps all."""
    # a row's sink, window and one segment lie before its end; the row of the first such end is then begun
    return (pattern.window + pattern.segment) // pattern.query_block * pattern.query_block + 1
