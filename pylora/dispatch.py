"""The only place a backend is chosen.

Every op asks `select`, which takes the first backend, fastest first, that can run here and takes
the arguments; the reference takes everything. `use_backend` or the environment variable
PYLORA_BACKEND asks for one backend by name: what it does not take goes to the reference, and
`pylora.explain` says so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pylora.backends import cpu, cuda, reference, triton
from pylora.backends.backend import Backend, Reason

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (cuda.BACKEND, triton.BACKEND, cpu.BACKEND, reference.BACKEND)
}

# Process-wide, not a context variable: autograd runs the backward of CUDA ops on threads of its
# own.
_forced: str | None = None


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        known = ", ".join(reversed(BACKENDS))
        raise ValueError(f"{source} is {name!r}; it must be one of {known}")
    reason = BACKENDS[name].unavailable()
    if reason is not None:
        raise RuntimeError(f"{source} is {name!r}, which cannot run here: {reason}")
    return name


def forced_backend() -> str | None:
    """The backend asked for by `use_backend` or PYLORA_BACKEND; None where none was."""
    if _forced is not None:
        return _forced
    name = os.environ.get("PYLORA_BACKEND")
    return _check_name(name, "the environment variable PYLORA_BACKEND") if name else None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every op on the backend `name`, for the whole process, until the block ends.

    name    "reference", "cpu", "triton" or "cuda"; arguments it does not take go to the reference

    Raises ValueError for an unknown name, RuntimeError for a backend that cannot run here.
    """
    global _forced
    previous, _forced = _forced, _check_name(name, "name")
    try:
        yield
    finally:
        _forced = previous


def candidates() -> list[Backend]:
    """The backends to ask, in order; the reference is always the last."""
    forced = forced_backend()
    if forced is None:
        return list(BACKENDS.values())
    return list({forced: BACKENDS[forced], "reference": BACKENDS["reference"]}.values())


def unavailable(backend: Backend) -> Reason:
    """None where `backend`, one of the candidates, would be asked at all, else the reason."""
    if forced_backend() is None:
        return backend.unavailable() or backend.request_only()
    return backend.unavailable()


def why_not(backend: Backend, op: str, args: tuple[Any, ...]) -> Reason:
    """None where `backend`, one of the candidates, would run `op` on `args`, else the reason."""
    return unavailable(backend) or backend.why_not(op, args)


def select(op: str, args: tuple[Any, ...]) -> Backend:
    """The backend that runs `op` on `args`."""
    for backend in candidates():
        if why_not(backend, op, args) is None:
            return backend
    raise AssertionError(f"the reference must take every op, but did not take {op}")


def call(op: str, *args: Any) -> Any:
    """Runs `op` on the backend that `select` gives."""
    return select(op, args).ops[op].run(*args)
