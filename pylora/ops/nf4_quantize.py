"""torch.ops.pylora.nf4_quantize: a float tensor to packed NF4 codes and fp32 absmax, both flat."""

from __future__ import annotations

import torch
from torch import Tensor

from pylora.calls import QuantizeCall
from pylora.nf4 import block_count
from pylora.ops import spec
from pylora.ops.registration import no_gradient, register


def _fake(call: QuantizeCall) -> tuple[Tensor, Tensor]:
    weight, numel = call.weight, call.weight.numel()
    qweight = weight.new_empty((numel + 1) // 2, dtype=torch.uint8)
    return qweight, weight.new_empty(block_count(numel, call.blocksize), dtype=torch.float32)


register(spec.NF4_QUANTIZE, _fake, no_gradient("nf4_quantize", lambda call: (call.weight,)))
