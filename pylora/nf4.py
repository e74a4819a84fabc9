"""The NF4 format: its table, block sizes and shapes.

NF4 (4-bit NormalFloat) is the data type of QLoRA (Dettmers et al., arXiv:2305.14314). The bytes are
those of bitsandbytes: the tensor is flattened row-major, element 2j sits in the high nibble of byte
j and element 2j + 1 in the low one. Each block of `blocksize` consecutive elements shares one fp32
`absmax`. With double quantization the absmax values are stored as 8-bit codes, in groups of
`nested_blocksize`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

# This is the only NF4 table in Python (exact fp32 values); its C++ twin is in csrc/common/nf4.h.
NF4_CODE: tuple[float, ...] = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
BLOCKSIZES: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DEFAULT_BLOCKSIZE = 64
DEFAULT_NESTED_BLOCKSIZE = 256
QUANTIZABLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@lru_cache(maxsize=16)
def _kept_code(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(NF4_CODE, dtype=dtype, device=device)


def nf4_code(device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """The 16 NF4 values, [16], in `dtype`."""
    # A tensor that is made under a mode or a transform, such as a fake one, belongs to it.
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack():
        return torch.tensor(NF4_CODE, dtype=dtype, device=device)
    return _kept_code(device, dtype)


@lru_cache(maxsize=16)
def nf4_midpoints(device: torch.device) -> Tensor:
    """The midpoints between neighbouring NF4 values, fp32 [15]."""
    code = torch.tensor(NF4_CODE, dtype=torch.float32, device=device)
    return (code[1:] + code[:-1]) / 2


def _dynamic_values() -> list[float]:
    values = [0.0, 1.0]
    for exponent in range(7):
        steps = 2**exponent + 1
        boundaries = torch.linspace(0.1, 1, steps, dtype=torch.float32, device="cpu")
        means = (boundaries[:-1] + boundaries[1:]) / 2.0
        magnitudes = 10 ** (exponent - 6) * means
        values += magnitudes.tolist() + (-magnitudes).tolist()
    return sorted(values)


# The values are computed at import: later the tensors could be fake or on another default device.
_DYNAMIC_CODE = _dynamic_values()


def dynamic_code(device: torch.device) -> Tensor:
    """The sorted values of the 8-bit codes of absmax under double quantization, fp32 [256].

    A code has a sign, a unary exponent of base 10, and a linear fraction that fills the bits left
    over (Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", arXiv:1511.04561).
    """
    return torch.tensor(_DYNAMIC_CODE, dtype=torch.float32, device=device)


def block_count(numel: int, blocksize: int) -> int:
    """The number of blocks of `numel` elements; the last block may be short."""
    return -(-numel // blocksize)


def rows_are_blocks(shape: Sequence[int], blocksize: int) -> bool:
    """True if no NF4 block straddles rows, so that bytes and absmax can be held per row."""
    return len(shape) >= 2 and shape[-1] > 0 and shape[-1] % blocksize == 0


def packed_shape(shape: Sequence[int], blocksize: int) -> tuple[int, ...]:
    """The shape of the packed bytes: [..., in_features / 2], or flat if blocks straddle rows."""
    if rows_are_blocks(shape, blocksize):
        return (*shape[:-1], shape[-1] // 2)
    return ((math.prod(shape) + 1) // 2,)


def absmax_shape(shape: Sequence[int], blocksize: int) -> tuple[int, ...]:
    """The shape of absmax: [..., in_features / blocksize], or flat if blocks straddle rows."""
    if rows_are_blocks(shape, blocksize):
        return (*shape[:-1], shape[-1] // blocksize)
    return (block_count(math.prod(shape), blocksize),)


def check_blocksize(blocksize: int) -> None:
    """Raises ValueError unless `blocksize` is one of `BLOCKSIZES`."""
    # Reject floats: 64.0 == 64, but a size must be an int.
    if not isinstance(blocksize, int) or blocksize not in BLOCKSIZES:
        raise ValueError(
            f"blocksize is {blocksize!r}; it must be one of {', '.join(map(str, BLOCKSIZES))}"
        )
