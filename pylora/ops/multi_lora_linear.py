"""torch.ops.pylora.multi_lora_linear and its backward: one base weight, an adapter for each token.

The op returns (y, h). h [..., r] is each token's low-rank projection by its own adapter, in fp32,
or zero if it has none; it is there for the backward and cannot be differentiated. scalings has no
gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pylora.calls import MultiLoraBackward, MultiLoraCall, Wanted
from pylora.ops import gradients, spec
from pylora.ops.registration import Gradient, MaskedBackward, no_gradient, register


def _fake(call: MultiLoraCall) -> tuple[Tensor, Tensor]:
    x, adapters = call.x, call.adapters
    h_dtype = torch.promote_types(adapters.A.dtype, torch.float32)
    y = x.new_empty(*x.shape[:-1], call.layer.weight.out_features)
    return y, x.new_empty(*x.shape[:-1], adapters.rank, dtype=h_dtype)


def _inputs(call: MultiLoraCall) -> tuple[Tensor | None, ...]:
    adapters, layer = call.adapters, call.layer
    return call.x, layer.weight.data, adapters.A, adapters.B, layer.bias


def _record(call: MultiLoraCall, results: Sequence[Tensor]) -> MultiLoraBackward:
    y, h = results
    return MultiLoraBackward(y, call.x, h, call.layer, call.adapters, Wanted())


def _backward_fake(call: MultiLoraBackward) -> tuple[Tensor, ...]:
    weight, adapters = call.layer.weight.data, call.adapters
    factors = (adapters.A, adapters.B)
    empty = gradients.empty_gradients(call.x, call.grad, weight, *factors, call.wanted)
    return gradients.adapters_results(empty, call.x)


def _backward_inputs(call: MultiLoraBackward) -> tuple[Tensor | None, ...]:
    adapters, weight = call.adapters, call.layer.weight.data
    return call.grad, call.x, call.h, weight, adapters.A, adapters.B


register(
    spec.MULTI_LORA_LINEAR_BACKWARD,
    _backward_fake,
    no_gradient("multi_lora_linear_backward", _backward_inputs),
    lambda call, result: gradients.adapters_results(result, call.x),
)
_BACKWARD = spec.MULTI_LORA_LINEAR_BACKWARD
register(
    spec.MULTI_LORA_LINEAR,
    _fake,
    Gradient(_inputs, _BACKWARD, _record, MaskedBackward(_BACKWARD)),
)
