"""`Projection`, the tensors of a linear layer and its LoRA, and how it becomes a record's layer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pylora import checks
from pylora.calls import Dropout, Layer, LowRank, Weight
from pylora.nf4_weight import NF4Weight


class Projection(NamedTuple):
    """A linear projection with or without LoRA, an argument of `lora_qkv` and `lora_mlp`.

    weight     [out_features, in_features], an NF4Weight or a tensor of x's dtype
    lora_A     [r, in_features]; None without LoRA
    lora_B     [out_features, r], of lora_A's dtype, which may differ from x's; None without LoRA
    scaling    alpha / r (rsLoRA: alpha / sqrt(r))
    bias       [out_features]; None without a bias
    """

    weight: Tensor | NF4Weight
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0
    bias: Tensor | None = None


def base_weight(name: str, weight: Tensor | NF4Weight, x: Tensor) -> Weight:
    """The record of a base weight; raises TypeError if it is dense and not of x's dtype."""
    if isinstance(weight, NF4Weight):
        return weight.record
    return Weight.dense(checks.same_dtype_as_x(name, weight, x))


def input_of(projections: dict[str, Projection], x: Tensor) -> Tensor:
    """Checks x against the first projection; returns it, cast under autocast.

    Raises TypeError if an entry is no Projection, and what `checks.weight` and `checks.activations`
    raise.
    """
    for name, projection in projections.items():
        if not isinstance(projection, Projection):
            raise TypeError(f"{name} is {type(projection).__name__}; it must be a Projection")
        checks.weight(f"{name}.weight", projection.weight)
    name, first = next(iter(projections.items()))
    in_features = first.weight.shape[1]
    return checks.activations("x", x, in_features, first.weight.device, f"{name}.weight")


def layers_of(
    projections: dict[str, Projection],
    x: Tensor,
    in_features: dict[str, int],
    dropout: Dropout | None,
) -> tuple[Layer, ...]:
    """The layers of a call, checked against x; each draws a dropout mask of its own.

    in_features    the in_features of each projection, by name

    Errors name the projection and its part, such as "k.lora_A".
    """
    return tuple(
        _layer(name, projection, x, in_features[name], dropout, stream)
        for stream, (name, projection) in enumerate(projections.items())
    )


def _layer(
    name: str,
    projection: Projection,
    x: Tensor,
    in_features: int,
    dropout: Dropout | None,
    stream: int,
) -> Layer:
    weight, lora_A, lora_B, scaling, bias = projection
    out_features = weight.shape[0]
    if weight.shape[1] != in_features:
        raise ValueError(
            f"{name}.weight has shape {tuple(weight.shape)}; "
            f"it must be [out_features, {in_features}]"
        )
    if weight.device != x.device:
        raise ValueError(f"{name}.weight is on {weight.device}; it must be on {x.device}, as x is")
    if (lora_A is None) != (lora_B is None):
        missing = "lora_A" if lora_A is None else "lora_B"
        raise ValueError(
            f"{name}.{missing} is None; lora_A and lora_B must be given together or not at all"
        )
    low_rank = None
    if lora_A is not None and lora_B is not None:
        checks.lora_pair(lora_A, lora_B, out_features, in_features, x.device, f"{name}.")
        mask = None if dropout is None else Dropout(dropout.p, dropout.seed, stream)
        A, B = checks.low_rank(lora_A, x), checks.low_rank(lora_B, x)
        low_rank = LowRank(A, B, scaling=float(scaling), dropout=mask)
    checks.vector(f"{name}.bias", bias, out_features, x.device)
    return Layer(base_weight(f"{name}.weight", weight, x), bias, low_rank)
