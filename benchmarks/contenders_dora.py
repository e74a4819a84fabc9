"""Contenders for a linear layer with DoRA that are whole modules on both sides: ours and PEFT's.

Each has the magnitude of a layer whose norms have been trained away from where they started, so
that an error in the rescaling shows. The norm of the rows is part of every call in PEFT. Ours is
kept as long as the factors do not change, and is computed when the layer is built: what is timed is
a token that a model writes, or a forward and a backward that are not the first since the last step
of the optimizer. The first ones take longer by one product of as many tokens as the rank.

The same layers with plain LoRA are the yardstick. They are judged by the oracle of plain LoRA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks import contenders_peers
from benchmarks.contender import BuiltLayer, Contender
from benchmarks.contenders_layers import OVER_DENSE, nf4_module, over_dense, over_nf4
from benchmarks.layer_tensors import LayerTensors
from pylora import nn


def magnitude(tensors: LayerTensors) -> Tensor:
    """Returns the magnitude of each row [out_features], which is that of W times 0.5 to 1.5."""

    def draw() -> Tensor:
        norm = torch.linalg.vector_norm(tensors.dense_once(torch.float64), dim=1)
        spread = tensors.normal(tensors.cell.out_features, dtype=torch.float64).tanh() / 2
        return (norm * (1 + spread)).to(tensors.dtype)

    return tensors.remembered("magnitude", draw).clone()


def dora_oracle(
    tensors: LayerTensors, x: Tensor, grad: Tensor | None, has_lora: bool
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns (function, its arguments). The function returns (y,), with grad (y, dx, dA, dB,
    dmagnitude), from PEFT's formulas in plain torch; the norm has no gradient."""
    assert has_lora

    def compute(x: Tensor, grad: Tensor | None, *trained: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            x, *trained = (t.detach().requires_grad_() for t in (x, *trained))
            A, B, of_rows = trained
            weight = tensors.dense_once(x.dtype)
            adapted = weight + tensors.scaling * (B @ A).detach()
            factors = of_rows / torch.linalg.vector_norm(adapted, dim=1)
            y = (linear(x, weight) + tensors.scaling * linear(linear(x, A), B)) * factors
            if grad is None:
                return (y.detach(),)
            return (y.detach(), *torch.autograd.grad(y, (x, *trained), grad))

    lora = (t.detach() for t in tensors.lora())
    return compute, (x, grad, *lora, magnitude(tensors))


def _module(base: Callable[[LayerTensors], Any], tensors: LayerTensors) -> BuiltLayer:
    """Builds `nn.LoRALinear` with DoRA over the layer that `base` makes."""
    rank, (a, b) = tensors.cell.rank, (t.detach() for t in tensors.lora())
    alpha = rank * tensors.scaling
    module = nn.LoRALinear(base(tensors), rank, alpha, use_dora=True, dtype=a.dtype)
    module.lora_A, module.lora_B = torch.nn.Parameter(a), torch.nn.Parameter(b)
    module.lora_magnitude = torch.nn.Parameter(magnitude(tensors))
    with torch.no_grad():
        module(tensors.normal(1, tensors.cell.in_features))  # from now on it keeps the norm
    parameters = (module.lora_A, module.lora_B, module.lora_magnitude)
    return BuiltLayer(module, lambda x: "dora_linear", parameters)


def _plain(build: Callable[[LayerTensors], BuiltLayer], tensors: LayerTensors) -> BuiltLayer:
    """Builds a layer without DoRA, which says by its weight that it has an oracle of its own."""
    return replace(build(tensors), weight=tensors.dense_once(torch.float64))


def _peft(contender: Contender) -> Contender:
    """Returns PEFT's contender for plain LoRA with DoRA in its place."""

    def build(tensors: LayerTensors) -> BuiltLayer:
        peft_build: Any = contender.build
        built: BuiltLayer = peft_build(tensors, use_dora=True)
        layer: Any = built.forward
        of_rows = torch.nn.Parameter(magnitude(tensors))
        layer.lora_magnitude_vector["default"].weight = of_rows
        return replace(built, parameters=(*built.parameters, of_rows))

    return replace(contender, build=build)


_KERNELS = ("pylora-kernels", "torch")
DORA = (
    Contender(
        "pylora",
        partial(_module, lambda tensors: nf4_module(tensors).forward),
        _KERNELS,
        is_ours=True,
    ),
    Contender(
        OVER_DENSE,
        partial(_module, contenders_peers.dense_linear),
        _KERNELS,
        weights="dense",
        is_ours=True,
    ),
    Contender("pylora, plain LoRA", partial(_plain, over_nf4), _KERNELS, is_ours=True),
    Contender(
        f"{OVER_DENSE}, plain LoRA",
        partial(_plain, over_dense),
        _KERNELS,
        weights="dense",
        is_ours=True,
    ),
    *map(_peft, (*contenders_peers.LORA[:2], contenders_peers.PEFT_OVER_DENSE)),
)
