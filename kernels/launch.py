"""Where kernels are launched, and what is known of that device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Facts(NamedTuple):
    """What the rules of `configs` depend on."""

    capability: int  # 80, 90, 100, ...
    multiprocessors: int


# Of tensors on no GPU: the interpreter's, which runs one program at a time. Few multiprocessors
# keep its grids small, yet make it split long sums as a GPU does.
ELSEWHERE = Facts(capability=90, multiprocessors=4)


# Of a thread, at most. Every launch names it: where none is named, ptxas spills a few registers for
# the sake of occupancy.
MAX_REGISTERS = 255


@lru_cache(maxsize=64)
def _device_facts(index: int) -> Facts:
    properties = torch.cuda.get_device_properties(index)
    return Facts(10 * properties.major + properties.minor, properties.multi_processor_count)


def facts(tensor: Tensor) -> Facts:
    """The facts of the tensor's device."""
    return _device_facts(tensor.get_device()) if tensor.is_cuda else ELSEWHERE


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device the current one: Triton launches there, on its current stream.

    The interpreter's tensors are on the CPU and need nothing.
    """
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
