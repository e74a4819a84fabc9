"""Host code of a base weight without LoRA: a layer of lora_linear that has no low-rank path."""

from __future__ import annotations

from torch import Tensor

from pylora.calls import Layer, Weight
from pylora.kernels.lora_linear import lora_linear
from pylora.kernels.lora_linear_backward import base_gradient


def nf4_linear(x: Tensor, layer: Layer) -> Tensor:
    """x [M, K], any row stride -> x @ W^T + bias [M, out_features] in x.dtype."""
    y, _ = lora_linear(x, layer)
    return y


def nf4_linear_backward(grad: Tensor, weight: Weight) -> Tensor:
    """grad [M, N], any row stride -> grad @ W [M, in_features] in grad.dtype."""
    return base_gradient(grad, weight)
