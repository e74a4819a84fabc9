"""Registers the ops of the library `pylora::` and runs call records on them.

A call record runs in one of two ways, with the same bits, but for gradients over a dense weight,
whose parts autograd may add in another order. If only plain autograd watches, `run` goes straight
to the backend's plan, through one autograd node if a gradient is needed. If anything else watches
(torch.compile, fake tensors, tensor subclasses, a dispatch mode), it sees the registered op
`torch.ops.pylora.<name>`, which is also what other frameworks call. Inside transforms of torch.func
and forward-mode AD, a call runs as operations of PyTorch: see `ops.transforms`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from pylora import dispatch
from pylora.backends.backend import Plan
from pylora.calls import Call
from pylora.ops.arguments import Spec
from pylora.ops.gradients import flat_tensors, requested
from pylora.ops.spec import SPECS
from pylora.ops.transforms import run_transformed

_LIBRARY = torch.library.Library("pylora", "DEF")
_PLAIN = (Tensor, nn.Parameter)

# What a backward runs: (gradients of the results, the tensors that autograd kept, which inputs want
# a gradient) -> the gradients of the inputs.
Later = Callable[[Sequence[Any], Sequence[Tensor], Sequence[bool]], Sequence[Tensor | None]]
# The tensors that autograd keeps, and what the backward does with them.
Saved = tuple[list[Tensor], Later]


@dataclass(frozen=True)
class Gradient:
    """How an op is differentiated.

    inputs    record -> the tensors that the op can be differentiated in, None for an absent one;
              the data of a weight is among them even if it is NF4, which has no gradient
    spec      the Spec of the op that computes the gradient; None if the op has no gradient
    record    (record, flat results) -> the record of that op, with the results in the place of
              their gradients and nothing wanted; autograd keeps its other flat arguments
    backward  (gradients of the results, flat arguments, which inputs want a gradient) -> the
              gradients of the inputs, in their order, None for those that want none
    outputs   record -> how many of the flat results, the first ones, can be differentiated
    """

    inputs: Callable[[Any], tuple[Tensor | None, ...]]
    spec: Spec | None
    record: Callable[[Any, Sequence[Tensor]], Any]
    backward: Callable[[Sequence[Any], list[Any], Sequence[bool]], Sequence[Tensor | None]]
    outputs: Callable[[Any], int] = lambda call: 1

    def save(self, call: Any, results: Sequence[Tensor]) -> Saved:
        """What the backward of `call` needs; `results` are flat."""
        tensors, others = self.taken_apart(call, results)
        return tensors, partial(self.later, others)

    def taken_apart(self, call: Any, results: Sequence[Tensor]) -> tuple[list[Tensor], list[Any]]:
        """The tensors that the backward of `call` needs, and its arguments without them."""
        if self.spec is None:
            return [], []
        _, *others = self.spec.flatten(self.record(call, results))
        tensors: list[Tensor] = []
        return tensors, [None, *_without_tensors(others, tensors)]

    def later(
        self,
        others: list[Any],
        grads: Sequence[Any],
        tensors: Sequence[Tensor],
        wanted: Sequence[bool],
    ) -> Sequence[Tensor | None]:
        """Runs the backward of a call that was taken apart."""
        return self.backward(grads, _with_tensors(others, iter(tensors)), wanted)


@dataclass(frozen=True)
class MaskedBackward:
    """The usual `Gradient.backward`: one op that takes a mask of the gradients to compute.

    complete   changes the record before it runs
    several    the op takes the gradients of all results as a list
    """

    spec: Spec
    complete: Callable[[Any], Any] = lambda call: call
    several: bool = False

    def __call__(
        self, grads: Sequence[Any], saved: list[Any], wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        call = self.record(list(grads) if self.several else grads[0], saved, wanted)
        return requested(flat_tensors(run(call)), wanted)

    def record(self, grad: Any, saved: list[Any], wanted: Sequence[bool]) -> Any:
        """The record that runs."""
        return self.complete(self.spec.read_with_gradient(grad, saved, list(wanted)))


@dataclass(frozen=True)
class Op:
    """A registered op.

    fake      record -> empty results of the right shapes, in the op's schema
    results   (record, what a backend returns for it) -> the results in the op's schema
    overload  `torch.ops.pylora.<name>.default`
    node      runs it under its autograd node, which raises if the op has no gradient
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
    results: Callable[[Any, Any], Any] = lambda call, result: result,
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
    _LIBRARY.impl(
        name, lambda *flat: run_transformed(spec.read(flat)), "FuncTorchDynamicLayerFrontMode"
    )


