"""Compiles the kernel for GPUs that are not there, and reads what the compiler made of it.

python -m sparseprefill.kernels.triton_inspect prints a table; needs Triton's NVIDIA backend and no GPU.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.kernels.low_bit import EstimatedLogits, LowBit
from sparseprefill.kernels.roofline import ACCELERATORS, Bound, Step, bound, programs_that_fit
from sparseprefill.kernels.triton_antidiagonal import (
    antidiagonal_arguments,
    antidiagonal_kernel,
    antidiagonal_tiling,
)
from sparseprefill.kernels.triton_forward import (
    DeviceLimits,
    choose_for,
    forward_kernel,
    interpreted,
    kernel_arguments,
)
from sparseprefill.kernels.triton_low_bit import (
    block_max_arguments,
    block_max_kernel,
    code_tile,
    low_bit_tiling,
    quantize_arguments,
    quantize_kernel,
)
from sparseprefill.kernels.triton_rows import rows_arguments, rows_kernel, rows_tiling

# shared memory that a block may use, in bytes (CUDA programming guide, table of compute capabilities)
SHARED_LIMITS = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
# instructions worth counting: tensor core products by generation, float32 products without them, asynchronous copies
_INSTRUCTIONS = {
    "mma": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "integer": r"\b(?:w?g?mma\S*\.s32\.s8\.s8|tcgen05\.mma\S*kind::i8)",
    "fma": r"\bfma\.rn\.f32",
    "async_copy": r"\bcp\.async\.c",
    "tma": r"\bcp\.async\.bulk\.tensor\.\d+d\.shared",
    "exponentials": r"\bex2\.approx",
}
_POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8", torch.int8: "*i8",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """One specialisation of the kernel on one architecture."""

    architecture: int
    head_dim: int
    value_dim: int
    dtype: str
    block_q: int  # of a tile
    block_k: int
    warps: int
    stages: int
    heads: int  # stacked in a tile
    descriptors: bool  # the copy engine fetches keys and values
    estimated: int  # bytes of shared memory that the tiling reckoned with
    shared: int  # bytes a block uses
    shared_limit: int
    registers: int  # of a thread
    stack: int  # bytes of a thread; more than 0 means that registers spilled
    local: int
    mma: int
    wgmma: int
    tcgen05: int
    integer: int  # of these products, those of bytes
    fma: int
    async_copy: int
    tma: int  # copies of whole tiles
    exponentials: int


@dataclass(frozen=True, slots=True)
class Tile:
    """What is compiled, for the report."""

    head_dim: int
    value_dim: int
    dtype: str
    block_q: int
    block_k: int
    warps: int
    stages: int
    heads: int = 1
    descriptors: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """Where inputs stand: how many queries, the cache slot of the first, the device ("meta" holds no memory)."""

    queries: int = 1024
    query_start: int = 0
    device: str = "cpu"

    @property
    def keys(self) -> int:
        return self.query_start + self.queries


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel and what it would be launched with."""

    kernel: Any
    arguments: dict[str, object]
    tile: Tile
    estimate: int  # bytes of shared memory that the tiling reckons with
    options: dict[str, Any] = field(default_factory=dict)


def compile_kernel(architecture: int, head_dim: int, *args: Any, **options: Any) -> CompiledKernel:
    """The attention kernel compiled; see `forward_launch`."""
    return _compiled(forward_launch(architecture, head_dim, *args, **options), architecture)


