"""Runs a layer's calls under autocast, which casts x and the factors of LoRA anew in each call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pylora import dispatch
from pylora.calls import Dropout, Layer, LowRank
from pylora.ops.registration import OPS, first, run_plan


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
    """Runs a layer's calls with an x of one shape and dtype under autocast to one dtype."""

    __slots__ = ("_dtype", "_layer", "_op", "_plan", "_record")

    def __init__(self, record: Any, layer: Layer, dtype: torch.dtype, plan: Any) -> None:
        """
        record   the type of the call
        layer    has the tensors of the module as they are
        plan     that of a call without dropout
        """
        self._record, self._op, self._layer = record, OPS[record], layer
        self._dtype, self._plan = dtype, plan

    def run(self, x: Tensor, scaling: float = 1.0, dropout: Dropout | None = None) -> Tensor:
        """y, with autograd.

        scaling, dropout   those of the low-rank path, if the layer has one
        """
        layer = cast_layer(self._layer, self._dtype, scaling, dropout)
        call, plan = self._record(x.to(self._dtype), layer), self._plan
        if dropout is not None:
            plan = dispatch.choose(call)[1]
        return (
            plan.native(call) if plan.native is not None else first(run_plan(self._op, call, plan))
        )
