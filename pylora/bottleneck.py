"""How the tensors of a bottleneck adapter are checked and become the record of a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from pylora import checks
from pylora.calls import (
    Bottleneck,
    BottleneckAdapterCall,
    Dropout,
    MultiBottleneckCall,
    Norm,
)
from pylora.dropout import dropout_of
from pylora.reference.normalization import NORMS


class AdapterTensors(NamedTuple):
    """A bottleneck adapter, an argument of `multi_bottleneck_adapter`.

    down_weight [bottleneck, hidden], up_weight [hidden, bottleneck], down_bias [bottleneck] and
    up_bias [hidden]; the biases may be None. activation and scaling are those of
    `bottleneck_adapter`.
    """

    down_weight: Tensor
    down_bias: Tensor | None
    up_weight: Tensor
    up_bias: Tensor | None
    activation: str | None = "relu"
    scaling: float = 1.0


def check_norm_kind(name: str, value: object) -> None:
    """Raises ValueError unless `value` is None or the kind of a `Norm`."""
    if value is not None and value not in NORMS:
        raise ValueError(f"{name} is {value!r}; it must be None or one of {', '.join(NORMS)}")


def _residual_of(
    residual: Tensor | None, add_residual: bool, x: Tensor
) -> tuple[Tensor | None, bool]:
    """The `residual` and `add_residual` of the record.

    The op adds residuals of x's dtype; the caller must add another one to its result. Raises unless
    the residual is None or a tensor of x's shape that is to be added.
    """
    if residual is None:
        return None, add_residual
    if not add_residual:
        raise ValueError("residual is given; it must be None if add_residual is False")
    checks.tensor("residual", residual)
    if not residual.dtype.is_floating_point:
        raise TypeError(f"residual has dtype {residual.dtype}; it must be a floating-point dtype")
    if residual.shape != x.shape:
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}; it must be x's shape, {tuple(x.shape)}"
        )
    if residual.device != x.device:
        raise ValueError(f"residual is on {residual.device}; it must be on {x.device}, where x is")
    return (residual, add_residual) if residual.dtype == x.dtype else (None, False)


def _bottleneck_of(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    activation: str | None,
    scaling: float,
    dropout: Dropout | None,
    norm_before: Norm | None,
    norm_after: Norm | None,
    prefix: str = "",
) -> Bottleneck:
    """The record of an adapter whose down_weight has been checked against x.

    prefix    stands before the names of the arguments in errors
    """
    checks.number(f"{prefix}scaling", scaling)
    bottleneck, hidden = down_weight.shape
    checks.adapter_tensor(f"{prefix}up_weight", up_weight, x.device)
    if tuple(up_weight.shape) != (hidden, bottleneck):
        raise ValueError(
            f"{prefix}up_weight has shape {tuple(up_weight.shape)}; "
            f"it must be ({hidden}, {bottleneck})"
        )
    checks.same_dtype(f"{prefix}up_weight", up_weight, f"{prefix}down_weight", down_weight)
    vectors = {"down_bias": (down_bias, bottleneck), "up_bias": (up_bias, hidden)}
    for name, norm in (("norm_before", norm_before), ("norm_after", norm_after)):
        if norm is None:
            continue
        if not isinstance(norm, Norm):
            raise TypeError(f"{name} is {type(norm).__name__}; it must be a Norm or None")
        check_norm_kind(f"{name}.kind", norm.kind)
        checks.tensor(f"{name}.weight", norm.weight)
        checks.number(f"{name}.eps", norm.eps)
        vectors[f"{name}.weight"] = (norm.weight, hidden)
        vectors[f"{name}.bias"] = (norm.bias, hidden)
    for name, (vector, size) in vectors.items():
        checks.vector(
            f"{prefix}{name}", vector, size, x.device, down_weight.dtype, f"{prefix}down_weight"
        )
    return Bottleneck(
        down_weight,
        up_weight,
        down_bias,
        up_bias,
        float(scaling),
        checks.activation(f"{prefix}activation", activation),
        dropout,
        norm_before,
        norm_after,
    )


def bottleneck_adapter_call(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    activation: str | None = "relu",
    scaling: float = 1.0,
    residual: Tensor | None = None,
    add_residual: bool = True,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    norm_before: Norm | None = None,
    norm_after: Norm | None = None,
) -> BottleneckAdapterCall:
    """The checked record of a call of `pylora.functional.bottleneck_adapter`."""
    checks.bottleneck_weight("down_weight", down_weight)
    hidden = down_weight.shape[1]
    checks.token_vectors("x", x, hidden, down_weight.device, "down_weight", "hidden")
    adapter = _bottleneck_of(
        x,
        down_weight,
        down_bias,
        up_weight,
        up_bias,
        activation,
        scaling,
        dropout_of(dropout_p, seed, x),
        norm_before,
        norm_after,
    )
    return BottleneckAdapterCall(x, *_residual_of(residual, add_residual, x), adapter)


def multi_bottleneck_adapter_call(
    x: Tensor,
    adapters: Sequence[AdapterTensors],
    adapter_ids: Tensor,
    residual: Tensor | None = None,
    add_residual: bool = True,
) -> MultiBottleneckCall:
    """The checked record of a call of `pylora.functional.multi_bottleneck_adapter`."""
    if not isinstance(adapters, (list, tuple)) or not adapters:
        raise ValueError(
            f"adapters is {adapters!r}; it must be a list of one or more AdapterTensors"
        )
    records = []
    for place, tensors in enumerate(adapters):
        if not isinstance(tensors, AdapterTensors):
            kind = type(tensors).__name__
            raise TypeError(f"adapters[{place}] is {kind}; it must be an AdapterTensors")
        name = f"adapters[{place}]."
        checks.bottleneck_weight(f"{name}down_weight", tensors.down_weight)
        first = adapters[0].down_weight
        if place == 0:
            device, hidden = first.device, first.shape[1]
            checks.token_vectors("x", x, hidden, device, f"{name}down_weight", "hidden")
        elif tensors.down_weight.shape[1] != first.shape[1]:
            raise ValueError(
                f"{name}down_weight has {tensors.down_weight.shape[1]} columns; it must have "
                f"{first.shape[1]}, the features of x"
            )
        checks.same_dtype(
            f"{name}down_weight", tensors.down_weight, "adapters[0].down_weight", first
        )
        records.append(_bottleneck_of(x, *tensors, None, None, None, name))
    ids = checks.adapter_ids("adapter_ids", adapter_ids, x)
    residual_of_op = _residual_of(residual, add_residual, x)
    return MultiBottleneckCall(x, *residual_of_op, tuple(records), ids)
