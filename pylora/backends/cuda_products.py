"""The cuda backend's way for many rows: the weight decoded into a buffer, then one matrix product.

LoRA rides on it: y = [x | scaling * act(h)] @ [W | lora_B]^T. One kernel makes the left operand
while it reads x for h, another decodes the weight between the columns of the right one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from pylora.backends.backend import Reason, without_autocast

# The rows of x from which on writing the decoded weight and reading it again costs less than
# decoding it for each tile of x. An estimate, like that of kernels/configs.py.
MIN_M = 513

# Limits of csrc/cuda/lora_hidden_many.cuh.
_COLUMNS = 64
_MAX_M = 8 * 65535


def lora_why_not(x: Tensor, rows: int, lora_A: Tensor) -> Reason:
    """None where x with many rows and lora_A are taken, else the reason in words.

    What holds for every kernel of the backend has been asked before.
    """
    if lora_A.dtype != x.dtype:
        # Rounded as an operand, it would lose what it was kept in float32 for.
        return f"lora_A is {lora_A.dtype}; for many rows the kernel takes {x.dtype}, as x has"
    if rows > _MAX_M:
        return f"x has {rows} rows; the kernel for many rows takes up to {_MAX_M}"
    if x.shape[-1] % _COLUMNS:
        columns = f"a multiple of {_COLUMNS}"
        return f"in_features is {x.shape[-1]}; for many rows the kernel needs {columns}"
    return None


def _dense(q: tuple[Any, ...], out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    return torch.ops.pylora_C.nf4_dequantize(*q, (out_features, in_features), dtype)


@without_autocast
def nf4_linear(x: Tensor, *args: Any) -> Tensor:
    """x [M, in_features] -> y [M, out_features]"""
    *q, out_features, bias = args
    weight = _dense(tuple(q), out_features, x.shape[1], x.dtype)
    return linear(x, weight, None if bias is None else bias.to(x.dtype))


@without_autocast
def nf4_linear_backward(grad: Tensor, *args: Any) -> Tensor:
    """grad [M, out_features] -> dx [M, in_features]"""
    *q, in_features = args
    return grad @ _dense(tuple(q), grad.shape[1], in_features, grad.dtype)


@without_autocast
def lora_linear(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """x [M, in_features] -> y [M, out_features], h fp32 [M, r]"""
    *q, out_features, lora_A, lora_B, bias, lora_A_bias, lora_B_bias, scaling = args[:14]
    rank, in_features = lora_A.shape
    left, h = torch.ops.pylora_C.lora_extend(x, lora_A, lora_A_bias, scaling, *args[14:])
    right = x.new_empty(out_features, left.shape[1])
    torch.ops.pylora_C.nf4_dequantize_into(*q, right[:, :in_features])
    right[:, in_features : in_features + rank] = lora_B
    if in_features + rank < right.shape[1]:
        right[:, in_features + rank :] = 0
    if lora_B_bias is not None:
        both = scaling * lora_B_bias.float()
        bias = both if bias is None else both.add_(bias)
    return linear(left, right, None if bias is None else bias.to(x.dtype)), h
