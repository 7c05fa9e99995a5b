"""How long attention over some blocks takes, next to what a user would run instead, and whether it is right.

Every ratio comes from one run on one machine: our kernels, torch's dense causal attention, and FlexAttention (compiled,
static, warm, grouped heads enabled) on the very same mask, at its better block size of 64 and 128. Timed calls are
interleaved, so that a machine that slows down slows all of them. A cell whose result is wrong is an error, not a ratio.
"""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, AttentionOutput, BlockGrid, BlockIndex
from sparseprefill.coverage import coverage
from sparseprefill.kernels import IMPLEMENTATIONS, block_sparse_attention, why_not
from sparseprefill.kernels.join import join_outputs
from sparseprefill.kernels.reference import reference_attention
from sparseprefill.patterns.parts import Part, placed
from sparseprefill.profile_memory import available_bytes, longest_that_fits, out_of_memory
from sparseprefill.reports import number, table

_BLOCK = 64  # granularity of the masks


RIVALS = ("dense", "flex")
"""What a kernel is timed against: torch's dense causal attention, and compiled FlexAttention on the same mask."""


@dataclass(frozen=True, slots=True)
class KernelCell:
    """One shape and density; seconds are medians of calls that are warm."""

    dtype: str  # of queries, keys and values
    head_dim: int  # of keys and values
    length: int  # tokens
    density: float  # pairs computed over visible pairs
    ours: dict[str, float]  # seconds of each implementation
    dense: float  # seconds of torch's dense causal attention
    flex: float | None  # seconds of FlexAttention on the same mask; None where it is not a rival or cannot be compiled
    flex_block: int | None  # its better block size
    error: dict[str, float]  # of each implementation, the largest difference to the float64 oracle on sampled rows
    first: dict[str, float]  # seconds of the first call, whatever is compiled or allocated among them

    @property
    def ideal(self) -> float:
        """Density x the time of dense attention, seconds."""
        return self.density * self.dense

    def over_ideal(self, kernel: str) -> float | None:
        """An implementation's time over the ideal; None where it did not serve."""
        return self.ours[kernel] / self.ideal if kernel in self.ours else None

    def over_flex(self, kernel: str) -> float | None:
        """An implementation's time over FlexAttention's."""
        return self.ours[kernel] / self.flex if kernel in self.ours and self.flex is not None else None

    def over_dense(self, kernel: str) -> float | None:
        """An implementation's time over that of dense attention."""
        return self.ours[kernel] / self.dense if kernel in self.ours else None


def why_no_flex(device: str) -> str | None:
    """Why compiled FlexAttention cannot run here, or None."""
    if device == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "no C++ compiler (g++ or clang++) is installed, and FlexAttention is compiled with one on the CPU"
    return None


def kernels_for(inputs: AttentionInputs) -> tuple[dict[str, None], dict[str, str]]:
    """The implementations that `auto` would ask for these inputs, in its order; and why others of them cannot serve."""
    asked = [name for name, each in IMPLEMENTATIONS.items() if each.automatic(inputs)]
    reasons = {name: reason for name in asked if (reason := why_not(name, inputs)) is not None}
    return {name: None for name in asked if name not in reasons}, reasons


def kernel_cells(
    *,
    device: str,
    lengths: Sequence[int] = (16384,),
    densities: Sequence[float] = (0.1, 0.25, 0.5),
    head_dims: Sequence[int] = (64, 128),
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32),
    query_heads: int = 8,
    kv_heads: int = 2,
    against: Sequence[str] = RIVALS,
    repeats: int = 5,
    seed: int = 0,
    progress: Callable[[int], Any] = lambda steps: None,
) -> list[KernelCell]:
    """Time random block masks (the diagonal always kept), the same for every contender.

    Every implementation that `auto` would take is timed. `against`: of RIVALS; dense attention is timed in any case, as
    it says what is ideal.

    Raises ValueError for an unknown rival, for lengths that are not multiples of 128, and where our result, or
    FlexAttention's, is not attention over those blocks. MemoryError names the cell that did not fit, and a length
    that should.
    """
    for name in against:
        if name not in RIVALS:
            raise ValueError(f"there is no rival {name!r:.80}: name {' or '.join(RIVALS)}")
    for length in lengths:
        if length < 128 or length % 128:
            raise ValueError(f"the kernel is timed at multiples of 128 tokens, got {length}")
    cells = []
    flex = "flex" in against and why_no_flex(device) is None
    for dtype in dtypes:
        for head_dim in head_dims:
            for length in lengths:
                try:
                    inputs = random_inputs(query_heads, kv_heads, length, head_dim, dtype, device, seed)
                    for wanted in densities:
                        cells.append(_cell(inputs, _random_index(inputs, wanted, seed), flex, repeats))
                        progress(1)
                except (MemoryError, RuntimeError) as error:
                    if not out_of_memory(error):
                        raise
                    raise MemoryError(_what_fits(query_heads, kv_heads, length, head_dim, dtype, device)) from error
    return cells


