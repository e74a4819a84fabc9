"""The conditions under which the cuda backend may run its hopper kernel, which needs sm_90a."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pylora import settings
from pylora.backends import extension
from pylora.backends.backend import Reason
from pylora.backends.limits import CUDA_HOPPER_FROM
from pylora.calls import Weight


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@lru_cache(maxsize=1)
def _is_compiled() -> bool:
    module, _ = extension.load()
    return module is not None and "90a" in module.build_info()["cuda_archs"]


def device_reason(device: torch.device) -> Reason:
    """None if the hopper kernel can run on this CUDA device, else the reason in words."""
    if _capability(device) != (9, 0):
        return "the hopper kernel needs a GPU of compute capability 9.0"
    if not _is_compiled():
        return "the hopper kernel was not compiled: PYLORA_CUDA_ARCHS had no 90a"
    return None


def reason(x: Tensor, tokens: int, weight: Weight) -> Reason:
    """None if the hopper kernel runs x [tokens, in_features] over this weight, else the reason.

    The caller has already asked what every linear kernel of the backend needs.
    """
    if tokens < CUDA_HOPPER_FROM:
        return f"x has {tokens} tokens; the hopper kernel is for {CUDA_HOPPER_FROM} or more"
    if not settings.current().hopper:
        return f"{settings.HOPPER}=0 turns the hopper kernel off"
    reason_of_device = device_reason(x.device)
    if reason_of_device is not None:
        return reason_of_device
    hard = extension.hard_limits("cuda")
    if tokens > hard["max_m"]:
        return f"x has {tokens} tokens; the hopper kernel takes up to {hard['max_m']}"
    columns = hard["hopper_columns"]
    if x.shape[-1] % columns:
        return f"in_features is {x.shape[-1]}; the hopper kernel needs a multiple of {columns}"
    if weight.blocksize % columns:
        return f"blocksize is {weight.blocksize}; the hopper kernel needs a multiple of {columns}"
    return None
