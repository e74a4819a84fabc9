"""y = x @ W^T + bias + scaling * (act(dropout(x) @ lora_A^T + lora_A_bias) @ lora_B^T +
lora_B_bias), for one or several layers of one x: which kernels run, by regime.

    small, middle   lora_shrink -> nf4_linear [-> linear_expand where K is split]
    large, NF4      lora_shrink, copying x -> lora_hidden -> a matrix product for each layer, of
                    [x | scaling * act(h) of all layers] and [W | lora_B]
    large, dense    x @ W^T, lora_shrink -> linear_expand

Layers that are alike share their launches: lora_shrink reads x once for all of them, and one
nf4_linear has the tiles of all weights. A weight whose blocks straddle rows is dequantized and goes
the dense way.
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
    groups,
    layer_kind,
    low_rank_kind,
    low_rank_of,
    wide_step,
    without_straddling,
)
from pylora.kernels.linear_expand import linear_expand
from pylora.kernels.lora_hidden import lora_hidden
from pylora.kernels.lora_shrink import lora_shrink
from pylora.kernels.nf4_dequantize import launch_nf4_dequantize
from pylora.kernels.nf4_linear import launch_nf4_linear
from pylora.kernels.philox import mask_of
from pylora.kernels.precision import lora_operands, output_operands
from pylora.kernels.tuning import tuned


def lora_linears(
    x: Tensor, layers: Sequence[Layer], gated: Gated | None = None
) -> list[tuple[Tensor, Tensor]]:
    """(y [M, out_features] in x.dtype, h fp32 [M, R]; without LoRA empty [0]) of each layer.

    x         [M, K], any row stride; gate where `gated` is given, which then has its strides
    """
    M, K = x.shape
    if M == 0:
        return [(x.new_empty(0, layer.weight.out_features), _empty_h(x, layer)) for layer in layers]
    layers = [without_straddling(layer, x.dtype) for layer in layers]
    numbers = range(len(layers))
    large = configs.is_large(M, x.element_size())
    extended = [i for i in numbers if large and extends(layers[i], x.dtype)]
    # 1. The low-rank projections; x is copied, or made from gate and up, while it is read for them.
    width = K + sum(wide_step(low_rank_of(layers[i]).rank) for i in extended)
    left = x.new_empty(M, width) if extended or gated is not None else None
    x, parts = _shrink(x, layers, gated, left)
    # 2.
    results: dict[int, tuple[Tensor, Tensor]] = {}
    if left is not None and extended:
        results = _by_extended_products(left, K, {i: layers[i] for i in extended}, parts)
    others = [i for i in numbers if i not in results]
    for group in groups(others, lambda i: layer_kind(layers[i])):
        run = _by_products if large else _by_tiles
        terms = [_term(layers[i].low_rank, parts.get(i)) for i in group]
        outputs = run(x, [layers[i] for i in group], terms)
        for i, y, term in zip(group, outputs, terms, strict=True):
            results[i] = (y, x.new_empty(0) if term is None or term.h is None else term.h)
    return [results[i] for i in numbers]


def _empty_h(x: Tensor, layer: Layer) -> Tensor:
    if layer.low_rank is None:
        return x.new_empty(0)
    return x.new_empty(0, layer.low_rank.rank, dtype=torch.float32)


def base_product(x: Tensor, layer: Layer) -> tuple[Tensor, bool]:
    """x [M, K] @ W^T for a kernel that finishes it.

    Returns ([1, M, out_features] in x.dtype, True) with the bias, or fp32 partial sums [parts, M,
    out_features] without it and False; at least one row.
    """
    (M, K), out_features = x.shape, layer.weight.out_features
    layer = without_straddling(layer, x.dtype)
    if configs.is_large(M, x.element_size()):
        return _by_products(x, [layer], [None])[0][None], True
    blocksize = layer.weight.blocksize
    plan = configs.forward_plan(M, [out_features], K, x.element_size(), blocksize, facts(x))
    dtype = x.dtype if plan.splits == 1 else torch.float32
    base = x.new_empty(plan.splits, M, out_features, dtype=dtype)
    launch_nf4_linear(x, [layer.weight], [base], plan, Epilogue([layer.bias]))
    return base, plan.splits == 1


def _shrink(
    x: Tensor, layers: Sequence[Layer], gated: Gated | None, left: Tensor | None
) -> tuple[Tensor, dict[int, Tensor]]:
    """(x, parts of the layers with LoRA), where x is act(gate) * up if gated; it lies in `left`
    where there is one."""
    K = x.shape[1]
    with_lora = [i for i in range(len(layers)) if layers[i].low_rank is not None]
    if not with_lora and gated is not None:
        return gated.of(x), {}
    parts: dict[int, Tensor] = {}
    for group in groups(with_lora, lambda i: low_rank_kind(low_rank_of(layers[i]))):
        lows = [low_rank_of(layers[i]) for i in group]
        found = lora_shrink(
            x,
            [low.A for low in lows],
            lora_operands(x.dtype, lows[0].A.dtype),
            masks=[mask_of(low.dropout) for low in lows],
            copy=left,
            up=gated.up if gated is not None else None,
            activation=gated.activation if gated is not None else "identity",
        )
        parts.update(zip(group, found, strict=True))
        if left is not None:
            x, left, gated = left[:, :K], None, None
    return x, parts


def _term(low: LowRank | None, parts: Tensor | None) -> Term | None:
    if low is None or parts is None:
        return None
    h = parts.new_empty(parts.shape[1:])
    return Term(parts, low.B, low.A_bias, h, low.B_bias, low.scaling)


def _epilogue(x: Tensor, layers: Sequence[Layer], terms: Sequence[Term | None]) -> Epilogue:
    """Of layers of one kind."""
    biases, low = [layer.bias for layer in layers], layers[0].low_rank
    if low is None:
        return Epilogue(biases)
    return Epilogue(
        biases,
        [term for term in terms if term is not None],
        parts_scale=low.keep_scale,
        activation=low.activation,
        operands=output_operands(x.dtype, low.A.dtype),
    )


def _by_tiles(x: Tensor, layers: Sequence[Layer], terms: Sequence[Term | None]) -> list[Tensor]:
    """Small and middle M: the fused tiles of layers of one kind in one launch."""
    M, K = x.shape
    sizes = [layer.weight.out_features for layer in layers]
    blocksize = layers[0].weight.blocksize
    rule = configs.forward_plan(M, sizes, K, x.element_size(), blocksize, facts(x))

    def run(plan: configs.TilePlan) -> list[Tensor]:
        return _run_tiles(x, layers, terms, plan)

    return run(tuned("nf4_linear", x, (*sizes, K), layer_kind(layers[0]), rule, K, run))


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
        launch_nf4_linear(x, weights, outputs, plan, _epilogue(x, layers, terms))
        return outputs
    workspaces = [x.new_empty(plan.splits, M, size, dtype=torch.float32) for size in sizes]
    launch_nf4_linear(x, weights, workspaces, plan, Epilogue())
    for workspace, y, layer, term in zip(workspaces, outputs, layers, terms, strict=True):
        linear_expand(workspace, y, _epilogue(x, [layer], [term]))
    return outputs


def lora_linear_by_tiles(x: Tensor, layer: Layer, plan: configs.TilePlan) -> Tensor:
    """y of one layer by the fused tiles, with a plan of the caller's: for measurements.

    x [M, K] has a row or more, and no block of the weight straddles two rows.
    """
    x, parts = _shrink(x, [layer], None, None)
    return _run_tiles(x, [layer], [_term(layer.low_rank, parts.get(0))], plan)[0]


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
    left: Tensor, K: int, layers: dict[int, Layer], parts: dict[int, Tensor]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Large M over NF4: [x | scaling * act(h)] @ [W | lora_B]^T, LoRA rides on the dense product.

    `left` begins with x. Each product has the columns of all the layers, those of the others times
    zero: that costs less than a matrix for each.
    """
    hidden, columns, first = {}, {}, K
    for i, layer in layers.items():
        low = low_rank_of(layer)
        last = first + wide_step(low.rank)
        columns[i] = slice(first, first + low.rank)
        hidden[i] = lora_hidden(
            parts[i],
            low.keep_scale,
            low.A_bias,
            low.scaling,
            low.activation,
            left[:, first:last],
        )
        first = last
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
