"""Weights without features: every op follows its formula on each backend and has gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pylora
import pylora.functional as F
from pylora.functional import Projection

# (out_features, in_features)
SHAPES = [(6, 0), (0, 64), (0, 0)]


def leaf(*shape: int, device: str) -> Tensor:
    return torch.randn(*shape, device=device, requires_grad=True)


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param


@pytest.fixture(params=["nf4", "dense"])
def weight(request: pytest.FixtureRequest, shape: tuple[int, int], device: str) -> Any:
    values = torch.randn(shape, device=device)
    return pylora.quantize_nf4(values) if request.param == "nf4" else values


@pytest.fixture
def x(shape: tuple[int, int], device: str) -> Tensor:
    return leaf(2, 3, shape[1], device=device)


@pytest.fixture
def lora(shape: tuple[int, int], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns lora_A, lora_B and bias."""
    sizes = ((4, shape[1]), (shape[0], 4), shape[:1])
    A, B, bias = (leaf(*size, device=device) for size in sizes)
    return A, B, bias


def check_gradients(y: Tensor, *leaves: Tensor) -> None:
    """Checks the gradients of y.sum(): 6, the number of tokens, for a bias, and 0 otherwise."""
    gradients = torch.autograd.grad(y.sum(), leaves, allow_unused=True)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        expected = 6.0 if leaf.dim() == 1 else 0.0
        assert gradient is not None and torch.equal(gradient, torch.full_like(leaf, expected))


def test_nf4_linear_gives_the_bias(
    backend: str, device: str, x: Tensor, lora: Any, shape: tuple[int, int]
) -> None:
    w = pylora.quantize_nf4(torch.randn(shape, device=device), double_quant=True)
    assert pylora.dequantize_nf4(w).shape == shape
    y = F.nf4_linear(x, w, lora[2])
    assert torch.equal(y, lora[2].expand(2, 3, -1))
    check_gradients(y, x, lora[2])
    assert pylora.explain("nf4_linear", x, w).backward is not None


def test_lora_linear_gives_the_bias(backend: str, x: Tensor, weight: Any, lora: Any) -> None:
    y = F.lora_linear(x, weight, lora[0], lora[1], 0.5, lora[2], dropout_p=0.1, seed=1)
    assert torch.equal(y, lora[2].expand(2, 3, -1))
    check_gradients(y, x, *lora)
    assert pylora.explain("lora_linear", x, weight, *lora[:2], 0.5).backward is not None


def test_lora_qkv_gives_the_bias(backend: str, x: Tensor, weight: Any, lora: Any) -> None:
    projection = Projection(weight, lora[0], lora[1], 0.5, lora[2])
    query, _, value = F.lora_qkv(x, projection, Projection(weight), projection)
    assert torch.equal(query, lora[2].expand(2, 3, -1)) and torch.equal(query, value)
    check_gradients(query, x, *lora)
    assert pylora.explain("lora_qkv", x, projection, projection, projection).backward is not None


@pytest.mark.parametrize("has_lora", [True, False])
def test_lora_mlp_gives_the_bias(
    backend: str, device: str, x: Tensor, weight: Any, lora: Any, has_lora: bool
) -> None:
    """gate and up give zeros or no features, so only down's bias is left."""
    intermediate = weight.shape[0]
    bias = leaf(8, device=device)
    down = Projection(pylora.quantize_nf4(torch.randn(8, intermediate, device=device)), bias=bias)
    projection = Projection(weight)
    if has_lora:
        projection = Projection(weight, *lora[:2])
        A, B = leaf(4, intermediate, device=device), leaf(8, 4, device=device)
        down = down._replace(lora_A=A, lora_B=B)
    y = F.lora_mlp(x, projection, projection, down)
    assert torch.equal(y, bias.expand(2, 3, -1))
    check_gradients(y, x, bias)
    assert pylora.explain("lora_mlp", x, projection, projection, down).backward is not None


def test_multi_lora_linear_gives_the_bias(
    backend: str, device: str, x: Tensor, weight: Any, lora: Any
) -> None:
    A, B = (t.detach().expand(2, *t.shape).clone().requires_grad_() for t in lora[:2])
    adapters = (A, B, torch.tensor([0, 1, -1] * 2, device=device), torch.ones(2, device=device))
    y = F.multi_lora_linear(x, weight, *adapters, lora[2])
    assert torch.equal(y, lora[2].expand(2, 3, -1))
    check_gradients(y, x, A, B, lora[2])
    assert pylora.explain("multi_lora_linear", x, weight, *adapters).backward is not None
