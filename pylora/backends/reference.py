"""The reference backend: pure PyTorch, every device, dtype and shape."""

from __future__ import annotations

from typing import Any

from pylora import reference
from pylora.backends.backend import Backend, Op, without_autocast


def _takes_everything(*_: Any) -> None:
    return None


BACKEND = Backend(
    name="reference",
    ops={
        name: Op(without_autocast(getattr(reference, name)), _takes_everything)
        for name in (
            "nf4_quantize",
            "nf4_dequantize",
            "nf4_linear",
            "nf4_linear_backward",
            "lora_linear",
            "lora_linear_backward",
            "lora_qkv",
            "lora_qkv_backward",
            "lora_mlp",
            "lora_mlp_backward",
            "multi_lora_linear",
            "multi_lora_linear_backward",
        )
    },
    unavailable=lambda: None,
    path=lambda: "pure PyTorch",
    device=lambda: "cpu",
)
