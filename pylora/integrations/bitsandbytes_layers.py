"""bitsandbytes' `Linear4bit` over pylora's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from pylora import functional
from pylora.integrations.swaps import Swap, why_not_replaceable
from pylora.nf4_weight import NF4Weight
from pylora.nn import NF4Linear
from pylora.nn.kept import Kept, Place
from pylora.ops import run_output

T = TypeVar("T")


class OfWeight(Generic[T]):
    """What was made of a layer's weight; it is made anew after a change of the weight."""

    def __init__(self) -> None:
        self._value: T | None = None
        self._param: Any = None
        self._state: Any = None
        self._memory: tuple[int, int] = (0, 0)

    def get(self, layer: Any, make: Callable[[Any], T], version: int = 0) -> T:
        """`make(layer)`, or what it returned before for the same weight and version of it.

        version    torch's count of the changes in place, if the value does not share the memory
        """
        if torch.compiler.is_compiling():
            return make(layer)
        param = stored_weight(layer)
        state = getattr(param, "quant_state", None)
        memory = (param.data_ptr(), version)
        same = param is self._param and state is self._state and memory == self._memory
        if self._value is None or not same:
            self._value = make(layer)
            self._param, self._state, self._memory = param, state, memory
        return self._value


def stored_weight(layer: Any) -> Any:
    """The parameter that holds the weight of a linear layer, packed or not."""
    return layer.packed_weight if isinstance(layer, NF4Linear) else layer.weight


def why_not_nf4(layer: Any) -> str | None:
    """Why pylora cannot compute with the weight of a Linear4bit; None if it can."""
    try:
        NF4Weight.from_bitsandbytes(layer)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


class Packed(NamedTuple):
    """What a Linear4bit computes with, beside its tensors."""

    layer: Any
    state: Any
    compute_dtype: torch.dtype | None

    @classmethod
    def of(cls, layer: Any) -> Packed | None:
        """None for a layer that is no Linear4bit."""
        state = getattr(stored_weight(layer), "quant_state", None)
        return None if state is None else cls(layer, state, layer.compute_dtype)

    def has_changed(self) -> bool:
        """True if the layer computes with something else now."""
        layer, state, compute_dtype = self
        return layer.weight.quant_state is not state or layer.compute_dtype is not compute_dtype


def packed_places(layer: Any) -> tuple[Place, ...]:
    """The places of weight and bias of a layer whose weight may be packed by bitsandbytes."""
    is_packed = hasattr(layer.weight, "quant_state")
    held = layer._parameters
    return Place(held, "weight", is_packed), Place(held, "bias")


class Linear4bitSwap(Swap):
    """bitsandbytes' Linear4bit with NF4: y = x @ W^T + bias in the layer's compute dtype."""

    def __init__(self, name: str, verify: int) -> None:
        super().__init__(name, verify)
        self._weight: OfWeight[NF4Weight] = OfWeight()
        # The record of a call, and what else it depends on; None if the next one must be checked.
        self._kept: tuple[Kept, Packed] | None = None

    def why_not(self, module: nn.Module) -> str | None:
        return why_not_replaceable(module) or why_not_nf4(module)

    def forward(self, module: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if self._kept is not None and not (args or kwargs or torch.compiler.is_compiling()):
            kept, packed = self._kept
            call = None if packed.has_changed() else kept.call_with(x)
            if call is not None and x.dtype is packed.compute_dtype:
                return call.run(x)
        if args or kwargs or not isinstance(x, Tensor):  # its own forward refuses them
            why = "it was not called with one tensor alone"
            return self.as_before(module, why, x, *args, **kwargs)
        try:
            weight = self._weight.get(module, NF4Weight.from_bitsandbytes)
        except ValueError as error:  # it was quantized anew, or repacked, since it was swapped
            return self.as_before(module, str(error), x)
        dtype = compute_dtype(module, x)
        given = x.to(dtype)
        if x.shape[-1:] != (weight.in_features,):  # torch raises, as it does for bitsandbytes
            return nn.functional.linear(given, weight.dequantize(dtype), module.bias)
        call = functional.CALLS["nf4_linear"](given, weight, module.bias)
        y = run_output(call)
        if self.must_verify():
            self.verify(y, nn.functional.linear, weight, given, bias=module.bias)
        elif not torch.compiler.is_compiling():
            self._keep(module, x, call)
        return y.to(x.dtype)

    def _keep(self, module: Any, x: Tensor, call: Any) -> None:
        places, packed = packed_places(module), Packed.of(module)
        held = all(place.name in place.held for place in places)
        kept = Kept.of(lambda: places if held else None, x, call)
        self._kept = None if kept is None or packed is None else (kept, packed)


def compute_dtype(layer: Any, x: Tensor) -> torch.dtype:
    """The dtype in which a Linear4bit computes, which its first input may decide."""
    if not layer.compute_type_is_set:
        layer.set_compute_type(x)
        layer.compute_type_is_set = True
    return x.dtype if layer.compute_dtype is None else layer.compute_dtype
