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
from torch.nn.functional import layer_norm

from pylora.calls import Norm

LAYER_NORM, RMS_NORM = "layer_norm", "rms_norm"
NORMS = (LAYER_NORM, RMS_NORM)
_aten = torch.ops.aten


class NormGradients(NamedTuple):
    """The gradients of `normalized`; that of the bias is None without a bias."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _mixed(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x, weight, bias) in one dtype, in which the norm is computed."""
    x, weight = _wide(x), _wide(norm.weight)
    dtype = torch.promote_types(x.dtype, weight.dtype)
    bias = None if norm.bias is None else norm.bias.to(dtype)
    return x.to(dtype), weight.to(dtype), bias


def _rms_factor(x: Tensor, norm: Norm) -> Tensor:
    return (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt()


def normalized(x: Tensor, norm: Norm) -> Tensor:
    """norm(x) [..., hidden]; nothing is done in place."""
    x, weight, bias = _mixed(x, norm)
    if norm.kind == LAYER_NORM:
        return layer_norm(x, (x.shape[-1],), weight, bias, norm.eps)
    y = x * _rms_factor(x, norm) * weight
    return y if bias is None else y + bias


def normalized_backward(grad: Tensor, x: Tensor, norm: Norm) -> NormGradients:
    """The gradients of norm(x) for x [tokens, hidden]; those of weight and bias in their dtype.

    For RMSNorm, with dstandardized = grad * weight:

        dx = factor * (dstandardized - standardized * mean(dstandardized * standardized))
    """
    x, weight, bias = _mixed(x, norm)
    grad = grad.to(x.dtype)
    if norm.kind == LAYER_NORM:
        shape = (x.shape[-1],)
        _, mean, factor = _aten.native_layer_norm(x, shape, weight, bias, norm.eps)
        arguments = (grad, x, shape, mean, factor, weight, bias)
        dx, dweight, dbias = _aten.native_layer_norm_backward(
            *arguments, [True, True, bias is not None]
        )
    else:
        factor = _rms_factor(x, norm)
        standardized = x * factor
        dweight = (grad * standardized).sum(0)
        dbias = grad.sum(0)
        dx = grad * weight
        dx = (dx - standardized * (dx * standardized).mean(-1, keepdim=True)) * factor
    dbias = None if norm.bias is None else dbias.to(norm.bias.dtype)
    return NormGradients(dx, dweight.to(norm.weight.dtype), dbias)
