"""The slots of a model, which hold its bottleneck adapters: finding, attaching and detaching."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from pylora.adapters.activation_state import ActiveSetup
from pylora.adapters.composition import names_in
from pylora.adapters.slot import SLOTS, AdapterSlot
from pylora.models.adapted import adapted
from pylora.models.blocks import SubLayer, TransformerBlock, submodule
from pylora.models.wrappers import plain_name, unwrapped
from pylora.nn.changes import note_change


def slots(model: nn.Module) -> dict[str, AdapterSlot]:
    """The slots of a model by name, each once."""
    root = unwrapped(model)
    return {
        plain_name(root, name): module
        for name, module in root.named_modules()
        if isinstance(module, AdapterSlot)
    }


def setup_of(model: nn.Module) -> ActiveSetup | None:
    """What says which adapters are active; None if the model has no bottleneck adapter."""
    return adapted(model).setup


def all_slots(model: nn.Module) -> list[AdapterSlot]:
    """The slots of a model, in the order in which they were added."""
    setup = setup_of(model)
    return [] if setup is None else setup.slots


def bottleneck_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the bottleneck adapters, those of the active composition first."""
    setup = setup_of(model)
    active = () if setup is None else tuple(names_in(setup.current()))
    own = [name for slot in all_slots(model) for name in slot.adapters]
    return tuple(dict.fromkeys([*active, *own]))


def bottleneck_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all bottleneck adapters and of the attention over them."""
    # `parameters()` takes twice as long, because it makes names.
    modules = (module for slot in all_slots(model) for module in slot.modules())
    return [p for module in modules for p in module._parameters.values() if p is not None]


def slot_at(
    model: nn.Module, block: TransformerBlock, place: str, sub_layer: SubLayer, setup: ActiveSetup
) -> AdapterSlot:
    """The slot of this name in a block, which is made, with its hooks, if the block has none."""
    held: Any = block.module._modules.get(SLOTS)
    if held is None:
        held = block.module._modules[SLOTS] = nn.ModuleDict()
    if place not in held:
        if setup_of(model) is None:
            unwrapped(model).register_forward_pre_hook(setup.repeat_inputs, with_kwargs=True)
        slot = AdapterSlot(f"{block.name}.{place}", block.hidden_size(), setup)
        held[place] = slot.train(block.module.training)
        setup.slots.append(slot)
        note_change()
        _hook(block, place, sub_layer, slot)
    return held[place]


def _hook(block: TransformerBlock, place: str, sub_layer: SubLayer, slot: AdapterSlot) -> None:
    # The hooks come before those that record the hidden states for transformers.
    reads, writes = (submodule(block.module, p) for p in (sub_layer.reads, sub_layer.writes))
    assert reads is not None and writes is not None
    if place == "output":
        norm = block.norm_after_mlp
        if norm is None:
            block.module.register_forward_hook(slot.change_output, prepend=True, with_kwargs=True)
        else:
            norm.register_forward_hook(slot.change_before_norm, prepend=True, with_kwargs=True)
    elif place.startswith("beside_"):
        reads.register_forward_pre_hook(slot.read_input, with_kwargs=True)
        writes.register_forward_hook(slot.add_beside, prepend=True, with_kwargs=True)
    else:
        writes.register_forward_hook(slot.change_output, prepend=True, with_kwargs=True)


def remove_adapters(model: nn.Module, names: set[str]) -> None:
    """Removes bottleneck adapters, and slots with their hooks if no adapter is left in them."""
    root = unwrapped(model)
    setup = setup_of(root)
    if setup is None:
        return
    for slot in setup.slots:
        for name in names & set(slot.adapters):
            del slot.adapters[name], slot.configs[name]
        for name in [n for n in slot.fusions if names & set(n.split(","))]:
            del slot.fusions[name]
    for module in list(root.modules()):
        held: Any = module._modules.get(SLOTS)
        if held is None:
            continue
        for place in [place for place, slot in held.items() if not len(slot.adapters)]:
            _unhook(module, held[place])
            setup.slots.remove(held[place])
            del held[place]
        if not len(held):
            del module._modules[SLOTS]
    if not setup.slots:
        _unhook(root, setup)
    note_change()


def _unhook(module: nn.Module, owner: object) -> None:
    """Removes the hooks of the module, and of those inside it, that are methods of `owner`."""
    for inner in module.modules():
        for hooks, with_kwargs in _hooks_of(inner):
            for key in [k for k, hook in hooks.items() if getattr(hook, "__self__", 0) is owner]:
                del hooks[key]
                with_kwargs.pop(key, None)


def _hooks_of(module: nn.Module) -> Iterator[tuple[dict[int, Any], dict[int, Any]]]:
    yield module._forward_hooks, module._forward_hooks_with_kwargs
    yield module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs
