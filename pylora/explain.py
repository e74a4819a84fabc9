"""`pylora.explain`: which backend would run a call, and why each faster one would not."""

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
    """What `explain` found.

    backend    the backend chosen
    variant    its kernel, in words; for an op made of several, what each of them runs
    path       what the backend's kernels are compiled for
    rejected   the backends before it, each with its reason; one that comes after was not asked
    forced     the backend asked for by name; None if none was
    notes      what else a caller should know
    backward   the same of the op that computes the gradients; None if there is none
    """

    op: str
    backend: str
    variant: str
    path: str
    rejected: dict[str, str]
    forced: str | None
    notes: tuple[str, ...] = ()
    backward: Explanation | None = None

    def __str__(self) -> str:
        how = self.variant if self.path == self.variant else f"{self.variant}; {self.path}"
        lines = [f"{self.op}: {self.backend} ({how})"]
        if self.forced is not None:
            lines.append(f"  asked for: {self.forced}")
        lines += [f"  not {name}: {reason}" for name, reason in self.rejected.items()]
        lines += [f"  note: {note}" for note in self.notes]
        if self.backward is not None:
            lines.append(str(self.backward))
        return "\n".join(lines)


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Says which backend `pylora.functional.<op>(*args, **kwargs)` would run on, forward and, if it
    is differentiable, backward; runs nothing.

    op    a function of `pylora.functional`, such as "lora_linear", or "quantize_nf4",
          "dequantize_nf4"

    Raises ValueError for an unknown op, and whatever the function itself raises for bad arguments.
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
    found = _explained(op, call)
    if bound.arguments.get("double_quant"):
        second = "the second quantization, of absmax, runs in PyTorch (the reference)"
        found = replace(found, notes=(*found.notes, second))
    backward = _backward_call(call)
    if backward is None:
        return found
    return replace(found, backward=_explained(backward.op, backward))


def _explained(name: str, call: Call) -> Explanation:
    rejected: dict[str, str] = {}
    for backend in dispatch.candidates():
        answer = dispatch.ask(backend, call)
        if not isinstance(answer, Refusal):
            notes = (answer.note,) if answer.note else ()
            forced = dispatch.forced_backend()
            return Explanation(
                name, backend.name, answer.variant, backend.path(), rejected, forced, notes
            )
        rejected[backend.name] = answer.reason
    raise AssertionError(f"the reference must take every op, but did not take {call.op}")


def _backward_call(call: Call) -> Any:
    """The record of the backward of a differentiable call, over uninitialized results."""
    gradient = OPS[type(call)].gradient
    if gradient.spec is None:
        return None
    results = OPS[type(call)].fake(call)
    flat = [results] if isinstance(results, Tensor) else flat_tensors(results)
    return gradient.record(call, flat)
