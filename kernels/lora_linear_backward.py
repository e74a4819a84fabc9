"""Backward host code of layers with LoRA: it chooses which kernels run, by the regime of M.

It takes one layer, or several layers of one x:

    dh       lora_shrink (grad @ lora_B) -> lora_hidden_backward
    dx       small, middle: linear_tiles_backward over all weights [-> linear_expand if N is split]
             large, NF4, no dropout: for each layer a dense product of [grad | dh] and [W ; lora_A]
             large otherwise: grad @ W for each layer -> linear_expand with the dropout masks
    dlora_A  lora_weight_grad, which reads x once for all layers
    dlora_B  lora_weight_grad
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from pylora.calls import Layer, LayerGradients, Wanted, Weight
from pylora.kernels import configs
from pylora.kernels.epilogue import Epilogue, Term
from pylora.kernels.launch import facts
from pylora.kernels.layers import (
    Gated,
    dense_weight,
    extends,
    grouped,
    low_rank_of,
    padded_rank,
    without_straddling,
)
from pylora.kernels.linear_expand import linear_expand
from pylora.kernels.linear_tiles_backward import launch_linear_tiles_backward
from pylora.kernels.lora_hidden import lora_hidden_backward
from pylora.kernels.lora_shrink import lora_shrink
from pylora.kernels.lora_weight_grad import lora_weight_grad
from pylora.kernels.nf4_dequantize import launch_nf4_dequantize
from pylora.kernels.philox import mask_of
from pylora.kernels.precision import lora_operands, output_operands
from pylora.kernels.tuning import tuned
from pylora.kernels.weight import weight_key


class StartedBackward(NamedTuple):
    """The backward pass of one layer after its first step, which has read grad.

    grad        [M, N], any row stride
    partials    fp32 [splits, M, R], whose sum is grad @ lora_B; None without LoRA
    left        [M, N + padded rank], the left operand [grad | dh] of a dense product, with grad in
                it and dh still to come; None if no dense product carries this layer's LoRA
    """

    layer: Layer
    grad: Tensor
    partials: Tensor | None = None
    left: Tensor | None = None


def start_backward(layer: Layer, grad: Tensor, wants_x: bool) -> StartedBackward:
    """Multiplies grad [M, N], any row stride, by lora_B, and copies it if dx needs a copy."""
    low = layer.low_rank
    if low is None:
        return StartedBackward(layer, grad)
    left = empty_left(layer, grad) if wants_x else None
    operands = lora_operands(grad.dtype, low.A.dtype)
    (partials,) = lora_shrink(grad, [low.B], operands, rank_first=False, copy=left)
    return StartedBackward(layer, grad, partials, left)


def empty_left(layer: Layer, grad: Tensor) -> Tensor | None:
    """An empty `StartedBackward.left`; None if the layer needs none.

    grad    [M, ...], gives the number of tokens, the dtype and the device
    """
    low, M = layer.low_rank, grad.shape[0]
    if low is None or not extends(layer, grad.dtype) or low.dropout is not None:
        return None
    if not configs.is_large(M, grad.element_size()):
        return None
    return grad.new_empty(M, layer.weight.out_features + padded_rank(low.rank))


def base_gradient(grad: Tensor, weight: Weight) -> Tensor:
    """grad [M, N], any row stride -> grad @ W [M, in_features] in grad.dtype."""
    if grad.shape[0] == 0:
        return grad.new_empty(0, weight.in_features)
    return _input_gradient([StartedBackward(Layer(weight), grad)], [None])


def base_product_backward(grad: Tensor, layer: Layer) -> tuple[Tensor, bool]:
    """grad [M, N] @ W for a kernel that adds more to it; M >= 1.

    Returns ([1, M, in_features] in grad.dtype, True) if the product is finished, or (fp32 partials
    [splits, M, in_features], False) if their sum is still to be added up.
    """
    (M, N), in_features = grad.shape, layer.weight.in_features
    layer = without_straddling(layer, grad.dtype)
    if configs.is_large(M, grad.element_size()):
        return _by_products([(StartedBackward(layer, grad), None)])[None], True
    blocksize, itemsize = layer.weight.blocksize, grad.element_size()
    plan = configs.backward_plan(M, [N], in_features, itemsize, blocksize, facts(grad))
    dtype = grad.dtype if plan.splits == 1 else torch.float32
    base = grad.new_empty(plan.splits, M, in_features, dtype=dtype)
    launch_linear_tiles_backward([grad], [layer.weight], base, plan, Epilogue())
    return base, plan.splits == 1


def lora_linear_backward(
    grad: Tensor, x: Tensor, h: Tensor, layer: Layer, wanted: Wanted
) -> LayerGradients:
    """The gradients of x, A, B and A_bias of one layer with LoRA, those of them that are wanted.

    grad [M, N] and x [M, K] may have any row stride; h is fp32 [M, R] and contiguous.
    """
    started = start_backward(layer, grad, wanted.x)
    dx, (gradients,) = lora_linears_backward([started], x, [h], wanted.x, [wanted])
    return gradients.with_x(dx)


def lora_linears_backward(
    started: Sequence[StartedBackward],
    x: Tensor,
    hs: Sequence[Tensor],
    wants_x: bool,
    wanted: Sequence[Wanted],
    gated: Gated | None = None,
) -> tuple[Tensor | None, list[LayerGradients]]:
    """(dx, the gradients of A, B and A_bias of each layer); dx is the sum over the layers.

    x        [M, K], any row stride, M >= 1
    hs       fp32 [M, R] of each layer with LoRA, contiguous
    gated    if given, x is the gate of a gated MLP, and dx is the gradient of act(x) * gated.up
    """
    # 1. dh and scaling * act(h)
    hidden: list[tuple[Tensor, Tensor] | None] = []
    for share, h in zip(started, hs, strict=True):
        low = share.layer.low_rank
        if low is None or share.partials is None:
            hidden.append(None)
            continue
        tail = None if share.left is None else share.left[:, share.layer.weight.out_features :]
        hidden.append(lora_hidden_backward(share.partials, h, low.scaling, low.activation, tail))
    # 2. dx
    dh = [None if pair is None else pair[0] for pair in hidden]
    dx = _input_gradient(started, dh) if wants_x else None
    # 3. The gradients of lora_A, lora_B and lora_A_bias
    dlora_A = _gradients_of_lora_A(started, x, dh, wanted, gated)
    gradients = []
    for i, (share, pair) in enumerate(zip(started, hidden, strict=True)):
        dlora_B = dlora_A_bias = None
        if share.layer.low_rank is not None and pair is not None:
            dtype = share.layer.low_rank.A.dtype
            if wanted[i].B:
                operands = lora_operands(x.dtype, dtype)
                (transposed,) = lora_weight_grad(share.grad, [pair[1]], operands)
                dlora_B = transposed.t().to(dtype).contiguous()
            if wanted[i].A_bias:
                dlora_A_bias = pair[0].sum(0).to(dtype)
        gradients.append(LayerGradients(A=dlora_A.get(i), B=dlora_B, A_bias=dlora_A_bias))
    return dx, gradients


def _gradients_of_lora_A(
    started: Sequence[StartedBackward],
    x: Tensor,
    dh: Sequence[Tensor | None],
    wanted: Sequence[Wanted],
    gated: Gated | None,
) -> dict[int, Tensor]:
    """dh^T @ dropout(x) by the number of each layer that wants it.

    One pass over x serves all layers whose LoRA weights have the same dtype.
    """
    lows = {i: share.layer.low_rank for i, share in enumerate(started)}
    chosen = [(i, low) for i, low in lows.items() if low is not None and wanted[i].A]
    results: dict[int, Tensor] = {}
    for group in grouped(chosen, lambda pair: pair[1].A.dtype):
        dtype = group[0][1].A.dtype
        totals = lora_weight_grad(
            x,
            [layer_dh for i, _ in group if (layer_dh := dh[i]) is not None],
            lora_operands(x.dtype, dtype),
            masks=[mask_of(low.dropout) for _, low in group],
            up=gated.up if gated is not None else None,
            activation=gated.activation if gated is not None else "identity",
        )
        results |= {i: total.to(dtype) for (i, _), total in zip(group, totals, strict=True)}
    return results


# One layer's backward pass and its dh fp32 [M, R], which is None without LoRA.
Pair = tuple[StartedBackward, Tensor | None]


def _input_gradient(started: Sequence[StartedBackward], dh: Sequence[Tensor | None]) -> Tensor:
    """dx [M, K], the sum over the layers, by fused tiles or by dense products."""
    grad = started[0].grad
    pairs = list(zip(started, dh, strict=True))
    if configs.is_large(grad.shape[0], grad.element_size()):
        return _by_products(pairs)
    pairs = [
        (share._replace(layer=without_straddling(share.layer, grad.dtype)), layer_dh)
        for share, layer_dh in pairs
    ]
    dx: Tensor | None = None
    for group in grouped(pairs, lambda pair: weight_key(pair[0].layer.weight)):
        group_dx = _by_tiles(group)
        dx = group_dx if dx is None else dx.add_(group_dx)
    assert dx is not None
    return dx


def _terms(pairs: Sequence[Pair], dtype: torch.dtype) -> Epilogue:
    """An epilogue with the low-rank terms of dx: dh @ lora_A under the dropout masks."""
    terms, dtypes = [], []
    for share, layer_dh in pairs:
        if share.layer.low_rank is not None and layer_dh is not None:
            low = share.layer.low_rank
            terms.append(Term(layer_dh[None], low.A, mask=mask_of(low.dropout)))
            dtypes.append(low.A.dtype)
    operands = output_operands(dtype, reduce(torch.promote_types, dtypes or [dtype]))
    return Epilogue(terms=terms, rank_first=True, operands=operands)


def _by_tiles(pairs: Sequence[Pair]) -> Tensor:
    """Small and middle M: one launch sums over weights that have the same `weight_key`."""
    grads = [share.grad for share, _ in pairs]
    weights = [share.layer.weight for share, _ in pairs]
    sizes = [grad.shape[1] for grad in grads]
    M, K, dtype = grads[0].shape[0], weights[0].in_features, grads[0].dtype
    rule = configs.backward_plan(M, sizes, K, dtype.itemsize, weights[0].blocksize, facts(grads[0]))
    epilogue = _terms(pairs, dtype)
    # Several masks need more registers than a tile leaves free.
    crowded = len(epilogue.terms) > 1 and epilogue.terms[0].mask.seed is not None

    def run(plan: configs.TilePlan) -> Tensor:
        dx = grads[0].new_empty(M, K)
        if plan.splits == 1 and not crowded:
            launch_linear_tiles_backward(grads, weights, dx, plan, epilogue)
            return dx
        partials = dx[None]
        if plan.splits > 1:
            partials = dx.new_empty(plan.splits, M, K, dtype=torch.float32)
        launch_linear_tiles_backward(grads, weights, partials, plan, Epilogue())
        linear_expand(partials, dx, epilogue)
        return dx

    key, length = weight_key(weights[0]), configs.length_of(sizes, rule.tile)
    return run(tuned("linear_tiles_backward", grads[0], (*sizes, K), key, rule, length, run))


def _by_products(pairs: Sequence[Pair]) -> Tensor:
    """Large M: the sum over the layers of [grad | dh] @ [W ; lora_A], or of grad @ W.

    The low-rank terms of the layers of the second form are added at the end.
    """
    dx: Tensor | None = None
    without_term = []
    for share, layer_dh in pairs:
        if share.left is not None:
            width = share.left.shape[1]
            factors = (share.left, _extended_weight(share.layer, width, share.left.dtype))
        else:
            factors = (share.grad, dense_weight(share.layer.weight, share.grad.dtype))
            without_term.append((share, layer_dh))
        dx = torch.mm(*factors) if dx is None else dx.addmm_(*factors)
    assert dx is not None
    epilogue = _terms(without_term, dx.dtype)
    if epilogue.terms:
        linear_expand(dx[None], dx, epilogue)
    return dx


def _extended_weight(layer: Layer, rows: int, dtype: torch.dtype) -> Tensor:
    """[W ; lora_A ; 0], a matrix [rows, in_features] in `dtype`."""
    low, (N, K) = low_rank_of(layer), layer.weight.shape
    right = low.A.new_empty(rows, K, dtype=dtype)
    launch_nf4_dequantize(layer.weight, right[:N])
    right[N : N + low.rank].copy_(low.A)
    right[N + low.rank :].zero_()
    return right
