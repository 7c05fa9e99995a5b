"""What finding the blocks costs, beside dense attention and beside the least that it can cost, in one run.

Every figure is a share of the time of torch's dense causal attention on the same queries and keys; timed calls are
interleaved. Finding is all that happens before the kernel, the sorting of a wrapper among it. Beside it stand its
counted products of a query and a key, as a share of dense attention's multiply-adds, and how often that share its time
is. The floor of a method that looks at every pair is half of dense attention's multiply-adds (it needs no values) at
the rate of torch's own int8 matrix product of that head_dim, measured in the same run. A method whose index, or whose
scores, are wrong is an error and not a figure.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid
from sparseprefill.estimators import RelativeAttention
from sparseprefill.evals.bench import checked_parts, dense_attention, median_seconds, random_inputs
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.kernels.products import ProductShape, choose_product
from sparseprefill.patterns import Dense, ModelPatterns, Sale
from sparseprefill.patterns.methods import METHODS
from sparseprefill.patterns.nested import products_of
from sparseprefill.patterns.parts import Part, attend, attended, parts_coverage, parts_of
from sparseprefill.prefill import resolve_method
from sparseprefill.reports import number, table

ALL = "all"
"""In place of a method: every method of the table that finds blocks."""
DENSITY = 0.11
"""What ALL keeps, about."""
_BLOCK = 64
_GEMM = 4096  # rows and columns of the int8 product that is timed


@dataclass(frozen=True, slots=True)
class OverheadCell:
    """One method on one shape; shares of the time of dense attention."""

    method: str  # its label
    product: str  # what multiplied low-bit codes, or "-"
    dtype: str  # of queries, keys and values
    head_dim: int
    length: int  # tokens
    dense: float  # seconds of torch's dense causal attention
    estimate: float  # finding the blocks
    floor: float | None  # the least, for a method that looks at every pair
    density: float  # of what it found
    attention: float  # over these blocks
    products: float = 0.0  # of the estimate, as a share of dense attention's multiply-adds

    @property
    def over_products(self) -> float | None:
        """The estimate's time over the share that was counted; None where nothing is multiplied."""
        return self.estimate / self.products if self.products else None

    @property
    def over_floor(self) -> float | None:
        """The estimate's time over its floor."""
        return None if self.floor is None else self.estimate / self.floor

    @property
    def total(self) -> float:
        """Estimate and attention, over dense attention."""
        return self.estimate + self.attention

    @property
    def break_even(self) -> float | None:
        """The density at which the total would equal dense attention, if attention costs as much for each pair."""
        return None if self.estimate >= 1 else (1 - self.estimate) * self.density / self.attention


def overhead_cells(
    methods: Sequence[str],
    *,
    device: str,
    lengths: Sequence[int] = (16384,),
    head_dims: Sequence[int] = (128,),
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32),
    query_heads: int = 8,
    kv_heads: int = 2,
    repeats: int = 5,
    seed: int = 0,
    progress: Callable[[int], Any] = lambda steps: None,
) -> list[OverheadCell]:
    """Time methods, named as on the command line, on random queries and keys.

    Raises ValueError for lengths that are not multiples of 128, for a method that is none or needs a model, and where a
    result is wrong.
    """
    for length in lengths:
        if length < 256 or length % 128:
            raise ValueError(f"estimators are timed at multiples of 128 tokens, from 256 on, got {length}")
    patterns: dict[str, Any] = {}
    for spec in every(methods):
        patterns[spec.label] = resolve_method(spec.name, **spec.options)
        if isinstance(patterns[spec.label], ModelPatterns):
            raise ValueError(f"{spec.label} is the profile of a model: name a method that needs none")
    cells = []
    for dtype in dtypes:
        for head_dim in head_dims:
            for length in lengths:
                inputs = random_inputs(query_heads, kv_heads, length, head_dim, dtype, device, seed)
                cells += _cells(inputs, patterns, repeats)
                progress(1)
    return cells


def every(methods: Sequence[str], density: float = DENSITY) -> list[MethodSpec]:
    """The methods that are meant, each once: ALL stands for all of the table that find blocks, at about a density."""
    specs: dict[str, MethodSpec] = {}
    for text in methods:
        names = [
            name
            for name, row in METHODS.items()
            if row.pattern is not Dense and not (row.names and row.profile is not None)
        ]
        for spec in (
            [MethodSpec.about_density(name, density) for name in names] if text == ALL else [MethodSpec.parse(text)]
        ):
            specs[spec.label] = spec
    return list(specs.values())


