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

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from pylora.kernels import configs
from pylora.kernels.epilogue import Epilogue, LowRank
from pylora.kernels.launch import facts
from pylora.kernels.linear_expand import linear_expand
from pylora.kernels.lora_hidden import lora_hidden
from pylora.kernels.lora_shrink import lora_shrink
from pylora.kernels.nf4_dequantize import launch_nf4_dequantize, nf4_dequantize
from pylora.kernels.nf4_linear import launch_nf4_linear
from pylora.kernels.philox import Dropout
from pylora.kernels.precision import lora_operands, output_operands
from pylora.kernels.tuning import tuned
from pylora.kernels.weight import NF4Base, weight_kind
from pylora.reference.activation import GATED_ACTIVATIONS

# Columns are added to a matrix in multiples of this, which keeps its rows aligned to 16 bytes.
_COLUMN_STEP = 16

Item = TypeVar("Item")


class LoRA(NamedTuple):
    """The low-rank path: A [R, K], B [N, R]."""

    A: Tensor
    B: Tensor
    A_bias: Tensor | None
    B_bias: Tensor | None
    scaling: float
    dropout: Dropout
    activation: str

    @property
    def kind(self) -> Hashable:
        """What low-rank paths must have in common to share a launch."""
        vectors = (None if t is None else t.dtype for t in (self.A_bias, self.B_bias))
        return (self.A.dtype, self.activation, self.dropout.seed is None, *vectors)


class Layer(NamedTuple):
    """A linear layer: NF4 or a dense weight [out_features, K], with or without LoRA."""

    weight: NF4Base | Tensor
    out_features: int
    bias: Tensor | None = None
    lora: LoRA | None = None

    @property
    def kind(self) -> Hashable:
        """What layers must have in common to share a launch."""
        bias = None if self.bias is None else self.bias.dtype
        return (weight_kind(self.weight), bias, None if self.lora is None else self.lora.kind)

    def without_straddling(self, K: int, dtype: torch.dtype) -> Layer:
        """The layer over its dense weight where a block of absmax spans two rows."""
        if isinstance(self.weight, NF4Base) and K % self.weight.blocksize:
            return self._replace(weight=self.dense(K, dtype))
        return self

    def dense(self, K: int, dtype: torch.dtype) -> Tensor:
        """The dense weight [out_features, K]."""
        if isinstance(self.weight, NF4Base):
            return nf4_dequantize(self.weight, (self.out_features, K), dtype)
        return self.weight

    def extends(self, K: int, dtype: torch.dtype) -> bool:
        """Whether LoRA may ride on a dense product, whose operands have x's dtype.

        What fp16 cannot hold must not become an operand.
        """
        return (
            self.lora is not None
            and isinstance(self.weight, NF4Base)
            and K % self.weight.blocksize == 0
            and (dtype != torch.float16 or self.lora.A.dtype == torch.float16)
        )


class Gated(NamedTuple):
    """Stands beside gate [M, K]: the layers' input is act(gate) * up, rounded once."""

    up: Tensor
    activation: str

    def of(self, gate: Tensor) -> Tensor:
        return GATED_ACTIVATIONS[self.activation].forward(gate).mul_(self.up)


def groups(items: Iterable[Item], kind: Callable[[Item], Hashable]) -> list[list[Item]]:
    """The items of each kind, in order."""
    found: dict[Hashable, list[Item]] = {}
    for item in items:
        found.setdefault(kind(item), []).append(item)
    return list(found.values())


def wide_step(rank: int) -> int:
    """Columns that a rank takes in an extended matrix."""
    return configs.cdiv(rank, _COLUMN_STEP) * _COLUMN_STEP


def nf4_linear(
    x: Tensor, weight: NF4Base | Tensor, out_features: int, bias: Tensor | None
) -> Tensor:
    """x [M, K], any row stride -> y [M, out_features] in x.dtype."""
    return lora_linears(x, [Layer(weight, out_features, bias)])[0][0]


def lora_linears(
    x: Tensor, layers: Sequence[Layer], gated: Gated | None = None
) -> list[tuple[Tensor, Tensor]]:
    """(y [M, out_features] in x.dtype, h fp32 [M, R]; without LoRA empty [0]) of each layer.

    x         [M, K], any row stride; gate where `gated` is given, which then has its strides
    """
    M, K = x.shape
    if M == 0:
        return [(x.new_empty(0, layer.out_features), _empty_h(x, layer)) for layer in layers]
    layers = [layer.without_straddling(K, x.dtype) for layer in layers]
    numbers = range(len(layers))
    large = configs.is_large(M, x.element_size())
    extended = [i for i in numbers if large and layers[i].extends(K, x.dtype)]
    # 1. The low-rank projections; x is copied, or made from gate and up, while it is read for them.
    width = K + sum(wide_step(_lora(layers[i]).A.shape[0]) for i in extended)
    left = x.new_empty(M, width) if extended or gated is not None else None
    x, parts = _shrink(x, layers, gated, left)
    # 2.
    results: dict[int, tuple[Tensor, Tensor]] = {}
    if left is not None and extended:
        results = _by_extended_products(left, K, {i: layers[i] for i in extended}, parts)
    others = [i for i in numbers if i not in results]
    for group in groups(others, lambda i: layers[i].kind):
        run = _by_products if large else _by_tiles
        terms = [_term(layers[i].lora, parts.get(i)) for i in group]
        outputs = run(x, [layers[i] for i in group], terms)
        for i, y, term in zip(group, outputs, terms, strict=True):
            results[i] = (y, x.new_empty(0) if term is None or term.h is None else term.h)
    return [results[i] for i in numbers]


