"""`accelerate` lets a model's LoRA and 4-bit layers compute through pylora; `restore` undoes it."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from pylora import checks, dispatch, functional
from pylora.integrations.bitsandbytes_layers import Linear4bitSwap, why_not_nf4
from pylora.integrations.peft_layers import PeftLoraSwap
from pylora.integrations.report import LayerReport, Report
from pylora.integrations.swaps import Swap, install, remove
from pylora.models.module_tree import is_bitsandbytes_4bit
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

    model     changed in place; its modules, parameters, names and state dict stay what they are
    fuse      "qkv", "mlp": which neighbours to compute in one op, where a measurement shows a gain;
              none has shown one yet, and the report says so
    strict    raises ValueError if a layer is left as it was; nothing has changed then
    verify    the first `verify` calls of each layer are compared with float64 by the numerics rule;
              AssertionError names the layer that fails

    It takes PEFT's LoRA and DoRA over nn.Linear, Conv1D and Linear4bit (nf4), and plain Linear4bit.
    A call that pylora does not compute (a hook on a part of the layer, per-row adapters) goes
    through PEFT's own forward, over a base that pylora computes; the log
    (`pylora.integrations.swaps`) says why. PEFT's methods work as before: adapters may be added,
    switched, disabled and merged. Call it again after `get_peft_model` to take in the new layers.

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
    for name, module in model.named_modules():
        swap = _swap_for(name, module, verify)
        reason = _why_left(module) if swap is None else swap.why_not(module)
        kind = type(module).__name__
        if swap is not None and reason is None:
            swaps.append((module, swap))
            if isinstance(swap, PeftLoraSwap):
                kind = f"{kind} over {type(module.base_layer).__name__}"
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
    return report


def restore(model: nn.Module) -> None:
    """Gives every module that `accelerate` changed its own forward back."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; it must be an nn.Module")
    for module in model.modules():
        remove(module)


def _peft_classes() -> tuple[type | None, tuple[type, ...]]:
    """PEFT's base class of layers with adapters, and the classes of LoRA over linear layers.

    Both are empty if PEFT has not been imported, because then no model has its layers.
    """
    layer: Any = sys.modules.get("peft.tuners.lora.layer")
    tuners: Any = sys.modules.get("peft.tuners.tuners_utils")
    bnb: Any = sys.modules.get("peft.tuners.lora.bnb")
    over_4bit = getattr(bnb, "Linear4bit", None)
    if layer is None or tuners is None:
        return None, ()
    return tuners.BaseTunerLayer, (layer.Linear, *([over_4bit] if over_4bit else []))


def _swap_for(name: str, module: nn.Module, verify: int) -> Swap | None:
    _, lora = _peft_classes()
    if type(module) in lora:  # a subclass may compute something else
        return PeftLoraSwap(name, verify)
    if type(module).__name__ == "Linear4bit" and is_bitsandbytes_4bit(module):
        return Linear4bitSwap(name, verify)
    return None


def _why_left(module: nn.Module) -> str | None:
    """Why a layer with an adapter or quantized codes is left; None if it is no such layer."""
    tuner, _ = _peft_classes()
    if tuner is not None and isinstance(module, tuner):
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
    if device.type == "meta":
        return "on the meta device"
    names = []
    for tokens in _TOKENS:
        x = torch.empty(tokens, linear_shape(base)[1], dtype=dtype, device=device)
        if base is module:
            call = functional.CALLS["nf4_linear"](x, weight, base.bias)
        else:
            name = next(iter(module.lora_A), None)
            if name is None:
                return "no adapter yet"
            A, B = module.lora_A[name].weight, module.lora_B[name].weight
            call = functional.CALLS["lora_linear"](x, weight, A, B, 1.0, base.bias)
        backend, plan = dispatch.choose(call)
        names.append(f"{backend.name} {plan.variant}" if plan.variant else backend.name)
    return ", ".join(dict.fromkeys(names))


def _notes(fuse: Collection[str], layers: list[LayerReport]) -> tuple[str, ...]:
    if not fuse or not any(layer.swapped for layer in layers):
        return ()
    note = "query, key and value, and gated MLPs, are computed layer by layer: "
    return (f"{note}no measurement has shown a gain of fusing them",)
