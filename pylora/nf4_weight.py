"""`NF4Weight`, the public class of a quantized weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from pylora import bnb_format
from pylora.calls import DequantizeCall, Weight
from pylora.nf4 import (
    DEFAULT_BLOCKSIZE,
    DEFAULT_NESTED_BLOCKSIZE,
    QUANTIZABLE_DTYPES,
    absmax_shape,
    block_count,
    check_blocksize,
    packed_shape,
)
from pylora.ops import run


@dataclass(frozen=True, eq=False, repr=False)
class NF4Weight:
    """A weight quantized to NF4, usually [out_features, in_features].

    qweight           uint8, the bytes of bitsandbytes: [out_features, in_features / 2] if
                      in_features % blocksize == 0, else flat
    absmax            fp32, or uint8 codes under double quantization: [out_features, in_features /
                      blocksize] if in_features % blocksize == 0, else flat
    shape             the shape of the tensor that was quantized
    dtype             the dtype of that tensor, and the default dtype of `dequantize()`
    blocksize         elements that share one absmax: 32, 64, 128, ... or 4096
    nested_absmax     fp32 [ceil(blocks / nested_blocksize)]; None without double quantization
    nested_code       fp32 [256], the values of the absmax codes; None without double quantization
    offset            fp32 [], the mean of the absmax values; None without double quantization
    nested_blocksize  absmax values that share one nested_absmax

    Raises ValueError or TypeError if the parts do not fit each other.
    Source: QLoRA, arXiv:2305.14314.
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
        if not isinstance(self.nested_blocksize, int) or self.nested_blocksize < 1:
            size = self.nested_blocksize
            raise ValueError(f"nested_blocksize is {size!r}; it must be an integer >= 1")
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
        """True if the absmax values are stored as 8-bit codes."""
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
        """The bytes of all tensors of this weight."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field name; fields that are None are left out."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in values if isinstance(value, Tensor)}

    @property
    def record(self) -> Weight:
        """The `Weight` of call records; leading dimensions count as rows."""
        shape = self.shape
        rows, columns = (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)
        return Weight(
            self.qweight,
            self.absmax,
            self.nested_absmax,
            self.nested_code,
            self.offset,
            self.blocksize,
            self.nested_blocksize,
            (rows, columns),
        )

    def op_arguments(self) -> tuple[Any, ...]:
        """The seven arguments by which every op of `torch.ops.pylora` takes this weight."""
        return self.record.arguments

    def to(self, device: torch.device | str, non_blocking: bool = False) -> NF4Weight:
        """The same weight on another device; the bytes never change."""
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> NF4Weight:
        """The same weight with `function` applied to each of its tensors."""
        changed: dict[str, Any] = {name: function(t) for name, t in self.tensors().items()}
        return replace(self, **changed)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight: code * absmax in fp32, rounded once to `dtype` (default: `self.dtype`).

        Raises TypeError if `dtype` is no floating-point dtype.
        """
        dtype = self.dtype if dtype is None else dtype
        check_floating_dtype("dtype", dtype)
        return run(DequantizeCall(self.record, tuple(self.shape), dtype))

    @classmethod
    def from_bitsandbytes(cls, source: Any) -> NF4Weight:
        """The weight of a bitsandbytes `Linear4bit` or `Params4bit`, which shares its bytes.

        Raises TypeError for anything else; ValueError if the weight is fp4, is not quantized yet,
        or was repacked for bitsandbytes' CPU inference kernel, which loses bits.
        """
        return cls(**bnb_format.read_parameter(source))

    def to_bitsandbytes(self) -> Any:
        """A bitsandbytes `Params4bit` that shares these bytes.

        Raises ImportError if bitsandbytes is not installed.
        """
        return bnb_format.write_parameter(self)

    def __reduce__(self) -> tuple[Any, ...]:
        # A file is read through the constructor, which checks that the parts fit.
        return NF4Weight, tuple(getattr(self, field.name) for field in fields(self))

    def __repr__(self) -> str:
        bits = 8 * self.nbytes / max(math.prod(self.shape), 1)
        double = ", double_quant" if self.double_quant else ""
        return (
            f"NF4Weight({tuple(self.shape)}, blocksize={self.blocksize}{double}, "
            f"dtype={self.dtype}, device='{self.device}', "
            f"{self.nbytes} bytes = {bits:.2f} bit a weight)"
        )


torch.serialization.add_safe_globals([NF4Weight])  # for torch.load(..., weights_only=True)


def check_floating_dtype(name: str, dtype: object) -> None:
    """Raises TypeError unless `dtype` is float16, bfloat16, float32 or float64."""
    # torch does not compute in the floating-point dtypes of one byte.
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
        return
    raise TypeError(f"{name} is {dtype!r}; it must be float16, bfloat16, float32 or float64")


def _check_part(
    name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}; it must be a Tensor")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}; it must be {dtype}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {tuple(shape)}")
