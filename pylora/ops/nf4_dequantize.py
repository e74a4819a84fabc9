"""torch.ops.pylora.nf4_dequantize: an NF4 weight to a dense tensor of `shape` and `dtype`."""

from __future__ import annotations

from torch import Tensor

from pylora.calls import DequantizeCall
from pylora.ops import spec
from pylora.ops.registration import no_gradient, register


def _fake(call: DequantizeCall) -> Tensor:
    return call.weight.data.new_empty(call.shape, dtype=call.dtype)


def _inputs(call: DequantizeCall) -> tuple[Tensor | None, ...]:
    return call.weight.data, call.weight.absmax


register(spec.NF4_DEQUANTIZE, _fake, no_gradient("nf4_dequantize", _inputs))
