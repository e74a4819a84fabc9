"""Backward host code of many adapters over one base weight.

grad @ lora_B[i]    adapter_tokens -> multi_lora_shrink; the kernels that read it scale it to dh
dx                  the base product, in the regime of its M -> multi_lora_expand
dlora_A, dlora_B    multi_lora_weight_grad
"""

from __future__ import annotations

from torch import Tensor

from pylora.calls import Adapters, Layer, LayerGradients, Wanted
from pylora.kernels.adapter_tokens import adapter_tokens
from pylora.kernels.lora_linear_backward import base_product_backward
from pylora.kernels.multi_lora_expand import multi_lora_expand
from pylora.kernels.multi_lora_shrink import multi_lora_shrink
from pylora.kernels.multi_lora_weight_grad import multi_lora_weight_grad
from pylora.kernels.precision import lora_operands, output_operands


def multi_lora_linear_backward(
    grad: Tensor, x: Tensor, h: Tensor, layer: Layer, adapters: Adapters, wanted: Wanted
) -> LayerGradients:
    """The gradients of x, A and B, those of them that are wanted.

    grad [M, N] and x [M, K] may have any row stride; h is fp32 [M, R] and contiguous; the adapters
    are as in the forward. An adapter without tokens gets zeros.
    """
    A, B, scalings = adapters.A, adapters.B, adapters.scalings
    (M, K), operands = x.shape, lora_operands(x.dtype, A.dtype)
    dx = None
    dlora_A = A.new_zeros(A.shape) if wanted.A else None
    dlora_B = B.new_zeros(B.shape) if wanted.B else None
    if M == 0:
        return LayerGradients(x.new_empty(0, K) if wanted.x else None, A=dlora_A, B=dlora_B)
    tokens = adapter_tokens(adapters.ids, adapters.count)
    if wanted.x or dlora_A is not None:
        partials = multi_lora_shrink(grad, B.mT, tokens, operands)
        if dlora_A is not None:
            # Adding up partials inside the kernel's loop over tokens would prevent its pipelining.
            partials = partials if partials.shape[0] == 1 else partials.sum(0, keepdim=True)
            multi_lora_weight_grad(x, partials[0], scalings, tokens, operands, dlora_A)
        if wanted.x:
            base, is_finished = base_product_backward(grad, layer)
            dx = base[0] if is_finished else x.new_empty(M, K)
            output = output_operands(x.dtype, A.dtype)
            options = {"rank_first": True, "in_place": is_finished}
            multi_lora_expand(base, dx, partials, A, scalings, tokens, output, **options)
    if dlora_B is not None:
        multi_lora_weight_grad(grad, h, scalings, tokens, operands, dlora_B.mT)
    return LayerGradients(dx, A=dlora_A, B=dlora_B)
