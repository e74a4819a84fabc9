"""torch.ops.pylora.lora_mlp and its backward: down(act(gate(x)) * up(x)) as one op.

The op returns (y, gate, up, h): gate and up [..., intermediate] are the two projections of x, h the
low-rank projections of gate, up and down; all but y are kept for the backward and are not
differentiable. act(gate) * up, as large as either, is computed again in the backward.
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


def _fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    projections = Projections(*args[:-3])
    gate, up, y = (x.new_empty(*x.shape[:-1], size) for size in projections.out_features)
    return y, gate, up, fake_h(x, projections.lora_A)


def _backward_fake(
    grad: Tensor, x: Tensor, gate: Tensor, up: Tensor, h: list[Tensor], *args: Any
) -> Gradients:
    return fake_gradients(x, Projections(*args[:-4]), args[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, *parts, ctx.dropout_p, seed, ctx.activation = inputs
    _, gate, up, h = output
    ctx.mark_non_differentiable(gate, up, *h)
    save(ctx, Projections(*parts), x, gate, up, seed, *h)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    projections, (x, gate, up, seed, *h) = saved(ctx)
    last = (ctx.dropout_p, seed, ctx.activation, output_mask(ctx))
    op = torch.ops.pylora.lora_mlp_backward
    return gradients(ctx, op(grad, x, gate, up, h, *projections, *last))


register(
    "lora_mlp_backward",
    f"Tensor grad, Tensor x, Tensor gate, Tensor up, Tensor[] h, {PROJECTIONS_SCHEMA}, "
    "float dropout_p, Tensor? seed, str activation, bool[] output_mask) "
    f"-> {GRADIENTS_SCHEMA}",
    _backward_fake,
)
register(
    "lora_mlp",
    f"Tensor x, {PROJECTIONS_SCHEMA}, float dropout_p, Tensor? seed, str activation) "
    "-> (Tensor y, Tensor gate, Tensor up, Tensor[] h)",
    _fake,
    _setup_context,
    _backward,
)
