"""Forward host code of a layer with LoRA: it chooses which kernels run, by the regime of M.

    h = dropout(x) @ lora_A^T + lora_A_bias
    y = x @ W^T + bias + scaling * (act(h) @ lora_B^T + lora_B_bias)

It takes one layer, or several layers of one x (lora_qkv, gate and up of lora_mlp):

    small, middle   lora_shrink -> linear_tiles [-> linear_expand if K is split]
    large, NF4      lora_shrink, which also copies x -> lora_hidden -> for each layer a dense
                    product of [x | scaling * act(h) of all layers] and [W | lora_B]
    large, dense    x @ W^T, lora_shrink -> linear_expand

Layers that are alike share their launches: lora_shrink reads x once for all of them, and one launch
of linear_tiles has the tiles of all their weights. A weight with NF4 blocks that straddle rows is
dequantized first and then treated as a dense weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pylora.calls import Layer, LowRank
from pylora.kernels import configs
from pylora.kernels.epilogue import Epilogue, Term
from pylora.kernels.launch import facts
from pylora.kernels.layers import (
    Gated,
    dense_weight,
    extends,
    grouped,
    layer_key,
    low_rank_key,
    low_rank_of,
    padded_rank,
    without_straddling,
)
from pylora.kernels.linear_expand import linear_expand
from pylora.kernels.linear_tiles import launch_linear_tiles
from pylora.kernels.lora_hidden import lora_hidden
from pylora.kernels.lora_shrink import lora_shrink
from pylora.kernels.nf4_dequantize import launch_nf4_dequantize
from pylora.kernels.philox import mask_of
from pylora.kernels.precision import lora_operands, output_operands
from pylora.kernels.tuning import tuned


def lora_linear(x: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """x [M, K], any row stride -> y [M, out_features] in x.dtype and h fp32 [M, R].

    h is an empty tensor [0] if the layer has no LoRA.
    """
    (result,) = lora_linears(x, [layer])
    return result


def lora_linears(
    x: Tensor, layers: Sequence[Layer], gated: Gated | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Runs several layers of one x; returns what `lora_linear` returns for each of them.

    x         [M, K], any row stride
    gated     if given, x is the gate of a gated MLP, and the layers' input is act(x) * gated.up
    """
    M, K = x.shape
    if M == 0:
        return [(x.new_empty(0, layer.weight.out_features), _empty_h(x, layer)) for layer in layers]
    layers = [without_straddling(layer, x.dtype) for layer in layers]
    numbers = range(len(layers))
    large = configs.is_large(M, x.element_size())
    extended = [i for i in numbers if large and extends(layers[i], x.dtype)]
    # 1. Project x on every lora_A; the kernel that reads x for it also copies it, or makes it from
    # gate and up.
    width = K + sum(padded_rank(low_rank_of(layers[i]).rank) for i in extended)
    left = x.new_empty(M, width) if extended or gated is not None else None
    x, partials = _shrink(x, layers, gated, left)
    # 2. Multiply by the base weights and finish the low-rank path.
    results: dict[int, tuple[Tensor, Tensor]] = {}
    if left is not None and extended:
        results = _by_extended_products(left, K, {i: layers[i] for i in extended}, partials)
    others = [i for i in numbers if i not in results]
    for group in grouped(others, lambda i: layer_key(layers[i])):
        run = _by_products if large else _by_tiles
        terms = [_term(layers[i].low_rank, partials.get(i)) for i in group]
        outputs = run(x, [layers[i] for i in group], terms)
        for i, y, term in zip(group, outputs, terms, strict=True):
            results[i] = (y, x.new_empty(0) if term is None or term.h is None else term.h)
    return [results[i] for i in numbers]


def _empty_h(x: Tensor, layer: Layer) -> Tensor:
    if layer.low_rank is None:
        return x.new_empty(0)
    return x.new_empty(0, layer.low_rank.rank, dtype=torch.float32)


def base_product(x: Tensor, layer: Layer) -> tuple[Tensor, bool]:
    """x [M, K] @ W^T for a kernel that adds more to it; M >= 1.

    Returns ([1, M, out_features] in x.dtype, True) if the product is finished and includes the
    bias, or (fp32 partials [splits, M, out_features], False) if their sum and the bias are still to
    be added.
    """
    (M, K), out_features = x.shape, layer.weight.out_features
    layer = without_straddling(layer, x.dtype)
    if configs.is_large(M, x.element_size()):
        return _by_products(x, [layer], [None])[0][None], True
    blocksize = layer.weight.blocksize
    plan = configs.forward_plan(M, [out_features], K, x.element_size(), blocksize, facts(x))
    dtype = x.dtype if plan.splits == 1 else torch.float32
    base = x.new_empty(plan.splits, M, out_features, dtype=dtype)
    launch_linear_tiles(x, [layer.weight], [base], plan, Epilogue([layer.bias]))
    return base, plan.splits == 1


