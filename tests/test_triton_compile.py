"""What the compiler makes of the Triton kernel for GPUs that need not be there: it fits and does not spill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from sparseprefill.kernels.roofline import programs_that_fit

if sys.platform != "linux":
    pytest.importorskip("triton", reason="triton is published for Linux only")

# in a process of its own: this one may have Triton's interpreter switched on, under which nothing compiles
SCRIPT = """
import dataclasses, json, sys, torch
from sparseprefill.kernels.triton_inspect import (
    compile_antidiagonal, compile_block_max, compile_kernel, compile_quantize, compile_rows
)
def compiled(architecture, head_dim, dtype, options):
    if dtype.startswith("int"):
        return compile_block_max(architecture, head_dim, int(dtype[3:]), **options)
    if "group_size" in options:
        return compile_quantize(architecture, head_dim, dtype=getattr(torch, dtype), **options)
    if "stride" in options:
        return compile_antidiagonal(architecture, head_dim, getattr(torch, dtype), **options)
    build = compile_rows if options.pop("rows", False) else compile_kernel
    return build(architecture, head_dim, dtype=getattr(torch, dtype), **options)
kernels = [compiled(*each) for each in json.load(sys.stdin)]
print(json.dumps([dataclasses.asdict(kernel) for kernel in kernels]))
"""

# prints, for each kind of launch, the keys that Triton would look it up by, one for each place
KEYS = """
import json, sys, torch
from sparseprefill.kernels.triton_inspect import (
    Case, antidiagonal_launch, block_max_launch, forward_launch, quantize_launch, rows_launch, specialisation_key
)
def kinds(case):
    segment = torch.zeros(1, case.keys, dtype=torch.int64, device=case.device)
    return {
        "dense": forward_launch(90, 128, case=case),
        "head_dim 80": forward_launch(90, 80, case=case),
        "pointers": forward_launch(80, 128, case=case),
        "own lists": forward_launch(90, 128, block_q=64, shared=False, case=case),
        "window": forward_launch(90, 128, window=300, case=case),
        "padding": forward_launch(90, 128, padded=True, case=case),
        "segments": forward_launch(90, 128, segment=segment, case=case),
        "sinks": forward_launch(90, 128, sinks=torch.zeros(8, device=case.device), case=case),
        "soft-cap": forward_launch(90, 128, softcap=30.0, case=case),
        "skip": forward_launch(90, 128, skip=True, padded=True, case=case),
        "some heads": forward_launch(90, 128, some_heads=True, case=case),
        "lse alone": forward_launch(90, 128, values=False, case=case),
        "rows": rows_launch(90, 128, case=case),
        "rows, padding and window": rows_launch(90, 128, padded=True, window=100, case=case),
        "codes": block_max_launch(90, 128, case=case),
        "codes, uneven": block_max_launch(90, 128, uneven=True, softcap=30.0, case=case),
        "rounding": quantize_launch(128, case=case),
        "rounding in groups": quantize_launch(128, group_size=32, case=case),
        "antidiagonals": antidiagonal_launch(90, 128, case=case),
        "antidiagonals, padding": antidiagonal_launch(90, 128, padded=True, case=case),
    }
keys = {}
for place in json.load(sys.stdin):
    for kind, launch in kinds(Case(*place)).items():
        keys.setdefault(kind, []).append(specialisation_key(launch))
