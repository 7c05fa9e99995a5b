"""Skip-softmax: tiles that cannot matter next to what a row has seen already are left out while the kernel runs.

Yuan et al., "BLASST: Dynamic Blocked Attention Sparsity via Softmax Thresholding", 2025, arXiv:2512.12087. Nothing is
chosen beforehand: the logits of every listed tile are computed, and where all of them lie far below the running maxima
of their queries, the exponentials, the values and their product are skipped.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.estimators.mean_pooled import MeanPooled
from sparseprefill.kernels.native_attention import MOST_QUERIES
from sparseprefill.kernels.native_build import why_not_built
from sparseprefill.patterns.dense import Dense
from sparseprefill.patterns.expected_density import expected_density
from sparseprefill.patterns.expected_overhead import Overhead, expected_overhead, stated_overhead
from sparseprefill.patterns.expected_tiles import tile_law
from sparseprefill.patterns.nested import products_of
from sparseprefill.patterns.wrapping import check_names_blocks_alone, inner_for_layer

ORDERS = ("score", "ascending")
"""In which a row's blocks are visited: those whose mean key fits best first, or as they lie."""

ALL = Dense()

SKIPPED = 0.5
"""Share of the listed tiles that the cost model takes for skipped; a skipped tile costs half of a computed one."""


@dataclass(frozen=True, slots=True)
class SkipSoftmax:
    """The blocks of `inner`, of which the kernel skips tiles below a share `scale` / keys of what stands already.

    A tile is skipped if for each query of the row that sees some of it, its largest weight is at most lambda times the
    largest one so far. lambda = `scale` over the keys that a row can see, at most 1. Whatever is skipped, a query then
    loses at most a share `scale` / (1 + `scale`) of its attention mass, at any length: rigorous for a small scale,
    little for the ones in use. Visiting the blocks that fit best first lets the maxima stand early.

    `scale` = 0 skips nothing: `inner`, bit for bit. It looks ahead no more than `inner` does. A skipped tile counts
    half in the density, as its logits were computed.

    BLASST, arXiv:2512.12087. Raises ValueError or TypeError for a scale that is none, and for an order that is unknown.
    """

    inner: Any = ALL  # anything with `build_index`
    scale: float = 20.0  # of lambda, in keys
    order: str = "score"  # one of ORDERS

    def __post_init__(self) -> None:
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)):
            raise TypeError(f"scale must be a number, got {self.scale!r:.80}")
        if not 0.0 <= self.scale <= sys.float_info.max:
            raise ValueError(f"scale must be at least 0 and finite, got {self.scale!r:.80}")
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {self.order!r:.80}")
        if not callable(getattr(self.inner, "build_index", None)) or getattr(self.inner, "in_parts", False):
            raise TypeError(
                f"skip_softmax goes around a pattern with build_index(inputs, grid), got {type(self.inner).__name__}: "
                "put it inside of what works in parts"
            )
        check_names_blocks_alone("skip_softmax", self.inner)

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        index: BlockIndex = self.inner.build_index(inputs, grid)
        if not self.scale:
            return index
        if self.order == "score":
            index = index.visiting(lambda start, stop: MeanPooled().scores(inputs, grid, start, stop))
        skip = (self.scale / self._keys(inputs, grid)).log().clamp(max=0.0)
        return index.skipping(skip[:, None].expand(index.count.shape))

    def keeps_everything(self) -> bool:
        """Whether nothing is skipped of a pattern that is dense by its kind."""
        return not self.scale and isinstance(self.inner, Dense)

    def for_layer(self, layer: int) -> SkipSoftmax:
        """What `inner` is in this layer."""
        return dataclasses.replace(self, inner=inner_for_layer(self.inner, layer))

    def estimator_products(self, inputs: AttentionInputs, grid: BlockGrid) -> float:
        """See `sparseprefill.patterns.nested`."""
        return products_of(self.inner, inputs, grid) + (
            MeanPooled().products(inputs, grid) if self.scale and self.order == "score" else 0
        )

    def tile_law(self) -> str:
        """See `sparseprefill.patterns.expected_tiles`."""
        return tile_law(self.inner)

    def expected_density(self, keys: int) -> float:
        return expected_density(self.inner, keys) * (1 - SKIPPED / 2 if self.scale else 1.0)

    def expected_overhead(self, device: torch.device, head_dim: int, block_q: int, block_k: int) -> Overhead:
        """Beside `inner` the order of visits; in torch on a CPU logits are computed once more, of half of all pairs."""
        inner = expected_overhead(self.inner, device, head_dim, block_q, block_k)
        if not self.scale:
            return inner
        tiles = 1.5 / (block_q * block_k) if self.order == "score" else 0.0
        again = device.type == "cpu" and (block_q > MOST_QUERIES or why_not_built() is not None)
        share = 0.5 if again else 0.0
        return inner + stated_overhead(device, head_dim, share=share, keys=16, tiles=tiles, steps=0.64)

    def _keys(self, inputs: AttentionInputs, grid: BlockGrid) -> Tensor:
        """float32 [batch, rows]: keys that a query of a row can see at most, whether all of the row is asked or not."""
        row = grid.first[:, None] + torch.arange(1, grid.rows + 1, device=inputs.device)
        keys = row * grid.block_q
        return (keys if inputs.window is None else keys.clamp(max=inputs.window)).clamp(min=1).float()
