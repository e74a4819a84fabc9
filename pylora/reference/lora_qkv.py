"""The query, key and value projections of an attention layer, each with its LoRA, in pure PyTorch.

    q, k, v = lora_linear(x, q..., seed), lora_linear(x, k..., seed + 1), lora_linear(x, v...,
              seed + 2)

This is LoRA (Hu et al., arXiv:2106.09685) on three projections of one x. Dropout draws an
independent mask for each of them.
"""

from __future__ import annotations

from torch import Tensor

from pylora.calls import LayerGradients, LoraQkvBackward, LoraQkvCall
from pylora.reference.lora_linear import REFERENCE_LAYERS, LayerFunctions


def lora_qkv(
    call: LoraQkvCall, run: LayerFunctions = REFERENCE_LAYERS
) -> tuple[list[Tensor], list[Tensor]]:
    """(the y [..., out_features] in x.dtype, the h [..., r] of each layer).

    run    how each layer runs
    """
    results = [run.forward(call.x, layer) for layer in call.layers]
    return [y for y, _ in results], [h for _, h in results]


def lora_qkv_backward(
    call: LoraQkvBackward, run: LayerFunctions = REFERENCE_LAYERS
) -> tuple[Tensor | None, list[LayerGradients]]:
    """(dx, the gradients of each layer); dx is the sum over the layers, in their order."""
    dx, gradients = None, []
    for grad, h, layer, wanted in zip(call.grads, call.hs, call.layers, call.wanted, strict=True):
        of_layer = run.backward(grad, call.x, h, layer, wanted)
        if of_layer.x is not None:
            dx = of_layer.x if dx is None else dx.add_(of_layer.x)
        gradients.append(of_layer.with_x(None))
    return dx, gradients
