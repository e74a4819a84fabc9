"""Makes torch's `AveragedModel` copy the bytes of NF4 layers instead of averaging them.

An AveragedModel averages every parameter as if it held numbers. Packed codes are no numbers: 0.9
times 255 plus 0.1 times 255 is rounded down to 254, which is another weight. They are also frozen,
so their average is what the model has now.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pylora.nn.lora_adapters import NamedAdapters
from pylora.nn.nf4_linear import BYTES, NF4Linear


def _layers(model: nn.Module) -> list[NF4Linear]:
    return [module for module in model.modules() if isinstance(module, NF4Linear)]


def _bytes_of(model: nn.Module) -> list[Tensor]:
    held = [getattr(layer, name) for layer in _layers(model) for name in BYTES]
    return [tensor for tensor in held if tensor is not None]


class _WithoutBytes:
    """A model, the parameters and buffers of which lack the bytes of its NF4 layers."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._left_out = {id(tensor) for tensor in _bytes_of(model)}

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._model, name)
        return _WithoutBytes(value) if isinstance(value, nn.Module) else value

    def parameters(self) -> Iterator[Tensor]:
        return (p for p in self._model.parameters() if id(p) not in self._left_out)

    def buffers(self) -> Iterator[Tensor]:
        return (b for b in self._model.buffers() if id(b) not in self._left_out)


def _refuse_other_adapter(average: nn.Module, model: nn.Module) -> None:
    """Raises ValueError if the model has another active adapter than its average.

    torch pairs the parameters of the two by their order, in which the active adapter comes first.
    """
    layers = (
        [module for module in root.modules() if isinstance(module, NamedAdapters)]
        for root in (average, model)
    )
    for averaged, layer in zip(*layers, strict=True):
        if averaged.active_adapter != layer.active_adapter:
            raise ValueError(
                f"{layer.active_adapter!r} is active in the model but {averaged.active_adapter!r} "
                "in its average; pylora.set_active_adapters must make them the same: call it on "
                "the model, or on the module inside the average"
            )


def install() -> None:
    """Changes `AveragedModel.update_parameters` for models with layers of pylora."""
    update: Any = AveragedModel.update_parameters

    @wraps(update)
    def update_parameters(self: AveragedModel, model: nn.Module) -> None:
        _refuse_other_adapter(self, model)
        if not _layers(self):
            return update(self, model)
        update(_WithoutBytes(self), _WithoutBytes(model))
        with torch.no_grad():
            for average, current in zip(_bytes_of(self), _bytes_of(model), strict=True):
                average.copy_(current)

    AveragedModel.update_parameters = update_parameters  # type: ignore[method-assign]
