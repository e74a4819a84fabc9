"""How the reference of an op of several layers runs each of them.

The default is pure PyTorch. A backend without a fused kernel for such an op puts its own
single-layer kernels here, and so runs every NF4 weight itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from pylora.calls import Layer, LayerGradients, Wanted
from pylora.reference.lora_linear import layer_backward, layer_forward


class LayerFunctions(NamedTuple):
    """forward(x, layer) -> (y, h); backward(grad, x, h, layer, wanted) -> LayerGradients."""

    forward: Callable[[Tensor, Layer], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Layer, Wanted], LayerGradients]


REFERENCE_LAYERS = LayerFunctions(layer_forward, layer_backward)
