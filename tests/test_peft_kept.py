"""A PEFT layer that keeps its checked call must notice whatever changes behind it."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

import pylora

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
from peft_models import assert_right  # noqa: E402

from benchmarks.models.bitsandbytes_layers import linear4bit  # noqa: E402

X = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))


class OneLayer(nn.Module):
    def __init__(self, base: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        dense = nn.Linear(64, 48)
        self.layer = dense if base == "dense" else linear4bit(dense, False)
        self.is_loaded_in_4bit = base != "dense"  # PEFT takes its layers by this mark

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def accelerated(base: str, **settings: Any) -> Any:
    """A model of one layer with the adapters "default", which is active, and "other"."""
    config = peft.LoraConfig(r=4, target_modules=["layer"], init_lora_weights=False, **settings)
    model = peft.get_peft_model(OneLayer(base), config)
    other = peft.LoraConfig(r=3, target_modules=["layer"], init_lora_weights=False)
    model.add_adapter("other", other)
    pylora.accelerate(model, strict=True)
    return model.eval()


def layer_of(model: Any) -> Any:
    return model.base_model.model.layer


def kept_of(model: Any) -> Any:
    return layer_of(model).__dict__["_pylora_swap"]._kept


def input_for(model: Any) -> torch.Tensor:
    return X.to(next(p.dtype for p in model.parameters() if p.is_floating_point()))


def result(model: Any) -> torch.Tensor:
    return model(input_for(model)).detach()


def _another_matrix(layer: Any) -> None:
    layer.lora_A["default"] = nn.Linear(64, 4, bias=False)


def _another_parameter(layer: Any) -> None:
    layer.lora_B["default"].weight = nn.Parameter(torch.randn(48, 4))


def _other_values(layer: Any) -> None:
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(-3)


def _another_base(layer: Any) -> None:
    torch.manual_seed(1)
    dense = nn.Linear(64, 48)
    is_dense = type(layer.base_layer) is nn.Linear
    layer.base_layer = dense if is_dense else linear4bit(dense, False)


def _hook(layer: Any) -> None:
    layer.lora_A["default"].register_forward_hook(lambda module, args, y: y * 2)


def _forward_of_a_part(layer: Any) -> None:
    part = layer.lora_B["default"]
    part.forward = MethodType(lambda self, x: nn.functional.linear(x, self.weight * 2), part)


CHANGES: dict[str, Callable[[Any, Any], object]] = {
    "another adapter": lambda model, layer: model.set_adapter("other"),
    "both adapters": lambda model, layer: layer.set_adapter(["default", "other"]),
    "disabled": lambda model, layer: layer.enable_adapters(False),
    "merged": lambda model, layer: model.merge_adapter(["default"]),
    "scaled": lambda model, layer: layer.set_scale("default", 0.25),
    "another matrix": lambda model, layer: _another_matrix(layer),
    "another parameter": lambda model, layer: _another_parameter(layer),
    "other values": lambda model, layer: _other_values(layer),
    "another base": lambda model, layer: _another_base(layer),
    "a hook": lambda model, layer: _hook(layer),
    "the forward of a part": lambda model, layer: _forward_of_a_part(layer),
    "a deleted adapter": lambda model, layer: model.delete_adapter("default"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_a_change_is_noticed(base: str, change: str) -> None:
    model = accelerated(base)
    before = result(model)
    assert kept_of(model).result(layer_of(model), X) is not None
    assert torch.equal(result(model), before)
    CHANGES[change](model, layer_of(model))
    after = result(model)
    if change != "merged":
        assert not torch.allclose(after, before)
    assert_right(model, result)


def test_the_adapters_of_single_rows_are_noticed() -> None:
    model = accelerated("nf4")
    before = result(model)
    names = ["other", "default"] * 3
    rows = model(X, adapter_names=names).detach()
    torch.testing.assert_close(rows[1::2], before[1::2])
    assert not torch.allclose(rows[::2], before[::2])
    assert torch.equal(result(model), before)


def test_dropout_is_drawn_in_training_alone() -> None:
    model = accelerated("nf4", lora_dropout=0.5)
    expected = result(model)
    assert torch.equal(result(model), expected)
    model.train()
    drawn = [result(model) for _ in range(3)]
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])
    assert torch.equal(result(model.eval()), expected)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_an_input_that_peft_would_cast_is_left_to_it(base: str) -> None:
    model = accelerated(base)
    result(model)
    layer = layer_of(model)
    for x in (X.double(), X.bfloat16()):
        assert kept_of(model).result(layer, x) is None
    for x in ("text", X[:, :63]):
        assert kept_of(model).result(layer, x) is None


def test_another_compute_dtype_of_bitsandbytes_is_noticed() -> None:
    model = accelerated("nf4")
    result(model)
    layer = layer_of(model)
    layer.base_layer.compute_dtype = torch.bfloat16
    assert kept_of(model).result(layer, X) is None
    layer.base_layer.compute_dtype = torch.float32
    assert kept_of(model).result(layer, X) is not None


def test_a_compiled_call_is_not_kept() -> None:
    torch.compiler.reset()
    model = accelerated("nf4")
    y = torch.compile(model, backend="eager")(X)
    assert kept_of(model) is None
    torch.testing.assert_close(y, model(X))


def test_gradients_flow_through_a_kept_call() -> None:
    def gradients(model: Any) -> torch.Tensor:
        model.zero_grad()
        model(input_for(model)).square().mean().backward()
        factors = (layer_of(model).lora_A, layer_of(model).lora_B)
        return torch.cat([factor["default"].weight.grad.flatten() for factor in factors])

    for base in ("dense", "nf4"):
        model = accelerated(base)
        for _ in range(3):
            assert_right(model, gradients)


# A Linear4bit without an adapter keeps its call as well.


def _bias_in_bfloat16(layer: Any) -> None:
    layer.bias.data = layer.bias.data.bfloat16()


def _another_bias(layer: Any) -> None:
    layer.bias = nn.Parameter(torch.randn(48))


def _without_bias(layer: Any) -> None:
    layer.bias = None


def _quantized_anew(layer: Any) -> None:
    layer.weight = linear4bit(nn.Linear(64, 48), True).weight


def _other_codes(layer: Any) -> None:
    layer.weight.data = layer.weight.data.flip(0).contiguous()


def _another_compute_dtype(layer: Any) -> None:
    layer.compute_dtype = torch.bfloat16


PACKED_CHANGES = (
    _bias_in_bfloat16,
    _another_bias,
    _without_bias,
    _quantized_anew,
    _other_codes,
    _another_compute_dtype,
)


@pytest.mark.parametrize("change", PACKED_CHANGES)
def test_a_change_of_a_plain_4bit_layer_is_noticed(change: Callable[[Any], None]) -> None:
    model = OneLayer("nf4").requires_grad_(False)
    pylora.accelerate(model, strict=True)
    before = [model(X), model(X)]
    assert torch.equal(*before)
    change(model.layer)
    after = model(X)
    assert not torch.equal(after, before[0])
    # A layer that has just been swapped has kept nothing.
    pylora.restore(model)
    pylora.accelerate(model, strict=True)
    assert torch.equal(model(X), after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_plain_4bit_layer_returns_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    model = OneLayer("nf4")
    pylora.accelerate(model, strict=True)
    model(X)
    for _ in range(2):
        assert model(X.to(dtype)).dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(X).dtype == torch.float32
    with pytest.raises(RuntimeError, match=r"shapes|size"):
        model(X[:, :63])


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_a_call_under_autocast_keeps_no_cast_of_a_parameter(base: str) -> None:
    model = accelerated(base).bfloat16() if base == "dense" else accelerated(base)
    x = X.bfloat16()
    for key in ("lora_A", "lora_B"):
        getattr(layer_of(model), key)["default"].float()
    with torch.no_grad():
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                model(x)
            layer_of(model).lora_B["default"].weight.normal_()
            after = model(x)
            pylora.restore(model)
            pylora.accelerate(model, strict=True)
            assert torch.equal(model(x), after)
