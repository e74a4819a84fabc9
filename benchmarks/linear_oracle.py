"""What is right for a linear layer: plain torch over the dense weight that NF4 stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.operands import Operands
from pylora.ops.registration import reference_op


def linear_oracle(
    operands: Operands, x: Tensor, grad: Tensor | None, has_lora: bool
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """(function, arguments) over the NF4 weight of `operands`, see `over`."""
    lora = tuple(t.detach() for t in operands.lora()) if has_lora else ()
    return over(operands.dense_once, operands.scaling, x, grad, lora)


def over(
    weight: Callable[[torch.dtype], Tensor],
    scaling: float,
    x: Tensor,
    grad: Tensor | None,
    lora: tuple[Tensor, ...],
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """(function, arguments): gives (y,) in a forward; with grad (y, dx), with LoRA also dA, dB.

    `weight` gives the weight in a dtype. In float64 it is exact, which a weight converted from 16
    bits would not be; that is why it is no argument.
    """

    def compute(x: Tensor, grad: Tensor | None, *lora: Tensor) -> tuple[Tensor, ...]:
        dense = weight(x.dtype)
        if not lora:
            y = linear(x, dense)
            return (y,) if grad is None else (y, grad @ dense)
        base, last = (dense, *[None] * 4, 0, 0), (scaling, 0.0, None, "identity")
        y, h = reference_op("lora_linear")(x, *base, dense.shape[0], *lora, None, None, None, *last)
        if grad is None:
            return (y,)
        wanted = [True, False, True, True, False, False, False]
        grads = reference_op("lora_linear_backward")(grad, x, h, *base, *lora, *last, wanted)
        return (y, grads[0], grads[2], grads[3])

    return compute, (x, grad, *lora)
