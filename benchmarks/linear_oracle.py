"""The right result of a linear layer: plain torch over the dense weight that NF4 stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.layer_tensors import LayerTensors
from pylora.ops.registration import reference_op


def linear_oracle(
    tensors: LayerTensors, x: Tensor, grad: Tensor | None, has_lora: bool
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns what `over` returns for the NF4 weight and the LoRA factors of `tensors`."""
    lora = tuple(t.detach() for t in tensors.lora()) if has_lora else ()
    return over(tensors.dense_once, tensors.scaling, x, grad, lora)


def over(
    weight: Callable[[torch.dtype], Tensor],
    scaling: float,
    x: Tensor,
    grad: Tensor | None,
    lora: tuple[Tensor, ...],
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns (function, its arguments). The function returns (y,), with grad (y, dx), and with
    grad and LoRA (y, dx, dA, dB).

    `weight` is called for the weight in a dtype, and the function is called with float64 arguments
    too. The weight is not one of these, because a 16-bit weight converted to float64 would not be
    exact.
    """

    def compute(x: Tensor, grad: Tensor | None, *lora: Tensor) -> tuple[Tensor, ...]:
        dense = weight(x.dtype)
        if not lora:
            y = linear(x, dense)
            return (y,) if grad is None else (y, grad @ dense)
        base, options = (dense, *[None] * 4, 0, 0), (scaling, 0.0, None, "identity")
        biases = (None, None, None)
        y, h = reference_op("lora_linear")(x, *base, dense.shape[0], *lora, *biases, *options)
        if grad is None:
            return (y,)
        gradients = [True, False, True, True, False, False, False]  # dx, dA and dB
        grads = reference_op("lora_linear_backward")(grad, x, h, *base, *lora, *options, gradients)
        return (y, grads[0], grads[2], grads[3])

    return compute, (x, grad, *lora)