def _empty_h(x: Tensor, layer: Layer) -> Tensor:
    if layer.lora is None:
        return x.new_empty(0)
    return x.new_empty(0, layer.lora.A.shape[0], dtype=torch.float32)


def base_product(
    x: Tensor, weight: NF4Base | Tensor, out_features: int, bias: Tensor | None
) -> tuple[Tensor, bool]:
    """x [M, K] @ W^T for a kernel that finishes it.

    Returns ([1, M, out_features] in x.dtype, True) with the bias, or fp32 partial sums [parts, M,
    out_features] without it and False; at least one row.
    """
    M, K = x.shape
    layer = Layer(weight, out_features, bias).without_straddling(K, x.dtype)
    if configs.is_large(M, x.element_size()):
        return _by_products(x, [layer], [None])[0][None], True
    blocksize = layer.weight.blocksize if isinstance(layer.weight, NF4Base) else 0
    plan = configs.forward_plan(M, [out_features], K, x.element_size(), blocksize, facts(x))
    dtype = x.dtype if plan.splits == 1 else torch.float32
    base = x.new_empty(plan.splits, M, out_features, dtype=dtype)
    launch_nf4_linear(x, [layer.weight], [base], plan, Epilogue([bias]))
    return base, plan.splits == 1


def _lora(layer: Layer) -> LoRA:
    assert layer.lora is not None
    return layer.lora


def _shrink(
    x: Tensor, layers: Sequence[Layer], gated: Gated | None, left: Tensor | None
) -> tuple[Tensor, dict[int, Tensor]]:
    """(x, parts of the layers with LoRA), where x is act(gate) * up if gated; it lies in `left`
    where there is one."""
    K = x.shape[1]
    with_lora = [i for i in range(len(layers)) if layers[i].lora is not None]
    if not with_lora and gated is not None:
        return gated.of(x), {}
    parts: dict[int, Tensor] = {}
    for group in groups(with_lora, lambda i: _lora(layers[i]).kind):
        loras = [_lora(layers[i]) for i in group]
        found = lora_shrink(
            x,
            [lora.A for lora in loras],
            lora_operands(x.dtype, loras[0].A.dtype),
            dropouts=[lora.dropout for lora in loras],
            copy=left,
            up=gated.up if gated is not None else None,
            activation=gated.activation if gated is not None else "identity",
        )
        parts.update(zip(group, found, strict=True))
        if left is not None:
            x, left, gated = left[:, :K], None, None
    return x, parts


def _term(lora: LoRA | None, parts: Tensor | None) -> LowRank | None:
    if lora is None or parts is None:
        return None
    h = parts.new_empty(parts.shape[1:])
    return LowRank(parts, lora.B, lora.A_bias, h, lora.B_bias, lora.scaling)


def _epilogue(x: Tensor, layers: Sequence[Layer], terms: Sequence[LowRank | None]) -> Epilogue:
    """Of layers of one kind."""
    biases, lora = [layer.bias for layer in layers], layers[0].lora
    if lora is None:
        return Epilogue(biases)
    return Epilogue(
        biases,
        [term for term in terms if term is not None],
        parts_scale=lora.dropout.scale,
        activation=lora.activation,
        operands=output_operands(x.dtype, lora.A.dtype),
    )


def _by_tiles(x: Tensor, layers: Sequence[Layer], terms: Sequence[LowRank | None]) -> list[Tensor]:
    """Small and middle M: the fused tiles of layers of one kind in one launch."""
    M, K = x.shape
    sizes, weight = [layer.out_features for layer in layers], layers[0].weight
    blocksize = weight.blocksize if isinstance(weight, NF4Base) else 0
    rule = configs.forward_plan(M, sizes, K, x.element_size(), blocksize, facts(x))

    def run(plan: configs.TilePlan) -> list[Tensor]:
        return _run_tiles(x, layers, terms, plan)

    return run(tuned("nf4_linear", x, (*sizes, K), layers[0].kind, rule, K, run))


def _run_tiles(
    x: Tensor,
    layers: Sequence[Layer],
    terms: Sequence[LowRank | None],
    plan: configs.TilePlan,
) -> list[Tensor]:
    M, sizes = x.shape[0], [layer.out_features for layer in layers]
    weights = [layer.weight for layer in layers]
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
    return _run_tiles(x, [layer], [_term(layer.lora, parts.get(0))], plan)[0]


def _by_products(
    x: Tensor, layers: Sequence[Layer], terms: Sequence[LowRank | None]
) -> list[Tensor]:
    """Large M without an extension: a dense product for each layer, then its low-rank term."""
    outputs = []
    for layer, term in zip(layers, terms, strict=True):
        weight = layer.dense(x.shape[1], x.dtype)
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
        lora = _lora(layer)
        last = first + wide_step(lora.A.shape[0])
        columns[i] = slice(first, first + lora.A.shape[0])
        hidden[i] = lora_hidden(
            parts[i],
            lora.dropout.scale,
            lora.A_bias,
            lora.scaling,
            lora.activation,
            left[:, first:last],
        )
        first = last
    results = {}
    for i, layer in layers.items():
        lora = _lora(layer)
        # The caching allocator hands out the same buffer again and again, in stream order.
        right = left.new_empty(layer.out_features, left.shape[1])
        assert isinstance(layer.weight, NF4Base)
        launch_nf4_dequantize(layer.weight, right[:, :K])
        right[:, K:].zero_()
        right[:, columns[i]].copy_(lora.B)
        bias: Any = layer.bias
        if lora.B_bias is not None:
            bias = lora.scaling * lora.B_bias.float() + (0.0 if bias is None else bias.float())
        bias = None if bias is None else bias.to(left.dtype)
        results[i] = (torch.nn.functional.linear(left, right, bias), hidden[i])
    return results
