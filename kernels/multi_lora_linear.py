"""y[m] = x[m] @ W^T + bias + scalings[i] * (x[m] @ lora_A[i]^T) @ lora_B[i]^T, i the adapter of
row m: which kernels run.

    adapter_rows -> multi_lora_shrink -> the base product, in the regime of its M
                 -> multi_lora_expand: finishes the base's partial sums where K is split, else adds
                    to the rows of y that have an adapter
"""

from __future__ import annotations

import torch
from torch import Tensor

from pylora.calls import Adapters, Layer
from pylora.kernels.adapter_rows import adapter_rows
from pylora.kernels.lora_linear import base_product
from pylora.kernels.multi_lora_expand import multi_lora_expand
from pylora.kernels.multi_lora_shrink import multi_lora_shrink
from pylora.kernels.precision import lora_operands, output_operands


def multi_lora_linear(x: Tensor, layer: Layer, adapters: Adapters) -> tuple[Tensor, Tensor]:
    """x [M, K], any row stride -> y [M, out_features] in x.dtype and h fp32 [M, R], zero in rows
    without an adapter.

    adapters   contiguous, with scalings in fp32; ids outside [0, count) stand for the base alone
    """
    M, out_features = x.shape[0], layer.weight.out_features
    h = x.new_empty(M, adapters.rank, dtype=torch.float32)
    if M == 0:
        return x.new_empty(0, out_features), h
    A, B, scalings = adapters.A, adapters.B, adapters.scalings
    rows = adapter_rows(adapters.ids, adapters.count)
    parts = multi_lora_shrink(x, A, rows, lora_operands(x.dtype, A.dtype))
    base, is_finished = base_product(x, layer)
    y = base[0] if is_finished else x.new_empty(M, out_features)
    operands = output_operands(x.dtype, A.dtype)
    left = None if is_finished else layer.bias
    multi_lora_expand(base, y, parts, B, scalings, rows, operands, left, h)
    return y, h
