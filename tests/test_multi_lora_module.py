"""`pylora.nn.MultiLoRALinear`: its call, its start, LoRALinear's adapters in it, and errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pylora
import pylora.functional as F
from pylora.nn import LoRALinear, MultiLoRALinear, NF4Linear

BASES = ["dense", "nf4"]


def base(kind: str, device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, device=device)
    return linear if kind == "dense" else NF4Linear.from_linear(linear)


def randomized(layer: Any) -> Any:
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return layer


def named(kind: str, **second: Any) -> LoRALinear:
    """A LoRALinear with the adapters "a" of rank 4 and "b" of rank 6, which have random values."""
    layer = LoRALinear(base(kind), r=4, lora_alpha=8, adapter_name="a")
    layer.add_adapter("b", **{"r": 6, "lora_alpha": 3, **second})
    for name in "ba":
        layer.set_adapter(name)
        nn.init.normal_(layer.lora_A, std=0.2)
        nn.init.normal_(layer.lora_B, std=0.2)
    return layer


@pytest.mark.parametrize("kind", BASES)
def test_it_calls_the_function_with_its_parameters(kind: str, backend: str, device: str) -> None:
    layer = randomized(MultiLoRALinear(base(kind, device), 3, 4, [1.0, 2.0, 3.0]))
    x = torch.randn(2, 5, 64, device=device, requires_grad=True)
    ids = torch.tensor([[0, 2, -1, 2, 0], [0, 0, 0, -1, 2]], device=device)
    scalings = torch.tensor([0.25, 0.5, 0.75], device=device)
    tensors = (layer.lora_A, layer.lora_B, ids, scalings, layer.base_layer.bias)
    y = layer(x, ids)
    assert torch.equal(y, F.multi_lora_linear(x, layer.base_weight, *tensors))
    y.sum().backward()
    assert not layer.lora_B.grad[1].any()  # no token has this adapter
    assert layer.lora_A.grad[0].any() and layer.lora_B.grad[2].any()
    trained = {name for name, p in layer.named_parameters() if p.grad is not None}
    assert trained == {"lora_A", "lora_B"}


@pytest.mark.parametrize("kind", BASES)
def test_it_starts_as_its_base(kind: str) -> None:
    layer = MultiLoRALinear(base(kind), adapters=2)
    x, ids = torch.randn(3, 64), torch.tensor([0, 1, -1])
    none = torch.full((3,), -1)
    assert torch.equal(layer(x, ids), layer(x, none))
    torch.testing.assert_close(layer(x, ids), base(kind)(x))


@pytest.mark.parametrize("kind", BASES)
def test_each_row_gets_the_adapter_of_a_lora_layer(kind: str) -> None:
    lora = named(kind)
    layer = MultiLoRALinear.of(lora, ["b", "a"])
    assert layer.base_layer is lora.base_layer and layer.scalings == (0.5, 2.0)
    x = torch.randn(3, 7, 64)

    def alone(name: str | None, row: Tensor) -> Tensor:
        lora.set_adapter(name)
        return lora(row)

    expected = torch.stack([alone(n, row) for n, row in zip(("a", "b", None), x, strict=True)])
    torch.testing.assert_close(layer(x, torch.tensor([1, 0, -1])), expected)
    lora.set_adapter("a")
    before = layer.lora_A.detach().clone()
    with torch.no_grad():
        lora.lora_A.zero_()
    assert torch.equal(layer.lora_A, before)  # copies


def test_copies_casts_and_state_dicts_keep_its_values() -> None:
    layer = randomized(MultiLoRALinear(base("nf4"), 2, 3, 1.0))  # 1 / 3 is no bfloat16
    x, ids = torch.randn(4, 64), torch.tensor([0, 1, 1, 0])
    expected = layer(x, ids)
    assert torch.equal(copy.deepcopy(layer)(x, ids), expected)
    other = MultiLoRALinear(base("nf4"), 2, 3, 1.0)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x, ids), expected)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x, ids), expected)
    cast = layer.bfloat16()
    assert cast(x.bfloat16(), ids).dtype == torch.bfloat16
    assert torch.equal(cast.float()._scalings(), torch.tensor([1 / 3, 1 / 3]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base": nn.ReLU()}, "base is ReLU; it must be an nn.Linear"),
        ({"adapters": 0}, "adapters is 0"),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": [1.0]}, "lora_alpha has 1 entries; it must have 2"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf; it must be finite"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        MultiLoRALinear(**{"base": base("dense"), "adapters": 2, **arguments})


@pytest.mark.parametrize(
    ("second", "names", "message"),
    [
        ({}, ["c"], "adapter_names has 'c'; the layer has 'a', 'b'"),
        ({}, [], "adapter_names is ..; it must be a list of names"),
        ({}, "ab", "adapter_names is 'ab'; it must be a list of names"),
        ({"use_dora": True}, ["a", "b"], "'b' has DoRA; it must be plain LoRA"),
        ({"lora_bias": True}, ["a", "b"], "'b' has a bias; it must be plain LoRA"),
        ({"dtype": torch.bfloat16}, ["a", "b"], "'b' is in torch.bfloat16; it must be in torch.fl"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(
    second: dict[str, Any], names: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MultiLoRALinear.of(named("dense", **second), names)


def test_a_merged_layer_is_refused() -> None:
    lora = named("dense")
    pylora.merge(lora)
    with pytest.raises(ValueError, match="layer is merged"):
        MultiLoRALinear.of(lora, ["a"])
