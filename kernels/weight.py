"""The base weight as the kernels take it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

# 16-byte copies want it; torch's allocator gives more, a slice of a tensor may not.
_ALIGNMENT = 16


class NF4Base(NamedTuple):
    """The seven arguments that every NF4 op has, in the order of the schema."""

    qweight: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    offset: Tensor | None
    blocksize: int
    nested_blocksize: int

    def words(self) -> Tensor:
        """qweight as int32, eight codes a word; padded where bytes are left over."""
        flat = self.qweight.reshape(-1)
        if flat.numel() % 4:
            flat = pad(flat, (0, -flat.numel() % 4))
        if flat.data_ptr() % _ALIGNMENT or flat.storage_offset() % 4:
            flat = flat.clone()
        return flat.view(torch.int32)

    @property
    def scales(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """absmax in its stored form, as `nf4_decode.load_absmax` takes it."""
        contiguous = (t if t is None else t.contiguous() for t in self[1:5])
        return tuple(contiguous)  # type: ignore[return-value]


def weight_arguments(weight: NF4Base | Tensor) -> dict[str, Any]:
    """The weight's arguments of a tile kernel; BLOCKSIZE is 0 for a dense one."""
    if isinstance(weight, NF4Base):
        tensors = (weight.words(), *weight.scales)
        sizes = (weight.blocksize, weight.nested_blocksize)
    else:
        tensors = (weight.contiguous(), None, None, None, None)
        sizes = (0, 1)
    names = ("weight", "absmax", "nested_absmax", "nested_code", "offset")
    arguments: dict[str, Any] = {
        f"{name}_ptr": tensor for name, tensor in zip(names, tensors, strict=True)
    }
    return arguments | dict(zip(("BLOCKSIZE", "NESTED_BLOCKSIZE"), sizes, strict=True))