def _what_fits(query_heads: int, kv_heads: int, length: int, head_dim: int, dtype: torch.dtype, device: str) -> str:
    """What to say where a cell ran out of memory."""

    def need(tokens: int) -> int:
        numbers = tokens * head_dim * (query_heads + 2 * kv_heads)
        outputs = tokens * head_dim * query_heads * 3
        tiles = query_heads * (tokens // _BLOCK) ** 2
        return numbers * (4 + dtype.itemsize) + outputs * 4 + tiles * 32  # draws are float32; ids are int64

    free = available_bytes(torch.device(device))
    longest = None if free is None else longest_that_fits(need, free, length)
    what = f"{length} tokens at head_dim {head_dim} in {str(dtype).removeprefix('torch.')} do not fit into memory"
    return f"{what}: {'measure shorter ones' if longest is None else f'{longest} tokens should'}"


def _cell(inputs: AttentionInputs, index: BlockIndex, with_flex: bool, repeats: int) -> KernelCell:
    kernels, reasons = kernels_for(inputs)
    if not kernels:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise NotImplementedError(f"no kernel serves what is to be timed. {why}")

    def runs(kernel: str) -> Callable[[], Tensor]:
        return lambda: _output(block_sparse_attention(inputs, index, kernel))

    contenders: dict[str, Callable[[], Tensor]] = {name: runs(name) for name in kernels}
    contenders["dense"] = lambda: dense_attention(inputs)
    if with_flex:
        for block in (64, 128):
            contenders[f"flex {block}"] = _flex(inputs, index, block)
    errors, first = {}, {}
    for name, run in contenders.items():
        _finish(inputs)
        began = time.perf_counter()
        output = run()
        _finish(inputs)
        first[name] = time.perf_counter() - began
        if name != "dense":
            errors[name] = checked(name, inputs, index, output)
    median = median_seconds(inputs, contenders, repeats)
    best = min((64, 128), key=lambda block: median[f"flex {block}"]) if with_flex else None
    return KernelCell(
        str(inputs.query.dtype).removeprefix("torch."), inputs.head_dim, inputs.queries,
        float(coverage(inputs, index).density.mean()), {name: median[name] for name in kernels}, median["dense"],
        median[f"flex {best}"] if with_flex else None, best, {name: errors[name] for name in kernels}, first,
    )  # fmt: skip


def checked(name: str, inputs: AttentionInputs, index: BlockIndex, output: Tensor) -> float:
    """The largest difference to the oracle on sampled rows. ValueError where `output` is not attention over `index`."""
    return checked_parts(name, [Part(inputs, index)], output)


def checked_parts(name: str, parts: Sequence[Part], output: Tensor) -> float:
    """`checked`, of attention over several parts of the keys; what a kernel may leave out of lists is computed."""
    error, allowed = _error_and_allowed(parts, output)
    if not error <= allowed:
        raise ValueError(f"{name} is wrong, so it is not timed: error {error:.2e}, allowed {allowed:.2e}")
    return error


def median_seconds(
    inputs: AttentionInputs, contenders: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, float]:
    """Median time of each call, all of them interleaved, after one turn that is left out."""
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):  # the first turn warms up
        for name, run in contenders.items():
            _finish(inputs)
            began = time.perf_counter()
            run()
            _finish(inputs)
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def random_inputs(
    query_heads: int, kv_heads: int, length: int, head_dim: int, dtype: torch.dtype, device: torch.device | str,
    seed: int, *, value_dim: int | None = None,
) -> AttentionInputs:  # fmt: skip
    """One layer's queries, keys and values, normal numbers from a seed; `value_dim` is `head_dim` unless given."""
    draw = torch.Generator().manual_seed(seed)

    def made(heads: int, dim: int) -> Tensor:
        return torch.randn(1, heads, length, dim, generator=draw).to(device=device, dtype=dtype)

    query, key, value = made(query_heads, head_dim), made(kv_heads, head_dim), made(kv_heads, value_dim or head_dim)
    return AttentionInputs(query, key, value, scale=head_dim**-0.5)


