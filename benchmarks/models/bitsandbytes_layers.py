"""Makes the linear layers of a model those of bitsandbytes, as transformers does."""

from __future__ import annotations

import re
from typing import Any

import bitsandbytes
from torch import nn

from pylora.nn.conv1d import is_plain_linear


def linear4bit(dense: nn.Linear, double_quant: bool) -> nn.Module:
    """A Linear4bit (nf4) with the values of a dense layer, which computes in its dtype."""
    layer = bitsandbytes.nn.Linear4bit(
        dense.in_features,
        dense.out_features,
        dense.bias is not None,
        compute_dtype=dense.weight.dtype,
        compress_statistics=double_quant,
        quant_type="nf4",
    )
    layer.load_state_dict(dense.state_dict())
    return layer.to(dense.weight.device)


def in_4bit(model: Any, dense: str = r"lm_head\b") -> Any:
    """Makes linear layers 4-bit; those whose name matches the pattern `dense` stay."""
    for name, module in list(model.named_modules()):
        if is_plain_linear(module) and not re.match(dense, name):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, linear4bit(module, True))
    model.is_loaded_in_4bit = True
    return model
