"""Turns 4-bit layers into dense ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pylora.models.module_tree import Site, is_4bit, sites
from pylora.nn import NF4Linear
from pylora.nn.conv1d import set_dense_weight
from pylora.nn.nf4_linear import frozen


def make_dense(site: Site, dtype: torch.dtype | None = None) -> nn.Module:
    """Replaces the 4-bit layers in a module, or the module itself, by dense ones; returns it.

    dtype    as in `dense_linear`
    """
    dense: dict[int, nn.Module] = {}
    for inner in list(sites(site.module)):
        if is_4bit(inner.module):
            key = id(inner.module)
            if key not in dense:
                dense[key] = dense_linear(inner.module, dtype)
            inner.replace(dense[key])
    if not is_4bit(site.module):
        return site.module
    new = dense_linear(site.module, dtype)
    site.replace(new)
    return new


def dense_linear(
    module: nn.Module, dtype: torch.dtype | None = None, weight: Tensor | None = None
) -> nn.Module:
    """An nn.Linear with the weight of a 4-bit layer, or a Conv1D if it was one before.

    dtype     of its weight and bias, to which decoded values are rounded once; None for the dtype
              that the weight had before it was quantized, and for the bias as it is
    weight    [out_features, in_features], to use instead of the decoded weight

    A bias that has this dtype already is shared.
    """
    layer = module if isinstance(module, NF4Linear) else NF4Linear.from_bitsandbytes(module)
    with torch.device("meta"):
        if layer.conv1d is None:
            linear: Any = nn.Linear(layer.in_features, layer.out_features, bias=False)
        else:
            linear = layer.conv1d(layer.out_features, layer.in_features)
    set_dense_weight(linear, layer.nf4_weight.dequantize(dtype) if weight is None else weight)
    bias: Any = layer.bias
    if bias is not None and dtype is not None and bias.dtype != dtype:
        bias = frozen(bias.detach().to(dtype))
    linear.register_parameter("bias", bias)
    return linear
