"""Modules that an adapter trains in full, beside its LoRA (PEFT's modules_to_save).

Such a module has one set of tensors for each adapter that trains it, and its base: the tensors from
before, which are what it computes with while any other adapter is active, or none. The tensors in
use are its own parameters and buffers. Those of inactive adapters are kept as in
`pylora.nn.inactive`. The base, while it is not in use, is kept outside the state dict, because the
model that the adapters are loaded into has it already.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from pylora.models.module_tree import sites
from pylora.models.wrappers import plain_state
from pylora.nn.changes import note_change
from pylora.nn.inactive import (
    HOLDER,
    InactiveAdapter,
    drop,
    hold,
    inactive_adapters,
    move_tensors,
    on_device_of,
    rename_for,
    set_trainable,
)

# A module that is trained in full has its state here, as has each module inside with tensors.
_STATE, _PART_OF = "_pylora_trained_in_full", "_pylora_part_of"
# A module keeps its base here while an adapter's tensors are in use. A tuple hides it from torch.
_BASE = "_pylora_base"


@dataclass
class _State:
    """The adapters that train a module in full, and the one whose tensors it computes with."""

    names: list[str] = field(default_factory=list)
    active: str | None = None


def add_full(module: nn.Module, name: str, copies: dict[int, Tensor]) -> None:
    """Gives a module tensors of its own for the adapter `name`: copies of its base, frozen.

    copies    the copies that the adapter has, by the id of the original; modules that share a
              parameter share its copy
    """
    state: _State = vars(module).setdefault(_STATE, _State())
    for part in _parts(module):
        if _PART_OF not in vars(part):
            setattr(part, _PART_OF, state)
            part.register_load_state_dict_pre_hook(_rename_entries)
        base: Any = part if state.active is None else vars(part)[_BASE][0]
        adapter = InactiveAdapter({})
        for held, target in (
            (base._parameters, adapter._parameters),
            (base._buffers, adapter._buffers),
        ):
            for key, tensor in held.items():
                target[key] = None if tensor is None else _copied(tensor, copies)
        adapter._non_persistent_buffers_set |= base._non_persistent_buffers_set
        hold(part, name, adapter)
    state.names.append(name)
    note_change()


def _copied(tensor: Tensor, copies: dict[int, Tensor]) -> Any:
    if id(tensor) not in copies:
        value = tensor.detach().clone()
        is_parameter = isinstance(tensor, nn.Parameter)
        copies[id(tensor)] = nn.Parameter(value, requires_grad=False) if is_parameter else value
    return copies[id(tensor)]


def use_full(module: nn.Module, name: str | None) -> None:
    """Has a module compute with the tensors of an adapter, or with its base if that has none."""
    state: _State = vars(module)[_STATE]
    name = name if name in state.names else None
    if name == state.active:
        return
    for part in _parts(module):
        names = _tensor_names(part)
        away = InactiveAdapter({})
        likes = {key: getattr(part, key) for key in names}
        move_tensors(part, away, names)
        if state.active is None:
            setattr(part, _BASE, (away,))
        else:
            hold(part, state.active, away)
        taken = vars(part).pop(_BASE)[0] if name is None else drop(part, name)
        move_tensors(taken, part, names)
        for key, like in likes.items():
            if like is not None:
                on_device_of(getattr(part, key), like)  # the model may have been moved or cast
    state.active = name


def train_full(module: nn.Module) -> None:
    """Makes the parameters of the adapter in use trainable, and freezes all others."""
    state: _State = vars(module)[_STATE]
    for part in _parts(module):
        set_trainable(part, _tensor_names(part), state.active is not None)
        for adapter in inactive_adapters(part).values():
            set_trainable(adapter, _tensor_names(adapter), False)
        if _BASE in vars(part):
            set_trainable(vars(part)[_BASE][0], _tensor_names(part), False)


def delete_full(module: nn.Module, name: str) -> None:
    """Deletes the tensors of an adapter; without a last one, the module is a plain one again."""
    state: _State = vars(module)[_STATE]
    if state.active == name:
        use_full(module, None)
    for part in _parts(module):
        drop(part, name)
    state.names.remove(name)
    if not state.names:
        forget_full(module)


def forget_full(module: nn.Module) -> None:
    """Makes a module a plain one, with the tensors in use."""
    for part in _parts(module):
        for name in inactive_adapters(part):
            drop(part, name)
        vars(part).pop(_BASE, None)
        vars(part).pop(_PART_OF, None)
    del vars(module)[_STATE]
    note_change()


def full_adapters(module: nn.Module) -> tuple[str, ...]:
    """The names of the adapters that train a module in full."""
    state: _State | None = vars(module).get(_STATE)
    return () if state is None else tuple(state.names)


def is_trained_in_full(module: nn.Module) -> bool:
    """True if some adapter trains this module in full."""
    return _STATE in vars(module)


def all_full_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that some adapter trains in full, by name."""
    return {site.name: site.module for site in sites(model) if is_trained_in_full(site.module)}


def fully_trained_modules(model: nn.Module, adapter: str | None = None) -> dict[str, nn.Module]:
    """The modules that an adapter trains in full, by name; by default those of the active one."""
    return {
        name: module
        for name, module in all_full_modules(model).items()
        if (
            vars(module)[_STATE].active is not None
            if adapter is None
            else adapter in full_adapters(module)
        )
    }


def state_in_use(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a module under names without wrappers, without its inactive adapters."""
    state = plain_state(module)
    return {key: value for key, value in state.items() if HOLDER not in key.split(".")}


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The module and those inside it, if they hold tensors themselves."""
    for inner in list(module.modules()):
        if not isinstance(inner, InactiveAdapter) and _tensor_names(inner):
            yield inner


def _tensor_names(module: nn.Module) -> list[str]:
    return [*module._parameters, *module._buffers]


def _rename_entries(part: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Renames the entries of a state dict that was made while another adapter was active."""
    state: _State | None = vars(part).get(_PART_OF)
    if state is None:
        return
    names = [name for name in _tensor_names(part) if name not in part._non_persistent_buffers_set]
    rename_for(part, state.active, names, state_dict, prefix)
    if state.active is None:  # the state dict may have an adapter's tensors in place of the base
        for name in names:
            tensor = getattr(part, name)
            if tensor is not None:
                state_dict.setdefault(prefix + name, tensor.detach())
