"""torch.ops.pylora.multi_bottleneck_adapter and its backward: a bottleneck adapter for each token.

The op returns y alone, and the backward keeps x, the ids and the adapters' tensors. The gradient of
a residual other than x is the gradient of y, which autograd passes on without an op.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pylora.calls import (
    Bottleneck,
    BottleneckGradients,
    BottleneckWanted,
    MultiBottleneckBackward,
    MultiBottleneckCall,
)
from pylora.ops import spec
from pylora.ops.gradients import or_empty
from pylora.ops.registration import Gradient, MaskedBackward, no_gradient, register
from pylora.ops.residual import with_residual


def _fake(call: MultiBottleneckCall) -> Tensor:
    return call.x.new_empty(call.x.shape)


def _columns(adapters: Sequence[Bottleneck]) -> tuple[Tensor | None, ...]:
    """The tensors of all adapters, field by field, in the order of the schema."""
    return (
        *(adapter.down for adapter in adapters),
        *(adapter.down_bias for adapter in adapters),
        *(adapter.up for adapter in adapters),
        *(adapter.up_bias for adapter in adapters),
    )


def _inputs(call: MultiBottleneckCall) -> tuple[Tensor | None, ...]:
    return (call.x, *_columns(call.adapters), call.residual)


def _record(call: MultiBottleneckCall, results: Sequence[Tensor]) -> MultiBottleneckBackward:
    (y,) = results
    nothing = (BottleneckWanted(),) * len(call.adapters)
    return MultiBottleneckBackward(y, call.x, call.adds_x, call.adapters, call.ids, nothing)


def _results(
    call: MultiBottleneckBackward,
    dx_and_gradients: tuple[Tensor | None, Sequence[BottleneckGradients]],
) -> tuple[Any, ...]:
    """The results of the backward op; an empty tensor [0] stands for None."""
    dx, gradients = dx_and_gradients
    fields = ("down", "down_bias", "up", "up_bias")
    columns = ([getattr(of, field) for of in gradients] for field in fields)
    return (*or_empty([dx], call.x), *(or_empty(column, call.x) for column in columns))


def _backward_fake(call: MultiBottleneckBackward) -> tuple[Any, ...]:
    def like(tensor: Tensor | None, want: bool) -> Tensor | None:
        return tensor.new_empty(tensor.shape) if want and tensor is not None else None

    gradients = [
        BottleneckGradients(
            down=like(adapter.down, want.down),
            down_bias=like(adapter.down_bias, want.down_bias),
            up=like(adapter.up, want.up),
            up_bias=like(adapter.up_bias, want.up_bias),
        )
        for adapter, want in zip(call.adapters, call.wanted, strict=True)
    ]
    return _results(call, (like(call.x, call.wanted[0].x), gradients))


def _backward_inputs(call: MultiBottleneckBackward) -> tuple[Tensor | None, ...]:
    return (call.grad, call.x, *_columns(call.adapters))


_BACKWARD = spec.MULTI_BOTTLENECK_ADAPTER_BACKWARD
register(
    _BACKWARD,
    _backward_fake,
    no_gradient("multi_bottleneck_adapter_backward", _backward_inputs),
    _results,
)
register(
    spec.MULTI_BOTTLENECK_ADAPTER,
    _fake,
    Gradient(_inputs, _BACKWARD, _record, with_residual(MaskedBackward(_BACKWARD))),
)
