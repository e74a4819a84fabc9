"""torch.ops.pylora.lora_qkv and its backward: three projections of one x, each with its LoRA.

The op returns (y, h), lists with one entry a projection; the h's [..., r] are kept for the backward
and are not differentiable. Saved are x, once, the h's and the weights, nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pylora.ops.projections import (
    GRADIENTS_SCHEMA,
    PROJECTIONS_SCHEMA,
    fake_gradients,
    fake_h,
    gradients,
    output_mask,
    save,
    saved,
)
from pylora.ops.registration import register
from pylora.reference.projections import Gradients, Projections


def _fake(x: Tensor, *args: Any) -> tuple[list[Tensor], list[Tensor]]:
    projections = Projections(*args[:-2])
    y = [x.new_empty(*x.shape[:-1], size) for size in projections.out_features]
    return y, fake_h(x, projections.lora_A)


def _backward_fake(grad: list[Tensor], x: Tensor, h: list[Tensor], *args: Any) -> Gradients:
    return fake_gradients(x, Projections(*args[:-3]), args[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], ...]) -> None:
    x, *parts, ctx.dropout_p, seed = inputs
    h = output[1]
    ctx.mark_non_differentiable(*h)
    save(ctx, Projections(*parts), x, seed, *h)


def _backward(ctx: Any, grad: list[Tensor], _: Any) -> tuple[Any, ...]:
    projections, (x, seed, *h) = saved(ctx)
    last = (ctx.dropout_p, seed, output_mask(ctx))
    return gradients(ctx, torch.ops.pylora.lora_qkv_backward(grad, x, h, *projections, *last))


register(
    "lora_qkv_backward",
    f"Tensor[] grad, Tensor x, Tensor[] h, {PROJECTIONS_SCHEMA}, float dropout_p, Tensor? seed, "
    f"bool[] output_mask) -> {GRADIENTS_SCHEMA}",
    _backward_fake,
)
register(
    "lora_qkv",
    f"Tensor x, {PROJECTIONS_SCHEMA}, float dropout_p, Tensor? seed) -> (Tensor[] y, Tensor[] h)",
    _fake,
    _setup_context,
    _backward,
)
