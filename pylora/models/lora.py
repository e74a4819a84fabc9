"""`add_lora` wraps a model's linear layers into LoRALinear and freezes everything else."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from pylora import checks
from pylora.models.adapters import adapter_names
from pylora.models.changes import changed
from pylora.models.dense import make_dense
from pylora.models.distributed import refuse_to_change
from pylora.models.head_input import lay_out_head_input
from pylora.models.lora_switching import active_lora
from pylora.models.module_tree import (
    Site,
    is_4bit,
    is_below,
    is_bitsandbytes_4bit,
    lora_layers,
    refuse_peft_model,
    sites,
)
from pylora.models.slots import bottleneck_names, slots
from pylora.models.targets import (
    ALL_LINEAR,
    Targets,
    can_carry_lora,
    named_by,
    not_found,
    other_linear_classes,
    task_heads,
)
from pylora.models.torch_refusals import explain_refusals
from pylora.models.trained_in_full import (
    add_full,
    all_full_modules,
    full_adapters,
    fully_trained_modules,
    train_full,
    use_full,
)
from pylora.models.weight_readers import why_not_lora
from pylora.models.wrappers import unwrapped
from pylora.nn import LoRALinear, NF4Linear
from pylora.nn.inactive import check_adapter_name, set_trainable
from pylora.nn.lora_adapters import DEFAULT_ADAPTER, LORA_TENSORS

logger = logging.getLogger(__name__)

_Model = TypeVar("_Model", bound=nn.Module)


@dataclass(frozen=True)
class LoraSettings:
    """The arguments of a LoRALinear, which documents them."""

    r: int
    lora_alpha: float
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    dtype: torch.dtype = torch.float32
    merge_aware: bool = False

    def wrap(self, base: nn.Module, adapter: str) -> LoRALinear:
        """A LoRALinear around `base` with this adapter."""
        return LoRALinear(base, **vars(self), adapter_name=adapter)

    def check(self) -> None:
        """Raises TypeError or ValueError for what LoRALinear does not take."""
        kind: Any = NF4Linear if self.merge_aware else nn.Linear
        self.wrap(kind(1, 1, device="meta"), DEFAULT_ADAPTER)


@torch.inference_mode(False)  # the layers are trained later
def add_lora(
    model: _Model,
    r: int = 16,
    lora_alpha: float = 32,
    target_modules: str | Collection[str] | None = ALL_LINEAR,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
    lora_bias: bool = False,
    modules_to_save: Collection[str] | None = None,
    dtype: torch.dtype = torch.float32,
    adapter_name: str = DEFAULT_ADAPTER,
    merge_aware: bool = False,
) -> _Model:
    """Freezes the model, wraps its targets into `pylora.nn.LoRALinear` in place and returns it.

    target_modules     "all-linear" or None for every linear layer but the output head; another
                       string is a regular expression for the whole name; a collection has names, or
                       their last components, each of which must fit a module
    modules_to_save    names, or their last components, of modules that are trained in full and
                       saved with the adapter (the hybrid of LoRA and full fine-tuning). Nothing
                       inside them is wrapped and NF4 layers inside become dense. As in PEFT, a copy
                       of each is trained, and the weights from before are kept for the other
                       adapters and for `pylora.disable_adapter`. The head of a model for a task,
                       such as classification, is added, as PEFT does, unless it is targeted or the
                       collection is empty
    adapter_name       the adapter to add. The first one of a model is active. Another name adds one
                       beside it, on its own targets and with its own settings; as in PEFT, it is
                       inactive until `pylora.set_active_adapters(model, name)`. A name that the
                       model has extends that adapter to other layers
    the others         as in `pylora.nn.LoRALinear`; merge_aware trains over the weights that
                       `pylora.merge` would write into NF4, which takes more time

    Everything is checked before anything changes. Raises ValueError if no layer is targeted, if a
    target is unsuitable or has this adapter already, or if the model is merged; TypeError or
    ValueError for the arguments that `LoRALinear` refuses.

    Reentrant gradient checkpointing needs inputs that require gradients, as it does over any frozen
    embedding; transformers' `gradient_checkpointing_enable` makes them so.
    Source: LoRA, arXiv:2106.09685.
    """
    root = unwrapped(model)
    refuse_to_change(model, "pylora.add_lora")
    refuse_peft_model(root)
    if hasattr(r, "peft_type"):
        raise TypeError(
            f"r is a {type(r).__name__}; it must be an integer: add_lora takes the fields of "
            "PEFT's configuration as arguments, such as r, lora_alpha and target_modules"
        )
    check_adapter_name(adapter_name)
    if adapter_name in bottleneck_names(root):
        raise ValueError(
            f"adapter_name is {adapter_name!r}; the model has a bottleneck adapter of this name"
        )
    numbers = (r, lora_alpha, lora_dropout)
    settings = LoraSettings(*numbers, use_rslora, use_dora, lora_bias, dtype, merge_aware)
    settings.check()
    target_modules = ALL_LINEAR if target_modules is None else target_modules
    checks.names("target_modules", target_modules)
    checks.names("modules_to_save", () if modules_to_save is None else modules_to_save)
    if isinstance(target_modules, str):
        _check_expression("target_modules", target_modules)
    if modules_to_save is None or len(modules_to_save) > 0:
        modules_to_save = _with_task_heads(root, modules_to_save or (), target_modules)
    saved = find_modules_to_save(root, modules_to_save, adapter_name)
    targets = Targets(target_modules, fully_trained=[site.name for site in saved])
    targeted = _outside_other_adapters(root, targets.find(root), target_modules)
    linear = [site.name for site in sites(root) if can_carry_lora(site.module)]
    if not targeted:
        also = other_linear_classes(sites(root))
        if isinstance(target_modules, str) and target_modules != ALL_LINEAR:
            also = f" (a string is a regular expression for whole names){also}"
        raise not_found("target_modules", target_modules, linear, also)
    if not isinstance(target_modules, str):
        for entry in target_modules:
            if not any(named_by(site.name, (entry,)) for site in sites(root)):
                raise not_found("target_modules", entry, linear)
    by_name = dict.fromkeys((site.name for site in targeted), settings)
    install(root, targeted, by_name, saved, adapter_name)
    return model


def _outside_other_adapters(
    model: nn.Module, targeted: list[Site], target_modules: str | Collection[str]
) -> list[Site]:
    """The targets without those that another adapter trains in full, which "all-linear" skips."""
    if not isinstance(target_modules, str) or target_modules.lower() != ALL_LINEAR:
        return targeted  # `install` refuses what was named outright
    others = all_full_modules(model)
    for site in targeted:
        if is_below(site.name, others):
            logger.warning("%s gets no LoRA: another adapter trains it in full", site.name)
    return [site for site in targeted if not is_below(site.name, others)]


def _with_task_heads(
    model: nn.Module, modules_to_save: str | Collection[str], targets: str | Collection[str]
) -> Collection[str]:
    """`modules_to_save` and the heads that a model for a task must train, if LoRA is not there."""
    entries = (modules_to_save,) if isinstance(modules_to_save, str) else tuple(modules_to_save)
    all_linear = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    targeted = [] if all_linear else [site.name for site in Targets(targets).find(model)]
    for head in task_heads(model):
        if named_by(head, entries) or any(is_below(name, (head,)) for name in targeted):
            continue
        logger.info("%s is trained in full: it is the head of %s", head, type(model).__name__)
        entries += (head,)
    return entries


def _check_expression(name: str, value: str) -> None:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(
            f"{name} is {value!r}; it must be a regular expression: {error}"
        ) from error


def find_modules_to_save(
    model: nn.Module, wanted: str | Collection[str], adapter: str
) -> list[Site]:
    """The outermost sites that `modules_to_save`, or an earlier call for the adapter, names.

    Raises ValueError for an entry that no module matches.
    """
    entries = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    everything = list(sites(model))
    for entry in entries:
        if not any(named_by(site.name, (entry,)) for site in everything):
            raise not_found("modules_to_save", entry, (site.name for site in everything))
    names = {s.name for s in everything if named_by(s.name, entries)} | set(
        fully_trained_modules(model, adapter)
    )
    return [s for s in everything if s.name in names and not is_below(s.name, names - {s.name})]


def install(
    model: nn.Module,
    targeted: list[Site],
    settings: Mapping[str, LoraSettings],
    saved: list[Site],
    adapter: str,
) -> None:
    """Adds an adapter to the targeted layers and saved modules, and freezes the rest.

    settings    the settings of each targeted layer, by name
    adapter     its name; it is active if the model had no adapter, or if it was active before

    Raises ValueError before anything has changed.
    """
    is_active = not adapter_names(model) or adapter == active_lora(model)
    _check_unmerged(model)
    already = [s.name for s in saved if any(isinstance(m, LoRALinear) for m in s.module.modules())]
    if already:
        raise ValueError(
            f"{already[0]} has LoRA layers inside; it must have none to be trained in full"
        )
    _check_full(model, targeted, saved)
    bases = {id(site.module): _base_of(site, adapter) for site in targeted}
    for site in targeted:
        base: Any = bases[id(site.module)]
        if settings[site.name].merge_aware and not is_4bit(getattr(base, "base_layer", base)):
            raise ValueError(
                f"{site.name} is dense; a target must be an NF4Linear with merge_aware: call "
                "pylora.quantize_model first, or leave the layer out of target_modules"
            )
    for site in saved:
        for inner in (site, *sites(site.module)):
            inner.check_replaceable()
    trained = _parameters_already_trained(model)
    for parameter in model.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)
    layers: dict[int, LoRALinear] = {}
    for site in targeted:
        key = id(site.module)
        if isinstance(site.module, LoRALinear):
            if key not in layers:
                site.module.add_adapter(adapter, **vars(settings[site.name]))
                layers[key] = site.module
            continue
        if key not in layers:
            layers[key] = settings[site.name].wrap(bases[key], adapter)
        site.replace(layers[key])
    full = _add_full(saved, adapter)
    for layer in layers.values():
        if is_active:
            layer.set_adapter(adapter)
            set_trainable(layer, LORA_TENSORS, True)
        elif layer.active_adapter == adapter:  # it was wrapped just now
            set_trainable(layer, LORA_TENSORS, False)
            layer.set_adapter(None)
    for module in full if is_active else ():
        use_full(module, adapter)
        train_full(module)
    if not is_active:
        logger.info("%r is inactive until pylora.set_active_adapters(model, name)", adapter)
    explain_refusals()
    lay_out_head_input(model)
    changed(model)


def _check_unmerged(model: nn.Module) -> None:
    for name, layer in lora_layers(model).items():
        if layer.merged:
            raise ValueError(f"{name} is merged; pylora.unmerge must be called first")


def _check_full(model: nn.Module, targeted: list[Site], saved: list[Site]) -> None:
    """Raises ValueError if a module that is trained in full would overlap with another target."""
    full = all_full_modules(model)
    for site in targeted:
        if is_below(site.name, full):
            raise ValueError(
                f"{site.name} must not be a target of LoRA: another adapter trains it in full"
            )
    for site in saved:
        for name in full:
            if name != site.name and (is_below(name, [site.name]) or is_below(site.name, [name])):
                raise ValueError(
                    f"modules_to_save has {site.name!r}, but {name!r} is trained in full already; "
                    "one of them must not be inside the other"
                )


def _base_of(site: Site, adapter: str) -> nn.Module:
    """The layer to wrap; raises ValueError or TypeError that names the module if it cannot be."""
    if isinstance(site.module, LoRALinear):
        if adapter in site.module.adapter_names:
            raise ValueError(
                f"{site.name} is wrapped already and has an adapter {adapter!r}; adapter_name must "
                "be another one to add an adapter beside it, or pylora.delete_adapter(model, "
                f"{adapter!r}) must be called first"
            )
        return site.module
    if not can_carry_lora(site.module):
        class_name = type(site.module).__name__
        raise ValueError(
            f"{site.name} is {class_name}; a target of LoRA must be an nn.Linear, an NF4Linear or "
            "a Conv1D"
        )
    reason = why_not_lora(site)
    if reason is not None:
        raise ValueError(f"{site.name} must not be a target of LoRA: {reason}")
    site.check_replaceable()
    weight: Any = site.module.weight
    if weight.is_inference():
        raise ValueError(
            f"{site.name}.weight was made under torch.inference_mode, so no gradient can pass it; "
            "the model must be loaded outside inference_mode"
        )
    if not is_bitsandbytes_4bit(site.module):
        return site.module
    try:
        return NF4Linear.from_bitsandbytes(site.module)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{site.name}: {error}") from error


def _parameters_already_trained(model: nn.Module) -> set[int]:
    """The ids of the parameters of adapters that are trainable."""
    held = slots(model)
    modules = (*lora_layers(model).values(), *all_full_modules(model).values(), *held.values())
    return {id(p) for module in modules for p in module.parameters() if p.requires_grad}


def _add_full(saved: list[Site], adapter: str) -> list[nn.Module]:
    """Gives the modules that the adapter trains in full tensors of its own; returns new ones."""
    copies: dict[int, Any] = {}
    new = []
    for site in saved:
        if adapter not in full_adapters(site.module):
            module = site.module if full_adapters(site.module) else make_dense(site)
            add_full(module, adapter, copies)
            new.append(module)
    return new
