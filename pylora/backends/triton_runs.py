"""The runs of the triton backend: each passes a record to the host functions of `pylora.kernels`.

Those functions take matrices. The kernels are imported when an op first needs them, because Triton
takes a second to import.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pylora.calls import (
    Adapters,
    BottleneckAdapterBackward,
    BottleneckAdapterCall,
    BottleneckGradients,
    DequantizeCall,
    Layer,
    LayerGradients,
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
    Wanted,
    token_matrix,
)
from pylora.reference.activation import GATED_ACTIVATIONS
from pylora.reference.adapter_groups import check_adapter_ids


def _matrix(x: Tensor) -> Tensor:
    """[..., features] as [tokens, features], whose rows may lie apart but not their elements."""
    matrix = token_matrix(x)
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def _h_matrix(h: Tensor, layer: Layer) -> Tensor:
    return h if layer.low_rank is None else _matrix(h)


def _shaped_like(y: Tensor, x: Tensor) -> Tensor:
    """y [tokens, features] with the leading dimensions of x; an empty h [0] stays as it is."""
    return y.view(*x.shape[:-1], y.shape[-1]) if y.dim() == 2 else y


def nf4_dequantize(call: DequantizeCall) -> Tensor:
    from pylora.kernels.nf4_dequantize import nf4_dequantize

    return nf4_dequantize(call.weight, call.shape, call.dtype)


def nf4_linear(call: Nf4LinearCall) -> Tensor:
    from pylora.kernels.nf4_linear import nf4_linear

    return _shaped_like(nf4_linear(_matrix(call.x), call.layer), call.x)


def nf4_linear_backward(call: Nf4LinearBackward) -> Tensor:
    from pylora.kernels.nf4_linear import nf4_linear_backward

    return _shaped_like(nf4_linear_backward(_matrix(call.grad), call.weight), call.grad)


def lora_linear(call: LoraLinearCall) -> tuple[Tensor, Tensor]:
    from pylora.kernels.lora_linear import lora_linear

    y, h = lora_linear(_matrix(call.x), call.layer)
    return _shaped_like(y, call.x), _shaped_like(h, call.x)


def lora_linear_backward(call: LoraLinearBackward) -> LayerGradients:
    from pylora.kernels.lora_linear_backward import lora_linear_backward

    grad, x, wanted = _matrix(call.grad), _matrix(call.x), call.wanted
    gradients = lora_linear_backward(grad, x, _matrix(call.h), call.layer, wanted)
    gradients = _completed(gradients, call.layer, wanted, grad, x)
    return gradients.with_x(None if gradients.x is None else _shaped_like(gradients.x, call.x))


def _completed(
    gradients: LayerGradients, layer: Layer, wanted: Wanted, grad: Tensor, x: Tensor
) -> LayerGradients:
    """The gradients that the kernels computed, and those that torch computes here.

    torch computes the gradients of a dense weight, of the bias and of the bias behind lora_B.
    """
    low = layer.low_rank
    sums = grad.sum(0, dtype=torch.float32) if wanted.bias or wanted.B_bias else None
    bias = B_bias = None
    if sums is not None and wanted.bias:
        bias = sums.to(grad.dtype if layer.bias is None else layer.bias.dtype)
    if sums is not None and wanted.B_bias and low is not None:
        B_bias = (low.scaling * sums).to(low.A.dtype)
    weight = grad.t() @ x if wanted.weight else None
    return replace(gradients, weight=weight, bias=bias, B_bias=B_bias)


def lora_qkv(call: LoraQkvCall) -> tuple[list[Tensor], list[Tensor]]:
    from pylora.kernels.lora_qkv import lora_qkv

    results = lora_qkv(_matrix(call.x), call.layers)
    ys, hs = [y for y, _ in results], [h for _, h in results]
    return [_shaped_like(y, call.x) for y in ys], [_shaped_like(h, call.x) for h in hs]


def lora_qkv_backward(call: LoraQkvBackward) -> tuple[Tensor | None, list[LayerGradients]]:
    from pylora.kernels.lora_qkv import lora_qkv_backward

    x, grads = _matrix(call.x), list(map(_matrix, call.grads))
    hs = [_h_matrix(h, layer) for h, layer in zip(call.hs, call.layers, strict=True)]
    dx, of_kernels = lora_qkv_backward(grads, x, hs, call.layers, call.wanted)
    gradients = [
        _completed(layer_gradients, layer, wanted, grad, x)
        for layer_gradients, layer, wanted, grad in zip(
            of_kernels, call.layers, call.wanted, grads, strict=True
        )
    ]
    return None if dx is None else _shaped_like(dx, call.x), gradients


def lora_mlp(call: LoraMlpCall) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    from pylora.kernels.lora_mlp import lora_mlp

    y, gate, up, hs = lora_mlp(_matrix(call.x), call.layers, call.activation)
    y, gate, up, *hs = (_shaped_like(t, call.x) for t in (y, gate, up, *hs))
    return y, gate, up, hs


def lora_mlp_backward(call: LoraMlpBackward) -> tuple[Tensor | None, list[LayerGradients]]:
    from pylora.kernels.lora_mlp import lora_mlp_backward

    *inner_wanted, down_wanted = call.wanted
    wants_x = any(wanted.x for wanted in inner_wanted)
    wants_inner = any(wanted.any for wanted in inner_wanted)
    grad, x, gate, up = map(_matrix, (call.grad, call.x, call.gate, call.up))
    hs = [_h_matrix(h, layer) for h, layer in zip(call.hs, call.layers, strict=True)]
    dx, inner, of_kernels = lora_mlp_backward(
        grad, x, gate, up, hs, call.layers, call.activation, wants_x, wants_inner, call.wanted
    )
    hidden = x
    if down_wanted.weight:
        hidden = GATED_ACTIVATIONS[call.activation].forward(gate) * up
    # If dgate and dup were not computed, gate and up want no gradient, and their stand-ins here are
    # not read.
    grads, inputs = [*(inner or (gate, up)), grad], (x, x, hidden)
    gradients = [
        _completed(*layer_arguments)
        for layer_arguments in zip(of_kernels, call.layers, call.wanted, grads, inputs, strict=True)
    ]
    return None if dx is None else _shaped_like(dx, call.x), gradients


def _for_kernels(adapters: Adapters) -> Adapters:
    """The adapters in the form that the kernels take: contiguous, with scalings in fp32.

    Raises ValueError for an id out of range, unless checking would wait for the device.
    """
    check_adapter_ids(adapters.ids, adapters.count)
    return Adapters(
        adapters.A.contiguous(),
        adapters.B.contiguous(),
        adapters.ids.contiguous(),
        adapters.scalings.to(torch.float32).contiguous(),
    )


def multi_lora_linear(call: MultiLoraCall) -> tuple[Tensor, Tensor]:
    from pylora.kernels.multi_lora_linear import multi_lora_linear

    y, h = multi_lora_linear(_matrix(call.x), call.layer, _for_kernels(call.adapters))
    return _shaped_like(y, call.x), _shaped_like(h, call.x)


def multi_lora_linear_backward(call: MultiLoraBackward) -> LayerGradients:
    from pylora.kernels.multi_lora_linear_backward import multi_lora_linear_backward

    grad, x, h = _matrix(call.grad), _matrix(call.x), _matrix(call.h).contiguous()
    adapters = _for_kernels(call.adapters)
    gradients = multi_lora_linear_backward(grad, x, h, call.layer, adapters, call.wanted)
    gradients = _completed(gradients, call.layer, call.wanted, grad, x)
    return gradients.with_x(None if gradients.x is None else _shaped_like(gradients.x, call.x))


def multi_bottleneck_adapter(call: MultiBottleneckCall) -> Tensor:
    from pylora.kernels.multi_bottleneck_adapter import multi_bottleneck_adapter

    check_adapter_ids(call.ids, len(call.adapters))
    x = _matrix(call.x)
    residual = x if call.adds_x else None
    if call.residual is not None:
        residual = _matrix(call.residual)
    y = multi_bottleneck_adapter(x, residual, call.adapters, call.ids.contiguous())
    return _shaped_like(y, call.x)


def multi_bottleneck_adapter_backward(
    call: MultiBottleneckBackward,
) -> tuple[Tensor | None, list[BottleneckGradients]]:
    from pylora.kernels.multi_bottleneck_adapter import multi_bottleneck_adapter_backward

    grad, x, ids = _matrix(call.grad), _matrix(call.x), call.ids.contiguous()
    dx, gradients = multi_bottleneck_adapter_backward(
        grad, x, call.adds_x, call.adapters, ids, call.wanted
    )
    return None if dx is None else _shaped_like(dx, call.x), gradients


def bottleneck_adapter(call: BottleneckAdapterCall) -> Tensor:
    from pylora.kernels.bottleneck_adapter import bottleneck_adapter

    x = _matrix(call.x)
    residual = x if call.adds_x else None
    if call.residual is not None:
        residual = _matrix(call.residual)
    return _shaped_like(bottleneck_adapter(x, residual, call.adapter), call.x)


def bottleneck_adapter_backward(call: BottleneckAdapterBackward) -> BottleneckGradients:
    from pylora.kernels.bottleneck_adapter_backward import bottleneck_adapter_backward

    grad, x = _matrix(call.grad), _matrix(call.x)
    of = bottleneck_adapter_backward(grad, x, call.adds_x, call.adapter, call.wanted)
    return replace(of, x=None if of.x is None else _shaped_like(of.x, call.x))
