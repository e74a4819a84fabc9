"""The products of torch that the cuda backend makes of LoRA run on a CPU too."""

from __future__ import annotations

import pytest
import torch

import pylora
from pylora import reference
from pylora.backends import cuda_products
from pylora.backends.backend import Plan
from pylora.calls import (
    Layer,
    LayerGradients,
    LoraLinearBackward,
    LoraLinearCall,
    LowRank,
    Wanted,
    Weight,
)
from pylora.testing import assert_as_accurate_as_torch

FIELDS = tuple(LayerGradients.__dataclass_fields__)
ALL = Wanted(x=True, weight=True, A=True, B=True, bias=True, A_bias=True, B_bias=True)


def call_of(
    dense: bool, dtype: torch.dtype, activation: str, wanted: Wanted
) -> tuple[LoraLinearBackward, Plan | None]:
    """A backward over 3 x 10 tokens, and the plan of grad @ W that it gets."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(dtype)

    weight = normal(48, 64) / 8
    record = Weight.dense(weight) if dense else pylora.quantize_nf4(weight).record
    low = LowRank(normal(8, 64) / 8, normal(48, 8), normal(8), normal(48), 0.3, activation)
    layer = Layer(record, normal(48), low)
    x, grad, h = normal(3, 10, 64), normal(3, 10, 48), torch.randn(3, 10, 8)
    nf4 = Plan("the reference", reference.nf4_linear_backward)
    base = cuda_products.DENSE_BACKWARD if dense else nf4
    return LoraLinearBackward(grad, x, h, layer, wanted), base if wanted.x else None


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("activation", ["identity", "gelu"])
def test_backward_obeys_the_numerics_rule(dense: bool, dtype: torch.dtype, activation: str) -> None:
    wanted = ALL if dense else Wanted(True, False, True, True, True, True, True)
    call, base = call_of(dense, dtype, activation, wanted)
    low = call.layer.low_rank
    assert low is not None
    names = [name for name in FIELDS if getattr(wanted, name)]
    weight = reference.dense(call.layer.weight, dtype)

    def plain_torch(grad, x, h, weight, A, B, A_bias, B_bias):
        layer = Layer(
            Weight.dense(weight),
            call.layer.bias,
            LowRank(A, B, A_bias, B_bias, low.scaling, activation),
        )
        gradients = reference.lora_linear_backward(LoraLinearBackward(grad, x, h, layer, wanted))
        return tuple(getattr(gradients, name) for name in names)

    gradients = cuda_products.lora_linear_backward(base)(call)
    actual = tuple(getattr(gradients, name) for name in names)
    tensors = (call.grad, call.x, call.h, weight, low.A, low.B, low.A_bias, low.B_bias)
    assert_as_accurate_as_torch(actual, plain_torch, *tensors)


@pytest.mark.parametrize("name", ["x", "weight", "A", "B", "bias", "A_bias", "B_bias"])
def test_only_the_gradients_asked_for_are_computed(name: str) -> None:
    call, base = call_of(True, torch.bfloat16, "identity", Wanted(**{name: True}))
    gradients = cuda_products.lora_linear_backward(base)(call)
    assert [field for field in FIELDS if getattr(gradients, field) is not None] == [name]


def test_the_forward_over_a_dense_weight_is_the_references_bit_for_bit() -> None:
    call, _ = call_of(True, torch.bfloat16, "gelu", ALL)
    forward = LoraLinearCall(call.x, call.layer)
    for actual, expected in zip(
        cuda_products.lora_linear(forward), reference.lora_linear(forward), strict=True
    ):
        assert torch.equal(actual, expected)


def test_dropout_and_another_dtype_are_refused() -> None:
    call, _ = call_of(True, torch.bfloat16, "identity", ALL)
    low = call.layer.low_rank
    assert low is not None
    assert cuda_products.reason("grad", call.grad, low) is None
    assert cuda_products.reason("grad", call.grad.half(), low) == (
        "lora_A is torch.bfloat16; the products take torch.float16, as grad has"
    )
