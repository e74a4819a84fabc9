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

from pylora.kernels import configs
from pylora.kernels.epilogue import Epilogue, LowRank
from pylora.kernels.launch import facts
from pylora.kernels.linear_expand import linear_expand
from pylora.kernels.lora_hidden import lora_hidden_backward
from pylora.kernels.lora_linear import Gated, Layer, groups, wide_step
from pylora.kernels.lora_shrink import lora_shrink
from pylora.kernels.lora_weight_grad import lora_weight_grad
from pylora.kernels.nf4_dequantize import launch_nf4_dequantize
from pylora.kernels.nf4_linear_backward import launch_nf4_linear_backward
from pylora.kernels.precision import lora_operands, output_operands
from pylora.kernels.tuning import tuned
from pylora.kernels.weight import NF4Base, weight_kind


class Wanted(NamedTuple):
    """Which gradients of a layer to compute, beside dx."""

    lora_A: bool = False
    lora_B: bool = False
    lora_A_bias: bool = False


class LayerGradients(NamedTuple):
    """None where not wanted."""

    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    lora_A_bias: Tensor | None = None


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


def incoming(layer: Layer, grad: Tensor, K: int, wants_x: bool) -> Incoming:
    """The first step: grad [M, N], any row stride, times lora_B, copied on the way where it must
    be."""
    if layer.lora is None:
        return Incoming(layer, grad)
    left = empty_left(layer, grad, K) if wants_x else None
    operands = lora_operands(grad.dtype, layer.lora.A.dtype)
    (parts,) = lora_shrink(grad, [layer.lora.B], operands, rank_first=False, copy=left)
    return Incoming(layer, grad, parts, left)


def empty_left(layer: Layer, grad: Tensor, K: int) -> Tensor | None:
    """`Incoming.left` to be filled, for a layer that wants one; grad [M, ...] is like it."""
    lora, M = layer.lora, grad.shape[0]
    if lora is None or not layer.extends(K, grad.dtype) or lora.dropout.seed is not None:
        return None
    if not configs.is_large(M, grad.element_size()):
        return None
    return grad.new_empty(M, layer.out_features + wide_step(lora.A.shape[0]))


def nf4_linear_backward(grad: Tensor, weight: NF4Base | Tensor, in_features: int) -> Tensor:
    """grad [M, N], any row stride -> dx [M, in_features] in grad.dtype."""
    if grad.shape[0] == 0:
        return grad.new_empty(0, in_features)
    return _input_gradient([Incoming(Layer(weight, grad.shape[1]), grad)], [None], in_features)


def base_product_backward(
    grad: Tensor, weight: NF4Base | Tensor, in_features: int
) -> tuple[Tensor, bool]:
    """grad [M, N] @ W for a kernel that finishes it; returns what `base_product` does."""
    M, N = grad.shape
    layer = Layer(weight, N).without_straddling(in_features, grad.dtype)
    if configs.is_large(M, grad.element_size()):
        return _by_products([(Incoming(layer, grad), None)], in_features)[None], True
    blocksize = layer.weight.blocksize if isinstance(layer.weight, NF4Base) else 0
    plan = configs.backward_plan(M, [N], in_features, grad.element_size(), blocksize, facts(grad))
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
        lora = one.layer.lora
        if lora is None or one.parts is None:
            hidden.append(None)
            continue
        tail = None if one.left is None else one.left[:, one.layer.out_features :]
        hidden.append(lora_hidden_backward(one.parts, its_h, lora.scaling, lora.activation, tail))
    # 2.
    dh = [None if pair is None else pair[0] for pair in hidden]
    dx = _input_gradient(incoming, dh, x.shape[1]) if wants_x else None
    # 3. The small gradients.
    dlora_A = _gradients_of_lora_A(incoming, x, dh, wanted, gated)
    gradients = []
    for i, (one, pair) in enumerate(zip(incoming, hidden, strict=True)):
        dlora_B = dlora_A_bias = None
        if one.layer.lora is not None and pair is not None:
            dtype = one.layer.lora.A.dtype
            if wanted[i].lora_B:
                operands = lora_operands(x.dtype, dtype)
                (transposed,) = lora_weight_grad(one.grad, [pair[1]], operands)
                dlora_B = transposed.t().to(dtype).contiguous()
            if wanted[i].lora_A_bias:
                dlora_A_bias = pair[0].sum(0).to(dtype)
        gradients.append(LayerGradients(dlora_A.get(i), dlora_B, dlora_A_bias))
    return dx, gradients


