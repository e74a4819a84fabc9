"""unload gives the plain model back; disable_adapter does so for a while."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pylora
from pylora.nn import LoRALinear, NF4Linear


class Twice(nn.Module):
    """A model with one layer in two places and two layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(48, 48)
        self.again = self.first
        self.left, self.right = nn.Linear(48, 24, bias=False), nn.Linear(48, 24, bias=False)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.first(x))
        return self.left(x) * self.right(x)


def trained(model: nn.Module, **options: Any) -> nn.Module:
    pylora.add_lora(model, r=3, **options)
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_B, std=0.1)
    return model


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_unload_gives_plain_layers(quantized: bool, merged: bool) -> None:
    torch.manual_seed(0)
    model = Twice()
    if quantized:
        pylora.quantize_model(model, blocksize=32)
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    x = torch.randn(5, 48)
    before = model(x)
    trained(model)
    if merged:
        pylora.merge(model)
    expected = model(x) if merged else before
    assert pylora.unload(model) is model
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == keys
    assert isinstance(model.first, NF4Linear if quantized else nn.Linear)
    assert model.first is model.again
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    if not merged:
        assert all(p is parameters[name] for name, p in model.named_parameters())
        assert model.left.weight is model.right.weight


def test_hooks_and_the_training_mode_stay() -> None:
    model = trained(nn.Sequential(nn.Linear(8, 8)))
    calls: list[str] = []
    model[0].register_forward_hook(lambda *_: calls.append("hook"))
    model.eval()
    pylora.unload(model)
    model(torch.randn(2, 8))
    assert calls == ["hook"] and not model[0].training


def test_trained_modules_keep_their_weights_and_lose_their_mark() -> None:
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 4)})
    trained(model, target_modules=["body"], modules_to_save=["head"])
    with torch.no_grad():
        model["head"].weight.fill_(3.0)
    pylora.unload(model)
    assert (model["head"].weight == 3).all()
    pylora.add_lora(model, r=2, target_modules=["body", "head"])  # a marked module would be refused
    assert isinstance(model["head"], LoRALinear)


def test_a_single_layer_is_unloaded_to_its_base() -> None:
    base = nn.Linear(8, 8)
    assert pylora.unload(LoRALinear(base, r=2)) is base


@pytest.mark.parametrize("function", [pylora.unload, pylora.disable_adapter])
def test_models_without_lora_are_refused(function: Any) -> None:
    with pytest.raises(ValueError, match=r"no (LoRALinear|adapter)"):
        with function(nn.Linear(4, 4)):
            pass


VARIANTS: list[dict[str, Any]] = [{}, {"use_dora": True}, {"lora_bias": True, "lora_dropout": 0.5}]


@pytest.mark.parametrize("variant", VARIANTS, ids=["plain", "dora", "bias-dropout"])
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_a_disabled_adapter_leaves_the_base(quantized: bool, variant: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Twice()
    if quantized:
        pylora.quantize_model(model, blocksize=64, double_quant=True)
    x = torch.randn(7, 48)
    base = model(x)
    trained(model, **variant)
    for _ in range(2):  # the second round runs the calls that the layers keep
        with pylora.disable_adapter(model):
            assert torch.equal(model(x), base)
        assert not torch.allclose(model(x), base)


def test_blocks_nest_and_end_after_an_exception() -> None:
    model = trained(nn.Sequential(nn.Linear(16, 16)))
    x = torch.randn(2, 16)
    adapted = model(x)
    with pytest.raises(KeyError), pylora.disable_adapter(model):
        with pylora.disable_adapter(model):
            pass
        assert not torch.equal(model(x), adapted)
        assert "LoRA disabled" in repr(model)
        raise KeyError
    assert torch.equal(model(x), adapted)


def test_gradients_pass_through_a_disabled_adapter() -> None:
    model = trained(nn.Sequential(nn.Linear(16, 16)))
    x = torch.randn(2, 16, requires_grad=True)
    with pylora.disable_adapter(model):
        model(x).sum().backward()
    torch.testing.assert_close(x.grad, model[0].base_layer.weight.sum(0).expand(2, -1))
    assert model[0].lora_A.grad is None


def test_a_compiled_model_follows_the_switch() -> None:
    model = trained(nn.Sequential(nn.Linear(16, 16)))
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    x = torch.randn(2, 16)
    torch.testing.assert_close(compiled(x), model(x))
    with pylora.disable_adapter(model), pylora.disable_adapter(compiled):
        torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(compiled(x), model(x))


def test_a_module_trained_in_full_has_its_old_weights_while_disabled() -> None:
    plain = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    model = trained(copy.deepcopy(plain), modules_to_save=["1"])
    with torch.no_grad():
        model[1].weight.normal_()
    weight, x = model[1].weight, torch.randn(3, 16)
    expected = model(x)
    with pylora.disable_adapter(model):
        assert torch.equal(model(x), plain(x))
    assert model[1].weight is weight and weight.requires_grad
    assert torch.equal(model(x), expected)


def test_what_cannot_be_disabled_is_refused() -> None:
    model = trained(nn.Sequential(nn.Linear(16, 16)))
    pylora.merge(model)
    with pytest.raises(ValueError, match="0 is merged"), pylora.disable_adapter(model):
        pass


def test_a_plain_state_dict_is_loaded_into_the_bases() -> None:
    plain = nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 4, bias=False))
    model = trained(copy.deepcopy(plain))
    with torch.no_grad():
        model[0].base_layer.weight.zero_()
    result = model.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(model[0].base_layer.weight, plain[0].weight)
    assert set(result.missing_keys) == {f"{i}.lora_{f}" for i in (0, 1) for f in "AB"}
    assert not result.unexpected_keys