print(json.dumps(keys))
"""

Spec = tuple[int, int, str, dict[str, Any]]

QUICK: list[Spec] = [
    *((architecture, head_dim, "bfloat16", {}) for architecture in (80, 90, 100) for head_dim in (64, 128)),
    (90, 128, "float16", {"window": 300, "some_heads": True}),
    (90, 128, "float32", {}),
    (90, 128, "bfloat16", {"rows": True, "padded": True}),
    (90, 128, "int4", {}),
    (90, 128, "bfloat16", {"stride": 8}),
    (90, 64, "bfloat16", {"skip": True, "block_q": 64}),
    (90, 128, "bfloat16", {"block_q": 64}),
    (90, 128, "bfloat16", {"block_q": 64, "shared": False}),
]
FULL: list[Spec] = [
    (80, 128, "int4", {}),
    *((architecture, 256, "bfloat16", {}) for architecture in (80, 90, 100)),
    *((architecture, head_dim, "float16", {}) for architecture in (80, 90, 100) for head_dim in (16, 80, 96, 192)),
    *((architecture, head_dim, "float32", {}) for architecture in (80, 90, 100) for head_dim in (64, 128)),
    *((architecture, 128, "bfloat16", {"block_q": 64, "window": 300}) for architecture in (80, 90, 100)),
    *(
        (architecture, dim, "bfloat16", {"block_q": 64, "shared": False})
        for architecture in (80, 90, 100)
        for dim in (64, 128)
    ),
    *((architecture, 128, "bfloat16", {"tiling": {"descriptors": False}}) for architecture in (90, 100)),
    *((90, dim, "bfloat16", {"block_k": 128, "padded": True, "window": 300}) for dim in (48, 64)),
    *(
        (90, 64, "float16", {"block_k": 128, **more})
        for more in ({"softcap": 30.0}, {"block_q": 64}, {"values": False})
    ),
    (90, 64, "bfloat16", {"block_k": 128, "block_q": 64, "shared": False}),
    *((architecture, 128, "bfloat16", {"padded": True, "softcap": 30.0}) for architecture in (80, 90, 100)),
    *((architecture, 128, "bfloat16", {"values": False}) for architecture in (80, 90, 100)),
    *((architecture, 128, "bfloat16", {"some_heads": True}) for architecture in (80, 90, 100)),
    *((arch, dim, "bfloat16", {"skip": True, "block_q": 64}) for arch in (80, 90, 100) for dim in (64, 128, 256)),
    *((architecture, 128, "float16", {"skip": True}) for architecture in (80, 90, 100)),
    *((architecture, 64, "bfloat16", {"skip": True, "window": 300}) for architecture in (80, 90, 100)),
    *((architecture, 80, "bfloat16", {"skip": True, "values": False}) for architecture in (80, 90, 100)),
    *(
        (architecture, 64, "bfloat16", {"skip": True, "padded": True, "softcap": 30.0})
        for architecture in (80, 90, 100)
    ),
    (80, 128, "float32", {"skip": True, "padded": True, "some_heads": True}),
    *((architecture, 128, "bfloat16", {"skip": True, "block_q": 48, "block_k": 40}) for architecture in (80, 100)),
    *((architecture, head_dim, "bfloat16", {"rows": True}) for architecture in (80, 90, 100) for head_dim in (64, 128)),
    *((90, 128, dtype, {"rows": True, "softcap": 30.0, "window": 300}) for dtype in ("float16", "float32")),
    *((architecture, 128, f"int{bits}", {}) for architecture in (80, 90, 100) for bits in (2, 4, 8)),
    *((architecture, 128, "int4", {"uneven": True}) for architecture in (80, 90, 100)),
    *((architecture, 128, "int4", {"softcap": 30.0, "block_k": 32}) for architecture in (80, 90, 100)),
    *((architecture, 128, "int4", {"block_q": 128, "block_k": 128}) for architecture in (80, 90, 100)),
    *((architecture, 128, "int4", {"block_q": 16, "block_k": 16, "group": 7}) for architecture in (80, 90, 100)),
    *((architecture, head_dim, "int4", {}) for architecture in (80, 90, 100) for head_dim in (64, 80, 256)),
    *((architecture, 128, "bfloat16", {"group_size": size}) for architecture in (80, 90, 100) for size in (1, 32)),
    (90, 256, "float32", {"group_size": 200}),
    *((architecture, 128, "bfloat16", {"stride": size}) for architecture in (80, 90, 100) for size in (4, 8, 16)),
    *((architecture, 128, "bfloat16", {"stride": 8, "block_k": 128}) for architecture in (80, 90, 100)),
    *((architecture, 128, "bfloat16", {"stride": 16, "block_k": 16}) for architecture in (80, 90, 100)),
    *(
        (architecture, head_dim, "float16", {"stride": 8})
        for architecture in (80, 90, 100)
        for head_dim in (64, 80, 256)
    ),
    *((architecture, 128, "float16", {"stride": 8, "padded": True}) for architecture in (80, 90, 100)),
    *((architecture, 128, "float16", {"stride": 8, "softcap": 30.0}) for architecture in (80, 90, 100)),
    *((architecture, 128, "float32", {"stride": 8}) for architecture in (80, 90, 100)),
]


def elsewhere(script: str, given: Any) -> Any:
    """What a script prints in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(given), text=True, env=environment, capture_output=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def compiled(specs: list[Spec]) -> list[dict[str, Any]]:
    kernels: list[dict[str, Any]] = elsewhere(SCRIPT, specs)
    return kernels


