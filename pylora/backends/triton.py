"""The triton backend: the kernels of `pylora.kernels` on CUDA devices, or in Triton's interpreter.

Triton and the kernels are imported when an op first needs them (`triton_runs`). If
TRITON_INTERPRET=1 was set before Triton was imported, the interpreter runs the kernels on CPU
tensors, slowly but with the arithmetic of a GPU.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib import util
from typing import Any

import torch
from torch import Tensor

from pylora.backends import triton_runs
from pylora.backends.backend import (
    DENSE,
    KERNEL_DTYPES,
    Backend,
    Plan,
    Planner,
    Reason,
    Refusal,
    dequantize_refusal,
    in_python,
)
from pylora.backends.dora import dora_planners
from pylora.backends.limits import TRITON_MAX_BOTTLENECK, TRITON_PRODUCT_FROM
from pylora.calls import (
    BottleneckAdapterBackward,
    BottleneckAdapterCall,
    DequantizeCall,
    Layer,
    LoraLinearBackward,
    LoraLinearCall,
    LoraMlpBackward,
    LoraMlpCall,
    LoraQkvBackward,
    LoraQkvCall,
    MultiBottleneckBackward,
    MultiBottleneckCall,
    MultiLoraBackward,
    MultiLoraCall,
    Nf4LinearBackward,
    Nf4LinearCall,
    token_count,
)

TILES, PRODUCT = "fused tiles", "dense product"


@lru_cache(maxsize=1)
def interpreted() -> bool:
    """True if this process runs Triton kernels in the interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@lru_cache(maxsize=1)
def _unavailable() -> Reason:
    if util.find_spec("triton") is None:
        return "the triton package is not installed"
    if interpreted():
        import triton
        import triton.language as tl

        # Triton decorates its own functions when it is imported, so they show what it read then.
        if isinstance(tl.philox, triton.JITFunction):
            return "TRITON_INTERPRET=1 was set after triton was imported"
        return None
    if not torch.cuda.is_available():
        return "no CUDA device, and TRITON_INTERPRET=1 is not set"
    return None


def _why_not_by_default() -> Reason:
    return "Triton's interpreter runs only if it is asked for by name" if interpreted() else None


def _device() -> str:
    return "cpu" if interpreted() else "cuda"


def _compiled_for() -> str:
    if _unavailable() is not None:
        return "absent"
    if interpreted():
        return "interpreter"
    return "sm_" + "".join(map(str, torch.cuda.get_device_capability()))


def _reason(**tensors: Tensor) -> Reason:
    for name, tensor in tensors.items():
        if tensor.device.type != _device():
            return f"{name} is on {tensor.device}, not on a {_device()} device"
        if tensor.dtype not in KERNEL_DTYPES:
            return f"{name} is {tensor.dtype}; the kernels take float32, float16 and bfloat16"
        if 0 in tensor.shape[1:] or tensor.shape[-1:] == (0,):
            return f"{name} has shape {tuple(tensor.shape)}: there is nothing to multiply"
    return None


def _planned(reason: Reason, x: Tensor, run: Any) -> Plan | Refusal:
    """The plan for this many tokens, or a refusal if there is a reason against it.

    x      the input, or the gradient of the output
    run    a function of `triton_runs`
    """
    if reason is not None:
        return Refusal(reason)
    is_large = token_count(x) >= TRITON_PRODUCT_FROM[x.element_size()]
    return Plan(PRODUCT if is_large else TILES, in_python(run))


def _dequantize(call: DequantizeCall) -> Plan | Refusal:
    return dequantize_refusal(_device(), call) or Plan("dequantize", triton_runs.nf4_dequantize)


def _nf4_linear(call: Nf4LinearCall) -> Plan | Refusal:
    return _planned(_reason(x=call.x), call.x, triton_runs.nf4_linear)


def _nf4_linear_backward(call: Nf4LinearBackward) -> Plan | Refusal:
    return _planned(_reason(grad=call.grad), call.grad, triton_runs.nf4_linear_backward)


def _factors(layer: Layer) -> dict[str, Tensor]:
    low = layer.low_rank
    return {} if low is None else {"lora_A": low.A, "lora_B": low.B}


def _lora_linear(call: LoraLinearCall) -> Plan | Refusal:
    reason = _reason(x=call.x, **_factors(call.layer))
    return _planned(reason, call.x, triton_runs.lora_linear)


def _lora_linear_backward(call: LoraLinearBackward) -> Plan | Refusal:
    reason = _reason(grad=call.grad, x=call.x, **_factors(call.layer))
    return _planned(reason, call.grad, triton_runs.lora_linear_backward)


