"""`pylora.accelerate` on models that are compiled, distributed or averaged."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import pylora
from pylora import dispatch
from pylora.calls import LoraLinearCall

pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
from peft_models import linear4bit, outcome  # noqa: E402

X = torch.arange(15).view(3, 5)


def peft_model() -> Any:
    torch.manual_seed(0)
    up, down = linear4bit(nn.Linear(64, 96), True), nn.Linear(96, 8)
    model: Any = nn.Sequential(nn.Embedding(15, 64), up, nn.Tanh(), down)
    model.is_loaded_in_4bit = True
    config = peft.LoraConfig(r=4, target_modules=["1", "3"], init_lora_weights=False)
    return peft.get_peft_model(model, config).train()


@pytest.fixture
def gloo(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    seen: list[type] = []
    choose = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda call: seen.append(type(call)) or choose(call))
    return seen


def compiled(model: nn.Module) -> nn.Module:
    torch.compiler.reset()
    return torch.compile(model, backend="aot_eager")


@pytest.mark.parametrize("has_run", [False, True])
@pytest.mark.parametrize("wrap", [compiled, DistributedDataParallel, AveragedModel])
def test_a_wrapped_model_computes_through_pylora(
    wrap: Any, has_run: bool, calls: list[type], gloo: None
) -> None:
    model = wrap(peft_model())
    expected = outcome(model if has_run else peft_model(), X)
    calls.clear()
    report = pylora.accelerate(model, strict=True)
    assert [layer.name for layer in report.layers] == ["base_model.model.1", "base_model.model.3"]
    for actual, value in zip(outcome(model, X), expected, strict=True):
        torch.testing.assert_close(actual, value)
    assert calls.count(LoraLinearCall) >= 2
    pylora.restore(model)
    calls.clear()
    for actual, value in zip(outcome(model, X), expected, strict=True):
        torch.testing.assert_close(actual, value)
    assert LoraLinearCall not in calls


def test_a_replica_of_data_parallel_computes_with_its_own_weights(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = peft_model()
    pylora.accelerate(model)
    layer = model.base_model.model[3]
    with caplog.at_level(logging.INFO, "pylora.integrations.swaps"):
        replica = layer._replicate_for_data_parallel()
    assert "nn.DataParallel copies it" in caplog.text
    base = replica.base_layer._replicate_for_data_parallel()
    base.weight, base.bias = (torch.zeros_like(p) for p in replica.base_layer.parameters())
    replica._modules["base_layer"] = base
    x = torch.randn(2, 96)
    low_rank: Tensor = layer(x) - layer.base_layer(x)
    torch.testing.assert_close(replica(x), low_rank)
    assert torch.equal(nn.DataParallel(model)(X), model(X))  # on a CPU it makes no replicas
