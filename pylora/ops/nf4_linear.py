"""torch.ops.pylora.nf4_linear and its backward: y = x @ W^T + bias over an NF4 weight W."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pylora.ops.registration import NF4_SCHEMA, register
from pylora.reference.rows import as_rows


def _fake(
    x: Tensor,
    qweight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _backward_fake(
    grad: Tensor,
    qweight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    in_features: int,
) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], in_features)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *q, _, bias = inputs
    tensors, ctx.blocksizes = q[:5], q[5:]
    ctx.save_for_backward(*tensors)
    ctx.in_features = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.pylora.nf4_linear_backward(
            grad, *ctx.saved_tensors, *ctx.blocksizes, ctx.in_features
        )
    if ctx.bias_dtype is not None and ctx.needs_input_grad[9]:
        dbias = as_rows(grad).sum(0).to(ctx.bias_dtype)
    return (dx, *[None] * 8, dbias)


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, *q, _ = inputs
    tensors, ctx.blocksizes = q[:5], q[5:]
    ctx.save_for_backward(*tensors)
    ctx.out_features = grad.shape[-1]


def _backward_of_backward(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    # dx = grad @ W is linear in grad alone: the way back is ddx @ W^T.
    dgrad = torch.ops.pylora.nf4_linear(
        ddx, *ctx.saved_tensors, *ctx.blocksizes, ctx.out_features, None
    )
    return (dgrad, *[None] * 8)


register(
    "nf4_linear_backward",
    f"Tensor grad, {NF4_SCHEMA}, SymInt in_features) -> Tensor",
    _backward_fake,
    _backward_setup_context,
    _backward_of_backward,
)
register(
    "nf4_linear",
    f"Tensor x, {NF4_SCHEMA}, SymInt out_features, Tensor? bias) -> Tensor",
    _fake,
    _setup_context,
    _backward,
)
