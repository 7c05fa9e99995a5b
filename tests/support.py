"""What several test files need: seeded inputs, random indexes, and the one error budget of the suite."""

from __future__ import annotations

import torch

from sparseprefill.contracts import AttentionInputs, AttentionOutput, BlockGrid, BlockIndex
from sparseprefill.kernels.reference import reference_attention


def make_inputs(
    batch: int = 1,
    query_heads: int = 4,
    kv_heads: int = 2,
    queries: int = 128,
    keys: int | None = None,
    head_dim: int = 32,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str = "cpu",
    **fields: object,
) -> AttentionInputs:
    """Random inputs; by default the queries are the last of the keys. `fields` go to AttentionInputs as they are."""
    draw = torch.Generator().manual_seed(seed)
    keys = queries if keys is None else keys
    query = torch.randn(batch, query_heads, queries, head_dim, generator=draw, dtype=torch.float64)
    key = torch.randn(batch, kv_heads, keys, head_dim, generator=draw, dtype=torch.float64)
    value = torch.randn(batch, kv_heads, keys, value_dim or head_dim, generator=draw, dtype=torch.float64)
    fields.setdefault("query_start", keys - queries)
    fields.setdefault("scale", head_dim**-0.5)
    tensors = (t.to(device=device, dtype=dtype) for t in (query, key, value))
    return AttentionInputs(*tensors, **fields)  # type: ignore[arg-type]


def left_padding(keys: int, pads: list[int], device: str = "cpu") -> torch.Tensor:
    """bool [batch, keys], False for the first pads[b] slots of row b."""
    return torch.arange(keys, device=device) >= torch.tensor(pads, device=device)[:, None]


def random_index(inputs: AttentionInputs, block_q: int, block_k: int, density: float, seed: int = 0) -> BlockIndex:
    """Visible blocks drawn at random, the row's last one always among them."""
    grid = BlockGrid.of(inputs, block_q, block_k)
    draw = torch.Generator().manual_seed(seed)
    shape = (inputs.batch, inputs.query_heads, grid.rows, grid.key_blocks)
    mask = (torch.rand(shape, generator=draw) < density).to(inputs.device)
    _, high = grid.visible_blocks(inputs)
    mask.scatter_(3, (high - 1)[:, None, :, None].expand(shape[0], shape[1], shape[2], 1), True)
    return BlockIndex.from_mask(grid, mask & grid.visible_block_mask(inputs)[:, None])


def assert_within_budget(result: AttentionOutput, inputs: AttentionInputs, index: BlockIndex | None) -> None:
    """error(kernel, fp64) <= 2 * (error(plain low-precision attention, fp64) + eps * max|fp64|), output and lse."""
    exact = reference_attention(inputs, index)
    plain = reference_attention(inputs, index, dtype=inputs.query.dtype)
    eps = torch.finfo(inputs.query.dtype).eps
    empty = exact.lse == -torch.inf
    assert torch.equal(result.lse == -torch.inf, empty), "rows without a key must have lse -inf, and no others"
    compared = [tuple(t.double().masked_fill(empty, 0.0) for t in (result.lse, plain.lse, exact.lse))]
    if result.output is not None:
        assert result.output.dtype == inputs.query.dtype
        assert bool((result.output[empty] == 0).all()), "rows without a key must have output 0"
        compared.append(tuple(t.double() for t in (result.output, plain.output, exact.output)))
    for got, low, want in compared:
        assert not got.isnan().any(), "NaN"
        budget = 2 * ((low - want).abs().max() + eps * want.abs().max())
        error = (got - want).abs().max()
        assert error <= budget, f"error {error:.3e} is over the budget of {budget:.3e}"
