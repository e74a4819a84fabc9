"""`pylora.explain` says which backend would run a call, and why each faster one would not."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pylora import dispatch, functional
from pylora.backends.backend import Refusal
from pylora.calls import Call
from pylora.ops.gradients import flat_tensors
from pylora.ops.registration import OPS


@dataclass(frozen=True)
class Explanation:
    """The answer of `explain` for one op.

    op            the op that would run
    backend       the name of the backend that would run it
    variant       the kernel that would run, in words; for a composed op, that of each step
    compiled_for  the instruction set or GPUs that the backend's kernels are compiled for
    rejected      the backends asked before it, by name, with the reason of each; the backends after
                  it are not asked
    forced        the backend that was asked for by name; None if none was
    notes         anything else a caller should know
    backward      the explanation of the op that computes the gradients; None if there is none
    """

    op: str
    backend: str
    variant: str
    compiled_for: str
    rejected: dict[str, str]
    forced: str | None
    notes: tuple[str, ...] = ()
    backward: Explanation | None = None

    def __str__(self) -> str:
        how = self.variant
        if self.compiled_for != self.variant:
            how += f"; {self.compiled_for}"
        lines = [f"{self.op}: {self.backend} ({how})"]
        if self.forced is not None:
            lines.append(f"  asked for: {self.forced}")
        lines += [f"  not {name}: {reason}" for name, reason in self.rejected.items()]
        lines += [f"  note: {note}" for note in self.notes]
        if self.backward is not None:
            lines.append(str(self.backward))
        return "\n".join(lines)


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Says which backend `pylora.functional.<op>(*args, **kwargs)` would run on; runs nothing.

    op              the name of a function of `pylora.functional`, such as "lora_linear" or
                    "quantize_nf4"
    args, kwargs    the arguments of that function

    Returns an Explanation, which prints as text. If the op is differentiable, it explains the
    backward as well. Raises ValueError for an unknown op, and for bad arguments whatever the
    function itself raises.
    """
    if op not in functional.CALLS:
        known = ", ".join(sorted(functional.CALLS))
        raise ValueError(f"op is {op!r}; it must be one of {known}")
    try:
        bound = inspect.signature(getattr(functional, op)).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{op}(): {error}") from None
    if bound.arguments.get("dropout_p") and bound.arguments.get("seed") is None:
        bound.arguments["seed"] = 0  # explaining draws no random number
    call = functional.CALLS[op](*bound.args, **bound.kwargs)
    explanation = _explained(op, call)
    if bound.arguments.get("double_quant"):
        note = "the second quantization, of absmax, runs in PyTorch (the reference)"
        explanation = replace(explanation, notes=(*explanation.notes, note))
    backward = _backward_call(call)
    if backward is None:
        return explanation
    return replace(explanation, backward=_explained(backward.op, backward))


def _explained(name: str, call: Call) -> Explanation:
    rejected: dict[str, str] = {}
    for backend in dispatch.candidates():
        answer = dispatch.ask(backend, call)
        if not isinstance(answer, Refusal):
            notes = (answer.note,) if answer.note else ()
            forced = dispatch.forced_backend()
            return Explanation(
                name,
                backend.name,
                answer.variant,
                backend.compiled_for(),
                rejected,
                forced,
                notes,
            )
        rejected[backend.name] = answer.reason
    raise AssertionError(f"the reference must take every op, but did not take {call.op}")


def _backward_call(call: Call) -> Any:
    """The record of the backward of a call, with uninitialized results; None if it has none."""
    gradient = OPS[type(call)].gradient
    if gradient.spec is None:
        return None
    results = OPS[type(call)].fake(call)
    flat = [results] if isinstance(results, Tensor) else flat_tensors(results)
    return gradient.record(call, flat)
