"""What a backend is: the ops it has, whether it can run here, and which arguments it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from pylora.reference.rows import as_rows

Reason = str | None

# What the compiled kernels compute in; float64 is the reference's alone.
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


DENSE = "the base weight is dense: torch's own matmul takes it"


# The torch.compile of torch 2.11 cannot trace the question; the answer never changes.
@torch.compiler.assume_constant_result
def _has_autocast(device_type: str) -> bool:
    return torch.amp.autocast_mode.is_autocast_available(device_type)


def under_autocast(device_type: str) -> bool:
    # is_autocast_enabled raises an error for devices that have no autocast, such as meta.
    return _has_autocast(device_type) and torch.is_autocast_enabled(device_type)


def autocast_off(device_type: str) -> AbstractContextManager[Any]:
    """Nothing where it is off already: some devices do not even let it be switched off."""
    if under_autocast(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """An op's inputs have been cast already; autocast must not cast inside it as well.

    The first argument is a tensor or a list of them.
    """

    @wraps(function)
    def run(first: Tensor | list[Tensor], *args: Any) -> Any:
        device = (first if isinstance(first, Tensor) else first[0]).device.type
        with autocast_off(device):
            return function(first, *args)

    return run


def nf4_dequantize_why_not(device_type: str, qweight: Tensor, *args: Any) -> Reason:
    """The limits that every compiled nf4_dequantize has; the last of `args` is the output dtype."""
    if qweight.device.type != device_type:
        return f"qweight is on {qweight.device}, not on a {device_type} device"
    if args[-1] not in KERNEL_DTYPES:
        return f"dtype is {args[-1]}; the kernels give float32, float16 and bfloat16"
    return None


def contiguous_rows(x: Tensor) -> Tensor:
    """x [..., features] as the compiled kernels take it: contiguous, 2-D."""
    return as_rows(x).contiguous()


def contiguous(args: tuple[Any, ...]) -> list[Any]:
    """The arguments with every tensor among them contiguous."""
    return [arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args]


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
    device        type of the device that the kernels' tensors are on
    request_only  None where the backend is taken without being asked for by name, else the reason
    """

    name: str
    ops: Mapping[str, Op]
    unavailable: Callable[[], Reason]
    path: Callable[[], str]
    device: Callable[[], str]
    request_only: Callable[[], Reason] = lambda: None

    def why_not(self, op: str, args: tuple[Any, ...]) -> Reason:
        """None where this backend would run `op` on `args`, else the reason."""
        reason = self.unavailable()
        if reason is not None:
            return reason
        if op not in self.ops:
            return f"has no kernel for {op}"
        return self.ops[op].why_not(*args)