def forward_launch(
    architecture: int,
    head_dim: int,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    block_q: int = 128,
    block_k: int = 64,
    values: bool = True,
    padded: bool = False,
    some_heads: bool = False,
    skip: bool = False,
    float32_dots: str = "ieee",
    shared: bool = True,
    tiling: dict[str, Any] | None = None,
    case: Case = Case(),
    **fields: Any,
) -> Launch:
    """A launch on causal inputs laid out like a model's; `fields` go to AttentionInputs.

    `block_q` and `block_k` are those of the index; `shared`: its heads share their lists; `skip`: its tiles may be
    skipped, and have an order of visits; `tiling`: fields of the tiling to be other than chosen. Raises ValueError
    where no tiling fits the architecture.
    """
    value_dim = value_dim or head_dim
    inputs, index = _model_like(head_dim, value_dim, dtype, block_q, block_k, padded, case, fields)
    limit, capability = SHARED_LIMITS[architecture], divmod(architecture, 10)
    only = torch.ones(inputs.query.shape[:2], dtype=torch.bool, device=case.device) if some_heads else None
    skipped = None
    if not shared:
        index = replace(index, start=index.start.contiguous(), count=index.count.contiguous())
    if skip:
        index = replace(index.skipping(0.0), visit=index.columns.clone())
        skipped = torch.zeros(8 * index.grid.rows, 1, dtype=torch.int32, device=case.device)
    chosen = choose_for(inputs, index, only, DeviceLimits(capability, limit, 0))
    if chosen is None:
        raise ValueError(f"no tiling fits {head_dim=}, {value_dim=}, {dtype} into {limit} bytes")
    chosen = replace(chosen, **tiling or {})
    shape = (1, case.queries, 8, value_dim)
    output = torch.empty(shape, dtype=dtype, device=case.device).transpose(1, 2) if values else None
    lse = torch.empty(inputs.query.shape[:3], dtype=torch.float32, device=case.device)
    arguments = kernel_arguments(inputs, index, output, lse, chosen, 32 << 20, float32_dots, only, skipped)
    tile = Tile(
        head_dim, value_dim, _name(dtype), chosen.block_q, chosen.block_k, chosen.warps, chosen.stages, chosen.heads,
        chosen.descriptors,
    )  # fmt: skip
    return Launch(forward_kernel, arguments, tile, chosen.shared_bytes(head_dim, value_dim, dtype))


def compile_rows(architecture: int, head_dim: int, *args: Any, **options: Any) -> CompiledKernel:
    """The kernel that computes the lse of some rows, compiled; see `rows_launch`."""
    return _compiled(rows_launch(architecture, head_dim, *args, **options), architecture)


def rows_launch(
    architecture: int,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    padded: bool = False,
    case: Case = Case(),
    **fields: Any,
) -> Launch:
    """As `forward_launch`, of the kernel that computes the lse of some rows."""
    inputs, _ = _model_like(head_dim, head_dim, dtype, 64, 64, padded, case, fields)
    limit = SHARED_LIMITS[architecture]
    tiling = rows_tiling(head_dim, dtype, limit, divmod(architecture, 10))
    if tiling is None:
        raise ValueError(f"no tiling fits {head_dim=}, {dtype} into {limit} bytes")
    arguments, _ = rows_arguments(inputs, torch.arange(144, device=case.device)[None], tiling)
    tile = Tile(head_dim, head_dim, _name(dtype), tiling.block_q, tiling.block_k, tiling.warps, tiling.stages)
    return Launch(rows_kernel, arguments, tile, tiling.shared_bytes(head_dim, head_dim, dtype))


def compile_block_max(architecture: int, head_dim: int, *args: Any, **options: Any) -> CompiledKernel:
    """The kernel that scores tiles from codes of few bits, compiled; see `block_max_launch`."""
    return _compiled(block_max_launch(architecture, head_dim, *args, **options), architecture)


