"""DoRA: a linear layer whose rows W + scaling B A are rescaled to a trained magnitude.

    y = magnitude / |W + scaling B A| * (x W^T + scaling x A^T B^T) + bias

The norm |...| is taken of each row and has no gradient. Source: DoRA, arXiv:2402.09353.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from pylora import functional
from pylora.backends.backend import autocast_off
from pylora.nf4_weight import NF4Weight


@torch.no_grad()
def base_norm(weight: Tensor | NF4Weight) -> Tensor:
    """The norm of each row of W, float64 [out_features]."""
    if isinstance(weight, NF4Weight):
        weight = weight.dequantize(torch.float32)
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64)


@torch.no_grad()
def adapted_norm(
    weight: Tensor | NF4Weight, norm: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """The row norms |W + scaling B A| [out_features] in lora_A's dtype.

    norm    `base_norm(weight)`

    No dense copy of W or B A is made: for each row w of W and b of B, with s the scaling,
    |w + s b A|^2 = |w|^2 + 2 s (w A^T) b + s^2 b (A A^T) b. The three terms are added in float64,
    because an error in a row's norm is the same for every token and does not average out.
    """
    A, B = lora_A.float(), lora_B.float()
    # A norm in bf16 would move every output; no_grad does not hold for forward-mode AD.
    with autocast_off(A.device.type), forward_ad._set_fwd_grad_enabled(False):
        if isinstance(weight, NF4Weight):
            projected = functional.nf4_linear(A, weight).t()
        else:
            projected = nn.functional.linear(A.to(weight.dtype), weight).t().float()
        cross = 2 * scaling * (projected * B).sum(1, dtype=torch.float64)
        of_lora = scaling**2 * ((B @ (A @ A.t())) * B).sum(1, dtype=torch.float64)
    return (norm**2 + cross + of_lora).clamp(min=0).sqrt().to(lora_A.dtype)


def dora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    rescale: Tensor,
    bias: Tensor | None = None,
    dropped: Tensor | None = None,
) -> Tensor:
    """y [..., out_features] of a layer with DoRA.

    rescale    magnitude / |W + scaling B A| [out_features]
    dropped    x after dropout, None without dropout; as in PEFT, it is the input of everything
               that DoRA adds to the base layer
    the others as in `pylora.functional.lora_linear`
    """
    if dropped is None:
        y = functional.lora_linear(x, weight, lora_A, lora_B, scaling)
        y = y * rescale.to(y.dtype)  # under autocast, y has another dtype than x
        return y if bias is None else y + bias.to(y.dtype)
    linear = nn.functional.linear
    low_rank = linear(linear(dropped.to(lora_A.dtype), lora_A), lora_B)
    delta = (rescale - 1) * _base(dropped, weight) + rescale * scaling * low_rank
    y = _base(x, weight, bias)
    return y + delta.to(y.dtype)


def _base(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None = None) -> Tensor:
    if isinstance(weight, NF4Weight):
        return functional.nf4_linear(x, weight, bias)
    return nn.functional.linear(x, weight, bias)
