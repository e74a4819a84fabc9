"""Tells the integrations that pylora has changed the layers of a model.

transformers, for example, keeps marks on a model that say whether it is quantized. The functions of
`pylora.models` call `changed`, and the integrations, which lie above them, listen.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

_listeners: list[Callable[[nn.Module], None]] = []


def listen(listener: Callable[[nn.Module], None]) -> None:
    """Has `listener(model)` called after each change of a model's layers."""
    _listeners.append(listener)


def changed(model: nn.Module) -> None:
    """Calls the listeners; the layers of `model` are complete and must be consistent."""
    for listener in _listeners:
        listener(model)
