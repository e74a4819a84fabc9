"""Forward host code of many adapters over one base weight, each token with its own adapter or none.

    y[m] = x[m] @ W^T + bias + scalings[i] * (x[m] @ lora_A[i]^T) @ lora_B[i]^T

where token m has adapter i. The kernels run in this order:

    adapter_tokens -> multi_lora_shrink -> the base product, in the regime of its M
        -> multi_lora_expand, which adds up the base's partials if K is split, and else only adds to
           the tokens of y that have an adapter
"""

from __future__ import annotations

import torch
from torch import Tensor

from pylora.calls import Adapters, Layer
from pylora.kernels.adapter_tokens import adapter_tokens
from pylora.kernels.lora_linear import base_product
from pylora.kernels.multi_lora_expand import multi_lora_expand
from pylora.kernels.multi_lora_shrink import multi_lora_shrink
from pylora.kernels.precision import lora_operands, output_operands


def multi_lora_linear(x: Tensor, layer: Layer, adapters: Adapters) -> tuple[Tensor, Tensor]:
    """x [M, K], any row stride -> y [M, out_features] in x.dtype and h fp32 [M, R].

    adapters   contiguous, with scalings in fp32. A token whose id is outside [0, count) gets the
               base alone, and its h is zero
    """
    M, out_features = x.shape[0], layer.weight.out_features
    h = x.new_empty(M, adapters.rank, dtype=torch.float32)
    if M == 0:
        return x.new_empty(0, out_features), h
    A, B, scalings = adapters.A, adapters.B, adapters.scalings
    tokens = adapter_tokens(adapters.ids, adapters.count)
    partials = multi_lora_shrink(x, A, tokens, lora_operands(x.dtype, A.dtype))
    base, is_finished = base_product(x, layer)
    y = base[0] if is_finished else x.new_empty(M, out_features)
    operands = output_operands(x.dtype, A.dtype)
    bias = None if is_finished else layer.bias
    multi_lora_expand(
        base, y, partials, B, scalings, tokens, operands, bias, h, in_place=is_finished
    )
    return y, h