def _gradients_of_lora_A(
    incoming: Sequence[Incoming],
    x: Tensor,
    dh: Sequence[Tensor | None],
    wanted: Sequence[Wanted],
    gated: Gated | None,
) -> dict[int, Tensor]:
    """dh^T @ dropout(x) of the layers that want it; those of one dtype in one pass over x."""
    loras = {i: one.layer.lora for i, one in enumerate(incoming)}
    chosen = [(i, lora) for i, lora in loras.items() if lora is not None and wanted[i].lora_A]
    results: dict[int, Tensor] = {}
    for group in groups(chosen, lambda pair: pair[1].A.dtype):
        dtype = group[0][1].A.dtype
        found = lora_weight_grad(
            x,
            [narrow for i, _ in group if (narrow := dh[i]) is not None],
            lora_operands(x.dtype, dtype),
            dropouts=[lora.dropout for _, lora in group],
            up=gated.up if gated is not None else None,
            activation=gated.activation if gated is not None else "identity",
        )
        results |= {i: total.to(dtype) for (i, _), total in zip(group, found, strict=True)}
    return results


def _input_gradient(incoming: Sequence[Incoming], dh: Sequence[Tensor | None], K: int) -> Tensor:
    """dx [M, K], by tiles or by dense products."""
    grad = incoming[0].grad
    pairs = list(zip(incoming, dh, strict=True))
    if configs.is_large(grad.shape[0], grad.element_size()):
        return _by_products(pairs, K)
    pairs = [
        (one._replace(layer=one.layer.without_straddling(K, grad.dtype)), narrow)
        for one, narrow in pairs
    ]
    dx: Tensor | None = None
    for group in groups(pairs, lambda pair: weight_kind(pair[0].layer.weight)):
        found = _by_tiles(group, K)
        dx = found if dx is None else dx.add_(found)
    assert dx is not None
    return dx


Pair = tuple[Incoming, Tensor | None]  # and its dh fp32 [M, R], None without LoRA


def _terms(pairs: Sequence[Pair], dtype: torch.dtype) -> Epilogue:
    """The low-rank terms of dx: dh @ lora_A under the masks."""
    terms, dtypes = [], []
    for one, narrow in pairs:
        if one.layer.lora is not None and narrow is not None:
            lora = one.layer.lora
            terms.append(LowRank(narrow[None], lora.A, dropout=lora.dropout))
            dtypes.append(lora.A.dtype)
    operands = output_operands(dtype, reduce(torch.promote_types, dtypes or [dtype]))
    return Epilogue(terms=terms, rank_first=True, operands=operands)


def _by_tiles(pairs: Sequence[Pair], K: int) -> Tensor:
    """Small and middle M: one launch over the weights, which are of one kind."""
    grads = [one.grad for one, _ in pairs]
    weights = [one.layer.weight for one, _ in pairs]
    sizes = [grad.shape[1] for grad in grads]
    M, dtype = grads[0].shape[0], grads[0].dtype
    blocksize = weights[0].blocksize if isinstance(weights[0], NF4Base) else 0
    rule = configs.backward_plan(M, sizes, K, dtype.itemsize, blocksize, facts(grads[0]))
    epilogue = _terms(pairs, dtype)
    # Several masks take more registers than a tile leaves.
    crowded = len(epilogue.terms) > 1 and epilogue.terms[0].dropout.seed is not None

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


def _by_products(pairs: Sequence[Pair], K: int) -> Tensor:
    """Large M: [grad | dh] @ [W ; lora_A] for each layer, or grad @ W and the low-rank terms at
    the end."""
    dx: Tensor | None = None
    later = []
    for one, narrow in pairs:
        if one.left is not None:
            factors = (one.left, _extended_weight(one.layer, one.left.shape[1], K, one.left.dtype))
        else:
            factors = (one.grad, one.layer.dense(K, one.grad.dtype))
            later.append((one, narrow))
        dx = torch.mm(*factors) if dx is None else dx.addmm_(*factors)
    assert dx is not None
    epilogue = _terms(later, dx.dtype)
    if epilogue.terms:
        linear_expand(dx[None], dx, epilogue)
    return dx


def _extended_weight(layer: Layer, rows: int, K: int, dtype: torch.dtype) -> Tensor:
    """[W ; lora_A ; 0]"""
    assert layer.lora is not None and isinstance(layer.weight, NF4Base)
    A, N = layer.lora.A, layer.out_features
    right = A.new_empty(rows, K, dtype=dtype)
    launch_nf4_dequantize(layer.weight, right[:N])
    right[N : N + A.shape[0]].copy_(A)
    right[N + A.shape[0] :].zero_()
    return right
