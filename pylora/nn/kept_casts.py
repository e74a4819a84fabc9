"""Runs a layer's calls under autocast, which casts x and the factors of LoRA anew in each call."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from pylora import dispatch
from pylora.backends.backend import Plan
from pylora.calls import Dropout, Layer, LowRank
from pylora.ops.registration import OPS, below_autograd, first, run_plan, with_gradient
from pylora.ops.repeated import RepeatedGradient, first_call


def cast_layer(
    layer: Layer, dtype: torch.dtype, scaling: float = 1.0, dropout: Dropout | None = None
) -> Layer:
    """The layer as a call under autocast to `dtype` reads it.

    The weight has that dtype or is NF4, and a bias is read in its own.

    scaling, dropout   those of the low-rank path, if the layer has one
    """
    low = layer.low_rank
    if low is None:
        return layer
    B_bias = None if low.B_bias is None else low.B_bias.to(dtype)
    factors = (low.A.to(dtype), low.B.to(dtype), None, B_bias)
    cast = LowRank(*factors, scaling, low.activation, dropout)
    return Layer(layer.weight, layer.bias, cast)


class CastCall:
    """Runs a layer's calls with an x of one shape and dtype under autocast to one dtype.

    The casts are made below autograd: the node of the op stands for them as well, and torch casts
    the gradients back. If autograd recorded each cast, that would take longer than a small layer.
    """

    __slots__ = ("_dtype", "_gradient", "_layer", "_op", "_plan", "_record", "_scaling")

    def __init__(self, record: Any, layer: Layer, dtype: torch.dtype, plan: Plan) -> None:
        """
        record   the type of the call
        layer    has the tensors of the module as they are
        plan     that of a call without dropout
        """
        self._record, self._op, self._layer = record, OPS[record], layer
        self._dtype, self._plan = dtype, plan
        self._gradient: RepeatedGradient | None = None
        self._scaling = 1.0

    def run(self, x: Tensor, scaling: float = 1.0, dropout: Dropout | None = None) -> Tensor:
        """y, with autograd.

        scaling, dropout   those of the low-rank path, if the layer has one
        """
        if self._plan.native is not None and dropout is None:
            return self._plan.native(self._call(x, scaling, None))
        if not torch.is_grad_enabled():
            call = self._call(x, scaling, dropout)
            return first(run_plan(self._op, call, self._plan_of(call, dropout)))
        with torch._C._AutoDispatchBelowAutograd():
            call = self._call(x, scaling, dropout)
        plan = self._plan_of(call, dropout)
        forward = partial(below_autograd, self._op, call, plan)
        if self._gradient is not None and dropout is None and scaling == self._scaling:
            return self._gradient.run(x, forward, call)
        inputs = self._op.gradient.inputs(self._record(x, self._layer))
        if dropout is not None:
            return first(with_gradient(self._op, call, forward, inputs))
        y, self._gradient = first_call(self._op, call, forward, (), inputs)
        self._scaling = scaling
        return y

    def _call(self, x: Tensor, scaling: float, dropout: Dropout | None) -> Any:
        return self._record(
            x.to(self._dtype), cast_layer(self._layer, self._dtype, scaling, dropout)
        )

    def _plan_of(self, call: Any, dropout: Dropout | None) -> Plan:
        return self._plan if dropout is None else dispatch.choose(call)[1]
