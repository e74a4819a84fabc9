"""The schemas of the ops of bottleneck adapters; they are a part of `spec.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

from torch import Tensor

from pylora.calls import (
    Bottleneck,
    BottleneckAdapterBackward,
    BottleneckAdapterCall,
    BottleneckWanted,
    MultiBottleneckBackward,
    MultiBottleneckCall,
)
from pylora.ops.arguments import (
    Arguments,
    Spec,
    dropout_arguments,
    norm_arguments,
    wanted_of_several,
)

# bottleneck_adapter

_BOTTLENECK = (
    "Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias, float scaling, "
    "str activation, float dropout_p, Tensor? seed, "
    "str norm_before, Tensor? norm_before_weight, Tensor? norm_before_bias, float norm_before_eps, "
    "str norm_after, Tensor? norm_after_weight, Tensor? norm_after_bias, float norm_after_eps"
)


def _write_bottleneck(adapter: Bottleneck) -> tuple[Any, ...]:
    return (
        adapter.down,
        adapter.down_bias,
        adapter.up,
        adapter.up_bias,
        adapter.scaling,
        adapter.activation,
        *dropout_arguments(adapter.dropout),
        *norm_arguments(adapter.norm_before),
        *norm_arguments(adapter.norm_after),
    )


def _read_bottleneck(take: Arguments) -> Bottleneck:
    down, down_bias, up, up_bias, scaling, activation = take.several(6)
    dropout = take.dropout()
    norms = take.norm(), take.norm()
    return Bottleneck(down, up, down_bias, up_bias, scaling, activation, dropout, *norms)


def _read_adapter(take: Arguments) -> BottleneckAdapterCall:
    x, residual, add_residual = take.several(3)
    return BottleneckAdapterCall(x, residual, add_residual, _read_bottleneck(take))


def _read_adapter_backward(take: Arguments) -> BottleneckAdapterBackward:
    grad, x, adds_x = take.several(3)
    adapter = _read_bottleneck(take)
    return BottleneckAdapterBackward(grad, x, adds_x, adapter, BottleneckWanted(*take.next()))


BOTTLENECK_ADAPTER = Spec(
    BottleneckAdapterCall,
    f"(Tensor x, Tensor? residual, bool add_residual, {_BOTTLENECK}) -> Tensor",
    lambda call: (call.x, call.residual, call.add_residual, *_write_bottleneck(call.adapter)),
    _read_adapter,
)
BOTTLENECK_ADAPTER_BACKWARD = Spec(
    BottleneckAdapterBackward,
    f"(Tensor grad, Tensor x, bool adds_x, {_BOTTLENECK}, bool[] output_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda call: (
        call.grad,
        call.x,
        call.adds_x,
        *_write_bottleneck(call.adapter),
        list(astuple(call.wanted)),
    ),
    _read_adapter_backward,
)


# multi_bottleneck_adapter: one list per field of the adapters

_BOTTLENECKS = (
    "Tensor[] down_weight, Tensor[] down_bias, Tensor[] up_weight, Tensor[] up_bias, "
    "float[] scaling, str[] activation, Tensor adapter_ids"
)


def _write_bottlenecks(adapters: Sequence[Bottleneck], ids: Tensor) -> tuple[Any, ...]:
    def or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
        return like.new_empty(0) if tensor is None else tensor

    return (
        [adapter.down for adapter in adapters],
        [or_empty(adapter.down_bias, adapter.down) for adapter in adapters],
        [adapter.up for adapter in adapters],
        [or_empty(adapter.up_bias, adapter.up) for adapter in adapters],
        [adapter.scaling for adapter in adapters],
        [adapter.activation for adapter in adapters],
        ids,
    )


def _read_bottlenecks(take: Arguments) -> tuple[Bottleneck, ...]:
    adapters = []
    for fields in zip(*take.several(6), strict=True):
        down, down_bias, up, up_bias, scaling, activation = fields
        down_bias, up_bias = (b if b.numel() else None for b in (down_bias, up_bias))
        adapters.append(Bottleneck(down, up, down_bias, up_bias, scaling, activation))
    return tuple(adapters)


def _read_multi(take: Arguments) -> MultiBottleneckCall:
    x, residual, add_residual = take.several(3)
    adapters = _read_bottlenecks(take)
    return MultiBottleneckCall(x, residual, add_residual, adapters, take.next())


def _write_multi_wanted(wanted: Sequence[BottleneckWanted]) -> list[bool]:
    """The mask: x, then the wishes of all adapters for each of their four fields."""
    return [
        wanted[0].x,
        *(want.down for want in wanted),
        *(want.down_bias for want in wanted),
        *(want.up for want in wanted),
        *(want.up_bias for want in wanted),
    ]


def _read_multi_backward(take: Arguments) -> MultiBottleneckBackward:
    grad, x, adds_x = take.several(3)
    adapters = _read_bottlenecks(take)
    ids, mask = take.several(2)
    wanted = wanted_of_several(mask, BottleneckWanted)
    return MultiBottleneckBackward(grad, x, adds_x, adapters, ids, wanted)


MULTI_BOTTLENECK_ADAPTER = Spec(
    MultiBottleneckCall,
    f"(Tensor x, Tensor? residual, bool add_residual, {_BOTTLENECKS}) -> Tensor",
    lambda call: (
        call.x,
        call.residual,
        call.add_residual,
        *_write_bottlenecks(call.adapters, call.ids),
    ),
    _read_multi,
)
MULTI_BOTTLENECK_ADAPTER_BACKWARD = Spec(
    MultiBottleneckBackward,
    f"(Tensor grad, Tensor x, bool adds_x, {_BOTTLENECKS}, bool[] output_mask) "
    "-> (Tensor dx, Tensor[] ddown_weight, Tensor[] ddown_bias, Tensor[] dup_weight, "
    "Tensor[] dup_bias)",
    lambda call: (
        call.grad,
        call.x,
        call.adds_x,
        *_write_bottlenecks(call.adapters, call.ids),
        _write_multi_wanted(call.wanted),
    ),
    _read_multi_backward,
)
