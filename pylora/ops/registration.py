"""The op library `pylora::`, the one way an op is registered in it, and the one way it is called.

A call record runs in one of two ways, with the same bits. `run` goes straight to the backend's
plan, through one autograd node if a gradient is needed, as long as nothing but plain autograd
watches. Whatever else does (torch.compile, fake tensors, tensor subclasses, functorch, a dispatch
mode) sees the registered op `torch.ops.pylora.<name>`, which is also what other frameworks call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pylora import dispatch
from pylora.backends.backend import Plan
from pylora.calls import Call
from pylora.ops.gradients import flat_tensors, requested
from pylora.ops.spec import SPECS, Spec

_LIBRARY = torch.library.Library("pylora", "DEF")
_PLAIN = (Tensor, nn.Parameter)


@dataclass(frozen=True)
class Gradient:
    """How an op is differentiated.

    inputs    record -> the tensors it is differentiable in, None for one that is absent; the data
              of a weight is among them even if it is NF4, which has no gradient
    spec      of the op that computes the gradient
    record    (record, flat results) -> the record of that op, with the results in the place of
              their gradients and nothing wanted; autograd keeps its other flat arguments
    backward  (gradients of the results, flat arguments, which inputs want a gradient) -> the
              gradients of the inputs, in their order, None for those that want none
    outputs   record -> how many of the flat results are differentiable: the first ones
    """

    inputs: Callable[[Any], tuple[Tensor | None, ...]]
    spec: Spec | None
    record: Callable[[Any, list[Tensor]], Any]
    backward: Callable[[Sequence[Any], list[Any], Sequence[bool]], Sequence[Tensor | None]]
    outputs: Callable[[Any], int] = lambda call: 1

    def save(self, call: Any, results: list[Tensor]) -> Sequence[Any]:
        if self.spec is None:
            return ()
        _, *others = self.spec.flatten(self.record(call, results))
        return (None, *others)


def masked_backward(
    spec: Spec, complete: Callable[[Any], Any] = lambda call: call, several: bool = False
) -> Callable[..., Sequence[Tensor | None]]:
    """The usual `Gradient.backward`: one op that takes a mask of the gradients to compute.

    complete   changes the record before it runs
    several    the op takes the gradients of all results as a list
    """

    def backward(
        grads: Sequence[Any], saved: list[Any], wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        grad = list(grads) if several else grads[0]
        call = complete(spec.read_with_gradient(grad, saved, list(wanted)))
        return requested(flat_tensors(run(call)), wanted)

    return backward


@dataclass(frozen=True)
class Op:
    """A registered op.

    fake      record -> empty results of the right shapes, in the op's schema
    results   (record, what a backend returns for it) -> the results in the op's schema
    overload  `torch.ops.pylora.<name>.default`
    node      the autograd function, which raises if the op has no gradient
    """

    spec: Spec
    fake: Callable[[Any], Any]
    gradient: Gradient
    results: Callable[[Any, Any], Any]
    overload: Any
    node: Any


OPS: dict[Any, Op] = {}


def register(
    spec: Spec,
    fake: Callable[[Any], Any],
    gradient: Gradient,
    results: Callable[[Any, Any], Any] = lambda call, found: found,
) -> None:
    """Defines `pylora::<name>`: dispatched implementation, fake function and autograd.

    fake      record -> empty results of the right shapes, in the op's schema
    gradient  `no_gradient(...)` for an op without one
    results   see `Op`
    """
    name = spec.name
    _LIBRARY.define(f"{name}{spec.schema}", tags=(torch.Tag.pt2_compliant_tag,))
    overload = getattr(torch.ops.pylora, name).default
    op = Op(spec, fake, gradient, results, overload, _node(name, gradient))
    OPS[spec.record] = op
    _LIBRARY.impl(
        name, lambda *flat: _run_backend(op, spec.read(flat)), "CompositeExplicitAutograd"
    )
    torch.library.register_fake(
        f"pylora::{name}", lambda *flat: fake(spec.read(flat)), lib=_LIBRARY
    )
    _LIBRARY.impl(name, partial(_autograd_kernel, op), "Autograd", with_keyset=True)


def run(call: Call) -> Any:
    """The results of `call`, in the op's schema, with autograd."""
    op = OPS[type(call)]
    if not only_autograd_watches(op.gradient.inputs(call)):
        return op.overload(*op.spec.flatten(call))
    _, plan = dispatch.choose(call)
    return run_plan(op, call, plan)


def run_plan(op: Op, call: Any, plan: Plan) -> Any:
    """The results of `call` by its plan, in the op's schema, with autograd, which alone watches."""
    if torch.is_grad_enabled():
        inputs = op.gradient.inputs(call)
        if any(t is not None and t.requires_grad for t in inputs):
            return _through_node(op, call, inputs, lambda: op.results(call, plan.run(call)))
    return op.results(call, plan.run(call))


