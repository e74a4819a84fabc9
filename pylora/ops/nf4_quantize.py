"""torch.ops.pylora.nf4_quantize: a float tensor to packed NF4 codes and fp32 absmax, both flat."""

from __future__ import annotations

import torch
from torch import Tensor

from pylora.nf4 import block_count
from pylora.ops.registration import register


def _fake(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    qweight = weight.new_empty((weight.numel() + 1) // 2, dtype=torch.uint8)
    absmax = weight.new_empty(block_count(weight.numel(), blocksize), dtype=torch.float32)
    return qweight, absmax


register("nf4_quantize", "Tensor weight, int blocksize) -> (Tensor, Tensor)", _fake)
