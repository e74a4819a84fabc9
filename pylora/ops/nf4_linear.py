"""torch.ops.pylora.nf4_linear and its backward: y = x @ W^T + bias over an NF4 weight W."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pylora.calls import Layer, Nf4LinearBackward, Nf4LinearCall, token_matrix
from pylora.ops import spec
from pylora.ops.registration import Gradient, register, run

Saved = list[Any]


def _fake(call: Nf4LinearCall) -> Tensor:
    return call.x.new_empty(*call.x.shape[:-1], call.layer.weight.out_features)


def _inputs(call: Nf4LinearCall) -> tuple[Tensor | None, ...]:
    return call.x, call.layer.weight.data, call.layer.bias


def _record(call: Nf4LinearCall, results: Sequence[Tensor]) -> Nf4LinearBackward:
    return Nf4LinearBackward(results[0], call.layer.weight)


def _backward(
    grads: Sequence[Any], saved: Saved, wanted: Sequence[bool]
) -> Sequence[Tensor | None]:
    (grad,), (wants_x, _, wants_bias) = grads, wanted
    dx = None
    if wants_x:
        dx = run(spec.NF4_LINEAR_BACKWARD.read_with_gradient(grad, saved))
    return dx, None, token_matrix(grad).sum(0) if wants_bias else None


def _backward_fake(call: Nf4LinearBackward) -> Tensor:
    return call.grad.new_empty(*call.grad.shape[:-1], call.weight.in_features)


def _backward_inputs(call: Nf4LinearBackward) -> tuple[Tensor | None, ...]:
    return call.grad, call.weight.data


def _second_record(call: Nf4LinearBackward, results: Sequence[Tensor]) -> Nf4LinearCall:
    return Nf4LinearCall(results[0], Layer(call.weight))


def _second_backward(
    grads: Sequence[Any], saved: Saved, wanted: Sequence[bool]
) -> Sequence[Tensor | None]:
    # dx = grad @ W is linear in grad, so the gradient of grad is ddx @ W^T.
    (ddx,), (wants_grad, _) = grads, wanted
    return (run(spec.NF4_LINEAR.read_with_gradient(ddx, saved)) if wants_grad else None), None


register(
    spec.NF4_LINEAR_BACKWARD,
    _backward_fake,
    Gradient(_backward_inputs, spec.NF4_LINEAR, _second_record, _second_backward),
)
register(
    spec.NF4_LINEAR,
    _fake,
    Gradient(_inputs, spec.NF4_LINEAR_BACKWARD, _record, _backward),
)
