"""The base weights as the kernels take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pylora.calls import Weight

# 16-byte copies want it; torch's allocator gives more, a slice of a tensor may not.
_ALIGNMENT = 16


def words(weight: Weight) -> Tensor:
    """The NF4 codes as int32, eight codes a word; padded if bytes are left over."""
    flat = weight.data.reshape(-1)
    if flat.numel() % 4:
        flat = pad(flat, (0, -flat.numel() % 4))
    if flat.data_ptr() % _ALIGNMENT or flat.storage_offset() % 4:
        flat = flat.clone()
    return flat.view(torch.int32)


def scales(weight: Weight) -> tuple[Tensor | None, ...]:
    """absmax in its stored form, as `nf4_decode.load_absmax` takes it."""
    stored = (weight.absmax, weight.nested_absmax, weight.nested_code, weight.offset)
    return tuple(None if tensor is None else tensor.contiguous() for tensor in stored)


def weight_arguments(weights: Sequence[Weight]) -> dict[str, Any]:
    """The weights' arguments of a tile kernel, a tuple each; BLOCKSIZE is 0 for dense ones."""
    sizes, rows = (0, 1), []
    for weight in weights:
        if weight.is_nf4:
            rows.append((words(weight), *scales(weight)))
            sizes = (weight.blocksize, weight.nested_blocksize)
        else:
            rows.append((weight.data.contiguous(), None, None, None, None))
    names = ("weight", "absmax", "nested_absmax", "nested_code", "offset")
    columns = zip(*rows, strict=True)
    arguments: dict[str, Any] = {
        f"{name}_ptrs": tensors for name, tensors in zip(names, columns, strict=True)
    }
    return arguments | dict(zip(("BLOCKSIZE", "NESTED_BLOCKSIZE"), sizes, strict=True))


def weight_kind(weight: Weight) -> tuple[Any, ...]:
    """What weights must have in common to share a launch."""
    if weight.is_nf4:
        nested = weight.nested_absmax is not None
        return (weight.blocksize, nested, weight.nested_blocksize if nested else 0)
    return (weight.data.dtype,)
