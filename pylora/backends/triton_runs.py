"""Runs of the triton backend: records to the host functions of `pylora.kernels`, which take
matrices.

The kernels are imported when an op first needs them: Triton takes a second to import.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pylora.calls import (
    Adapters,
    DequantizeCall,
    Layer,
    LayerGradients,
    LoraLinearBackward,
    LoraLinearCall,
    LoraMlpBackward,
    LoraMlpCall,
    LoraQkvBackward,
    LoraQkvCall,
    MultiLoraBackward,
    MultiLoraCall,
    Nf4LinearBackward,
    Nf4LinearCall,
    Wanted,
)
from pylora.reference.activation import GATED_ACTIVATIONS
from pylora.reference.multi_lora_linear import check_adapter_ids
from pylora.reference.rows import as_rows


def rows(x: Tensor) -> Tensor:
    """[..., features] as a matrix whose rows may be apart, but not their elements."""
    flat = as_rows(x)
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _like(y: Tensor, x: Tensor) -> Tensor:
    """y [M, features] with the leading dimensions of x; the h of a layer without LoRA stays [0]."""
    return y.view(*x.shape[:-1], y.shape[-1]) if y.dim() == 2 else y


def _h_rows(h: Tensor, layer: Layer) -> Tensor:
    return h if layer.low_rank is None else rows(h)


def nf4_dequantize(call: DequantizeCall) -> Tensor:
    from pylora.kernels.nf4_dequantize import nf4_dequantize

    return nf4_dequantize(call.weight, call.shape, call.dtype)


def nf4_linear(call: Nf4LinearCall) -> Tensor:
    from pylora.kernels.lora_linear import lora_linears

    ((y, _),) = lora_linears(rows(call.x), [call.layer])
    return _like(y, call.x)


def nf4_linear_backward(call: Nf4LinearBackward) -> Tensor:
    from pylora.kernels.lora_linear_backward import base_gradient

    return _like(base_gradient(rows(call.grad), Layer(call.weight)), call.grad)


def lora_linear(call: LoraLinearCall) -> tuple[Tensor, Tensor]:
    from pylora.kernels.lora_linear import lora_linears

    ((y, h),) = lora_linears(rows(call.x), [call.layer])
    return _like(y, call.x), _like(h, call.x)


def lora_linear_backward(call: LoraLinearBackward) -> LayerGradients:
    from pylora.kernels.lora_linear_backward import incoming, lora_linears_backward

    grad, x, wanted = rows(call.grad), rows(call.x), call.wanted
    arriving = incoming(call.layer, grad, wanted.x)
    dx, (found,) = lora_linears_backward([arriving], x, [rows(call.h)], wanted.x, [wanted])
    found = _completed(found, call.layer, wanted, grad, x)
    return found.with_x(None if dx is None else _like(dx, call.x))


def _completed(
    found: LayerGradients, layer: Layer, wanted: Wanted, grad: Tensor, x: Tensor
) -> LayerGradients:
    """The gradients of the kernels, and those that torch computes: of a dense weight and of the
    biases behind the matrix products."""
    low = layer.low_rank
    sums = grad.sum(0, dtype=torch.float32) if wanted.bias or wanted.B_bias else None
    bias = B_bias = None
    if sums is not None and wanted.bias:
        bias = sums.to(grad.dtype if layer.bias is None else layer.bias.dtype)
    if sums is not None and wanted.B_bias and low is not None:
        B_bias = (low.scaling * sums).to(low.A.dtype)
    weight = grad.t() @ x if wanted.weight else None
    return replace(found, weight=weight, bias=bias, B_bias=B_bias)


def lora_qkv(call: LoraQkvCall) -> tuple[list[Tensor], list[Tensor]]:
    from pylora.kernels.lora_linear import lora_linears

    results = lora_linears(rows(call.x), call.layers)
    return [_like(y, call.x) for y, _ in results], [_like(h, call.x) for _, h in results]


def lora_qkv_backward(call: LoraQkvBackward) -> tuple[Tensor | None, list[LayerGradients]]:
    from pylora.kernels.lora_linear_backward import incoming, lora_linears_backward

    wants_x = any(one.x for one in call.wanted)
    x, grads = rows(call.x), list(map(rows, call.grads))
    arriving = [
        incoming(layer, grad, wants_x) for layer, grad in zip(call.layers, grads, strict=True)
    ]
    hs = [_h_rows(h, layer) for h, layer in zip(call.hs, call.layers, strict=True)]
    dx, found = lora_linears_backward(arriving, x, hs, wants_x, call.wanted)
    gradients = [
        _completed(one, layer, wanted, grad, x)
        for one, layer, wanted, grad in zip(found, call.layers, call.wanted, grads, strict=True)
    ]
    return None if dx is None else _like(dx, call.x), gradients


def lora_mlp(call: LoraMlpCall) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    from pylora.kernels.lora_mlp import lora_mlp

    y, gate, up, hs = lora_mlp(rows(call.x), call.layers, call.activation)
    y, gate, up, *hs = (_like(t, call.x) for t in (y, gate, up, *hs))
    return y, gate, up, hs


def lora_mlp_backward(call: LoraMlpBackward) -> tuple[Tensor | None, list[LayerGradients]]:
    from pylora.kernels.lora_mlp import lora_mlp_backward

    *inner_wanted, down_wanted = call.wanted
    wants_x = any(one.x for one in inner_wanted)
    wants_inner = any(one.any for one in inner_wanted)
    grad, x, gate, up = map(rows, (call.grad, call.x, call.gate, call.up))
    hs = [_h_rows(h, layer) for h, layer in zip(call.hs, call.layers, strict=True)]
    dx, inner, found = lora_mlp_backward(
        grad, x, gate, up, hs, call.layers, call.activation, wants_x, wants_inner, call.wanted
    )
    hidden = x
    if down_wanted.weight:
        hidden = GATED_ACTIVATIONS[call.activation].forward(gate) * up
    # Without inner gradients those of gate and up are not wanted, and these are not read.
    grads, inputs = [*(inner or (gate, up)), grad], (x, x, hidden)
    gradients = [
        _completed(*each)
        for each in zip(found, call.layers, call.wanted, grads, inputs, strict=True)
    ]
    return None if dx is None else _like(dx, call.x), gradients


def _ready(adapters: Adapters) -> Adapters:
    """The adapters as the kernels take them; the ids are checked if that waits for no device."""
    check_adapter_ids(adapters.ids, adapters.count)
    return Adapters(
        adapters.A.contiguous(),
        adapters.B.contiguous(),
        adapters.ids.contiguous(),
        adapters.scalings.to(torch.float32).contiguous(),
    )


def multi_lora_linear(call: MultiLoraCall) -> tuple[Tensor, Tensor]:
    from pylora.kernels.multi_lora_linear import multi_lora_linear

    y, h = multi_lora_linear(rows(call.x), call.layer, _ready(call.adapters))
    return _like(y, call.x), _like(h, call.x)


def multi_lora_linear_backward(call: MultiLoraBackward) -> LayerGradients:
    from pylora.kernels.multi_lora_linear_backward import multi_lora_linear_backward

    grad, x, h = rows(call.grad), rows(call.x), rows(call.h).contiguous()
    found = multi_lora_linear_backward(grad, x, h, call.layer, _ready(call.adapters), call.wanted)
    found = _completed(found, call.layer, call.wanted, grad, x)
    return found.with_x(None if found.x is None else _like(found.x, call.x))
