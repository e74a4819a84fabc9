"""torch.ops.pylora.lora_linear and its backward: base matmul and low-rank path as one op.

The op returns (y, h). h [..., r] is the low-rank projection before the activation, kept in fp32 for
the backward; it is not differentiable. Saved for the backward are x, h and the weights, nothing
else: a dropout mask is regenerated from the seed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pylora.ops.registration import WEIGHT_SCHEMA, register

_BACKWARD_MASK = "bool[] output_mask"


def _fake(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    out_features: int,
    lora_A: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    hidden_dtype = torch.promote_types(lora_A.dtype, torch.float32)
    y = x.new_empty(*x.shape[:-1], out_features)
    return y, x.new_empty(*x.shape[:-1], lora_A.shape[0], dtype=hidden_dtype)


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    activation: str,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    out_features, rank = lora_B.shape
    dx = x.new_empty(x.shape)
    results = (
        dx,
        weight.new_empty(weight.shape),
        torch.empty_like(lora_A, memory_format=torch.contiguous_format),
        torch.empty_like(lora_B, memory_format=torch.contiguous_format),
        grad.new_empty(out_features),
        lora_A.new_empty(rank),
        lora_A.new_empty(out_features),
    )
    return tuple(
        result if wanted else x.new_empty(0)
        for result, wanted in zip(results, output_mask, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, *quantization = inputs[:6]
    ctx.blocksizes = inputs[6:8]
    lora_A, lora_B, bias, lora_A_bias, lora_B_bias = inputs[9:14]
    ctx.scaling, ctx.dropout_p, seed, ctx.activation = inputs[14:]
    ctx.bias_dtypes = [
        None if tensor is None else tensor.dtype for tensor in (bias, lora_A_bias, lora_B_bias)
    ]
    h = output[1]
    ctx.mark_non_differentiable(h)
    ctx.save_for_backward(x, h, weight, *quantization, lora_A, lora_B, seed)


# Positions of the differentiable inputs in the schema, in the order of the backward's results.
_DIFFERENTIABLE = {
    "x": 0,
    "weight": 1,
    "lora_A": 9,
    "lora_B": 10,
    "bias": 11,
    "lora_A_bias": 12,
    "lora_B_bias": 13,
}


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    x, h, weight, *quantization, lora_A, lora_B, seed = ctx.saved_tensors
    output_mask = [ctx.needs_input_grad[position] for position in _DIFFERENTIABLE.values()]
    results = torch.ops.pylora.lora_linear_backward(
        grad,
        x,
        h,
        weight,
        *quantization,
        *ctx.blocksizes,
        lora_A,
        lora_B,
        ctx.scaling,
        ctx.dropout_p,
        seed,
        ctx.activation,
        output_mask,
    )
    dtypes = [None] * 4 + ctx.bias_dtypes
    gradients: list[Tensor | None] = [None] * 18
    for position, result, dtype, wanted in zip(
        _DIFFERENTIABLE.values(), results, dtypes, output_mask, strict=True
    ):
        if wanted:
            gradients[position] = result if dtype is None else result.to(dtype)
    return tuple(gradients)


register(
    "lora_linear_backward",
    f"Tensor grad, Tensor x, Tensor h, {WEIGHT_SCHEMA}, Tensor lora_A, Tensor lora_B, "
    f"float scaling, float dropout_p, Tensor? seed, str activation, {_BACKWARD_MASK}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)
register(
    "lora_linear",
    f"Tensor x, {WEIGHT_SCHEMA}, SymInt out_features, Tensor lora_A, Tensor lora_B, "
    "Tensor? bias, Tensor? lora_A_bias, Tensor? lora_B_bias, float scaling, float dropout_p, "
    "Tensor? seed, str activation) -> (Tensor y, Tensor h)",
    _fake,
    _setup_context,
    _backward,
)