def run(call: Call) -> Any:
    """The results of `call`, in the op's schema, with autograd."""
    op = OPS[type(call)]
    if not only_autograd_watches(op.gradient.inputs(call)):
        return op.overload(*op.spec.flatten(call))
    _, plan = dispatch.choose(call)
    return run_plan(op, call, plan)


def run_output(call: Call) -> Tensor:
    """The first result of `call`, with autograd."""
    op = OPS[type(call)]
    if not only_autograd_watches(op.gradient.inputs(call)):
        return first(op.overload(*op.spec.flatten(call)))
    _, plan = dispatch.choose(call)
    return plan.native(call) if plan.native is not None else first(run_plan(op, call, plan))


def first(results: Tensor | Sequence[Tensor]) -> Tensor:
    """The result of an op, or the first of several."""
    return results if isinstance(results, Tensor) else results[0]


def flat_results(results: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The results of an op that has no lists, of which there may be one alone."""
    return (results,) if isinstance(results, Tensor) else tuple(results)


def run_plan(op: Op, call: Any, plan: Plan) -> Any:
    """The results of `call` by its plan, in the op's schema, with autograd, which alone watches."""
    if torch.is_grad_enabled():
        return with_gradient(op, call, lambda: below_autograd(op, call, plan))
    return op.results(call, plan.run(call))


def below_autograd(op: Op, call: Any, plan: Plan) -> Any:
    """The results of `call` by its plan, in the op's schema, without autograd."""
    # The ops of the extension have no gradient; torch would take as long to find that out as the
    # rest of their call takes.
    with torch._C._AutoDispatchBelowAutograd():
        return op.results(call, plan.run(call))


def with_gradient(
    op: Op,
    call: Any,
    forward: Callable[[], Any],
    inputs: Sequence[Tensor | None] | None = None,
) -> Any:
    """Runs `forward`, under the op's autograd node if an input needs a gradient.

    inputs    those of the node; by default those of `call`. The call may hold casts of them: torch
              casts their gradients back
    """
    if inputs is None:
        inputs = op.gradient.inputs(call)
    for tensor in inputs:
        if tensor is not None and tensor.requires_grad:
            return _through_node(op, call, inputs, forward)
    return forward()


def on_reference(call: Call) -> Any:
    """Runs `call` on the reference; the results are in the op's schema."""
    op = OPS[type(call)]
    plan = dispatch.BACKENDS["reference"].plan(call)
    assert isinstance(plan, Plan)
    return op.results(call, plan.run(call))


def reference_op(name: str) -> Callable[..., Any]:
    """The reference of an op as a function of its flat arguments, for tests and benchmarks."""
    return lambda *flat: on_reference(SPECS[name].read(flat))


# Each look-up of these names would take as long as the call.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch = torch._C._functorch.peek_interpreter_stack
_tracer = torch._C._get_tracing_state
_profiles = torch.autograd._profiler_enabled


def watched() -> bool:
    """True if more than autograd would see an op on its way through torch's dispatcher.

    torch.compile is not asked about: what it traces does not come here.
    """
    return (
        _dispatch_modes() != 0
        or _functorch() is not None
        or forward_ad._current_level >= 0
        or _tracer() is not None
        or _profiles()
    )


def only_autograd_watches(tensors: Sequence[Tensor | None]) -> bool:
    """True if nothing but autograd would see an op of these tensors."""
    return (
        not torch.compiler.is_compiling()
        and not watched()
        and all(t is None or (type(t) in _PLAIN and not t.is_meta) for t in tensors)
    )


def _run_backend(op: Op, call: Any) -> Any:
    return op.results(call, dispatch.run(call))


def _autograd_kernel(op: Op, keys: torch._C.DispatchKeySet, *flat: Any) -> Any:
    def below_autograd() -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.overload.redispatch(keys & torch._C._after_autograd_keyset, *flat)

    if forward_ad._current_level >= 0:  # a dual_level; torch.func has its own key
        return run_transformed(op.spec.read(flat))
    if not torch.is_grad_enabled() or not torch._C._any_requires_grad(*flat):
        return below_autograd()
    call = op.spec.read(flat)
    return _through_node(op, call, op.gradient.inputs(call), below_autograd)


def _through_node(
    op: Op, call: Any, inputs: Sequence[Tensor | None], forward: Callable[[], Any]
) -> Any:
    """Runs `forward`, which records no gradient, under the op's autograd node."""
    gradient = op.gradient
    save, outputs = partial(gradient.save, call), gradient.outputs(call)
    if not op.spec.has_lists:
        return op.node(forward, save, outputs, *inputs)
    lengths: list[int | None] = []  # of the results; None for a tensor

    def opened() -> tuple[Tensor, ...]:  # torch's nodes know no lists of results
        results = forward()
        lengths.extend(len(r) if isinstance(r, (list, tuple)) else None for r in results)
        return tuple(flat_tensors(results))

    flat = iter(op.node(opened, save, outputs, *inputs))
    return tuple(next(flat) if length is None else list(islice(flat, length)) for length in lengths)


def _node(name: str, gradient: Gradient) -> Any:
    """Runs an op under its autograd node: (forward, save, outputs, *inputs) -> flat results.

    forward   () -> the flat results
    save      flat results -> what the backward needs
    outputs   how many results are differentiable: the first ones

    `torch.library.register_autograd` makes a node too, but looks for left-out defaults argument by
    argument in every call that needs gradients: 80 us for the 18 arguments of lora_linear, more
    than all else that such a call costs on the host.
    """

    def forward(
        ctx: Any,
        run: Callable[[], Any],
        save: Callable[[Sequence[Tensor]], Saved],
        outputs: int,
        *inputs: Tensor | None,
    ) -> Any:
        results = run()
        flat = flat_results(results)
        tensors, ctx.later = save(flat)
        ctx.save_for_backward(*tensors)
        ctx.outputs, ctx.backend = outputs, dispatch.asked_for()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*flat[outputs:])
        return results

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        _, _, _, *wanted = ctx.needs_input_grad  # behind forward, save and outputs
        given = grads[: ctx.outputs]
        if all(grad is None for grad in given):
            return (None,) * (3 + len(wanted))
        if ctx.backend is None:
            return None, None, None, *ctx.later(given, saved, wanted)
        with dispatch.as_asked(ctx.backend):
            return None, None, None, *ctx.later(given, saved, wanted)

    base: Any = torch.autograd.Function
    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    node = type(f"{name}_autograd", (base,), members)
    # Function.apply itself spends a third of its time on the transforms of torch.func; no call that
    # they watch comes here (`watched`), other than through the registered op, below them.
    return super(base, node).apply