def _layers_reason(x: Tensor, layers: tuple[Layer, ...]) -> Reason:
    if not any(layer.low_rank is not None or layer.weight.is_nf4 for layer in layers):
        return DENSE
    tensors = {"x": x}
    for index, layer in enumerate(layers):
        tensors |= {f"{name}[{index}]": t for name, t in _factors(layer).items()}
    return _reason(**tensors)


def _lora_qkv(call: LoraQkvCall) -> Plan | Refusal:
    return _planned(_layers_reason(call.x, call.layers), call.x, triton_runs.lora_qkv)


def _lora_qkv_backward(call: LoraQkvBackward) -> Plan | Refusal:
    return _planned(_layers_reason(call.x, call.layers), call.x, triton_runs.lora_qkv_backward)


def _lora_mlp(call: LoraMlpCall) -> Plan | Refusal:
    return _planned(_layers_reason(call.x, call.layers), call.x, triton_runs.lora_mlp)


def _lora_mlp_backward(call: LoraMlpBackward) -> Plan | Refusal:
    return _planned(_layers_reason(call.x, call.layers), call.x, triton_runs.lora_mlp_backward)


def _adapters_reason(call: MultiLoraCall | MultiLoraBackward, **tensors: Tensor) -> Reason:
    adapters = call.adapters
    if adapters.count == 0:
        return "lora_A has no adapters"
    return _reason(**tensors, lora_A=adapters.A, lora_B=adapters.B)


def _multi_lora_linear(call: MultiLoraCall) -> Plan | Refusal:
    return _planned(_adapters_reason(call, x=call.x), call.x, triton_runs.multi_lora_linear)


def _multi_lora_linear_backward(call: MultiLoraBackward) -> Plan | Refusal:
    reason = _adapters_reason(call, grad=call.grad, x=call.x)
    return _planned(reason, call.grad, triton_runs.multi_lora_linear_backward)


def _bottleneck_plan(
    call: BottleneckAdapterCall | BottleneckAdapterBackward, run: Any, **tensors: Tensor
) -> Plan | Refusal:
    size, most = call.adapter.size, TRITON_MAX_BOTTLENECK
    reason = _reason(**tensors, x=call.x, down_weight=call.adapter.down)
    if size > most:
        reason = f"the bottleneck has {size} features; the kernels take up to {most}"
    return Plan("one pass", in_python(run)) if reason is None else Refusal(reason)


def _bottleneck_adapter(call: BottleneckAdapterCall) -> Plan | Refusal:
    return _bottleneck_plan(call, triton_runs.bottleneck_adapter)


def _bottleneck_adapter_backward(call: BottleneckAdapterBackward) -> Plan | Refusal:
    return _bottleneck_plan(call, triton_runs.bottleneck_adapter_backward, grad=call.grad)


def _multi_bottleneck_plan(
    call: MultiBottleneckCall | MultiBottleneckBackward, run: Any, **tensors: Tensor
) -> Plan | Refusal:
    first, *_ = call.adapters
    reason = _reason(**tensors, x=call.x, down_weight=first.down)
    return Plan("shrink and expand", in_python(run)) if reason is None else Refusal(reason)


def _multi_bottleneck_adapter(call: MultiBottleneckCall) -> Plan | Refusal:
    return _multi_bottleneck_plan(call, triton_runs.multi_bottleneck_adapter)


def _multi_bottleneck_adapter_backward(call: MultiBottleneckBackward) -> Plan | Refusal:
    run = triton_runs.multi_bottleneck_adapter_backward
    return _multi_bottleneck_plan(call, run, grad=call.grad)


_PLANNERS: dict[Any, Planner] = {
    DequantizeCall: _dequantize,
    Nf4LinearCall: _nf4_linear,
    Nf4LinearBackward: _nf4_linear_backward,
    LoraLinearCall: _lora_linear,
    LoraLinearBackward: _lora_linear_backward,
    LoraQkvCall: _lora_qkv,
    LoraQkvBackward: _lora_qkv_backward,
    LoraMlpCall: _lora_mlp,
    LoraMlpBackward: _lora_mlp_backward,
    MultiLoraCall: _multi_lora_linear,
    MultiLoraBackward: _multi_lora_linear_backward,
    BottleneckAdapterCall: _bottleneck_adapter,
    BottleneckAdapterBackward: _bottleneck_adapter_backward,
    MultiBottleneckCall: _multi_bottleneck_adapter,
    MultiBottleneckBackward: _multi_bottleneck_adapter_backward,
}

BACKEND = Backend(
    name="triton",
    planners=_PLANNERS | dora_planners(_PLANNERS),
    unavailable=_unavailable,
    compiled_for=_compiled_for,
    device=_device,
    why_not_by_default=_why_not_by_default,
)
