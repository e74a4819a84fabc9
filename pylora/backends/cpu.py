"""The cpu backend: the C++ kernels of `pylora._C` on CPU tensors."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from pylora import reference
from pylora.backends import cpu_products, extension, limits
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
from pylora.backends.composition import composed
from pylora.backends.cpu_multi_lora import MultiLora
from pylora.backends.dora import dora_planners
from pylora.calls import (
    Bottleneck,
    BottleneckAdapterBackward,
    BottleneckAdapterCall,
    DequantizeCall,
    Layer,
    LayerGradients,
    LoraLinearBackward,
    LoraLinearCall,
    LowRank,
    MultiLoraBackward,
    MultiLoraCall,
    Nf4LinearBackward,
    Nf4LinearCall,
    QuantizeCall,
    token_count,
)
from pylora.reference.dora_linear import Rescaling
from pylora.reference.lora_linear import layer_backward, layer_forward

# The instruction sets with AVX-512, and those of them with products of bf16.
_AVX512 = ("avx512", "avx512_bf16", "amx")
_BF16_PRODUCTS = _AVX512[1:]


def _unavailable() -> Reason:
    return extension.load()[1]


def _instruction_set() -> str:
    """The instruction set that the kernels use, which is also the variant of every plan."""
    module, _ = extension.load()
    return module.cpu_isa() if module is not None else "absent"


def _reason(**tensors: Tensor) -> Reason:
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu":
            return f"{name} is on {tensor.device}, not on the CPU"
        if tensor.dtype not in KERNEL_DTYPES:
            return f"{name} is {tensor.dtype}; the kernels take float32, float16 and bfloat16"
        if tensor.shape[-1:] == (0,):
            return f"{name} has shape {tuple(tensor.shape)}: there is nothing to multiply"
    return None


def _planned(reason: Reason, run: Any, prepare: Any = None, into: Any = None) -> Plan | Refusal:
    if reason is not None:
        return Refusal(reason)
    return Plan(_instruction_set(), run, prepare=prepare, into=into)


def _quantize(call: QuantizeCall) -> Plan | Refusal:
    return _planned(_reason(weight=call.weight), extension.nf4_quantize)


def _dequantize(call: DequantizeCall) -> Plan | Refusal:
    return dequantize_refusal("cpu", call) or Plan(_instruction_set(), extension.nf4_dequantize)


def _planned_by_tokens(plan: Plan | Refusal, x: Tensor, layer: Layer, run: Any) -> Plan | Refusal:
    """`plan`, or that of torch's products where they are faster and take the call.

    run    runs the products
    """
    if isinstance(plan, Refusal) or plan.variant != "amx":
        return plan
    tokens = token_count(x)
    work = tokens * layer.weight.out_features * layer.weight.in_features
    if tokens < limits.CPU_AMX_PRODUCTS_FROM or work < limits.CPU_AMX_PRODUCTS_WORK:
        return plan
    return Plan("amx, panels multiplied in torch", run) if cpu_products.takes(x, layer) else plan


def _nf4_linear(call: Nf4LinearCall) -> Plan | Refusal:
    plan = _planned(_reason(x=call.x), extension.nf4_linear, extension.prepare_nf4_linear)
    return _planned_by_tokens(plan, call.x, call.layer, cpu_products.nf4_linear)


def _nf4_linear_backward(call: Nf4LinearBackward) -> Plan | Refusal:
    plan = _planned(_reason(grad=call.grad), extension.nf4_linear_backward)
    run = cpu_products.nf4_linear_backward
    return _planned_by_tokens(plan, call.grad, Layer(call.weight), run)


def _lora_reason(layer: Layer, **tensors: Tensor) -> Reason:
    return _low_rank_reason(layer, **tensors) if layer.weight.is_nf4 else DENSE


def _low_rank_reason(layer: Layer, **tensors: Tensor) -> Reason:
    low = layer.low_rank
    assert low is not None
    return _rank_reason(low.rank) or _reason(**tensors, lora_A=low.A, lora_B=low.B)


def _rank_reason(rank: int) -> Reason:
    most = extension.hard_limits("cpu")["max_rank"]
    return f"the rank is {rank}; the kernels take up to {most}" if rank > most else None


def _stack_reason(call: MultiLoraCall | MultiLoraBackward) -> Reason:
    """Why the kernels do not take the adapters of a call; None if they do."""
    adapters = call.adapters
    factors = {"lora_A": adapters.A, "lora_B": adapters.B}
    return _rank_reason(adapters.rank) or _reason(x=call.x, **factors)


def _dense_reason(call: LoraLinearCall) -> Reason:
    weight, tokens = call.layer.weight.data, token_count(call.x)
    most = extension.hard_limits("cpu")["max_dense_m"]
    if tokens > most:
        return f"{DENSE}; the kernel takes up to {most} tokens, not {tokens}"
    if not weight.is_contiguous():
        return f"{DENSE}; the kernel takes contiguous weights"
    return None


def _lora_linear(call: LoraLinearCall) -> Plan | Refusal:
    if not call.layer.weight.is_nf4:
        reason = _dense_reason(call) or _low_rank_reason(call.layer, x=call.x)
        prepare = partial(extension.prepare_lora_linear, op="lora_linear_dense")
        if reason is not None:
            low = call.layer.low_rank
            return _dense_dropout_plan(_dense_forward, low, x=call.x) or Refusal(reason)
        return Plan("dense small_m", extension.lora_linear_dense, prepare=prepare)
    reason = _lora_reason(call.layer, x=call.x)
    plan = _planned(reason, extension.lora_linear, extension.prepare_lora_linear)
    return _planned_by_tokens(plan, call.x, call.layer, cpu_products.lora_linear)


def _dense_dropout_plan(run: Any, low: LowRank | None, **tensors: Tensor) -> Plan | None:
    """torch's products around the kernel of dropout; None if there is none, or none that it takes.

    In torch the masks take longer than the products.
    """
    if low is None or low.dropout is None or _reason(**tensors, lora_A=low.A) is not None:
        return None
    return Plan(f"dense in torch, dropout ({_instruction_set()})", run)


@in_python
def _dense_forward(call: LoraLinearCall) -> tuple[Tensor, Tensor]:
    return layer_forward(call.x, call.layer, extension.dropout)


@in_python
def _dense_backward(call: LoraLinearBackward) -> LayerGradients:
    given = (call.grad, call.x, call.h, call.layer, call.wanted)
    return layer_backward(*given, extension.dropout)


def _lora_linear_backward(call: LoraLinearBackward) -> Plan | Refusal:
    if not call.layer.weight.is_nf4:
        tensors, low = {"grad": call.grad, "x": call.x}, call.layer.low_rank
        return _dense_dropout_plan(_dense_backward, low, **tensors) or Refusal(DENSE)
    reason = _lora_reason(call.layer, grad=call.grad, x=call.x)
    plan = _planned(reason, extension.lora_linear_backward)
    return _planned_by_tokens(plan, call.grad, call.layer, cpu_products.lora_linear_backward)


def _adapter_reason(
    call: BottleneckAdapterCall | BottleneckAdapterBackward, **tensors: Tensor
) -> Reason:
    most = extension.hard_limits("cpu")["max_bottleneck"]
    size = call.adapter.size
    if size > most:
        return f"the bottleneck has {size} features; the kernels take up to {most}"
    return _reason(**tensors, down_weight=call.adapter.down)


def _adapter_plan(
    plan: Plan | Refusal, x: Tensor, adapter: Bottleneck, products: Any
) -> Plan | Refusal:
    """`plan`, or that of torch's products where they are faster and take the call.

    products    runs them; it is the op's reference
    """
    # A norm or dropout would need passes over the tokens of its own.
    plain = adapter.dropout is None and adapter.norm_before is None and adapter.norm_after is None
    if isinstance(plan, Refusal) or not plain or adapter.down.dtype != x.dtype:
        return plan
    least = limits.CPU_ADAPTER_PRODUCTS_SIZE[x.dtype.itemsize]
    few_tokens = token_count(x) <= limits.CPU_ADAPTER_PRODUCTS_TO
    faster = few_tokens and adapter.down.numel() >= least
    if x.dtype == torch.float32:
        is_wide = adapter.size >= limits.CPU_ADAPTER_PRODUCTS_FROM
        faster = faster or (is_wide and plan.variant in _AVX512)
    else:
        faster = faster and x.dtype == torch.bfloat16 and plan.variant in _BF16_PRODUCTS
    return Plan(f"{plan.variant}, multiplied in torch", products) if faster else plan


def _bottleneck_adapter(call: BottleneckAdapterCall) -> Plan | Refusal:
    into = extension.bottleneck_adapter_into
    plan = _planned(_adapter_reason(call, x=call.x), extension.bottleneck_adapter, into=into)
    return _adapter_plan(plan, call.x, call.adapter, in_python(reference.bottleneck_adapter))


def _bottleneck_adapter_backward(call: BottleneckAdapterBackward) -> Plan | Refusal:
    reason = _adapter_reason(call, grad=call.grad, x=call.x)
    into = extension.bottleneck_adapter_backward_into
    plan = _planned(reason, extension.bottleneck_adapter_backward, into=into)
    products = in_python(reference.bottleneck_adapter_backward)
    return _adapter_plan(plan, call.x, call.adapter, products)


_PLANNERS: dict[Any, Planner] = {
    QuantizeCall: _quantize,
    DequantizeCall: _dequantize,
    Nf4LinearCall: _nf4_linear,
    Nf4LinearBackward: _nf4_linear_backward,
    LoraLinearCall: _lora_linear,
    LoraLinearBackward: _lora_linear_backward,
    BottleneckAdapterCall: _bottleneck_adapter,
    BottleneckAdapterBackward: _bottleneck_adapter_backward,
}

_MULTI_LORA = MultiLora(_nf4_linear, _nf4_linear_backward, _stack_reason, _instruction_set)
_RESCALING = Rescaling(extension.dora_rescale, extension.dora_rescale_backward)
_DORA = dora_planners(_PLANNERS, _RESCALING, extension.prepare_dora_rescale, _reason)

BACKEND = Backend(
    name="cpu",
    planners=_PLANNERS
    | composed(_PLANNERS)
    | {MultiLoraCall: _MULTI_LORA.forward, MultiLoraBackward: _MULTI_LORA.backward}
    | _DORA,
    unavailable=_unavailable,
    compiled_for=_instruction_set,
    device=lambda: "cpu",
)
