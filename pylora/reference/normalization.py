"""LayerNorm and RMSNorm over the last dimension, forward and backward, in pure PyTorch.

    standardized = (x - mean(x)) / sqrt(variance(x) + eps)     LayerNorm (arXiv:1607.06450)
    standardized = x / sqrt(mean(x^2) + eps)                   RMSNorm (arXiv:1910.07467)
    y = standardized * weight + bias

Everything is computed in fp32, or in float64 for float64 tensors, and so are the results.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pylora.calls import Norm

LAYER_NORM, RMS_NORM = "layer_norm", "rms_norm"
NORMS = (LAYER_NORM, RMS_NORM)


class NormGradients(NamedTuple):
    """The gradients of `normalized`; that of the bias is None without a bias."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _standardized(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """(x of mean 0 and variance 1, or of mean square 1; what x was multiplied with [..., 1])."""
    if norm.kind == LAYER_NORM:
        x = x - x.mean(-1, keepdim=True)
    factor = (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    return x * factor, factor


def normalized(x: Tensor, norm: Norm) -> Tensor:
    """norm(x) [..., hidden]."""
    standardized, _ = _standardized(_wide(x), norm)
    y = standardized * _wide(norm.weight)
    return y if norm.bias is None else y + _wide(norm.bias)


def normalized_backward(grad: Tensor, x: Tensor, norm: Norm) -> NormGradients:
    """The gradients of norm(x) for x [tokens, hidden]; those of weight and bias in their dtype.

    dstandardized = grad * weight
    dx            = factor * (dstandardized - its mean - standardized * mean(dstandardized *
                    standardized)), in which RMSNorm has no first mean
    """
    grad = _wide(grad)
    standardized, factor = _standardized(_wide(x), norm)
    dweight = (grad * standardized).sum(0).to(norm.weight.dtype)
    dbias = None if norm.bias is None else grad.sum(0).to(norm.bias.dtype)
    dx = grad * _wide(norm.weight)
    projected = (dx * standardized).mean(-1, keepdim=True)
    if norm.kind == LAYER_NORM:
        dx = dx - dx.mean(-1, keepdim=True)
    return NormGradients((dx - standardized * projected) * factor, dweight, dbias)
