"""What a backend is: it answers a call with a plan, or refuses it and says why."""

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
# (x, scaling, dropout, whether h is wanted) -> the results of `Plan.run` as a tuple, with None for
# an h that is not wanted. x is contiguous, with the shape and dtype of the call that was prepared.
PreparedForward = Callable[[Tensor, float, Dropout | None, bool], Any]

# The dtypes that compiled kernels take. Only the reference computes in float64.
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_VIEW_TRACKING = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)

DENSE = "the base weight is dense: torch's own matmul takes it"


@dataclass(frozen=True, slots=True)
class Plan:
    """How a backend runs a call.

    variant  the word for the kernel that runs, such as "small_m"
    run      runs a call with the same shapes, dtypes and devices as the planned one
    note     anything else the caller should know, such as why a requested kernel cannot run
    prepare  makes the forward of a layer that is called many times; None if `run` is as fast
    into     runs a call and writes its result that is like x, y or dx, into a contiguous tensor,
             which is then in the place of the result; None if the kernels cannot
    native   the first result as torch's own differentiable ops, which autograd then records itself;
             None if the op runs under a node of its own
    """

    variant: str
    run: Callable[[Any], Any]
    note: str = ""
    prepare: Callable[[Any], PreparedForward] | None = None
    into: Callable[[Any, Tensor], Any] | None = None
    native: Callable[[Any], Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """A backend's answer to a call that it does not take.

    reason  why not, in words
    """

    reason: str


Planner = Callable[[Any], Plan | Refusal]


@dataclass(frozen=True)
class Backend:
    """A set of kernels.

    planners             record type -> the function that plans a call of this type
    unavailable          None if the backend can run in this process, else the reason in words
    compiled_for         the instruction set or GPUs that its kernels are compiled for, in words;
                         reports print it
    device               type of the device that the kernels' tensors are on
    why_not_by_default   None if dispatch may choose the backend by itself; the reason in words if
                         the user must ask for it by name
    """

    name: str
    planners: Mapping[Any, Planner]
    unavailable: Callable[[], Reason]
    compiled_for: Callable[[], str]
    device: Callable[[], str]
    why_not_by_default: Callable[[], Reason] = lambda: None

    @property
    def ops(self) -> list[str]:
        """The names of the ops that the backend has kernels for."""
        return [record.op for record in self.planners]

    def plan(self, call: Any) -> Plan | Refusal:
        """How this backend would run `call`; the backend must be available."""
        planner = self.planners.get(type(call))
        return Refusal(f"has no kernel for {call.op}") if planner is None else planner(call)


# torch is asked at import, because torch.compile of torch 2.11 cannot trace this question.
_WITH_AUTOCAST = frozenset(
    device_type
    for device_type in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla")
    if torch.amp.autocast_mode.is_autocast_available(device_type)
)


def _has_autocast(device_type: str) -> bool:
    if device_type in _WITH_AUTOCAST or torch.compiler.is_compiling():
        return device_type in _WITH_AUTOCAST
    # This device type was registered after pylora was imported.
    return torch.amp.autocast_mode.is_autocast_available(device_type)


def under_autocast(device_type: str) -> bool:
    """True if autocast is enabled for this type of device."""
    # is_autocast_enabled raises an error for devices that have no autocast, such as meta.
    return _has_autocast(device_type) and torch.is_autocast_enabled(device_type)


def autocast_off(device_type: str) -> AbstractContextManager[Any]:
    """A context without autocast.

    It does nothing if autocast is off already, because some devices do not let it be switched off.
    """
    if under_autocast(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def in_python(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function of a call record that consists of torch's own ops.

    Autocast is off while it runs, because the inputs have been cast already. View tracking is off
    as well: a result may be a reshaped tensor, and if torch marked it as a view, nobody could
    change a layer's output in place, as nn.ReLU(inplace=True) does.
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
    """Why no compiled nf4_dequantize for this type of device takes the call; None if one does."""
    device = call.weight.data.device
    if device.type != device_type:
        return Refusal(f"qweight is on {device}, not on a {device_type} device")
    if call.dtype not in KERNEL_DTYPES:
        return Refusal(f"dtype is {call.dtype}; the kernels give float32, float16 and bfloat16")
    return None
