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
from benchmarks.shapes import BACKWARD, FORWARD, Cell
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

    A forward runs without autograd, as in inference. forward+backward gives (y, dx, dparameters);
    backward the gradients alone, its forward untimed.
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
            stack.callback(refresh)
            refresh()
            stack.enter_context(torch.set_grad_enabled(cell.mode != FORWARD))
            yield

    if cell.mode == FORWARD:
        return Call(lambda _: layer.forward(x), around=around), x, None

    x.requires_grad_()
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
    grad = None if cell.mode == FORWARD else operands.normal(cell.rows, cell.result_features)
    return x, grad


def comparable(cell: Cell, layer: Layer, raw: Any) -> Any:
    """The result in the form of the oracles: a tuple of outputs for an op that takes x."""
    result = layer.result(raw)
    is_single = cell.rows and cell.mode == FORWARD and isinstance(result, Tensor)
    return (result,) if is_single else result
