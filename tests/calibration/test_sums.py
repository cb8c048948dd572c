"""Sums of products over tokens are not rounded, and a symmetric one is the full product."""

import pytest
import torch

from selfpruner_hub.calibration.sums import add_gram, add_product


@pytest.mark.parametrize(("left", "right"), [("bfloat16", "bfloat16"), ("float32", "float32"), ("float32", "bfloat16")])
def test_a_sum_of_products_is_not_rounded(left, right):
    """Where a CPU multiplies in bfloat16, a float32 factor would be off by up to 2⁻⁹ of itself."""
    settings, generator = torch.backends.mkldnn.matmul, torch.Generator().manual_seed(0)
    before = settings.fp32_precision
    a, b = (torch.randn(512, 96, generator=generator).to(getattr(torch, dtype)) for dtype in (left, right))
    total = torch.ones(96, 96)
    add_product(total, a, b)
    torch.testing.assert_close(total.double(), 1 + a.double().t() @ b.double(), atol=1e-4, rtol=1e-5)
    assert settings.fp32_precision == before


@pytest.mark.parametrize("width", [3, 4, 37, 128])
def test_a_symmetric_sum_is_that_of_the_full_product(width):
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(64, width, generator=generator) for _ in range(2))
    total = torch.zeros(width, width)
    for x in (first, second):
        add_gram(total, x)
    torch.testing.assert_close(total, first.t() @ first + second.t() @ second)
