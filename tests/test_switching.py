"""Switching adapters beside casts, copies, compilation, checkpointing, averages and sharding."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from adapter_models import OTHERS, base, randomize, two_adapters
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel

import pylora

pytest.importorskip("safetensors")


def test_casts_and_moves_reach_inactive_adapters_and_bases() -> None:
    model = two_adapters(base(), **OTHERS["hybrid"])
    pylora.set_active_adapters(model, "b")
    model.bfloat16()
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    for name in ("default", "b"):
        assert pylora.set_active_adapters(model, name)(x).dtype == torch.bfloat16
    with pylora.disable_adapter(model):
        assert model(x).dtype == torch.bfloat16


def test_dora_follows_a_cast_made_while_it_was_inactive() -> None:
    model = two_adapters(base(quantized=False), use_dora=True, r=2)
    twin = pylora.set_active_adapters(copy.deepcopy(model), "b").bfloat16()
    model.bfloat16()
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    assert torch.equal(pylora.set_active_adapters(model, "b")(x), twin(x))


def test_a_copy_switches_on_its_own() -> None:
    model = two_adapters(base(), **OTHERS["hybrid"])
    twin = copy.deepcopy(model)
    x = torch.randn(3, 64)
    expected = model(x)
    pylora.set_active_adapters(twin, "b")
    randomize(twin)
    pylora.set_active_adapters(twin, "default")
    assert torch.equal(model(x), expected) and torch.equal(twin(x), expected)
    assert pylora.active_adapter(model) == "default"


def test_compiled_models_follow_a_switch() -> None:
    model = two_adapters(base(), **OTHERS["hybrid"])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(3, 64)
    for name in ("default", "b", "default"):
        pylora.set_active_adapters(compiled, name)
        assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_with_the_active_adapter(use_reentrant: bool) -> None:
    model = two_adapters(base(), r=3)
    pylora.set_active_adapters(model, "b")
    x = torch.randn(3, 64, requires_grad=True)
    model(x).sum().backward()
    expected = model.q.lora_B.grad
    model.zero_grad()
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(model.q.lora_B.grad, expected)
    held = model.q.adapter("default")
    assert held.lora_B.grad is None


def test_tied_modules_stay_tied_in_each_adapter() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(11, 64), "head": nn.Linear(64, 11, bias=False)})
    model["head"].weight = model["embed"].weight
    model["q"] = nn.Linear(64, 64)
    for name in ("a", "b"):
        saved = ["embed", "head"]
        pylora.add_lora(model, r=2, target_modules=["q"], modules_to_save=saved, adapter_name=name)
    seen = []
    for name in ("a", "b", "a"):
        pylora.set_active_adapters(model, name)
        assert model["head"].weight is model["embed"].weight
        seen.append(id(model["head"].weight))
    assert seen[0] == seen[2] != seen[1]


def test_an_average_must_have_the_same_active_adapter() -> None:
    """An average goes by the order of parameters, which a switch changes."""
    model = two_adapters(base())
    average = AveragedModel(model)
    average.update_parameters(model)
    pylora.set_active_adapters(model, "b")
    with pytest.raises(ValueError, match="'b' is active in the model but 'default' in its average"):
        average.update_parameters(model)
    pylora.set_active_adapters(model, "default")
    average.update_parameters(model)


def test_a_wrapper_that_keeps_parameters_is_not_switched() -> None:
    model = two_adapters(base())
    average = AveragedModel(model)
    pylora.set_active_adapters(average, "default")  # it is active already
    for call in (pylora.set_active_adapters, pylora.delete_adapter):
        with pytest.raises(ValueError, match=f"is an AveragedModel.*pylora.{call.__name__}"):
            call(average, "b")
    with pytest.raises(ValueError, match="save_adapter of an inactive adapter"):
        pylora.save_adapter(average, "x", adapter_name="b")


def test_a_sharded_model_trains_its_active_adapter(tmp_path: Path) -> None:
    """In one process: fully_shard makes every parameter a DTensor, inactive ones too."""
    model = two_adapters(base(quantized=False), r=3, target_modules=["q"])
    pylora.set_active_adapters(model, "b")
    x = torch.randn(3, 64)
    plain = copy.deepcopy(model)
    plain(x).sum().backward()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        model(x).sum().backward()
        gradient = model.q.lora_B.grad.full_tensor()
        assert torch.equal(gradient, plain.q.lora_B.grad)
        state = {key: value.full_tensor() for key, value in model.state_dict().items()}
        assert all(torch.equal(state[k], v) for k, v in plain.state_dict().items())
        pylora.save_adapter(model, tmp_path)
        with pytest.raises(ValueError, match="sharded by fully_shard"):
            pylora.set_active_adapters(model, "default")
    finally:
        dist.destroy_process_group()
    pylora.save_adapter(plain, tmp_path / "plain")
    files = [tmp_path / folder / "adapter_model.safetensors" for folder in ("", "plain")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_model_for_peft_has_the_active_adapter() -> None:
    pytest.importorskip("peft")
    from pylora.integrations.peft import as_peft_model

    model = two_adapters(base(), r=3, target_modules=["q"])
    wrapped = as_peft_model(pylora.set_active_adapters(model, "b"))
    assert wrapped.peft_config["default"].r == 3
    x = torch.randn(3, 64)
    before = wrapped(x)
    wrapped.add_adapter("ref", wrapped.peft_config["default"])
    randomize(model)
    wrapped.set_adapter("ref")
    assert torch.equal(wrapped(x), before)
