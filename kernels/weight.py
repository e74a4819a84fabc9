"""The base weights as the kernels take them: tuples, from which a program picks one weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from pylora.calls import Weight

# 16-byte copies need this alignment. torch's allocator gives more, but a slice of a tensor may not.
_ALIGNMENT = 16


def words(weight: Weight) -> Tensor:
    """The NF4 codes as int32 words of eight codes, padded to whole words."""
    flat = weight.data.reshape(-1)
    if flat.numel() % 4:
        flat = pad(flat, (0, -flat.numel() % 4))
    if flat.data_ptr() % _ALIGNMENT or flat.storage_offset() % 4:
        flat = flat.clone()
    return flat.view(torch.int32)


def scales(weight: Weight) -> tuple[Tensor | None, ...]:
    """(absmax, nested_absmax, nested_code, offset), the pointers of `nf4_decode.load_absmax`."""
    stored = (weight.absmax, weight.nested_absmax, weight.nested_code, weight.offset)
    return tuple(None if tensor is None else tensor.contiguous() for tensor in stored)


def weight_arguments(weights: Sequence[Weight]) -> dict[str, Any]:
    """The keyword arguments by which a tile kernel takes weights that have the same `weight_key`.

    Each pointer argument is a tuple with one entry per weight. BLOCKSIZE is 0 for dense weights.
    """
    sizes, weights_pointers = (0, 1), []
    for weight in weights:
        if weight.is_nf4:
            weights_pointers.append((words(weight), *scales(weight)))
            sizes = (weight.blocksize, weight.nested_blocksize)
        else:
            weights_pointers.append((weight.data.contiguous(), None, None, None, None))
    names = ("weight", "absmax", "nested_absmax", "nested_code", "offset")
    columns = zip(*weights_pointers, strict=True)
    arguments: dict[str, Any] = {
        f"{name}_ptrs": tensors for name, tensors in zip(names, columns, strict=True)
    }
    return arguments | dict(zip(("BLOCKSIZE", "NESTED_BLOCKSIZE"), sizes, strict=True))


def weight_key(weight: Weight) -> tuple[Any, ...]:
    """Weights with equal keys can share a launch."""
    if weight.is_nf4:
        nested = weight.nested_absmax is not None
        return (weight.blocksize, nested, weight.nested_blocksize if nested else 0)
    return (weight.data.dtype,)


@triton.jit
def pick(values, index):
    """Returns values[index], where `values` is a tuple of pointers or numbers of one type.

    `index` is known to the program alone, not to the compiler.
    """
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(index == i, values[i], value)
    return value


@triton.jit
def segment_of(step, sizes, STEP: tl.constexpr):
    """Returns (index, first step) of the segment that contains a step.

    The segments lie one behind the other, and segment i has ceil(sizes[i] / STEP) steps.
    """
    index, first, end = 0, 0, 0
    for i in tl.static_range(1, len(sizes)):
        end += tl.cdiv(sizes[i - 1], STEP)
        index = tl.where(step >= end, i, index)
        first = tl.where(step >= end, end, first)
    return index, first
