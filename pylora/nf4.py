"""The NF4 format: its table, its geometry, and `NF4Weight`, the container that holds a quantized
weight.

NF4 (4-bit NormalFloat) is the data type of QLoRA (Dettmers et al., arXiv:2305.14314). The bytes are
those of bitsandbytes: the tensor is flattened row-major, element 2j sits in the high nibble of byte
j and 2j+1 in the low one; blocks of `blocksize` consecutive elements share one fp32 `absmax`. With
double quantization the absmax values are themselves stored as 8-bit codes in blocks of
`nested_blocksize`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# The one NF4 table of the Python side (exact fp32 values), and its C++ twin is csrc/common/nf4.h.
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
def nf4_code(device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """The 16 NF4 values, shape [16]."""
    return torch.tensor(NF4_CODE, dtype=dtype, device=device)


@lru_cache(maxsize=16)
def nf4_midpoints(device: torch.device) -> Tensor:
    """The fp32 decision thresholds between neighbouring NF4 values, shape [15]."""
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


# Worked out here: later it might be a fake tensor, or one on another default device.
_DYNAMIC_CODE = _dynamic_values()


def dynamic_code(device: torch.device) -> Tensor:
    """The signed 8-bit dynamic data type that stores absmax under double quantization, fp32 [256],
    sorted.

    A sign, a unary exponent of base 10 and a linear fraction that fills the bits left over
    (Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", arXiv:1511.04561).
    """
    return torch.tensor(_DYNAMIC_CODE, dtype=torch.float32, device=device)


def block_count(numel: int, blocksize: int) -> int:
    """Number of absmax blocks over `numel` elements; the last one may be short."""
    return -(-numel // blocksize)


def rows_are_blocks(shape: Sequence[int], blocksize: int) -> bool:
    """True where no block straddles a row, so that bytes and absmax can be held per row."""
    return len(shape) >= 2 and shape[-1] > 0 and shape[-1] % blocksize == 0


def packed_shape(shape: Sequence[int], blocksize: int) -> tuple[int, ...]:
    """Shape of the packed bytes: [..., in_features / 2], or flat where blocks straddle rows."""
    if rows_are_blocks(shape, blocksize):
        return (*shape[:-1], shape[-1] // 2)
    return ((math.prod(shape) + 1) // 2,)


def absmax_shape(shape: Sequence[int], blocksize: int) -> tuple[int, ...]:
    """Shape of absmax: [..., in_features / blocksize], or flat where blocks straddle rows."""
    if rows_are_blocks(shape, blocksize):
        return (*shape[:-1], shape[-1] // blocksize)
    return (block_count(math.prod(shape), blocksize),)


@dataclass(frozen=True, eq=False, repr=False)
class NF4Weight:
    """A weight quantized to NF4, usually [out_features, in_features].

    qweight           uint8, `packed_shape(shape, blocksize)`: bitsandbytes' bytes, dim 0 is
                      out_features wherever in_features % blocksize == 0
    absmax            fp32, or uint8 codes under double quantization; `absmax_shape(shape,
                      blocksize)`
    nested_absmax     fp32 [ceil(blocks / nested_blocksize)], None without double quantization
    nested_code       fp32 [256], the 8-bit data type of the absmax codes
    offset            fp32 [], mean of the absmax values
    shape, dtype      of the tensor that was quantized; dtype is what `dequantize()` gives by
                      default
    blocksize         one of `BLOCKSIZES`

    Raises ValueError or TypeError where the parts do not fit each other.
    """

    qweight: Tensor
    absmax: Tensor
    shape: torch.Size
    dtype: torch.dtype = torch.bfloat16
    blocksize: int = DEFAULT_BLOCKSIZE
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    offset: Tensor | None = None
    nested_blocksize: int = DEFAULT_NESTED_BLOCKSIZE

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", torch.Size(self.shape))
        check_blocksize(self.blocksize)
        if self.dtype not in QUANTIZABLE_DTYPES:
            raise TypeError(f"dtype is {self.dtype}; it must be float32, float16 or bfloat16")
        nested = self.nested_absmax is not None
        if nested != (self.nested_code is not None) or nested != (self.offset is not None):
            raise ValueError(
                "nested_absmax, nested_code and offset must be given together or not at all"
            )
        _check_part("qweight", self.qweight, torch.uint8, packed_shape(self.shape, self.blocksize))
        absmax_dtype = torch.uint8 if nested else torch.float32
        _check_part("absmax", self.absmax, absmax_dtype, absmax_shape(self.shape, self.blocksize))
        if nested:
            blocks = block_count(math.prod(self.shape), self.blocksize)
            groups = block_count(blocks, self.nested_blocksize)
            _check_part("nested_absmax", self.nested_absmax, torch.float32, (groups,))
            _check_part("nested_code", self.nested_code, torch.float32, (256,))
            _check_part("offset", self.offset, torch.float32, ())

    @property
    def double_quant(self) -> bool:
        """True where the absmax values are stored as 8-bit codes."""
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        return self.qweight.device

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors of this weight."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field name; those that are None are left out."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in values if isinstance(value, Tensor)}

    def op_arguments(self) -> tuple[Any, ...]:
        """The arguments every NF4 op takes, in schema order."""
        return (
            self.qweight,
            self.absmax,
            self.nested_absmax,
            self.nested_code,
            self.offset,
            self.blocksize,
            self.nested_blocksize,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> NF4Weight:
        """The same weight on another device; the bytes never change."""
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> NF4Weight:
        """The same weight with `function` applied to each of its tensors."""
        changed: dict[str, Any] = {name: function(t) for name, t in self.tensors().items()}
        return replace(self, **changed)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, see `pylora.dequantize_nf4`."""
        from pylora.functional import dequantize_nf4

        return dequantize_nf4(self, dtype)

    @classmethod
    def from_bitsandbytes(cls, source: Any) -> NF4Weight:
        """From a bitsandbytes `Linear4bit` or `Params4bit`, sharing its bytes."""
        from pylora.bnb_format import from_bitsandbytes

        return from_bitsandbytes(source)

    def to_bitsandbytes(self) -> Any:
        """As a bitsandbytes `Params4bit` that shares these bytes."""
        from pylora.bnb_format import to_bitsandbytes

        return to_bitsandbytes(self)

    def __repr__(self) -> str:
        bits = 8 * self.nbytes / max(math.prod(self.shape), 1)
        double = ", double_quant" if self.double_quant else ""
        return (
            f"NF4Weight({tuple(self.shape)}, blocksize={self.blocksize}{double}, "
            f"dtype={self.dtype}, device='{self.device}', "
            f"{self.nbytes} bytes = {bits:.2f} bit a weight)"
        )


def check_blocksize(blocksize: int) -> None:
    """Raises ValueError unless `blocksize` is one that the format knows."""
    # 64.0 equals 64, and is none the less no size.
    if not isinstance(blocksize, int) or blocksize not in BLOCKSIZES:
        raise ValueError(
            f"blocksize is {blocksize!r}; it must be one of {', '.join(map(str, BLOCKSIZES))}"
        )


def _check_part(
    name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}; it must be a Tensor")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}; it must be {dtype}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {tuple(shape)}")
