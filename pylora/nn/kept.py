"""Keeps what a layer has checked and planned, so that a forward repeats only what can have changed.

A layer checks its tensors when it first sees them, and keeps the record made of them and the plan
of each kind of call. These hold as long as the module has the same tensor objects: FSDP2,
`functional_call` and parametrizations replace them without an assignment. `.to()` and ZeRO-3 change
a parameter in place, so each call compares its dtype and device, and the compiled kernels check its
size. A record may read a tensor through a view, which keeps the old memory, so each call compares
the address of such a tensor. A call that is unusual in another way is checked again, by
`pylora.functional`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pylora import dispatch
from pylora.backends.backend import Plan, under_autocast
from pylora.calls import Dropout, LowRank
from pylora.nn.kept_casts import CastCall, cast_layer
from pylora.ops.registration import (
    OPS,
    first,
    only_autograd_watches,
    run_plan,
    watched,
    with_gradient,
)
from pylora.ops.repeated import RepeatedGradient, first_call


class Place(NamedTuple):
    """The place in which a module holds a parameter or buffer that a call reads.

    held     the dict that holds it
    name     its key in the dict
    viewed   true if the call reads it through a view, which may be of another class and dtype
    """

    held: dict[str, Any]
    name: str
    viewed: bool = False


# A layer forgets its kinds of call when it has this many: the lengths of texts have no end.
_MOST_CALLS = 64


def places_of(
    module: nn.Module, names: Sequence[str], viewed: Sequence[str] = ()
) -> tuple[Place, ...] | None:
    """The places of these tensors in the module; None if they must not be kept.

    They must not if a parametrization computes one of them, or if the module's forward is wrapped,
    as the library accelerate does to load the tensors before a forward and to free them after it.

    viewed    those of the names that a call reads through views
    """
    if "forward" in vars(module):
        return None
    places = []
    for name in names:
        for held in (module._parameters, module._buffers):
            if name in held:
                places.append(Place(held, name, name in viewed))
                break
        else:
            return None
    return tuple(places)


def fields_behind_layer(call: Any) -> tuple[Any, ...]:
    """What a record has behind x and the layer, which is the same in every call of a module."""
    return tuple(getattr(call, field.name) for field in fields(call)[2:])


class KeptCall:
    """Runs a layer's calls with an x of one shape and dtype."""

    __slots__ = ("_forward", "_gradient", "_layer", "_op", "_plan", "_record", "_rest")

    def __init__(self, call: Any, plan: Plan) -> None:
        self._record, self._op, self._layer = type(call), OPS[type(call)], call.layer
        self._rest = fields_behind_layer(call)
        self._plan = plan
        self._forward = None if plan.prepare is None else plan.prepare(call)
        self._gradient: RepeatedGradient | None = None

    def run(self, x: Tensor, scaling: float = 1.0, dropout: Dropout | None = None) -> Tensor:
        """y, with autograd.

        scaling, dropout   those of the low-rank path, if the layer has one
        """
        forward = self._forward
        if self._plan.native is not None and dropout is None:
            return self._plan.native(self._call(x, scaling, None))
        # A prepared forward reads the memory of x, which must have the elements as they are.
        if forward is None or not x.is_contiguous() or x.is_neg() or x._is_zerotensor():
            call = self._call(x, scaling, dropout)
            # The kept plan is that of a call without dropout.
            plan = self._plan if dropout is None else dispatch.choose(call)[1]
            return first(run_plan(self._op, call, plan))
        if not torch.is_grad_enabled():
            return forward(x, scaling, dropout, False)[0]
        low = self._layer.low_rank
        if dropout is not None or (low is not None and low.scaling != scaling):
            call = self._call(x, scaling, dropout)
            run = partial(forward, x, scaling, dropout, True)
            return first(with_gradient(self._op, call, run))
        run = partial(forward, x, scaling, None, True)
        if self._gradient is not None:
            return self._gradient.run(x, run)
        call = self._record(x, self._layer, *self._rest)
        y, self._gradient = first_call(self._op, call, run, self._rest)
        return y

    def _call(self, x: Tensor, scaling: float, dropout: Dropout | None) -> Any:
        layer, low = self._layer, self._layer.low_rank
        if low is not None and (low.scaling != scaling or dropout is not None):
            layer = replace(layer, low_rank=replace(low, scaling=scaling, dropout=dropout))
        return self._record(x, layer, *self._rest)


