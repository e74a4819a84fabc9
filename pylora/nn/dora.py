"""DoRA: a linear layer whose rows W + scaling B A are rescaled to a trained magnitude.

    y = magnitude / |W + scaling B A| * (x W^T + scaling x A^T B^T) + bias

The norm |...| is taken of each row and has no gradient. Source: DoRA, arXiv:2402.09353.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from pylora import functional
from pylora.backends.backend import autocast_off
from pylora.nf4_weight import NF4Weight
from pylora.nn.kept import Kept, Place
from pylora.ops import run_output
from pylora.ops.registration import only_autograd_watches


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


class DoraCalls:
    """What a layer with DoRA keeps between its calls: a checked product, and the norms.

    The norms take as long as a product with as many tokens as the rank. They are the same for each
    token that a model writes, so calls without gradients keep them, on a CPU. The sums of both
    factors tell of a change that torch does not count, such as `parameter.data.copy_(...)`.
    """

    __slots__ = ("_kept", "_norms")

    def __init__(self) -> None:
        self._kept: Kept | None = None
        self._norms: _Norms | None = None

    def again(
        self,
        x: Tensor,
        norm: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        magnitude: Tensor,
        bias: Tensor | None,
    ) -> Tensor | None:
        """The result for x by what is kept; None if anything must be computed or checked first."""
        kept, norms = self._kept, self._norms
        if kept is None or norms is None:
            return None
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        call = kept.call_with(x)
        if call is None or not norms.are_of((norm, lora_A, lora_B), scaling):
            return None
        return _rescaled(call.run(x, scaling), magnitude / norms.value, bias)

    def norm(
        self,
        weight: Tensor | NF4Weight,
        norm: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
    ) -> Tensor:
        """`adapted_norm` of these arguments."""
        if torch.compiler.is_compiling():
            return adapted_norm(weight, norm, lora_A, lora_B, scaling)
        tensors = (norm, lora_A, lora_B)
        on_cpu = lora_A.device.type == "cpu"
        if torch.is_grad_enabled() or not on_cpu or not only_autograd_watches(tensors):
            self._norms = None
            return adapted_norm(weight, norm, lora_A, lora_B, scaling)
        norms = self._norms
        if norms is None or not norms.are_of(tensors, scaling):
            value = adapted_norm(weight, norm, lora_A, lora_B, scaling)
            self._norms = norms = _Norms(value, tensors, _state_of(tensors, scaling))
        return norms.value

    def linear(
        self,
        x: Tensor,
        weight: Tensor | NF4Weight,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        rescale: Tensor,
        bias: Tensor | None,
        places: Callable[[], tuple[Place, ...] | None],
        dropped: Tensor | None = None,
    ) -> Tensor:
        """y [..., out_features] of a layer with DoRA.

        rescale    magnitude / |W + scaling B A| [out_features]
        places     returns the places of the weight and of both factors in their modules
        dropped    x after dropout, None without dropout; as in PEFT, it is the input of everything
                   that DoRA adds to the base layer
        the others as in `pylora.functional.lora_linear`
        """
        if dropped is not None:
            linear = nn.functional.linear
            low_rank = linear(linear(dropped.to(lora_A.dtype), lora_A), lora_B)
            delta = (rescale - 1) * _base(dropped, weight) + rescale * scaling * low_rank
            y = _base(x, weight, bias)
            return y + delta.to(y.dtype)
        compiling = torch.compiler.is_compiling()
        call = None if compiling or self._kept is None else self._kept.call_with(x)
        if call is not None:
            return _rescaled(call.run(x, scaling), rescale, bias)
        record = functional.CALLS["lora_linear"](x, weight, lora_A, lora_B, scaling)
        if not compiling:
            self._kept = Kept.of(places, x, record)
        return _rescaled(run_output(record), rescale, bias)


class _Norms(NamedTuple):
    """What `adapted_norm` has returned, and for what: threads see either all of it or nothing."""

    value: Tensor
    tensors: tuple[Tensor, ...]
    state: tuple[Any, ...]

    def are_of(self, tensors: tuple[Tensor, ...], scaling: float) -> bool:
        """True if these are the same tensors, and have not changed."""
        for now, then in zip(tensors, self.tensors, strict=True):
            if now is not then:
                return False
        return _state_of(tensors, scaling) == self.state


def _state_of(tensors: tuple[Tensor, ...], scaling: float) -> tuple[Any, ...]:
    """Numbers, of which a change of the scaling or of a factor changes one or more."""
    _, *factors = tensors  # a change of the base weight makes another tensor of its norms
    state: list[Any] = [scaling]
    for factor in factors:
        version = 0 if factor.is_inference() else factor._version
        total = factor.sum(dtype=torch.promote_types(factor.dtype, torch.float32))
        state += [version, factor.data_ptr(), total.item()]
    return tuple(state)


def _rescaled(y: Tensor, rescale: Tensor, bias: Tensor | None) -> Tensor:
    y = y * rescale.to(y.dtype)  # under autocast, y has another dtype than x
    return y if bias is None else y + bias.to(y.dtype)


def _base(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None = None) -> Tensor:
    if isinstance(weight, NF4Weight):
        return functional.nf4_linear(x, weight, bias)
    return nn.functional.linear(x, weight, bias)
