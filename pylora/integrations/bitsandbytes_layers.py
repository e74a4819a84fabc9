"""bitsandbytes' `Linear4bit` over pylora's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pylora import functional
from pylora.integrations.swaps import Swap, why_not_replaceable
from pylora.nf4_weight import NF4Weight


class BitsandbytesWeight:
    """The NF4Weight of a Linear4bit, made anew when the layer has another parameter or state."""

    def __init__(self) -> None:
        self._param: Any = None
        self._address, self._state = 0, None
        self._weight: NF4Weight | None = None

    def of(self, layer: Any) -> NF4Weight:
        """The weight, which shares the bytes of the layer; raises ValueError if it has none."""
        param = layer.weight
        state = getattr(param, "quant_state", None) or layer.quant_state
        if torch.compiler.is_compiling():
            return NF4Weight.from_bitsandbytes(layer)
        known = param is self._param and state is self._state
        if self._weight is None or not known or param.data_ptr() != self._address:
            self._weight = NF4Weight.from_bitsandbytes(layer)
            self._param, self._state, self._address = param, state, param.data_ptr()
        return self._weight


def why_not_nf4(layer: Any) -> str | None:
    """Why pylora cannot compute with the weight of a Linear4bit; None if it can."""
    try:
        NF4Weight.from_bitsandbytes(layer)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


class Linear4bitSwap(Swap):
    """bitsandbytes' Linear4bit with NF4: y = x @ W^T + bias in the layer's compute dtype."""

    def __init__(self, name: str, verify: int) -> None:
        super().__init__(name, verify)
        self._weight = BitsandbytesWeight()

    def why_not(self, module: nn.Module) -> str | None:
        return why_not_replaceable(module) or why_not_nf4(module)

    def forward(self, module: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            weight = self._weight.of(module)
        except ValueError as error:  # it was quantized anew, or repacked, since it was swapped
            return self.as_before(module, str(error), x, *args, **kwargs)
        dtype = compute_dtype(module, x)
        given = x.to(dtype)
        y = functional.nf4_linear(given, weight, module.bias)
        if self.must_verify():
            self.verify(y, nn.functional.linear, weight, given, bias=module.bias)
        return y.to(x.dtype)


def compute_dtype(layer: Any, x: Tensor) -> torch.dtype:
    """The dtype in which a Linear4bit computes, which its first input may decide."""
    if not layer.compute_type_is_set:
        layer.set_compute_type(x)
        layer.compute_type_is_set = True
    return x.dtype if layer.compute_dtype is None else layer.compute_dtype
