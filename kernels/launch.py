"""The device that a kernel is launched on, and the facts about it that the rules use."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Facts(NamedTuple):
    """The facts about a device that the rules of `configs` depend on."""

    capability: int  # ten times the compute capability: 80, 90, 100, ...
    multiprocessors: int


# These facts stand for the interpreter, whose tensors are on no GPU and which runs one program at a
# time. Few multiprocessors keep its grids small, but still make it split long sums as a GPU does.
ELSEWHERE = Facts(capability=90, multiprocessors=4)

# The most registers of a thread. Every launch sets this limit: without a limit, ptxas spills a few
# registers for the sake of occupancy.
MAX_REGISTERS = 255


@lru_cache(maxsize=64)
def _device_facts(index: int) -> Facts:
    properties = torch.cuda.get_device_properties(index)
    return Facts(10 * properties.major + properties.minor, properties.multi_processor_count)


def facts(tensor: Tensor) -> Facts:
    """The facts about the tensor's device."""
    return _device_facts(tensor.get_device()) if tensor.is_cuda else ELSEWHERE


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which the tensor's device is the current one, where Triton launches kernels.

    The interpreter's tensors are on the CPU and need no such context.
    """
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
