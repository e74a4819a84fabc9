"""torch.ops.pylora.bottleneck_adapter and its backward.

The op returns y alone. The backward keeps x and the adapter's tensors, and nothing else: it
computes the bottleneck again, and regenerates a dropout mask from the seed. The gradient of a
residual other than x is the gradient of y, which autograd passes on without an op.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple

from torch import Tensor

from pylora.calls import (
    BottleneckAdapterBackward,
    BottleneckAdapterCall,
    BottleneckGradients,
    BottleneckWanted,
)
from pylora.ops import spec
from pylora.ops.gradients import or_empty
from pylora.ops.registration import Gradient, MaskedBackward, no_gradient, register
from pylora.ops.residual import with_residual


def _fake(call: BottleneckAdapterCall) -> Tensor:
    return call.x.new_empty(call.x.shape)


def _inputs(call: BottleneckAdapterCall) -> tuple[Tensor | None, ...]:
    return (call.x, *call.adapter.tensors, call.residual)


def _record(call: BottleneckAdapterCall, results: Sequence[Tensor]) -> BottleneckAdapterBackward:
    (y,) = results
    return BottleneckAdapterBackward(y, call.x, call.adds_x, call.adapter, BottleneckWanted())


def _results(call: BottleneckAdapterBackward, of: BottleneckGradients) -> tuple[Tensor, ...]:
    """The results of the backward op; an empty tensor [0] stands for None."""
    fields = (
        of.x,
        of.down,
        of.down_bias,
        of.up,
        of.up_bias,
        of.before_weight,
        of.before_bias,
        of.after_weight,
        of.after_bias,
    )
    return tuple(or_empty(fields, call.x))


def _backward_fake(call: BottleneckAdapterBackward) -> tuple[Tensor, ...]:
    tensors = (call.x, *call.adapter.tensors)
    return tuple(
        tensor.new_empty(tensor.shape) if want and tensor is not None else call.x.new_empty(0)
        for tensor, want in zip(tensors, astuple(call.wanted), strict=True)
    )


def _backward_inputs(call: BottleneckAdapterBackward) -> tuple[Tensor | None, ...]:
    return (call.grad, call.x, *call.adapter.tensors)


_BACKWARD = spec.BOTTLENECK_ADAPTER_BACKWARD

register(
    _BACKWARD,
    _backward_fake,
    no_gradient("bottleneck_adapter_backward", _backward_inputs),
    _results,
)
register(
    spec.BOTTLENECK_ADAPTER,
    _fake,
    Gradient(_inputs, _BACKWARD, _record, with_residual(MaskedBackward(_BACKWARD))),
)
