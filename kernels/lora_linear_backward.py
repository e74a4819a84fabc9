"""The gradients of lora_linear, for one or several layers of one x: which kernels run, by regime.

dh       lora_shrink (grad @ lora_B) -> lora_hidden_backward
dx       small, middle: nf4_linear_backward over all weights [-> linear_expand where N is split]
         large, NF4, no dropout: a matrix product of [grad | dh] and [W ; lora_A] for each layer
         large otherwise: grad @ W for each layer -> linear_expand with the masks
dlora_A  lora_weight_grad, which reads x once for all layers
dlora_B  lora_weight_grad
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from pylora.calls import Layer, LayerGradients, Wanted
from pylora.kernels import configs
from pylora.kernels.epilogue import Epilogue, Term
from pylora.kernels.launch import facts
from pylora.kernels.layers import (
    Gated,
    dense_weight,
    extends,
    groups,
    low_rank_of,
    wide_step,
    without_straddling,
)
from pylora.kernels.linear_expand import linear_expand
from pylora.kernels.lora_hidden import lora_hidden_backward
from pylora.kernels.lora_shrink import lora_shrink
from pylora.kernels.lora_weight_grad import lora_weight_grad
from pylora.kernels.nf4_dequantize import launch_nf4_dequantize
from pylora.kernels.nf4_linear_backward import launch_nf4_linear_backward
from pylora.kernels.philox import mask_of
from pylora.kernels.precision import lora_operands, output_operands
from pylora.kernels.tuning import tuned
from pylora.kernels.weight import weight_kind


class Incoming(NamedTuple):
    """A layer's share of the backward pass, on its way from grad to dx.

    grad        [M, N], any row stride
    parts       of grad @ lora_B, fp32 [parts, M, R]; None without LoRA
    left        [M, N + columns for LoRA], which begins with grad, where LoRA rides on the product
    """

    layer: Layer
    grad: Tensor
    parts: Tensor | None = None
    left: Tensor | None = None


def incoming(layer: Layer, grad: Tensor, wants_x: bool) -> Incoming:
    """The first step: grad [M, N], any row stride, times lora_B, copied on the way if it must
    be."""
    low = layer.low_rank
    if low is None:
        return Incoming(layer, grad)
    left = empty_left(layer, grad) if wants_x else None
    operands = lora_operands(grad.dtype, low.A.dtype)
    (parts,) = lora_shrink(grad, [low.B], operands, rank_first=False, copy=left)
    return Incoming(layer, grad, parts, left)


def empty_left(layer: Layer, grad: Tensor) -> Tensor | None:
    """`Incoming.left` to be filled, for a layer that wants one; grad [M, ...] is like it."""
    low, M = layer.low_rank, grad.shape[0]
    if low is None or not extends(layer, grad.dtype) or low.dropout is not None:
        return None
    if not configs.is_large(M, grad.element_size()):
        return None
    return grad.new_empty(M, layer.weight.out_features + wide_step(low.rank))


def base_gradient(grad: Tensor, layer: Layer) -> Tensor:
    """grad [M, N], any row stride -> grad @ W [M, in_features] in grad.dtype."""
    if grad.shape[0] == 0:
        return grad.new_empty(0, layer.weight.in_features)
    return _input_gradient([Incoming(layer, grad)], [None])


def base_product_backward(grad: Tensor, layer: Layer) -> tuple[Tensor, bool]:
    """grad [M, N] @ W for a kernel that finishes it; returns what `base_product` does."""
    (M, N), in_features = grad.shape, layer.weight.in_features
    layer = without_straddling(layer, grad.dtype)
    if configs.is_large(M, grad.element_size()):
        return _by_products([(Incoming(layer, grad), None)])[None], True
    blocksize, itemsize = layer.weight.blocksize, grad.element_size()
    plan = configs.backward_plan(M, [N], in_features, itemsize, blocksize, facts(grad))
    dtype = grad.dtype if plan.splits == 1 else torch.float32
    base = grad.new_empty(plan.splits, M, in_features, dtype=dtype)
    launch_nf4_linear_backward([grad], [layer.weight], base, plan, Epilogue())
    return base, plan.splits == 1


def lora_linears_backward(
    incoming: Sequence[Incoming],
    x: Tensor,
    h: Sequence[Tensor],
    wants_x: bool,
    wanted: Sequence[Wanted],
    gated: Gated | None = None,
) -> tuple[Tensor | None, list[LayerGradients]]:
    """dx, the sum over the layers, and the gradients of each; at least one row.

    x [M, K], any row stride; gate where `gated` is given, and dx is then that of act(gate) * up.
    h fp32 [M, R], contiguous.
    """
    # 1. dh and scaling * act(h)
    hidden: list[tuple[Tensor, Tensor] | None] = []
    for one, its_h in zip(incoming, h, strict=True):
        low = one.layer.low_rank
        if low is None or one.parts is None:
            hidden.append(None)
            continue
        tail = None if one.left is None else one.left[:, one.layer.weight.out_features :]
        hidden.append(lora_hidden_backward(one.parts, its_h, low.scaling, low.activation, tail))
    # 2.
    dh = [None if pair is None else pair[0] for pair in hidden]
    dx = _input_gradient(incoming, dh) if wants_x else None
    # 3. The small gradients.
    dlora_A = _gradients_of_lora_A(incoming, x, dh, wanted, gated)
    gradients = []
    for i, (one, pair) in enumerate(zip(incoming, hidden, strict=True)):
        dlora_B = dlora_A_bias = None
        if one.layer.low_rank is not None and pair is not None:
            dtype = one.layer.low_rank.A.dtype
            if wanted[i].B:
                operands = lora_operands(x.dtype, dtype)
                (transposed,) = lora_weight_grad(one.grad, [pair[1]], operands)
                dlora_B = transposed.t().to(dtype).contiguous()
            if wanted[i].A_bias:
                dlora_A_bias = pair[0].sum(0).to(dtype)
        gradients.append(LayerGradients(A=dlora_A.get(i), B=dlora_B, A_bias=dlora_A_bias))
    return dx, gradients


def _gradients_of_lora_A(
    incoming: Sequence[Incoming],
    x: Tensor,
    dh: Sequence[Tensor | None],
    wanted: Sequence[Wanted],
    gated: Gated | None,
) -> dict[int, Tensor]:
    """dh^T @ dropout(x) of the layers that want it; those of one dtype in one pass over x."""
    lows = {i: one.layer.low_rank for i, one in enumerate(incoming)}
    chosen = [(i, low) for i, low in lows.items() if low is not None and wanted[i].A]
    results: dict[int, Tensor] = {}
    for group in groups(chosen, lambda pair: pair[1].A.dtype):
        dtype = group[0][1].A.dtype
        found = lora_weight_grad(
            x,
            [narrow for i, _ in group if (narrow := dh[i]) is not None],
            lora_operands(x.dtype, dtype),
            masks=[mask_of(low.dropout) for _, low in group],
            up=gated.up if gated is not None else None,
            activation=gated.activation if gated is not None else "identity",
        )
        results |= {i: total.to(dtype) for (i, _), total in zip(group, found, strict=True)}
    return results


def _input_gradient(incoming: Sequence[Incoming], dh: Sequence[Tensor | None]) -> Tensor:
    """dx [M, K], by tiles or by dense products."""
    grad = incoming[0].grad
    pairs = list(zip(incoming, dh, strict=True))
    if configs.is_large(grad.shape[0], grad.element_size()):
        return _by_products(pairs)
    pairs = [
        (one._replace(layer=without_straddling(one.layer, grad.dtype)), narrow)
        for one, narrow in pairs
    ]
    dx: Tensor | None = None
    for group in groups(pairs, lambda pair: weight_kind(pair[0].layer.weight)):
        found = _by_tiles(group)
        dx = found if dx is None else dx.add_(found)
    assert dx is not None
    return dx


Pair = tuple[Incoming, Tensor | None]  # and its dh fp32 [M, R], None without LoRA


def _terms(pairs: Sequence[Pair], dtype: torch.dtype) -> Epilogue:
    """The low-rank terms of dx: dh @ lora_A under the masks."""
    terms, dtypes = [], []
    for one, narrow in pairs:
        if one.layer.low_rank is not None and narrow is not None:
            low = one.layer.low_rank
            terms.append(Term(narrow[None], low.A, mask=mask_of(low.dropout)))
            dtypes.append(low.A.dtype)
    operands = output_operands(dtype, reduce(torch.promote_types, dtypes or [dtype]))
    return Epilogue(terms=terms, rank_first=True, operands=operands)


def _by_tiles(pairs: Sequence[Pair]) -> Tensor:
    """Small and middle M: one launch over the weights, which are of one kind."""
    grads = [one.grad for one, _ in pairs]
    weights = [one.layer.weight for one, _ in pairs]
    sizes = [grad.shape[1] for grad in grads]
    M, K, dtype = grads[0].shape[0], weights[0].in_features, grads[0].dtype
    rule = configs.backward_plan(M, sizes, K, dtype.itemsize, weights[0].blocksize, facts(grads[0]))
    epilogue = _terms(pairs, dtype)
    # Several masks take more registers than a tile leaves.
    crowded = len(epilogue.terms) > 1 and epilogue.terms[0].mask.seed is not None

    def run(plan: configs.TilePlan) -> Tensor:
        dx = grads[0].new_empty(M, K)
        if plan.splits == 1 and not crowded:
            launch_nf4_linear_backward(grads, weights, dx, plan, epilogue)
            return dx
        parts = dx[None]
        if plan.splits > 1:
            parts = dx.new_empty(plan.splits, M, K, dtype=torch.float32)
        launch_nf4_linear_backward(grads, weights, parts, plan, Epilogue())
        linear_expand(parts, dx, epilogue)
        return dx

    kind, length = weight_kind(weights[0]), configs.length_of(sizes, rule.tile)
    return run(tuned("nf4_linear_backward", grads[0], (*sizes, K), kind, rule, length, run))


def _by_products(pairs: Sequence[Pair]) -> Tensor:
    """Large M: [grad | dh] @ [W ; lora_A] for each layer, or grad @ W and the low-rank terms at
    the end."""
    dx: Tensor | None = None
    later = []
    for one, narrow in pairs:
        if one.left is not None:
            factors = (one.left, _extended_weight(one.layer, one.left.shape[1], one.left.dtype))
        else:
            factors = (one.grad, dense_weight(one.layer.weight, one.grad.dtype))
            later.append((one, narrow))
        dx = torch.mm(*factors) if dx is None else dx.addmm_(*factors)
    assert dx is not None
    epilogue = _terms(later, dx.dtype)
    if epilogue.terms:
        linear_expand(dx[None], dx, epilogue)
    return dx


def _extended_weight(layer: Layer, rows: int, dtype: torch.dtype) -> Tensor:
    """[W ; lora_A ; 0]"""
    low, (N, K) = low_rank_of(layer), layer.weight.shape
    right = low.A.new_empty(rows, K, dtype=dtype)
    launch_nf4_dequantize(layer.weight, right[:N])
    right[N : N + low.rank].copy_(low.A)
    right[N + low.rank :].zero_()
    return right
