"""Bottleneck adapters in the model families of transformers: where they sit and what they change.

Each model is tiny and random.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pylora
from pylora.adapters import AdapterConfig
from pylora.models.slots import slots

pytest.importorskip("transformers")

from benchmarks.models.families import DENSE, FAMILIES, Family

CONFIGS: dict[str, AdapterConfig] = {
    "houlsby": pylora.HoulsbyConfig(reduction_factor=8),
    "pfeiffer": pylora.PfeifferConfig(reduction_factor=8),
    "parallel": pylora.ParallelConfig(reduction_factor=8, where=("attention", "mlp")),
}


def output(model: nn.Module, family: Family) -> Tensor:
    return getattr(model(**family.inputs(torch.float32)), family.output)


def randomize(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def hooks_of_pylora(model: nn.Module) -> list[Any]:
    hooks = [h for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]
    owners = [getattr(hook, "__self__", None) for held in hooks for hook in held.values()]
    return [owner for owner in owners if type(owner).__module__.startswith("pylora")]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_its_adapter_and_nothing_else(family: str, config: str) -> None:
    row = FAMILIES[family]
    torch.manual_seed(0)
    model: Any = row.build().train().requires_grad_(False)  # some kernels round differently
    plain = output(model, row)
    names = {name for name, _ in model.named_parameters()}
    pylora.add_adapter(model, "task", CONFIGS[config])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters()} - names
    randomize(model)
    adapted = output(model, row)
    assert not torch.equal(adapted, plain)
    adapted.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
        if name in trained:
            assert parameter.grad.abs().sum() > 0, name
    with pylora.adapters_disabled(model):
        assert torch.equal(output(model, row), plain)
    assert torch.equal(output(model, row), adapted)
    pylora.delete_adapter(model, "task")
    assert {name for name, _ in model.named_parameters()} == names
    assert not slots(model) and not hooks_of_pylora(model)
    assert torch.equal(output(model, row), plain)


@pytest.mark.parametrize("base", ["nf4", "bitsandbytes"])
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "t5", "opt"])
def test_adapters_train_over_4_bit_layers(family: str, base: str) -> None:
    row = FAMILIES[family]
    torch.manual_seed(0)
    model: Any = row.build().requires_grad_(False)
    if base == "nf4":
        pylora.quantize_model(model)
    else:
        pytest.importorskip("bitsandbytes")
        from benchmarks.models.bitsandbytes_layers import in_4bit

        model = in_4bit(model, DENSE)
    plain = output(model, row)
    pylora.add_adapter(model, "task", CONFIGS["houlsby"])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(5):
        loss = output(model, row)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(p.device == trained[0].device and p.dtype == torch.float32 for p in trained)
    with pylora.adapters_disabled(model):
        assert torch.equal(output(model, row), plain)


def places(model: nn.Module) -> set[str]:
    return {name.rsplit(".", 1)[1] for name in slots(model)}


def test_each_kind_has_its_places() -> None:
    expected = {
        "houlsby": {"after_attention", "after_mlp"},
        "pfeiffer": {"output"},
        "parallel": {"beside_attention", "beside_mlp"},
    }
    for name, config in CONFIGS.items():
        assert places(pylora.add_adapter(FAMILIES["llama"].build(), "a", config)) == expected[name]
    mlp = pylora.HoulsbyConfig(where=["mlp"])
    assert places(pylora.add_adapter(FAMILIES["llama"].build(), "a", mlp)) == {"after_mlp"}
    # A block with one sub-layer has it in the place of the MLP.
    assert places(pylora.add_adapter(FAMILIES["mamba"].build(), "a", CONFIGS["houlsby"])) == {
        "after_mlp"
    }
