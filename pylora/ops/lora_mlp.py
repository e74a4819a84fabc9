"""torch.ops.pylora.lora_mlp and its backward: down(act(gate(x)) * up(x)) as one op.

The op returns (y, gate, up, hs): gate and up [..., intermediate] are the two projections of x, and
hs are the h of gate, up and down. All but y are there for the backward and cannot be
differentiated. The backward computes act(gate) * up, which is as large as either, again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pylora.calls import LoraMlpBackward, LoraMlpCall, Wanted
from pylora.ops import gradients, spec
from pylora.ops.registration import Gradient, MaskedBackward, no_gradient, register


def _fake(call: LoraMlpCall) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    x = call.x
    gate, up, y = (x.new_empty(*x.shape[:-1], layer.weight.out_features) for layer in call.layers)
    return y, gate, up, [gradients.empty_h(x, layer) for layer in call.layers]


def _inputs(call: LoraMlpCall) -> tuple[Tensor | None, ...]:
    return gradients.layers_inputs(call.x, call.layers)


def _record(call: LoraMlpCall, results: Sequence[Tensor]) -> LoraMlpBackward:
    y, gate, up, *hs = results
    nothing = (Wanted(),) * len(call.layers)
    return LoraMlpBackward(y, call.x, gate, up, hs, call.layers, call.activation, nothing)


def _backward_fake(call: LoraMlpBackward) -> tuple[Any, ...]:
    return gradients.empty_layers_results(call.x, call.layers, call.wanted)


def _backward_inputs(call: LoraMlpBackward) -> tuple[Tensor | None, ...]:
    activations = (call.grad, call.gate, call.up, *call.hs)
    return (*activations, *gradients.layers_inputs(call.x, call.layers))


register(
    spec.LORA_MLP_BACKWARD,
    _backward_fake,
    no_gradient("lora_mlp_backward", _backward_inputs),
    lambda call, result: gradients.layers_results(result, call.x),
)
_BACKWARD = spec.LORA_MLP_BACKWARD
register(
    spec.LORA_MLP,
    _fake,
    Gradient(_inputs, _BACKWARD, _record, MaskedBackward(_BACKWARD)),
)
