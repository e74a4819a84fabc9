"""What a backend is: the ops it has, whether it can run here, and which arguments it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Reason = str | None


@dataclass(frozen=True)
class Op:
    """One op of a backend.

    run        takes the arguments of the op's schema
    why_not    None where `run` takes these arguments, else the reason in words
    """

    run: Callable[..., Any]
    why_not: Callable[..., Reason]


@dataclass(frozen=True)
class Backend:
    """A set of kernels.

    unavailable   None where the backend can run in this process, else the reason in words
    path          the variant in use, such as the instruction set, in words; for reports only
    """

    name: str
    ops: Mapping[str, Op]
    unavailable: Callable[[], Reason]
    path: Callable[[], str]

    def why_not(self, op: str, args: tuple[Any, ...]) -> Reason:
        """None where this backend would run `op` on `args`, else the reason."""
        reason = self.unavailable()
        if reason is not None:
            return reason
        if op not in self.ops:
            return f"has no kernel for {op}"
        return self.ops[op].why_not(*args)
