"""The cuda backend: the C++ kernels of `pylora._C` for NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from pylora.backends import cuda_hopper, cuda_many_rows, cuda_products, extension, limits
from pylora.backends.backend import (
    DENSE,
    KERNEL_DTYPES,
    Backend,
    Plan,
    Planner,
    PreparedForward,
    Reason,
    Refusal,
    dequantize_refusal,
)
from pylora.backends.composition import composed
from pylora.backends.dora import dora_planners
from pylora.calls import (
    Adapters,
    DequantizeCall,
    Layer,
    LoraLinearBackward,
    LoraLinearCall,
    LoraMlpBackward,
    LoraMlpCall,
    LoraQkvBackward,
    LoraQkvCall,
    LowRank,
    MultiLoraCall,
    Nf4LinearBackward,
    Nf4LinearCall,
    QuantizeCall,
    Weight,
    token_count,
)
from pylora.reference.lora_linear import native

SMALL_M, MANY_ROWS, HOPPER = "small_m", "many_rows", "hopper"


@lru_cache(maxsize=1)
def _unavailable() -> Reason:
    module, reason = extension.load()
    if module is None:
        return reason
    if not module.build_info()["cuda"]:
        return "pylora._C was built without the GPU kernels: PYLORA_CUDA_ARCHS asks for them"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return None


def _compiled_archs() -> str:
    module, _ = extension.load()
    archs = module.build_info()["cuda_archs"] if module is not None else []
    return ", ".join(archs) or "absent"


def _hard_limit(name: str) -> int:
    return extension.hard_limits("cuda")[name]


def _not_on_cuda(**tensors: Tensor | None) -> Reason:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_cuda:
            return f"{name} is on {tensor.device}, not on a cuda device"
    return None


@lru_cache
def _has_matrix_instructions(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _is_aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % _hard_limit("alignment") == 0


def _quantize(call: QuantizeCall) -> Plan | Refusal:
    if call.weight.dtype not in KERNEL_DTYPES:
        kernels = "the kernels take float32, float16 and bfloat16"
        return Refusal(f"weight is {call.weight.dtype}; {kernels}")
    reason = _not_on_cuda(weight=call.weight)
    return Plan("quantize", extension.nf4_quantize) if reason is None else Refusal(reason)


def _dequantize(call: DequantizeCall) -> Plan | Refusal:
    return dequantize_refusal("cuda", call) or Plan("dequantize", extension.nf4_dequantize)


def _any_kernel_reason(name: str, x: Tensor, weight: Weight, bias: Tensor | None) -> Reason:
    """Why no linear kernel of this backend takes x over this weight; None if one may.

    name    the argument that x is, "x" or "grad"
    """
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"{name} is {x.dtype}; the kernel takes float16 and bfloat16"
    if 0 in weight.shape:
        return "the weight has no elements"
    tensors = {name: x, "qweight": weight.data, "absmax": weight.absmax, "bias": bias}
    reason = _not_on_cuda(**tensors)
    if reason is None and not _has_matrix_instructions(x.device):
        return "the kernel needs a GPU of compute capability 8.0 or later"
    return reason


def _decoder_reason(weight: Weight) -> Reason:
    """Why no kernel that decodes the weight while it multiplies takes it; None if one may."""
    nested = weight.nested_blocksize
    if weight.nested_absmax is not None and nested & (nested - 1):
        return f"nested_blocksize is {nested}, no power of two"
    out_features, in_features = weight.shape
    if in_features * out_features >= _hard_limit("max_elements"):
        return f"the weight has 2^35 elements or more: {out_features} x {in_features}"
    if not _is_aligned(weight.data):
        return f"qweight is not aligned to {_hard_limit('alignment')} bytes"
    return None


def _small_m_reason(name: str, x: Tensor, weight: Weight) -> Reason:
    """Why the small_m kernel does not take x over this weight; None if it does.

    name    the argument that x is, "x" or "grad"
    """
    reason = _decoder_reason(weight)
    if reason is not None:
        return reason
    if not weight.rows_hold_whole_blocks:
        return (
            f"in_features is {weight.in_features}, no multiple of the blocksize {weight.blocksize}"
        )
    tokens = token_count(x)
    most_of_block_32 = _hard_limit("max_small_m_of_block_32")
    most_tokens = min(limits.CUDA_SMALL_M, _hard_limit("max_small_m"))
    if weight.blocksize == 32 and tokens > most_of_block_32:
        most = f"{most_of_block_32} if the blocksize is 32"
    elif tokens > most_tokens:
        most = f"{most_tokens}"
    else:
        return None
    return f"{name} has {tokens} tokens; the small_m kernel takes up to {most}"


def _low_rank_reason(x: Tensor, A: Tensor, rank: int, **tensors: Tensor | None) -> Reason:
    """Why no kernel of this backend takes the tensors of an adapter; None if one may."""
    if A.dtype not in (x.dtype, torch.float32):
        return f"lora_A is {A.dtype}; the kernel takes {x.dtype}, as x has, and float32"
    most = _hard_limit("max_rank")
    if not 1 <= rank <= most:
        return f"the rank is {rank}; the kernel takes 1 to {most}"
    return _not_on_cuda(lora_A=A, **tensors)


def _lora_reason(x: Tensor, low: LowRank | None) -> Reason:
    if low is None:
        return None
    biases = {"lora_A_bias": low.A_bias, "lora_B_bias": low.B_bias}
    return _low_rank_reason(x, low.A, low.rank, lora_B=low.B, **biases)


def _linear(call: Nf4LinearCall | LoraLinearCall) -> Plan | Refusal:
    """Chooses small_m, hopper or many_rows by tokens, and by what they can run.

    The refusal gives the reason of the last kernel that was asked.
    """
    x, layer, low = call.x, call.layer, call.layer.low_rank
    weight, tokens, op = layer.weight, token_count(call.x), call.op
    if not weight.is_nf4:
        return Refusal(DENSE)
    reason = _any_kernel_reason("x", x, weight, layer.bias) or _lora_reason(x, low)
    if reason is not None:
        return Refusal(reason)
    hopper = cuda_hopper.reason(x, tokens, weight) or _decoder_reason(weight)
    product = None
    if low is not None and tokens >= limits.CUDA_MANY_ROWS_FROM:
        product = cuda_many_rows.lora_reason(x, tokens, low)
    if hopper is None and (tokens < limits.CUDA_HOPPER_TO or product is not None):
        hopper_op = f"{op}_hopper"
        return Plan(HOPPER, getattr(extension, hopper_op), prepare=_prepare(op, hopper_op))
    hopper = hopper or f"from {limits.CUDA_HOPPER_TO} tokens on the dense product is faster"
    note = f"not the hopper kernel: {hopper}" if tokens >= limits.CUDA_HOPPER_FROM else ""
    if tokens >= limits.CUDA_MANY_ROWS_FROM:
        if product is None:
            return Plan(MANY_ROWS, getattr(cuda_many_rows, op), note)
        return Refusal(f"{product}; {note}")
    reason = _small_m_reason("x", x, weight)
    if reason is None:
        return Plan(SMALL_M, getattr(extension, op), prepare=_prepare(op, op))
    return Refusal(f"{reason}; {note}" if note else reason)


@lru_cache
def _prepare(op: str, variant: str) -> Callable[[Any], PreparedForward]:
    prepare = getattr(extension, f"prepare_{op}")
    return partial(prepare, op=variant, alignment=_hard_limit("alignment"))


def _nf4_linear_backward(call: Nf4LinearBackward) -> Plan | Refusal:
    grad, weight = call.grad, call.weight
    reason = _any_kernel_reason("grad", grad, weight, None)
    if reason is None and token_count(grad) >= limits.CUDA_BACKWARD_PRODUCT_FROM:
        return Plan(MANY_ROWS, cuda_many_rows.nf4_linear_backward)
    if reason is None and weight.blocksize == 32:
        reason = "the blocksize is 32; the kernel takes 64 or more"
    reason = reason or _small_m_reason("grad", grad, weight)
    return Plan(SMALL_M, extension.nf4_linear_backward) if reason is None else Refusal(reason)


def _products_reason(name: str, x: Tensor, layer: Layer, low: LowRank) -> Reason:
    """Why products of torch do not run a layer with LoRA; None if they may.

    name    the argument that x is, "x" or "grad"
    """
    reason = _any_kernel_reason(name, x, layer.weight, layer.bias) or _lora_reason(x, low)
    return reason or cuda_products.reason(name, x, low)


def _lora_linear(call: LoraLinearCall) -> Plan | Refusal:
    layer, low = call.layer, call.layer.low_rank
    assert low is not None
    if layer.weight.is_nf4:
        return _linear(call)
    reason = _products_reason("x", call.x, layer, low)
    if reason is not None:
        return Refusal(reason)
    return Plan("products", cuda_products.lora_linear, native=native(call))


def _lora_linear_backward(call: LoraLinearBackward) -> Plan | Refusal:
    grad, layer, low = call.grad, call.layer, call.layer.low_rank
    assert low is not None
    reason = _products_reason("grad", grad, layer, low)
    if reason is not None:
        return Refusal(reason)
    if not call.wanted.x or not layer.weight.is_nf4:
        dense = cuda_products.DENSE_BACKWARD if call.wanted.x else None
        return Plan("products", cuda_products.lora_linear_backward(dense))
    base = _nf4_linear_backward(Nf4LinearBackward(grad, layer.weight))
    if isinstance(base, Refusal):
        return base
    run = cuda_products.lora_linear_backward(base)
    return Plan(f"products around {base.variant}", run, base.note)


def _multi_lora_linear(call: MultiLoraCall) -> Plan | Refusal:
    x, weight, adapters = call.x, call.layer.weight, call.adapters
    if not weight.is_nf4:
        return Refusal(DENSE)
    reason = (
        _any_kernel_reason("x", x, weight, call.layer.bias)
        or _small_m_reason("x", x, weight)
        or _adapters_reason(x, adapters)
    )
    return Plan(SMALL_M, extension.multi_lora_linear) if reason is None else Refusal(reason)


def _adapters_reason(x: Tensor, adapters: Adapters) -> Reason:
    others = {"adapter_ids": adapters.ids, "scalings": adapters.scalings}
    return _low_rank_reason(x, adapters.A, adapters.rank, lora_B=adapters.B, **others)


_PLANNERS: dict[Any, Planner] = {
    QuantizeCall: _quantize,
    DequantizeCall: _dequantize,
    Nf4LinearCall: _linear,
    Nf4LinearBackward: _nf4_linear_backward,
    LoraLinearCall: _lora_linear,
    LoraLinearBackward: _lora_linear_backward,
    MultiLoraCall: _multi_lora_linear,
}


def _lora_qkv(composed_qkv: Planner, call: LoraQkvCall) -> Plan | Refusal:
    if not all(layer.weight.is_nf4 for layer in call.layers):
        return Refusal(f"of one projection {DENSE}")
    plan = composed_qkv(call)
    if isinstance(plan, Plan) and MANY_ROWS in plan.variant:
        return Refusal(f"x has {token_count(call.x)} tokens, and would be copied per projection")
    return plan


_COMPOSED = composed(_PLANNERS)

BACKEND = Backend(
    name="cuda",
    planners=_PLANNERS
    | {record: _COMPOSED[record] for record in (LoraQkvBackward, LoraMlpCall, LoraMlpBackward)}
    | dora_planners(_PLANNERS)
    | {LoraQkvCall: partial(_lora_qkv, _COMPOSED[LoraQkvCall])},
    unavailable=_unavailable,
    compiled_for=_compiled_archs,
    device=lambda: "cuda",
)