def on_reference(call: Call) -> Any:
    """What the reference makes of `call`, in the op's schema."""
    op = OPS[type(call)]
    plan = dispatch.BACKENDS["reference"].plan(call)
    assert isinstance(plan, Plan)
    return op.results(call, plan.run(call))


def reference_op(name: str) -> Callable[..., Any]:
    """The reference of an op as a function of its flat arguments, for tests and benchmarks."""
    return lambda *flat: on_reference(SPECS[name].read(flat))


def only_autograd_watches(tensors: Sequence[Tensor | None]) -> bool:
    """True if nothing but autograd would see the op on its way through torch's dispatcher."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._get_tracing_state()
        and all(t is None or (type(t) in _PLAIN and not t.is_meta) for t in tensors)
    )


def _run_backend(op: Op, call: Any) -> Any:
    return op.results(call, dispatch.run(call))


def _autograd_kernel(op: Op, keys: torch._C.DispatchKeySet, *flat: Any) -> Any:
    def below_autograd() -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.overload.redispatch(keys & torch._C._after_autograd_keyset, *flat)

    if not torch.is_grad_enabled() or not torch._C._any_requires_grad(*flat):
        return below_autograd()
    call = op.spec.read(flat)
    return _through_node(op, call, op.gradient.inputs(call), below_autograd)


def _through_node(
    op: Op, call: Any, inputs: Sequence[Tensor | None], forward: Callable[[], Any]
) -> Any:
    """Runs `forward` under the op's autograd node; torch's nodes know no lists of results."""
    shape: list[Any] = []
    flat = op.node.apply(call, forward, shape, *inputs)
    if not shape:
        return flat
    found = iter(flat)
    return tuple(
        next(found) if size is None else [next(found) for _ in range(size)] for size in shape
    )


def _node(name: str, gradient: Gradient) -> Any:
    """The autograd function of an op.

    `torch.library.register_autograd` makes one too, but looks for left-out defaults argument by
    argument in every call that needs gradients: 80 us for the 18 arguments of lora_linear, more
    than all else that such a call costs on the host.
    """

    def forward(
        ctx: Any, call: Any, run: Callable[[], Any], shape: list[Any], *inputs: Tensor | None
    ) -> Any:
        # The ops of the extension have no gradient of their own: to ask them for one would take
        # torch as long as the rest of their call.
        with torch._C._AutoDispatchBelowAutograd():
            results = run()
        flat = [results] if isinstance(results, Tensor) else flat_tensors(results)
        if not isinstance(results, Tensor):
            shape += [len(one) if isinstance(one, (list, tuple)) else None for one in results]
        tensors: list[Tensor] = []
        ctx.others = _without_tensors(gradient.save(call, flat), tensors)
        ctx.save_for_backward(*tensors)
        ctx.dtypes = [None if t is None else t.dtype for t in inputs]
        ctx.outputs = gradient.outputs(call)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*flat[ctx.outputs :])
        return results if isinstance(results, Tensor) else tuple(flat)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        tensors = iter(ctx.saved_tensors)
        saved = _with_tensors(ctx.others, tensors)
        _, _, _, *wanted = ctx.needs_input_grad  # behind call, run and shape
        if all(grad is None for grad in grads[: ctx.outputs]):
            return (None,) * (3 + len(wanted))
        found = gradient.backward(grads[: ctx.outputs], saved, wanted)
        cast = (
            None if grad is None else grad.to(dtype)
            for grad, dtype in zip(found, ctx.dtypes, strict=True)
        )
        return (None, None, None, *cast)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"{name}_autograd", (torch.autograd.Function,), members)


class _Saved:
    """Stands for a tensor that autograd keeps."""


def _without_tensors(values: Sequence[Any], tensors: list[Tensor]) -> list[Any]:
    """The values with their tensors, also those in lists, taken out into `tensors`."""
    others: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
            others.append(_Saved)
        else:
            others.append(_without_tensors(value, tensors) if type(value) is list else value)
    return others


def _with_tensors(others: Sequence[Any], tensors: Iterator[Tensor]) -> list[Any]:
    """The inverse of `_without_tensors`."""
    values: list[Any] = []
    for value in others:
        if value is _Saved:
            values.append(next(tensors))
        else:
            values.append(_with_tensors(value, tensors) if type(value) is list else value)
    return values


def no_gradient(name: str, inputs: Callable[[Any], tuple[Tensor | None, ...]]) -> Gradient:
    """For an op without a gradient: it raises if one is asked for, since torch alone would warn and
    give zeros for what comes through it."""
    hint = ""
    if name.endswith("_backward"):
        hint = ": only nf4_linear can be differentiated twice; create_graph must be False"

    def refuse(*_: Any) -> Any:
        raise NotImplementedError(f"pylora::{name} has no gradient{hint}")

    every_result = 1 << 30  # whichever of them is differentiated, the refusal must be reached
    return Gradient(inputs, None, lambda call, flat: None, refuse, lambda call: every_result)
