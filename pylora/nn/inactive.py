"""Keeps the tensors of a module's inactive adapters beside those of the active one.

The tensors of the active adapter are parameters and buffers of the module itself, so that a forward
need not know that there are others. Those of an inactive adapter are the same objects in a child
of the module: `inactive_adapters.<adapter>.<tensor>`. A switch exchanges the two and copies
nothing. A module with one adapter, which is active, has no such child, and its keys in a state dict
are those of a module that never heard of adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

HOLDER = "inactive_adapters"


class InactiveAdapter(nn.Module):
    """The tensors and settings of an inactive adapter, under the names that they have if active."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.settings = dict(settings)

    def __getattr__(self, name: str) -> Any:
        settings = self.__dict__.get("settings", {})
        return settings[name] if name in settings else super().__getattr__(name)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings.items())


def check_adapter_name(name: object) -> str:
    """The name itself; raises TypeError or ValueError if an adapter cannot have it."""
    if not isinstance(name, str):
        raise TypeError(f"adapter_name is {name!r}; it must be a string")
    # The rules are those of torch's containers, in which PEFT keeps adapters.
    if not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"adapter_name is {name!r}; it must be a name that can be part of a state dict's keys: "
            "without a dot, not empty, and no attribute of nn.ModuleDict"
        )
    return name


def inactive_adapters(module: nn.Module) -> dict[str, InactiveAdapter]:
    """The inactive adapters of a module by name."""
    holder = module._modules.get(HOLDER)
    children: Any = {} if holder is None else dict(holder._modules)
    return children


def hold(module: nn.Module, name: str, adapter: InactiveAdapter) -> None:
    """Makes `adapter` an inactive adapter of the module."""
    if HOLDER not in module._modules:
        module._modules[HOLDER] = nn.ModuleDict()
    holder: Any = module._modules[HOLDER]
    holder[name] = adapter.train(module.training)


def drop(module: nn.Module, name: str) -> InactiveAdapter:
    """Takes an inactive adapter away from the module, and returns it."""
    holder: Any = module._modules[HOLDER]
    adapter = holder.pop(name)
    if not len(holder):
        del module._modules[HOLDER]
    return adapter


def move_tensors(source: nn.Module, target: nn.Module, names: Iterable[str]) -> None:
    """Moves parameters and buffers to another module; `source` has None in their places."""
    for name in names:
        if name in source._parameters:
            target._parameters[name] = source._parameters[name]
            source._parameters[name] = None
        elif name in source._buffers:
            target._buffers[name] = source._buffers[name]
            source._buffers[name] = None
            if name in source._non_persistent_buffers_set:
                target._non_persistent_buffers_set.add(name)


def change_places(
    module: nn.Module, active: str, name: str, names: Iterable[str], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Makes the inactive adapter `name` the active one; the active one takes its place.

    active      the name of the active adapter
    names       the parameters that an adapter has
    settings    those of the active adapter

    Returns the settings of the other one. The child module that held it holds the active one
    afterwards, since making a module takes longer than the rest of a switch.
    """
    held: Any = module._modules[HOLDER]
    adapter = held._modules.pop(name)
    for key in names:
        mine, other = module._parameters.get(key), adapter._parameters.get(key)
        module._parameters[key], adapter._parameters[key] = other, mine
    taken, adapter.settings = adapter.settings, dict(settings)
    held._modules[active] = adapter
    return taken


def set_trainable(module: nn.Module, names: Iterable[str], trainable: bool) -> None:
    """Sets `requires_grad` of these parameters, if they are of a floating-point dtype."""
    for name in names:
        parameter = module._parameters.get(name)
        if parameter is not None and parameter.is_floating_point():
            parameter.requires_grad_(trainable)


def rename_for(
    module: nn.Module,
    active: str | None,
    tensors: Iterable[str],
    state_dict: dict[str, Any],
    prefix: str,
) -> None:
    """Renames the entries of a state dict that was made while another adapter was active.

    active     the adapter that is active in `module`; None if none of its adapters is
    tensors    the names of the tensors that an adapter has

    The adapter whose tensors have no holder in the state dict was active. If more than one has
    none, the state dict is of a module without them, and torch reports what is missing.
    """
    own = {*inactive_adapters(module), *([] if active is None else [active])}
    start = f"{prefix}{HOLDER}."
    held = {key[len(start) :].split(".")[0] for key in state_dict if key.startswith(start)}
    without_holder = own - held
    if not held <= own or len(without_holder) > 1:
        return
    names = [name for name in tensors if prefix + name in state_dict]
    stored_active = next(iter(without_holder), None) if names else None
    if stored_active == active:
        return
    entries = {name: state_dict.pop(prefix + name) for name in names}
    for name in tensors:
        key = f"{start}{active}.{name}"
        if key in state_dict:
            state_dict[prefix + name] = state_dict.pop(key)
        if stored_active is not None and name in entries:
            state_dict[f"{start}{stored_active}.{name}"] = entries[name]


def on_device_of(tensor: Tensor, like: Tensor) -> Tensor:
    """The parameter or buffer itself, with its values where those of `like` are."""
    if tensor.device != like.device or tensor.dtype != like.dtype:
        with torch.no_grad():
            tensor.data = tensor.data.to(like.device, like.dtype)
    return tensor
