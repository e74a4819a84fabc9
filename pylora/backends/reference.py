"""The reference backend: pure PyTorch, every device, dtype and shape."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from pylora import reference
from pylora.backends.backend import Backend, Op


def _takes_everything(*_: Any) -> None:
    return None


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The op's inputs have been cast already; autocast must not cast inside it as well."""

    @wraps(function)
    def run(first: torch.Tensor, *args: Any) -> Any:
        if not torch.is_autocast_enabled(first.device.type):
            return function(first, *args)
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args)

    return run


BACKEND = Backend(
    name="reference",
    ops={
        name: Op(_without_autocast(getattr(reference, name)), _takes_everything)
        for name in (
            "nf4_quantize",
            "nf4_dequantize",
            "nf4_linear",
            "nf4_linear_backward",
            "lora_linear",
            "lora_linear_backward",
        )
    },
    unavailable=lambda: None,
    path=lambda: "pure PyTorch",
    device=lambda: "cpu",
)
