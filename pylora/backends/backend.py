"""What a backend is: it answers a call with a plan, or says why it does not take it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from pylora.calls import DequantizeCall, Dropout, Weight

Reason = str | None
# (x, scaling, dropout, whether h is wanted) -> what `Plan.run` gives, with None for an h that is
# not wanted. x has the shape and dtype of the call that was prepared, and is contiguous.
PreparedForward = Callable[[Tensor, float, Dropout | None, bool], Any]

# What the compiled kernels compute in; float64 is the reference's alone.
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_VIEW_TRACKING = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)

DENSE = "the base weight is dense: torch's own matmul takes it"


@dataclass(frozen=True, slots=True)
class Plan:
    """How a backend runs a call.

    variant  which kernel, in words, such as "few rows"
    run      runs a call like the one that was planned: of the same shapes, dtypes and devices
    note     what the caller should know besides, such as a kernel asked for that cannot run here
    prepare  makes the forward of a layer that is called many times; None if `run` is as fast
    """

    variant: str
    run: Callable[[Any], Any]
    note: str = ""
    prepare: Callable[[Any], PreparedForward] | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a backend does not take a call, in words."""

    reason: str


Planner = Callable[[Any], Plan | Refusal]


@dataclass(frozen=True)
class Backend:
    """A set of kernels.

    planners      record type -> the function that plans a call of this type
    unavailable   None if the backend can run in this process, else the reason in words
    path          what its kernels are compiled for, in words; for reports only
    device        type of the device that the kernels' tensors are on
    why_not_by_default  None if the backend is taken without being asked for by name, else the reason
    """

    name: str
    planners: Mapping[Any, Planner]
    unavailable: Callable[[], Reason]
    path: Callable[[], str]
    device: Callable[[], str]
    why_not_by_default: Callable[[], Reason] = lambda: None

    @property
    def ops(self) -> list[str]:
        """The names of the ops it has kernels for."""
        return [record.op for record in self.planners]

    def plan(self, call: Any) -> Plan | Refusal:
        """How this backend, which must be available, would run `call`."""
        planner = self.planners.get(type(call))
        return Refusal(f"has no kernel for {call.op}") if planner is None else planner(call)


# Asked here because the torch.compile of torch 2.11 cannot trace the question.
_WITH_AUTOCAST = frozenset(
    kind
    for kind in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla")
    if torch.amp.autocast_mode.is_autocast_available(kind)
)


def _has_autocast(device_type: str) -> bool:
    if device_type in _WITH_AUTOCAST or torch.compiler.is_compiling():
        return device_type in _WITH_AUTOCAST
    return torch.amp.autocast_mode.is_autocast_available(device_type)  # a device that came later


def under_autocast(device_type: str) -> bool:
    # is_autocast_enabled raises an error for devices that have no autocast, such as meta.
    return _has_autocast(device_type) and torch.is_autocast_enabled(device_type)


def autocast_off(device_type: str) -> AbstractContextManager[Any]:
    """A context without autocast; it does nothing if autocast is off already, since some devices do
    not even let it be switched off."""
    if under_autocast(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def in_python(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a function of a call record that is made of torch's own ops.

    Autocast is off, for the inputs have been cast already. View tracking is off: a result may be a
    reshaped tensor, and if it were marked as a view, nobody could change a layer's output in place,
    as nn.ReLU(inplace=True) does.
    """

    @wraps(function)
    def run(call: Any) -> Any:
        with autocast_off(_device_type(call)), torch._C._ExcludeDispatchKeyGuard(_VIEW_TRACKING):
            return function(call)

    return run


def _device_type(call: Any) -> str:
    for name in ("x", "grad"):
        if hasattr(call, name):
            return getattr(call, name).device.type
    return (call.weight.data if isinstance(call.weight, Weight) else call.weight).device.type


def dequantize_refusal(device_type: str, call: DequantizeCall) -> Refusal | None:
    """The limits that every compiled nf4_dequantize has."""
    device = call.weight.data.device
    if device.type != device_type:
        return Refusal(f"qweight is on {device}, not on a {device_type} device")
    if call.dtype not in KERNEL_DTYPES:
        return Refusal(f"dtype is {call.dtype}; the kernels give float32, float16 and bfloat16")
    return None
