"""Questions that the host code of the linear kernels asks about a layer, such as its launch key."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from pylora.calls import Layer, LowRank, Weight
from pylora.kernels.configs import cdiv
from pylora.kernels.nf4_dequantize import nf4_dequantize
from pylora.kernels.weight import weight_key
from pylora.reference.activation import GATED_ACTIVATIONS

# Columns are added to a matrix in multiples of this number, so its rows stay aligned to 16 bytes.
_COLUMN_STEP = 16

Item = TypeVar("Item")


class Gated(NamedTuple):
    """The up projection [M, K] and the activation of a gated MLP.

    Beside gate [M, K] they stand for the product act(gate) * up, which is rounded once.
    """

    up: Tensor
    activation: str

    def of(self, gate: Tensor) -> Tensor:
        """act(gate) * up as a new tensor."""
        return GATED_ACTIVATIONS[self.activation].forward(gate).mul_(self.up)


def low_rank_of(layer: Layer) -> LowRank:
    """The low-rank path of a layer, which must have one."""
    assert layer.low_rank is not None
    return layer.low_rank


def low_rank_key(low: LowRank) -> Hashable:
    """Low-rank paths with equal keys can share a launch."""
    vectors = (None if t is None else t.dtype for t in (low.A_bias, low.B_bias))
    return (low.A.dtype, low.activation, low.dropout is None, *vectors)


def layer_key(layer: Layer) -> Hashable:
    """Layers with equal keys can share a launch."""
    bias = None if layer.bias is None else layer.bias.dtype
    low = None if layer.low_rank is None else low_rank_key(layer.low_rank)
    return (weight_key(layer.weight), bias, low)


def grouped(items: Iterable[Item], key: Callable[[Item], Hashable]) -> list[list[Item]]:
    """The items in groups of equal keys, in order."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def padded_rank(rank: int) -> int:
    """The number of columns that LoRA of this rank adds to an operand of a dense product."""
    return cdiv(rank, _COLUMN_STEP) * _COLUMN_STEP


def dense_weight(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight as a dense tensor [out_features, in_features].

    dtype    what an NF4 weight is dequantized to; a dense weight is returned as it is
    """
    return nf4_dequantize(weight, weight.shape, dtype) if weight.is_nf4 else weight.data


def without_straddling(layer: Layer, dtype: torch.dtype) -> Layer:
    """The same layer; its weight is dequantized if NF4 blocks straddle its rows."""
    weight = layer.weight
    if not weight.is_nf4 or weight.rows_hold_whole_blocks:
        return layer
    return replace(layer, weight=Weight.dense(dense_weight(weight, dtype)))


def extends(layer: Layer, dtype: torch.dtype) -> bool:
    """True if a dense product of an NF4 weight may carry the layer's LoRA as extra columns.

    dtype    the dtype of x and the product's operands. fp16 lacks the range of the other dtypes, so
             LoRA weights of another dtype must not become an fp16 operand.
    """
    low = layer.low_rank
    return (
        low is not None
        and layer.weight.is_nf4
        and layer.weight.rows_hold_whole_blocks
        and (dtype != torch.float16 or low.A.dtype == torch.float16)
    )
