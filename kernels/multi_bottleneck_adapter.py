"""Bottleneck adapters over a batch in which each token has its own, forward and backward.

    forward     adapter_tokens -> multi_lora_shrink, which gives h -> the activation in torch
                    -> multi_lora_expand, which adds the path to the residual
    backward    the same with the gradient, and multi_lora_weight_grad

The kernels are those of multi_lora_linear, on stacks of the adapters. A stack is a copy, padded
with zeros where adapters differ in size. The bias of the up projection is one more column of it,
whose activation is 1, so that its sum and its gradient come with those of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pylora.calls import Bottleneck, BottleneckGradients, BottleneckWanted
from pylora.kernels.adapter_tokens import AdapterTokens, adapter_tokens
from pylora.kernels.multi_lora_expand import multi_lora_expand
from pylora.kernels.multi_lora_shrink import multi_lora_shrink
from pylora.kernels.multi_lora_weight_grad import multi_lora_weight_grad
from pylora.kernels.precision import lora_operands, output_operands
from pylora.reference.activation import ACTIVATIONS


@dataclass(frozen=True)
class _Stacks:
    """The adapters as stacks, and what the host knows of the tokens of each.

    down        [n, R, H]
    up          [n, H, R + 1]; the last column is the bias
    down_bias   fp32 [n, R]
    scalings    fp32 [n]
    owner       int64 [M], the place of a token's adapter; n without one
    """

    adapters: Sequence[Bottleneck]
    down: Tensor
    up: Tensor
    down_bias: Tensor
    scalings: Tensor
    owner: Tensor
    tokens: AdapterTokens

    @classmethod
    def of(cls, adapters: Sequence[Bottleneck], ids: Tensor) -> _Stacks:
        count, first = len(adapters), adapters[0].down
        size, hidden = max(adapter.size for adapter in adapters), first.shape[1]
        down = first.new_zeros(count, size, hidden)
        up = first.new_zeros(count, hidden, size + 1)
        down_bias = first.new_zeros(count, size, dtype=torch.float32)
        for place, adapter in enumerate(adapters):
            down[place, : adapter.size] = adapter.down
            up[place, :, : adapter.size] = adapter.up
            if adapter.down_bias is not None:
                down_bias[place, : adapter.size] = adapter.down_bias
            if adapter.up_bias is not None:
                up[place, :, size] = adapter.up_bias
        scalings = torch.tensor([adapter.scaling for adapter in adapters], dtype=torch.float32)
        owner = torch.where((ids >= 0) & (ids < count), ids, count)
        tokens = adapter_tokens(ids, count)
        return cls(adapters, down, up, down_bias, scalings.to(ids.device), owner, tokens)

    def bottleneck(self, x: Tensor) -> Tensor:
        """h fp32 [M, R] of x [M, H]; it is undefined for tokens without an adapter."""
        operands = lora_operands(x.dtype, self.down.dtype)
        h = multi_lora_shrink(x, self.down, self.tokens, operands).sum(0)
        return h + self.down_bias[self.owner.clamp(max=len(self.adapters) - 1)]

    def activated(self, h: Tensor) -> Tensor:
        """[act(h) | 1], fp32 [M, R + 1]."""
        a = self._by_activation(lambda name: ACTIVATIONS[name].forward(h))
        return torch.cat([a, a.new_ones(a.shape[0], 1)], 1)

    def slope(self, da: Tensor, h: Tensor) -> Tensor:
        """da * act'(h), fp32 [M, R]."""
        return self._by_activation(lambda name: ACTIVATIONS[name].backward(da, h))

    def _by_activation(self, compute: Callable[[str], Tensor]) -> Tensor:
        """Each token's row of what `compute` makes with the activation of its adapter."""
        first, *others = dict.fromkeys(adapter.activation for adapter in self.adapters)
        result = compute(first)
        for name in others:
            has_it = [adapter.activation == name for adapter in self.adapters]
            own = torch.tensor([*has_it, False], device=self.owner.device)[self.owner]
            result = torch.where(own.unsqueeze(1), compute(name), result)
        return result

    def sums(self, values: Tensor) -> Tensor:
        """The sums of fp32 [M, R] over the tokens of each adapter, [n, R], in a fixed order."""
        places = torch.arange(len(self.adapters), device=values.device).unsqueeze(1)
        own = self.owner == places
        values = torch.where((self.owner < len(self.adapters)).unsqueeze(1), values, 0.0)
        return own.to(values.dtype) @ values


