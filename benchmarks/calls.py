"""Makes a call of a layer, its inputs and a mode. The call is what is checked and timed."""

from __future__ import annotations

import contextlib
import os
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.contender import BuiltLayer, Contender
from benchmarks.layer_tensors import LayerTensors
from benchmarks.shapes import BACKWARD, FORWARD, GRAD_FORWARD, Cell
from benchmarks.timing import Call
from pylora import dispatch, refresh


def bind(
    cell: Cell,
    contender: Contender,
    layer: BuiltLayer,
    tensors: LayerTensors,
    inputs: tuple[Tensor | None, Tensor | None] | None = None,
) -> tuple[Call, Tensor | None, Tensor | None]:
    """Returns (call, x, grad). x and grad are copies of `inputs` in the contender's dtype; without
    `inputs` they are drawn anew.

    The mode of the cell decides what the call does. A forward runs without autograd, as in
    inference, and a forward with gradients is the same call while autograd records it. A
    forward+backward returns y, dx and the gradients of the parameters. A backward returns the
    gradients alone, and the forward before it is not timed.
    """
    x, grad = inputs if inputs is not None else draw(cell, tensors)
    dtype = getattr(torch, contender.dtype or cell.dtype)
    x, grad = (None if t is None else t.to(dtype, copy=True) for t in (x, grad))

    @contextlib.contextmanager
    def around() -> Any:
        with contextlib.ExitStack() as stack:
            if layer.backend is not None:
                stack.enter_context(dispatch.use_backend(layer.backend))
            if layer.environment:
                stack.callback(refresh)
                stack.enter_context(mock.patch.dict(os.environ, layer.environment))
                refresh()
            stack.enter_context(torch.set_grad_enabled(autograd_records))
            yield

    autograd_records = cell.mode != FORWARD and layer.prepared is None
    if layer.prepared is not None:
        with around():
            prepared = layer.prepared(x, grad)
        return Call(lambda _: prepared(), around=around), x, grad
    if cell.mode == FORWARD:
        return Call(lambda _: layer.forward(x), around=around), x, None

    x.requires_grad_()
    if cell.mode == GRAD_FORWARD:
        return Call(lambda _: layer.forward(x), around=around), x, None

    inputs_of_grad, grads = [x, *layer.parameters], layer.grads(grad)
    if cell.mode == BACKWARD:
        call = Call(
            lambda y: torch.autograd.grad(y, inputs_of_grad, grads),
            prepare=lambda: layer.forward(x),
            around=around,
        )
        return call, x, grad

    def training(_: Any) -> tuple[Tensor, ...]:
        y = layer.forward(x)
        outputs = y if isinstance(y, tuple) else (y,)
        return (*(t.detach() for t in outputs), *torch.autograd.grad(y, inputs_of_grad, grads))

    return Call(training, around=around), x, grad


def draw(cell: Cell, tensors: LayerTensors) -> tuple[Tensor | None, Tensor | None]:
    """Draws x [tokens, in_features] and grad [tokens, result_features]. Either is None if the op or
    the mode does not take it."""
    if not cell.tokens:
        return None, None
    x = tensors.normal(cell.tokens, cell.in_features)
    has_grad = cell.mode not in (FORWARD, GRAD_FORWARD)
    grad = tensors.normal(cell.tokens, cell.result_features) if has_grad else None
    return x, grad


def comparable(cell: Cell, layer: BuiltLayer, raw: Any) -> Any:
    """Returns a raw result in the form of the oracles, which is a tuple if the op takes x."""
    result = layer.result(raw)
    is_forward = cell.mode in (FORWARD, GRAD_FORWARD)
    if cell.tokens and is_forward and isinstance(result, Tensor):
        return (result.detach(),)
    return result
