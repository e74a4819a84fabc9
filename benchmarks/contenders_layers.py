"""Contenders for a linear layer with LoRA that are whole modules on both sides: ours and PEFT's.

A module is what a model calls. It costs the host more than the bare functions of
`contenders_torch`, and PEFT's modules add passes over the tokens that a bare function does not
have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import contenders_peers
from benchmarks.contender import BuiltLayer, Contender
from benchmarks.contenders_torch import explained, nf4_linear
from benchmarks.layer_tensors import LayerTensors
from pylora import nn

OVER_DENSE = "pylora, dense"
# The dtype of LoRA's factors -> their layer; None stands for the dtype of the cell.
Build = Callable[..., BuiltLayer]


def nf4_module(tensors: LayerTensors) -> BuiltLayer:
    """Builds `nn.NF4Linear`, without LoRA."""
    cell, layer = tensors.cell, nf4_linear(tensors)
    size = cell.in_features, cell.out_features
    module = nn.NF4Linear(*size, bias=False, device="meta", dtype=tensors.dtype)
    module.set_nf4_weight(tensors.nf4())
    return replace(layer, forward=module)


def over_nf4(
    tensors: LayerTensors, lora_dtype: torch.dtype | None = None, lora_dropout: float = 0.0
) -> BuiltLayer:
    """Builds `nn.LoRALinear` over `nn.NF4Linear`."""
    return _lora_module(nf4_module(tensors).forward, tensors, lora_dtype, lora_dropout)


def over_dense(
    tensors: LayerTensors, lora_dtype: torch.dtype | None = None, lora_dropout: float = 0.0
) -> BuiltLayer:
    """Builds `nn.LoRALinear` over `torch.nn.Linear`."""
    return _lora_module(contenders_peers.dense_linear(tensors), tensors, lora_dtype, lora_dropout)


def _lora_module(
    base: Any, tensors: LayerTensors, lora_dtype: torch.dtype | None, lora_dropout: float
) -> BuiltLayer:
    rank, (a, b) = tensors.cell.rank, (t.detach() for t in tensors.lora(lora_dtype))
    module = nn.LoRALinear(base, rank, rank * tensors.scaling, lora_dropout, dtype=a.dtype)
    module.lora_A, module.lora_B = torch.nn.Parameter(a), torch.nn.Parameter(b)

    def variant(x: Tensor) -> str:
        weight = base.nf4_weight if isinstance(base, nn.NF4Linear) else base.weight
        arguments = (x, weight, module.lora_A, module.lora_B, tensors.scaling)
        return explained("lora_linear", *arguments, dropout_p=lora_dropout)

    return BuiltLayer(module, variant, (module.lora_A, module.lora_B))


def _under_autocast(build: Build, tensors: LayerTensors) -> BuiltLayer:
    """Builds a layer with fp32 LoRA that runs under autocast to the dtype of the cell.

    Autocast rounds the factors to that dtype, in which they were drawn, and computes their
    gradients in it, so that the oracle in this dtype judges the layer.
    """
    layer = build(tensors, torch.float32)
    module = layer.forward

    def forward(x: Tensor | None) -> Any:
        with torch.autocast(tensors.device.type, tensors.dtype):
            return module(x)

    def rounded(raw: Any) -> Any:
        return tuple(t.to(tensors.dtype) for t in raw) if isinstance(raw, tuple) else raw

    return replace(layer, forward=forward, result=rounded)


LAYERS = (
    Contender("pylora", over_nf4, ("pylora-kernels", "torch"), is_ours=True),
    Contender(OVER_DENSE, over_dense, ("pylora-kernels", "torch"), weights="dense", is_ours=True),
    *contenders_peers.LORA[:2],
    contenders_peers.PEFT_OVER_DENSE,
)
LAYERS_UNDER_AUTOCAST = tuple(
    replace(contender, build=partial(_under_autocast, contender.build)) for contender in LAYERS
)
