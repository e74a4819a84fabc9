"""A layer, its inputs and a mode made into the one call that is checked, timed and measured."""

from __future__ import annotations

import contextlib
import os
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.contender import Contender, Layer
from benchmarks.operands import Operands
from benchmarks.shapes import BACKWARD, FORWARD, GRAD_FORWARD, Cell
from benchmarks.timing import Call
from pylora import dispatch, refresh


def bind(
    cell: Cell,
    contender: Contender,
    layer: Layer,
    operands: Operands,
    inputs: tuple[Tensor | None, Tensor | None] | None = None,
) -> tuple[Call, Tensor | None, Tensor | None]:
    """(call, x, grad). `inputs` are copied in the contender's dtype; None draws new ones.

    A forward runs without autograd, as in inference; a forward with gradients is the same call
    recorded by autograd. forward+backward gives (y, dx, dparameters); backward the gradients alone,
    its forward untimed.
    """
    x, grad = inputs if inputs is not None else draw(cell, operands)
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
            stack.enter_context(torch.set_grad_enabled(records))
            yield

    records = cell.mode != FORWARD and layer.prepared is None
    if layer.prepared is not None:
        with around():
            prepared = layer.prepared(x, grad)
        return Call(lambda _: prepared(), around=around), x, grad
    if cell.mode == FORWARD:
        return Call(lambda _: layer.forward(x), around=around), x, None

    x.requires_grad_()
    if cell.mode == GRAD_FORWARD:
        return Call(lambda _: layer.forward(x), around=around), x, None

    wanted, grads = [x, *layer.parameters], layer.grads(grad)
    if cell.mode == BACKWARD:
        call = Call(
            lambda y: torch.autograd.grad(y, wanted, grads),
            prepare=lambda: layer.forward(x),
            around=around,
        )
        return call, x, grad

    def training(_: Any) -> tuple[Tensor, ...]:
        y = layer.forward(x)
        outputs = y if isinstance(y, tuple) else (y,)
        return (*(t.detach() for t in outputs), *torch.autograd.grad(y, wanted, grads))

    return Call(training, around=around), x, grad


def draw(cell: Cell, operands: Operands) -> tuple[Tensor | None, Tensor | None]:
    """Fresh random x [rows, in_features] and grad [rows, result_features], where the mode has
    them."""
    if not cell.rows:
        return None, None
    x = operands.normal(cell.rows, cell.in_features)
    has_grad = cell.mode not in (FORWARD, GRAD_FORWARD)
    grad = operands.normal(cell.rows, cell.result_features) if has_grad else None
    return x, grad


def comparable(cell: Cell, layer: Layer, raw: Any) -> Any:
    """The result in the form of the oracles: a tuple of outputs for an op that takes x."""
    result = layer.result(raw)
    is_forward = cell.mode in (FORWARD, GRAD_FORWARD)
    if cell.rows and is_forward and isinstance(result, Tensor):
        return (result.detach(),)
    return result
