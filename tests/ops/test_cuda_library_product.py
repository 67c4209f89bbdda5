"""Products by torch's library for the CUDA kernels: what they are called with on a GPU, and what they refuse."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from happyhorse_fast.ops.runtime.cuda.library_product import check_operands, library_product, scale_of_one

E4M3 = torch.float8_e4m3fn


def operands(dtype, k=64):
    g = torch.Generator().manual_seed(0)
    return torch.randn(24, k, generator=g).to(dtype), torch.randn(2, 48, k, generator=g).to(dtype)


def test_sums_of_codes_stay_in_float32_and_are_the_librarys():
    x, weight = operands(E4M3)
    one = scale_of_one(x)
    product = library_product(x, weight[1], one)
    assert product.dtype == torch.float32
    exact = x.double() @ weight[1].double().T
    torch.testing.assert_close(product.double(), exact, rtol=1e-6, atol=1e-5)
    # The very call that a GPU gets, where it is too slow to be used for the CPU's own.
    on_gpu = torch._scaled_mm(x, weight[1].T, one, one, out_dtype=torch.float32)
    torch.testing.assert_close(product, on_gpu, rtol=1e-6, atol=1e-5)


def test_the_scale_of_codes_is_float32_whatever_the_default():
    x, _ = operands(E4M3)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert scale_of_one(x).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("dtype", "result"), [(E4M3, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_a_gpus_call_has_the_right_shape_and_dtype(dtype, result):
    with FakeTensorMode(), torch.device("cuda"):
        x, weight = torch.empty(2432, 5120, dtype=dtype), torch.empty(27_392, 5120, dtype=dtype)
        product = library_product(x, weight, scale_of_one(x))
    assert (product.shape, product.dtype, product.device.type) == ((2432, 27_392), result, "cuda")


def test_a_gpu_without_e4m3_is_named():
    with FakeTensorMode(), torch.device("cuda"), mock.patch("torch.cuda.get_device_capability", return_value=(8, 6)):
        for dtype in (torch.bfloat16, E4M3):
            x, weight = torch.empty(16, 32, dtype=dtype), torch.empty(1, 32, 32, dtype=dtype)
            if dtype == torch.bfloat16:
                check_operands(x, weight)
                continue
            with pytest.raises(ValueError, match="x must be bf16 on sm_86 for backend 'cuda': e4m3 products are from"):
                check_operands(x, weight)


def test_rows_of_codes_are_whole_vectors():
    check_operands(*operands(E4M3))
    check_operands(*operands(torch.bfloat16, k=24))
    with pytest.raises(ValueError, match="x must have rows of a multiple of 16 elements"):
        check_operands(*operands(E4M3, k=24))
    weight = operands(E4M3)[1]
    with pytest.raises(ValueError, match="x must start on a multiple of 16 bytes"):
        check_operands(torch.zeros(24 * 64 + 8, dtype=torch.uint8)[8:].view(E4M3).view(24, 64), weight)