def multi_bottleneck_adapter(
    x: Tensor, residual: Tensor | None, adapters: Sequence[Bottleneck], ids: Tensor
) -> Tensor:
    """y [M, H] in x's dtype.

    x           [M, H], any row stride
    residual    like x, or None; it may be x
    ids         int64 [M]; a token whose id is outside [0, n) gets the residual alone
    """
    M, H = x.shape
    if M == 0:
        return x.new_empty(0, H)
    stacks = _Stacks.of(adapters, ids)
    a = stacks.activated(stacks.bottleneck(x))
    return _expanded(a, residual, x, stacks.up, stacks, rank_first=False)


def _expanded(
    a: Tensor,
    base: Tensor | None,
    x: Tensor,
    factor: Tensor,
    stacks: _Stacks,
    rank_first: bool,
) -> Tensor:
    """base [M, H], or zeros, plus the tokens' low-rank terms; like x."""
    out = x.new_zeros(x.shape) if base is None else x.new_empty(x.shape)
    base = out if base is None else base.contiguous()
    operands = output_operands(x.dtype, factor.dtype)
    scalings, tokens = stacks.scalings, stacks.tokens
    options = {"rank_first": rank_first, "in_place": base is out}
    multi_lora_expand(base[None], out, a[None], factor, scalings, tokens, operands, **options)
    return out


def multi_bottleneck_adapter_backward(
    grad: Tensor,
    x: Tensor,
    adds_x: bool,
    adapters: Sequence[Bottleneck],
    ids: Tensor,
    wanted: Sequence[BottleneckWanted],
) -> tuple[Tensor | None, list[BottleneckGradients]]:
    """(dx [M, H], the gradients of each adapter without x), as far as `wanted` asks for them.

    The arguments are as in the forward; an adapter without tokens gets zeros.
    """
    M, H = x.shape
    stacks = _Stacks.of(adapters, ids)
    size = stacks.down.shape[1]
    ddown = dup = ddown_bias = dx = None
    if M == 0:
        ddown, dup = torch.zeros_like(stacks.down), torch.zeros_like(stacks.up)
        ddown_bias, dx = torch.zeros_like(stacks.down_bias), x.new_empty(0, H)
    else:
        operands = lora_operands(x.dtype, stacks.down.dtype)
        h = stacks.bottleneck(x)
        if any(want.up or want.up_bias for want in wanted):
            dup = torch.zeros_like(stacks.up.mT).contiguous().mT
            arguments = (stacks.activated(h), stacks.scalings, stacks.tokens, operands)
            multi_lora_weight_grad(grad, *arguments, dup.mT)
        if any(want.x or want.down or want.down_bias for want in wanted):
            up = stacks.up[:, :, :size]
            da = multi_lora_shrink(grad, up.mT, stacks.tokens, operands).sum(0)
            dh = stacks.slope(da, h)  # without the scaling, which the kernels multiply by
            if any(want.down for want in wanted):
                ddown = torch.zeros_like(stacks.down)
                multi_lora_weight_grad(x, dh, stacks.scalings, stacks.tokens, operands, ddown)
            if any(want.down_bias for want in wanted):
                ddown_bias = stacks.sums(dh) * stacks.scalings.unsqueeze(1)
            if wanted[0].x:
                base = grad if adds_x else None
                dx = _expanded(dh, base, x, stacks.down, stacks, rank_first=True)
    gradients = []
    for place, (adapter, want) in enumerate(zip(adapters, wanted, strict=True)):
        own = slice(None, adapter.size)
        gradients.append(
            BottleneckGradients(
                down=_part(ddown, want.down, place, own),
                down_bias=_part(ddown_bias, want.down_bias, place, own, adapter.down.dtype),
                up=_part(dup, want.up, place, (slice(None), own)),
                up_bias=_part(dup, want.up_bias, place, (slice(None), size)),
            )
        )
    return dx if wanted[0].x else None, gradients


def _part(
    stack: Tensor | None, want: bool, place: int, part: Any, dtype: torch.dtype | None = None
) -> Tensor | None:
    """A part of an adapter's entry of a stack of gradients, in memory of its own."""
    if stack is None or not want:
        return None
    return stack[place][part].to(dtype or stack.dtype, copy=True).contiguous()
