"""The base weights as the kernels take them."""

from __future__ import annotations

from collections.abc import Sequence
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


def weight_arguments(weights: Sequence[NF4Base | Tensor]) -> dict[str, Any]:
    """The weights' arguments of a tile kernel, a tuple each; BLOCKSIZE is 0 for dense ones."""
    sizes, rows = (0, 1), []
    for weight in weights:
        if isinstance(weight, NF4Base):
            rows.append((weight.words(), *weight.scales))
            sizes = (weight.blocksize, weight.nested_blocksize)
        else:
            rows.append((weight.contiguous(), None, None, None, None))
    names = ("weight", "absmax", "nested_absmax", "nested_code", "offset")
    columns = zip(*rows, strict=True)
    arguments: dict[str, Any] = {
        f"{name}_ptrs": tensors for name, tensors in zip(names, columns, strict=True)
    }
    return arguments | dict(zip(("BLOCKSIZE", "NESTED_BLOCKSIZE"), sizes, strict=True))


def weight_kind(weight: NF4Base | Tensor) -> tuple[Any, ...]:
    """What weights must have in common to share a launch."""
    if isinstance(weight, NF4Base):
        nested = weight.nested_absmax is not None
        return (weight.blocksize, nested, weight.nested_blocksize if nested else 0)
    return (weight.dtype,)
