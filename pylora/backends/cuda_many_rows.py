"""The many_rows variant of the cuda backend: decode the weight into a buffer, then multiply.

The dense product also carries LoRA: y = [x | scaling * act(h)] @ [W | lora_B]^T. One kernel makes
the left operand while it reads x for h; another decodes the weight into the columns of the right
operand.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from pylora.backends import extension
from pylora.backends.backend import Reason, in_python
from pylora.calls import (
    DequantizeCall,
    LoraLinearCall,
    LowRank,
    Nf4LinearBackward,
    Nf4LinearCall,
    Weight,
)


def lora_reason(x: Tensor, tokens: int, low: LowRank) -> Reason:
    """None if the dense product can carry this low-rank path, else the reason in words.

    The caller has already asked what every linear kernel of the backend needs.
    """
    if low.A.dtype != x.dtype:
        # As an operand lora_A would be rounded, and lose what it is kept in float32 for.
        return f"lora_A is {low.A.dtype}; the many_rows kernel takes {x.dtype}, as x has"
    hard = extension.hard_limits("cuda")
    if tokens > hard["max_m"]:
        return f"x has {tokens} tokens; the many_rows kernel takes up to {hard['max_m']}"
    if x.shape[-1] % hard["many_rows_columns"]:
        columns = f"a multiple of {hard['many_rows_columns']}"
        return f"in_features is {x.shape[-1]}; the many_rows kernel needs {columns}"
    return None


def _dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    return extension.nf4_dequantize(DequantizeCall(weight, weight.shape, dtype))


@in_python
def nf4_linear(call: Nf4LinearCall) -> Tensor:
    x, bias = call.x, call.layer.bias
    weight = _dense(call.layer.weight, x.dtype)
    return linear(x, weight, None if bias is None else bias.to(x.dtype))


@in_python
def nf4_linear_backward(call: Nf4LinearBackward) -> Tensor:
    return call.grad @ _dense(call.weight, call.grad.dtype)


@in_python
def lora_linear(call: LoraLinearCall) -> tuple[Tensor, Tensor]:
    x, layer, low = call.x, call.layer, call.layer.low_rank
    assert low is not None
    weight, rank = layer.weight, low.rank
    out_features, in_features = weight.shape
    left, h = extension.lora_extend(x, low)
    right = x.new_empty(out_features, left.shape[-1])
    extension.nf4_dequantize_into(weight, right[:, :in_features])
    right[:, in_features : in_features + rank] = low.B
    if in_features + rank < right.shape[1]:
        right[:, in_features + rank :] = 0
    bias = layer.summed_bias()
    return linear(left, right, None if bias is None else bias.to(x.dtype)), h
