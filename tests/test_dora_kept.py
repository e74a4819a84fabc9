"""DoRA keeps its norms between calls without gradients, and notices every change behind them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pylora
from pylora.backends import extension
from pylora.nn import LoRALinear, NF4Linear, dora

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


def dora_layer(base: str, dtype: torch.dtype = torch.float32) -> LoRALinear:
    torch.manual_seed(0)
    dense = nn.Linear(64, 48)
    layer = LoRALinear(
        dense if base == "dense" else NF4Linear.from_linear(dense), r=4, use_dora=True, dtype=dtype
    )
    layer.add_adapter("other", r=3, use_dora=True, dtype=dtype)
    for name in layer.adapter_names:
        nn.init.normal_(layer.adapter(name).lora_B)
        nn.init.uniform_(layer.adapter(name).lora_magnitude)
    return layer.eval()


def peft_layer(base: str) -> Any:
    peft = pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    from benchmarks.models.bitsandbytes_layers import linear4bit

    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(64, 48)})
    if base != "dense":
        model["layer"] = linear4bit(model["layer"], True)
    model.is_loaded_in_4bit = base != "dense"
    config = peft.LoraConfig(
        r=4, target_modules=["layer"], init_lora_weights=False, use_dora=True, lora_alpha=8
    )
    adapted = peft.get_peft_model(model, config).eval()
    pylora.accelerate(adapted, strict=True)
    return adapted.base_model.model["layer"]


LAYERS = {"pylora": dora_layer, "peft": peft_layer}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has one entry for each time that the norms are computed."""
    calls: list[int] = []
    right = dora.adapted_norm

    def counting(*arguments: Any) -> Tensor:
        calls.append(1)
        return right(*arguments)

    monkeypatch.setattr(dora, "adapted_norm", counting)
    return calls


@torch.no_grad()
def result(layer: Any, x: Tensor = X) -> Tensor:
    return layer(x)


def anew(layer: Any) -> Tensor:
    """What a copy of the layer computes, which has kept nothing."""
    return result(copy.deepcopy(layer))


def factor(layer: Any, name: str) -> nn.Parameter:
    held = getattr(layer, name)
    return held["default"].weight if isinstance(held, nn.ModuleDict) else held


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_norms_are_computed_once(kind: str, base: str, counted: list[int]) -> None:
    layer = LAYERS[kind](base)
    counted.clear()
    first = result(layer)
    assert all(torch.equal(result(layer), first) for _ in range(3))
    assert torch.equal(result(layer, X[:1]), result(copy.deepcopy(layer), X[:1]))
    assert len(counted) == 2  # one is of the copy
    layer(X).sum().backward()
    layer(X)
    assert len(counted) == 2  # they are those of the calls with gradients as well
    with torch.no_grad():
        factor(layer, "lora_B").mul_(2)  # a step of the optimizer
    layer(X)
    assert not torch.equal(result(layer), first) and len(counted) == 3


def _in_place(layer: Any) -> None:
    with torch.no_grad():
        factor(layer, "lora_B").mul_(2)


def _without_a_version(layer: Any) -> None:
    A = factor(layer, "lora_A")
    A.data.copy_(torch.randn(A.shape))


def _in_another_order(layer: Any) -> None:
    """The sum of all elements stays what it was."""
    B = factor(layer, "lora_B")
    B.data.copy_(B.data.flip(0))


def _other_memory(layer: Any) -> None:
    B = factor(layer, "lora_B")
    B.data = torch.randn(B.shape)


def _magnitude(layer: Any) -> None:
    held = getattr(layer, "lora_magnitude", None)
    magnitude = layer.lora_magnitude_vector["default"].weight if held is None else held
    magnitude.data.mul_(3)


def _scaling(layer: Any) -> None:
    if isinstance(layer, LoRALinear):
        layer.set_scaling(5, False)
    else:
        layer.set_scale("default", 0.25)


CHANGES: tuple[Callable[[Any], None], ...] = (
    _in_place,
    _without_a_version,
    _in_another_order,
    _other_memory,
    _magnitude,
    _scaling,
)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_change_is_noticed(kind: str, base: str, change: Callable[[Any], None]) -> None:
    layer = LAYERS[kind](base)
    before = result(layer)
    assert torch.equal(result(layer), before)
    change(layer)
    after = result(layer)
    assert not torch.equal(after, before)
    assert torch.equal(after, anew(layer))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_change_is_noticed_in_training(
    kind: str, base: str, change: Callable[[Any], None]
) -> None:
    layer = LAYERS[kind](base)
    names = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]

    def gradients(layer: Any) -> list[Tensor]:
        trained = [layer.get_parameter(name) for name in names]
        return list(torch.autograd.grad(layer(X).square().sum(), trained))

    before = [gradients(layer) for _ in range(2)]
    assert all(map(torch.equal, *before))
    change(layer)
    after = gradients(layer)
    assert not all(map(torch.equal, after, before[0]))
    assert all(map(torch.equal, after, gradients(copy.deepcopy(layer))))


@pytest.mark.parametrize("size", [0, 1, 63, 64, 200])
def test_every_byte_is_in_the_fingerprint(size: int) -> None:
    values = torch.randint(256, (size,), dtype=torch.uint8)
    right = extension.fingerprint(values)
    assert extension.fingerprint(values.clone()) == right
    for index in range(size):
        other = values.clone()
        other[index] += 1
        assert extension.fingerprint(other) != right


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_another_adapter_or_weight_is_noticed(base: str, dtype: torch.dtype) -> None:
    layer = dora_layer(base, dtype)
    before = result(layer)
    layer.set_adapter("other")
    assert not torch.equal(result(layer), before) and torch.equal(result(layer), anew(layer))
    layer.set_adapter("default")
    assert torch.equal(result(layer), before)
    if base == "dense":
        layer.base_layer.weight.data.mul_(2)
    else:
        layer.base_layer.set_nf4_weight(pylora.quantize_nf4(torch.randn(48, 64)))
    layer.refresh_base_norm()
    assert not torch.equal(result(layer), before) and torch.equal(result(layer), anew(layer))


def test_a_4bit_layer_of_peft_that_is_quantized_anew_is_noticed() -> None:
    from benchmarks.models.bitsandbytes_layers import linear4bit

    layer = peft_layer("nf4")
    before = result(layer)
    layer.base_layer.weight = linear4bit(nn.Linear(64, 48), True).weight
    assert not torch.equal(result(layer), before) and torch.equal(result(layer), anew(layer))


def test_inference_tensors_and_copies_work() -> None:
    with torch.inference_mode():
        layer = dora_layer("nf4")
        assert torch.equal(layer(X), layer(X))
    assert torch.equal(result(copy.deepcopy(layer)), result(layer))


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_kept_product_has_the_gradients_of_the_first_call(kind: str, base: str) -> None:
    layer = LAYERS[kind](base)
    trained = [p for p in layer.parameters() if p.requires_grad]

    def gradients() -> list[Tensor]:
        x = X.clone().requires_grad_()
        return list(torch.autograd.grad(layer(x).square().sum(), [x, *trained]))

    first = gradients()
    result(layer)
    assert len(trained) == 3
    assert all(map(torch.equal, gradients(), first))
