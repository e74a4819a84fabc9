"""bottleneck_adapter: y = x + up(relu(down(x))) with biases, against the same in eager torch.

The shape of a cell is that of the down projection, [bottleneck, hidden]. Eager torch makes five
passes over the hidden states: it reads x, writes the path, and reads both to write y. The floor is
two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

import pylora.functional as F
from benchmarks.contender import Bench, BuiltLayer, Contender, Work, item_size
from benchmarks.contenders_torch import explained
from benchmarks.layer_tensors import LayerTensors
from benchmarks.shapes import BACKWARD, FORWARD, TRAINING, Cell

SHAPES = tuple((bottleneck, hidden) for hidden in (768, 4096) for bottleneck in (16, 64, 256))


def draw_adapter(tensors: LayerTensors) -> tuple[Tensor, ...]:
    """Draws down_weight, down_bias, up_weight and up_bias for the shape of the cell."""
    bottleneck, hidden = tensors.cell.out_features, tensors.cell.in_features
    return (
        tensors.normal(bottleneck, hidden, scale=hidden**-0.5),
        tensors.normal(bottleneck, scale=0.1),
        tensors.normal(hidden, bottleneck, scale=bottleneck**-0.5),
        tensors.normal(hidden, scale=0.1),
    )


def trainable(drawn: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Returns copies of the tensors, all trainable."""
    return tuple(t.detach().to(dtype, copy=True).requires_grad_() for t in drawn)


def _weights(tensors: LayerTensors, dtype: torch.dtype) -> tuple[Tensor, ...]:
    drawn = tensors.remembered("adapter", lambda: draw_adapter(tensors))
    return trainable(drawn, dtype)


def _pylora(tensors: LayerTensors, dtype: torch.dtype) -> BuiltLayer:
    weights = _weights(tensors, dtype)
    return BuiltLayer(
        lambda x: F.bottleneck_adapter(x, *weights),
        lambda x: explained("bottleneck_adapter", x, *weights),
        weights,
    )


def in_torch(x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> Tensor:
    """Computes the adapter with torch's own functions."""
    return x + linear(torch.relu(linear(x, down, down_bias)), up, up_bias)


def _eager(tensors: LayerTensors, dtype: torch.dtype) -> BuiltLayer:
    weights = _weights(tensors, dtype)
    return BuiltLayer(
        lambda x: in_torch(x, *weights), lambda x: "linear, relu, linear, add", weights
    )


def _oracle(
    tensors: LayerTensors, x: Tensor, grad: Tensor | None, has_lora: bool
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    weights = [t.detach() for t in _weights(tensors, x.dtype)]

    def compute(x: Tensor, grad: Tensor | None, weights: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_(grad is not None) for t in (x, *weights)]
        with torch.set_grad_enabled(grad is not None):
            y = in_torch(*leaves)
            grads = torch.autograd.grad(y, leaves, grad) if grad is not None else ()
        return (y.detach(), *grads)

    return compute, (x, grad, weights)


def adapter_work(cell: Cell, contender: Contender) -> Work:
    """Returns the least work: two products of 2 M bottleneck hidden FLOP in a forward, and four in
    a backward that is given the bottleneck. A forward reads x and writes y, and a backward reads x
    and the gradient and writes dx; each reads the weights, and a backward writes theirs."""
    m, size = cell.tokens, item_size(cell, contender)
    product = 2 * m * cell.numel
    states, weights = size * m * cell.in_features, size * 2 * cell.numel
    forward = Work(2 * product, states + weights, states)
    backward = Work(4 * product, 2 * states + weights, states + weights)
    if cell.mode == TRAINING:
        return Work(*(getattr(forward, f) + getattr(backward, f) for f in Work.__match_args__))
    return backward if cell.mode == BACKWARD else forward


def contenders(
    ours: Callable[[LayerTensors, torch.dtype], BuiltLayer],
    eager: Callable[[LayerTensors, torch.dtype], BuiltLayer],
) -> tuple[Contender, ...]:
    """Returns ours, its reference and eager torch, in bf16 and in fp32."""
    bf16, fp32 = torch.bfloat16, torch.float32
    kernels, dense = ("pylora-kernels",), {"weights": "dense"}
    return (
        Contender("pylora", lambda t: ours(t, bf16), kernels, **dense, is_ours=True),
        Contender(
            "pylora reference",
            lambda t: replace(ours(t, bf16), backend="reference"),
            (*kernels, "torch"),
            **dense,
        ),
        Contender("eager torch", lambda t: eager(t, bf16), **dense),
        Contender(
            "pylora fp32", lambda t: ours(t, fp32), kernels, **dense, dtype="float32", is_ours=True
        ),
        Contender("eager torch fp32", lambda t: eager(t, fp32), **dense, dtype="float32"),
    )


BENCH = Bench(
    op="bottleneck_adapter",
    contenders=contenders(_pylora, _eager),
    work=adapter_work,
    oracle=_oracle,
    shapes=SHAPES,
    tokens=(512,),
    modes=(FORWARD, TRAINING),
    in_quick=False,
)
