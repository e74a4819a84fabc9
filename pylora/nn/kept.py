"""What a layer keeps between calls, so that a forward checks and plans only what can have changed.

A layer's tensors are checked when they are first seen, and its plans are kept. Both hold for the
tensors that stand in the module at the call, by identity: FSDP2, `functional_call` and
parametrizations put others there without an assignment. `.to()` and ZeRO-3 change a parameter in
place; its device and dtype are therefore compared at each call, and the compiled kernels check its
size. Whatever else is unusual about a call goes the long way, through `pylora.functional`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pylora import dispatch
from pylora.backends.backend import Plan
from pylora.backends.row_steps import row_steps
from pylora.calls import Layer
from pylora.ops.registration import OPS, only_autograd_watches, run_plan

Place = tuple[dict[str, Any], str]  # where a module holds a parameter or buffer


def places_of(module: nn.Module, names: Sequence[str]) -> tuple[Place, ...] | None:
    """Where the module holds these tensors; None if it computes one of them (a parametrization)."""
    found = []
    for name in names:
        for held in (module._parameters, module._buffers):
            if name in held:
                found.append((held, name))
                break
        else:
            return None
    return tuple(found)


class Kept:
    """The checked record of a layer, and the plans of its calls."""

    __slots__ = (
        "_device_type",
        "_generation",
        "_in_features",
        "_op",
        "_places",
        "_plans",
        "_record",
        "_tensors",
        "_weight",
        "device",
        "layer",
    )

    def __init__(self, places: tuple[Place, ...], call: Any) -> None:
        """`call` has been checked; its tensors stand in these places."""
        self._record, self._op, self.layer = type(call), OPS[type(call)], call.layer
        self._places = places
        self._tensors = tuple(held[name] for held, name in places)
        self._weight = self.layer.weight.data
        self._in_features = self.layer.weight.shape[1]
        self.device: torch.device = call.x.device
        self._device_type = self.device.type
        self._plans: dict[Any, Plan] = {}
        self._generation = dispatch.generation()

    @classmethod
    def of(cls, places: tuple[Place, ...] | None, x: Tensor, call: Any) -> Kept | None:
        """None if a call like this one must go the long way again."""
        if places is None or call.x is not x:  # autocast has made another x
            return None
        tensors = (held[name] for held, name in places)
        return cls(places, call) if only_autograd_watches((x, *tensors)) else None

    def takes(self, x: Any) -> bool:
        """True if a call with x needs no further check."""
        if type(x) is not Tensor or x.device != self.device or self._weight.device != self.device:
            return False
        if x.dim() == 0 or x.shape[-1] != self._in_features or not x.dtype.is_floating_point:
            return False
        weight_dtype = self._weight.dtype
        if weight_dtype is not torch.uint8 and weight_dtype is not x.dtype:
            return False
        for (held, name), tensor in zip(self._places, self._tensors, strict=True):
            # A parametrization takes the name away; the dict then stands for no tensor.
            if held.get(name, held) is not tensor:
                return False
        return only_autograd_watches(()) and not torch.is_autocast_enabled(self._device_type)

    def run(self, x: Tensor, layer: Layer) -> Any:
        """The results of a call of this kind, in the op's schema, with autograd."""
        call = self._record(x, layer)
        if self._generation != dispatch.generation():
            self._plans.clear()
            self._generation = dispatch.generation()
        low = layer.low_rank
        rows = x.numel() // self._in_features if self._in_features else 0
        key = (x.dtype, None if low is None else low.A.dtype, bisect_left(row_steps(), rows))
        plan = self._plans.get(key)
        if plan is None:
            _, plan = dispatch.choose(call)
            self._plans[key] = plan
        return run_plan(self._op, call, plan)
