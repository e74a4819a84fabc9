"""The cpu backend: the C++ kernels of `pylora._C` behind the arguments of the public ops."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from pylora.backends import extension
from pylora.backends.backend import (
    DENSE,
    KERNEL_DTYPES,
    Backend,
    Op,
    Reason,
    contiguous,
    contiguous_rows,
    nf4_dequantize_why_not,
)
from pylora.backends.composition import composed

_MAX_RANK = 1024  # kMaxRank of csrc/cpu/lora_linear.h: what a thread's workspace holds


def _unavailable() -> Reason:
    return extension.load()[1]


def _path() -> str:
    module, _ = extension.load()
    return module.cpu_isa() if module is not None else "absent"


def _device_or_dtype(**tensors: Tensor | None) -> Reason:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"{name} is on {tensor.device}, not on the CPU"
        if tensor.dtype not in KERNEL_DTYPES:
            return f"{name} is {tensor.dtype}; the kernels take float32, float16 and bfloat16"
        if tensor.shape[-1:] == (0,):
            return f"{name} has shape {tuple(tensor.shape)}: there is nothing to multiply"
    return None


def _rank(lora_A: Tensor) -> Reason:
    if lora_A.shape[0] > _MAX_RANK:
        return f"the rank is {lora_A.shape[0]}; the kernels take up to {_MAX_RANK}"
    return None


def _nf4_quantize(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return torch.ops.pylora_C.nf4_quantize(weight.contiguous(), blocksize)


def _nf4_dequantize(*args: Any) -> Tensor:
    return torch.ops.pylora_C.nf4_dequantize(*contiguous(args))


def _nf4_linear(x: Tensor, *args: Any) -> Tensor:
    y = torch.ops.pylora_C.nf4_linear(contiguous_rows(x), *contiguous(args))
    return y.view(*x.shape[:-1], y.shape[-1])


def _nf4_linear_backward(grad: Tensor, *args: Any) -> Tensor:
    dx = torch.ops.pylora_C.nf4_linear_backward(contiguous_rows(grad), *contiguous(args))
    return dx.view(*grad.shape[:-1], dx.shape[-1])


def _lora_linear(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    y, h = torch.ops.pylora_C.lora_linear(contiguous_rows(x), *contiguous(args))
    return y.view(*x.shape[:-1], y.shape[-1]), h.view(*x.shape[:-1], h.shape[-1])


def _lora_linear_why_not(x: Tensor, weight: Tensor, absmax: Tensor | None, *args: Any) -> Reason:
    if absmax is None:
        return DENSE
    return _rank(args[6]) or _device_or_dtype(x=x, lora_A=args[6], lora_B=args[7])


def _lora_linear_backward(grad: Tensor, x: Tensor, h: Tensor, *args: Any) -> tuple[Tensor, ...]:
    rows = (contiguous_rows(grad), contiguous_rows(x), contiguous_rows(h))
    dx, *others = torch.ops.pylora_C.lora_linear_backward(*rows, *contiguous(args))
    return (dx.view(x.shape) if args[-1][0] else dx, *others)


def _lora_linear_backward_why_not(
    grad: Tensor, x: Tensor, h: Tensor, weight: Tensor, absmax: Tensor | None, *args: Any
) -> Reason:
    if absmax is None:
        return DENSE
    return _rank(args[5]) or _device_or_dtype(grad=grad, x=x, lora_A=args[5], lora_B=args[6])


_OPS = {
    "nf4_quantize": Op(_nf4_quantize, lambda weight, _: _device_or_dtype(weight=weight)),
    "nf4_dequantize": Op(_nf4_dequantize, partial(nf4_dequantize_why_not, "cpu")),
    "nf4_linear": Op(_nf4_linear, lambda x, *_: _device_or_dtype(x=x)),
    "nf4_linear_backward": Op(_nf4_linear_backward, lambda grad, *_: _device_or_dtype(grad=grad)),
    "lora_linear": Op(_lora_linear, _lora_linear_why_not),
    "lora_linear_backward": Op(_lora_linear_backward, _lora_linear_backward_why_not),
}

BACKEND = Backend(
    name="cpu",
    ops={**_OPS, **composed(_OPS)},
    unavailable=_unavailable,
    path=_path,
    device=lambda: "cpu",
)
