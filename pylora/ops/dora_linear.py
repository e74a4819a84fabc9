"""torch.ops.pylora.dora_linear and its backward: a LoRA layer whose rows are rescaled, as one op.

The op returns (y, h, product). h [..., r] and product [..., out_features], which is y before the
rescaling and the bias, are there for the backward and cannot be differentiated. The norm of the
rows is a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pylora.calls import DoraLinearBackward, DoraLinearCall, LayerGradients, Wanted
from pylora.ops import gradients, spec
from pylora.ops.registration import Gradient, MaskedBackward, no_gradient, register


def _fake(call: DoraLinearCall) -> tuple[Tensor, Tensor, Tensor]:
    y = call.x.new_empty(*call.x.shape[:-1], call.layer.weight.out_features)
    return y, gradients.empty_h(call.x, call.layer), torch.empty_like(y)


def _inputs(call: DoraLinearCall) -> tuple[Tensor | None, ...]:
    low = call.layer.low_rank
    assert low is not None
    return (call.x, call.layer.weight.data, low.A, low.B, call.bias, call.magnitude)


def _record(call: DoraLinearCall, results: Sequence[Tensor]) -> DoraLinearBackward:
    y, h, product = results
    scaled = (call.layer, call.magnitude, call.norm)
    return DoraLinearBackward(y, call.x, h, product, *scaled, Wanted())


def _backward_fake(call: DoraLinearBackward) -> tuple[Tensor, ...]:
    low, wanted = call.layer.low_rank, call.wanted
    assert low is not None
    grad, weight = call.grad, call.layer.weight.data
    empty = gradients.empty_gradients(call.x, grad, weight, low.A, low.B, wanted)
    magnitude = call.magnitude.new_empty(grad.shape[-1]) if wanted.magnitude else None
    return _results(replace(empty, magnitude=magnitude), call.x)


def _results(of_layer: LayerGradients, like: Tensor) -> tuple[Tensor, ...]:
    g = of_layer
    return tuple(gradients.or_empty((g.x, g.weight, g.A, g.B, g.bias, g.magnitude), like))


def _backward_inputs(call: DoraLinearBackward) -> tuple[Tensor | None, ...]:
    low = call.layer.low_rank
    assert low is not None
    activations = (call.grad, call.x, call.h, call.product)
    return (*activations, call.layer.weight.data, low.A, low.B, call.magnitude, call.norm)


register(
    spec.DORA_LINEAR_BACKWARD,
    _backward_fake,
    no_gradient("dora_linear_backward", _backward_inputs),
    lambda call, result: _results(result, call.x),
)
_BACKWARD = spec.DORA_LINEAR_BACKWARD
register(
    spec.DORA_LINEAR,
    _fake,
    Gradient(_inputs, _BACKWARD, _record, MaskedBackward(_BACKWARD)),
)