class _Kept:
    """Stands for a tensor that autograd keeps."""


# torch's metaclass takes longer to say if a value is a Tensor than all else that is done with it,
# so these types are recognized first.
_NO_TENSORS = frozenset((int, float, str, bool, type(None)))


def _without_tensors(values: Sequence[Any], tensors: list[Tensor]) -> list[Any]:
    """The values with their tensors, also those in lists, taken out into `tensors`."""
    others: list[Any] = []
    for value in values:
        value_type = type(value)
        if value_type in _NO_TENSORS:
            others.append(value)
        elif value_type in _PLAIN or isinstance(value, Tensor):
            tensors.append(value)
            others.append(_Kept)
        else:
            others.append(_without_tensors(value, tensors) if value_type is list else value)
    return others


def _with_tensors(others: Sequence[Any], tensors: Iterator[Tensor]) -> list[Any]:
    """The inverse of `_without_tensors`."""
    values: list[Any] = []
    for value in others:
        if value is _Kept:
            values.append(next(tensors))
        else:
            values.append(_with_tensors(value, tensors) if type(value) is list else value)
    return values


def no_gradient(name: str, inputs: Callable[[Any], tuple[Tensor | None, ...]]) -> Gradient:
    """The Gradient of an op that has none: it raises NotImplementedError if one is asked for.

    Without it torch would only warn, and give zeros.
    """
    hint = ""
    if name.endswith("_backward"):
        hint = (
            ": only nf4_linear can be differentiated twice; create_graph must be False, or "
            "torch.func.grad must be nested"
        )

    def refuse(*_: Any) -> Any:
        raise NotImplementedError(f"pylora::{name} has no gradient{hint}")

    every_result = 1 << 30  # whichever of them is differentiated, the refusal must be reached
    return Gradient(inputs, None, lambda call, flat: None, refuse, lambda call: every_result)
