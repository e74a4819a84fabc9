"""When the cuda backend takes its kernel for many rows, which only Hopper (sm_90a) can run."""

from __future__ import annotations

import os
from functools import lru_cache

import torch
from torch import Tensor

from pylora.backends import extension
from pylora.backends.backend import Reason

# The rows of x from which on arithmetic decides, and not reading the weight. An estimate.
MIN_M = 128
# Off by default: it has not been measured against dequantize and matmul.
SWITCH = "PYLORA_HOPPER"

# Limits of csrc/cuda/nf4_linear_hopper.cuh and lora_hidden_many.cuh.
_COLUMNS = 64
_MAX_M = 8 * 65535


def asked_for() -> bool:
    return os.environ.get(SWITCH) == "1"


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@lru_cache(maxsize=1)
def _is_compiled() -> bool:
    module, _ = extension.load()
    return module is not None and "90a" in module.build_info()["cuda_archs"]


def device_why_not(device: torch.device) -> Reason:
    """None if the kernel can run on this CUDA device, else the reason in words."""
    if _capability(device) != (9, 0):
        return "the Hopper kernel needs a GPU of compute capability 9.0"
    if not _is_compiled():
        return "the Hopper kernel was not compiled: PYLORA_CUDA_ARCHS had no 90a"
    return None


def why_not(x: Tensor, rows: int, blocksize: int) -> Reason:
    """None where the kernel takes x over a weight of this blocksize, else the reason in words.

    What holds for every kernel of the backend has been asked before.
    """
    if not asked_for():
        return (
            "the Hopper kernel for many rows has not been measured against dequantize and matmul; "
            f"{SWITCH}=1 turns it on"
        )
    reason = device_why_not(x.device)
    if reason is not None:
        return reason
    if rows > _MAX_M:
        return f"x has {rows} rows; the Hopper kernel takes up to {_MAX_M}"
    if x.shape[-1] % _COLUMNS:
        return f"in_features is {x.shape[-1]}; the Hopper kernel needs a multiple of {_COLUMNS}"
    if blocksize % _COLUMNS:
        return f"blocksize is {blocksize}; the Hopper kernel needs a multiple of {_COLUMNS}"
    return None
