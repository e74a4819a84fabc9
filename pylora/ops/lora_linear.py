"""torch.ops.pylora.lora_linear and its backward: base matmul and low-rank path as one op.

The op returns (y, h). h [..., r] is the low-rank projection before the activation, in fp32; it is
there for the backward and cannot be differentiated. The backward keeps x, h and the weights, and
nothing else: it regenerates a dropout mask from the seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pylora.calls import Layer, LayerGradients, LoraLinearBackward, LoraLinearCall, Wanted
from pylora.ops import gradients, spec
from pylora.ops.registration import Gradient, masked_backward, no_gradient, register


def _fake(call: LoraLinearCall) -> tuple[Tensor, Tensor]:
    x, low = call.x, call.layer.low_rank
    assert low is not None
    h_dtype = torch.promote_types(low.A.dtype, torch.float32)
    y = x.new_empty(*x.shape[:-1], call.layer.weight.out_features)
    return y, x.new_empty(*x.shape[:-1], low.rank, dtype=h_dtype)


def _inputs(call: LoraLinearCall) -> tuple[Tensor | None, ...]:
    return gradients.layer_inputs(call.x, call.layer)


def _record(call: LoraLinearCall, results: Sequence[Tensor]) -> LoraLinearBackward:
    y, h = results
    return LoraLinearBackward(y, call.x, h, call.layer, Wanted())


def _backward_fake(call: LoraLinearBackward) -> tuple[Tensor, ...]:
    low, wanted = call.layer.low_rank, call.wanted
    assert low is not None
    weight, grad = call.layer.weight.data, call.grad
    empty = LayerGradients(
        x=call.x.new_empty(call.x.shape) if wanted.x else None,
        weight=weight.new_empty(weight.shape) if wanted.weight else None,
        A=low.A.new_empty(low.A.shape) if wanted.A else None,
        B=low.B.new_empty(low.B.shape) if wanted.B else None,
        bias=grad.new_empty(grad.shape[-1]) if wanted.bias else None,
        A_bias=low.A.new_empty(low.rank) if wanted.A_bias else None,
        B_bias=low.A.new_empty(grad.shape[-1]) if wanted.B_bias else None,
    )
    return gradients.layer_results(empty, call.x)


def _backward_inputs(call: LoraLinearBackward) -> tuple[Tensor | None, ...]:
    _, *factors = gradients.layer_inputs(
        call.x, Layer(call.layer.weight, None, call.layer.low_rank)
    )
    return (call.grad, call.x, call.h, *factors)


register(
    spec.LORA_LINEAR_BACKWARD,
    _backward_fake,
    no_gradient("lora_linear_backward", _backward_inputs),
    lambda call, result: gradients.layer_results(result, call.x),
)
_BACKWARD = spec.LORA_LINEAR_BACKWARD
register(
    spec.LORA_LINEAR,
    _fake,
    Gradient(_inputs, _BACKWARD, _record, masked_backward(_BACKWARD)),
)
