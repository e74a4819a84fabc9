"""y = x @ W^T + bias over NF4: numerics rule, gradients, compile, odd shapes, on every backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pylora
import pylora.functional as F
from pylora import reference
from pylora.testing import assert_as_accurate_as_torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# tokens, out_features, in_features, blocksize
SHAPES = [
    (16, 96, 256, 64),
    (1, 128, 128, 32),
    (5, 30, 420, 64),
    (3, 1, 13, 32),
    (130, 65, 576, 64),
]


def plain_torch(x: Tensor, w: pylora.NF4Weight, bias: Tensor | None) -> Tensor:
    """Computes the same without pylora, by torch's matmul with the dequantized weight."""
    dense = reference.dense(w.record, x.dtype)
    return torch.nn.functional.linear(x, dense, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("tokens", "out_features", "in_features", "blocksize"), SHAPES)
def test_forward_and_backward_equal_the_reference(
    backend: str,
    device: str,
    tokens: int,
    out_features: int,
    in_features: int,
    blocksize: int,
    double_quant: bool,
    dtype: torch.dtype,
) -> None:
    weight = torch.randn(out_features, in_features, device=device)
    w = pylora.quantize_nf4(weight, blocksize, double_quant)
    x = torch.randn(tokens, in_features, device=device).to(dtype).requires_grad_()
    bias = torch.randn(out_features, device=device).to(dtype).requires_grad_()
    grad = torch.randn(tokens, out_features, device=device).to(dtype)
    y = F.nf4_linear(x, w, bias)
    y.backward(grad)

    def gradients(x: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        x, bias = x.detach().requires_grad_(), bias.detach().requires_grad_()
        plain_torch(x, w, bias).backward(grad)
        return x.grad, bias.grad

    assert_as_accurate_as_torch(y, plain_torch, x, w, bias)
    assert_as_accurate_as_torch((x.grad, bias.grad), gradients, x, bias, grad)


def test_leading_dimensions_and_strides_change_no_value(backend: str, device: str) -> None:
    w = pylora.quantize_nf4(torch.randn(48, 128, device=device))
    x = torch.randn(128, 3, 5, device=device).permute(2, 1, 0)
    assert not x.is_contiguous()
    y = F.nf4_linear(x, w)
    assert y.shape == (5, 3, 48)
    assert_as_accurate_as_torch(y, plain_torch, x, w, None)
    assert F.nf4_linear(x[0, 0], w).shape == (48,)


@pytest.mark.parametrize("shape", [(0, 128), (2, 0, 128)])
def test_an_empty_batch_gives_empty_results(
    backend: str, device: str, shape: tuple[int, ...]
) -> None:
    w = pylora.quantize_nf4(torch.randn(48, 128, device=device))
    x = torch.zeros(shape, device=device, requires_grad=True)
    y = F.nf4_linear(x, w)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 48) and x.grad is not None and x.grad.shape == shape


def test_gradients_pass_gradcheck() -> None:
    """Only the reference takes float64. The gradient goes through the registered autograd."""
    w = pylora.quantize_nf4(torch.randn(6, 70), double_quant=True)
    x = torch.randn(3, 70, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bias: F.nf4_linear(x, w, bias), (x, bias))


def test_op_passes_opcheck(backend: str, device: str) -> None:
    w = pylora.quantize_nf4(torch.randn(6, 128, device=device), double_quant=True)
    x = torch.randn(2, 3, 128, device=device, requires_grad=True)
    bias = torch.randn(6, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.pylora.nf4_linear.default, (x, *w.op_arguments(), 6, bias))
    grad = torch.randn(2, 3, 6, device=device)
    torch.library.opcheck(
        torch.ops.pylora.nf4_linear_backward.default, (grad, *w.op_arguments(), 128)
    )


def test_a_compiled_function_gives_the_same_bits(backend: str, device: str) -> None:
    w = pylora.quantize_nf4(torch.randn(48, 128, device=device))
    compiled = torch.compile(lambda x: F.nf4_linear(x, w).relu(), fullgraph=True)
    x = torch.randn(4, 128, device=device, requires_grad=True)
    y = compiled(x)
    y.sum().backward()
    grad, x.grad = x.grad, None
    expected = F.nf4_linear(x, w).relu()
    expected.sum().backward()
    assert torch.equal(y, expected) and torch.equal(grad, x.grad)


def test_autocast_computes_in_its_dtype(backend: str, device: str) -> None:
    w = pylora.quantize_nf4(torch.randn(48, 128, device=device))
    x = torch.randn(4, 128, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = F.nf4_linear(x, w)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, F.nf4_linear(x.bfloat16(), w))


def test_results_repeat_bit_for_bit(backend: str, device: str) -> None:
    w = pylora.quantize_nf4(torch.randn(130, 576, device=device))
    x = torch.randn(37, 576, device=device)
    assert torch.equal(F.nf4_linear(x, w), F.nf4_linear(x, w))


@pytest.mark.parametrize(
    ("x", "bias", "error", "message"),
    [
        (
            torch.zeros(2, 64),
            None,
            ValueError,
            r"x has shape \(2, 64\); its last dimension must be",
        ),
        (torch.zeros(2, 128, dtype=torch.int64), None, TypeError, "x has dtype torch.int64"),
        (torch.zeros(2, 128, device="meta"), None, ValueError, "x is on meta; it must be on cpu"),
        (
            torch.zeros(2, 128),
            torch.zeros(5),
            ValueError,
            r"bias has shape \(5,\); it must be \(48,\)",
        ),
        ("x", None, TypeError, "x is str; it must be a Tensor"),
    ],
)
def test_errors_name_the_argument(
    x: Tensor, bias: Tensor | None, error: type, message: str
) -> None:
    w = pylora.quantize_nf4(torch.randn(48, 128))
    with pytest.raises(error, match=message):
        F.nf4_linear(x, w, bias)


def test_weight_must_be_quantized() -> None:
    with pytest.raises(TypeError, match="w is Tensor; it must be an NF4Weight"):
        F.nf4_linear(torch.zeros(2, 128), torch.zeros(48, 128))  # type: ignore[arg-type]