def check(kernel: dict[str, Any]) -> None:
    assert kernel["shared"] <= kernel["estimated"] <= kernel["shared_limit"], kernel
    if max(kernel["head_dim"], kernel["value_dim"]) <= 128:
        assert kernel["stack"] == 0, kernel
        assert kernel["local"] == 0, kernel
    if kernel["block_q"] == 0:
        return  # rounding multiplies nothing
    assert kernel["async_copy"] + kernel["tma"] > 0, kernel
    assert (kernel["tma"] > 0) == kernel["descriptors"], kernel
    products = {80: "mma", 90: "wgmma", 100: "tcgen05"}[kernel["architecture"]]
    if kernel["dtype"].startswith("int"):
        # Triton knows no tcgen05 products of bytes
        assert kernel["integer"] == kernel["mma"] + kernel["wgmma"] > 0, kernel
        assert (kernel["wgmma"] > 0) == (kernel["architecture"] == 90), kernel
    elif kernel["dtype"] != "float32":
        assert kernel[products] > 0, kernel
    else:
        assert kernel["mma"] == kernel["wgmma"] == kernel["tcgen05"] == 0, "float32 would be rounded to TF32"
        assert kernel["fma"] > 0, kernel


def programs(kernel: dict[str, Any]) -> int:
    return programs_that_fit(kernel["architecture"], kernel["registers"], kernel["warps"], kernel["shared"])


def test_kernels_fit_and_do_not_spill() -> None:
    kernels = compiled(QUICK)
    assert len(kernels) == len(QUICK)
    for kernel in kernels:
        check(kernel)
    described = {(kernel["architecture"], kernel["head_dim"]) for kernel in kernels if kernel["descriptors"]}
    assert described == {(90, 64), (90, 128), (100, 64), (100, 128)}
    assert [kernel["heads"] for kernel in kernels[-2:]] == [2, 1]
    assert [programs(kernel) for kernel in kernels[-2:]] == [1, 2]


@pytest.mark.slow
def test_more_kernels_fit_and_do_not_spill() -> None:
    for (_, _, _, options), kernel in zip(FULL, compiled(FULL), strict=True):
        check(kernel)
        if options.get("shared") is False:  # tiles of 64 rows: one program waits while another multiplies
            assert programs(kernel) >= 2, kernel


PLACES: list[tuple[int, int, str]] = [
    *((length, 0, "cpu") for length in (4096, 5000, 5001, 100_003)),
    *((length, start, "cpu") for length in (4096, 5001) for start in (1, 4096)),
]


@pytest.mark.parametrize(
    "places",
    # the last is so long that some strides need 64 bits; nothing of it is held
    [PLACES, pytest.param([PLACES[0], (2_200_001, 0, "meta")], marks=pytest.mark.slow)],
    ids=["lengths", "millions"],
)
def test_what_was_compiled_serves_every_length(places: list[tuple[int, int, str]]) -> None:
    """Lengths odd and even, and a chunk's start: each kind of mask of each kernel has one key."""
    keys = elsewhere(KEYS, places)
    for kind, found in keys.items():
        assert len(found) == len(places)
        assert len(set(found)) == 1, f"{kind} is compiled again: {set(found)}"
    assert len({found[0] for found in keys.values()}) == len(keys), "a key that says nothing"


@pytest.mark.slow
def test_warps_that_do_nothing_but_fetch() -> None:
    """Both loops take part, or the compiler fails. A few bytes spill, which only a GPU can weigh."""
    specialise = {"tiling": {"specialise": True}}
    for kernel in compiled(
        [(100, dim, "bfloat16", specialise | options) for dim in (64, 128) for options in ({}, {"window": 300})]
    ):
        assert kernel["shared"] <= kernel["estimated"], kernel
        assert kernel["async_copy"] == 0 < kernel["tma"], kernel
        assert kernel["tcgen05"] > 0, kernel
        assert kernel["stack"] <= 16, kernel


def test_the_table(tmp_path: Any) -> None:
    """The command line prints one row for each kernel and leaves a cache that the user named alone."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "sparseprefill.kernels.triton_inspect", "--architecture", "90", "--head-dim", "16"],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    titles, row = run.stdout.splitlines()
    assert titles.split()[:3] == ["architecture", "dtype", "head_dim"]
    assert row.split()[:3] == ["90", "bfloat16", "16"]
    assert any(tmp_path.iterdir())
