"""The check that a native library passes before it is installed: the reference in float64, on small awkward inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, AttentionOutput, BlockGrid, BlockIndex
from sparseprefill.kernels.low_bit import BITS, EstimatedLogits, LowBit, block_max, quantize, token_means
from sparseprefill.kernels.native_attention import native_attention
from sparseprefill.kernels.native_block_max import native_block_max, why_not_native
from sparseprefill.kernels.native_build import use
from sparseprefill.kernels.products import low_bit_codes
from sparseprefill.kernels.reference import reference_attention


def check_library(path: str | Path) -> None:
    """Hold a library against the reference, in this process, which goes on with it.

    Raises ValueError where it cannot be loaded or is wrong.
    """
    use(Path(path))
    served = 0
    for name, logits in check_cases():
        if why_not_native(logits.bias.device, logits.bias.dtype, logits.key.bits, logits.block_k) is None:
            served += 1
            problem = why_not_equal(native_block_max(logits), logits)
            if problem is not None:
                raise ValueError(f"{name}: {problem}")
    if not served:
        raise ValueError("it serves none of the cases of the check")
    for name, vectors, arguments in code_cases():
        wanted, found = (low_bit_codes(vectors, name=way, **arguments) for way in ("torch", "native"))
        if not torch.equal(wanted.codes, found.codes) or not torch.equal(wanted.scale, found.scale):
            raise ValueError(f"{name}: other codes or scales than the reference's")
    for name, inputs, index in attention_cases():
        problem = why_not_attention(native_attention(_with_garbage(inputs), index), inputs, index)
        if problem is not None:
            raise ValueError(f"{name}: {problem}")


def check_cases() -> Iterator[tuple[str, EstimatedLogits]]:
    """Inputs with all that a score can have: shared keys, tails, anchors, windows, queries and keys left out."""
    for bits in BITS:
        for head_dim, block_q, block_k, softcap in ((64, 64, 32, None), (80, 16, 16, 3.0), (20, 8, 64, None)):
            name = f"{bits} bits, head_dim {head_dim}, tiles of {block_q} x {block_k}"
            yield name, _case(bits, head_dim, block_q, block_k, softcap)


def code_cases() -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    """Vectors of every dtype, not contiguous, some of them not real, far from their mean, tiny, or not finite."""
    generator = torch.Generator().manual_seed(0)
    for bits in BITS:
        tiny = torch.randn(1, 1, 9, 12, generator=generator) * 1e-39  # one over the largest of them is infinite
        yield f"codes of {bits} bits, tiny", tiny, {
            "mean": torch.zeros(1, 1, 12), "bits": bits, "group_size": 1, "anchor": torch.tensor([0]), "real": None,
        }  # fmt: skip
        for dtype, dim, together in ((torch.float32, 20, 1), (torch.bfloat16, 33, 16), (torch.float16, 128, 48)):
            vectors = torch.randn(2, 77, 3, dim, generator=generator) * 5 + 40
            vectors[0, 5, 1] = vectors[0, :, 1].mean(0)
            vectors[1, 50:] *= 1e-6  # in float16 some are below the normal numbers
            vectors = vectors.to(dtype).transpose(1, 2)
            real = torch.rand(2, 77, generator=generator) > 0.3
            mean = token_means(vectors, real)
            vectors[0, 2, 30, 0], vectors[0, 2, 60, 0] = torch.inf, torch.nan
            for own in (None, real):
                name = f"codes of {bits} bits, {dtype}, head_dim {dim}, {together} together"
                yield name, vectors, {
                    "mean": mean, "bits": bits, "group_size": together, "anchor": torch.tensor([0, 11]), "real": own,
                }  # fmt: skip


def attention_cases() -> Iterator[tuple[str, AttentionInputs, BlockIndex]]:
    """Every dtype; odd sizes, holes, windows, soft-caps, sinks, tiles that may be skipped, and blocks nobody reads."""
    generator = torch.Generator().manual_seed(0)
    for dtype, head_dim, value_dim, block_q, block_k, past in (
        (torch.float32, 64, 64, 64, 64, 0), (torch.float32, 20, 33, 48, 40, 0), (torch.bfloat16, 128, 128, 64, 64, 0),
        (torch.bfloat16, 33, 20, 128, 32, 0), (torch.bfloat16, 80, 48, 48, 40, 600), (torch.float16, 80, 64, 64, 64, 0),
    ):  # fmt: skip
        for plain in (True, False):
            queries, start = (3 * block_q, past) if plain else (3 * block_q - 7, past + 71)
            keys = start + queries
            query, key, value = (
                torch.randn(2, tokens, heads, dim, generator=generator).to(dtype).transpose(1, 2)
                for heads, tokens, dim in ((4, queries, head_dim), (2, keys, head_dim), (2, keys, value_dim))
            )
            inputs = AttentionInputs(query, key, value, scale=head_dim**-0.5, query_start=start)
            if not plain:
                valid = torch.rand(2, keys, generator=generator) > 0.1
                valid[1, :30] = False
                inputs = dataclasses.replace(
                    inputs, key_valid=valid, window=2 * block_k + 5, softcap=3.0, sinks=torch.tensor([0.5, -2, 1, 0])
                )
            grid = BlockGrid.of(inputs, block_q, block_k)
            listed = torch.rand(2, 4, grid.rows, grid.key_blocks, generator=generator) < 0.6
            listed |= torch.arange(grid.key_blocks) == grid.visible_blocks(inputs)[1][:, None, :, None] - 1
            index = BlockIndex.from_mask(grid, listed & grid.visible_block_mask(inputs)[:, None])
            name = f"attention in {dtype}, head_dim {head_dim}, tiles of {block_q} x {block_k}"
            yield name if plain else f"{name}, masked", inputs, index
            if block_q <= 64:
                yield f"{name}, skipping", inputs, index.skipping(-0.5)


def _with_garbage(inputs: AttentionInputs) -> AttentionInputs:
    """NaN in the keys and values of padding, which may hold anything."""
    if inputs.key_valid is None:
        return inputs
    hidden = ~inputs.key_valid[:, None, :, None]
    key, value = (each.masked_fill(hidden, torch.nan) for each in (inputs.key, inputs.value))
    return dataclasses.replace(inputs, key=key, value=value)


def why_not_attention(found: AttentionOutput, inputs: AttentionInputs, index: BlockIndex) -> str | None:
    """Why this is not attention over the listed blocks, or None. Judged by the reference in float64.

    It may be off by twice what attention in the dtype of the inputs is off by, and a last place of the largest number.
    """
    exact, plain = (reference_attention(inputs, index, dtype=dtype) for dtype in (torch.float64, inputs.query.dtype))
    empty = exact.lse == -torch.inf
    if not torch.equal(found.lse == -torch.inf, empty):
        return "other queries see nothing than should"
    if exact.skipped is not None and (found.skipped is None or not torch.equal(found.skipped, exact.skipped)):
        return "other tiles were skipped than should be"
    for what, got, low, want in (
        ("lse", found.lse, plain.lse, exact.lse), ("output", found.output, plain.output, exact.output),
    ):  # fmt: skip
        assert got is not None
        assert low is not None
        assert want is not None
        seen = ~empty
        if bool((got[empty] != (-torch.inf if what == "lse" else 0)).any()):
            return f"the {what} of queries that see nothing is not empty"
        error, rounding = ((each[seen].double() - want[seen]).abs().max() for each in (got, low))
        allowed = 2 * (rounding + torch.finfo(inputs.query.dtype).eps * want[seen].abs().max())
        if not error <= allowed:
            return f"{what} is off by {float(error):.2e}, rounding explains {float(allowed):.2e}"
    return None


def _case(bits: int, head_dim: int, block_q: int, block_k: int, softcap: float | None) -> EstimatedLogits:
    generator = torch.Generator().manual_seed(bits + head_dim)
    batch, kv_heads, group, rows, keys = 2, 2, 3, 4, 5 * block_k + 5
    queries = rows * block_q

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    query, key = drawn(batch, kv_heads * group, queries, head_dim), drawn(batch, kv_heads, keys, head_dim)
    key[:, :, 7] = 0  # a key like the mean of others has no largest channel
    bias = drawn(batch, kv_heads * group, keys)
    bias[1, :, 3:9] = -torch.inf
    bias[0, 0, : block_k + 2] = -torch.inf
    high = torch.arange(1, queries + 1) * keys // queries
    low = (high - 2 * block_k).clamp(min=0).expand(batch, -1).clone()
    low[0] = 0
    low[:, -3:] = high[-3:]  # a row that is filled up
    reference = 3 * drawn(batch, kv_heads * group, queries)
    low[:, -block_q + 1] = high[-block_q + 1]  # one in between that looks at nothing
    reference[:, :, [-block_q + 1, -block_q - 1]] = -20  # what it, and one with a later window, may not see stands out
    return EstimatedLogits(
        quantize(query, token_means(query, None), bits), quantize(key, token_means(key, None), bits), bias,
        drawn(batch, kv_heads * group, queries), reference, low.to(torch.int32),
        high.expand(batch, -1).to(torch.int32).contiguous(), torch.tensor([0, 5]), block_q, block_k,
        key_blocks=6, scale=head_dim**-0.5, softcap=softcap,
    )  # fmt: skip


def why_not_equal(found: Tensor, logits: EstimatedLogits) -> str | None:
    """Why these are not the scores of the tiles, or None. Judged by the reference in float64."""
    exact = block_max(_widened(logits))
    if found.shape != exact.shape:
        return f"scores of shape {list(found.shape)}, not {list(exact.shape)}"
    if bool(((found == -torch.inf) != (exact == -torch.inf)).any()) or bool(found.isnan().any()):
        return "other tiles are empty than should be, or a score is NaN"
    seen = exact != -torch.inf
    error = float((found[seen].double() - exact[seen]).abs().max()) if bool(seen.any()) else 0.0
    allowed = _rounding(logits)
    return None if error <= allowed else f"scores are off by {error:.2e}, rounding explains {allowed:.2e}"


def _widened(logits: EstimatedLogits) -> EstimatedLogits:
    def wide(codes: LowBit) -> LowBit:
        return dataclasses.replace(codes, scale=codes.scale.double())

    return dataclasses.replace(
        logits, query=wide(logits.query), key=wide(logits.key), bias=logits.bias.double(), shift=logits.shift.double(),
        reference=logits.reference.double(),
    )  # fmt: skip


def _rounding(logits: EstimatedLogits) -> float:
    """What rounding can do: each of at most eight operations in float32 by half a last place of the largest term."""
    most = 2 ** (logits.key.bits - 1) - 1
    product = logits.query.scale.max() * logits.key.scale.max() * most**2 * logits.key.head_dim
    bias = logits.bias[logits.bias.isfinite()].abs().max()
    terms = logits.scale * (product + bias + logits.shift.abs().max())
    largest = float(terms + logits.reference.abs().max()) + (logits.softcap or 0.0)
    return 4 * torch.finfo(torch.float32).eps * largest
