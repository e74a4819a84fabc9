"""Contenders for a linear layer that need torch alone: variants of pylora, dense, decomposed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import pylora
import pylora.functional as F
from benchmarks.contender import BuiltLayer, Contender, installed
from benchmarks.layer_tensors import LayerTensors
from benchmarks.shapes import MODES, Cell
from pylora import dispatch, settings
from pylora.backends import limits


def explained(op: str, *args: Any, **options: Any) -> str:
    """Names the backend and the variant that run this call, as `pylora.explain` does, and what the
    kernels are compiled for if the variant does not say so."""
    explanation = pylora.explain(op, *args, **options)
    return f"{explanation.backend} ({explanation.compiled_for})"


def nf4_linear(tensors: LayerTensors) -> BuiltLayer:
    w = tensors.nf4()
    return BuiltLayer(lambda x: F.nf4_linear(x, w), lambda x: explained("nf4_linear", x, w))


def lora_linear(tensors: LayerTensors) -> BuiltLayer:
    w, (a, b), scaling = tensors.nf4(), tensors.lora(), tensors.scaling
    return BuiltLayer(
        lambda x: F.lora_linear(x, w, a, b, scaling),
        lambda x: explained("lora_linear", x, w, a, b, scaling),
        (a, b),
    )


def on_reference(layer: BuiltLayer) -> BuiltLayer:
    """Changes a layer of pylora to run on the reference backend, and returns it."""
    layer.backend = "reference"
    layer.variant = lambda x: "pure PyTorch, a panel of the weight at a time"
    return layer


def _hopper_why_not(cell: Cell, device: torch.device) -> str | None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return "it needs a GPU of compute capability 9.0"
    if cell.tokens < limits.CUDA_HOPPER_FROM:
        return f"it needs {limits.CUDA_HOPPER_FROM} tokens or more"
    return None


def _hopper(build: Callable[[LayerTensors], BuiltLayer], has_lora: bool) -> Contender:
    """Returns pylora with the Hopper kernel, which is off by default until it is measured."""
    return Contender(
        "pylora, Hopper kernel",
        lambda tensors: replace(build(tensors), environment={settings.HOPPER: "1"}),
        ("pylora-kernels",),
        has_lora=has_lora,
        modes=MODES[:1],
        unavailable=_hopper_why_not,
    )


def _triton_why_not(cell: Cell, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "it needs a GPU"
    if limits.CUDA_SMALL_M < cell.tokens < limits.CUDA_MANY_ROWS_FROM:
        return "pylora runs it here anyway"
    return dispatch.BACKENDS["triton"].unavailable()


def _triton(build: Callable[[LayerTensors], BuiltLayer], has_lora: bool) -> Contender:
    """Returns pylora with the Triton kernels, for cells in which it would choose the C++ kernels.
    The times show if that choice is right."""
    return Contender(
        "pylora, Triton kernels",
        lambda tensors: replace(build(tensors), backend="triton"),
        ("pylora-kernels", "triton"),
        has_lora=has_lora,
        modes=MODES[:1],
        unavailable=_triton_why_not,
    )


def _dense(dtype: torch.dtype) -> Any:
    def build(tensors: LayerTensors) -> BuiltLayer:
        weight = tensors.dense(dtype)
        return BuiltLayer(lambda x: torch.nn.functional.linear(x, weight), lambda x: "linear")

    return build


class _Decomposed(torch.autograd.Function):
    """Dequantizes, multiplies, and adds LoRA with `addmm_`. The backward dequantizes again.

    Unsloth does the same in LoRA_W of its unsloth/kernels/fast_lora.py.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scaling: float, dense: Any) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.scaling, ctx.dense = scaling, dense
        y = x @ dense().t()
        return y.addmm_(x @ a.t(), b.t(), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, a, b = ctx.saved_tensors
        grad_b = grad @ b
        d_a = torch.empty_like(a).addmm_(grad_b.t(), x, alpha=ctx.scaling, beta=0)
        d_b = torch.empty_like(b).addmm_(grad.t(), x @ a.t(), alpha=ctx.scaling, beta=0)
        dx = grad @ ctx.dense()
        dx.addmm_(grad_b, a, alpha=ctx.scaling)
        return dx, d_a, d_b, None, None


def _dequantizer(tensors: LayerTensors) -> tuple[Any, str]:
    """Returns (a function that dequantizes the weight, its name). It is bitsandbytes' function if
    that is installed, which Unsloth and Axolotl call too; otherwise it is pylora's."""
    w, dtype = tensors.nf4(), tensors.dtype
    if not installed("bitsandbytes"):
        return lambda: pylora.dequantize_nf4(w, dtype), "pylora dequantize"
    from bitsandbytes.functional import dequantize_4bit

    packed = w.to_bitsandbytes()
    return lambda: dequantize_4bit(packed.data, packed.quant_state), "bitsandbytes dequantize_4bit"


def _decomposed_lora(tensors: LayerTensors) -> BuiltLayer:
    (dense, name), (a, b), scaling = _dequantizer(tensors), tensors.lora(), tensors.scaling
    return BuiltLayer(
        lambda x: _Decomposed.apply(x, a, b, scaling, dense),
        lambda x: f"{name}, matmul, addmm_",
        (a, b),
    )


def _own_decomposed_lora(tensors: LayerTensors) -> BuiltLayer:
    w, (a, b), scaling = tensors.nf4(), tensors.lora(), tensors.scaling
    return BuiltLayer(
        lambda x: _Decomposed.apply(x, a, b, scaling, w.dequantize),
        lambda x: f"pylora dequantize on {explained('dequantize_nf4', w)}, matmul, addmm_",
        (a, b),
    )


def _decomposed_base(tensors: LayerTensors) -> BuiltLayer:
    dense, name = _dequantizer(tensors)
    return BuiltLayer(lambda x: x @ dense().t(), lambda x: f"{name}, matmul")


DENSE = tuple(
    Contender(
        f"dense {short}",
        _dense(getattr(torch, dtype)),
        weights="dense",
        has_lora=False,
        dtype=dtype,
        only_full=short != "bf16",
    )
    for short, dtype in (("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32"))
)

LINEAR = (
    Contender("pylora", nf4_linear, ("pylora-kernels",), has_lora=False, is_ours=True),
    Contender(
        "pylora reference",
        lambda tensors: on_reference(nf4_linear(tensors)),
        ("pylora-kernels", "torch"),
        has_lora=False,
    ),
    *DENSE,
    _hopper(nf4_linear, has_lora=False),
    _triton(nf4_linear, has_lora=False),
    # A backward is not timed: it would keep the dequantized weight alive, which nobody would do.
    Contender("dequantize + linear", _decomposed_base, has_lora=False, modes=MODES[:1]),
)

LORA = (
    Contender("pylora", lora_linear, ("pylora-kernels",), is_ours=True),
    Contender("pylora, no LoRA", nf4_linear, ("pylora-kernels",), has_lora=False),
    Contender(
        "pylora reference",
        lambda tensors: on_reference(lora_linear(tensors)),
        ("pylora-kernels", "torch"),
    ),
    *DENSE,
    _hopper(lora_linear, has_lora=True),
    _triton(lora_linear, has_lora=True),
    Contender("dequantize + linear + addmm_", _decomposed_lora),
    Contender(
        "pylora dequantize + linear + addmm_",
        _own_decomposed_lora,
        ("pylora-kernels", "torch"),
        only_full=True,
    ),
)
