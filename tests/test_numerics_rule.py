"""The numerics rule itself: the results that it accepts and those that it refuses."""

from __future__ import annotations

import pytest
import torch

from pylora.testing import assert_as_accurate_as_torch


def matmul(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_accepts_torch_and_better(dtype: torch.dtype) -> None:
    x, w = torch.randn(8, 64).to(dtype), torch.randn(64, 32).to(dtype)
    assert assert_as_accurate_as_torch(x @ w, matmul, x, w).used < 1
    better = (x.double() @ w.double()).to(dtype)
    assert assert_as_accurate_as_torch(better, matmul, x, w).used < 1


def test_refuses_a_small_error_everywhere_and_a_large_one_somewhere() -> None:
    x, w = torch.randn(64, 64), torch.randn(64, 64)
    with pytest.raises(AssertionError, match="error is"):
        assert_as_accurate_as_torch((x @ w) * (1 + 2e-6), matmul, x, w)
    y = x @ w
    y[3, 4] += 1e-3
    with pytest.raises(AssertionError, match="the largest error is"):
        assert_as_accurate_as_torch(y, matmul, x, w)
    with pytest.raises(AssertionError, match="error is"):
        assert_as_accurate_as_torch((x.bfloat16() @ w.bfloat16()).float(), matmul, x, w)


def test_refuses_nan_shape_dtype_and_missing_outputs() -> None:
    x, w = torch.randn(4, 64), torch.randn(64, 4)
    y = x @ w
    y[0, 0] = float("nan")
    with pytest.raises(AssertionError, match=r"1 of 16 elements are wrongly \(non-\)finite"):
        assert_as_accurate_as_torch(y, matmul, x, w)
    with pytest.raises(AssertionError, match="shape"):
        assert_as_accurate_as_torch((x @ w)[:2], matmul, x, w)
    with pytest.raises(AssertionError, match="dtype"):
        assert_as_accurate_as_torch((x @ w).half(), matmul, x, w)
    with pytest.raises(ValueError, match="zip"):
        assert_as_accurate_as_torch((x @ w, x), matmul, x, w)
    with pytest.raises(AssertionError, match="2 of 4 integers differ"):
        assert_as_accurate_as_torch(torch.tensor([1, 2, 3, 4]), lambda: torch.tensor([1, 2, 0, 0]))
