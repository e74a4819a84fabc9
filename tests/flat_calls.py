"""Calls ops by flat arguments, as torch.ops.pylora takes them, on the reference or a backend."""

from __future__ import annotations

from typing import Any

from pylora import dispatch
from pylora.backends.backend import Backend, Plan, Refusal
from pylora.ops.registration import OPS, reference_op
from pylora.ops.spec import SPECS

__all__ = ["answer", "call_of", "chosen", "flat_of", "reference_op", "refusal_of", "run_on"]


def call_of(op: str, *flat: Any) -> Any:
    return SPECS[op].read(flat)


def flat_of(call: Any) -> tuple[Any, ...]:
    return SPECS[call.op].flatten(call)


def chosen(op: str, *flat: Any) -> str:
    """Returns the name of the backend that dispatch chooses."""
    return dispatch.choose(call_of(op, *flat))[0].name


def answer(backend: Backend, op: str, *flat: Any) -> Plan | Refusal:
    return backend.plan(call_of(op, *flat))


def refusal_of(backend: Backend, op: str, *flat: Any) -> str | None:
    """Returns why the backend does not take these arguments, or None if it takes them."""
    reply = answer(backend, op, *flat)
    return reply.reason if isinstance(reply, Refusal) else None


def run_on(backend: Backend, op: str, *flat: Any) -> Any:
    """Runs the op on the backend and returns its results as the op's schema orders them."""
    call = call_of(op, *flat)
    plan = backend.plan(call)
    assert isinstance(plan, Plan), plan.reason
    return OPS[type(call)].results(call, plan.run(call))