def block_max_launch(
    architecture: int,
    head_dim: int,
    bits: int = 4,
    *,
    block_q: int = 64,
    block_k: int = 64,
    group: int = 4,
    softcap: float | None = None,
    uneven: bool = False,
    case: Case = Case(),
) -> Launch:
    """As `forward_launch`, of the kernel that scores tiles from codes of `bits` bits.

    `block_q` counts the queries of all heads of a tile.
    """
    limit = SHARED_LIMITS[architecture]
    tiling = low_bit_tiling(block_q, block_k, group, head_dim, bits, limit, divmod(architecture, 10))
    if tiling is None:
        raise ValueError(f"no tiling fits {head_dim=}, {bits=} into {limit} bytes")
    heads, rows, device = 2 * group, -(-case.queries // block_q), torch.device(case.device)
    with device:
        per_query, per_key = torch.empty(1, heads, rows * block_q), torch.empty(1, heads, case.keys)
        bound = torch.zeros(1, rows * block_q, dtype=torch.int32)
        logits = EstimatedLogits(
            _codes(heads, rows * block_q, head_dim, bits), _codes(2, case.keys, head_dim, bits), per_key, per_query,
            per_query, bound, bound, torch.zeros(1, dtype=torch.int64), block_q, block_k, -(-case.keys // block_k),
            head_dim**-0.5, softcap,
        )  # fmt: skip
        best = torch.empty(1, heads, rows, logits.key_blocks)
    tile = Tile(
        head_dim, 0, f"int{bits}", tiling.block_q * tiling.heads, tiling.block_k, tiling.warps, tiling.stages
    )  # fmt: skip
    arguments = block_max_arguments(logits, best, tiling, case.keys, uneven)
    options = tiling.options(uneven, softcap is not None)
    return Launch(block_max_kernel, arguments, tile, tiling.shared_bytes(head_dim, bits), options)


def compile_quantize(architecture: int, head_dim: int, *args: Any, **options: Any) -> CompiledKernel:
    """The kernel that rounds vectors to few bits, compiled; see `quantize_launch`."""
    return _compiled(quantize_launch(head_dim, *args, **options), architecture)


def quantize_launch(
    head_dim: int,
    bits: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    *,
    group_size: int = 1,
    case: Case = Case(),
) -> Launch:
    """As `forward_launch`, of the kernel that rounds vectors to `bits` bits."""
    with torch.device(case.device):
        key = torch.empty(1, 2, case.keys, head_dim, dtype=dtype)
        codes, anchor = _codes(2, case.keys, head_dim, bits), torch.zeros(1, dtype=torch.int64)
        arguments = quantize_arguments(key, torch.zeros(1, 2, head_dim), codes, group_size, anchor, None)
    together = int(str(arguments["BLOCK_T"]))
    tile = Tile(head_dim, 0, _name(dtype), 0, together, 4, 1)
    # what a reduction may need: the numbers of a tile
    estimate = 2 * together * code_tile(head_dim) * 4
    return Launch(quantize_kernel, arguments, tile, estimate, {"enable_fp_fusion": False})


def compile_antidiagonal(architecture: int, head_dim: int, *args: Any, **options: Any) -> CompiledKernel:
    """The kernel that scores antidiagonals, compiled; see `antidiagonal_launch`."""
    return _compiled(antidiagonal_launch(architecture, head_dim, *args, **options), architecture)


def antidiagonal_launch(
    architecture: int,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    stride: int = 8,
    block_k: int = 64,
    padded: bool = False,
    case: Case = Case(),
    **fields: Any,
) -> Launch:
    """As `forward_launch`, of the kernel that scores antidiagonals; the tile counts groups of `stride` tokens."""
    inputs, index = _model_like(head_dim, head_dim, dtype, block_k, block_k, padded, case, fields)
    limit = SHARED_LIMITS[architecture]
    tiling = antidiagonal_tiling(block_k, stride, inputs.group_size, head_dim, dtype, limit)
    if tiling is None:
        raise ValueError(f"no tiling fits {head_dim=}, {stride=}, {dtype} into {limit} bytes")
    groups = -(-case.queries // stride)
    with torch.device(case.device):
        occupied = torch.ones(1, -(-case.keys // stride), dtype=torch.bool) if padded else None
        bound = torch.zeros(1, groups, dtype=torch.int32)
        lse = torch.empty(1, 8, groups, index.grid.key_blocks)
    arguments = antidiagonal_arguments(
        inputs, lse, tiling, stride=stride, block_k=block_k,
        anchor=index.grid.anchor, first_group=index.grid.first, low=bound, high=bound, occupied=occupied,
    )  # fmt: skip
    tile = Tile(head_dim, 0, _name(dtype), tiling.groups * tiling.heads, tiling.keys, tiling.warps, tiling.stages)
    return Launch(antidiagonal_kernel, arguments, tile, tiling.shared_bytes(dtype))


def _codes(heads: int, tokens: int, head_dim: int, bits: int) -> LowBit:
    size = -(-head_dim // 8) * (8 if bits == 8 else 4)
    codes = torch.empty(1, heads, tokens, size, dtype=torch.int8)
    return LowBit(codes, torch.empty(1, heads, tokens), bits, head_dim)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _built(launch: Launch, architecture: int) -> Any:
    """What Triton's compiler returns."""
    if interpreted():
        raise RuntimeError("nothing can be compiled under TRITON_INTERPRET=1")
    signature, constants, attributes = specialise(launch.arguments, launch.kernel)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    with _cache():
        return triton.compile(
            source,
            target=GPUTarget("cuda", architecture, 32),
            options={"num_warps": launch.tile.warps, "num_stages": launch.tile.stages, **launch.options},
        )


def _compiled(launch: Launch, architecture: int) -> CompiledKernel:
    return _read(launch, architecture, _built(launch, architecture))


def _read(launch: Launch, architecture: int, compiled: Any) -> CompiledKernel:
    tile = launch.tile
    assembly = compiled.asm["ptx"]
    return CompiledKernel(
        architecture, tile.head_dim, tile.value_dim, tile.dtype,
        tile.block_q, tile.block_k, tile.warps, tile.stages, tile.heads, tile.descriptors,
        launch.estimate, compiled.metadata.shared, SHARED_LIMITS[architecture],
        **_resources(compiled.asm["cubin"]),
        **{name: len(re.findall(pattern, assembly)) for name, pattern in _INSTRUCTIONS.items()},
    )  # fmt: skip


def specialisation_key(launch: Launch, architecture: int = 90) -> str:
    """What Triton looks a compiled kernel up by: types, constants, divisibility, options. Its own code says it.

    Launches of equal keys share what was compiled once. Raises RuntimeError under the interpreter, which has none.
    """
    if interpreted():
        raise RuntimeError("there is nothing to look up under TRITON_INTERPRET=1")
    options = {"num_warps": launch.tile.warps, "num_stages": launch.tile.stages, **launch.options}
    _, found, _ = _binder(launch.kernel, architecture)(**launch.arguments, **options)
    names = (parameter.name for parameter in launch.kernel.params)
    return str([*zip(names, found, strict=True), *sorted(options.items())])


@functools.lru_cache
def _binder(kernel: Any, architecture: int) -> Any:
    backend = make_backend(GPUTarget("cuda", architecture, 32))
    return create_function_from_signature(kernel.signature, kernel.params, backend)


def specialise(
    arguments: dict[str, object], kernel: Any = forward_kernel
) -> tuple[dict[str, str], dict[tuple[int], object], dict[tuple[int], Any]]:
    """Signature, constants and attributes as Triton derives them from the arguments of a launch.

    Pointers and integers that 16 divides are marked so, the integer 1 and None become constants, except in the
    parameters that the kernel does not specialise.
    """
    signature: dict[str, str] = {}
    constants: dict[tuple[int], object] = {}
    attributes: dict[tuple[int], Any] = {}
    for parameter in kernel.params:
        value, place = arguments[parameter.name], (parameter.num,)
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (free and type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[place] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[place] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            kind = _POINTERS[value.base.dtype].removeprefix("*")
            signature[parameter.name] = f"tensordesc<{kind}{list(value.block_shape)}>"
        elif isinstance(value, int):
            signature[parameter.name] = parameter.annotation_type or ("i32" if abs(value) < 1 << 31 else "i64")
            if free and value % 16 == 0:
                attributes[place] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    return signature, constants, attributes


def _model_like(
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    block_q: int,
    block_k: int,
    padded: bool,
    case: Case,
    fields: dict[str, Any],
) -> tuple[AttentionInputs, BlockIndex]:
    """Eight query heads over two KV heads; tokens outside heads for the query, inside for the cache."""
    with torch.device(case.device):
        query = torch.empty(1, case.queries, 8, head_dim, dtype=dtype).transpose(1, 2)
        key = torch.empty(1, 2, case.keys, head_dim, dtype=dtype)
        value = torch.empty(1, 2, case.keys, value_dim, dtype=dtype)
        if padded:
            fields["key_valid"] = torch.ones(1, case.keys, dtype=torch.bool)
    inputs = AttentionInputs(query, key, value, head_dim**-0.5, query_start=case.query_start, **fields)
    return inputs, BlockIndex.dense(inputs, BlockGrid.of(inputs, block_q, block_k))


def _asked(tool: str, option: str, binary: bytes) -> str:
    """What one of NVIDIA's tools that come with Triton says of a binary."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([path, option, file.name], check=True, capture_output=True, text=True).stdout


def step_instructions(disassembly: str) -> int:
    """Instructions of the shortest loop that multiplies on the tensor cores: a step without masks.

    A loop is what lies between a branch back and where it goes; waits for copies stand in loops of their own, and are
    counted once.
    """
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in disassembly.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(found[1])
    back = (
        (labels.get(target[1], len(instructions)), place + 1)
        for place, text in enumerate(instructions)
        if (target := re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", text))
    )
    lengths = [
        stop - start
        for start, stop in back
        if start < stop and any(re.search(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b", each) for each in instructions[start:stop])
    ]
    if not lengths:
        raise ValueError("no loop multiplies on the tensor cores: a kernel of float16 or bfloat16 is needed")
    return min(lengths)


def _resources(binary: bytes) -> dict[str, int]:
    report = _asked("cuobjdump", "--dump-resource-usage", binary)
    found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    return {"registers": found["REG"], "stack": found["STACK"], "local": found["LOCAL"]}


@contextmanager
def _cache() -> Iterator[None]:
    """The user's Triton cache where one is named, else one that is thrown away."""
    if "TRITON_CACHE_DIR" in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["TRITON_CACHE_DIR"]


@dataclass(frozen=True, slots=True)
class Roofline:
    """What was compiled for an architecture, and what bounds it on each of its GPUs. Counted, not timed."""

    kernel: CompiledKernel
    step: Step
    instructions: int  # of a warp, in a step without masks
    programs: int  # that a multiprocessor holds
    bounds: dict[str, Bound]  # by the GPU's name


def roofline(architecture: int, head_dim: int, **options: Any) -> Roofline:
    """Compile the attention kernel as `forward_launch` says, in a half precision, and reckon."""
    launch = forward_launch(architecture, head_dim, **options)
    compiled = _built(launch, architecture)
    kernel = _read(launch, architecture, compiled)
    step = Step(kernel.block_q, kernel.block_k, kernel.head_dim, kernel.value_dim)
    instructions = step_instructions(_asked("nvdisasm", "-c", compiled.asm["cubin"]))
    programs = programs_that_fit(architecture, kernel.registers, kernel.warps, kernel.shared)
    bounds = {
        each.name: bound(step, each, instructions, kernel.warps)
        for each in ACCELERATORS
        if each.architecture == architecture
    }
    return Roofline(kernel, step, instructions, programs, bounds)


def roofline_tables(rooflines: Sequence[Roofline]) -> list[tuple[list[str], list[list[str]]]]:
    """Titles and rows of two tables: what the compiler made, and what bounds it."""
    made = [
        "capability", "head_dim", "tile", "heads", "warps", "registers", "spills", "shared KiB", "programs",
        "mma / wgmma / tcgen05", "TMA", "instructions", "KiB loaded", "MFLOP", "FLOP / byte", "FLOP / exp",
    ]  # fmt: skip
    bounds = [
        "GPU", "head_dim", "tensor cores", "exponentials", "instructions", "bound by", "overlapped", "in turn",
        "L2 at peak, TB/s", "reuse in L2",
    ]  # fmt: skip
    rows, bound_rows = [], []
    for each in rooflines:
        kernel, step = each.kernel, each.step
        rows.append([
            f"{kernel.architecture / 10:.1f}", str(kernel.head_dim), f"{kernel.block_q} x {kernel.block_k}",
            str(kernel.heads), str(kernel.warps), str(kernel.registers), str(kernel.stack + kernel.local),
            f"{kernel.shared / 1024:.0f}", str(each.programs), f"{kernel.mma} / {kernel.wgmma} / {kernel.tcgen05}",
            str(kernel.tma), str(each.instructions), f"{step.loaded / 1024:.0f}", f"{step.flops / 1e6:.1f}",
            f"{step.intensity:.0f}", f"{step.flops / step.exponentials:.0f}",
        ])  # fmt: skip
        for accelerator in ACCELERATORS:
            if accelerator.name not in each.bounds:
                continue
            found = each.bounds[accelerator.name]
            bound_rows.append([
                accelerator.name, str(kernel.head_dim), f"{found.tensor:.0f}", f"{found.exponential:.0f}",
                f"{found.issue:.0f}", found.resource, f"{found.overlapped:.0%}", f"{found.in_turn:.0%}",
                f"{accelerator.flops / step.intensity / 1e12:.1f}", f"{found.reuse:.1f}",
            ])  # fmt: skip
    return [(made, rows), (bounds, bound_rows)]


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> str:
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in (titles, ["---"] * len(titles), *rows)]
        return "\n".join(line.replace("| --- ", "|---").replace("|--- |", "|---|") for line in lines)
    widths = [max(len(row[place]) for row in (titles, *rows)) for place in range(len(titles))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (titles, *rows)
    )


_COLUMNS = (
    "architecture", "dtype", "head_dim", "value_dim", "block_q", "block_k", "heads", "warps", "stages", "shared",
    "estimated", "registers", "stack", "local", "mma", "wgmma", "tcgen05", "integer", "async_copy", "tma",
)  # fmt: skip


@click.command()
@click.option("--architecture", "architectures", multiple=True, type=int, help="80, 90, 100; may be repeated.")
@click.option("--head-dim", "head_dims", multiple=True, type=int, help="May be repeated.")
@click.option("--dtype", "dtypes", multiple=True, help="bfloat16, float16, float32; may be repeated.")
@click.option("--block-q", default=128, show_default=True)
@click.option("--block-k", default=64, show_default=True)
@click.option("--window", type=int, help="Compile the kernel for sliding windows.")
@click.option("--float32-dots", default="ieee", show_default=True, type=click.Choice(["ieee", "tf32x3"]))
@click.option("--bits", type=int, help="The kernel that scores tiles from codes of 2, 4 or 8 bits instead.")
@click.option(
    "--roofline", "as_roofline", is_flag=True, help="What bounds a step on published rates: counted, not timed."
)
@click.option("--own-lists", is_flag=True, help="Heads do not share their lists, and are not stacked in a tile.")
@click.option("--markdown", is_flag=True, help="With --roofline: tables for a page.")
@click.option("--json", "as_json", is_flag=True, help="One JSON list instead of a table.")
def main(
    architectures: tuple[int, ...],
    head_dims: tuple[int, ...],
    dtypes: tuple[str, ...],
    block_q: int,
    block_k: int,
    window: int | None,
    float32_dots: str,
    bits: int | None,
    as_roofline: bool,
    own_lists: bool,
    markdown: bool,
    as_json: bool,
) -> None:
    """What the compiler makes of the kernel: shared memory, registers, spills and instructions."""
    if markdown and not as_roofline:
        raise click.UsageError("--markdown goes with --roofline")
    if as_roofline:
        if dtypes or bits is not None or as_json or float32_dots != "ieee":
            raise click.UsageError(
                "--roofline goes with none of --dtype, --float32-dots, --bits and --json: it is of bfloat16"
            )
        found = [
            roofline(each, dim, block_q=block_q, block_k=block_k, window=window, shared=not own_lists)
            for each in architectures or tuple(SHARED_LIMITS)
            for dim in head_dims or (64, 128)
        ]
        click.echo(f"counted, not timed (triton {triton.__version__}, bfloat16, blocks of {block_q} x {block_k})")
        for titles, cells in roofline_tables(found):
            click.echo("\n" + _table(titles, cells, markdown))
        return
    everywhere = [(each, dim) for each in architectures or tuple(SHARED_LIMITS) for dim in head_dims or (64, 128, 256)]
    if bits is not None:
        if dtypes or window is not None or own_lists:
            raise click.UsageError("--bits goes with none of --dtype, --window and --own-lists: it scores codes")
        kernels = [compile_block_max(*each, bits, block_q=block_q, block_k=block_k) for each in everywhere]
    else:
        kernels = [
            compile_kernel(
                architecture, head_dim, dtype=getattr(torch, dtype), block_q=block_q, block_k=block_k,
                float32_dots=float32_dots, window=window, shared=not own_lists,
            )
            for dtype in dtypes or ("bfloat16",)
            for architecture, head_dim in everywhere
        ]  # fmt: skip
    rows = [asdict(kernel) for kernel in kernels]
    if as_json:
        click.echo(json.dumps(rows))
        return
    click.echo("  ".join(_COLUMNS))
    for row in rows:
        click.echo("  ".join(str(row[name]).rjust(len(name)) for name in _COLUMNS))


if __name__ == "__main__":
    main()
