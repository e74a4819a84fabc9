"""A model without its adapters: `disable_adapter` for a while, `base_of` beside the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

from torch import nn

from pylora.models.changes import changed
from pylora.models.lora_switching import active_lora
from pylora.models.module_tree import lora_layers, refuse_peft_model
from pylora.models.slots import setup_of, slots
from pylora.models.trained_in_full import fully_trained_modules, use_full
from pylora.models.wrappers import unwrapped
from pylora.nn import LoRALinear
from pylora.sharding import is_sharded

_Model = TypeVar("_Model", bound=nn.Module)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Inside the `with` block the model computes what it computed without adapters.

    Every LoRALinear is its base layer, modules_to_save have their weights from before training, and
    no bottleneck adapter is active in this thread.

    with pylora.disable_adapter(model):
        reference = model(tokens).logits

    Blocks may be nested, and the layers come back after an exception too. A forward that is to be
    differentiated must have its backward inside the block as well if it uses gradient
    checkpointing, which runs the forward again. Raises ValueError, before anything changes, if the
    model has no adapter, if a layer is merged, or if a module of modules_to_save is sharded by
    `fully_shard`, which would put its trained weights back.
    """
    before = [(layer, layer.lora_enabled) for layer in _layers(model).values()]
    root = unwrapped(model)
    adapter, full = active_lora(root), fully_trained_modules(root)
    setup = setup_of(root)
    for name, module in full.items():
        if any(map(is_sharded, module.parameters())):
            raise ValueError(
                f"{name} is trained in full and sharded by fully_shard, which would put its "
                "trained weights back; the model must have no modules_to_save"
            )
    try:
        for layer, _ in before:
            layer.lora_enabled = False
        for module in full.values():
            use_full(module, None)
        with nullcontext() if setup is None else setup.inside(None):
            yield
    finally:
        for module in full.values():
            use_full(module, adapter)
        for layer, enabled in before:
            layer.lora_enabled = enabled


def base_of(model: _Model) -> _Model:
    """A second model that computes what the base of `model` does, and has the same tensors.

    It is a copy of the modules, in which each LoRALinear is its base layer and no bottleneck
    adapter is active. Every parameter and buffer is that of `model`, so it takes no memory for
    weights, and follows what changes in them.
    Raises what `disable_adapter` raises, and ValueError if the model has modules_to_save, before
    anything is copied.
    """
    for name in fully_trained_modules(unwrapped(model)):
        raise ValueError(f"{name} is trained in full; the model must have no modules_to_save")
    shared: dict[int, Any] = {id(layer): layer.base_layer for layer in _layers(model).values()}
    for tensor in (*model.parameters(), *model.buffers()):
        shared[id(tensor)] = tensor
    base = copy.deepcopy(model, shared)
    setup = setup_of(base)
    if setup is not None:
        setup.composition = None
    changed(base)
    return base


def _layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRALinears of a model, all of which can be left out."""
    root = unwrapped(model)
    refuse_peft_model(root)
    layers = lora_layers(root)
    if not layers and not slots(root):
        raise ValueError(
            "model has no adapter; pylora.add_lora or pylora.add_adapter must have been called on "
            "it"
        )
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name} is merged; pylora.unmerge must be called first")
    return layers
