"""y = x @ W^T + bias + scaling * (act(dropout(x) @ lora_A^T + lora_A_bias) @ lora_B^T +
lora_B_bias): which kernels run, by regime.

    small, middle   lora_shrink -> nf4_linear [-> linear_expand where K is split]
    large, NF4      lora_shrink, copying x -> lora_hidden -> one matrix product of
                    [x | scaling * act(h)] and [W | lora_B]
    large, dense    x @ W^T, lora_shrink -> linear_expand

A weight whose blocks straddle rows is dequantized and goes the dense way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pylora.kernels import configs
from pylora.kernels.epilogue import Epilogue
from pylora.kernels.launch import facts
from pylora.kernels.linear_expand import linear_expand
from pylora.kernels.lora_hidden import lora_hidden
from pylora.kernels.lora_shrink import lora_shrink
from pylora.kernels.nf4_dequantize import launch_nf4_dequantize, nf4_dequantize
from pylora.kernels.nf4_linear import launch_nf4_linear
from pylora.kernels.philox import Dropout
from pylora.kernels.precision import lora_operands, output_operands
from pylora.kernels.weight import NF4Base

# Columns are added to a matrix in multiples of this, which keeps its rows aligned to 16 bytes.
_COLUMN_STEP = 16


class LoRA(NamedTuple):
    """The low-rank path: A [R, K], B [N, R]."""

    A: Tensor
    B: Tensor
    A_bias: Tensor | None
    B_bias: Tensor | None
    scaling: float
    dropout: Dropout
    activation: str


def dense_if_straddling(
    weight: NF4Base | Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> NF4Base | Tensor:
    """The weight, or its dense form where a block of absmax spans two rows."""
    if isinstance(weight, NF4Base) and shape[1] % weight.blocksize:
        return nf4_dequantize(weight, shape, dtype)
    return weight


def wide_step(rank: int) -> int:
    """Columns that a rank takes in an extended matrix."""
    return configs.cdiv(rank, _COLUMN_STEP) * _COLUMN_STEP


def base_product(
    x: Tensor, weight: NF4Base | Tensor, out_features: int, epilogue: Epilogue
) -> tuple[Tensor, bool]:
    """x [M, K] @ W^T, by tiles or by one dense product.

    Returns ([1, M, out_features] in x.dtype, True) with the epilogue; or without it
    (base [parts, M, out_features], False), for `linear_expand`: one part in x.dtype where the
    product was dense, else fp32 partial sums.
    """
    M, K = x.shape
    weight = dense_if_straddling(weight, (out_features, K), x.dtype)
    if configs.is_large(M, x.element_size()):
        dense = weight
        if isinstance(weight, NF4Base):
            dense = nf4_dequantize(weight, (out_features, K), x.dtype)
        if epilogue.parts is None:
            bias = None if epilogue.bias is None else epilogue.bias.to(x.dtype)
            return torch.nn.functional.linear(x, dense, bias)[None], True
        return torch.mm(x, dense.t())[None], False
    blocksize = weight.blocksize if isinstance(weight, NF4Base) else 0
    plan = configs.forward_plan(M, out_features, K, x.element_size(), blocksize, facts(x))
    is_finished = plan.splits == 1
    dtype = x.dtype if is_finished else torch.float32
    base = x.new_empty(plan.splits, M, out_features, dtype=dtype)
    launch_nf4_linear(x, weight, base, plan, epilogue)
    return base, is_finished


def finished(base: Tensor, is_finished: bool, dtype: torch.dtype, epilogue: Epilogue) -> Tensor:
    """[rows, features] in `dtype` of what `base_product` returned."""
    if is_finished:
        return base[0]
    out = base[0] if base.shape[0] == 1 else torch.empty_like(base[0], dtype=dtype)
    linear_expand(base, out, epilogue)
    return out


def linear(x: Tensor, weight: NF4Base | Tensor, out_features: int, epilogue: Epilogue) -> Tensor:
    """x [M, K] @ W^T with an epilogue: [M, out_features]."""
    return finished(*base_product(x, weight, out_features, epilogue), x.dtype, epilogue)


def nf4_linear(x: Tensor, weight: NF4Base, out_features: int, bias: Tensor | None) -> Tensor:
    """x [M, K], any row stride -> y [M, out_features] in x.dtype."""
    if x.shape[0] == 0:
        return x.new_empty(0, out_features)
    return linear(x, weight, out_features, Epilogue(bias=bias))


def lora_linear(
    x: Tensor, weight: NF4Base | Tensor, out_features: int, bias: Tensor | None, lora: LoRA
) -> tuple[Tensor, Tensor]:
    """x [M, K], any row stride -> y [M, out_features] in x.dtype and h fp32 [M, R]."""
    rank = lora.A.shape[0]
    if x.shape[0] == 0:
        return x.new_empty(0, out_features), x.new_empty(0, rank, dtype=torch.float32)
    weight = dense_if_straddling(weight, (out_features, x.shape[1]), x.dtype)
    output = output_operands(x.dtype, lora.A.dtype)
    if (
        isinstance(weight, NF4Base)
        and configs.is_large(x.shape[0], x.element_size())
        # What fp16 cannot hold must not become an operand of a dense product.
        and (x.dtype != torch.float16 or lora.A.dtype == torch.float16)
    ):
        return _by_extended_product(x, weight, out_features, bias, lora)
    parts = lora_shrink(x, lora.A, lora_operands(x.dtype, lora.A.dtype), lora.dropout)
    h = x.new_empty(x.shape[0], rank, dtype=torch.float32)
    epilogue = Epilogue(
        bias=bias,
        parts=parts,
        parts_scale=lora.dropout.scale,
        hidden_bias=lora.A_bias,
        h=h,
        factor=lora.B,
        factor_bias=lora.B_bias,
        scaling=lora.scaling,
        activation=lora.activation,
        operands=output,
    )
    return linear(x, weight, out_features, epilogue), h


def _by_extended_product(
    x: Tensor, weight: NF4Base, out_features: int, bias: Tensor | None, lora: LoRA
) -> tuple[Tensor, Tensor]:
    """[x | scaling * act(h)] @ [W | lora_B]^T: LoRA rides on the dense product."""
    (M, K), rank = x.shape, lora.A.shape[0]
    width = K + wide_step(rank)
    # 1. x is copied while it is read for the projection.
    left = x.new_empty(M, width)
    operands = lora_operands(x.dtype, lora.A.dtype)
    parts = lora_shrink(x, lora.A, operands, lora.dropout, copy=left)
    h = lora_hidden(
        parts, lora.dropout.scale, lora.A_bias, lora.scaling, lora.activation, left[:, K:]
    )
    # 2. The caching allocator hands out the same buffer again and again, in stream order.
    right = x.new_empty(out_features, width)
    launch_nf4_dequantize(weight, right[:, :K])
    right[:, K : K + rank].copy_(lora.B)
    right[:, K + rank :].zero_()
    # 3.
    total = bias
    if lora.B_bias is not None:
        total = lora.scaling * lora.B_bias.float() + (0.0 if bias is None else bias.float())
    total = None if total is None else total.to(x.dtype)
    return torch.nn.functional.linear(left, right, total), h
