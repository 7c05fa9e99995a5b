"""Offsets beyond 31 bits, on tensors that span gigabytes of addresses and fill a few pages of them.

A tensor's elements lie in a sparse file that is mapped privately: what was never written takes no memory. Every product
of an index and a stride that a kernel forms is beyond 2^31 somewhere, and for each the test shows what 32 bits would
have made of it: an address outside of the mapping, or another element's.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.kernels import block_sparse_attention
from support import assert_within_budget, make_inputs, random_index

FAR = 1 << 31
BLOCK = 16


@pytest.fixture
def spread(tmp_path: Path) -> Callable[[Tensor, int, int], Tensor]:
    return functools.partial(spread_out, tmp_path)


def spread_out(folder: Path, tensor: Tensor, dim: int, stride: int) -> Tensor:
    """The same tensor [batch, heads, tokens, dim] with one dimension's stride (in elements) as large as asked."""
    strides, below = [0] * 4, 1
    for axis in [a for a in (3, 2, 1, 0) if a != dim]:
        strides[axis] = below
        below *= tensor.shape[axis]
    assert below <= stride, "what lies inside one step fits into it"
    strides[dim] = stride
    size = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True))
    path = folder / f"{len(list(folder.iterdir()))}.bin"
    with path.open("wb+") as file:
        file.truncate(size * tensor.element_size())
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    storage = torch.frombuffer(memory, dtype=tensor.dtype)
    far = storage.as_strided(tensor.shape, strides)
    far.copy_(tensor)
    assert torch.equal(far, tensor)
    return far


def wrapped(count: int, stride: int) -> bool:
    """Would a 32-bit product of the last index and this stride differ from the true one?"""
    assert stride < FAR, "a larger stride would be passed as 64 bits by itself, and prove nothing"
    with np.errstate(over="ignore"):
        return int(np.int32(count - 1) * np.int32(stride)) != (count - 1) * stride


# which tensor, which of its dimensions lies far apart, and the shape that makes it do so at a stride below 2^31
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "query-batch": ("query", 0, {"batch": 4}),
    "query-heads": ("query", 1, {"query_heads": 4}),
    "query-tokens": ("query", 2, {}),
    "query-dims": ("query", 3, {}),
    "key-batch": ("key", 0, {"batch": 4}),
    "key-heads": ("key", 1, {"query_heads": 4, "kv_heads": 4}),
    "key-tokens": ("key", 2, {}),
    "key-dims": ("key", 3, {}),
    "value-batch": ("value", 0, {"batch": 4}),
    "value-heads": ("value", 1, {"query_heads": 4, "kv_heads": 4}),
    "value-tokens": ("value", 2, {}),
    "value-dims": ("value", 3, {}),
}


def far_inputs(name: str, spread: Callable[..., Tensor]) -> tuple[AttentionInputs, AttentionInputs]:
    """(the same close together, far apart)."""
    tensor, dim, fields = CASES[name]
    shape = {"batch": 1, "query_heads": 1, "kv_heads": 1, **fields}
    close = make_inputs(queries=45, keys=70, head_dim=16, dtype=torch.float16, **shape)
    count = getattr(close, tensor).shape[dim]
    # a kernel adds the offset of a tile and that inside it: the former alone must be too large
    last = (count - 1) // BLOCK * BLOCK if count > BLOCK else count - 1
    stride = (FAR - 1) // 2 if count == 4 else math.ceil(FAR / last) + 3
    assert wrapped(last + 1, stride), "32 bits would do, so this case shows nothing"
    far = spread(getattr(close, tensor), dim, stride)
    assert (far.shape[dim] - 1) * far.stride(dim) >= FAR
    return close, dataclasses.replace(close, **{tensor: far})


QUICK = ("query-tokens", "key-batch", "value-dims")
SOME_SLOW = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in CASES]


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("name", SOME_SLOW)
def test_cpu_kernel_reaches_far(name: str, sparse: bool, spread: Callable[..., Tensor]) -> None:
    close, far = far_inputs(name, spread)
    grid = BlockGrid.of(close, BLOCK, BLOCK)
    index = random_index(close, BLOCK, BLOCK, 0.5) if sparse else BlockIndex.dense(close, grid)
    result = block_sparse_attention(far, index, impl="cpu")
    near = block_sparse_attention(close, index, impl="cpu")
    assert torch.equal(result.output, near.output)  # type: ignore[arg-type]
    assert torch.equal(result.lse, near.lse)
    assert_within_budget(result, close, index)


