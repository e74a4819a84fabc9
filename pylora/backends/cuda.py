"""The cuda backend: the C++ kernels of `pylora._C` for NVIDIA GPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pylora.backends import extension
from pylora.backends.backend import Backend, Op, Reason

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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


def _nf4_dequantize(*args: Any) -> Tensor:
    return torch.ops.pylora_C.nf4_dequantize(*args)


def _nf4_dequantize_why_not(qweight: Tensor, *args: Any) -> Reason:
    if qweight.device.type != "cuda":
        return f"qweight is on {qweight.device}, not on a CUDA device"
    if args[-1] not in _DTYPES:
        return f"dtype is {args[-1]}; the kernels give float32, float16 and bfloat16"
    return None


BACKEND = Backend(
    name="cuda",
    ops={"nf4_dequantize": Op(_nf4_dequantize, _nf4_dequantize_why_not)},
    unavailable=_unavailable,
    path=_path,
)
