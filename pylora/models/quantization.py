"""`quantize_model` replaces the linear layers of a model by NF4 layers in place, one at a time."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from pylora import checks
from pylora.models.changes import changed
from pylora.models.distributed import refuse_to_change
from pylora.models.head_input import lay_out_head_input
from pylora.models.module_tree import (
    Site,
    holders,
    is_below,
    is_bitsandbytes_4bit,
    lora_layers,
    refuse_peft_model,
    sites,
)
from pylora.models.slots import slots
from pylora.models.targets import (
    can_carry_lora,
    named_by,
    other_linear_classes,
    output_head,
    task_heads,
)
from pylora.models.torch_refusals import explain_refusals
from pylora.models.trained_in_full import all_full_modules
from pylora.models.weight_readers import why_not_nf4
from pylora.models.wrappers import inside, plain_name, unwrapped
from pylora.nf4 import DEFAULT_BLOCKSIZE, check_blocksize
from pylora.nn import NF4Linear
from pylora.nn.conv1d import is_conv1d

logger = logging.getLogger(__name__)

# A progress bar appears only if the work takes longer than this many seconds.
_PROGRESS_DELAY = 2.0
_Model = TypeVar("_Model", bound=nn.Module)
_Place = tuple[str, nn.Module | None, str]


@torch.inference_mode(False)  # gradients must pass the layers later
def quantize_model(
    model: _Model,
    skip_modules: str | Collection[str] = ("lm_head",),
    blocksize: int = DEFAULT_BLOCKSIZE,
    double_quant: bool = False,
) -> _Model:
    """Replaces every nn.Linear and Conv1D by an NF4Linear, in place, and returns the model.

    skip_modules               names, or their last components, of modules to leave as they are,
                               with everything inside them; "lm_head" stands for the output head,
                               whatever the model calls it
    blocksize, double_quant    as in `pylora.quantize_nf4`

    One layer is quantized at a time, so memory never holds more than the dense model and one
    quantized layer. bitsandbytes' Linear4bit (nf4) layers keep their bytes. Some layers stay dense:
    those that share their weight with a module that stays dense (an output head tied to the
    embeddings), subclasses of nn.Linear, the head of a model for a task such as classification,
    layers that the model declares as float32-only, and layers whose weight other code reads. The
    log (`pylora.models.quantization`) says which.

    Raises ValueError or TypeError that names the module if a layer cannot be quantized; all layers
    are checked before the model changes.
    Source: QLoRA, arXiv:2305.14314.
    """
    root = unwrapped(model)
    refuse_to_change(model, "pylora.quantize_model")
    explain_refusals()
    check_blocksize(blocksize)
    checks.names("skip_modules", skip_modules)
    refuse_peft_model(root)
    if isinstance(root, nn.Linear):
        raise ValueError("model is an nn.Linear itself; use pylora.nn.NF4Linear.from_linear")
    if lora_layers(root) or all_full_modules(root):
        raise ValueError("model has LoRA layers; it must be quantized before pylora.add_lora")
    if slots(root):
        raise ValueError(
            "model has bottleneck adapters; it must be quantized before pylora.add_adapter"
        )
    skip = (skip_modules,) if isinstance(skip_modules, str) else tuple(skip_modules)
    layers = _places(_checked(_choose(root, skip)))
    before = _nbytes(root)
    for modules in _with_progress(layers):
        shared: NF4Linear | None = None
        for places in modules.values():
            shared = _quantize_layer(places, shared, blocksize, double_quant)
    lay_out_head_input(root)
    changed(root)
    logger.info(
        "quantized %d layers to NF4: %.1f MB of parameters became %.1f MB",
        sum(map(len, layers)),
        before / 1e6,
        _nbytes(root) / 1e6,
    )
    return model


def _places(chosen: list[Site]) -> list[dict[int, list[_Place]]]:
    """The places of each layer, in one dict for the layers that share a weight.

    These are places and not modules, because a list of modules would keep every dense weight alive
    to the end.
    """
    groups: dict[int, dict[int, list[_Place]]] = {}
    for site in chosen:
        layers = groups.setdefault(id(site.module.weight), {})
        layers.setdefault(id(site.module), []).append((site.name, site.parent, site.attribute))
    return list(groups.values())


def _choose(model: nn.Module, skip: tuple[str, ...]) -> list[Site]:
    """The layers to quantize; the log says which linear layers are left, and why."""
    kept_in_fp32, heads = _kept_in_fp32(model), task_heads(model)
    # The default, lm_head, stands for the output head, whatever the model calls it.
    head = output_head(model) if "lm_head" in skip else None
    everything = list(sites(model))
    for entry in skip:
        if not any(named_by(site.name, (entry,)) for site in everything):
            logger.info("skip_modules: no module is named %s", entry)
    candidates = []
    for site in everything:
        if not isinstance(site.module, nn.Linear) and not is_conv1d(site.module):
            continue
        if _is_inside(site.name, skip):
            logger.info("%s stays dense: it is in skip_modules", site.name)
        elif is_below(site.name, heads) or site.module is head:
            logger.info("%s stays dense: it is the model's head", site.name)
        elif site.name in kept_in_fp32:
            logger.info("%s stays dense: the model declares it as float32-only", site.name)
        elif (reason := why_not_nf4(site)) is not None:
            logger.warning("%s stays dense: %s", site.name, reason)
        elif can_carry_lora(site.module):
            candidates.append(site)
        else:
            class_name = type(site.module).__name__
            logger.warning("%s stays dense: %s is a subclass of nn.Linear", site.name, class_name)
    chosen = _without_shared(model, candidates)
    if not chosen and not any(isinstance(site.module, NF4Linear) for site in everything):
        raise ValueError(
            f"model has no layer to quantize outside skip_modules = {skip!r}; it must have an "
            "nn.Linear or a Conv1D that shares its weight with no other kind of module"
            f"{other_linear_classes(everything)}"
        )
    _mention_fused_experts(everything)
    return chosen


def _kept_in_fp32(model: nn.Module) -> set[str]:
    """The modules that the model, or a transformers model inside it, declares as float32-only."""
    names = set()
    for outer, module in model.named_modules():
        entries = set(getattr(module, "_keep_in_fp32_modules", None) or ())
        entries |= set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
        if entries:
            prefix = f"{plain_name(model, outer)}." if outer else ""
            names |= {prefix + s.name for s in sites(module) if _is_inside(s.name, entries)}
    return names


def _is_inside(name: str, entries: Collection[str]) -> bool:
    """True if an entry names the module or one that contains it."""
    parts = name.split(".")
    return any(named_by(".".join(parts[:end]), entries) for end in range(1, len(parts) + 1))


def _without_shared(model: nn.Module, candidates: list[Site]) -> list[Site]:
    """The candidates whose weight is used by no module that stays dense."""
    owners = holders(model)
    names = {site.name for site in candidates}
    chosen = []
    for site in candidates:
        others = [o for o in owners[id(site.module.weight)] if o not in names]
        if others:
            logger.warning(
                "%s stays dense: it shares its weight with %s", site.name, next(iter(others))
            )
        else:
            chosen.append(site)
    return chosen


def _mention_fused_experts(everything: list[Site]) -> None:
    for site in everything:
        for name, parameter in site.module.named_parameters(recurse=False):
            if parameter.dim() == 3 and "expert" in site.name:
                shape = tuple(parameter.shape)
                logger.warning("%s.%s %s stays dense: it is no nn.Linear", site.name, name, shape)


def _checked(chosen: list[Site]) -> list[Site]:
    """The same list; raises what quantizing any of its layers would raise."""
    for site in chosen:
        site.check_replaceable()
        if is_bitsandbytes_4bit(site.module):
            try:
                NF4Linear.from_bitsandbytes(site.module)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{site.name}: {error}") from error
        else:
            weight: Any = site.module.weight
            checks.quantizable(f"{site.name}.weight", weight)
            checks.finite(f"{site.name}.weight", weight)
    return chosen


def _quantize_layer(
    places: list[_Place], shared: NF4Linear | None, blocksize: int, double_quant: bool
) -> NF4Linear:
    """Replaces one layer in all its places.

    shared    the new layer of one that had the same parameter as its weight, if there is one
    """
    name, parent, attribute = places[0]
    old: Any = inside(getattr(parent, attribute))
    if is_bitsandbytes_4bit(old):
        new = NF4Linear.from_bitsandbytes(old)
    else:
        new = NF4Linear.from_linear(old, blocksize, double_quant)
    if shared is not None:
        new.share_weight(shared)
    for name, parent, attribute in places:
        Site(name, old, parent, attribute).replace(new)
    return new


def _with_progress(layers: list[Any]) -> Iterable[Any]:
    """The same list; with tqdm installed, it shows a bar on a terminal if the work is long."""
    try:
        from tqdm import tqdm
    except ImportError:
        return layers
    return tqdm(layers, "NF4", delay=_PROGRESS_DELAY, leave=False, disable=None)


def _nbytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
