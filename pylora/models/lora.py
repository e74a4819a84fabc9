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
from pylora.models.changes import changed
from pylora.models.distributed import refuse_to_change
from pylora.models.module_tree import (
    Site,
    fully_trained_modules,
    holders,
    is_4bit,
    is_below,
    is_bitsandbytes_4bit,
    lora_layers,
    mark_fully_trained,
    refuse_peft_model,
    sites,
)
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
from pylora.models.weight_readers import why_not_lora
from pylora.models.wrappers import unwrapped
from pylora.nn import LoRALinear, NF4Linear
from pylora.nn.conv1d import set_dense_weight

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

    def wrap(self, base: nn.Module) -> LoRALinear:
        """A LoRALinear around `base`."""
        return LoRALinear(
            base,
            self.r,
            self.lora_alpha,
            self.lora_dropout,
            self.use_rslora,
            self.use_dora,
            self.lora_bias,
            self.dtype,
        )


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
) -> _Model:
    """Freezes the model, wraps its targets into `pylora.nn.LoRALinear` in place and returns it.

    target_modules     "all-linear" or None for every linear layer but the output head; another
                       string is a regular expression for the whole name; a collection has names, or
                       their last components, each of which must fit a module
    modules_to_save    names, or their last components, of modules that are trained in full and
                       saved with the adapter (the hybrid of LoRA and full fine-tuning). Nothing
                       inside them is wrapped, NF4 layers inside become dense, and a weight that is
                       shared with another module (tied embeddings) is copied. The head of a model
                       for a task, such as classification, is added, as PEFT does, unless it is
                       targeted or the collection is empty
    the others         as in `pylora.nn.LoRALinear`

    It may be called again for other layers. Everything is checked before anything changes. Raises
    ValueError if no layer is targeted, or if a target is unsuitable or wrapped already; TypeError
    or ValueError for the arguments that `LoRALinear` refuses.

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
    settings = LoraSettings(r, lora_alpha, lora_dropout, use_rslora, use_dora, lora_bias, dtype)
    settings.wrap(nn.Linear(1, 1, device="meta"))  # raises for what LoRALinear does not take
    target_modules = ALL_LINEAR if target_modules is None else target_modules
    checks.names("target_modules", target_modules)
    checks.names("modules_to_save", () if modules_to_save is None else modules_to_save)
    if isinstance(target_modules, str):
        _check_expression("target_modules", target_modules)
    if modules_to_save is None or len(modules_to_save) > 0:
        modules_to_save = _with_task_heads(root, modules_to_save or (), target_modules)
    saved = find_modules_to_save(root, modules_to_save)
    targets = Targets(target_modules, fully_trained=[site.name for site in saved])
    targeted = targets.find(root)
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
    install(root, targeted, dict.fromkeys((s.name for s in targeted), settings), saved)
    return model


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


def find_modules_to_save(model: nn.Module, wanted: str | Collection[str]) -> list[Site]:
    """The outermost sites that `modules_to_save` or an earlier call names.

    Raises ValueError for an entry that no module matches.
    """
    entries = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    everything = list(sites(model))
    for entry in entries:
        if not any(named_by(site.name, (entry,)) for site in everything):
            raise not_found("modules_to_save", entry, (site.name for site in everything))
    names = {s.name for s in everything if named_by(s.name, entries)} | set(
        fully_trained_modules(model)
    )
    return [s for s in everything if s.name in names and not is_below(s.name, names - {s.name})]


def install(
    model: nn.Module,
    targeted: list[Site],
    settings: Mapping[str, LoraSettings],
    saved: list[Site],
) -> None:
    """Wraps the targeted layers, makes the saved modules trainable and freezes the rest.

    settings    the settings of each targeted layer, by name

    Raises ValueError before anything has changed.
    """
    already = [s.name for s in saved if any(isinstance(m, LoRALinear) for m in s.module.modules())]
    if already:
        raise ValueError(
            f"{already[0]} has LoRA layers inside; it must have none to be trained in full"
        )
    bases = {id(site.module): _base_of(site) for site in targeted}
    for site in saved:
        for inner in (site, *sites(site.module)):
            inner.check_replaceable()
    trained = _parameters_already_trained(model)
    for parameter in model.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)
    wrapped: dict[int, LoRALinear] = {}
    for site in targeted:
        key = id(site.module)
        if key not in wrapped:
            wrapped[key] = settings[site.name].wrap(bases[key])
        site.replace(wrapped[key])
    _train_in_full(model, saved)
    explain_refusals()
    changed(model)


def _base_of(site: Site) -> nn.Module:
    """The layer to wrap; raises ValueError or TypeError that names the module if it cannot be."""
    if isinstance(site.module, LoRALinear):
        raise ValueError(f"{site.name} is wrapped already; it must be a plain linear layer")
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
    """The ids of the parameters that an earlier `add_lora` left trainable."""
    layers = lora_layers(model).values()
    trained = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    for module in fully_trained_modules(model).values():
        trained += [p for p in module.parameters() if p.requires_grad]
    return set(map(id, trained))


def _train_in_full(model: nn.Module, saved: list[Site]) -> None:
    marked = fully_trained_modules(model)
    new = [_make_dense(site) for site in saved if site.name not in marked]
    names = [site.name for site in saved]
    owners = holders(model)
    copies: dict[int, nn.Parameter] = {}
    for module in new:
        for inner in module.modules():
            for name, parameter in list(inner._parameters.items()):
                if parameter is None:
                    continue
                if not all(is_below(owner, names) for owner in owners.get(id(parameter), ())):
                    if id(parameter) not in copies:
                        copies[id(parameter)] = nn.Parameter(parameter.detach().clone())
                    inner._parameters[name] = parameter = copies[id(parameter)]
                if parameter.is_floating_point():
                    parameter.requires_grad_(True)
        mark_fully_trained(module)


def _make_dense(site: Site) -> nn.Module:
    """Turns the 4-bit layers in a module, or the module itself, into nn.Linear."""
    for inner in list(sites(site.module)):
        if is_4bit(inner.module):
            inner.replace(dense_linear(inner.module))
    if not is_4bit(site.module):
        return site.module
    dense = dense_linear(site.module)
    site.replace(dense)
    return dense


def dense_linear(module: nn.Module) -> nn.Module:
    """An nn.Linear with the weight of a 4-bit layer, or a Conv1D if it was one before.

    The bias is shared.
    """
    layer = module if isinstance(module, NF4Linear) else NF4Linear.from_bitsandbytes(module)
    with torch.device("meta"):
        if layer.conv1d is None:
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
        else:
            linear = layer.conv1d(layer.out_features, layer.in_features)
    set_dense_weight(linear, layer.nf4_weight.dequantize())
    linear.register_parameter("bias", layer.bias)
    return linear
