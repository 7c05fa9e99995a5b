"""Products by one addition: the bit patterns of two floats are added as integers.

Luo and Sun, "Addition is All You Need for Energy-efficient Language Models", 2024, arXiv:2410.00907. With (1 + a) 2^x
and (1 + b) 2^y the exact product has the mantissa 1 + a + b + a b; here a b is replaced by a number that its mean is
near to, and what is left is an addition of exponents and mantissas, whose carry goes where it belongs by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseprefill.estimators.selection import check_count

MANTISSA = 23  # bits of a float32


def l_mul(x: Tensor, y: Tensor, bits: int = MANTISSA) -> Tensor:
    """float32 of the broadcast shape: x * y by integer addition, of numbers cut to `bits` bits of mantissa.

    The correction is 2^-l with l = bits up to 3, 3 for 4, and 4 above, as in the paper. 0, and numbers below the
    smallest normal one, make 0; results beyond the largest float are infinite; NaN and infinity stay what they make in
    a product.

    Raises ValueError or TypeError for bits that no float32 has.
    """
    check_bits(bits)
    x, y = x.float(), y.float()
    mask = -1 << (MANTISSA - bits)
    a, b = (each.contiguous().view(torch.int32).to(torch.int64) for each in (x, y))
    sign = (a ^ b) & 0x80000000
    a, b = ((each & 0x7FFFFFFF) & mask for each in (a, b))
    shift = bits if bits <= 3 else 3 if bits == 4 else 4
    total = a + b - (127 << MANTISSA) + (1 << (MANTISSA - shift))
    small = (a < 1 << MANTISSA) | (b < 1 << MANTISSA) | (total < 1 << MANTISSA)
    total = total.clamp(max=0x7F800000).masked_fill(small, 0)
    made = (total | sign).to(torch.int32).view(torch.float32)  # the sign's bit wraps, as it should
    return torch.where(x.isfinite() & y.isfinite(), made, x * y)


def l_mul_products(query: Tensor, key: Tensor, bits: int = MANTISSA) -> Tensor:
    """float32 [..., rows, columns] from [..., rows, dim] and [..., columns, dim]: sums of `l_mul` over dim.

    Channels are taken one at a time, so that no tensor of all products is made.
    """
    total: Tensor | None = None
    for channel in range(query.shape[-1]):
        each = l_mul(query[..., :, None, channel], key[..., None, :, channel], bits)
        total = each if total is None else total + each
    if total is None:
        raise ValueError("there are no channels to multiply")
    return total


def check_bits(bits: int) -> None:
    """Raise ValueError or TypeError for bits that no float32 has."""
    check_count("bits", bits)
    if bits > MANTISSA:
        raise ValueError(f"bits must be at most {MANTISSA}, those of a float32's mantissa, got {bits}")