def _shrink(
    x: Tensor, layers: Sequence[Layer], gated: Gated | None, left: Tensor | None
) -> tuple[Tensor, dict[int, Tensor]]:
    """(the layers' input, the partials of h by the number of each layer with LoRA).

    left    if given, the layers' input is written to its first K columns, and returned as a view
    """
    K = x.shape[1]
    with_lora = [i for i in range(len(layers)) if layers[i].low_rank is not None]
    if not with_lora and gated is not None:
        return gated.of(x), {}
    partials: dict[int, Tensor] = {}
    for group in grouped(with_lora, lambda i: low_rank_key(low_rank_of(layers[i]))):
        lows = [low_rank_of(layers[i]) for i in group]
        group_partials = lora_shrink(
            x,
            [low.A for low in lows],
            lora_operands(x.dtype, lows[0].A.dtype),
            masks=[mask_of(low.dropout) for low in lows],
            copy=left,
            up=gated.up if gated is not None else None,
            activation=gated.activation if gated is not None else "identity",
        )
        partials.update(zip(group, group_partials, strict=True))
        if left is not None:
            x, left, gated = left[:, :K], None, None
    return x, partials


def _term(low: LowRank | None, partials: Tensor | None) -> Term | None:
    if low is None or partials is None:
        return None
    h = partials.new_empty(partials.shape[1:])
    return Term(partials, low.B, low.A_bias, h, low.B_bias, low.scaling)


def _epilogue(x: Tensor, layers: Sequence[Layer], terms: Sequence[Term | None]) -> Epilogue:
    """The epilogue of layers that have the same `layer_key`."""
    biases, low = [layer.bias for layer in layers], layers[0].low_rank
    if low is None:
        return Epilogue(biases)
    return Epilogue(
        biases,
        [term for term in terms if term is not None],
        partials_scale=low.keep_scale,
        activation=low.activation,
        operands=output_operands(x.dtype, low.A.dtype),
    )


def _by_tiles(x: Tensor, layers: Sequence[Layer], terms: Sequence[Term | None]) -> list[Tensor]:
    """Small and middle M: one launch has the fused tiles of layers with the same `layer_key`."""
    M, K = x.shape
    sizes = [layer.weight.out_features for layer in layers]
    blocksize = layers[0].weight.blocksize
    rule = configs.forward_plan(M, sizes, K, x.element_size(), blocksize, facts(x))

    def run(plan: configs.TilePlan) -> list[Tensor]:
        return _run_tiles(x, layers, terms, plan)

    return run(tuned("linear_tiles", x, (*sizes, K), layer_key(layers[0]), rule, K, run))


def _run_tiles(
    x: Tensor,
    layers: Sequence[Layer],
    terms: Sequence[Term | None],
    plan: configs.TilePlan,
) -> list[Tensor]:
    weights = [layer.weight for layer in layers]
    M, sizes = x.shape[0], [weight.out_features for weight in weights]
    outputs = [x.new_empty(M, size) for size in sizes]
    if plan.splits == 1:
        launch_linear_tiles(x, weights, outputs, plan, _epilogue(x, layers, terms))
        return outputs
    partials = [x.new_empty(plan.splits, M, size, dtype=torch.float32) for size in sizes]
    launch_linear_tiles(x, weights, partials, plan, Epilogue())
    for layer_partials, y, layer, term in zip(partials, outputs, layers, terms, strict=True):
        linear_expand(layer_partials, y, _epilogue(x, [layer], [term]))
    return outputs


def lora_linear_by_tiles(x: Tensor, layer: Layer, plan: configs.TilePlan) -> Tensor:
    """y of one layer by the fused tiles with a given plan; measurements call it.

    x [M, K] must have M >= 1, and no NF4 block of the weight may straddle rows.
    """
    x, partials = _shrink(x, [layer], None, None)
    return _run_tiles(x, [layer], [_term(layer.low_rank, partials.get(0))], plan)[0]


def _by_products(x: Tensor, layers: Sequence[Layer], terms: Sequence[Term | None]) -> list[Tensor]:
    """Large M without an extension: a dense product for each layer, then its low-rank term."""
    outputs = []
    for layer, term in zip(layers, terms, strict=True):
        weight = dense_weight(layer.weight, x.dtype)
        if term is None:
            bias = None if layer.bias is None else layer.bias.to(x.dtype)
            outputs.append(torch.nn.functional.linear(x, weight, bias))
            continue
        y = torch.mm(x, weight.t())
        linear_expand(y[None], y, _epilogue(x, [layer], [term]))
        outputs.append(y)
    return outputs


def _by_extended_products(
    left: Tensor, K: int, layers: dict[int, Layer], partials: dict[int, Tensor]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Large M over NF4: one dense product y = [x | scaling * act(h)] @ [W | lora_B]^T per layer.

    `left` begins with x. It has the columns of every layer; in a layer's product the columns of the
    other layers are multiplied by zero, which costs less than a left operand for each layer.
    """
    hidden, columns, first = {}, {}, K
    for i, layer in layers.items():
        low = low_rank_of(layer)
        end = first + padded_rank(low.rank)
        columns[i] = slice(first, first + low.rank)
        hidden[i] = lora_hidden(
            partials[i],
            low.keep_scale,
            low.A_bias,
            low.scaling,
            low.activation,
            left[:, first:end],
        )
        first = end
    results = {}
    for i, layer in layers.items():
        low = low_rank_of(layer)
        # The caching allocator hands out the same buffer again and again, in stream order.
        right = left.new_empty(layer.weight.out_features, left.shape[1])
        launch_nf4_dequantize(layer.weight, right[:, :K])
        right[:, K:].zero_()
        right[:, columns[i]].copy_(low.B)
        bias: Any = layer.bias
        if low.B_bias is not None:
            bias = low.scaling * low.B_bias.float() + (0.0 if bias is None else bias.float())
        bias = None if bias is None else bias.to(left.dtype)
        results[i] = (torch.nn.functional.linear(left, right, bias), hidden[i])
    return results
