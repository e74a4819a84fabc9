"""Wrappers around a model or its modules: adapter files have the names of the plain model."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import pylora
from pylora.nn import LoRALinear, NF4Linear

safetensors = pytest.importorskip("safetensors.torch")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.norm, self.head = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, 5))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def trained_net() -> Net:
    torch.manual_seed(7)
    model = pylora.add_lora(Net(), r=3, target_modules=["up", "down"], modules_to_save=["head"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name.startswith("head."):
                parameter.normal_()
    return model


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def in_engine(module: nn.Module) -> nn.Module:
    """A wrapper with the class name, the attribute and the look-up of a DeepSpeed engine."""

    class DeepSpeedEngine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def __getattr__(self, name: str) -> Any:
            held = self.__dict__["_modules"]["module"]
            return held if name == "module" else getattr(held, name)

        def forward(self, *args: Any) -> Any:
            return self.module(*args)

    return DeepSpeedEngine()


def in_fabric(module: nn.Module) -> nn.Module:
    """A wrapper with the class name and the attributes of Lightning Fabric's."""

    class _FabricModule(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._forward_module, self._original_module = compiled(module), module

        def forward(self, *args: Any) -> Any:
            return self._forward_module(*args)

    return _FabricModule()


def inner(wrap: Callable[[nn.Module], nn.Module], *names: str) -> Callable[[nn.Module], nn.Module]:
    """Wraps modules inside a model."""

    def wrap_inside(model: nn.Module) -> nn.Module:
        for name in names:
            model.set_submodule(name, wrap(model.get_submodule(name)))
        return model

    return wrap_inside


LEAVES = ("blocks.0.up", "blocks.1.down", "head.0")
WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": compiled,
    "data parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "engine": in_engine,
    "fabric": in_fabric,
    "fabric around an engine": lambda model: in_fabric(in_engine(model)),
    "compiled data parallel": lambda model: compiled(nn.DataParallel(model)),
    "checkpointed blocks": inner(checkpoint_wrapper, "blocks.0", "blocks.1"),
    "checkpointed leaves": inner(checkpoint_wrapper, *LEAVES),
    "compiled blocks": inner(compiled, "blocks.1", "head"),
    "compiled leaves": inner(compiled, *LEAVES),
    "compiled checkpointed blocks": inner(lambda m: compiled(checkpoint_wrapper(m)), "blocks.0"),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_a_wrapped_model_is_saved_under_its_own_names(
    wrap: Callable[[nn.Module], nn.Module], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    peft = pytest.importorskip("peft")
    model, x = trained_net(), torch.randn(3, 64)
    expected = model(x)
    pylora.save_adapter(model, tmp_path / "plain")
    wrapped = wrap(copy.deepcopy(model))
    pylora.save_adapter(wrapped, tmp_path / "wrapped")
    assert not caplog.text
    plain, actual = (
        safetensors.load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("plain", "wrapped")
    )
    assert list(actual) == list(plain)
    assert all(torch.equal(actual[key], plain[key]) for key in plain)
    configs = [
        (tmp_path / name / "adapter_config.json").read_text() for name in ("plain", "wrapped")
    ]
    assert configs[0] == configs[1]
    torch.manual_seed(7)
    theirs = peft.PeftModel.from_pretrained(Net(), tmp_path / "wrapped")
    torch.testing.assert_close(theirs(x), expected)


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_an_adapter_is_loaded_into_a_wrapped_model(
    wrap: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    model = trained_net()
    pylora.save_adapter(model, tmp_path)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    wrapped = wrap(twin)
    if "DeepSpeedEngine" in str(type(wrapped)) + repr(wrapped):
        with pytest.raises(ValueError, match=r"load_adapter must be called before deepspeed"):
            pylora.load_adapter(wrapped, tmp_path)
        return
    assert pylora.load_adapter(wrapped, tmp_path) is wrapped
    x = torch.randn(3, 64)
    assert torch.equal(wrapped(x), model(x))


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, compiled], ids=["checkpointed", "compiled"])
def test_layers_inside_wrapped_blocks_are_quantized_and_get_lora(
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    model: Any = inner(wrap, "blocks.0", "blocks.1")(Net())
    x = torch.randn(3, 64)
    pylora.quantize_model(model, skip_modules=["head"])
    pylora.add_lora(model, r=2, target_modules=["up"])
    layers = {name: type(module) for name, module in model.named_modules()}
    kinds = [kind for name, kind in layers.items() if name.endswith((".up", ".down"))]
    assert kinds == [LoRALinear, NF4Linear] * 2
    assert not model.head[0].weight.requires_grad
    model(x).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 4 and all(p.grad is not None for p in trained)


def test_a_checkpointed_leaf_is_replaced_inside_its_wrapper() -> None:
    model: Any = inner(checkpoint_wrapper, *LEAVES)(Net())
    pylora.add_lora(model, r=2, target_modules=["up"])
    wrapped = model.blocks[0].up
    assert type(wrapped).__name__ == "CheckpointWrapper"
    assert isinstance(wrapped._checkpoint_wrapped_module, LoRALinear)
    assert isinstance(model.blocks[1].up, LoRALinear)
    model(torch.randn(3, 64)).sum().backward()
    assert wrapped.lora_B.grad is not None


def test_a_leaf_that_is_compiled_by_itself_is_not_replaced() -> None:
    """The compiled code would go on with the layer that it was made for."""
    for change in (pylora.quantize_model, pylora.add_lora):
        model: Any = inner(compiled, "blocks.1.up")(Net())
        with pytest.raises(ValueError, match=r"blocks\.1\.up is compiled by itself"):
            change(model)
        assert type(model.blocks[0].up) is nn.Linear
        assert model.blocks[0].up.weight.requires_grad


class Forwarding(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner, self.log = model, nn.ReLU()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


class Private(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._inner = model


class InModule(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model


class Holder(nn.Module):
    """A module of a model's own, although it holds one module only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.body = model


@pytest.mark.parametrize("kind", [Forwarding, Private, InModule])
def test_a_wrapper_that_is_not_known_is_refused(
    kind: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    path = tmp_path / "adapter"
    with pytest.raises(ValueError, match=rf"model is a {kind.__name__}, which .*save_adapter\(mod"):
        pylora.save_adapter(kind(trained_net()), path)
    if kind is not InModule:
        inside = inner(kind, "blocks.1")(trained_net())
        with pytest.raises(ValueError, match=rf"blocks\.1 in the model is a {kind.__name__}"):
            pylora.save_adapter(inside, path)
    assert not path.exists()


def test_a_model_of_one_module_is_no_wrapper(tmp_path: Path) -> None:
    pylora.save_adapter(Holder(Holder(trained_net())), tmp_path)
    stored = safetensors.load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.body.body.blocks.0.up.lora_A.weight" in stored


def test_a_model_of_transformers_inside_a_module_of_another_library_is_refused(
    tmp_path: Path,
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPTNeoXConfig(
        vocab_size=40, hidden_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model = pylora.add_lora(transformers.GPTNeoXForCausalLM(config), r=2)
    with pytest.raises(ValueError, match=r"'body', which is a whole GPTNeoXForCausalLM"):
        pylora.save_adapter(Holder(model), tmp_path)
    pylora.save_adapter(model, tmp_path)
    inner(Holder, "gpt_neox.layers.1")(model)
    with pytest.raises(ValueError, match=r"layers\.1 in the model is a Holder.* of transformers"):
        pylora.save_adapter(model, tmp_path)


def test_an_average_of_a_model_takes_no_new_layers() -> None:
    with pytest.raises(ValueError, match=r"an AveragedModel.*pylora\.add_lora.*the order is"):
        pylora.add_lora(AveragedModel(Net()))


def test_lightning_fabric_is_known(tmp_path: Path) -> None:
    fabric = pytest.importorskip("lightning_fabric").Fabric(accelerator="cpu", devices=1)
    model = fabric.setup(trained_net())
    pylora.save_adapter(model, tmp_path)
    stored = safetensors.load_file(tmp_path / "adapter_model.safetensors")
    pylora.save_adapter(trained_net(), tmp_path)
    assert stored.keys() == safetensors.load_file(tmp_path / "adapter_model.safetensors").keys()


def test_the_wrappers_are_those_of_their_packages() -> None:
    """A wrapper is known by the name of its class, which its package could change."""
    from pylora.models.wrappers import _WRAPPERS

    places = {
        "OptimizedModule": "torch._dynamo.eval_frame",
        "DataParallel": "torch.nn.parallel",
        "DistributedDataParallel": "torch.nn.parallel",
        "AveragedModel": "torch.optim.swa_utils",
        "FullyShardedDataParallel": "torch.distributed.fsdp",
        "ActivationWrapper": "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
    }
    for name, module in places.items():
        assert name in _WRAPPERS and hasattr(importlib.import_module(module), name)
