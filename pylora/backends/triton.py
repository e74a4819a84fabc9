"""The triton backend: the kernels of `pylora.kernels` on CUDA devices, or in Triton's interpreter.

Triton and the kernels are imported when an op first needs them. The interpreter runs them on CPU
tensors, slowly and exactly, where TRITON_INTERPRET=1 was set before Triton was imported.
"""

from __future__ import annotations

import os
from functools import lru_cache, partial
from importlib import util
from typing import Any

import torch
from torch import Tensor

from pylora.backends.backend import (
    KERNEL_DTYPES,
    Backend,
    Op,
    Reason,
    nf4_dequantize_why_not,
    without_autocast,
)
from pylora.backends.triton_projections import (
    base,
    lora_mlp,
    lora_mlp_backward,
    lora_qkv,
    lora_qkv_backward,
    projections_why_not,
    rows,
)
from pylora.reference.multi_lora_linear import check_adapter_ids


@lru_cache(maxsize=1)
def interpreted() -> bool:
    """Whether this process runs Triton kernels in the interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@lru_cache(maxsize=1)
def _unavailable() -> Reason:
    if util.find_spec("triton") is None:
        return "the triton package is not installed"
    if interpreted():
        import triton
        import triton.language as tl

        # Triton's own functions were decorated when it was imported.
        if isinstance(tl.philox, triton.JITFunction):
            return "TRITON_INTERPRET=1 was set after triton was imported"
        return None
    if not torch.cuda.is_available():
        return "no CUDA device, and TRITON_INTERPRET=1 is not set"
    return None


def _request_only() -> Reason:
    return "Triton's interpreter runs only where it is asked for" if interpreted() else None


def _device() -> str:
    return "cpu" if interpreted() else "cuda"


def _path() -> str:
    if _unavailable() is not None:
        return "absent"
    if interpreted():
        return "interpreter"
    return "sm_" + "".join(map(str, torch.cuda.get_device_capability()))


def _tensors_why_not(**tensors: Tensor | None) -> Reason:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device.type != _device():
            return f"{name} is on {tensor.device}, not on a {_device()} device"
        if tensor.dtype not in KERNEL_DTYPES:
            return f"{name} is {tensor.dtype}; the kernels take float32, float16 and bfloat16"
        if 0 in tensor.shape[1:] or tensor.shape[-1:] == (0,):
            return f"{name} has shape {tuple(tensor.shape)}: there is nothing to multiply"
    return None


def _nf4_dequantize(*args: Any) -> Tensor:
    from pylora.kernels.nf4_dequantize import nf4_dequantize

    *q, shape, dtype = args
    return nf4_dequantize(base(tuple(q)), tuple(shape), dtype)


def _nf4_dequantize_why_not(*args: Any) -> Reason:
    return nf4_dequantize_why_not(_device(), *args)


def _nf4_linear(x: Tensor, *args: Any) -> Tensor:
    from pylora.kernels.lora_linear import nf4_linear

    *q, out_features, bias = args
    y = nf4_linear(rows(x), base(tuple(q)), out_features, bias)
    return y.view(*x.shape[:-1], out_features)


def _nf4_linear_backward(grad: Tensor, *args: Any) -> Tensor:
    from pylora.kernels.lora_linear_backward import nf4_linear_backward

    *q, in_features = args
    dx = nf4_linear_backward(rows(grad), base(tuple(q)), in_features)
    return dx.view(*grad.shape[:-1], in_features)


def _lora_layer(args: tuple[Any, ...], *low_rank: Any) -> Any:
    from pylora.kernels.lora_linear import Layer, LoRA
    from pylora.kernels.philox import seeded_dropout

    out_features, bias, A, B, A_bias, B_bias, scaling, p, seed, activation = low_rank
    lora = LoRA(A, B, A_bias, B_bias, scaling, seeded_dropout(p, seed), activation)
    return Layer(base(args), out_features, bias, lora)


def _lora_linear(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    from pylora.kernels.lora_linear import lora_linears

    out_features, A, B, bias, *last = args[7:]
    layer = _lora_layer(args[:7], out_features, bias, A, B, *last)
    ((y, h),) = lora_linears(rows(x), [layer])
    return y.view(*x.shape[:-1], out_features), h.view(*x.shape[:-1], A.shape[0])


def _lora_linear_why_not(x: Tensor, *args: Any) -> Reason:
    return _tensors_why_not(x=x, lora_A=args[8], lora_B=args[9])


def _lora_linear_backward(grad: Tensor, x: Tensor, h: Tensor, *args: Any) -> tuple[Tensor, ...]:
    from pylora.kernels.lora_linear_backward import Wanted, incoming, lora_linears_backward

    A, B, scaling, p, seed, activation, output_mask = args[7:]
    last = (scaling, p, seed, activation)
    layer = _lora_layer(args[:7], B.shape[0], None, A, B, None, None, *last)
    grad_rows, x_rows = rows(grad), rows(x)
    want_x, want_weight, want_A, want_B, want_bias, want_A_bias, want_B_bias = output_mask
    arriving = incoming(layer, grad_rows, x.shape[-1], want_x)
    wanted = Wanted(want_A, want_B, want_A_bias)
    dx, (found,) = lora_linears_backward([arriving], x_rows, [rows(h)], want_x, [wanted])
    column_sums = grad_rows.sum(0, dtype=torch.float32) if want_bias or want_B_bias else None
    results = (
        None if dx is None else dx.view(x.shape),
        grad_rows.t() @ x_rows if want_weight else None,
        found.lora_A,
        found.lora_B,
        column_sums.to(grad.dtype) if column_sums is not None and want_bias else None,
        found.lora_A_bias,
        (scaling * column_sums).to(A.dtype) if column_sums is not None and want_B_bias else None,
    )
    return tuple(x.new_empty(0) if result is None else result for result in results)


def _lora_linear_backward_why_not(grad: Tensor, x: Tensor, h: Tensor, *args: Any) -> Reason:
    return _tensors_why_not(grad=grad, x=x, lora_A=args[7], lora_B=args[8])


def _multi_lora(args: tuple[Any, ...]) -> Any:
    """The adapters from lora_A, lora_B, adapter_ids and scalings; the ids are checked where that
    waits for no device."""
    from pylora.kernels.multi_lora_linear import MultiLoRA

    A, B, ids, scalings = args
    check_adapter_ids(ids, A.shape[0])
    scalings = scalings.to(torch.float32)
    return MultiLoRA(*(t.contiguous() for t in (A, B, ids, scalings)))


def _multi_lora_linear(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    from pylora.kernels.multi_lora_linear import multi_lora_linear

    out_features, *low_rank, bias = args[7:]
    lora = _multi_lora(tuple(low_rank))
    y, h = multi_lora_linear(rows(x), base(args[:7]), out_features, bias, lora)
    return y.view(*x.shape[:-1], out_features), h.view(*x.shape[:-1], h.shape[1])


def _multi_lora_linear_why_not(x: Tensor, *args: Any) -> Reason:
    return _tensors_why_not(x=x, lora_A=args[8], lora_B=args[9]) or _adapters_why_not(args[8])


def _multi_lora_linear_backward(
    grad: Tensor, x: Tensor, h: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    from pylora.kernels.multi_lora_linear_backward import multi_lora_linear_backward

    want_x, want_weight, want_A, want_B, want_bias = args[11]
    grad_rows, x_rows = rows(grad), rows(x)
    dx, dlora_A, dlora_B = multi_lora_linear_backward(
        grad_rows,
        x_rows,
        rows(h).contiguous(),
        base(args[:7]),
        _multi_lora(args[7:11]),
        (want_x, want_A, want_B),
    )
    results = (
        None if dx is None else dx.view(x.shape),
        grad_rows.t() @ x_rows if want_weight else None,
        dlora_A,
        dlora_B,
        grad_rows.sum(0, dtype=torch.float32).to(grad.dtype) if want_bias else None,
    )
    return tuple(x.new_empty(0) if result is None else result for result in results)


def _multi_lora_linear_backward_why_not(grad: Tensor, x: Tensor, h: Tensor, *args: Any) -> Reason:
    tensors = _tensors_why_not(grad=grad, x=x, lora_A=args[7], lora_B=args[8])
    return tensors or _adapters_why_not(args[7])


def _adapters_why_not(lora_A: Tensor) -> Reason:
    return "lora_A has no adapters" if lora_A.shape[0] == 0 else None


_several_why_not = partial(projections_why_not, _tensors_why_not)

_OPS = {
    "nf4_dequantize": Op(_nf4_dequantize, _nf4_dequantize_why_not),
    "nf4_linear": Op(without_autocast(_nf4_linear), lambda x, *_: _tensors_why_not(x=x)),
    "nf4_linear_backward": Op(
        without_autocast(_nf4_linear_backward), lambda grad, *_: _tensors_why_not(grad=grad)
    ),
    "lora_linear": Op(without_autocast(_lora_linear), _lora_linear_why_not),
    "lora_linear_backward": Op(
        without_autocast(_lora_linear_backward), _lora_linear_backward_why_not
    ),
    "multi_lora_linear": Op(without_autocast(_multi_lora_linear), _multi_lora_linear_why_not),
    "multi_lora_linear_backward": Op(
        without_autocast(_multi_lora_linear_backward), _multi_lora_linear_backward_why_not
    ),
    "lora_qkv": Op(without_autocast(lora_qkv), _several_why_not),
    "lora_qkv_backward": Op(
        without_autocast(lora_qkv_backward),
        lambda grad, x, h, *args: _several_why_not(x, *args),
    ),
    "lora_mlp": Op(without_autocast(lora_mlp), _several_why_not),
    "lora_mlp_backward": Op(
        without_autocast(lora_mlp_backward),
        lambda grad, x, gate, up, h, *args: _several_why_not(x, *args),
    ),
}

BACKEND = Backend(
    name="triton",
    ops=_OPS,
    unavailable=_unavailable,
    path=_path,
    device=_device,
    request_only=_request_only,
)
