"""torch.ops.pylora.lora_linear and its backward: base matmul and low-rank path as one op.

The op returns (y, h). h [..., r] is the low-rank projection before the activation, in fp32; it is
there for the backward and cannot be differentiated. The backward keeps x, h and the weights, and
nothing else: it regenerates a dropout mask from the seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from pylora.calls import Layer, LoraLinearBackward, LoraLinearCall, Wanted
from pylora.ops import gradients, spec
from pylora.ops.registration import Gradient, MaskedBackward, no_gradient, register


def _fake(call: LoraLinearCall) -> tuple[Tensor, Tensor]:
    y = call.x.new_empty(*call.x.shape[:-1], call.layer.weight.out_features)
    return y, gradients.empty_h(call.x, call.layer)


def _inputs(call: LoraLinearCall) -> tuple[Tensor | None, ...]:
    return gradients.layer_inputs(call.x, call.layer)


def _record(call: LoraLinearCall, results: Sequence[Tensor]) -> LoraLinearBackward:
    y, h = results
    return LoraLinearBackward(y, call.x, h, call.layer, Wanted())


def _backward_fake(call: LoraLinearBackward) -> tuple[Tensor, ...]:
    low, wanted = call.layer.low_rank, call.wanted
    assert low is not None
    grad, weight = call.grad, call.layer.weight.data
    empty = gradients.empty_gradients(call.x, grad, weight, low.A, low.B, wanted)
    A_bias = low.A.new_empty(low.rank) if wanted.A_bias else None
    B_bias = low.A.new_empty(grad.shape[-1]) if wanted.B_bias else None
    return gradients.layer_results(replace(empty, A_bias=A_bias, B_bias=B_bias), call.x)


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
    Gradient(_inputs, _BACKWARD, _record, MaskedBackward(_BACKWARD)),
)