def dense_attention(inputs: AttentionInputs) -> Tensor:
    """torch's dense causal attention, which a user would run instead."""
    return torch.nn.functional.scaled_dot_product_attention(
        inputs.query, inputs.key, inputs.value, is_causal=True, enable_gqa=True
    )


def _random_index(inputs: AttentionInputs, density: float, seed: int) -> BlockIndex:
    grid = BlockGrid.of(inputs, _BLOCK, _BLOCK)
    draw = torch.Generator().manual_seed(seed + 1)
    mask = torch.rand(1, inputs.query_heads, grid.rows, grid.key_blocks, generator=draw) < density
    mask |= torch.eye(grid.rows, grid.key_blocks, dtype=torch.bool)
    return BlockIndex.from_mask(grid, mask.to(inputs.device) & grid.visible_block_mask(inputs)[:, None])


def _flex(inputs: AttentionInputs, index: BlockIndex, block: int) -> Callable[[], Tensor]:
    """Compiled FlexAttention over exactly the listed blocks, causally."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    mask = index.to_mask()
    ratio = block // _BLOCK
    tiles = mask.shape[2] // ratio

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask[batch, head, query // _BLOCK, key // _BLOCK] & (query >= key)

    listed = mask.unflatten(2, (tiles, ratio)).unflatten(4, (tiles, ratio)).sum((3, 5))  # [1, heads, tiles, tiles]
    diagonal = torch.eye(tiles, dtype=torch.bool, device=mask.device)
    full = (listed == ratio**2) & ~diagonal
    partial = (listed > 0) & ~full

    def ordered(kept: Tensor) -> tuple[Tensor, Tensor]:
        ids = kept.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
        return kept.sum(-1).to(torch.int32), ids.to(torch.int32)

    block_mask = BlockMask.from_kv_blocks(
        *ordered(partial),
        *ordered(full),
        BLOCK_SIZE=block,
        mask_mod=mask_mod,
        seq_lengths=(inputs.queries, inputs.keys),
    )
    compiled = torch.compile(flex_attention, dynamic=False)

    def run() -> Tensor:
        result: Tensor = compiled(inputs.query, inputs.key, inputs.value, block_mask=block_mask, enable_gqa=True)
        return result

    return run


def _sampled(inputs: AttentionInputs, index: BlockIndex) -> tuple[AttentionInputs, BlockIndex, slice]:
    """The last two rows of the grid, on the CPU: cheap for an oracle, and they look furthest back."""
    grid = index.grid
    start = inputs.queries - 2 * grid.block_q
    part = AttentionInputs(
        inputs.query[:, :, start:].cpu(), inputs.key.cpu(), inputs.value.cpu(), scale=inputs.scale, query_start=start
    )
    rows = BlockIndex(
        BlockGrid.of(part, grid.block_q, grid.block_k), index.columns.cpu(), index.start[:, :, -2:].cpu(),
        index.count[:, :, -2:].cpu(),
    )  # fmt: skip
    return part, rows, slice(start, None)


def _reference(parts: Sequence[Part], dtype: torch.dtype) -> tuple[Tensor, slice]:
    """What the oracle gives for the sampled rows, and where they are; for all of them where queries are sorted."""
    if any(part.order is not None for part in parts):
        whole = [reference_attention(part.inputs, part.index, dtype=dtype) for part in parts]
        return _output(join_outputs(list(map(placed, whole, parts)))).cpu(), slice(None)
    sampled = [_sampled(part.inputs, part.index) for part in parts]
    results = [reference_attention(inputs, rows, dtype=dtype) for inputs, rows, _ in sampled]
    if len(results) > 1:  # the join is no part of what is rounded
        exact = [reference_attention(inputs, rows) for inputs, rows, _ in sampled]
        results = [AttentionOutput(_output(own), one.lse) for own, one in zip(results, exact, strict=True)]
    return _output(join_outputs(results)), sampled[0][2]


def _error_and_allowed(parts: Sequence[Part], output: Tensor) -> tuple[float, float]:
    """The largest difference to the oracle, and twice what plain attention in the dtype of the inputs may differ."""
    exact, where = _reference(parts, torch.float64)
    dtype = parts[0].inputs.query.dtype
    plain, _ = _reference(parts, dtype)
    error, budget = (float((exact - each.cpu().double()).abs().max()) for each in (output[:, :, where], plain))
    return error, 2 * (budget + torch.finfo(dtype).eps * float(exact.abs().max()))


def _output(result: Any) -> Tensor:
    assert result.output is not None
    output: Tensor = result.output
    return output


def _finish(inputs: AttentionInputs) -> None:
    if inputs.device.type == "cuda":
        torch.cuda.synchronize()


def kernel_table(cells: Sequence[KernelCell], *, against: Sequence[str] = RIVALS, markdown: bool = False) -> str:
    """One line a cell; ratios, because times differ from machine to machine."""
    kernels = list(dict.fromkeys(name for cell in cells for name in cell.ours))
    flex = "flex" in against and any(cell.flex is not None for cell in cells)
    head = ["dtype", "head dim", "length", "density", "dense s", *(f"{name} / ideal" for name in kernels)]
    head += ["flex / ideal", *(f"{name} / flex" for name in kernels)] if flex else []
    head += [f"{name} / dense" for name in kernels] if "dense" in against else []
    rows = []
    for cell in cells:
        row = [cell.dtype, str(cell.head_dim), str(cell.length), number(cell.density), number(cell.dense)]
        row += [number(cell.over_ideal(name), 2) for name in kernels]
        if flex:
            row.append(number(None if cell.flex is None else cell.flex / cell.ideal, 2))
            row += [number(cell.over_flex(name), 2) for name in kernels]
        if "dense" in against:
            row += [number(cell.over_dense(name), 3) for name in kernels]
        rows.append(row)
    text = table(head, rows, markdown=markdown)
    for name in kernels:
        text += "\n" + _summary(f"{name} / ideal", [cell.over_ideal(name) for cell in cells])
        if flex:
            text += "\n" + _summary(f"{name} / flex", [cell.over_flex(name) for cell in cells])
    called = dict.fromkeys(name for cell in cells for name in cell.first)
    slowest = {name: max(cell.first[name] for cell in cells if name in cell.first) for name in called}
    text += "\nlongest first call: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in slowest.items())
    errors = {name: max(cell.error[name] for cell in cells if name in cell.error) for name in kernels}
    text += "\nlargest error, checked against the float64 oracle: "
    text += ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return text + "\nideal = density x the time of dense causal attention"


def _summary(what: str, found: Sequence[float | None]) -> str:
    ratios = [each for each in found if each is not None]
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    return f"{what} over {len(ratios)} cells: geometric mean {mean:.2f}, worst {max(ratios):.2f}"


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Time to first token of one method at one length, medians, and dense on the same prompt in the same run."""

    method: str  # its label
    length: int  # tokens
    seconds: float  # median
    speed_up: float  # median of the ratios of interleaved pairs


