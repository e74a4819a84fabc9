"""The cuda backend: the C++ kernels of `pylora._C` for NVIDIA GPUs."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from pylora.backends import cuda_hopper, cuda_products, extension
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

# The rows of x up to which reading the weight decides, and its kernel is the one to take. Where
# little of x fits shared memory, sums of many slices go through memory. Estimates: no GPU has run
# it. At most kMaxSmallTokens of csrc/cuda/lora_linear.cuh.
MAX_SMALL_M = 64
_MAX_SMALL_M_OF_LITTLE_MEMORY = 32
_LITTLE_MEMORY = 128 << 10  # bytes of shared memory; sm_86, sm_89 and sm_120 have less

# Limits of csrc/cuda/lora_linear.cuh.
_MAX_SMALL_M_OF_BLOCK_32 = 16
_MAX_RANK = 1024
_MAX_ELEMENTS = 2**35
_ALIGNMENT = 16  # bytes

# Places among the arguments of lora_linear and multi_lora_linear behind x.
_LORA_A = 8
_SCALINGS = 11


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


def _not_on_cuda(**tensors: Tensor | None) -> Reason:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_cuda:
            return f"{name} is on {tensor.device}, not on a cuda device"
    return None


def _nf4_quantize(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return torch.ops.pylora_C.nf4_quantize(weight.contiguous(), blocksize)


def _nf4_quantize_why_not(weight: Tensor, _: int) -> Reason:
    if weight.dtype not in KERNEL_DTYPES:
        return f"weight is {weight.dtype}; the kernels take float32, float16 and bfloat16"
    return _not_on_cuda(weight=weight)


def _nf4_dequantize(*args: Any) -> Tensor:
    return torch.ops.pylora_C.nf4_dequantize(*contiguous(args))


def _is_aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % _ALIGNMENT == 0


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it where the kernels could not read it 16 bytes at a time."""
    return tensor if _is_aligned(tensor) else tensor.clone()


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _on_hopper(rows: int) -> bool:
    """Whether so many rows are the Hopper kernel's, if any kernel's."""
    return rows >= cuda_hopper.MIN_M and cuda_hopper.asked_for()


def _by_products(rows: int, has_hopper: bool = True) -> bool:
    """Whether so many rows are left to a dense matrix product, of an op with a Hopper kernel or
    without."""
    return rows >= cuda_products.MIN_M and not (has_hopper and _on_hopper(rows))


def _forward_kernel(op: str, rows: int) -> Any:
    """That of nf4_linear or lora_linear for so many rows."""
    if _by_products(rows):
        return getattr(cuda_products, op)
    return getattr(torch.ops.pylora_C, f"{op}_hopper" if _on_hopper(rows) else op)


def _nf4_linear(x: Tensor, *args: Any) -> Tensor:
    y = _forward_kernel("nf4_linear", _rows(x))(_aligned(contiguous_rows(x)), *contiguous(args))
    return y.view(*x.shape[:-1], y.shape[-1])


def _nf4_linear_backward(grad: Tensor, *args: Any) -> Tensor:
    backward: Any = torch.ops.pylora_C.nf4_linear_backward
    if _by_products(_rows(grad), has_hopper=False):
        backward = cuda_products.nf4_linear_backward
    dx = backward(contiguous_rows(grad), *contiguous(args))
    return dx.view(*grad.shape[:-1], dx.shape[-1])


