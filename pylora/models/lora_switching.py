"""Several named LoRA adapters on one model: which there are, which is active, and switching.

A switch exchanges parameters between a layer and its holder of inactive adapters. It copies nothing
and changes no value, so it is bit-identical back and forth. It holds for every thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from pylora.models.adapted import adapted
from pylora.models.distributed import refuse_to_change
from pylora.models.module_tree import lora_layers, refuse_peft_model
from pylora.models.trained_in_full import train_full, use_full
from pylora.models.wrappers import unwrapped
from pylora.nn.inactive import inactive_adapters, set_trainable
from pylora.nn.lora_adapters import LORA_TENSORS


def lora_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the model's LoRA adapters, the active one first; empty without LoRA."""
    layers = adapted(model).lora
    active = [layer.active_adapter for layer in layers if layer.active_adapter is not None]
    return tuple(dict.fromkeys([*active, *(n for layer in layers for n in layer.adapter_names)]))


def active_lora(model: nn.Module) -> str | None:
    """The LoRA adapter that the model computes with; None if there is none."""
    active = (layer.active_adapter for layer in adapted(model).lora)
    return next((name for name in active if name is not None), None)


def check_is_lora(model: nn.Module, adapter: str) -> None:
    """Raises ValueError if the model has no LoRA adapter of this name."""
    names = lora_names(model)
    if adapter not in names:
        raise ValueError(
            f"adapter_name is {adapter!r}; it must be one of the model's LoRA adapters: "
            f"{', '.join(map(repr, names)) or '(it has none)'}"
        )


def check_switch(model: nn.Module, adapter: str | None, call: str) -> None:
    """Raises ValueError if the model cannot switch to a LoRA adapter that it has, or to none."""
    root = unwrapped(model)
    refuse_peft_model(root)
    if any(layer.merged for layer in adapted(root).lora):
        name = next(name for name, layer in lora_layers(root).items() if layer.merged)
        raise ValueError(f"{name} is merged; pylora.unmerge must be called first")
    if adapter != active_lora(root):
        refuse_to_change(model, call, lora_parameters(root))


def exchange(model: nn.Module, adapter: str | None) -> None:
    """Gives the parameters of an adapter the places of the active one; None leaves the base."""
    for layer in adapted(model).lora:
        layer.set_adapter(adapter if adapter in layer.adapter_names else None)
    for module in adapted(model).full:
        use_full(module, adapter)


def train_active(model: nn.Module) -> None:
    """Makes the parameters of the active adapter trainable, and freezes those of the others."""
    for layer in adapted(model).lora:
        set_trainable(layer, LORA_TENSORS, True)
        for name in layer.adapter_names:
            if name != layer.active_adapter:
                set_trainable(layer.adapter(name), LORA_TENSORS, False)
    for module in adapted(model).full:
        train_full(module)


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The floating-point parameters of all LoRA adapters, and of modules trained in full."""
    found = adapted(model)
    holders = [(layer, *inactive_adapters(layer).values()) for layer in found.lora]
    of_lora = (h._parameters.get(name) for hs in holders for h in hs for name in LORA_TENSORS)
    in_full = (p for module in found.full for p in module.parameters())
    return [p for p in (*of_lora, *in_full) if p is not None and p.is_floating_point()]


@contextmanager
def using(model: nn.Module, adapter: str | None, call: str) -> Iterator[None]:
    """Inside the block the parameters of a LoRA adapter have the places of the active one.

    call    the name of the function that needs this, for errors

    Which parameters are trainable does not change.
    """
    before = active_lora(model)
    if adapter == before:
        yield
        return
    check_switch(model, adapter, f"{call} of an inactive adapter")
    exchange(model, adapter)
    try:
        yield
    finally:
        exchange(model, before)
