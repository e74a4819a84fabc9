"""A small model with two named adapters, for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import pylora

# What the second adapter "b" differs in from the first, "default" (r=4 on every layer).
OTHERS: dict[str, dict[str, Any]] = {
    "rank": {"r": 7, "lora_alpha": 5},
    "rslora": {"r": 2, "use_rslora": True},
    "dora": {"r": 3, "use_dora": True},
    "bias": {"r": 3, "lora_bias": True},
    "bf16": {"r": 4, "dtype": torch.bfloat16},
    "targets": {"r": 4, "target_modules": ["q"]},
    "hybrid": {"r": 3, "target_modules": ["q"], "modules_to_save": ["norm", "head"]},
}


class Block(nn.Module):
    """Two linear layers, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.up = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.up(self.q(x).relu())))


def base(quantized: bool = True) -> Block:
    torch.manual_seed(1)
    model = Block()
    return pylora.quantize_model(model, skip_modules=["head"]) if quantized else model


def randomize(model: nn.Module) -> None:
    """Moves every trainable parameter away from its first value."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def two_adapters(model: nn.Module, **second: Any) -> nn.Module:
    pylora.add_lora(model, r=4, target_modules=["q", "up"])
    randomize(model)
    pylora.add_lora(model, adapter_name="b", **{"target_modules": ["q", "up"], **second})
    with pylora.active_adapters(model, "b"):
        randomize(model)
    return model
