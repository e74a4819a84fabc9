"""The gradients of multi_lora_linear: which kernels run.

grad @ lora_B[i]    adapter_rows -> multi_lora_shrink; its readers scale it to dh
dx                  the base product, in the regime of its M -> multi_lora_expand
dlora_A, dlora_B    multi_lora_weight_grad
"""

from __future__ import annotations

from torch import Tensor

from pylora.calls import Adapters, Layer, LayerGradients, Wanted
from pylora.kernels.adapter_rows import adapter_rows
from pylora.kernels.lora_linear_backward import base_product_backward
from pylora.kernels.multi_lora_expand import multi_lora_expand
from pylora.kernels.multi_lora_shrink import multi_lora_shrink
from pylora.kernels.multi_lora_weight_grad import multi_lora_weight_grad
from pylora.kernels.precision import lora_operands, output_operands


def multi_lora_linear_backward(
    grad: Tensor, x: Tensor, h: Tensor, layer: Layer, adapters: Adapters, wanted: Wanted
) -> LayerGradients:
    """The gradients of x, A and B; zeros for adapters without rows.

    grad [M, N] and x [M, K], any row stride; h fp32 [M, R], contiguous; adapters as in the forward.
    """
    A, B, scalings = adapters.A, adapters.B, adapters.scalings
    (M, K), operands = x.shape, lora_operands(x.dtype, A.dtype)
    dx = None
    dlora_A = A.new_zeros(A.shape) if wanted.A else None
    dlora_B = B.new_zeros(B.shape) if wanted.B else None
    if M == 0:
        return LayerGradients(x.new_empty(0, K) if wanted.x else None, A=dlora_A, B=dlora_B)
    rows = adapter_rows(adapters.ids, adapters.count)
    if wanted.x or dlora_A is not None:
        parts = multi_lora_shrink(grad, B.mT, rows, operands)
        if dlora_A is not None:
            # A sum inside the loop over rows would keep it from being pipelined.
            parts = parts if parts.shape[0] == 1 else parts.sum(0, keepdim=True)
            multi_lora_weight_grad(x, parts[0], scalings, rows, operands, dlora_A)
        if wanted.x:
            base, is_finished = base_product_backward(grad, layer)
            dx = base[0] if is_finished else x.new_empty(M, K)
            output = output_operands(x.dtype, A.dtype)
            multi_lora_expand(base, dx, parts, A, scalings, rows, output, rank_first=True)
    if dlora_B is not None:
        multi_lora_weight_grad(grad, h, scalings, rows, operands, dlora_B.mT)
    return LayerGradients(dx, A=dlora_A, B=dlora_B)
