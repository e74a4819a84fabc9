"""lora_linear, lora_qkv and lora_mlp of the triton backend: the ops' arguments as the layers that
`pylora.kernels.lora_linear` runs.

The kernels are imported when an op first needs them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pylora.backends.backend import DENSE, Reason
from pylora.reference.activation import GATED_ACTIVATIONS
from pylora.reference.projections import (
    Gradients,
    OneProjection,
    Projections,
    collected,
    projection_seed,
    wanted_of,
)
from pylora.reference.rows import as_rows


def rows(x: Tensor) -> Tensor:
    """[..., features] as a matrix whose rows may be apart, but not their elements."""
    flat = as_rows(x)
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def base(args: tuple[Any, ...]) -> Any:
    """The weight from its seven arguments: NF4, or the dense tensor where absmax is None."""
    from pylora.kernels.weight import NF4Base

    return args[0].contiguous() if args[1] is None else NF4Base(*args)


def _layers(projections: Projections, p: float, seed: Tensor | None) -> list[Any]:
    from pylora.kernels.lora_linear import Layer, LoRA
    from pylora.kernels.philox import seeded_dropout

    layers = []
    for index in range(len(projections.weight)):
        one = projections.one(index)
        lora = None
        if one.has_lora:
            dropout = seeded_dropout(p, projection_seed(seed, index) if p else None)
            lora = LoRA(one.lora_A, one.lora_B, None, None, one.scaling, dropout, "identity")
        layers.append(Layer(base(one.base), one.out_features, one.bias, lora))
    return layers


def _like(h: Tensor, x: Tensor) -> Tensor:
    """h [M, R] with the leading dimensions of x; [0] without LoRA."""
    return h.view(*x.shape[:-1], h.shape[-1]) if h.dim() == 2 else h


def _rows_of(h: Tensor) -> Tensor:
    """The inverse of `_like`."""
    return h if h.shape == (0,) else rows(h)


def lora_qkv(x: Tensor, *args: Any) -> tuple[list[Tensor], list[Tensor]]:
    from pylora.kernels.lora_linear import lora_linears

    *parts, p, seed = args
    results = lora_linears(rows(x), _layers(Projections(*parts), p, seed))
    y = [y.view(*x.shape[:-1], y.shape[-1]) for y, _ in results]
    return y, [_like(h, x) for _, h in results]


def lora_qkv_backward(grad: list[Tensor], x: Tensor, h: list[Tensor], *args: Any) -> Gradients:
    from pylora.kernels.lora_linear_backward import incoming, lora_linears_backward

    *parts, p, seed, output_mask = args
    projections, wants_x = Projections(*parts), output_mask[0]
    wanted = [wanted_of(output_mask, index, wants_x) for index in range(len(grad))]
    flat_x, grads = rows(x), list(map(rows, grad))
    arriving = [
        incoming(layer, grad, x.shape[-1], wants_x)
        for layer, grad in zip(_layers(projections, p, seed), grads, strict=True)
    ]
    dx, found = lora_linears_backward(
        arriving, flat_x, list(map(_rows_of, h)), wants_x, list(map(_low_rank, wanted))
    )
    gradients = [
        _collect(x, projections.one(i), wanted[i], found[i], grads[i], flat_x)
        for i in range(len(grad))
    ]
    return collected(x.new_empty(0) if dx is None else dx.view(x.shape), gradients)


def lora_mlp(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    from pylora.kernels.lora_mlp import lora_mlp

    *parts, p, seed, activation = args
    layers = _layers(Projections(*parts), p, seed)
    y, gate, up, h = lora_mlp(rows(x), layers, activation)
    y, gate, up = (t.view(*x.shape[:-1], t.shape[-1]) for t in (y, gate, up))
    return y, gate, up, [_like(one, x) for one in h]


def lora_mlp_backward(
    grad: Tensor, x: Tensor, gate: Tensor, up: Tensor, h: list[Tensor], *args: Any
) -> Gradients:
    from pylora.kernels.lora_mlp import lora_mlp_backward

    *parts, p, seed, activation, output_mask = args
    projections, wants_x = Projections(*parts), output_mask[0]
    wanted = [wanted_of(output_mask, index, wants_x) for index in (0, 1)]
    wants_inner = any(map(any, wanted))
    wanted.append(wanted_of(output_mask, 2, wants_inner))
    flat_x, flat_gate, flat_up = (rows(t) for t in (x, gate, up))
    dx, inner, found = lora_mlp_backward(
        rows(grad),
        flat_x,
        flat_gate,
        flat_up,
        list(map(_rows_of, h)),
        _layers(projections, p, seed),
        activation,
        wants_x,
        wants_inner,
        list(map(_low_rank, wanted)),
    )
    hidden = flat_x
    if wanted[2][1]:
        hidden = GATED_ACTIVATIONS[activation].forward(flat_gate) * flat_up
    grads = [*(inner or [flat_gate, flat_up]), rows(grad)]
    inputs = [flat_x, flat_x, hidden]
    gradients = [
        _collect(x, projections.one(i), wanted[i], found[i], grads[i], inputs[i]) for i in range(3)
    ]
    return collected(x.new_empty(0) if dx is None else dx.view(x.shape), gradients)


def _low_rank(wanted: list[bool]) -> Any:
    from pylora.kernels.lora_linear_backward import Wanted

    _, _, lora_A, lora_B, _ = wanted
    return Wanted(lora_A, lora_B)


def _collect(
    x: Tensor, one: OneProjection, wanted: list[bool], found: Any, grad: Tensor, input_: Tensor
) -> list[Tensor]:
    """(dx, dweight, dlora_A, dlora_B, dbias) of a projection: dx is the op's, and left empty."""
    _, wants_weight, _, _, wants_bias = wanted
    dbias = None
    if wants_bias and one.bias is not None:
        dbias = grad.sum(0, dtype=torch.float32).to(one.bias.dtype)
    results = (None, grad.t() @ input_ if wants_weight else None, found[0], found[1], dbias)
    return [x.new_empty(0) if result is None else result for result in results]


def projections_why_not(tensors_why_not: Any, x: Tensor, *args: Any) -> Reason:
    """None where the layers are the kernels' business, else the reason."""
    projections = Projections(*args[: len(Projections._fields)])
    tensors = {"x": x}
    ones = [projections.one(index) for index in range(len(projections.weight))]
    if not any(one.has_lora or one.base[1] is not None for one in ones):
        return DENSE
    for index, one in enumerate(ones):
        if one.has_lora:
            tensors |= {f"lora_A[{index}]": one.lora_A, f"lora_B[{index}]": one.lora_B}
    return tensors_why_not(**tensors)
