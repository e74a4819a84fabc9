"""The gradients of multi_lora_linear: which kernels run.

grad @ lora_B[i]    adapter_rows -> multi_lora_shrink; its readers scale it to dh
dx                  the base product, in the regime of its M -> multi_lora_expand
dlora_A, dlora_B    multi_lora_weight_grad
"""

from __future__ import annotations

from torch import Tensor

from pylora.kernels.adapter_rows import adapter_rows
from pylora.kernels.lora_linear_backward import base_product_backward
from pylora.kernels.multi_lora_expand import multi_lora_expand
from pylora.kernels.multi_lora_linear import MultiLoRA
from pylora.kernels.multi_lora_shrink import multi_lora_shrink
from pylora.kernels.multi_lora_weight_grad import multi_lora_weight_grad
from pylora.kernels.precision import lora_operands, output_operands
from pylora.kernels.weight import NF4Base


def multi_lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    weight: NF4Base | Tensor,
    lora: MultiLoRA,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dlora_A, dlora_B), None where not wanted; zeros for adapters without rows.

    grad [M, N] and x [M, K], any row stride; h fp32 [M, R], contiguous.
    """
    want_x, want_A, want_B = wanted
    (M, K), operands = x.shape, lora_operands(x.dtype, lora.A.dtype)
    dx = None
    dlora_A = lora.A.new_zeros(lora.A.shape) if want_A else None
    dlora_B = lora.B.new_zeros(lora.B.shape) if want_B else None
    if M == 0:
        return (x.new_empty(0, K) if want_x else None), dlora_A, dlora_B
    rows = adapter_rows(lora.ids, lora.A.shape[0])
    if want_x or dlora_A is not None:
        parts = multi_lora_shrink(grad, lora.B.mT, rows, operands)
        if dlora_A is not None:
            # A sum inside the loop over rows would keep it from being pipelined.
            parts = parts if parts.shape[0] == 1 else parts.sum(0, keepdim=True)
            multi_lora_weight_grad(x, parts[0], lora.scalings, rows, operands, dlora_A)
        if want_x:
            base, is_finished = base_product_backward(grad, weight, K)
            dx = base[0] if is_finished else x.new_empty(M, K)
            output = output_operands(x.dtype, lora.A.dtype)
            multi_lora_expand(base, dx, parts, lora.A, lora.scalings, rows, output, rank_first=True)
    if dlora_B is not None:
        multi_lora_weight_grad(grad, h, lora.scalings, rows, operands, dlora_B.mT)
    return dx, dlora_A, dlora_B
