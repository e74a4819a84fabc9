"""The ops as PyTorch operations that every transform of torch.func and forward-mode AD understand.

The kernels have a derivative for ordinary autograd alone. If more is asked of an op, it runs as one
of these functions. Nothing here is done in place, no value of a tensor is read by the host, and a
base weight is decoded as a whole: under `vmap` any of the tensors may have a hidden batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import linear

from pylora.calls import (
    BottleneckAdapterCall,
    DequantizeCall,
    DoraLinearCall,
    Layer,
    LoraLinearCall,
    LoraMlpCall,
    LoraQkvCall,
    MultiBottleneckCall,
    MultiLoraCall,
    Nf4LinearBackward,
    Nf4LinearCall,
    token_matrix,
)
from pylora.reference.activation import GATED_ACTIVATIONS
from pylora.reference.adapter_groups import check_adapter_ids
from pylora.reference.bottleneck_adapter import adapter_path
from pylora.reference.dora_linear import rescaled
from pylora.reference.lora_linear import low_rank_path
from pylora.reference.nf4_dequantize import dense, nf4_dequantize

_functorch = torch._C._functorch.peek_interpreter_stack


def transformed() -> bool:
    """True inside a transform of torch.func, or inside a `dual_level` of forward-mode AD."""
    return _functorch() is not None or forward_ad._current_level >= 0


def run_transformed(call: Any) -> Any:
    """The results of `call`, in the op's schema.

    Raises NotImplementedError for an op that has no such form.
    """
    function = _FUNCTIONS.get(type(call))
    if function is None:
        raise NotImplementedError(
            f"pylora::{call.op} does not run inside transforms of torch.func or forward-mode AD; "
            "it must be called outside them"
        )
    return function(call)


def _without_transforms(tensor: Tensor) -> Tensor | None:
    """The tensor that transforms have wrapped; None if `vmap` has batched it."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return None
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def _base(x: Tensor, layer: Layer) -> Tensor:
    weight = dense(layer.weight, x.dtype)
    return linear(x, weight, None if layer.bias is None else layer.bias.to(x.dtype))


def _layer(x: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """(y, h) of a layer with or without LoRA; without it h is an empty tensor [0]."""
    base = _base(x, layer)
    if layer.low_rank is None:
        return base, x.new_empty(0)
    delta, h = low_rank_path(x, layer.low_rank)
    return (base + delta).to(x.dtype), h


def _nf4_linear(call: Nf4LinearCall) -> Tensor:
    return _base(call.x, call.layer)


def _nf4_linear_backward(call: Nf4LinearBackward) -> Tensor:
    return call.grad @ dense(call.weight, call.grad.dtype)


def _lora_linear(call: LoraLinearCall) -> tuple[Tensor, Tensor]:
    return _layer(call.x, call.layer)


def _dora_linear(call: DoraLinearCall) -> tuple[Tensor, Tensor, Tensor]:
    product, h = _layer(call.x, call.layer)
    return rescaled(product, call.magnitude, call.norm, call.bias), h, product


def _lora_qkv(call: LoraQkvCall) -> tuple[list[Tensor], list[Tensor]]:
    results = [_layer(call.x, layer) for layer in call.layers]
    return [y for y, _ in results], [h for _, h in results]


def _lora_mlp(call: LoraMlpCall) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    gate_layer, up_layer, down_layer = call.layers
    gate, gate_h = _layer(call.x, gate_layer)
    up, up_h = _layer(call.x, up_layer)
    hidden = GATED_ACTIVATIONS[call.activation].forward(gate) * up
    y, down_h = _layer(hidden, down_layer)
    return y, gate, up, [gate_h, up_h, down_h]


def _multi_lora_linear(call: MultiLoraCall) -> tuple[Tensor, Tensor]:
    """Every adapter sees all tokens, with zeros in the places of those that are not its own."""
    adapters, flat_x = call.adapters, token_matrix(call.x)
    ids = _without_transforms(adapters.ids)
    if ids is not None:
        check_adapter_ids(ids, adapters.count)
    y = _base(flat_x, call.layer)
    h_dtype = torch.promote_types(adapters.A.dtype, torch.float32)
    h = flat_x.new_zeros(flat_x.shape[0], adapters.rank, dtype=h_dtype)
    zero = flat_x.new_zeros(())
    for index in range(adapters.count):
        own = (adapters.ids == index).unsqueeze(-1)
        A, B = adapters.A[index], adapters.B[index]
        # `where` comes before and after the products, so that no NaN of an adapter or a token
        # reaches another, in the gradients either.
        projected = torch.where(own, flat_x, zero).to(A.dtype) @ A.mT
        delta = projected @ B.mT * adapters.scalings[index]
        h = h + torch.where(own, projected, zero)
        y = (y + torch.where(own, delta, zero)).to(flat_x.dtype)
    leading = call.x.shape[:-1]
    return y.view(*leading, y.shape[-1]), h.view(*leading, adapters.rank)


def _bottleneck_adapter(call: BottleneckAdapterCall) -> Tensor:
    y = adapter_path(call.x, call.adapter)
    residual = call.x if call.adds_x else call.residual
    return (y if residual is None else residual + y).to(call.x.dtype)


def _multi_bottleneck_adapter(call: MultiBottleneckCall) -> Tensor:
    """Every adapter sees all tokens, with zeros in the places of those that are not its own."""
    flat_x, ids = token_matrix(call.x), _without_transforms(call.ids)
    if ids is not None:
        check_adapter_ids(ids, len(call.adapters))
    zero = flat_x.new_zeros(())
    y = torch.zeros_like(flat_x)
    for index, adapter in enumerate(call.adapters):
        own = (call.ids == index).unsqueeze(-1)
        path = adapter_path(torch.where(own, flat_x, zero), adapter)
        y = y + torch.where(own, path, zero)
    residual = call.x if call.adds_x else call.residual
    y = y.view(call.x.shape)
    return (y if residual is None else residual + y).to(call.x.dtype)


_FUNCTIONS: dict[Any, Callable[[Any], Any]] = {
    DequantizeCall: nf4_dequantize,
    Nf4LinearCall: _nf4_linear,
    Nf4LinearBackward: _nf4_linear_backward,
    LoraLinearCall: _lora_linear,
    DoraLinearCall: _dora_linear,
    LoraQkvCall: _lora_qkv,
    LoraMlpCall: _lora_mlp,
    MultiLoraCall: _multi_lora_linear,
    BottleneckAdapterCall: _bottleneck_adapter,
    MultiBottleneckCall: _multi_bottleneck_adapter,
}
