"""The gradients of lora_linear: which kernels run, by regime.

dh       lora_shrink (grad @ lora_B) -> lora_hidden_backward
dx       small, middle: nf4_linear_backward [-> linear_expand where N is split]
         large, NF4, no dropout: one matrix product of [grad | dh] and [W ; lora_A]
         large otherwise: grad @ W -> linear_expand with the mask
dlora_A, dlora_B    lora_weight_grad
"""

from __future__ import annotations

import torch
from torch import Tensor

from pylora.kernels import configs
from pylora.kernels.epilogue import Epilogue
from pylora.kernels.launch import facts
from pylora.kernels.lora_hidden import lora_hidden_backward
from pylora.kernels.lora_linear import LoRA, dense_if_straddling, finished, wide_step
from pylora.kernels.lora_shrink import lora_shrink
from pylora.kernels.lora_weight_grad import lora_weight_grad
from pylora.kernels.nf4_dequantize import launch_nf4_dequantize, nf4_dequantize
from pylora.kernels.nf4_linear_backward import launch_nf4_linear_backward
from pylora.kernels.precision import lora_operands, output_operands
from pylora.kernels.weight import NF4Base


def base_product_backward(
    grad: Tensor, weight: NF4Base | Tensor, in_features: int, epilogue: Epilogue
) -> tuple[Tensor, bool]:
    """grad [M, N] @ W, by tiles or by one dense product; returns what `base_product` does."""
    M, N = grad.shape
    weight = dense_if_straddling(weight, (N, in_features), grad.dtype)
    if configs.is_large(M, grad.element_size()):
        dense = weight
        if isinstance(weight, NF4Base):
            dense = nf4_dequantize(weight, (N, in_features), grad.dtype)
        return torch.mm(grad, dense)[None], epilogue.parts is None
    blocksize = weight.blocksize if isinstance(weight, NF4Base) else 0
    plan = configs.backward_plan(M, N, in_features, grad.element_size(), blocksize, facts(grad))
    is_finished = plan.splits == 1
    dtype = grad.dtype if is_finished else torch.float32
    base = grad.new_empty(plan.splits, M, in_features, dtype=dtype)
    launch_nf4_linear_backward(grad, weight, base, plan, epilogue)
    return base, is_finished


def linear_backward(
    grad: Tensor, weight: NF4Base | Tensor, in_features: int, epilogue: Epilogue
) -> Tensor:
    """grad [M, N] @ W with an epilogue: [M, in_features]."""
    base, is_finished = base_product_backward(grad, weight, in_features, epilogue)
    return finished(base, is_finished, grad.dtype, epilogue)


def nf4_linear_backward(grad: Tensor, weight: NF4Base, in_features: int) -> Tensor:
    """grad [M, N], any row stride -> dx [M, in_features] in grad.dtype."""
    if grad.shape[0] == 0:
        return grad.new_empty(0, in_features)
    return linear_backward(grad, weight, in_features, Epilogue())


def lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    weight: NF4Base | Tensor,
    lora: LoRA,
    wanted: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dlora_A, dlora_B, dlora_A_bias), None where not wanted; at least one row.

    grad [M, N] and x [M, K], any row stride; h fp32 [M, R], contiguous.
    """
    want_x, want_A, want_B, want_A_bias = wanted
    operands = lora_operands(x.dtype, lora.A.dtype)
    extends = (
        want_x
        and lora.dropout.seed is None
        and isinstance(weight, NF4Base)
        and x.shape[1] % weight.blocksize == 0
        and configs.is_large(x.shape[0], x.element_size())
        and (x.dtype != torch.float16 or lora.A.dtype == torch.float16)
    )
    # 1. dh, and grad copied on the way where a wider matrix is put together.
    (M, N), rank = grad.shape, lora.A.shape[0]
    left = grad.new_empty(M, N + wide_step(rank)) if extends else None
    parts = lora_shrink(grad, lora.B.t(), operands, copy=left)
    tail = left[:, N:] if left is not None else None
    dh, activated = lora_hidden_backward(parts, h, lora.scaling, lora.activation, tail)
    # 2. dx
    dx = None
    if left is not None and isinstance(weight, NF4Base):
        dx = _by_extended_product(left, weight, lora.A, N)
    elif want_x:
        epilogue = Epilogue(
            parts=dh[None],
            factor=lora.A.t(),
            operands=output_operands(x.dtype, lora.A.dtype),
            dropout=lora.dropout,
        )
        dx = linear_backward(grad, weight, x.shape[1], epilogue)
    # 3. The small gradients.
    dtype = lora.A.dtype
    dlora_A = lora_weight_grad(x, dh, operands, lora.dropout).to(dtype) if want_A else None
    dlora_B = None
    if want_B:
        dlora_B = lora_weight_grad(grad, activated, operands).t().to(dtype).contiguous()
    dlora_A_bias = dh.sum(0).to(dtype) if want_A_bias else None
    return dx, dlora_A, dlora_B, dlora_A_bias


def _by_extended_product(left: Tensor, weight: NF4Base, lora_A: Tensor, N: int) -> Tensor:
    """[grad | dh] @ [W ; lora_A]: the gradient of LoRA rides on the dense product."""
    rank, K = lora_A.shape
    right = left.new_empty(left.shape[1], K)
    launch_nf4_dequantize(weight, right[:N])
    right[N : N + rank].copy_(lora_A)
    right[N + rank :].zero_()
    return torch.mm(left, right)
