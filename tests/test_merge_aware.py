"""Merge-aware LoRA: the merged 4-bit model is the trained one, and gradients pass straight."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pylora
from pylora.nn import LoRALinear, NF4Linear
from pylora.testing import assert_as_accurate_as_torch

FORMATS = [(64, False), (32, True), (128, True)]


def model_of(blocksize: int = 64, double_quant: bool = True, dtype: Any = torch.float32) -> Any:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(128, 96, dtype=dtype), nn.ReLU())
    model.append(nn.Linear(96, 64, bias=False, dtype=dtype))
    return pylora.quantize_model(model, blocksize=blocksize, double_quant=double_quant)


def train(model: nn.Module, dtype: torch.dtype, steps: int = 4) -> list[float]:
    x, target = torch.randn(32, 128, dtype=dtype), torch.randn(32, 64, dtype=dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-2)
    losses = []
    for _ in range(steps):
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("blocksize", "double_quant"), FORMATS)
def test_the_merged_model_is_the_trained_one(
    blocksize: int, double_quant: bool, dtype: torch.dtype
) -> None:
    model = model_of(blocksize, double_quant, dtype)
    x = torch.randn(5, 128, dtype=dtype)
    before = model(x)
    pylora.add_lora(model, r=4, merge_aware=True)
    assert torch.equal(model(x), before)  # B is zero, so nothing is requantized
    losses = train(model, dtype)
    assert losses[-1] < losses[0]
    trained = model.eval()(x)
    assert not torch.equal(trained, before)
    plain = copy.deepcopy(model)
    pylora.merge(model)
    assert isinstance(model[0].base_layer, NF4Linear)
    assert torch.equal(model(x), trained)
    pylora.unmerge(model)
    assert torch.equal(model(x), trained)
    pylora.merge(plain, keep_base=False)
    assert type(plain[0]) is NF4Linear and torch.equal(plain(x), trained)


def test_without_it_the_merged_model_is_another() -> None:
    """The test above can fail: plain LoRA loses something when it is merged."""
    model = pylora.add_lora(model_of(), r=4)
    train(model, torch.float32)
    x = torch.randn(5, 128)
    trained = model.eval()(x)
    pylora.merge(model)
    assert not torch.equal(model(x), trained)


@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(3, 7), (), (0,)], ids=str)
def test_gradients_pass_straight_through(
    shape: tuple[int, ...], dtype: torch.dtype, lora_dtype: torch.dtype
) -> None:
    linear = nn.Linear(128, 96, dtype=dtype)
    base = NF4Linear.from_linear(linear, double_quant=True)
    layer = LoRALinear(base, r=4, lora_alpha=6, dtype=lora_dtype, merge_aware=True)
    nn.init.normal_(layer.lora_B, 0, 0.05)
    twin = copy.deepcopy(layer)
    pylora.merge(twin)
    quantized = twin.base_weight

    def ours(x: Tensor, grad: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Any:
        x = x.clone().requires_grad_()
        y = layer(x)
        y.backward(grad)
        return y, x.grad, layer.lora_A.grad, layer.lora_B.grad

    def plain(x: Tensor, grad: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Any:
        x, A, B = (t.clone().requires_grad_() for t in (x, A, B))
        delta = layer.scaling * (B @ A)
        weight = quantized.dequantize(x.dtype) + (delta - delta.detach()).to(x.dtype)
        y = nn.functional.linear(x, weight, bias)
        y.backward(grad)
        return y, x.grad, A.grad, B.grad

    x, grad = torch.randn(*shape, 128, dtype=dtype), torch.randn(*shape, 96, dtype=dtype)
    arguments = (x, grad, layer.lora_A.detach(), layer.lora_B.detach(), layer.bias.detach())
    assert_as_accurate_as_torch(ours(*arguments), plain, *arguments)


def test_autocast_and_compile_give_the_same() -> None:
    model = pylora.add_lora(model_of(), r=4, merge_aware=True)
    train(model, torch.float32)
    x = torch.randn(5, 128)
    expected = model(x)
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        y.float().sum().backward()
        pylora.merge(model.eval())
        assert torch.equal(model(x), y)
    assert model[0].lora_B.grad.dtype == torch.float32


def test_checkpointing_changes_no_gradient() -> None:
    model = pylora.add_lora(model_of(), r=4, merge_aware=True)
    train(model, torch.float32)
    x = torch.randn(5, 128)
    model(x).sum().backward()
    expected = model[0].lora_B.grad
    model.zero_grad()
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum().backward()
    assert torch.equal(model[0].lora_B.grad, expected)


def test_it_belongs_to_one_adapter() -> None:
    model = pylora.add_lora(model_of(), r=4, merge_aware=True)
    train(model, torch.float32)
    pylora.add_lora(model, r=2, adapter_name="plain", lora_dropout=0.1)
    assert "merge_aware" in repr(model)
    x = torch.randn(5, 128)
    expected = model(x)
    pylora.set_active_adapters(model, "plain")
    assert not model[0].merge_aware
    assert torch.equal(pylora.set_active_adapters(model, "default")(x), expected)


def test_a_dense_export_has_the_quantized_values() -> None:
    model = pylora.add_lora(model_of(), r=4, merge_aware=True)
    train(model, torch.float32)
    twin = copy.deepcopy(model)
    pylora.merge(twin)
    pylora.merge(model, keep_base=False, dtype=torch.bfloat16)
    assert torch.equal(model[0].weight, twin[0].base_weight.dequantize(torch.bfloat16))


def test_a_file_fills_a_merge_aware_adapter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("safetensors")
    model = pylora.add_lora(model_of(), r=4, merge_aware=True)
    train(model, torch.float32)
    pylora.save_adapter(model, tmp_path)
    assert "cannot say that the adapter is merge_aware" in caplog.text
    other = pylora.add_lora(model_of(), r=4, merge_aware=True)
    pylora.load_adapter(other, tmp_path)
    x = torch.randn(5, 128)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout is 0.1; it must be 0.0 with merge_aware"),
        ({"use_dora": True}, "use_dora is True; it must be False with merge_aware"),
        ({"lora_bias": True}, "lora_bias is True; it must be False with merge_aware"),
        ({"target_modules": ["0", "2"]}, "2 is dense; a target must be an NF4Linear"),
    ],
)
def test_what_it_excludes_is_refused_before_anything_changes(
    options: dict[str, Any], message: str
) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    pylora.quantize_model(model, skip_modules=["2"])
    before = [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        pylora.add_lora(model, **{"target_modules": ["0"], "merge_aware": True, **options})
    assert [(n, id(p), p.requires_grad) for n, p in model.named_parameters()] == before


def test_a_dense_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="base is Linear; it must be an NF4Linear"):
        LoRALinear(nn.Linear(8, 8), merge_aware=True)
