"""The cuda backend: the C++ kernels of `pylora._C` for NVIDIA GPUs."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from pylora.backends import extension
from pylora.backends.backend import (
    KERNEL_DTYPES,
    Backend,
    Op,
    Reason,
    nf4_dequantize_why_not,
)


@lru_cache(maxsize=1)  # asked at every call of every op
def _unavailable() -> Reason:
    module, reason = extension.load()
    if module is None:
        return reason
    if not module.build_info()["cuda"]:
        return "pylora._C was built without nvcc"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return None


def _path() -> str:
    module, _ = extension.load()
    archs = module.build_info()["cuda_archs"] if module is not None else []
    return ", ".join(archs) or "absent"


def _nf4_quantize(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return torch.ops.pylora_C.nf4_quantize(weight.contiguous(), blocksize)


def _nf4_quantize_why_not(weight: Tensor, _: int) -> Reason:
    if not weight.is_cuda:
        return f"weight is on {weight.device}, not on a cuda device"
    if weight.dtype not in KERNEL_DTYPES:
        return f"weight is {weight.dtype}; the kernels take float32, float16 and bfloat16"
    return None


def _nf4_dequantize(*args: Any) -> Tensor:
    return torch.ops.pylora_C.nf4_dequantize(*args)


BACKEND = Backend(
    name="cuda",
    ops={
        "nf4_quantize": Op(_nf4_quantize, _nf4_quantize_why_not),
        "nf4_dequantize": Op(_nf4_dequantize, partial(nf4_dequantize_why_not, "cuda")),
    },
    unavailable=_unavailable,
    path=_path,
)
