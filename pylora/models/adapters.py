"""The adapters of a model, LoRA and bottleneck adapters alike: which are active, and switching.

A switch copies nothing and changes no value, so it is bit-identical back and forth. Which
bottleneck adapters are active is one value that all their slots read (`pylora.adapters.slot`). A
switch of LoRA exchanges parameters (`pylora.models.lora_switching`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from pylora.adapters.composition import (
    Block,
    Composition,
    Fuse,
    Stack,
    fusions_in,
    names_in,
    without,
)
from pylora.models.changes import changed
from pylora.models.distributed import refuse_to_change
from pylora.models.lora_switching import (
    active_lora,
    check_switch,
    exchange,
    lora_names,
    lora_parameters,
    train_active,
    using,
)
from pylora.models.module_tree import lora_layers, refuse_peft_model, sites
from pylora.models.peft_names import refuse_several
from pylora.models.slots import (
    all_slots,
    bottleneck_names,
    bottleneck_parameters,
    remove_adapters,
    setup_of,
)
from pylora.models.trained_in_full import delete_full, fully_trained_modules
from pylora.models.wrappers import unwrapped
from pylora.nn import LoRALinear

logger = logging.getLogger(__name__)

_Model = TypeVar("_Model", bound=nn.Module)


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the model's adapters, the active ones first; empty without adapters."""
    names = (*lora_names(model), *bottleneck_names(model))
    active = names_in(active_adapter(model))
    return tuple(dict.fromkeys((*active, *names)))


def active_adapter(model: nn.Module) -> Composition | None:
    """What the model computes with in this thread: a name, a composition of names, or None."""
    lora, setup = active_lora(model), setup_of(model)
    composition = None if setup is None else setup.current()
    if lora is None or composition is None:
        return composition if lora is None else lora
    members = composition.members if isinstance(composition, Stack) else (composition,)
    return Stack(lora, *members)


def set_active_adapters(model: _Model, adapter_name: Composition) -> _Model:
    """Has the model compute with these adapters and train them; returns the model.

    adapter_name    one of `adapter_names(model)`, or a composition of several: Stack, Average,
                    Fuse, BatchSplit or Parallel. LoRA is active by itself or as a member of a
                    Stack, and at most one LoRA adapter is

    As with PEFT's `set_adapter`, the parameters of these adapters, modules_to_save included, are
    trainable afterwards, and those of the others are frozen. The members of a Fuse are frozen, and
    its attention is trainable. `pylora.train_adapter` chooses one of several to train. All
    parameters stay the same objects, so an optimizer goes on with them when their adapter is active
    again; it leaves a parameter alone as long as that has no gradient, so gradients must be set to
    None (`zero_grad`) before a switch.

    Raises ValueError if there is no such adapter, if the model is merged, or if it is sharded or in
    a wrapper, such as DistributedDataParallel, which goes on with the parameters that it found. The
    model is then as it was.
    """
    call = "pylora.set_active_adapters"
    switch = _checked(model, adapter_name, call)
    root, composition = switch.model, switch.composition
    trained = _trained_by(root, composition)
    changes = [p for p in bottleneck_parameters(root) if p.requires_grad != (id(p) in trained)]
    if changes:
        refuse_to_change(model, call, changes)
    if switch.has_lora:
        exchange(root, switch.lora)
        train_active(root)
    setup = setup_of(root)
    if setup is not None:
        setup.composition = composition
    for parameter in changes:
        parameter.requires_grad_(not parameter.requires_grad)
    return model


def set_trained(model: nn.Module, name: str | Fuse) -> None:
    """Makes an adapter of the active composition, or the attention of a Fuse, the only trainable.

    model    without wrappers
    """
    trained = _trained_by(model, name) if name not in lora_names(model) else set()
    for parameter in bottleneck_parameters(model):
        parameter.requires_grad_(id(parameter) in trained)
    if name != active_lora(model):
        for parameter in lora_parameters(model):
            parameter.requires_grad_(False)


@contextmanager
def active_adapters(model: nn.Module, adapter_name: Composition) -> Iterator[None]:
    """Inside the `with` block the model computes with these adapters.

    with pylora.active_adapters(model, "german"):
        logits = model(tokens).logits

    Afterwards the adapters from before are active, and the same parameters are trainable as before.
    A backward through a forward with gradient checkpointing must be inside the block as well.

    Bottleneck adapters are active for the thread that is inside the block, and others are not
    affected; which parameters are trainable does not change. A switch to another LoRA adapter, or
    away from one, holds for all threads, and LoRA that the block activates is trainable in it.
    """
    switch = _checked(model, adapter_name, "pylora.active_adapters")
    setup = setup_of(switch.model)
    with ExitStack() as stack:
        if switch.has_lora:
            stack.enter_context(_lora_block(model, switch.lora))
        if setup is not None:
            stack.enter_context(setup.inside(switch.composition))
        yield


