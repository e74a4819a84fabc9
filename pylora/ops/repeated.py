"""Autograd for a call that a module makes again and again, with another x and little else new.

The first call finds out what the node of the op sees and keeps, and the first backward what it
runs. Later ones repeat only what can have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pylora import dispatch
from pylora.backends.backend import Plan
from pylora.calls import Layer
from pylora.ops.gradients import flat_tensors, requested
from pylora.ops.registration import (
    OPS,
    MaskedBackward,
    Op,
    Saved,
    first,
    flat_results,
    only_autograd_watches,
    run,
    with_gradient,
)


def first_call(
    op: Op,
    call: Any,
    forward: Callable[[], Any],
    rest: tuple[Any, ...] = (),
    inputs: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, RepeatedGradient]:
    """The first result of `call`, with autograd, and what its next calls repeat.

    rest, inputs   those of RepeatedGradient
    """
    results: Any = None

    def run_forward() -> Any:
        nonlocal results
        results = forward()
        return results

    y = first(with_gradient(op, call, run_forward, inputs))
    return y, RepeatedGradient(op, call, flat_results(results), rest, inputs)


class RepeatedGradient:
    """`registration.with_gradient` for such calls. Only the first result leaves the node.

    A call may hold casts of what the node differentiates, which are new in each call. All other
    tensors but x and the results are constants: the same objects in each call.
    """

    def __init__(
        self,
        op: Op,
        call: Any,
        results: Sequence[Tensor],
        rest: tuple[Any, ...] = (),
        inputs: Sequence[Tensor | None] | None = None,
    ) -> None:
        """`call` was made, and its flat results are `results`.

        rest      what the record has behind x and the layer
        inputs    what the node differentiates, x first; by default the inputs of `call`
        """
        self._op, self._record, self._rest = op, type(call), rest
        self._layer: Any = None  # a layer of casts is that of one call
        if inputs is None:
            self._layer = call.layer
        of_call = op.gradient.inputs(call)
        _, *self._inputs = of_call if inputs is None else inputs
        floating = (t for t in self._inputs if t is not None and t.is_floating_point())
        self._trainable = tuple(floating)
        tensors, self._others = op.gradient.taken_apart(call, results)
        places = {id(tensor): place for place, tensor in enumerate(tensors)}
        # The places of x and of the results; None for one that the backward does not need.
        self._places = [places.get(id(tensor)) for tensor in (call.x, *results)]
        # The place of each cast, and its index among the inputs of a call.
        self._casts = [
            (places[id(tensor)], index)
            for index, (tensor, given) in enumerate(zip(of_call[1:], self._inputs, strict=True), 1)
            if tensor is not given and id(tensor) in places
        ]
        self._constants: list[Tensor | None] = [*tensors]
        for place in (*self._places, *(place for place, _ in self._casts)):
            if place is not None:
                self._constants[place] = None  # the memory of a call is not kept
        self._masks: dict[tuple[bool, ...], Any] = {}
        self._plans: dict[Any, Plan] = {}

    def run(self, x: Tensor, forward: Callable[[], Any], cast: Any = None) -> Tensor:
        """The first of the results that `forward` makes, with autograd.

        x       what the node differentiates
        cast    the record of the call, if that holds casts
        """
        needed = x.requires_grad
        for tensor in self._trainable:
            needed = needed or tensor.requires_grad
        if not needed:
            return flat_results(forward())[0]
        new: tuple[Tensor, ...] = ()

        def run_forward() -> Tensor:
            nonlocal new
            new = (x if cast is None else cast.x, *flat_results(forward()))
            return new[1]

        def save(_: Sequence[Tensor]) -> Saved:
            constants, layer = self._constants, self._layer
            if cast is not None:
                constants, layer = constants.copy(), cast.layer
                inputs = self._op.gradient.inputs(cast)
                for cast_place, index in self._casts:
                    constants[cast_place] = inputs[index]
            tensors: list[Any] = constants.copy()
            for place, tensor in zip(self._places, new, strict=True):
                if place is not None:
                    tensors[place] = tensor
            return tensors, partial(self._later, constants, layer)

        return self._op.node(run_forward, save, 1, x, *self._inputs)

    def _later(
        self,
        constants: Sequence[Tensor | None],
        layer: Layer,
        grads: Sequence[Any],
        tensors: Sequence[Tensor],
        wanted: Sequence[bool],
    ) -> Sequence[Tensor | None]:
        """The gradients of the inputs, from the tensors that autograd kept."""
        call = self._backward_call(constants, layer, grads[0], tensors, wanted)
        if call is None:
            return self._op.gradient.later(self._others, grads, tensors, wanted)
        return requested(flat_tensors(self._results(call, wanted)), wanted)

    def _backward_call(
        self,
        constants: Sequence[Tensor | None],
        layer: Layer,
        grad: Any,
        tensors: Sequence[Tensor],
        wanted: Sequence[bool],
    ) -> Any:
        """The record of the backward; None if it must be made of its flat arguments."""
        gradient = self._op.gradient
        backward = gradient.backward
        if not isinstance(backward, MaskedBackward):
            return None
        # Hooks on saved tensors, as those that move them to another device, return other objects.
        for constant, tensor in zip(constants, tensors, strict=True):
            if constant is not None and constant is not tensor:
                return None
        mask = tuple(wanted)
        x, _, *others = (None if place is None else tensors[place] for place in self._places)
        results: list[Any] = [grad, *others]
        record = gradient.record(self._record(x, layer, *self._rest), results)
        if mask not in self._masks:
            _, *flat = backward.spec.flatten(record)
            self._masks[mask] = backward.record(grad, [None, *flat], wanted).wanted
        return replace(record, wanted=self._masks[mask])

    def _results(self, call: Any, wanted: Sequence[bool]) -> Any:
        grad = call.grad
        kept = grad.device.type == "cpu" and grad.is_contiguous() and not torch.is_grad_enabled()
        if not kept or not only_autograd_watches((grad, call.x)):
            return run(call)
        op, key = OPS[type(call)], (tuple(wanted), dispatch.generation())
        if key not in self._plans:
            self._plans[key] = dispatch.choose(call)[1]
        return op.results(call, self._plans[key].run(call))
