"""Logits from signs alone: codes of a few bits a token, compared by how many differ.

You et al., "ShiftAddViT", 2023, arXiv:2306.06446, replaces products of queries and keys by additions of binary codes,
in models trained for it. What needs no training is left here: keys without their mean, a random rotation, signs, and
the angle that a Hamming distance stands for (Charikar, "Similarity Estimation Techniques from Rounding Algorithms",
2002).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs
from sparseprefill.estimators.mean_pooled import scaled
from sparseprefill.estimators.selection import check_count
from sparseprefill.kernels.low_bit import accurate


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """Signs and lengths of tokens."""

    sign: Tensor  # -1 or 1, [batch, heads, tokens, bits], in the dtype that products are taken in
    norm: Tensor  # [batch, heads, tokens, 1]: the length of the vector


@dataclass(frozen=True, slots=True)
class SignCodes:
    """A logit is estimated as scale * |query| |key - mean| * cos(pi * differing bits / bits).

    The mean is that of the valid keys of a KV head; subtracting it changes the logits of a query by one number, which
    no softmax and no ranking sees, but makes directions differ where keys share one. Queries keep theirs. Bits are
    signs along the rows of random orthogonal matrices, as many as it takes; the error of an angle falls with
    sqrt(bits).

    ShiftAddViT, arXiv:2306.06446. Raises ValueError or TypeError for bits that are none.
    """

    bits: int = 128  # of each token's code
    seed: int = 0  # of the rotation

    def __post_init__(self) -> None:
        check_count("bits", self.bits)
        check_count("seed", self.seed, least=0)

    def directions(self, inputs: AttentionInputs) -> Tensor:
        """[bits, head_dim]: rows of random orthogonal matrices, the same on every device."""
        draw = torch.Generator().manual_seed(self.seed)
        dim = inputs.head_dim
        made = [
            torch.linalg.qr(torch.randn(dim, dim, generator=draw, dtype=torch.float64)).Q
            for _ in range(-(-self.bits // dim))
        ]
        return torch.cat(made)[: self.bits].to(inputs.device, accurate(inputs.query), non_blocking=True)

    def of_keys(self, inputs: AttentionInputs, along: Tensor) -> Codes:
        """Codes of all keys that may be seen, less their mean; those that are not valid are codes of nothing.

        `along`: what `directions` gave.
        """
        key = inputs.key[:, :, : inputs.last_key].to(accurate(inputs.key))
        if inputs.key_valid is None:
            return self.of(key - key.mean(2, keepdim=True), along)
        valid = inputs.key_valid[:, None, : inputs.last_key, None]
        key = key.masked_fill(~valid, 0.0)
        mean = key.sum(2, keepdim=True) / valid.sum(2, keepdim=True).clamp(min=1)
        return self.of((key - mean).masked_fill(~valid, 0.0), along)

    def of(self, vectors: Tensor, along: Tensor) -> Codes:
        """Codes of vectors [batch, heads, tokens, head_dim] as they are."""
        sign = torch.where(vectors @ along.T < 0, -1.0, 1.0).to(vectors.dtype)
        return Codes(sign, vectors.norm(dim=-1, keepdim=True))

    def logits(self, query: Codes, key: Codes, inputs: AttentionInputs) -> Tensor:
        """[batch, query_heads, queries, keys], soft-capped as the model's own."""
        group = query.sign.shape[1] // key.sign.shape[1]
        grouped = query.sign.unflatten(1, (-1, group)).flatten(2, 3)
        alike = (grouped @ key.sign.mT).view(*query.sign.shape[:3], -1)  # bits - 2 * differing ones
        cosine = alike.sub_(self.bits).mul_(torch.pi / (2 * self.bits)).cos_()  # cos(-x) is cos(x)
        length = key.norm.repeat_interleave(group, 1).mT
        return scaled(cosine.mul_(query.norm).mul_(length), inputs)
