"""`Projection`, a linear layer's tensors and its LoRA, and the arguments that ops take for it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pylora import checks
from pylora.nf4 import NF4Weight


class Projection(NamedTuple):
    """One linear projection and its LoRA.

    weight     [out_features, in_features], an NF4Weight or a tensor of x's dtype
    lora_A     [r, in_features] and lora_B [out_features, r], of one dtype, which may differ from
               x's; both None without LoRA
    scaling    alpha / r (rsLoRA: alpha / sqrt(r))
    bias       [out_features]
    """

    weight: Tensor | NF4Weight
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0
    bias: Tensor | None = None


def base_arguments(name: str, weight: Tensor | NF4Weight, x: Tensor) -> tuple[Any, ...]:
    """The arguments of a weight, in schema order; a dense one must have x's dtype."""
    if isinstance(weight, NF4Weight):
        return weight.op_arguments()
    return (checks.same_dtype_as_x(name, weight, x), None, None, None, None, 0, 0)


def input_of(projections: dict[str, Projection], x: Tensor) -> Tensor:
    """x checked against the first projection, and cast under autocast.

    Raises TypeError where one is no Projection, or what `checks.activations` raises.
    """
    for name, projection in projections.items():
        if not isinstance(projection, Projection):
            raise TypeError(f"{name} is {type(projection).__name__}; it must be a Projection")
        checks.weight(f"{name}.weight", projection.weight)
    name, first = next(iter(projections.items()))
    in_features = first.weight.shape[1]
    return checks.activations("x", x, in_features, first.weight.device, f"{name}.weight")


def projection_arguments(
    projections: dict[str, Projection], x: Tensor, in_features: dict[str, int]
) -> tuple[list[Any], ...]:
    """One list a part of `reference.projections.Projections`, checked against x and each other.

    Errors name the projection and its part, such as "k.lora_A".
    """
    rows = [
        _arguments(name, projection, x, in_features[name])
        for name, projection in projections.items()
    ]
    return tuple(list(part) for part in zip(*rows, strict=True))


def _arguments(name: str, projection: Projection, x: Tensor, in_features: int) -> tuple[Any, ...]:
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
    if lora_A is not None and lora_B is not None:
        checks.lora_pair(lora_A, lora_B, out_features, in_features, x.device, f"{name}.")
    checks.vector(f"{name}.bias", bias, out_features, x.device)
    return (
        *base_arguments(f"{name}.weight", weight, x),
        out_features,
        *(_or_empty(tensor, x) for tensor in (lora_A, lora_B, bias)),
        float(scaling),
    )


def _or_empty(tensor: Tensor | None, x: Tensor) -> Tensor:
    """The ops' form of an absent tensor is an empty one."""
    return torch.empty(0, dtype=x.dtype, device=x.device) if tensor is None else tensor
