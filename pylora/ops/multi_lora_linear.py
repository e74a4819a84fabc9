"""torch.ops.pylora.multi_lora_linear and its backward: one base weight, an adapter for each row.

The op returns (y, h). h [..., r] is each row's low-rank projection under its own adapter, zero
where it has none, kept in fp32 for the backward; it is not differentiable, and scalings has no
gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pylora.ops.registration import WEIGHT_SCHEMA, register


def _fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    out_features, lora_A = args[7], args[8]
    hidden_dtype = torch.promote_types(lora_A.dtype, torch.float32)
    y = x.new_empty(*x.shape[:-1], out_features)
    return y, x.new_empty(*x.shape[:-1], lora_A.shape[1], dtype=hidden_dtype)


def _backward_fake(grad: Tensor, x: Tensor, h: Tensor, *args: Any) -> tuple[Tensor, ...]:
    weight, lora_A, lora_B, output_mask = args[0], args[7], args[8], args[-1]
    shapes = (x.shape, weight.shape, lora_A.shape, lora_B.shape, grad.shape[-1:])
    return tuple(
        like.new_empty(shape) if wanted else x.new_empty(0)
        for like, shape, wanted in zip(
            (x, weight, lora_A, lora_B, grad), shapes, output_mask, strict=True
        )
    )


# Positions of the differentiable inputs in the schema, in the order of the backward's results.
_DIFFERENTIABLE = {"x": 0, "weight": 1, "lora_A": 9, "lora_B": 10, "bias": 13}


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *weight = inputs[:6]
    ctx.blocksizes = inputs[6:8]
    lora_A, lora_B, adapter_ids, scalings, bias = inputs[9:]
    ctx.bias_dtype = None if bias is None else bias.dtype
    h = output[1]
    ctx.mark_non_differentiable(h)
    ctx.save_for_backward(x, h, *weight, lora_A, lora_B, adapter_ids, scalings)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    x, h, *weight, lora_A, lora_B, adapter_ids, scalings = ctx.saved_tensors
    output_mask = [ctx.needs_input_grad[position] for position in _DIFFERENTIABLE.values()]
    low_rank = (lora_A, lora_B, adapter_ids, scalings)
    results = torch.ops.pylora.multi_lora_linear_backward(
        grad, x, h, *weight, *ctx.blocksizes, *low_rank, output_mask
    )
    gradients: list[Tensor | None] = [None] * 14
    for position, result, wanted in zip(
        _DIFFERENTIABLE.values(), results, output_mask, strict=True
    ):
        if wanted:
            is_bias = position == _DIFFERENTIABLE["bias"]
            gradients[position] = result.to(ctx.bias_dtype) if is_bias else result
    return tuple(gradients)


register(
    "multi_lora_linear_backward",
    f"Tensor grad, Tensor x, Tensor h, {WEIGHT_SCHEMA}, Tensor lora_A, Tensor lora_B, "
    "Tensor adapter_ids, Tensor scalings, bool[] output_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)
register(
    "multi_lora_linear",
    f"Tensor x, {WEIGHT_SCHEMA}, SymInt out_features, Tensor lora_A, Tensor lora_B, "
    "Tensor adapter_ids, Tensor scalings, Tensor? bias) -> (Tensor y, Tensor h)",
    _fake,
    _setup_context,
    _backward,
)
