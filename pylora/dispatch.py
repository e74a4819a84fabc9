"""The only place where a backend is chosen.

`choose` asks each backend, fastest first, and takes the first plan; the reference takes every call.
`use_backend` and the environment variable PYLORA_BACKEND ask for one backend by name: calls that it
does not take run on the reference, and `pylora.explain` says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from pylora import settings
from pylora.backends import cpu, cuda, reference, triton
from pylora.backends.backend import Backend, Plan, Reason, Refusal

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (cuda.BACKEND, triton.BACKEND, cpu.BACKEND, reference.BACKEND)
}

# This is process-wide and no context variable, because autograd runs the backward of CUDA ops on
# threads of its own.
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
    """The name of the backend that `use_backend` or PYLORA_BACKEND asks for; None if neither does.

    Raises ValueError for an unknown name, RuntimeError for a backend that cannot run here.
    """
    if _forced is not None:
        return _forced
    name = settings.current().backend
    return _check_name(name, "the environment variable PYLORA_BACKEND") if name else None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """A context in which every op runs on the backend `name`, in the whole process.

    name    "reference", "cpu", "triton" or "cuda"; calls that it does not take run on the reference

    Raises ValueError for an unknown name, RuntimeError for a backend that cannot run here.
    """
    global _forced
    previous, _forced = _forced, _check_name(name, "name")
    _forget()
    try:
        yield
    finally:
        _forced = previous
        _forget()


def candidates() -> list[Backend]:
    """The backends to ask, in order; the reference always comes last."""
    forced = forced_backend()
    if forced is None:
        return list(BACKENDS.values())
    return list({forced: BACKENDS[forced], "reference": BACKENDS["reference"]}.values())


def unavailable(backend: Backend) -> Reason:
    """Why `backend`, one of the candidates, is not asked at all; None if it is asked."""
    if forced_backend() is None:
        return backend.unavailable() or backend.why_not_by_default()
    return backend.unavailable()


@lru_cache(maxsize=1)
def _usable() -> tuple[Backend, ...]:
    """The candidates that are asked in this process."""
    return tuple(backend for backend in candidates() if unavailable(backend) is None)


_generation = 0


def generation() -> int:
    """A number that changes whenever older plans may no longer hold."""
    return _generation


def _forget() -> None:
    global _generation
    _usable.cache_clear()
    _generation += 1


settings.forgotten_on_refresh(_forget)


def ask(backend: Backend, call: Any) -> Plan | Refusal:
    """The answer of `backend`, one of the candidates, to `call`."""
    reason = unavailable(backend)
    return backend.plan(call) if reason is None else Refusal(reason)


def choose(call: Any) -> tuple[Backend, Plan]:
    """The fastest backend that takes `call`, and its plan."""
    for backend in _usable():
        plan = backend.plan(call)
        if isinstance(plan, Plan):
            return backend, plan
    raise AssertionError(f"the reference must take every op, but did not take {call.op}")


def run(call: Any) -> Any:
    """Runs `call` on the fastest backend that takes it."""
    _, plan = choose(call)
    return plan.run(call)
