"""What the ops are differentiable in, and the results of their backwards, in one order.

The order is that of `calls.Wanted`; an op of several layers has x first, then one field of all
layers after the other. A gradient that was not requested is None in a record, and an empty tensor
[0] among the results of an op, whose schema knows no absent tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pylora.calls import Layer, LayerGradients, Wanted


def layer_inputs(x: Tensor, layer: Layer) -> tuple[Tensor | None, ...]:
    """What lora_linear is differentiable in, in the order of `Wanted`."""
    low = layer.low_rank
    assert low is not None
    return (x, layer.weight.data, low.A, low.B, layer.bias, low.A_bias, low.B_bias)


def layers_inputs(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor | None, ...]:
    """What an op of several layers is differentiable in: x, then one field after the other."""
    lows = [layer.low_rank for layer in layers]
    return (
        x,
        *(layer.weight.data for layer in layers),
        *(None if low is None else low.A for low in lows),
        *(None if low is None else low.B for low in lows),
        *(layer.bias for layer in layers),
    )


def _or_empty(tensors: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """The tensors, with an empty one [0] in the place of each None."""
    return [like.new_empty(0) if tensor is None else tensor for tensor in tensors]


def layer_results(gradients: LayerGradients, like: Tensor) -> tuple[Tensor, ...]:
    """The results of lora_linear_backward; an empty tensor [0] stands for None."""
    g = gradients
    return tuple(_or_empty((g.x, g.weight, g.A, g.B, g.bias, g.A_bias, g.B_bias), like))


def layers_results(
    found: tuple[Tensor | None, Sequence[LayerGradients]], like: Tensor
) -> tuple[Any, ...]:
    """The results of a backward of several layers; an empty tensor [0] stands for None."""
    dx, gradients = found

    def column(name: str) -> list[Tensor]:
        return _or_empty([getattr(one, name) for one in gradients], like)

    columns = map(column, ("weight", "A", "B", "bias"))
    return (like.new_empty(0) if dx is None else dx, *columns)


def adapters_results(gradients: LayerGradients, like: Tensor) -> tuple[Tensor, ...]:
    """The results of multi_lora_linear_backward; an empty tensor [0] stands for None."""
    g = gradients
    return tuple(_or_empty((g.x, g.weight, g.A, g.B, g.bias), like))


def requested(results: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The results of a backward with None in place of the empty tensors."""
    return tuple(one if want else None for one, want in zip(results, wanted, strict=True))


def empty_h(x: Tensor, layer: Layer) -> Tensor:
    """h [..., r] of a layer for a fake function; empty [0] without LoRA."""
    if layer.low_rank is None:
        return x.new_empty(0)
    dtype = torch.promote_types(layer.low_rank.A.dtype, torch.float32)
    return x.new_empty(*x.shape[:-1], layer.low_rank.rank, dtype=dtype)


def empty_layers_results(
    x: Tensor, layers: Sequence[Layer], wanted: Sequence[Wanted]
) -> tuple[Any, ...]:
    """The results of a backward of several layers for a fake function."""

    def like(tensor: Tensor | None, want: bool) -> Tensor | None:
        return tensor.new_empty(tensor.shape) if want and tensor is not None else None

    gradients = []
    for layer, one in zip(layers, wanted, strict=True):
        low = layer.low_rank
        gradients.append(
            LayerGradients(
                weight=like(layer.weight.data, one.weight),
                A=like(None if low is None else low.A, one.A),
                B=like(None if low is None else low.B, one.B),
                bias=like(layer.bias, one.bias),
            )
        )
    return layers_results((like(x, wanted[0].x), gradients), x)


def flat_tensors(results: Sequence[Any]) -> list[Tensor]:
    """The tensors of an op's results, lists among them opened."""
    flat: list[Tensor] = []
    for one in results:
        if isinstance(one, (list, tuple)):
            flat += one
        else:
            flat.append(one)
    return flat
