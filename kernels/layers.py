"""What the host code of the linear kernels asks of a layer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from pylora.calls import Layer, LowRank, Weight
from pylora.kernels.configs import cdiv
from pylora.kernels.nf4_dequantize import nf4_dequantize
from pylora.kernels.weight import weight_kind
from pylora.reference.activation import GATED_ACTIVATIONS

# Columns are added to a matrix in multiples of this, which keeps its rows aligned to 16 bytes.
_COLUMN_STEP = 16

Item = TypeVar("Item")


class Gated(NamedTuple):
    """Stands beside gate [M, K]: the layers' input is act(gate) * up, rounded once."""

    up: Tensor
    activation: str

    def of(self, gate: Tensor) -> Tensor:
        return GATED_ACTIVATIONS[self.activation].forward(gate).mul_(self.up)


def low_rank_of(layer: Layer) -> LowRank:
    """The low-rank path of a layer that has one."""
    assert layer.low_rank is not None
    return layer.low_rank


def low_rank_kind(low: LowRank) -> Hashable:
    """What low-rank paths must have in common to share a launch."""
    vectors = (None if t is None else t.dtype for t in (low.A_bias, low.B_bias))
    return (low.A.dtype, low.activation, low.dropout is None, *vectors)


def layer_kind(layer: Layer) -> Hashable:
    """What layers must have in common to share a launch."""
    bias = None if layer.bias is None else layer.bias.dtype
    low = None if layer.low_rank is None else low_rank_kind(layer.low_rank)
    return (weight_kind(layer.weight), bias, low)


def groups(items: Iterable[Item], kind: Callable[[Item], Hashable]) -> list[list[Item]]:
    """The items of each kind, in order."""
    found: dict[Hashable, list[Item]] = {}
    for item in items:
        found.setdefault(kind(item), []).append(item)
    return list(found.values())


def wide_step(rank: int) -> int:
    """Columns that a rank takes in an extended matrix."""
    return cdiv(rank, _COLUMN_STEP) * _COLUMN_STEP


def dense_weight(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The dense weight [out_features, in_features]."""
    return nf4_dequantize(weight, weight.shape, dtype) if weight.is_nf4 else weight.data


def without_straddling(layer: Layer, dtype: torch.dtype) -> Layer:
    """The layer, over its dense weight if a block of absmax spans two rows."""
    weight = layer.weight
    if not weight.is_nf4 or weight.rows_hold_whole_blocks:
        return layer
    return replace(layer, weight=Weight.dense(dense_weight(weight, dtype)))


def extends(layer: Layer, dtype: torch.dtype) -> bool:
    """True if LoRA may ride on a dense product, whose operands have x's dtype.

    What fp16 cannot hold must not become an operand.
    """
    low = layer.low_rank
    return (
        low is not None
        and layer.weight.is_nf4
        and layer.weight.rows_hold_whole_blocks
        and (dtype != torch.float16 or low.A.dtype == torch.float16)
    )
