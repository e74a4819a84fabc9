"""Dense linear layers of other classes than nn.Linear: which they are, and their weights.

The Conv1D of transformers, which GPT-2 has, stores its weight transposed: [in_features,
out_features].
"""

from __future__ import annotations

from torch import Tensor, nn

# Subclasses of nn.Linear with a forward of their own that computes the same.
_SAME_AS_LINEAR = ("FalconLinear",)


def is_plain_linear(module: nn.Module) -> bool:
    """True for an nn.Linear, and for a subclass that is known to compute the same.

    Other subclasses may compute something else.
    """
    if type(module) is nn.Linear:
        return True
    return isinstance(module, nn.Linear) and type(module).__name__ in _SAME_AS_LINEAR


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' Conv1D."""
    # The class's name identifies it, so transformers need not be installed.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def dense_weight(linear: nn.Module) -> Tensor:
    """The weight [out_features, in_features] of an nn.Linear or a Conv1D; a view of the latter's.

    Raises AttributeError for a module without a weight.
    """
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return weight.mT if is_conv1d(linear) else weight


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear layer of any class; an NF4 weight's are its own."""
    if is_conv1d(linear):
        out_features, in_features = dense_weight(linear).shape
        return out_features, in_features
    return linear.out_features, linear.in_features  # type: ignore[return-value]


def set_dense_weight(linear: nn.Module, weight: Tensor) -> None:
    """Gives an nn.Linear or a Conv1D a new frozen weight [out_features, in_features]."""
    if is_conv1d(linear):
        weight = weight.mT.contiguous()
    if not isinstance(weight, nn.Parameter):
        weight = nn.Parameter(weight, requires_grad=False)
    linear.weight = weight
