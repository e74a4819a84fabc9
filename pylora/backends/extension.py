"""The compiled extension `pylora._C`: loaded once, and its ops called with the fields of a record.

The ops `torch.ops.pylora_C.*` serve both the cpu and the cuda backend: torch picks the device's
kernels by the tensors. A package built without the extension runs all the same.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pylora.backends.backend import in_python
from pylora.calls import (
    DequantizeCall,
    LayerGradients,
    LoraLinearBackward,
    LoraLinearCall,
    LowRank,
    MultiLoraCall,
    Nf4LinearBackward,
    Nf4LinearCall,
    QuantizeCall,
    Weight,
)
from pylora.reference.rows import as_rows


@lru_cache(maxsize=1)
def load() -> tuple[ModuleType | None, str | None]:
    """(the module, None), or (None, why it could not be imported), with one warning."""
    try:
        from pylora import _C
    except ImportError as error:
        reason = f"the compiled extension pylora._C could not be imported: {error}"
        warnings.warn(f"{reason}; pylora runs on its PyTorch reference", stacklevel=2)
        return None, reason
    return _C, None


def _rows(x: Tensor) -> Tensor:
    return as_rows(x).contiguous()


def _c(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _weight(weight: Weight) -> list[Any]:
    return [_c(a) if isinstance(a, Tensor) else a for a in weight.arguments]


def _lora_options(low: LowRank) -> tuple[Any, ...]:
    drop = low.dropout
    dropout = (0.0, None) if drop is None else (drop.p, drop.layer_seed)
    return (low.scaling, *dropout, low.activation)


def nf4_quantize(call: QuantizeCall) -> tuple[Tensor, Tensor]:
    return torch.ops.pylora_C.nf4_quantize(call.weight.contiguous(), call.blocksize)


def nf4_dequantize(call: DequantizeCall) -> Tensor:
    return torch.ops.pylora_C.nf4_dequantize(*_weight(call.weight), list(call.shape), call.dtype)


def _nf4_linear(op: Any, call: Nf4LinearCall) -> Tensor:
    layer, x = call.layer, call.x
    y = op(_rows(x), *_weight(layer.weight), layer.weight.out_features, _c(layer.bias))
    return y.view(*x.shape[:-1], y.shape[-1])


@in_python
def nf4_linear_backward(call: Nf4LinearBackward) -> Tensor:
    grad, weight = call.grad, call.weight
    op = torch.ops.pylora_C.nf4_linear_backward
    dx = op(_rows(grad), *_weight(weight), weight.in_features)
    return dx.view(*grad.shape[:-1], dx.shape[-1])


def _lora_linear(op: Any, call: LoraLinearCall) -> tuple[Tensor, Tensor]:
    x, layer, low = call.x, call.layer, call.layer.low_rank
    assert low is not None
    tensors = map(_c, (low.A, low.B, layer.bias, low.A_bias, low.B_bias))
    base = (_rows(x), *_weight(layer.weight), layer.weight.out_features)
    y, h = op(*base, *tensors, *_lora_options(low))
    return y.view(*x.shape[:-1], y.shape[-1]), h.view(*x.shape[:-1], h.shape[-1])


@in_python
def lora_linear_backward(call: LoraLinearBackward) -> LayerGradients:
    x, low, want = call.x, call.layer.low_rank, call.wanted
    assert low is not None
    mask = [want.x, want.weight, want.A, want.B, want.bias, want.A_bias, want.B_bias]
    rows = (_rows(call.grad), _rows(x), _rows(call.h))
    factors = (_c(low.A), _c(low.B))
    found = torch.ops.pylora_C.lora_linear_backward(
        *rows, *_weight(call.layer.weight), *factors, *_lora_options(low), mask
    )
    gradients = LayerGradients(*(t if w else None for t, w in zip(found, mask, strict=True)))
    if gradients.x is None:
        return gradients
    return gradients.with_x(gradients.x.view(x.shape))


@in_python
def multi_lora_linear(call: MultiLoraCall) -> tuple[Tensor, Tensor]:
    x, layer, adapters = call.x, call.layer, call.adapters
    stacks = map(_c, (adapters.A, adapters.B, adapters.ids, adapters.scalings.float()))
    base = (_rows(x), *_weight(layer.weight), layer.weight.out_features)
    y, h = torch.ops.pylora_C.multi_lora_linear(*base, *stacks, _c(layer.bias))
    return y.view(*x.shape[:-1], y.shape[-1]), h.view(*x.shape[:-1], h.shape[-1])


@in_python
def nf4_linear(call: Nf4LinearCall) -> Tensor:
    return _nf4_linear(torch.ops.pylora_C.nf4_linear, call)


@in_python
def lora_linear(call: LoraLinearCall) -> tuple[Tensor, Tensor]:
    return _lora_linear(torch.ops.pylora_C.lora_linear, call)


@in_python
def nf4_linear_hopper(call: Nf4LinearCall) -> Tensor:
    return _nf4_linear(torch.ops.pylora_C.nf4_linear_hopper, call)


@in_python
def lora_linear_hopper(call: LoraLinearCall) -> tuple[Tensor, Tensor]:
    return _lora_linear(torch.ops.pylora_C.lora_linear_hopper, call)


def nf4_dequantize_into(weight: Weight, out: Tensor) -> None:
    """Fills a matrix [out_features, in_features] whose rows may lie apart."""
    torch.ops.pylora_C.nf4_dequantize_into(*_weight(weight), out)


def lora_extend(x: Tensor, low: LowRank) -> tuple[Tensor, Tensor]:
    """x [M, in_features] -> [x | scaling * act(h)] with padded columns, and h fp32 [M, r]."""
    options = _lora_options(low)
    return torch.ops.pylora_C.lora_extend(_rows(x), _c(low.A), _c(low.A_bias), *options)