@contextmanager
def _lora_block(model: nn.Module, lora: str | None) -> Iterator[None]:
    trainable = [(p, p.requires_grad) for p in lora_parameters(model)]
    with using(model, lora, "pylora.active_adapters"):
        if lora is not None:
            train_active(model)
        try:
            yield
        finally:
            for parameter, was_trainable in trainable:
                parameter.requires_grad_(was_trainable)


def delete_adapter(model: _Model, adapter_name: str) -> _Model:
    """Deletes an adapter and frees its parameters; returns the model.

    If LoRA is deleted that was active by itself, the first of the remaining LoRA adapters becomes
    active, as in PEFT. Layers without any adapter left are plain ones again, so that a model
    without its last adapter is the one from before `pylora.add_lora` or `pylora.add_adapter`, with
    the weights from before for its modules_to_save. With a bottleneck adapter goes the attention of
    each Fuse over it. If it was part of the active composition, none of that is active afterwards,
    and the log says so.

    Raises ValueError as `set_active_adapters` does, or if the model is a single LoRALinear, which
    its only adapter cannot leave.
    """
    refuse_several(adapter_name)
    switch = _checked(model, adapter_name, "pylora.delete_adapter")
    root = switch.model
    refuse_to_change(model, "pylora.delete_adapter")
    if switch.lora is None:
        setup = setup_of(root)
        if setup is not None and adapter_name in names_in(setup.composition):
            if setup.composition != adapter_name:
                logger.warning("%s is no longer active: it has %r", setup.composition, adapter_name)
            setup.composition = None
        remove_adapters(root, {adapter_name})
    else:
        _delete_lora(root, adapter_name)
    changed(root)
    return model


def _delete_lora(root: nn.Module, adapter_name: str) -> None:
    remaining = [name for name in lora_names(root) if name != adapter_name]
    if not remaining and isinstance(root, LoRALinear):
        raise ValueError(
            f"model is a LoRALinear, of which {adapter_name!r} is the only adapter; its base_layer "
            "is the layer without it"
        )
    if adapter_name == active_lora(root):
        exchange(root, remaining[0] if remaining else None)
        train_active(root)
    full = fully_trained_modules(root, adapter_name)
    for module in {id(module): module for module in full.values()}.values():
        delete_full(module, adapter_name)
    for layer in lora_layers(root).values():
        if adapter_name in layer.adapter_names:
            layer.delete_adapter(adapter_name)
    for site in list(sites(root)):
        if isinstance(site.module, LoRALinear) and not site.module.adapter_names:
            site.replace(site.module.base_layer)


@dataclass(frozen=True)
class _Switch:
    """A switch that a model can make.

    model          without wrappers
    has_lora       True if it has LoRA adapters
    lora           the one to activate
    composition    the bottleneck adapters to activate
    """

    model: nn.Module
    has_lora: bool
    lora: str | None
    composition: Composition | None


def _checked(model: nn.Module, adapter: Composition, call: str) -> _Switch:
    """The switch to these adapters.

    Raises ValueError or TypeError if the model cannot switch to them.
    """
    root = unwrapped(model)
    refuse_peft_model(root)
    if not isinstance(adapter, Block):
        refuse_several(adapter)
    loras, held = lora_names(root), all_slots(root)
    for name in names_in(adapter):
        if name not in loras and not any(name in slot.adapters for slot in held):
            known = ", ".join(map(repr, adapter_names(root)))
            raise ValueError(
                f"adapter_name is {adapter!r}; it must be one of the model's adapters: "
                f"{known or '(it has none; pylora.add_lora and pylora.add_adapter add one)'}"
            )
    own = set(names_in(adapter)) & set(loras)
    if len(own) > 1:
        raise ValueError(
            f"adapter_name is {adapter!r}, which has the LoRA adapters "
            f"{', '.join(map(repr, sorted(own)))}; at most one can be active"
        )
    composition = without(adapter, own)
    for fuse in fusions_in(composition):
        if not any(fuse.name in slot.fusions for slot in held):
            raise ValueError(
                f"{fuse} has no attention yet; pylora.train_adapter(model, {fuse}) makes and "
                "trains it"
            )
    lora = next(iter(own), None)
    if loras:
        check_switch(model, lora, call)
    return _Switch(root, bool(loras), lora, composition)


def _trained_by(model: nn.Module, composition: Composition | None) -> set[int]:
    """The ids of the parameters that training with a composition changes."""
    fused = {name for fuse in fusions_in(composition) for name in names_in(fuse)}
    names = set(names_in(composition)) - fused
    fusions = {fuse.name for fuse in fusions_in(composition)}
    trained: set[int] = set()
    for slot in all_slots(model):
        children: list[Any] = [slot.adapters[name] for name in names & set(slot.adapters)]
        children += [slot.fusions[name] for name in fusions & set(slot.fusions)]
        trained |= {id(p) for child in children for p in child.parameters()}
    return trained
