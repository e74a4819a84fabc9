"""The inputs that the ops can be differentiated in, and the results of their backwards.

Both are in the order of `calls.Wanted`. An op of several layers has x first, then the weights of
all layers, then each further field of all layers. A gradient that is not wanted is None in a
record, but an empty tensor [0] among the results of an op, because a schema has no absent tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pylora.calls import Layer, LayerGradients, Wanted


def layer_inputs(x: Tensor, layer: Layer) -> tuple[Tensor | None, ...]:
    """The tensors that lora_linear can be differentiated in, in the order of `Wanted`."""
    low = layer.low_rank
    assert low is not None
    return (x, layer.weight.data, low.A, low.B, layer.bias, low.A_bias, low.B_bias)


def layers_inputs(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor | None, ...]:
    """The tensors that an op of several layers can be differentiated in: x, then field by field."""
    lows = [layer.low_rank for layer in layers]
    return (
        x,
        *(layer.weight.data for layer in layers),
        *(None if low is None else low.A for low in lows),
        *(None if low is None else low.B for low in lows),
        *(layer.bias for layer in layers),
    )


def or_empty(tensors: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """The tensors, with an empty one [0] in the place of each None."""
    return [like.new_empty(0) if tensor is None else tensor for tensor in tensors]


def layer_results(gradients: LayerGradients, like: Tensor) -> tuple[Tensor, ...]:
    """The results of lora_linear_backward; an empty tensor [0] stands for None."""
    g = gradients
    return tuple(or_empty((g.x, g.weight, g.A, g.B, g.bias, g.A_bias, g.B_bias), like))


def layers_results(
    dx_and_gradients: tuple[Tensor | None, Sequence[LayerGradients]], like: Tensor
) -> tuple[Any, ...]:
    """The results of a backward of several layers; an empty tensor [0] stands for None."""
    dx, gradients = dx_and_gradients

    def column(name: str) -> list[Tensor]:
        return or_empty([getattr(of_layer, name) for of_layer in gradients], like)

    columns = map(column, ("weight", "A", "B", "bias"))
    return (like.new_empty(0) if dx is None else dx, *columns)


def adapters_results(gradients: LayerGradients, like: Tensor) -> tuple[Tensor, ...]:
    """The results of multi_lora_linear_backward; an empty tensor [0] stands for None."""
    g = gradients
    return tuple(or_empty((g.x, g.weight, g.A, g.B, g.bias), like))


def requested(results: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The results of a backward with None for each gradient that is not wanted."""
    return tuple(t if want else None for t, want in zip(results, wanted, strict=True))


def empty_h(x: Tensor, layer: Layer) -> Tensor:
    """An uninitialized h [..., r] of a layer, for a fake function; [0] without LoRA."""
    if layer.low_rank is None:
        return x.new_empty(0)
    dtype = torch.promote_types(layer.low_rank.A.dtype, torch.float32)
    return x.new_empty(*x.shape[:-1], layer.low_rank.rank, dtype=dtype)


def empty_gradients(
    x: Tensor, grad: Tensor, weight: Tensor, A: Tensor, B: Tensor, wanted: Wanted
) -> LayerGradients:
    """The uninitialized gradients that every layer with LoRA has, for a fake function."""
    return LayerGradients(
        x=x.new_empty(x.shape) if wanted.x else None,
        weight=weight.new_empty(weight.shape) if wanted.weight else None,
        A=A.new_empty(A.shape) if wanted.A else None,
        B=B.new_empty(B.shape) if wanted.B else None,
        bias=grad.new_empty(grad.shape[-1]) if wanted.bias else None,
    )


def empty_layers_results(
    x: Tensor, layers: Sequence[Layer], wanted: Sequence[Wanted]
) -> tuple[Any, ...]:
    """The uninitialized results of a backward of several layers, for a fake function."""

    def like(tensor: Tensor | None, want: bool) -> Tensor | None:
        return tensor.new_empty(tensor.shape) if want and tensor is not None else None

    gradients = []
    for layer, want in zip(layers, wanted, strict=True):
        low = layer.low_rank
        gradients.append(
            LayerGradients(
                weight=like(layer.weight.data, want.weight),
                A=like(None if low is None else low.A, want.A),
                B=like(None if low is None else low.B, want.B),
                bias=like(layer.bias, want.bias),
            )
        )
    return layers_results((like(x, wanted[0].x), gradients), x)


def flat_tensors(results: Sequence[Any]) -> list[Tensor]:
    """The tensors of an op's results, with those in lists taken out of them."""
    flat: list[Tensor] = []
    for result in results:
        if isinstance(result, (list, tuple)):
            flat += result
        else:
            flat.append(result)
    return flat
