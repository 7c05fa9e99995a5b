"""Local window and strided columns, at another offset in each KV head: S2-Attention's heterogeneous shards.

Lin et al., "S2-Attention: Hardware-Aware Context Sharding Among Attention Heads", 2024, arXiv:2407.17678. Models are
trained with it; put on one that was not, it is a blind pattern, with a mask that a formula gives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.estimators.selection import Budget, check_budget, check_count, check_tokens, keep_blocks
from sparseprefill.patterns.expected_density import in_blocks, kept_share
from sparseprefill.patterns.expected_overhead import Overhead, stated_overhead


@dataclass(frozen=True, slots=True)
class LocalStride:
    """Row i keeps key block j <= i iff i - j < `local` in blocks, or (j + g * step + offset) mod `stride` == 0.

    i and j count blocks of `block` tokens from the first valid key, g is the KV head (0 with `homogeneous`), and
    step = max(1, stride // kv_heads): neighbouring heads take the columns in between, so that `stride` heads or more
    see the whole context together. The last `dense_heads` KV heads see everything. A tile of another size is computed
    where it holds a kept pair of blocks. As a share, `local` is of the blocks that a row sees. `stride` = 1 is dense.

    S2-Attention, arXiv:2407.17678. Raises ValueError or TypeError for numbers that are none, and for more dense heads
    than a call has KV heads.
    """

    local: Budget = 1024  # tokens up to a row's end, in whole blocks; or a share of the visible keys
    stride: int = 8  # blocks from one kept column to the next
    block: int = 64  # tokens of a block of the rule
    offset: int = 0  # blocks by which all columns move towards the front
    homogeneous: bool = False  # the same columns in every head
    dense_heads: int = 0  # KV heads, the last ones

    def __post_init__(self) -> None:
        check_budget("local", self.local)
        check_tokens("block", self.block)
        check_count("stride", self.stride)
        check_count("offset", self.offset, least=0)
        check_count("dense_heads", self.dense_heads, least=0)
        if not isinstance(self.homogeneous, bool):
            raise TypeError(f"homogeneous must be True or False, got {self.homogeneous!r:.80}")

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        if self.dense_heads > inputs.kv_heads:
            raise ValueError(
                f"dense_heads={self.dense_heads}, and there are {inputs.kv_heads} KV heads: give at most as many"
            )
        # blocks of the rule that rows and key blocks of the grid reach into, the last ones included
        row = grid.first[:, None] + torch.arange(grid.rows, device=inputs.device)
        low, high = row * grid.block_q // self.block, ((row + 1) * grid.block_q - 1) // self.block
        key = torch.arange(grid.key_blocks, device=inputs.device) * grid.block_k
        first, last = key // self.block, (key + grid.block_k - 1) // self.block
        near = self._first_local(low)
        local = (last >= near[..., None]) & (first <= high[..., None])
        column = first + (-(first + self._shift(inputs))) % self.stride  # the first kept one from there on
        striped = (column <= last)[None, :, None] & (column[:, None] <= high[:, None, :, None])
        visible = grid.visible_block_mask(inputs)
        mask = (local[:, None] | striped) & visible[:, None]
        mask[:, inputs.kv_heads - self.dense_heads :] = visible[:, None]
        mask |= visible[:, None] & ~mask.any(-1, keepdim=True)  # rows without queries have a list too
        return BlockIndex.from_mask(grid, mask).for_heads(inputs.query_heads)

    def tile_law(self) -> str:
        """See `sparseprefill.patterns.expected_tiles`."""
        return "positions"

    def expected_density(self, keys: int) -> float:
        local = self.local if isinstance(self.local, float) else in_blocks(self.local)
        near = kept_share(local, keys)
        # tiles of 64 keys that hold a column, which may lie across two of them
        tiles = 1.0 if self.block % 64 == 0 else (63 + self.block) / self.block
        share = near + (1 - near) * min(1.0, tiles / self.stride)
        heads = max(8, self.dense_heads)  # of how many KV heads nobody says: of as many as most models have
        return (self.dense_heads + (heads - self.dense_heads) * share) / heads

    def expected_overhead(self, device: torch.device, head_dim: int, block_q: int, block_k: int) -> Overhead:
        """It looks at nothing."""
        return stated_overhead(device, head_dim, tiles=0.1 / (block_q * block_k), steps=0.2)

    def _shift(self, inputs: AttentionInputs) -> Tensor:
        """int64 [kv_heads, 1]: how far the columns of each KV head stand to the front, in blocks."""
        head = torch.arange(inputs.kv_heads, device=inputs.device)[:, None]
        step = 0 if self.homogeneous else max(1, self.stride // inputs.kv_heads)
        return head * step + self.offset

    def _first_local(self, row: Tensor) -> Tensor:
        """int64 like row: the first block of the local window of these rows of the rule."""
        return row + 1 - keep_blocks(self.local, row + 1, self.block)