def _with_lora(op: Any, x: Tensor, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    others = contiguous(args)
    others[_LORA_A] = _aligned(others[_LORA_A])
    y, h = op(_aligned(contiguous_rows(x)), *others)
    return y.view(*x.shape[:-1], y.shape[-1]), h.view(*x.shape[:-1], h.shape[-1])


def _lora_linear(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _with_lora(_forward_kernel("lora_linear", _rows(x)), x, args)


def _multi_lora_linear(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    scalings = args[_SCALINGS].float()
    args = (*args[:_SCALINGS], scalings, *args[_SCALINGS + 1 :])
    return _with_lora(torch.ops.pylora_C.multi_lora_linear, x, args)


@lru_cache
def _has_matrix_instructions(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


@lru_cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a kernel may ask for; 0 where torch does not say."""
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 0)


def _few_rows_why_not(name: str, x: Tensor, in_features: int, blocksize: int) -> Reason:
    rows = _rows(x)
    if in_features % blocksize:
        return f"in_features is {in_features}, no multiple of the blocksize {blocksize}"
    if blocksize == 32 and rows > _MAX_SMALL_M_OF_BLOCK_32:
        most = f"{_MAX_SMALL_M_OF_BLOCK_32} where the blocksize is 32"
    elif rows > MAX_SMALL_M:
        most = f"{MAX_SMALL_M}"
    elif rows > _MAX_SMALL_M_OF_LITTLE_MEMORY and _shared_memory(x.device) < _LITTLE_MEMORY:
        most = f"{_MAX_SMALL_M_OF_LITTLE_MEMORY} on this GPU, for its shared memory"
    else:
        return None
    return f"{name} has {rows} rows; the kernel for few rows takes up to {most}"


def _linear_why_not(
    name: str,
    x: Tensor,
    shape: tuple[int, int],
    q: tuple[Any, ...],
    bias: Tensor | None = None,
    has_hopper: bool = False,
    has_products: bool = False,
) -> Reason:
    """For x, or grad, as `name` says, and an NF4 weight of `shape` [out_features, in_features];
    the last two say which kernels for many rows there are."""
    qweight, absmax, nested_absmax, _, _, blocksize, nested_blocksize = q
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"{name} is {x.dtype}; the kernel takes float16 and bfloat16"
    if 0 in shape:
        return "the weight has no elements"
    reason = _not_on_cuda(**{name: x}, qweight=qweight, absmax=absmax, bias=bias)
    if reason is not None:
        return reason
    if not _has_matrix_instructions(x.device):
        return "the kernel needs a GPU of compute capability 8.0 or later"
    rows, (out_features, in_features) = _rows(x), shape
    if has_products and _by_products(rows, has_hopper):
        return None
    if nested_absmax is not None and nested_blocksize & (nested_blocksize - 1):
        return f"nested_blocksize is {nested_blocksize}, no power of two"
    if in_features * out_features >= _MAX_ELEMENTS:
        return f"the weight has 2^35 elements or more: {out_features} x {in_features}"
    if not _is_aligned(qweight):
        return f"qweight is not aligned to {_ALIGNMENT} bytes"
    if has_hopper and rows >= cuda_hopper.MIN_M:
        return cuda_hopper.why_not(x, rows, blocksize)
    return _few_rows_why_not(name, x, in_features, blocksize)


def _nf4_linear_why_not(x: Tensor, *args: Any) -> Reason:
    *q, out_features, bias = args
    shape = (out_features, x.shape[-1])
    return _linear_why_not("x", x, shape, tuple(q), bias, has_hopper=True, has_products=True)


def _nf4_linear_backward_why_not(grad: Tensor, *args: Any) -> Reason:
    *q, in_features = args
    blocksize = q[5]
    if blocksize == 32 and not _by_products(_rows(grad), has_hopper=False):
        return "the blocksize is 32; the kernel takes 64 or more"
    shape = (grad.shape[-1], in_features)
    return _linear_why_not("grad", grad, shape, tuple(q), has_products=True)


def _adapter_why_not(x: Tensor, rank: int, **tensors: Tensor | None) -> Reason:
    """For lora_A, which comes first, and the other tensors of an adapter."""
    lora_A = tensors["lora_A"]
    assert lora_A is not None
    if lora_A.dtype not in (x.dtype, torch.float32):
        return f"lora_A is {lora_A.dtype}; the kernel takes {x.dtype}, as x has, and float32"
    if not 1 <= rank <= _MAX_RANK:
        return f"the rank is {rank}; the kernel takes 1 to {_MAX_RANK}"
    return _not_on_cuda(**tensors)


def _lora_linear_why_not(x: Tensor, weight: Tensor, absmax: Tensor | None, *args: Any) -> Reason:
    if absmax is None:
        return DENSE
    *q, out_features, lora_A, lora_B, bias, lora_A_bias, lora_B_bias = args[:11]
    reason = _nf4_linear_why_not(x, weight, absmax, *q, out_features, bias)
    if reason is not None:
        return reason
    if _by_products(_rows(x)):
        reason = cuda_products.lora_why_not(x, _rows(x), lora_A)
    adapter = {"lora_A": lora_A, "lora_B": lora_B}
    biases = {"lora_A_bias": lora_A_bias, "lora_B_bias": lora_B_bias}
    return reason or _adapter_why_not(x, lora_A.shape[0], **adapter, **biases)


def _multi_lora_linear_why_not(
    x: Tensor, weight: Tensor, absmax: Tensor | None, *args: Any
) -> Reason:
    if absmax is None:
        return DENSE
    *q, out_features, lora_A, lora_B, adapter_ids, scalings, bias = args
    shape = (out_features, x.shape[-1])
    adapters = {"adapter_ids": adapter_ids, "scalings": scalings}
    return _linear_why_not("x", x, shape, (weight, absmax, *q), bias) or _adapter_why_not(
        x, lora_A.shape[1], lora_A=lora_A, lora_B=lora_B, **adapters
    )


_OPS = {
    "nf4_quantize": Op(_nf4_quantize, _nf4_quantize_why_not),
    "nf4_dequantize": Op(_nf4_dequantize, partial(nf4_dequantize_why_not, "cuda")),
    "nf4_linear": Op(_nf4_linear, _nf4_linear_why_not),
    "nf4_linear_backward": Op(_nf4_linear_backward, _nf4_linear_backward_why_not),
    "lora_linear": Op(_lora_linear, _lora_linear_why_not),
    "multi_lora_linear": Op(_multi_lora_linear, _multi_lora_linear_why_not),
}

_COMPOSED_QKV = composed(_OPS)["lora_qkv"]


def _lora_qkv_why_not(x: Tensor, weight: list[Tensor], absmax: list[Any], *args: Any) -> Reason:
    if any(one is None for one in absmax):
        return f"of one projection {DENSE}"
    if _by_products(_rows(x)):
        return f"x has {_rows(x)} rows, and would be copied for each projection"
    return _COMPOSED_QKV.why_not(x, weight, absmax, *args)


BACKEND = Backend(
    name="cuda",
    ops={**_OPS, "lora_qkv": Op(_COMPOSED_QKV.run, _lora_qkv_why_not)},
    unavailable=_unavailable,
    path=_path,
    device=lambda: "cuda",
)
