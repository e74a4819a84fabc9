"""How the tensors of a bottleneck adapter are checked and become the record of a call."""

from __future__ import annotations

from torch import Tensor

from pylora import checks
from pylora.calls import Bottleneck, Dropout, Norm
from pylora.reference.normalization import NORMS


def check_norm_kind(name: str, value: object) -> None:
    """Raises ValueError unless `value` is None or the kind of a `Norm`."""
    if value is not None and value not in NORMS:
        raise ValueError(f"{name} is {value!r}; it must be None or one of {', '.join(NORMS)}")


def residual_of(residual: Tensor | None, add_residual: bool, x: Tensor) -> Tensor | None:
    """Raises unless the residual is None or a tensor of x's shape that is to be added."""
    if residual is None:
        return None
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
    return residual


def bottleneck_of(
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
) -> Bottleneck:
    """The record of an adapter whose down_weight has been checked against x."""
    checks.number("scaling", scaling)
    bottleneck, hidden = down_weight.shape
    checks.adapter_tensor("up_weight", up_weight, x.device)
    if tuple(up_weight.shape) != (hidden, bottleneck):
        raise ValueError(
            f"up_weight has shape {tuple(up_weight.shape)}; it must be ({hidden}, {bottleneck})"
        )
    checks.same_dtype("up_weight", up_weight, "down_weight", down_weight)
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
        checks.vector(name, vector, size, x.device, down_weight.dtype, "down_weight")
    return Bottleneck(
        down_weight,
        up_weight,
        down_bias,
        up_bias,
        float(scaling),
        checks.activation("activation", activation),
        dropout,
        norm_before,
        norm_after,
    )