def _cells(inputs: AttentionInputs, patterns: dict[str, Any], repeats: int) -> list[OverheadCell]:
    grid = BlockGrid.of(inputs, _BLOCK, _BLOCK)
    found: dict[str, tuple[Part, ...]] = {}
    densities: dict[str, float] = {}
    for label, pattern in patterns.items():
        found[label] = parts_of(pattern, inputs, grid)
        result = attend(found[label])
        assert result.output is not None
        if all(part.index.skip is None for part in found[label]):
            checked_parts(label, found[label], result.output)
        densities[label] = float(parts_coverage(found[label], result.skipped).density.mean())
        if isinstance(pattern, Sale):
            check_scores(pattern.estimator, inputs, grid)
    contenders: dict[str, Callable[[], Any]] = {"dense": lambda: dense_attention(inputs), "int8": _int8(inputs)}
    for label, pattern in patterns.items():
        contenders[f"find {label}"] = functools.partial(parts_of, pattern, inputs, grid)
        contenders[f"attend {label}"] = functools.partial(attended, pattern, inputs, found[label])
    seconds = median_seconds(inputs, contenders, repeats)
    dense = seconds["dense"]
    share = inputs.head_dim / (inputs.head_dim + inputs.value_dim)  # of a pair's multiply-adds, that are products
    pairs_of_a_head = inputs.queries * (inputs.queries + 1) / 2
    floor = seconds["int8"] / _GEMM**2 * inputs.query_heads * pairs_of_a_head / dense
    return [
        OverheadCell(
            label, _product(pattern, inputs), str(inputs.query.dtype).removeprefix("torch."), inputs.head_dim,
            inputs.queries, dense, seconds[f"find {label}"] / dense, floor if isinstance(pattern, Sale) else None,
            densities[label], seconds[f"attend {label}"] / dense,
            products_of(pattern, inputs, grid) * share / pairs_of_a_head,
        )
        for label, pattern in patterns.items()
    ]  # fmt: skip


def _int8(inputs: AttentionInputs) -> Callable[[], Tensor]:
    """An int8 product of vectors as long as a head, which any way of estimating logits from codes must make."""
    draw = torch.Generator().manual_seed(0)
    left, right = (
        torch.randint(-7, 8, (_GEMM, -(-inputs.head_dim // 8) * 8), generator=draw, dtype=torch.int8).to(inputs.device)
        for _ in range(2)
    )
    return lambda: torch._int_mm(left, right.T)


def _product(pattern: Any, inputs: AttentionInputs) -> str:
    if not isinstance(pattern, Sale):
        return "-"
    shape = ProductShape(inputs.device, torch.float32, pattern.bits, inputs.head_dim, _BLOCK, _BLOCK)
    return choose_product(shape, pattern.product)


def check_scores(estimator: RelativeAttention, inputs: AttentionInputs, grid: BlockGrid) -> float:
    """The largest difference between the scores that are timed and the reference's, on the last two rows.

    ValueError where it is more than rounding: the products of codes are whole numbers and the same, what follows are
    some ten float32 operations on numbers no larger than the largest logit, shift or reference.
    """
    got, want = (
        dataclasses.replace(estimator, product=product).prepare(inputs, grid).scores(grid.rows - 2, grid.rows)
        for product in (estimator.product, "torch")
    )
    prepared = estimator.prepare(inputs, grid)
    seen = want.isfinite()
    if not torch.equal(seen, got.isfinite()):
        raise ValueError("the scores are wrong, so they are not timed: other tiles are scored than by the reference")
    if not bool(seen.any()):
        return 0.0  # so short that all is sink and window
    largest = max(float(each.abs().max()) for each in (want[seen], prepared.reference, prepared.shift * inputs.scale))
    error = float((got[seen] - want[seen]).abs().max())
    allowed = 32 * torch.finfo(torch.float32).eps * largest
    if not error <= allowed:
        raise ValueError(f"the scores are wrong, so they are not timed: error {error:.2e}, allowed {allowed:.2e}")
    return error


def overhead_table(cells: Sequence[OverheadCell], *, markdown: bool = False) -> str:
    """One line a cell."""
    head = [
        "method", "product", "dtype", "head dim", "length", "dense s", "estimate / dense", "products / dense",
        "estimate / products", "floor / dense", "estimate / floor", "density", "attention / dense", "total / dense",
        "break-even density",
    ]  # fmt: skip
    rows = [
        [
            cell.method, cell.product, cell.dtype, str(cell.head_dim), str(cell.length), number(cell.dense),
            number(cell.estimate), number(cell.products or None, 4), number(cell.over_products, 2), number(cell.floor),
            number(cell.over_floor, 2), number(cell.density),
            number(cell.attention), number(cell.total), number(cell.break_even),
        ]
        for cell in cells
    ]  # fmt: skip
    return table(head, rows, markdown=markdown) + (
        "\nproducts = counted products of a query and a key, over dense attention's multiply-adds"
        "\nfloor = half of dense attention's multiply-adds at the rate of torch's int8 matrix product of this head dim"
    )
