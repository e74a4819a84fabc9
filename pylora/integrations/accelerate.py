"""`accelerate` lets a model's LoRA and 4-bit layers compute through pylora; `restore` undoes it."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from pylora import checks, dispatch, functional
from pylora.integrations import peft_rows
from pylora.integrations.bitsandbytes_layers import why_not_nf4
from pylora.integrations.peft_base import PeftSwap
from pylora.integrations.report import LayerReport, Report
from pylora.integrations.swapped_classes import swap_of
from pylora.integrations.swaps import Swap, install, remove
from pylora.models.head_input import forget_head_input, lay_out_head_input
from pylora.models.module_tree import is_bitsandbytes_4bit
from pylora.models.wrappers import plain_name, unwrapped
from pylora.nf4_weight import NF4Weight
from pylora.nn import LoRALinear, NF4Linear
from pylora.nn.conv1d import dense_weight, linear_shape

_FUSIONS = ("qkv", "mlp")
# The report names the kernels for these numbers of tokens: a decoding step, and a training step.
_TOKENS = (1, 512)


def accelerate(
    model: nn.Module,
    *,
    fuse: Collection[str] = _FUSIONS,
    strict: bool = False,
    verify: int = 0,
) -> Report:
    """Lets the LoRA layers of PEFT and the 4-bit layers of bitsandbytes compute through pylora.

    model     changed in place; its modules, parameters, names and state dict stay what they are. It
              may be wrapped, as by torch.compile or DistributedDataParallel
    fuse      "qkv", "mlp": which neighbours to compute in one op, where a measurement shows a gain;
              none has shown one yet, and the report says so
    strict    raises ValueError if a layer is left as it was; nothing has changed then
    verify    the first `verify` calls of each layer are compared with float64 by the numerics rule;
              AssertionError names the layer that fails

    It takes PEFT's LoRA, DoRA and AdaLoRA over nn.Linear, Conv1D, Linear4bit (nf4) and NF4Linear,
    and plain Linear4bit.

    A call that pylora does not compute (such as one with a hook on a part of the layer) goes
    through PEFT's own forward, over a base that pylora computes; the log
    (`pylora.integrations.swaps`) says why. PEFT's methods work as before: adapters may be added,
    switched, disabled and merged. Call it again after `get_peft_model` to take in the new layers.

    Each row of a batch may have its own adapter (PEFT's `adapter_names`), in training too.

    Returns a Report, which prints as a table.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; it must be an nn.Module")
    checks.names("fuse", fuse)
    wanted = (fuse,) if isinstance(fuse, str) else tuple(fuse)
    unknown = [name for name in wanted if name not in _FUSIONS]
    if unknown:
        raise ValueError(f"fuse has {unknown[0]!r}; it must have only {', '.join(_FUSIONS)}")
    checks.integer("verify", verify, least=0)
    swaps: list[tuple[nn.Module, Swap]] = []
    layers: list[LayerReport] = []
    bases: set[int] = set()  # of layers that are swapped as a whole
    for name_in_wrappers, module in model.named_modules():
        name = plain_name(model, name_in_wrappers)
        swap_class = swap_of(module)
        swap = None if swap_class is None else swap_class(name, verify)
        reason = _why_left(module) if swap is None else swap.why_not(module)
        kind = type(module).__name__
        if swap is not None and reason is None:
            swaps.append((module, swap))
            if isinstance(swap, PeftSwap):
                kind = f"{kind} over {type(module.base_layer).__name__}"
                reason = swap.why_not_adapters(module, module.active_adapters)
            if reason is not None:  # until another adapter of this layer is active
                layers.append(LayerReport(name, kind, False, reason=reason))
                continue
            if isinstance(swap, PeftSwap):
                bases.add(id(module.base_layer))
            if id(module) not in bases:
                layers.append(LayerReport(name, kind, True, _variant(module)))
        elif isinstance(module, (LoRALinear, NF4Linear)):
            if id(module) not in bases:
                layers.append(LayerReport(name, kind, True, "a layer of pylora"))
            if isinstance(module, LoRALinear):
                bases.add(id(module.base_layer))
        elif reason is not None:
            layers.append(LayerReport(name, kind, False, reason=reason))
    report = Report(tuple(layers), _notes(fuse, layers))
    if strict and report.left:
        first = report.left[0]
        raise ValueError(
            f"{len(report.left)} layers cannot compute through pylora, and strict is True; the "
            f"first is {first.name}, because {first.reason}"
        )
    restore(model)
    for module, swap in swaps:
        install(module, swap)
    for module in model.modules():
        peft_rows.allow_training(module)
    lay_out_head_input(unwrapped(model))
    return report


def restore(model: nn.Module) -> None:
    """Gives every module that `accelerate` changed its own forward back."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; it must be an nn.Module")
    for module in model.modules():
        remove(module)
        peft_rows.forbid_training(module)
    forget_head_input(model)


def _why_left(module: nn.Module) -> str | None:
    """Why a layer with an adapter or quantized codes is left; None if it is no such layer."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is not None and isinstance(module, tuners.BaseTunerLayer):
        method = type(module).__module__.split(".")[-2]
        return f"pylora does not compute PEFT's {method}.{type(module).__name__}"
    if is_bitsandbytes_4bit(module):
        return why_not_nf4(module) or "it is a subclass of Linear4bit"
    if type(module).__name__ == "Linear8bitLt":
        return "its weight has 8 bits, and pylora computes with 4-bit NF4"
    return None


def _variant(module: Any) -> str:
    """The backend and variant that this layer's calls would take."""
    base = module.base_layer if hasattr(module, "base_layer") else module
    if isinstance(base, NF4Linear):
        weight: Any = base.nf4_weight
    else:
        nf4 = is_bitsandbytes_4bit(base)
        weight = NF4Weight.from_bitsandbytes(base) if nf4 else dense_weight(base)
    dtype = getattr(base, "compute_dtype", None) or weight.dtype
    device = weight.device
    factors: list[Any] = []
    if base is not module:
        name = next((name for name in module.active_adapters if name in module.lora_A), None)
        if name is None:
            return "no adapter is active"
        held = (module.lora_A[name], module.lora_B[name])  # parameters in AdaLoRA
        factors = [part.weight if isinstance(part, nn.Module) else part for part in held]
    elsewhere = {factor.device for factor in factors} - {device}
    if device.type == "meta" or elsewhere:
        return f"on {', '.join(map(str, (device, *elsewhere)))}"
    names = []
    for tokens in _TOKENS:
        x = torch.empty(tokens, linear_shape(base)[1], dtype=dtype, device=device)
        if base is module:
            call = functional.CALLS["nf4_linear"](x, weight, base.bias)
        else:
            call = functional.CALLS["lora_linear"](x, weight, *factors, 1.0, base.bias)
        backend, plan = dispatch.choose(call)
        names.append(f"{backend.name} {plan.variant}" if plan.variant else backend.name)
    return ", ".join(dict.fromkeys(names))


def _notes(fuse: Collection[str], layers: list[LayerReport]) -> tuple[str, ...]:
    if not fuse or not any(layer.swapped for layer in layers):
        return ()
    note = "query, key and value, and gated MLPs, are computed layer by layer: "
    return (f"{note}no measurement has shown a gain of fusing them",)
