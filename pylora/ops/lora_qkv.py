"""torch.ops.pylora.lora_qkv and its backward: three projections of one x, each with its LoRA.

The op returns (ys, hs), two lists with one entry per projection. The hs [..., r] are there for the
backward and cannot be differentiated. The backward keeps x once, the hs and the weights, and
nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from pylora.calls import LoraQkvBackward, LoraQkvCall, Wanted
from pylora.ops import gradients, spec
from pylora.ops.registration import Gradient, MaskedBackward, no_gradient, register


def _fake(call: LoraQkvCall) -> tuple[list[Tensor], list[Tensor]]:
    x = call.x
    y = [x.new_empty(*x.shape[:-1], layer.weight.out_features) for layer in call.layers]
    return y, [gradients.empty_h(x, layer) for layer in call.layers]


def _inputs(call: LoraQkvCall) -> tuple[Tensor | None, ...]:
    return gradients.layers_inputs(call.x, call.layers)


def _record(call: LoraQkvCall, results: Sequence[Tensor]) -> LoraQkvBackward:
    count = len(call.layers)
    ys, hs = list(results[:count]), list(results[count:])
    return LoraQkvBackward(ys, call.x, hs, call.layers, (Wanted(),) * count)


def _complete(call: LoraQkvBackward) -> LoraQkvBackward:
    """The record with zeros for the gradient of each projection that nothing was computed from."""
    grads = [
        call.x.new_zeros(*call.x.shape[:-1], layer.weight.out_features) if grad is None else grad
        for grad, layer in zip(call.grads, call.layers, strict=True)
    ]
    return replace(call, grads=grads)


def _backward_fake(call: LoraQkvBackward) -> tuple[Any, ...]:
    return gradients.empty_layers_results(call.x, call.layers, call.wanted)


def _backward_inputs(call: LoraQkvBackward) -> tuple[Tensor | None, ...]:
    return (*call.grads, *call.hs, *gradients.layers_inputs(call.x, call.layers))


register(
    spec.LORA_QKV_BACKWARD,
    _backward_fake,
    no_gradient("lora_qkv_backward", _backward_inputs),
    lambda call, result: gradients.layers_results(result, call.x),
)
_BACKWARD = spec.LORA_QKV_BACKWARD
register(
    spec.LORA_QKV,
    _fake,
    Gradient(
        _inputs,
        _BACKWARD,
        _record,
        MaskedBackward(_BACKWARD, _complete, several=True),
        lambda call: len(call.layers),
    ),
)
