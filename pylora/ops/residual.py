"""The gradient of a residual, which the ops of bottleneck adapters have as their last input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

Backward = Callable[[Sequence[Any], list[Any], Sequence[bool]], Sequence[Tensor | None]]


def with_residual(backward: Backward) -> Backward:
    """A `Gradient.backward` that also returns the gradient of the residual, which is that of y.

    backward    computes the gradients of the inputs but the residual; not called if none is wanted
    """

    def run(
        grads: Sequence[Any], saved: list[Any], wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        *of_op, of_residual = wanted
        gradients = backward(grads, saved, of_op) if any(of_op) else [None for _ in of_op]
        (grad,) = grads
        return (*gradients, grad if of_residual else None)

    return run
