"""Our ops allow what nn.Linear allows its users.

They may change outputs in place, use layers without features, take gradients of gradients (or get a
clear refusal), and set any default dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.functional import linear

import pylora
from pylora import functional as F
from pylora.functional import Projection
from pylora.nn import LoRALinear, NF4Linear
from pylora.testing import assert_as_accurate_as_torch

Call = Callable[[Tensor], Tensor]


def calls(make: Callable[..., Projection], device: str) -> dict[str, Call]:
    """Returns every op that has a backward as a function of x, [..., 64] -> [..., 64]."""
    q, k, v = (make(64, 64, 4, device=device) for _ in range(3))
    assert q.lora_A is not None and q.lora_B is not None
    many = (q.lora_A.detach()[None], q.lora_B.detach()[None])
    scalings = torch.ones(1, device=device)

    def multi(x: Tensor) -> Tensor:
        ids = torch.zeros(x.numel() // 64, dtype=torch.int64, device=device)
        return F.multi_lora_linear(x, q.weight, *many, ids, scalings)

    return {
        "nf4_linear": lambda x: F.nf4_linear(x, q.weight),
        "lora_linear": lambda x: F.lora_linear(x, q.weight, q.lora_A, q.lora_B, 0.5),
        "lora_qkv": lambda x: F.lora_qkv(x, q, k, v)[1],
        "lora_mlp": lambda x: F.lora_mlp(x, q, k, v),
        "multi_lora_linear": multi,
    }


OPS = ["nf4_linear", "lora_linear", "lora_qkv", "lora_mlp", "multi_lora_linear"]


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_output_can_be_changed_in_place(
    backend: str, device: str, make_projection: Any, op: str, leading: tuple[int, ...]
) -> None:
    call = calls(make_projection, device)[op]
    x = torch.randn(*leading, 64, device=device, requires_grad=True)
    grad = torch.randn(*leading, 64, device=device)
    y = call(x)
    (expected,) = torch.autograd.grad(y, x, grad * (y > 0))
    y = call(x)
    before = y.detach().clone()
    (got,) = torch.autograd.grad(torch.relu_(y), x, grad)
    assert torch.equal(y, before.relu())
    assert torch.equal(got, expected)


def test_gradient_of_a_gradient_is_that_of_torch(backend: str, device: str) -> None:
    w = pylora.quantize_nf4(torch.randn(32, 64, device=device))
    x = torch.randn(5, 64, device=device)

    def penalty(x: Tensor, call: Call) -> Tensor:
        x = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(call(x).pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.pow(2).sum(), x)[0]

    def plain_torch(x: Tensor) -> Tensor:
        return penalty(x, lambda x: linear(x, pylora.dequantize_nf4(w, x.dtype)))

    assert_as_accurate_as_torch(penalty(x, lambda x: F.nf4_linear(x, w)), plain_torch, x)


@pytest.mark.parametrize("op", OPS[1:])
def test_gradient_of_a_gradient_is_refused_if_there_is_none(
    backend: str, device: str, make_projection: Any, op: str
) -> None:
    call = calls(make_projection, device)[op]
    x = torch.randn(3, 64, device=device, requires_grad=True)
    (dx,) = torch.autograd.grad(call(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{op}_backward has no gradient"):
        dx.sum().backward()


@pytest.mark.parametrize("leading", [(), (0,), (2, 3)], ids=str)
@pytest.mark.parametrize("in_features, out_features", [(0, 5), (5, 0)])
def test_layers_without_features_give_the_bias(
    backend: str, device: str, in_features: int, out_features: int, leading: tuple[int, ...]
) -> None:
    layer = NF4Linear(in_features, out_features, device=device)
    assert layer.bias is not None
    x = torch.randn(*leading, in_features, device=device, requires_grad=True)
    A = torch.randn(2, in_features, device=device, requires_grad=True)
    B = torch.randn(out_features, 2, device=device, requires_grad=True)
    for y in (layer(x), F.lora_linear(x, layer.nf4_weight, A, B, 0.5, layer.bias)):
        assert torch.equal(y, layer.bias.detach().expand(*leading, out_features))
        y.sum().backward()
        assert x.grad is not None and not x.grad.any()


@pytest.fixture(params=[torch.float16, torch.bfloat16, torch.float64], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("double_quant", [False, True])
def test_scales_are_fp32_under_any_default_dtype(
    default_dtype: torch.dtype, double_quant: bool
) -> None:
    dense = nn.Linear(128, 32, dtype=torch.bfloat16)
    layer = NF4Linear.from_linear(dense, double_quant=double_quant)
    state = layer.checkpoint_entries()
    for name in ("quant_map", *["nested_absmax", "nested_quant_map"] * double_quant):
        assert state[f"weight.{name}"].dtype == torch.float32, name
    loaded = NF4Linear(128, 32, double_quant=double_quant, dtype=torch.bfloat16)
    loaded.load_state_dict(state)
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    assert torch.equal(loaded(x), layer(x))
    LoRALinear(layer, r=4)(x).sum().backward()


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("base_format", ["dense", "nf4"])
def test_a_layer_on_meta_can_be_filled_after_its_first_forward(
    base_format: str, use_dora: bool
) -> None:
    def layer(device: str) -> LoRALinear:
        linear = nn.Linear if base_format == "dense" else NF4Linear
        return LoRALinear(linear(64, 32, device=device), r=4, use_dora=use_dora)

    source, empty = layer("cpu"), layer("meta")
    nn.init.normal_(source.lora_B)
    assert empty(torch.empty(5, 64, device="meta")).shape == (5, 32)
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(source.state_dict())
    x = torch.randn(5, 64)
    assert torch.equal(filled(x), source(x))


@pytest.mark.parametrize("double_quant", [False, True])
def test_fake_tensors_pass_forward_and_backward(double_quant: bool) -> None:
    with FakeTensorMode():
        layer = LoRALinear(NF4Linear(64, 32, double_quant=double_quant), r=4)
        y = layer(torch.randn(5, 64, requires_grad=True))
        y.sum().backward()
    assert isinstance(y, FakeTensor) and y.shape == (5, 32)
    assert layer.lora_A.grad is not None and layer.lora_A.grad.shape == (4, 64)
