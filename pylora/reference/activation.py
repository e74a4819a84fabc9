"""The activations that a low-rank path may have between its two factors, and their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_aten = torch.ops.aten


class Activation(NamedTuple):
    """An activation and its derivative.

    forward     h -> act(h)
    backward    (grad, h) -> grad * act'(h)
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _sigmoid_backward(grad: Tensor, h: Tensor) -> Tensor:
    return _aten.sigmoid_backward(grad, torch.sigmoid(h))


def _tanh_backward(grad: Tensor, h: Tensor) -> Tensor:
    return _aten.tanh_backward(grad, torch.tanh(h))


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(lambda h: h, lambda grad, h: grad),
    "relu": Activation(torch.relu, lambda grad, h: _aten.threshold_backward(grad, h, 0)),
    "gelu": Activation(_aten.gelu, _aten.gelu_backward),
    "gelu_tanh": Activation(
        lambda h: _aten.gelu(h, approximate="tanh"),
        lambda grad, h: _aten.gelu_backward(grad, h, approximate="tanh"),
    ),
    "silu": Activation(_aten.silu, _aten.silu_backward),
    "tanh": Activation(torch.tanh, _tanh_backward),
    "sigmoid": Activation(torch.sigmoid, _sigmoid_backward),
}

# The activations that a gated MLP may have; each returns a new tensor, never its argument.
GATED_ACTIVATIONS = {name: ACTIVATIONS[name] for name in ("silu", "gelu", "gelu_tanh")}
