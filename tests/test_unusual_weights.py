"""Weights that are no plain parameters, and weights that are not there, give clear errors."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.testing._internal.two_tensor import TwoTensor

import pylora
import pylora.functional as F
from pylora.nn import LoRALinear, NF4Linear


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 96), nn.Linear(96, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def test_what_is_made_under_inference_mode_can_be_trained(tmp_path: Path) -> None:
    x = torch.randn(3, 64)
    with torch.inference_mode():
        model = pylora.add_lora(pylora.quantize_model(Net(), double_quant=True), r=2)
        pylora.save_adapter(model, tmp_path)
        loaded = pylora.load_adapter(pylora.quantize_model(Net()), tmp_path)
    for trained in (model, loaded):
        trained(x).square().sum().backward()
        assert trained.second.lora_B.grad.abs().sum() > 0


def test_dense_weights_that_were_made_under_inference_mode_are_refused_for_lora() -> None:
    with torch.inference_mode():
        model = Net()
    with pytest.raises(ValueError, match=r"first\.weight was made under torch\.inference_mode"):
        pylora.add_lora(model)
    assert type(model.first) is nn.Linear


def weight_norm(linear: nn.Linear) -> nn.Linear:
    return parametrizations.weight_norm(linear)


def old_spectral_norm(linear: nn.Linear) -> nn.Linear:
    return nn.utils.spectral_norm(linear)


def tensor_subclass(linear: nn.Linear) -> nn.Linear:
    weight = linear.weight.detach()
    linear.weight = nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
    return linear


UNUSUAL: dict[str, tuple[Callable[[nn.Linear], nn.Linear], str]] = {
    "parametrization": (weight_norm, "its weight is computed in each forward"),
    "hook": (old_spectral_norm, "its weight is computed in each forward"),
    "subclass": (tensor_subclass, "its weight is a TwoTensor, a subclass of Tensor"),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_an_unusual_weight_stays_as_it_is_and_the_log_says_why(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    change, reason = UNUSUAL[kind]
    model = Net().eval()
    change(model.first)
    x = torch.randn(3, 64)
    before = model.first(x)
    with caplog.at_level(logging.WARNING):
        pylora.quantize_model(model)
    assert f"first stays dense: {reason}" in caplog.text
    assert isinstance(model.second, NF4Linear)
    pylora.add_lora(model, r=2)
    assert isinstance(model.second, LoRALinear) and not isinstance(model.first, LoRALinear)
    after = model.first(x)
    assert type(after) is type(before)
    if type(after) is Tensor:
        assert torch.equal(after, before)


@pytest.mark.parametrize("kind", UNUSUAL)
def test_an_unusual_weight_is_refused_if_it_is_named(kind: str) -> None:
    change, reason = UNUSUAL[kind]
    model = Net()
    change(model.first)
    with pytest.raises(ValueError, match=r"first (must not be a target|is Parametrize)"):
        pylora.add_lora(model, target_modules=["first"])
    for build in (LoRALinear, NF4Linear.from_linear):
        with pytest.raises(TypeError, match=f"{reason}.*; it must be a plain parameter"):
            build(model.first)


def test_a_weight_in_a_buffer_carries_lora_and_stays_dense() -> None:
    model = Net()
    weight = model.first.weight.detach()
    del model.first.weight
    model.first.register_buffer("weight", weight)
    pylora.add_lora(pylora.quantize_model(model), r=2)
    assert isinstance(model.first, LoRALinear) and type(model.first.base_layer) is nn.Linear
    model(torch.randn(3, 64)).sum().backward()


@pytest.mark.parametrize("shape", [(), (64,), (2, 8, 64)], ids=str)
def test_a_layer_needs_a_weight_of_two_dimensions(shape: tuple[int, ...]) -> None:
    w = F.quantize_nf4(torch.randn(shape))
    assert w.dequantize().shape == shape
    with pytest.raises(ValueError, match=r"w has shape .* must be \[out_features, in_features\]"):
        F.nf4_linear(torch.randn(3, 64), w)
    linear = nn.Linear(64, 8)
    linear.weight = nn.Parameter(torch.randn(shape))
    with pytest.raises(ValueError, match=r"linear\.weight has shape .* must be \[out_features"):
        NF4Linear.from_linear(linear)


def test_a_configuration_of_peft_is_no_rank() -> None:
    peft = pytest.importorskip("peft")
    with pytest.raises(TypeError, match=r"r is a LoraConfig; .* takes the fields"):
        pylora.add_lora(Net(), peft.LoraConfig(r=4))
    with pytest.raises(ValueError, match=r"^r is LoraConfig; it must be an integer >= 1$"):
        LoRALinear(nn.Linear(4, 4), peft.LoraConfig(r=4))


@pytest.mark.parametrize("double_quant", [False, True])
def test_torch_load_reads_a_weight_without_running_code(double_quant: bool) -> None:
    w = F.quantize_nf4(torch.randn(10, 96), 32, double_quant)
    file = io.BytesIO()
    torch.save({"layer": [w]}, file)
    file.seek(0)
    (got,) = torch.load(file, weights_only=True)["layer"]
    assert (got.shape, got.dtype, got.blocksize) == (w.shape, w.dtype, w.blocksize)
    assert got.tensors().keys() == w.tensors().keys()
    assert all(torch.equal(t, w.tensors()[name]) for name, t in got.tensors().items())


def test_torch_load_checks_the_parts_of_a_weight() -> None:
    w = F.quantize_nf4(torch.randn(10, 64))
    object.__setattr__(w, "qweight", w.qweight[:5])
    file = io.BytesIO()
    torch.save(w, file)
    file.seek(0)
    with pytest.raises(Exception, match="qweight has shape"):
        torch.load(file, weights_only=True)


@pytest.mark.parametrize("size", [0, -256, 2.5])
def test_a_nested_block_has_a_positive_size(size: Any) -> None:
    w = F.quantize_nf4(torch.randn(10, 64), double_quant=True)
    with pytest.raises(ValueError, match=r"nested_blocksize is .*; it must be an integer >= 1"):
        replace(w, nested_blocksize=size)


OFFLOADS = ["cpu", "disk"]


def offload(model: nn.Module, where: str, folder: Path, **options: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    options["execution_device"] = torch.device("cpu")
    if where == "cpu":
        accelerate.cpu_offload(model, **options)
    else:
        accelerate.disk_offload(model, folder, **options)


@pytest.mark.parametrize("where", OFFLOADS)
def test_layers_that_accelerate_offloads_are_loaded_for_each_forward(
    where: str, tmp_path: Path
) -> None:
    model = pylora.add_lora(pylora.quantize_model(Net(), double_quant=True), r=2)
    x = torch.randn(3, 64)
    expected = model(x).detach()
    offload(model, where, tmp_path, preload_module_classes=["LoRALinear"])
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(model(x), expected)
        assert all(parameter.is_meta for parameter in model.parameters())
        assert model.first._kept is None  # it would keep the freed tensors


@pytest.mark.parametrize("where", OFFLOADS)
def test_offloaded_parts_of_a_layer_are_refused_with_the_way(where: str, tmp_path: Path) -> None:
    model = pylora.add_lora(pylora.quantize_model(Net()), r=2)
    offload(model, where, tmp_path)
    with pytest.raises(ValueError, match=r'preload_module_classes=\["LoRALinear"\]'):
        model(torch.randn(3, 64))
