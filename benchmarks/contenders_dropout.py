"""Contenders for a training step of a linear layer with LoRA and dropout: ours and PEFT's.

Dropout is random, and each side draws its mask in a way of its own: ours from a seed that it takes
from torch's generator, PEFT's with torch's dropout. The harness makes the call that it checks with
torch's generator in a known state (`LayerTensors.seeded`). From this state the oracle of a
contender draws the mask of that call a second time, so that every element of y and of the gradients
is judged, by the same rule as without dropout.

On CUDA the calls of a graph are checked too, and each draws a mask from a state that the graph
moves on. No oracle knows that state, and so these contenders run on a CPU alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

from benchmarks.contender import BuiltLayer, Contender
from benchmarks.contenders_layers import LAYERS
from benchmarks.layer_tensors import LayerTensors
from benchmarks.shapes import TRAINING, Cell
from pylora.dropout import dropout_seed
from pylora.reference.dropout import dropout_mask

# The probability to drop an element. QLoRA (arXiv:2305.14314) trains its smaller models with it.
PROBABILITY = 0.1
# x -> True for each element that is kept, in a mask drawn from torch's generator
Mask = Callable[[Tensor], Tensor]


def our_mask(x: Tensor) -> Tensor:
    """Draws a seed as `nn.LoRALinear` does, and makes its mask as the reference does."""
    return dropout_mask(x.shape, PROBABILITY, dropout_seed(None, x.device))


def torch_mask(x: Tensor) -> Tensor:
    """Draws a mask as `nn.Dropout` does in training."""
    return dropout(torch.ones_like(x), PROBABILITY) != 0


def dropout_oracle(
    tensors: LayerTensors, x: Tensor, grad: Tensor | None, has_lora: bool, mask: Mask = our_mask
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns (function, its arguments). The function returns (y,), with grad (y, dx, dA, dB), from
    PEFT's formula in plain torch with the mask that `mask` draws in `tensors.seeded`."""
    assert has_lora
    with tensors.seeded():
        kept = mask(x)

    def compute(x: Tensor, grad: Tensor | None, *lora: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            x, A, B = trained = [t.detach().requires_grad_() for t in (x, *lora)]
            dropped = torch.where(kept, x / (1 - PROBABILITY), 0.0)
            low_rank = linear(linear(dropped, A), B)
            y = linear(x, tensors.dense_once(x.dtype)) + tensors.scaling * low_rank
            if grad is None:
                return (y.detach(),)
            return (y.detach(), *torch.autograd.grad(y, trained, grad))

    return compute, (x, grad, *(t.detach() for t in tensors.lora()))


def _with_dropout(contender: Contender) -> Contender:
    """Returns the contender with dropout in training mode, and with an oracle for its masks."""

    def build(tensors: LayerTensors) -> BuiltLayer:
        build_layer: Any = contender.build
        layer: BuiltLayer = build_layer(tensors, lora_dropout=PROBABILITY)
        module: Any = layer.forward
        module.train()
        if contender.is_ours:
            # The first call checks the layer and keeps a record of it. The next calls, which are
            # those that are timed, take another path, and so one of these must be checked.
            with torch.no_grad():
                module(tensors.normal(1, tensors.cell.in_features))
        mask = our_mask if contender.is_ours else torch_mask
        oracle = partial(dropout_oracle, tensors, has_lora=contender.has_lora, mask=mask)
        return replace(layer, oracle=oracle)

    return replace(contender, build=build, modes=(TRAINING,), unavailable=_why_not)


def _why_not(cell: Cell, device: torch.device) -> str | None:
    if device.type == "cpu":
        return None
    return "its masks can be checked on a CPU alone"


DROPOUT = tuple(_with_dropout(contender) for contender in LAYERS if TRAINING in contender.modes)
