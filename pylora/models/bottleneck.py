"""`add_adapter` gives the transformer blocks of a model bottleneck adapters."""

from __future__ import annotations

import logging
from typing import Any, TypeVar

import torch
from torch import nn

from pylora import checks
from pylora.adapters.activation_state import ActiveSetup
from pylora.adapters.composition import Composition, Fuse, names_in
from pylora.adapters.configs import AdapterConfig
from pylora.adapters.fusion import AdapterFusion
from pylora.adapters.slot import AdapterSlot
from pylora.models.adapters import adapter_names, set_active_adapters, set_trained
from pylora.models.blocks import TransformerBlock, places, transformer_blocks
from pylora.models.changes import changed
from pylora.models.distributed import refuse_to_change
from pylora.models.lora_switching import lora_parameters
from pylora.models.module_tree import refuse_peft_model
from pylora.models.slots import (
    bottleneck_names,
    bottleneck_parameters,
    setup_of,
    slot_at,
    slots,
)
from pylora.models.targets import task_heads
from pylora.models.wrappers import unwrapped
from pylora.nn import BottleneckAdapter
from pylora.nn.inactive import check_adapter_name

logger = logging.getLogger(__name__)

_Model = TypeVar("_Model", bound=nn.Module)


@torch.inference_mode(False)  # the adapters are trained later
def add_adapter(
    model: _Model, name: str, config: AdapterConfig, dtype: torch.dtype = torch.float32
) -> _Model:
    """Freezes the model and gives its transformer blocks a bottleneck adapter; returns the model.

    model     changed in place; its layers may be dense, NF4 or bitsandbytes' 4-bit, and may have
              LoRA
    name      the name of the adapter, which no other adapter of the model may have
    config    a HoulsbyConfig, PfeifferConfig or ParallelConfig: where the adapters sit and how
              large they are
    dtype     the dtype of their parameters, float32 by default, as for LoRA

    As with `pylora.add_lora`, the first adapter of a model is active and trainable. Others are
    inactive until `pylora.set_active_adapters` or `pylora.train_adapter`. Everything else is
    frozen, the head of a model for a task, such as classification, included.

    Raises ValueError if the name is taken, if a block or its places are not found, or if the model
    is in a wrapper that keeps its parameters; the model is then as it was. Raises TypeError for a
    config of another class.
    """
    root = unwrapped(model)
    refuse_to_change(model, "pylora.add_adapter")
    refuse_peft_model(root)
    check_adapter_name(name)
    if "," in name:
        raise ValueError(f"name is {name!r}; it must have no comma, which separates fused adapters")
    if not isinstance(config, AdapterConfig):
        raise TypeError(
            f"config is {config!r}; it must be a HoulsbyConfig, a PfeifferConfig or a "
            "ParallelConfig"
        )
    checks.floating_dtype("dtype", dtype)
    before = adapter_names(root)
    if name in before:
        raise ValueError(f"name is {name!r}; the model has an adapter of this name")
    blocks = transformer_blocks(root)
    new = [(block, *place) for block in blocks for place in places(block, config)]
    modules = [_adapter(block, config, dtype) for block, *_ in new]
    for head in task_heads(root):
        logger.warning("%s is frozen: the adapter is trained with the head as it is", head)
    already = {id(p) for p in (*lora_parameters(root), *bottleneck_parameters(root))}
    for parameter in root.parameters():
        if id(parameter) not in already:
            parameter.requires_grad_(False)
    setup = setup_of(root) or ActiveSetup()
    for (block, place, sub_layer), module in zip(new, modules, strict=True):
        slot = slot_at(root, block, place, sub_layer, setup)
        slot.configs[name] = config
        slot.adapters[name] = module.train(slot.training).requires_grad_(False)
    if not before:
        set_active_adapters(root, name)
    changed(root)
    return model


def _adapter(
    block: TransformerBlock, config: AdapterConfig, dtype: torch.dtype
) -> BottleneckAdapter:
    block.check(config)
    hidden_size = block.hidden_size()
    return BottleneckAdapter(
        hidden_size,
        config.bottleneck_size(hidden_size),
        activation=config.activation,
        scaling=config.scaling,
        dropout=config.dropout,
        norm_before=config.norm_before,
        norm_after=config.norm_after,
        init_weights=config.init_weights,
        device=_device(block.module),
        dtype=dtype,
    )


def _device(block: nn.Module) -> torch.device:
    return next(iter(block.parameters())).device


def train_adapter(model: _Model, name: str | Fuse, inside: Composition | None = None) -> _Model:
    """Makes one adapter the only trainable one, and active; returns the model.

    name      an adapter of the model, or a Fuse: then the attention over its members is trained and
              they are frozen. It is made if the model does not have it
    inside    the composition to compute with, which must contain it, such as
              Stack("language", "task"); by default it is active by itself

    Raises ValueError as `pylora.set_active_adapters` does.
    """
    root = unwrapped(model)
    setup: Composition = name if inside is None else inside
    if isinstance(name, Fuse):
        _make_fusion(model, name)
    elif not isinstance(name, str):
        raise TypeError(f"name is {name!r}; it must be the name of an adapter or a Fuse")
    elif name not in set(names_in(setup)):
        raise ValueError(f"inside is {inside}; it must contain {name!r}")
    set_active_adapters(model, setup)
    set_trained(root, name)
    return model


def _make_fusion(model: nn.Module, fuse: Fuse) -> None:
    """Makes the attention over the members of a Fuse in each slot that has them."""
    root = unwrapped(model)
    members = tuple(names_in(fuse))
    missing = [name for name in members if name not in bottleneck_names(root)]
    if missing:
        raise ValueError(
            f"{fuse} has {missing[0]!r}; its members must be bottleneck adapters of the model: "
            f"{', '.join(map(repr, bottleneck_names(root))) or '(it has none)'}"
        )
    wanted: list[AdapterSlot] = []
    for place, slot in slots(root).items():
        present = [name for name in members if name in slot.adapters]
        if present and len(present) < len(members):
            raise ValueError(
                f"{place} has {', '.join(map(repr, present))} alone; the members of {fuse} must "
                "sit at the same places, as adapters with configurations of the same class do"
            )
        if present and fuse.name not in slot.fusions:
            wanted.append(slot)
    if wanted:
        refuse_to_change(model, "pylora.train_adapter of a new Fuse")
    for slot in wanted:
        first: Any = slot.adapters[members[0]]
        like = first.down_weight
        slot.fusions[fuse.name] = AdapterFusion(slot.hidden_size, like.dtype, like.device).train(
            slot.training
        )
