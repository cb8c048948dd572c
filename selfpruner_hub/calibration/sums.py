"""Sums of products over tokens, in float32: of two factors, and of one with itself."""

from __future__ import annotations

import torch
from torch import Tensor

from selfpruner_hub.models.devices import ieee_products

GRAM_BLOCKS = 4
"""Number of blocks of columns of a symmetric product: with 4, it takes 10 of 16 products of blocks."""


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ right to a float32 total, in place.

    The product of two bfloat16 numbers is exact in float32, so a CPU may multiply bfloat16 tensors in bfloat16 and sum
    them in float32: nothing is rounded, and it is several times faster. An NVIDIA GPU may do so in TF32, whose 10 bits
    hold every bfloat16 and float16 number. Other tensors are multiplied in float32, because a float32 factor would be
    rounded.

    Args:
        total: Sum, `[L, R]`, float32.
        left: Left factors, `[N, L]`.
        right: Right factors, `[N, R]`.
    """
    dtypes = {left.dtype, right.dtype}
    cpu = "bf16" if dtypes == {torch.bfloat16} else "ieee"
    cuda = "tf32" if dtypes <= {torch.bfloat16, torch.float16} else "ieee"
    with ieee_products(cpu, cuda):
        total.addmm_(left.float().t(), right.float())


def add_gram(total: Tensor, x: Tensor) -> None:
    """Add xᵀ x to a symmetric float32 total, in place, as `add_product` does; the lower half is mirrored, not computed.

    Args:
        total: Sum, `[D, D]`, float32, symmetric.
        x: Factors, `[N, D]`.
    """
    width = -(-x.shape[1] // GRAM_BLOCKS)
    for first in range(0, x.shape[1], width):
        rows = slice(first, first + width)
        add_product(total[rows, first:], x[:, rows], x[:, first:])
        total[first + width :, rows] = total[rows, first + width :].t()