class Kept:
    """The checked record of a layer, and how each kind of its calls runs."""

    __slots__ = (
        "_A",
        "_autocast",
        "_calls",
        "_device_type",
        "_held",
        "_record",
        "_rest",
        "_viewed",
        "_weight",
        "device",
        "layer",
    )

    def __init__(
        self, places: tuple[Place, ...], call: Any, autocast: torch.dtype | None = None
    ) -> None:
        """Keeps a call that has been checked, and whose tensors are in these places.

        Its dropout is not kept.

        autocast    the dtype to which autocast casts x and the tensors of the low-rank path; None
                    if the call was not made under autocast
        """
        self._record, self.layer, self._autocast = type(call), call.layer, autocast
        self._rest = fields_behind_layer(call)
        if self.layer.low_rank is not None:
            self.layer = replace(self.layer, low_rank=replace(self.layer.low_rank, dropout=None))
        self._held = [(place.held, place.name, place.held[place.name]) for place in places]
        viewed = [place.held[place.name] for place in places if place.viewed]
        self._viewed = [(t, t.data_ptr()) for t in viewed if t is not None]
        self._weight = self.layer.weight.data
        self._A = self._weight if self.layer.low_rank is None else self.layer.low_rank.A
        self.device: torch.device = call.x.device
        self._device_type = self.device.type
        self._calls: dict[Any, KeptCall | CastCall] = {}

    @classmethod
    def of(
        cls,
        find_places: Callable[[], tuple[Place, ...] | None],
        x: Tensor,
        call: Any,
        own: LowRank | None = None,
    ) -> Kept | None:
        """What to keep of a checked call; None if the next one must be checked as well.

        find_places    returns the places of the tensors of the call; None if they must not be kept
        own            the low-rank path with the layer's own tensors, without lora_A's bias. Under
                       autocast the call holds casts, which do not change when these do; without
                       `own` it is then not kept
        """
        places = find_places()
        if places is None:
            return None
        tensors = [place.held[place.name] for place in places if not place.viewed]
        if not only_autograd_watches((x, *tensors)):
            return None
        if not under_autocast(x.device.type):
            return cls(places, call)
        weight, low = call.layer.weight, call.layer.low_rank
        is_own_weight = weight.is_nf4 or any(weight.data is tensor for tensor in tensors)
        if not is_own_weight or (low is not None and own is None):
            return None
        layer = replace(call.layer, low_rank=own)
        return cls(places, replace(call, layer=layer), call.x.dtype)

    def call_with(self, x: Any) -> KeptCall | CastCall | None:
        """The way to run a call with x; None if its arguments must be checked first."""
        if type(x) is not Tensor or x.device != self.device or self._weight.device != self.device:
            return None
        try:
            for held, name, tensor in self._held:
                if held[name] is not tensor:
                    return None
        except KeyError:  # a parametrization has taken the name away
            return None
        for tensor, address in self._viewed:
            if tensor.data_ptr() != address:
                return None
        if watched() or self._autocast is not self._autocast_now():
            return None
        dtypes = (x.dtype, self._weight.dtype, self._A.dtype)
        key = (x.shape, dtypes, dispatch.generation())
        return self._calls.get(key) or self._plan(x, key)

    def _autocast_now(self) -> torch.dtype | None:
        """The dtype to which autocast casts at this moment, None without autocast."""
        if not torch.is_autocast_enabled(self._device_type):
            return None
        return torch.get_autocast_dtype(self._device_type)

    def _plan(self, x: Tensor, key: Any) -> KeptCall | CastCall | None:
        weight, layer, autocast = self.layer.weight, self.layer, self._autocast
        if x.dim() == 0 or x.shape[-1] != weight.in_features or not x.dtype.is_floating_point:
            return None
        if autocast is not None:
            if x.dtype is torch.float64:  # autocast leaves it as it is
                return None
            x, layer = x.to(autocast), cast_layer(layer, autocast)
        if not weight.is_nf4 and weight.data.dtype is not x.dtype:
            return None
        if len(self._calls) == _MOST_CALLS:
            self._calls.clear()
        call = self._record(x, layer, *self._rest)
        _, plan = dispatch.choose(call)
        if autocast is None:
            self._calls[key] = KeptCall(call, plan)
        else:
            self._calls[key] = CastCall(self._record, self.layer, autocast, plan)
        return self._calls[key]
