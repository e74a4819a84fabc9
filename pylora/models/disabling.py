"""A model without its LoRA layers: `disable_adapter` for a while, `base_of` beside the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from pylora.models.changes import changed
from pylora.models.module_tree import (
    fully_trained_modules,
    lora_layers,
    refuse_peft_model,
)
from pylora.models.wrappers import unwrapped
from pylora.nn import LoRALinear

_Model = TypeVar("_Model", bound=nn.Module)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Inside the `with` block every LoRALinear of the model computes what its base layer computes.

    with pylora.disable_adapter(model):
        reference = model(tokens).logits

    Blocks may be nested, and the layers come back after an exception too. A forward that is to be
    differentiated must have its backward inside the block as well if it uses gradient
    checkpointing, which runs the forward again. Raises ValueError, before anything changes, if the
    model has no LoRA, if a layer is merged, or if modules were made trainable in full by
    `modules_to_save`: their weights from before training are not kept.
    """
    before = [(layer, layer.lora_enabled) for layer in _layers(model).values()]
    try:
        for layer, _ in before:
            layer.lora_enabled = False
        yield
    finally:
        for layer, enabled in before:
            layer.lora_enabled = enabled


def base_of(model: _Model) -> _Model:
    """A second model that computes what the base of `model` does, and has the same tensors.

    It is a copy of the modules, in which each LoRALinear is its base layer. Every parameter and
    buffer is that of `model`, so it takes no memory for weights, and follows what changes in them.
    Raises what `disable_adapter` raises, before anything is copied.
    """
    shared: dict[int, Any] = {id(layer): layer.base_layer for layer in _layers(model).values()}
    for tensor in (*model.parameters(), *model.buffers()):
        shared[id(tensor)] = tensor
    base = copy.deepcopy(model, shared)
    changed(base)
    return base


def _layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRALinears of a model, all of which can be left out."""
    root = unwrapped(model)
    refuse_peft_model(root)
    layers = lora_layers(root)
    if not layers:
        raise ValueError("model has no LoRALinear; pylora.add_lora must have been called on it")
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name} is merged; pylora.unmerge must be called first")
    for name in fully_trained_modules(root):
        raise ValueError(
            f"{name} is trained in full, so its weights from before training are not kept; "
            "the model must have no modules_to_save"
        )
    return layers