@torch.no_grad()
def first_token_times(
    model: Any,
    methods: Sequence[Any],
    lengths: Sequence[int],
    *,
    repeats: int = 3,
    seed: int = 0,
    progress: Callable[[int], Any] = lambda steps: None,
) -> list[FirstToken]:
    """Whole-model time to first token on random tokens, dense and sparse interleaved. `methods` are `MethodSpec`s."""
    results = []
    draw = torch.Generator().manual_seed(seed)
    for length in lengths:
        ids = torch.randint(1, model.config.get_text_config().vocab_size, (1, length), generator=draw).to(model.device)

        def timed(spec: Any, ids: Tensor = ids) -> float:
            with spec.applied(model, min_length=0, observe=False):
                if model.device.type == "cuda":
                    torch.cuda.synchronize()
                began = time.perf_counter()
                model(input_ids=ids, use_cache=True, logits_to_keep=1).logits.argmax(-1).tolist()
                return time.perf_counter() - began

        dense = next(spec for spec in methods if spec.name == "dense")
        for spec in methods:
            timed(spec)
            pairs = [(timed(dense), timed(spec)) for _ in range(repeats)]
            seconds = statistics.median(own for _, own in pairs)
            results.append(FirstToken(spec.label, length, seconds, statistics.median(d / own for d, own in pairs)))
            progress(1)
    return results


def first_token_table(results: Sequence[FirstToken], *, markdown: bool = False) -> str:
    """One line a method and length."""
    head = ["length", "method", "TTFT s", "speed-up over dense"]
    rows = [[str(r.length), r.method, number(r.seconds), f"{r.speed_up:.2f}x"] for r in results]
    return table(head, rows, markdown=markdown)
