"""A linear layer with DoRA, forward and backward, in pure PyTorch.

    product = x @ W^T + scaling * (x @ lora_A^T) @ lora_B^T
    y       = magnitude / norm * product + bias

norm [out_features] is |W + scaling lora_B lora_A| of each row, which is given and has no gradient.
Source: DoRA, arXiv:2402.09353.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from pylora.calls import DoraLinearBackward, DoraLinearCall, LayerGradients, Wanted, token_matrix
from pylora.reference.lora_linear import REFERENCE_LAYERS, LayerFunctions


def rescaled(product: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None) -> Tensor:
    """magnitude / norm * product + bias, in the dtype of the product."""
    factors = _factors(magnitude, norm, product.dtype)
    if bias is None:
        return product * factors
    return torch.addcmul(bias.to(product.dtype), product, factors)


def rescaled_backward(
    grad: Tensor, product: Tensor, magnitude: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor]:
    """(the gradient of the product in grad.dtype, that of the magnitude in its dtype)."""
    dproduct = grad * _factors(magnitude, norm, grad.dtype)
    # The tokens' parts are added in fp32 or float64, because the sum may have many of them.
    dtype = torch.promote_types(norm.dtype, torch.float32)
    dfactors = (token_matrix(grad) * token_matrix(product)).sum(0, dtype=dtype)
    return dproduct, (dfactors / norm).to(magnitude.dtype)


def _factors(magnitude: Tensor, norm: Tensor, dtype: torch.dtype) -> Tensor:
    return (magnitude / norm).to(dtype)


class Rescaling(NamedTuple):
    """How dora_linear rescales the rows of a product; a backend may pass its own kernels."""

    forward: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


REFERENCE_RESCALING = Rescaling(rescaled, rescaled_backward)


def dora_linear(
    call: DoraLinearCall,
    functions: LayerFunctions = REFERENCE_LAYERS,
    rescaling: Rescaling = REFERENCE_RESCALING,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [..., out_features] in x.dtype, h [..., r] as in lora_linear, product as y)."""
    product, h = functions.forward(call.x, call.layer)
    return rescaling.forward(product, call.magnitude, call.norm, call.bias), h, product


def dora_linear_backward(
    call: DoraLinearBackward,
    functions: LayerFunctions = REFERENCE_LAYERS,
    rescaling: Rescaling = REFERENCE_RESCALING,
) -> LayerGradients:
    """The gradients that `call.wanted` asks for.

    dproduct   = magnitude / norm * grad, whose gradients are those of lora_linear
    dmagnitude = sum over the tokens of grad * product / norm
    """
    wanted, layer, gradients = call.wanted, call.layer, LayerGradients()
    dproduct, dmagnitude = rescaling.backward(call.grad, call.product, call.magnitude, call.norm)
    of_layer = layer_wanted(wanted)
    if of_layer.any:
        gradients = functions.backward(dproduct, call.x, call.h, layer, of_layer)
    dbias = token_matrix(call.grad).sum(0) if wanted.bias else None
    return replace(gradients, bias=dbias, magnitude=dmagnitude if wanted.magnitude else None)


def layer_wanted(wanted: Wanted) -> Wanted:
    """The gradients that the layer under the rescaling computes: all but magnitude and bias."""
    return Wanted(wanted.x, wanted.weight, wanted.A, wanted.B)
