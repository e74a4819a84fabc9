"""DoRA: a linear layer whose rows W + scaling B A are rescaled to a trained magnitude.

    y = magnitude / |W + scaling B A| * (x W^T + scaling x A^T B^T) + bias

The norm |...| is taken of each row and has no gradient. Source: DoRA, arXiv:2402.09353.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from pylora import functional
from pylora.backends import extension
from pylora.backends.backend import autocast_off
from pylora.calls import DoraLinearCall, token_matrix
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
            projected = functional.nf4_linear(lora_A, weight).t().float()
        else:
            projected = nn.functional.linear(A.to(weight.dtype), weight).t().float()
        cross = 2 * scaling * (projected * B).sum(1, dtype=torch.float64)
        of_lora = scaling**2 * ((B @ (A @ A.t())) * B).sum(1, dtype=torch.float64)
    return (norm**2 + cross + of_lora).clamp(min=0).sqrt().to(lora_A.dtype)


class DoraCalls:
    """What a layer with DoRA keeps between its calls: the norms, and the checked call over them.

    The norms take as long as a product with as many tokens as the rank. They are the same for each
    token that a model writes, and for each forward between two steps of the optimizer, so they are
    kept on a CPU. On another device a change that torch does not count, such as
    `parameter.data.copy_(...)`, could not be noticed without waiting for the device.
    """

    __slots__ = ("_norms",)

    def __init__(self) -> None:
        self._norms: _Norms | None = None

    def again(self, x: Tensor, scaling: float) -> Tensor | None:
        """The result for x by what is kept; None if anything must be computed or checked first.

        The places given to `linear` must hold the same tensors, which is found out here, and so
        must the norm of the base be the same tensor.
        """
        norms = self._norms
        if norms is None or norms.kept is None or torch.compiler.is_compiling():
            return None
        call = norms.kept.call_with(x)
        if call is None or _state_of(norms.tensors, scaling) != norms.state:
            return None
        return call.run(x, scaling)

    def linear(
        self,
        x: Tensor,
        weight: Tensor | NF4Weight,
        norm: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        magnitude: Tensor,
        bias: Tensor | None,
        places: Callable[[], tuple[Place, ...] | None],
        dropped: Tensor | None = None,
    ) -> Tensor:
        """y [..., out_features] of a layer with DoRA.

        norm       `base_norm(weight)`
        places     returns the places of the tensors of the call in their modules
        dropped    x after dropout, None without dropout; as in PEFT, it is the input of everything
                   that DoRA adds to the base layer
        the others as in `pylora.functional.lora_linear`
        """
        factors = (lora_A, lora_B, scaling)
        norms = self._norms_of(weight, norm, *factors)
        if dropped is not None:
            return _with_dropout(x, dropped, weight, *factors, magnitude / norms.value, bias)
        checked = functional.CALLS["lora_linear"](x, weight, *factors, bias)
        layer = replace(checked.layer, bias=None)  # the bias is not rescaled
        call = DoraLinearCall(checked.x, layer, checked.layer.bias, magnitude, norms.value)
        if not torch.compiler.is_compiling() and norms is self._norms:
            self._norms = norms._replace(kept=Kept.of(places, x, call))
        return run_output(call)

    def _norms_of(
        self,
        weight: Tensor | NF4Weight,
        norm: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
    ) -> _Norms:
        """`adapted_norm` of these arguments, which is kept if it may be."""
        tensors = (norm, lora_A, lora_B)
        on_cpu = lora_A.device.type == "cpu"
        if torch.compiler.is_compiling() or not on_cpu or not only_autograd_watches(tensors):
            return _Norms(adapted_norm(weight, *tensors, scaling), tensors, ())
        norms = self._norms
        if norms is None or not norms.are_of(tensors, scaling):
            state = _state_of(tensors, scaling)
            self._norms = norms = _Norms(adapted_norm(weight, *tensors, scaling), tensors, state)
        return norms


class _Norms(NamedTuple):
    """What is kept of a layer, as one value: threads see either all of it or nothing.

    value      `adapted_norm` of the tensors
    tensors    the norm of the base, lora_A and lora_B
    state      what tells if a factor has changed
    kept       the checked call with these norms, if it may be made again
    """

    value: Tensor
    tensors: tuple[Tensor, ...]
    state: tuple[Any, ...]
    kept: Kept | None = None

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
        state += [version, extension.fingerprint(factor)]
    return tuple(state)


def _with_dropout(
    x: Tensor,
    dropped: Tensor,
    weight: Tensor | NF4Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    rescale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """y with dropout, as PEFT defines it: the base layer, and what DoRA adds, of the dropped x.

    The base layer multiplies both inputs at once, so that its weight is read and decoded once.
    """
    linear = nn.functional.linear
    both = torch.cat((token_matrix(x), token_matrix(dropped)))
    base, of_dropped = _base(both, weight).view(2, *x.shape[:-1], weight.shape[0])
    low_rank = linear(linear(dropped.to(lora_A.dtype), lora_A), lora_B)
    delta = (rescale - 1) * of_dropped + rescale * scaling * low_rank
    y = base if bias is None else base + bias.to(base.dtype)
    return y + delta.to(y.dtype)


def _base(x: Tensor, weight: Tensor | NF4Weight) -> Tensor:
    if isinstance(weight, NF4Weight):
        return functional.nf4_linear(x, weight)
    return nn.functional.linear(x, weight)
