"""Runs a model on an example to see what inputs its layers get."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def inputs_of(
    model: nn.Module, layers: Mapping[str, nn.Module], example: Any
) -> dict[str, list[Tensor]]:
    """The inputs of each layer, by its name, in one forward of the model in eval mode.

    example    the keyword arguments of the model in a mapping, its arguments in a tuple or list, or
               its only argument

    A layer that is not called is left out. The model's mode is restored.
    """
    seen: dict[str, list[Tensor]] = {}
    training = [(module, module.training) for module in model.modules()]

    def keep(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
            x, *_ = (*inputs, *options.values())
            seen.setdefault(name, []).append(x)

        return hook

    hooks = [
        layer.register_forward_pre_hook(keep(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        model.eval()
        if isinstance(example, Mapping):
            model(**example)
        elif isinstance(example, (tuple, list)):
            model(*example)
        else:
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
        for module, was_training in training:
            module.training = was_training
    return seen
