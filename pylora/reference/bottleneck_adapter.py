"""A bottleneck adapter, forward and backward, in pure PyTorch.

    n = norm_before(x)                               x itself without a norm
    h = n @ down^T + down_bias                       [..., bottleneck]
    z = scaling * (act(h) @ up^T + up_bias)          [..., hidden]
    y = residual + norm_after(dropout(z))            its mask is regenerated from a seed

This is the adapter of Houlsby et al. (arXiv:1902.00751), with the scaling of He et al.
(arXiv:2110.04366) and with norms and dropout in the places that the `adapters` library gives them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from pylora.calls import (
    Bottleneck,
    BottleneckAdapterBackward,
    BottleneckAdapterCall,
    BottleneckGradients,
    token_matrix,
)
from pylora.reference.activation import ACTIVATIONS
from pylora.reference.dropout import dropout
from pylora.reference.normalization import normalized, normalized_backward


def _input(x: Tensor, adapter: Bottleneck) -> Tensor:
    """What the down projection takes, in the dtype of the adapter."""
    before = adapter.norm_before
    return (x if before is None else normalized(x, before)).to(adapter.down.dtype)


def _activated(h: Tensor, adapter: Bottleneck) -> Tensor:
    return ACTIVATIONS[adapter.activation].forward(h)


def _expanded(a: Tensor, adapter: Bottleneck) -> Tensor:
    """dropout(scaling * (a @ up^T + up_bias)); the scaling multiplies the small operands."""
    bias = None if adapter.up_bias is None else adapter.up_bias * adapter.scaling
    return dropout(linear(a * adapter.scaling, adapter.up, bias), adapter.dropout)


def adapter_path(x: Tensor, adapter: Bottleneck) -> Tensor:
    """y without the residual; nothing is done in place."""
    h = linear(_input(x, adapter), adapter.down, adapter.down_bias)
    z = _expanded(_activated(h, adapter), adapter)
    return z if adapter.norm_after is None else normalized(z, adapter.norm_after)


def bottleneck_adapter(call: BottleneckAdapterCall) -> Tensor:
    """y [..., hidden] in x.dtype."""
    x, adapter = call.x, call.adapter
    residual = x if call.adds_x else call.residual
    if residual is None:
        return adapter_path(x, adapter).to(x.dtype)
    plain = adapter.norm_after is None and adapter.dropout is None
    if not plain or adapter.up.dtype != residual.dtype:
        return (residual + adapter_path(x, adapter)).to(x.dtype)
    # Here y is the only matrix of its size.
    h = linear(_input(token_matrix(x), adapter), adapter.down, adapter.down_bias)
    a = _activated(h, adapter)
    y = torch.addmm(token_matrix(residual), a, adapter.up.t(), alpha=adapter.scaling)
    if adapter.up_bias is not None:
        y.add_(adapter.up_bias, alpha=adapter.scaling)
    return y.view(x.shape)


def bottleneck_adapter_backward(call: BottleneckAdapterBackward) -> BottleneckGradients:
    """The gradients that `call.wanted` asks for.

    dz         = mask / (1 - p) * norm_after'(grad)
    dup        = scaling * dz^T @ act(h)
    dh         = (scaling * dz @ up) * act'(h)
    ddown      = dh^T @ n
    dx         = norm_before'(dh @ down), plus grad if x is the residual
    """
    adapter, wanted = call.adapter, call.wanted
    x, grad = token_matrix(call.x), token_matrix(call.grad)
    dtype, scaling = adapter.down.dtype, adapter.scaling
    n = _input(x, adapter)
    h = linear(n, adapter.down, adapter.down_bias)
    a = _activated(h, adapter)

    dz, dafter_weight, dafter_bias = grad, None, None
    if adapter.norm_after is not None:
        of_after = normalized_backward(grad, _expanded(a, adapter), adapter.norm_after)
        dz, dafter_weight, dafter_bias = of_after
    dz = dropout(dz.to(dtype), adapter.dropout)
    dup = dz.t() @ (a * scaling) if wanted.up else None
    dup_bias = dz.sum(0) * scaling if wanted.up_bias else None

    dh = ACTIVATIONS[adapter.activation].backward(dz @ adapter.up * scaling, h)
    ddown = dh.t() @ n if wanted.down else None
    ddown_bias = dh.sum(0) if wanted.down_bias else None
    before = adapter.norm_before
    dx, dbefore_weight, dbefore_bias = None, None, None
    if wanted.x and call.adds_x and before is None and dtype == x.dtype:
        dx = torch.addmm(grad, dh, adapter.down)
    elif wanted.x or wanted.before_weight or wanted.before_bias:
        dx = dh @ adapter.down
        if before is not None:
            dx, dbefore_weight, dbefore_bias = normalized_backward(dx, x, before)
        dx = (dx + grad if call.adds_x else dx).to(x.dtype)
    return BottleneckGradients(
        x=dx.view(call.x.shape) if dx is not None and wanted.x else None,
        down=ddown,
        down_bias=ddown_bias,
        up=dup,
        up_bias=dup_bias,
        before_weight=dbefore_weight if wanted.before_weight else None,
        before_bias=dbefore_bias if wanted.before_bias else None,
        after_weight=dafter_weight if wanted.after_weight else None,
        after_bias=dafter_bias if wanted.after_bias else None,
    )
