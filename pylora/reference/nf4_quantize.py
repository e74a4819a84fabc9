"""NF4 quantization in pure PyTorch, with the bits that bitsandbytes writes on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from pylora.calls import QuantizeCall
from pylora.nf4 import block_count, nf4_midpoints

# bitsandbytes guards its division with this floor, which decides the codes of denormal blocks.
_SMALLEST_ABSMAX = 1e-38


def nf4_quantize(call: QuantizeCall) -> tuple[Tensor, Tensor]:
    """(qweight uint8 [ceil(n / 2)], absmax fp32 [ceil(n / blocksize)]) of a weight of n elements.

    In each block absmax = max |w|, s = w * (1 / absmax) in fp32, and the code is the number of
    midpoints below s, so that ties go down. A short last block divides by absmax instead, and
    stores the guarded absmax. If n is odd, the code of zero is appended.
    """
    flat, blocksize = call.weight.reshape(-1).to(torch.float32), call.blocksize
    blocks = block_count(flat.numel(), blocksize)
    padded = flat.new_zeros(blocks * blocksize)
    padded[: flat.numel()] = flat
    padded = padded.view(blocks, blocksize)
    absmax = padded.abs().amax(dim=1) if blocks else flat.new_zeros(0)
    divisor = absmax.clamp(min=_SMALLEST_ABSMAX)
    scaled = padded * (1.0 / divisor)[:, None]
    if flat.numel() % blocksize:
        absmax = torch.cat([absmax[:-1], divisor[-1:]])
        scaled = torch.cat([scaled[:-1], padded[-1:] / divisor[-1]])
    codes = torch.bucketize(scaled.clamp(-1.0, 1.0).view(-1), nf4_midpoints(flat.device))
    # The cut leaves only the padding of an odd count, which is the code 7 of a zero.
    codes = codes[: flat.numel() + flat.numel() % 2].to(torch.uint8)
    if codes.numel() < flat.numel() + flat.numel() % 2:
        codes = torch.cat([codes, codes.new_full((1,), 7)])
    return (codes[0::2] << 4) | codes[1::2], absmax