linux = pytest.mark.skipif(sys.platform != "linux", reason="triton is published for Linux only")


@linux
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_triton_kernel_reaches_far(name: str, spread: Callable[..., Tensor]) -> None:
    """Held in the interpreter, which multiplies in the declared widths: `test_32_bits_would_fail` breaks it."""
    close, far = far_inputs(name, spread)
    index = random_index(close, BLOCK, BLOCK, 0.5)
    result = block_sparse_attention(far, index, impl="triton")
    near = block_sparse_attention(close, index, impl="triton")
    assert torch.equal(result.output, near.output)  # type: ignore[arg-type]
    assert torch.equal(result.lse, near.lse)


@linux
@pytest.mark.slow
@pytest.mark.parametrize("dim", [2, 3], ids=["tokens", "dims"])
def test_triton_kernel_writes_far(dim: int, spread: Callable[..., Tensor]) -> None:
    """The output's strides are the caller's too."""
    from sparseprefill.kernels import triton_forward

    written, near = written_far(triton_forward, dim, spread)
    assert torch.equal(written, near)


def written_far(kernels: Any, dim: int, spread: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """What a module of kernels writes into an output with one dimension far apart, and into one as usual."""
    inputs = make_inputs(query_heads=1, kv_heads=1, queries=45, keys=70, head_dim=16, dtype=torch.float16)
    index = random_index(inputs, BLOCK, BLOCK, 0.5)
    near = block_sparse_attention(inputs, index, impl="triton")
    assert near.output is not None
    stride = math.ceil(FAR / (near.output.shape[dim] - 1)) + 3
    assert wrapped(near.output.shape[dim], stride)
    output = spread(torch.zeros_like(near.output).contiguous(), dim, stride)
    tiling = kernels.choose_tiling(16, 16, torch.float16, BLOCK, BLOCK, 99 << 10)
    arguments = kernels.kernel_arguments(inputs, index, output, torch.empty_like(near.lse), tiling, 32 << 20)
    kernels.forward_kernel[(index.grid.rows, 1)](**arguments, num_warps=4, num_stages=1)
    return output, near.output


@linux
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a wild address on a GPU ends the whole process")
def test_32_bits_would_fail(tmp_path: Path) -> None:
    """The kernel without its conversions to int64 gets every case above wrong, or dies of it; with them, none."""
    source = Path(importlib.util.find_spec("sparseprefill.kernels.triton_forward").origin).read_text()  # type: ignore[union-attr,arg-type]
    narrow = source.replace(".to(tl.int64)", "").replace(
        "i_row = tl.load(p_order + tl.program_id(0))", "i_row = tl.load(p_order + tl.program_id(0)).to(tl.int32)"
    )
    assert source.count(".to(tl.int64)") > 10
    assert narrow.count("int32)\n    i_b, i_h") == 1
    names = [*CASES, "output-tokens", "output-dims"]
    for text, right in ((source, True), (narrow, False)):
        (tmp_path / "kernels_under_test.py").write_text(text)
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_addressing as t; t.judge()"
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "1", "JUDGED": str(tmp_path)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == dict.fromkeys(names, right)


def judge() -> None:
    """In a process of its own: which cases does the module in the folder JUDGED get right? One child process a case."""
    torch.set_num_threads(1)
    folder = Path(os.environ["JUDGED"])
    spec = importlib.util.spec_from_file_location("kernels_under_test", folder / "kernels_under_test.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    right = {}
    for name in [*CASES, "output-tokens", "output-dims"]:
        child = os.fork()
        if not child:
            signal.alarm(120)
            os._exit(0 if _judge_case(module, name, folder / name) else 1)
        right[name] = os.waitpid(child, 0)[1] == 0  # neither a wrong result nor a signal
    print(json.dumps(right))  # noqa: T201


def _judge_case(module: Any, name: str, folder: Path) -> bool:
    folder.mkdir(exist_ok=True)
    place = functools.partial(spread_out, folder)
    if name.startswith("output"):
        written, near = written_far(module, 2 if name.endswith("tokens") else 3, place)
        return torch.equal(written, near)
    close, far = far_inputs(name, place)
    index = random_index(close, BLOCK, BLOCK, 0.5)
    result, near_result = (module.triton_attention(inputs, index) for inputs in (far, close))
    return torch.equal(result.output, near_result.output) and torch.equal(result.lse, near_result.lse)
