"""The op of a layer with DoRA: numerics, gradients, opcheck, compile, on every backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from flat_calls import flat_of
from torch import Tensor

import pylora
import pylora.functional as F
from pylora import reference
from pylora.calls import DoraLinearBackward, DoraLinearCall, Wanted
from pylora.nn import LoRALinear, NF4Linear
from pylora.ops import run, run_output
from pylora.testing import assert_as_accurate_as_torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BF16, FP32 = torch.bfloat16, torch.float32
SCALING = 0.5
# The tensors that the op can be differentiated in, beside a dense weight.
NAMES = ("x", "lora_A", "lora_B", "magnitude", "bias")
# tokens, out_features, in_features, rank, weight kind
CASES = {
    "one token": (1, 128, 192, 8, "nf4"),
    "a few tokens": (5, 70, 96, 33, "nested"),
    "blocks straddle rows": (9, 37, 45, 4, "nf4"),
    "many tokens": (150, 96, 128, 16, "nf4"),
    "dense": (7, 48, 70, 4, "dense"),
    "dense, many tokens": (200, 48, 70, 4, "dense"),
}


def make(
    tokens: int,
    out_features: int,
    in_features: int,
    rank: int,
    kind: str = "nf4",
    dtype: torch.dtype = FP32,
    lora_dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """The tensors of a call. All but an NF4 weight and the norm need gradients."""
    of_lora = lora_dtype or dtype

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_()

    weight: Any = normal(out_features, in_features, scale=in_features**-0.5)
    if kind != "dense":
        weight = pylora.quantize_nf4(weight.detach().float(), 32, double_quant=kind == "nested")
    return {
        "x": normal(tokens, in_features),
        "weight": weight,
        "lora_A": normal(rank, in_features, scale=in_features**-0.5, dtype=of_lora),
        "lora_B": normal(out_features, rank, dtype=of_lora),
        "magnitude": normal(out_features, dtype=of_lora),
        "norm": (torch.rand(out_features, device=device) + 0.5).to(of_lora),
        "bias": normal(out_features),
    }


def call_of(
    x: Tensor,
    weight: Any,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    bias: Tensor | None = None,
) -> DoraLinearCall:
    call = F.CALLS["lora_linear"](x, weight, lora_A, lora_B, SCALING, bias)
    layer = replace(call.layer, bias=None)
    return DoraLinearCall(call.x, layer, call.layer.bias, magnitude, norm)


def dora_linear(**tensors: Any) -> Tensor:
    return run_output(call_of(**tensors))


def plain_torch(
    x: Tensor,
    weight: Any,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    if isinstance(weight, pylora.NF4Weight):
        weight = reference.dense(weight.record, x.dtype)
    linear = torch.nn.functional.linear
    low_rank = linear(linear(x.to(lora_A.dtype), lora_A), lora_B) * SCALING
    product = (linear(x, weight) + low_rank).to(x.dtype)  # as lora_linear rounds it
    y = product * (magnitude / norm).to(x.dtype)
    return y if bias is None else y + bias


def gradients(grad: Tensor, function: Any, tensors: dict[str, Any]) -> Any:
    """The gradients of everything but the norm and an NF4 weight."""
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in tensors.items()
        if isinstance(value, Tensor) and name != "norm"
    }
    return torch.autograd.grad(function(**tensors | leaves), list(leaves.values()), grad)


def check(tensors: dict[str, Any]) -> None:
    y = dora_linear(**tensors)
    assert_as_accurate_as_torch(y, plain_torch, **tensors)
    grad = torch.randn_like(y)
    actual = gradients(grad, dora_linear, tensors)
    assert_as_accurate_as_torch(actual, gradients, grad, plain_torch, tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", list(CASES))
def test_forward_and_backward_equal_the_reference(
    backend: str, device: str, case: str, dtype: torch.dtype
) -> None:
    check(make(*CASES[case], dtype=dtype, device=device))


@pytest.mark.parametrize("kind", ["nf4", "dense"])
def test_lora_may_be_fp32_over_bf16(backend: str, device: str, kind: str) -> None:
    check(make(20, 48, 96, 16, kind, BF16, FP32, device))


def test_a_layer_without_bias_and_a_frozen_magnitude(backend: str, device: str) -> None:
    t = make(6, 48, 96, 8, device=device)
    t |= {"bias": None, "magnitude": t["magnitude"].detach()}
    y = dora_linear(**t)
    assert_as_accurate_as_torch(y, plain_torch, **t)
    trained = [t["lora_A"], t["lora_B"]]
    actual = torch.autograd.grad(y.sum(), trained)
    expected = torch.autograd.grad(plain_torch(**t).sum(), trained)
    torch.testing.assert_close(actual, expected)


def test_the_norm_has_no_gradient() -> None:
    t = make(6, 48, 96, 8)
    t["norm"].requires_grad_()
    (gradient,) = torch.autograd.grad(dora_linear(**t).sum(), [t["norm"]], allow_unused=True)
    assert gradient is None


def test_a_magnitude_of_zero_is_trained_as_any_other(backend: str, device: str) -> None:
    """The gradient of the magnitude comes from the product, which y no longer has."""
    t = make(6, 48, 96, 8, device=device)
    t["magnitude"] = torch.zeros_like(t["magnitude"]).requires_grad_()
    check(t)


@pytest.mark.parametrize("shape", [(0, 96), (2, 0, 96)])
def test_an_empty_batch_gives_empty_results(
    backend: str, device: str, shape: tuple[int, ...]
) -> None:
    t = make(1, 48, 96, 4, device=device)
    t["x"] = torch.zeros(shape, device=device, requires_grad=True)
    y = dora_linear(**t)
    assert y.shape == (*shape[:-1], 48)
    for gradient in torch.autograd.grad(y.sum(), [t[name] for name in NAMES]):
        assert not gradient.any()


def test_leading_dimensions_and_strides_change_no_value(backend: str, device: str) -> None:
    t = make(15, 48, 96, 8, device=device)
    x = t["x"].detach().view(5, 3, 96).permute(2, 1, 0).contiguous().permute(2, 1, 0)
    y = dora_linear(**t | {"x": x})
    assert not x.is_contiguous() and y.shape == (5, 3, 48)
    assert_as_accurate_as_torch(y.view(15, 48), plain_torch, **t)


def test_gradients_pass_gradcheck() -> None:
    """Only the reference takes float64."""
    for kind in ("nested", "dense"):
        t = make(4, 5, 18, 2, kind, torch.float64)
        names = (*NAMES, "weight") if kind == "dense" else NAMES

        def function(*values: Tensor, names: Any = names, t: Any = t) -> Tensor:
            return dora_linear(**t | dict(zip(names, values, strict=True)))

        assert torch.autograd.gradcheck(function, [t[name] for name in names])


@pytest.mark.parametrize("kind", ["nf4", "dense"])
def test_op_passes_opcheck(backend: str, device: str, kind: str) -> None:
    t = make(5, 48, 64, 4, kind, device=device)
    torch.library.opcheck(torch.ops.pylora.dora_linear.default, flat_of(call_of(**t)))
    detached = {n: v.detach() if isinstance(v, Tensor) else v for n, v in t.items()}
    call = call_of(**detached)
    y, h, product = run(call)
    wanted = Wanted(True, kind == "dense", True, True, True, magnitude=True)
    backward = DoraLinearBackward(
        y, call.x, h, product, call.layer, call.magnitude, call.norm, wanted
    )
    torch.library.opcheck(torch.ops.pylora.dora_linear_backward.default, flat_of(backward))


def test_the_registered_op_gives_the_same_bits(backend: str, device: str) -> None:
    t = make(5, 48, 64, 4, device=device)
    y, h, product = torch.ops.pylora.dora_linear(*flat_of(call_of(**t)))
    assert torch.equal(y, dora_linear(**t)) and y.requires_grad
    assert not h.requires_grad and not product.requires_grad


def test_double_backward_is_refused() -> None:
    t = make(3, 48, 64, 4)
    (dx,) = torch.autograd.grad(dora_linear(**t).square().sum(), [t["x"]], create_graph=True)
    with pytest.raises(NotImplementedError, match="dora_linear_backward has no gradient"):
        dx.sum().backward()


@pytest.mark.parametrize("kind", ["nf4", "dense"])
def test_compiles_as_one_graph(kind: str) -> None:
    t = make(5, 48, 64, 4, kind)
    leaves = [t[name] for name in NAMES]

    def function(*values: Tensor) -> Tensor:
        return dora_linear(**t | dict(zip(NAMES, values, strict=True)))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves)
    expected = function(*leaves)
    grad = torch.randn_like(expected)
    assert torch.equal(compiled, expected)
    pairs = zip(
        torch.autograd.grad(compiled, leaves, grad),
        torch.autograd.grad(expected, leaves, grad),
        strict=True,
    )
    assert all(torch.equal(actual, right) for actual, right in pairs)


def float64_y(layer: LoRALinear, x: Tensor) -> Tensor:
    """DoRA as its paper writes it, in float64."""
    base, A, B = layer.base_layer, layer.lora_A.double(), layer.lora_B.double()
    weight = base.nf4_weight.dequantize(torch.float64) if isinstance(base, NF4Linear) else None
    weight = base.weight.double() if weight is None else weight
    adapted = weight + layer.scaling * (B @ A)
    assert layer.lora_magnitude is not None
    rescale = layer.lora_magnitude.double() / torch.linalg.vector_norm(adapted, dim=1)
    return torch.nn.functional.linear(x.double(), adapted) * rescale


@pytest.mark.parametrize("size", [0.02, 1.0])
@pytest.mark.parametrize("kind", ["nf4", "dense"])
def test_a_bf16_layer_is_as_accurate_as_peft(kind: str, size: float) -> None:
    """The norm's cross term runs in bf16. The adapter is small, or larger than the base weight."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 192, bias=False, dtype=BF16)
    base = NF4Linear.from_linear(linear) if kind == "nf4" else linear
    layer = LoRALinear(base, 16, 32, use_dora=True, dtype=BF16)
    torch.nn.init.normal_(layer.lora_B, std=size)
    model = torch.nn.Sequential(torch.nn.Linear(256, 192, bias=False, dtype=BF16))
    if kind == "nf4":
        model[0].weight.data.copy_(base.nf4_weight.dequantize(BF16))
    else:
        model[0].weight.data.copy_(linear.weight)
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=["0"], use_dora=True)
    theirs = peft.get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model[0]
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(layer.lora_A)
        theirs.lora_B["default"].weight.copy_(layer.lora_B)
        theirs.lora_magnitude_vector["default"].weight.copy_(layer.lora_magnitude)
        x = torch.randn(64, 256).to(BF16)
        expected = float64_y(layer, x)
        errors = [(m(x).double() - expected).square().mean().sqrt() for m in (layer, theirs)]
    assert errors[0] <= 1.05 * errors[1]
