"""PEFT's AdaLoRA over accelerated layers: values, gradients, and the allocation of ranks."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pylora
from pylora import dispatch
from pylora.calls import LoraLinearCall

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
from peft_models import assert_right, linear4bit, outcome  # noqa: E402

IDS = torch.arange(15).view(3, 5)
BASES = ["dense", "nf4", "nf4 doubly quantized"]


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    pylora.unpatch()


def adalora(**settings: Any) -> Any:
    settings = {"init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1, **settings}
    return peft.AdaLoraConfig(
        total_step=8, target_modules=["1", "3"], init_lora_weights=False, **settings
    )


def peft_model(base: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    torch.manual_seed(0)
    up, down = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)
    model: Any = nn.Sequential(nn.Embedding(15, 64), up, nn.Tanh(), down).to(dtype)
    if base != "dense":
        for index in (1, 3):
            model[index] = linear4bit(model[index], "doubly" in base)
        model.is_loaded_in_4bit = True
    return peft.get_peft_model(model, adalora(**settings)).train()


def run(model: nn.Module) -> tuple[Tensor, Tensor]:
    return outcome(model, IDS)


@pytest.mark.parametrize("base", BASES)
def test_output_and_gradients_are_right(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft_model(base, lora_alpha=5)
    report = pylora.accelerate(model, strict=True, verify=1)
    assert len(report.swapped) == 2 and "SVDLinear" in str(report)
    calls: list[type] = []
    choose = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda call: calls.append(type(call)) or choose(call))
    for _ in range(2):
        assert_right(model, run)
    assert calls.count(LoraLinearCall) >= 4
    with model.disable_adapter():
        assert_right(model, lambda model: model(IDS).detach())


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_a_bf16_base_with_fp32_adapters_is_right(base: str) -> None:
    model = peft_model(base, torch.bfloat16)
    pylora.accelerate(model, strict=True)
    assert_right(model, run, torch.bfloat16)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_several_adapters_dropout_and_no_rank(base: str, caplog: pytest.LogCaptureFixture) -> None:
    model = peft_model(base, lora_dropout=0.5)
    config = adalora(init_r=3, inference_mode=True)
    model.add_adapter("other", config)
    pylora.accelerate(model, verify=2)
    outputs = [model(IDS) for _ in range(3)]
    assert not torch.equal(outputs[0], outputs[1])
    model.base_model.set_adapter(["default", "other"])
    assert_right(model.eval(), lambda model: model(IDS).detach())
    layer = model.base_model.model[1]
    model.base_model.set_adapter("other")
    for factors in (layer.lora_A, layer.lora_E):
        factors["other"] = nn.Parameter(factors["other"][:0].detach())
    layer.lora_B["other"] = nn.Parameter(layer.lora_B["other"][:, :0].detach())
    with caplog.at_level(logging.INFO, "pylora.integrations.swaps"):
        assert_right(model, lambda model: model(IDS).detach())
    assert "its rank is 0" in caplog.text


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_ranks_are_allocated_and_saved_as_without_pylora(base: str) -> None:
    model = peft_model(base)
    twin = copy.deepcopy(model)
    pylora.accelerate(model, strict=True)
    for step in range(8):
        for each in (model, twin):
            trained = [p for p in each.parameters() if p.requires_grad]
            optimizer = torch.optim.SGD(trained, 1e-5)
            each(IDS).square().mean().backward()
            optimizer.step()
            each.base_model.update_and_allocate(step)
            optimizer.zero_grad()
    pattern = model.peft_config["default"].rank_pattern
    assert pattern == twin.peft_config["default"].rank_pattern
    assert sum(sum(kept) for kept in pattern.values()) == 4  # of 12, as target_r asks
    ours, theirs = (peft.get_peft_model_state_dict(each) for each in (model, twin))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-6)
    for each in (model, twin):
        each.base_model.resize_modules_by_rank_pattern(
            each.peft_config["default"].rank_pattern, "default"
        )
    assert_right(model, lambda model: model(IDS).detach())


def test_merge_and_restore_are_those_of_peft() -> None:
    model = peft_model("dense").eval()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    twin = copy.deepcopy(model)
    pylora.accelerate(model, strict=True)
    for change in ("merge_adapter", "unmerge_adapter"):
        for each in (model, twin):
            getattr(each, change)()
        assert_right(model, lambda model: model(IDS).detach())
        for ours, theirs in zip(*(m.state_dict().values() for m in (model, twin)), strict=True):
            assert torch.equal(ours, theirs)
    pylora.restore(model)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_patched_classes_compute_the_same(base: str) -> None:
    model = peft_model(base)
    pylora.patch(verify=1)
    patched = run(model)
    pylora.unpatch()
    pylora.accelerate(model)
    assert all(map(torch.equal, patched, run(model)))
