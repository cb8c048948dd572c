"""Sums of products over tokens are not rounded, and a symmetric one is the full product."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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


class _OnCuda(TorchDispatchMode):
    """Precision of float32 products on CUDA, at each sum of products."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "addmm_":
            self.seen.append(torch.backends.cuda.matmul.fp32_precision)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("left", "right", "precision"),
    [
        ("bfloat16", "bfloat16", "tf32"),
        ("float16", "float16", "tf32"),
        ("float32", "bfloat16", "ieee"),
        ("float32", "float32", "ieee"),
    ],
)
def test_a_gpu_multiplies_in_tf32_what_it_holds(left, right, precision):
    with _OnCuda() as found:
        add_product(torch.zeros(3, 3), *(torch.ones(4, 3, dtype=getattr(torch, dtype)) for dtype in (left, right)))
    assert found.seen == [precision]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tf32_holds_every_number_of_the_narrow_dtypes(dtype):
    """13 of 23 bits of the mantissa are dropped: none of them is set."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(getattr(torch, dtype)).float()
    values = values[values.isfinite() & (values.abs() >= torch.finfo(torch.float32).tiny)]
    assert not (values.view(torch.int32) & (2**13 - 1)).any()


@pytest.mark.parametrize("width", [3, 4, 37, 128])
def test_a_symmetric_sum_is_that_of_the_full_product(width):
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(64, width, generator=generator) for _ in range(2))
    total = torch.zeros(width, width)
    for x in (first, second):
        add_gram(total, x)
    torch.testing.assert_close(total, first.t() @ first + second.t() @ second)
