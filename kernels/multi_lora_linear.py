"""y[m] = x[m] @ W^T + bias + scalings[i] * (x[m] @ lora_A[i]^T) @ lora_B[i]^T, i the adapter of
row m: which kernels run.

    adapter_rows -> multi_lora_shrink -> the base product, in the regime of its M
                 -> multi_lora_expand: finishes the base's partial sums where K is split, else adds
                    to the rows of y that have an adapter
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pylora.kernels.adapter_rows import adapter_rows
from pylora.kernels.lora_linear import base_product
from pylora.kernels.multi_lora_expand import multi_lora_expand
from pylora.kernels.multi_lora_shrink import multi_lora_shrink
from pylora.kernels.precision import lora_operands, output_operands
from pylora.kernels.weight import NF4Base


class MultiLoRA(NamedTuple):
    """A [adapters, R, K], B [adapters, N, R]; ids int64 [M], of which those outside [0, adapters)
    stand for the base alone; scalings fp32 [adapters]; all contiguous."""

    A: Tensor
    B: Tensor
    ids: Tensor
    scalings: Tensor


def multi_lora_linear(
    x: Tensor, weight: NF4Base | Tensor, out_features: int, bias: Tensor | None, lora: MultiLoRA
) -> tuple[Tensor, Tensor]:
    """x [M, K], any row stride -> y [M, out_features] in x.dtype and h fp32 [M, R], zero in rows
    without an adapter."""
    M, (adapters, rank, _) = x.shape[0], lora.A.shape
    h = x.new_empty(M, rank, dtype=torch.float32)
    if M == 0:
        return x.new_empty(0, out_features), h
    rows = adapter_rows(lora.ids, adapters)
    parts = multi_lora_shrink(x, lora.A, rows, lora_operands(x.dtype, lora.A.dtype))
    base, is_finished = base_product(x, weight, out_features, bias)
    y = base[0] if is_finished else x.new_empty(M, out_features)
    operands = output_operands(x.dtype, lora.A.dtype)
    left = None if is_finished else bias
    multi_lora_expand(base, y, parts, lora.B, lora.scalings, rows, operands, left, h)
    return y, h
