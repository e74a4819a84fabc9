"""The only place where a backend is chosen.

`choose` asks each backend, fastest first, and takes the first plan; the reference takes every call.
`use_backend` and the environment variable PYLORA_BACKEND ask for one backend by name: calls that it
does not take run on the reference, and `pylora.explain` says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

from pylora import settings
from pylora.backends import cpu, cuda, reference, triton
from pylora.backends.backend import Backend, Plan, Reason, Refusal

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (cuda.BACKEND, triton.BACKEND, cpu.BACKEND, reference.BACKEND)
}

# What `use_backend` asks for, in the thread that asks. Autograd runs the backward of CUDA ops on
# threads of its own; a node therefore remembers what its forward was asked for (`as_asked`).
_forced: ContextVar[str | None] = ContextVar("pylora_backend", default=None)


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
    forced = _forced.get()
    if forced is not None:
        return forced
    name = settings.current().backend
    return _check_name(name, "the environment variable PYLORA_BACKEND") if name else None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """A context in which every op that this thread calls runs on the backend `name`.

    name    "reference", "cpu", "triton" or "cuda"; calls that it does not take run on the reference

    A backward runs on the backend that a block around it asks for; if none does, on the one that a
    block around its forward asked for. Other threads, also those that the block starts, are not
    affected: neither is the backward of a function that torch.compile compiled, which on a GPU runs
    on autograd's own thread. PYLORA_BACKEND asks for all threads.

    Raises ValueError for an unknown name, RuntimeError for a backend that cannot run here.
    """
    token = _forced.set(_check_name(name, "name"))
    try:
        yield
    finally:
        _forced.reset(token)


def asked_for() -> str | None:
    """What a `use_backend` block around the caller asks for."""
    return _forced.get()


@contextmanager
def as_asked(name: str | None) -> Iterator[None]:
    """Runs the block on what `asked_for` gave earlier, unless a block around it asks for more."""
    token = _forced.set(_forced.get() or name)
    try:
        yield
    finally:
        _forced.reset(token)


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


@lru_cache
def _usable(forced: str | None) -> tuple[Backend, ...]:
    """The candidates that are asked in this process; `forced` is what `use_backend` asks for."""
    return tuple(backend for backend in candidates() if unavailable(backend) is None)


_refreshes = 0


def generation() -> tuple[int, str | None]:
    """A plan holds as long as this is what it was when the plan was made."""
    return _refreshes, _forced.get()


def _forget() -> None:
    global _refreshes
    _usable.cache_clear()
    _refreshes += 1


settings.forgotten_on_refresh(_forget)


def ask(backend: Backend, call: Any) -> Plan | Refusal:
    """The answer of `backend`, one of the candidates, to `call`."""
    reason = unavailable(backend)
    return backend.plan(call) if reason is None else Refusal(reason)


def choose(call: Any) -> tuple[Backend, Plan]:
    """The fastest backend that takes `call`, and its plan."""
    for backend in _usable(_forced.get()):
        plan = backend.plan(call)
        if isinstance(plan, Plan):
            return backend, plan
    raise AssertionError(f"the reference must take every op, but did not take {call.op}")


def run(call: Any) -> Any:
    """Runs `call` on the fastest backend that takes it."""
    _, plan = choose(call)
    return plan.run(call)
