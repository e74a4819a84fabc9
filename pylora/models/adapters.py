"""Several named adapters on one model: which ones there are, which one is active, and switching.

A switch exchanges parameters between a layer and its holder of inactive adapters. It copies nothing
and changes no value, so it is bit-identical back and forth.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from pylora.models.changes import changed
from pylora.models.distributed import refuse_to_change
from pylora.models.module_tree import lora_layers, refuse_peft_model, sites
from pylora.models.peft_names import refuse_several
from pylora.models.trained_in_full import (
    all_full_modules,
    delete_full,
    fully_trained_modules,
    train_full,
    use_full,
)
from pylora.models.wrappers import unwrapped
from pylora.nn import LoRALinear
from pylora.nn.inactive import set_trainable
from pylora.nn.lora_adapters import LORA_TENSORS

_Model = TypeVar("_Model", bound=nn.Module)


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the model's adapters, the active one first; empty without LoRA."""
    layers = lora_layers(unwrapped(model)).values()
    active = [layer.active_adapter for layer in layers if layer.active_adapter is not None]
    return tuple(dict.fromkeys([*active, *(n for layer in layers for n in layer.adapter_names)]))


def active_adapter(model: nn.Module) -> str | None:
    """The name of the adapter that the model computes with and trains; None without LoRA."""
    return next(iter(adapter_names(model)), None)


def set_active_adapters(model: _Model, adapter_name: str) -> _Model:
    """Has the model compute with this adapter and train it; returns the model.

    adapter_name    one of `adapter_names(model)`

    As with PEFT's `set_adapter`, the parameters of this adapter, its modules_to_save included, are
    trainable afterwards, and those of the others are frozen. They stay the same objects, so an
    optimizer goes on with them when their adapter is active again; it leaves a parameter alone as
    long as that has no gradient, so gradients must be set to None (`zero_grad`) before a switch.

    Raises ValueError if there is no such adapter, if the model is merged, or if it is sharded or in
    a wrapper, such as DistributedDataParallel, which goes on with the parameters that it found. The
    model is then as it was.
    """
    root = _checked(model, adapter_name, "pylora.set_active_adapters")
    _exchange(root, adapter_name)
    for layer in lora_layers(root).values():
        set_trainable(layer, LORA_TENSORS, True)
        for name in layer.adapter_names:
            if name != adapter_name:
                set_trainable(layer.adapter(name), LORA_TENSORS, False)
    for module in all_full_modules(root).values():
        train_full(module)
    return model


@contextmanager
def active_adapters(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Inside the `with` block the model computes with this adapter, as `set_active_adapters` says.

    with pylora.active_adapters(model, "german"):
        logits = model(tokens).logits

    Afterwards the adapter from before is active, and the same parameters are trainable as before. A
    backward through a forward with gradient checkpointing must be inside the block as well.
    """
    before = active_adapter(model)
    trainable = [(p, p.requires_grad) for p in _all_parameters(model)]
    set_active_adapters(model, adapter_name)
    try:
        yield
    finally:
        if before is not None:
            set_active_adapters(model, before)
        for parameter, was_trainable in trainable:
            parameter.requires_grad_(was_trainable)


def _all_parameters(model: nn.Module) -> list[nn.Parameter]:
    root = unwrapped(model)
    modules = (*lora_layers(root).values(), *all_full_modules(root).values())
    return [p for m in modules for p in m.parameters() if p.is_floating_point()]


@contextmanager
def using(model: nn.Module, adapter: str, call: str) -> Iterator[None]:
    """Inside the block the parameters of an adapter have the places of the active one.

    call    the name of the function that needs this, for errors

    Which parameters are trainable does not change.
    """
    before = active_adapter(model)
    if adapter == before:
        yield
        return
    root = _checked(model, adapter, f"{call} of an inactive adapter")
    _exchange(root, adapter)
    try:
        yield
    finally:
        _exchange(root, before)


def delete_adapter(model: _Model, adapter_name: str) -> _Model:
    """Deletes an adapter and frees its parameters; returns the model.

    If it was active, the first of the remaining ones becomes active, as in PEFT. Layers without any
    adapter left are plain ones again, so that a model without its last adapter is the one from
    before `pylora.add_lora`, with the weights from before for its modules_to_save.

    Raises ValueError as `set_active_adapters` does, or if the model is a single LoRALinear, which
    its only adapter cannot leave.
    """
    root = _checked(model, adapter_name, "pylora.delete_adapter")
    refuse_to_change(model, "pylora.delete_adapter")
    remaining = [name for name in adapter_names(root) if name != adapter_name]
    if not remaining and isinstance(root, LoRALinear):
        raise ValueError(
            f"model is a LoRALinear, of which {adapter_name!r} is the only adapter; its base_layer "
            "is the layer without it"
        )
    if adapter_name == active_adapter(root) and remaining:
        set_active_adapters(root, remaining[0])
    full = fully_trained_modules(root, adapter_name)
    for module in {id(module): module for module in full.values()}.values():
        delete_full(module, adapter_name)
    for layer in lora_layers(root).values():
        if adapter_name in layer.adapter_names:
            layer.delete_adapter(adapter_name)
    for site in list(sites(root)):
        if isinstance(site.module, LoRALinear) and not site.module.adapter_names:
            site.replace(site.module.base_layer)
    changed(root)
    return model


def _checked(model: nn.Module, adapter: str, call: str) -> nn.Module:
    """The model without wrappers; raises ValueError if it cannot switch to the adapter."""
    root = unwrapped(model)
    refuse_peft_model(root)
    refuse_several(adapter)
    names = adapter_names(root)
    if adapter not in names:
        raise ValueError(
            f"adapter_name is {adapter!r}; it must be one of the model's adapters: "
            f"{', '.join(map(repr, names)) or '(it has none; pylora.add_lora adds one)'}"
        )
    for name, layer in lora_layers(root).items():
        if layer.merged:
            raise ValueError(f"{name} is merged; pylora.unmerge must be called first")
    if adapter != names[0]:
        refuse_to_change(model, call)
    return root


def _exchange(model: nn.Module, adapter: str | None) -> None:
    for layer in lora_layers(model).values():
        layer.set_adapter(adapter if adapter in layer.adapter_names else None)
    for module in all_full_modules(model).values():
        use_full(module, adapter)
