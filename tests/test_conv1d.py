"""GPT-2, whose linear layers store their weight transposed, and layers of unknown classes."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import pylora
from pylora.nn import LoRALinear, NF4Linear
from pylora.testing import assert_as_accurate_as_torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D

TOKENS = torch.arange(20).view(2, 10)


def gpt2(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 32, "n_positions": 16}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)
    return transformers.GPT2LMHeadModel(config).eval()


def with_lora(model: Any, **options: Any) -> Any:
    pylora.add_lora(model, r=3, **options)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_over_a_conv1d_is_lora_over_its_transpose(use_dora: bool) -> None:
    conv = Conv1D(48, 64)
    layer = LoRALinear(conv, r=4, use_dora=use_dora)
    nn.init.normal_(layer.lora_B)
    as_linear = nn.Linear(64, 48)
    as_linear.weight = nn.Parameter(conv.weight.detach().t().contiguous())
    as_linear.bias = nn.Parameter(conv.bias.detach().clone())
    other = LoRALinear(as_linear, r=4, use_dora=use_dora)
    other.load_state_dict({**other.state_dict(), "lora_A": layer.lora_A, "lora_B": layer.lora_B})
    x = torch.randn(5, 64)
    for _ in range(2):
        torch.testing.assert_close(layer(x), other(x))
    layer.double()
    other.double()
    torch.testing.assert_close(layer(x.double()), other(x.double()))
    layer(x.double()).sum().backward()
    other(x.double()).sum().backward()
    for parameter, same in zip(layer.parameters(), other.parameters(), strict=True):
        if same.grad is not None:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, same.grad)


def test_the_quantized_weight_is_the_transpose() -> None:
    conv = Conv1D(48, 64)
    layer = NF4Linear.from_linear(conv, double_quant=True)
    expected = pylora.quantize_nf4(conv.weight.detach().t(), double_quant=True)
    assert torch.equal(layer.nf4_weight.qweight, expected.qweight)
    x = torch.randn(3, 64)
    dense = expected.dequantize(torch.float64)
    assert_as_accurate_as_torch(
        layer(x), lambda x, bias: linear(x, dense.to(x.dtype), bias), x, conv.bias
    )
    assert NF4Linear.from_linear(Conv1D(48, 64).to("meta")).weight.shape == (48, 32)


@pytest.mark.parametrize("quantize", [False, True])
def test_gpt2_trains_and_is_saved_for_peft(quantize: bool, tmp_path: Path) -> None:
    model = gpt2()
    if quantize:
        pylora.quantize_model(model)
    with_lora(model)
    wrapped = [name for name, m in model.named_modules() if isinstance(m, LoRALinear)]
    assert len(wrapped) == 8
    model(TOKENS, labels=TOKENS).loss.backward()
    assert all(m.lora_A.grad.abs().sum() > 0 for m in map(model.get_submodule, wrapped))
    pylora.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    assert config["target_modules"] == ["c_attn", "c_fc", "c_proj"]
    assert config["fan_in_fan_out"] is not quantize
    again = gpt2()
    if quantize:
        pylora.quantize_model(again)
    else:
        loaded = peft.PeftModel.from_pretrained(gpt2(), str(tmp_path)).eval()
        torch.testing.assert_close(logits(loaded), logits(model))
    assert torch.equal(logits(pylora.load_adapter(again, tmp_path)), logits(model))


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_of_peft_loads(use_dora: bool, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=3, target_modules="all-linear", use_dora=use_dora, init_lora_weights=False
    )
    theirs = peft.get_peft_model(gpt2(), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = pylora.load_adapter(gpt2(), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs))


def test_merging_keeps_the_form_of_the_weight() -> None:
    model = with_lora(gpt2())
    before, keys = logits(model), {k: v.shape for k, v in model.state_dict().items()}
    layer = model.transformer.h[0].mlp.c_fc
    weight = layer.base_layer.weight
    pylora.merge(model)
    assert type(layer.base_layer) is Conv1D and layer.base_layer.weight.shape == (64, 256)
    torch.testing.assert_close(logits(model), before)
    pylora.unmerge(model)
    assert layer.base_layer.weight is weight
    assert torch.equal(logits(model), before)
    assert {k: v.shape for k, v in model.state_dict().items()} == keys


def test_a_quantized_conv1d_that_is_trained_in_full_is_one_again(tmp_path: Path) -> None:
    model = pylora.quantize_model(gpt2())
    with_lora(model, target_modules=["c_attn"], modules_to_save=["h.1.mlp.c_fc"])
    dense = model.transformer.h[1].mlp.c_fc
    assert type(dense) is Conv1D and dense.weight.shape == (64, 256)
    pylora.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(gpt2(1), str(tmp_path))
    saved = theirs.base_model.model.transformer.h[1].mlp.c_fc.modules_to_save["default"]
    assert torch.equal(saved.weight, dense.weight)
    again = pylora.load_adapter(pylora.quantize_model(gpt2()), tmp_path)
    assert torch.equal(logits(again), logits(model))


class ScaledLinear(nn.Linear):
    """A subclass of nn.Linear that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = ScaledLinear(64, 64)


@pytest.mark.parametrize("targets", ["all-linear", "other", "proj.*x"])
def test_errors_name_the_linear_layers_that_are_not_taken(targets: str) -> None:
    with pytest.raises(ValueError, match="may compute something else: ScaledLinear") as caught:
        pylora.add_lora(Strange(), target_modules=targets)
    assert ("regular expression" in str(caught.value)) == (targets != "all-linear")


def test_quantizing_nothing_but_unknown_layers_names_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ValueError, match="may compute something else: ScaledLinear"),
    ):
        pylora.quantize_model(Strange())
    assert re.search("proj stays dense: ScaledLinear is a subclass", caplog.text)
