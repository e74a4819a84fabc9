"""`pylora.explain`: which backend would run a call, and why each faster one would not."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from pylora import dispatch, functional


@dataclass(frozen=True)
class Explanation:
    """Outcome of `explain`: the backend chosen, its variant, and the reasons against the ones
    before it.

    A name in `rejected` that comes after the chosen one was not asked.
    """

    op: str
    backend: str
    path: str
    rejected: dict[str, str]
    forced: str | None

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend} ({self.path})"]
        if self.forced is not None:
            lines.append(f"  asked for: {self.forced}")
        lines += [f"  not {name}: {reason}" for name, reason in self.rejected.items()]
        return "\n".join(lines)


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Says which backend `pylora.functional.<op>(*args, **kwargs)` would run on; runs nothing.

    op    a function of `pylora.functional`, such as "lora_linear", or "quantize_nf4",
          "dequantize_nf4"

    Raises ValueError for an unknown op, and whatever the function itself raises for bad arguments.
    """
    if op not in functional.OP_ARGUMENTS:
        known = ", ".join(sorted(functional.OP_ARGUMENTS))
        raise ValueError(f"op is {op!r}; it must be one of {known}")
    try:
        inspect.signature(getattr(functional, op)).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{op}(): {error}") from None
    name, op_args = functional.OP_ARGUMENTS[op](*args, **kwargs)
    rejected: dict[str, str] = {}
    for backend in dispatch.candidates():
        reason = dispatch.why_not(backend, name, op_args)
        if reason is None:
            return Explanation(
                op, backend.name, backend.path(), rejected, dispatch.forced_backend()
            )
        rejected[backend.name] = reason
    raise AssertionError(f"the reference must take every op, but did not take {name}")
