"""Bottleneck adapters over a batch in which each token has its own, or none, in pure PyTorch.

    y[m] = residual[m] + scaling_i * (act_i(x[m] @ down_i^T + down_bias_i) @ up_i^T + up_bias_i)

with i = adapter_ids[m]. A token without an adapter gets the residual alone. Nothing of one adapter,
not even a NaN, reaches the tokens or the gradients of another. This is what the `adapters` library
calls BatchSplit (Pfeiffer et al., arXiv:2007.07779).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pylora.calls import (
    Bottleneck,
    BottleneckAdapterBackward,
    BottleneckAdapterCall,
    BottleneckGradients,
    BottleneckWanted,
    MultiBottleneckBackward,
    MultiBottleneckCall,
    token_matrix,
)
from pylora.reference.adapter_groups import check_adapter_ids, selections
from pylora.reference.bottleneck_adapter import bottleneck_adapter, bottleneck_adapter_backward


@dataclass(frozen=True)
class AdapterFunctions:
    """How the tokens of one adapter run.

    Both functions take a call and a contiguous tensor of x's shape or None. They may write y or dx
    into it, which is then that tensor in their result.
    """

    forward: Callable[[BottleneckAdapterCall, Tensor | None], Tensor]
    backward: Callable[[BottleneckAdapterBackward, Tensor | None], BottleneckGradients]


REFERENCE_ADAPTERS = AdapterFunctions(
    lambda call, out: bottleneck_adapter(call), lambda call, out: bottleneck_adapter_backward(call)
)


def multi_bottleneck_adapter(
    call: MultiBottleneckCall, run: AdapterFunctions = REFERENCE_ADAPTERS
) -> Tensor:
    """y [..., hidden] in x.dtype.

    run    how the tokens of one adapter run
    """
    check_adapter_ids(call.ids, len(call.adapters))
    x = token_matrix(call.x)
    residual = None if call.residual is None else token_matrix(call.residual)
    y = _without_adapters(x if call.adds_x else residual, x, call.ids)
    for group in selections(call.ids, len(call.adapters)):
        own_residual = None if residual is None else group.gathered(residual)
        adapter = call.adapters[group.adapter]
        one = BottleneckAdapterCall(group.gathered(x), own_residual, call.add_residual, adapter)
        own_y = group.view_of(y)
        result = run.forward(one, own_y)
        if result is not own_y:
            group.put(y, result)
    return y.view(call.x.shape)


def multi_bottleneck_adapter_backward(
    call: MultiBottleneckBackward, run: AdapterFunctions = REFERENCE_ADAPTERS
) -> tuple[Tensor | None, list[BottleneckGradients]]:
    """(dx, the gradients of each adapter without x) as far as `call.wanted` asks for them.

    An adapter that no token has gets zeros.
    """
    x, grad = token_matrix(call.x), token_matrix(call.grad)
    dx = None
    if call.wanted[0].x:
        dx = _without_adapters(grad if call.adds_x else None, x, call.ids)
    gradients = [
        _zeros(adapter, want) for adapter, want in zip(call.adapters, call.wanted, strict=True)
    ]
    for group in selections(call.ids, len(call.adapters)):
        adapter, want = call.adapters[group.adapter], call.wanted[group.adapter]
        own_grad, own_x = group.gathered(grad), group.gathered(x)
        own_dx = None if dx is None else group.view_of(dx)
        one = BottleneckAdapterBackward(own_grad, own_x, call.adds_x, adapter, want)
        of = run.backward(one, own_dx)
        if dx is not None and of.x is not None and of.x is not own_dx:
            group.put(dx, of.x)
        gradients[group.adapter] = replace(of, x=None)
    return None if dx is None else dx.view(call.x.shape), gradients


def _without_adapters(alone: Tensor | None, x: Tensor, ids: Tensor) -> Tensor:
    """A tensor like x [tokens, hidden] that holds `alone`, or zeros, for tokens without an adapter.

    On a CPU the rows of other tokens are not initialized.
    """
    if ids.device.type != "cpu":
        out = x.new_zeros(x.shape)
        return out if alone is None else out.copy_(alone)
    out = x.new_empty(x.shape)
    if (outside := (ids < 0).nonzero()[:, 0]).numel():
        out[outside] = 0.0 if alone is None else alone[outside]
    return out


def _zeros(adapter: Bottleneck, want: BottleneckWanted) -> BottleneckGradients:
    def zeros(tensor: Tensor | None, wanted: bool) -> Tensor | None:
        return torch.zeros_like(tensor) if wanted and tensor is not None else None

    return BottleneckGradients(
        down=zeros(adapter.down, want.down),
        down_bias=zeros(adapter.down_bias, want.down_bias),
        up=zeros(adapter.up, want.up),
        up_bias=zeros(adapter.up_bias, want.up_bias),
    )
