"""Host code of the query, key and value projections of one x, each with or without LoRA."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pylora.calls import Layer, LayerGradients, Wanted
from pylora.kernels.lora_linear import lora_linears
from pylora.kernels.lora_linear_backward import lora_linears_backward, start_backward


def lora_qkv(x: Tensor, layers: Sequence[Layer]) -> list[tuple[Tensor, Tensor]]:
    """x [M, K], any row stride -> (y, h) of each layer, as `lora_linear` returns them."""
    return lora_linears(x, layers)


def lora_qkv_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    hs: Sequence[Tensor],
    layers: Sequence[Layer],
    wanted: Sequence[Wanted],
) -> tuple[Tensor | None, list[LayerGradients]]:
    """(dx, the gradients of A, B and A_bias of each layer); dx is None if no layer wants it.

    grads    [M, N] of each layer, any row stride
    x        [M, K], any row stride, M >= 1
    hs       fp32 [M, R] of each layer with LoRA, contiguous
    """
    wants_x = any(layer_wanted.x for layer_wanted in wanted)
    started = [
        start_backward(layer, grad, wants_x) for layer, grad in zip(layers, grads, strict=True)
    ]
    return lora_linears_backward(started, x, hs, wants_x, wanted)
