"""The classes of PEFT and bitsandbytes whose layers can compute through pylora."""

from __future__ import annotations

import sys
from typing import NamedTuple

from torch import nn

from pylora.integrations.bitsandbytes_layers import Linear4bitSwap
from pylora.integrations.peft_adalora import AdaLoraSwap
from pylora.integrations.peft_layers import PeftLoraSwap
from pylora.integrations.swaps import Swap


class SwappedClass(NamedTuple):
    """A class, by name because its library is optional, and how its layers compute."""

    library: str
    module: str
    name: str
    swap: type[Swap]


CLASSES = (
    SwappedClass("bitsandbytes", "bitsandbytes.nn", "Linear4bit", Linear4bitSwap),
    SwappedClass("peft", "peft.tuners.lora.layer", "Linear", PeftLoraSwap),
    SwappedClass("peft", "peft.tuners.lora.bnb", "Linear4bit", PeftLoraSwap),
    SwappedClass("peft", "peft.tuners.adalora.layer", "SVDLinear", AdaLoraSwap),
    SwappedClass("peft", "peft.tuners.adalora.bnb", "SVDLinear4bit", AdaLoraSwap),
)


def swap_of(layer: nn.Module) -> type[Swap] | None:
    """How a layer computes through pylora; None if its class is not one of these.

    A subclass is not, because it may compute something else.
    """
    for row in CLASSES:
        # A library that nobody has imported has no layers.
        if type(layer) is getattr(sys.modules.get(row.module), row.name, None):
            return row.swap
    return None
