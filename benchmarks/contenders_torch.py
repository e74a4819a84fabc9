"""Contenders for a linear layer that need torch alone: pylora, its reference, dense, decomposed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import pylora
import pylora.functional as F
from benchmarks.contender import Contender, Layer, installed
from benchmarks.operands import Operands
from benchmarks.shapes import MODES, Cell
from pylora import dispatch, settings
from pylora.backends import limits


def explained(op: str, *args: Any) -> str:
    """The backend and its variant that take this call, from `pylora.explain`."""
    explanation = pylora.explain(op, *args)
    return f"{explanation.backend} ({explanation.compiled_for})"


def nf4_linear(operands: Operands) -> Layer:
    w = operands.nf4()
    return Layer(lambda x: F.nf4_linear(x, w), lambda x: explained("nf4_linear", x, w))


def lora_linear(operands: Operands) -> Layer:
    w, (a, b), scaling = operands.nf4(), operands.lora(), operands.scaling
    return Layer(
        lambda x: F.lora_linear(x, w, a, b, scaling),
        lambda x: explained("lora_linear", x, w, a, b, scaling),
        (a, b),
    )


def on_reference(layer: Layer) -> Layer:
    layer.backend = "reference"
    layer.path = lambda x: "pure PyTorch, a panel of the weight at a time"
    return layer


def _hopper_why_not(cell: Cell, device: torch.device) -> str | None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return "needs a GPU of compute capability 9.0"
    if cell.rows < limits.CUDA_HOPPER_FROM:
        return f"takes {limits.CUDA_HOPPER_FROM} rows or more"
    return None


def _hopper(build: Callable[[Operands], Layer], has_lora: bool) -> Contender:
    """The kernel that is off by default, until it has been measured."""
    return Contender(
        "pylora, Hopper kernel",
        lambda operands: replace(build(operands), environment={settings.HOPPER: "1"}),
        ("pylora-kernels",),
        has_lora=has_lora,
        modes=MODES[:1],
        unavailable=_hopper_why_not,
    )


def _triton_why_not(cell: Cell, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a GPU"
    if limits.CUDA_SMALL_M < cell.rows < limits.CUDA_MANY_ROWS_FROM:
        return "is what pylora runs there"
    return dispatch.BACKENDS["triton"].unavailable()


def _triton(build: Callable[[Operands], Layer], has_lora: bool) -> Contender:
    """Where pylora prefers the C++ kernels: whether it should."""
    return Contender(
        "pylora, Triton kernels",
        lambda operands: replace(build(operands), backend="triton"),
        ("pylora-kernels", "triton"),
        has_lora=has_lora,
        modes=MODES[:1],
        unavailable=_triton_why_not,
    )


def _dense(dtype: torch.dtype) -> Any:
    def build(operands: Operands) -> Layer:
        weight = operands.dense(dtype)
        return Layer(lambda x: torch.nn.functional.linear(x, weight), lambda x: "linear")

    return build


class _Decomposed(torch.autograd.Function):
    """Dequantize, matmul, and LoRA through `addmm_`, as Unsloth's LoRA_W does it (its
    unsloth/kernels/fast_lora.py); the backward dequantizes again."""

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


def _dequantizer(operands: Operands) -> tuple[Any, str]:
    """bitsandbytes' dequantize where it is installed, as Unsloth and Axolotl call it."""
    w, dtype = operands.nf4(), operands.dtype
    if not installed("bitsandbytes"):
        return lambda: pylora.dequantize_nf4(w, dtype), "pylora dequantize"
    from bitsandbytes.functional import dequantize_4bit

    packed = w.to_bitsandbytes()
    return lambda: dequantize_4bit(packed.data, packed.quant_state), "bitsandbytes dequantize_4bit"


def _decomposed_lora(operands: Operands) -> Layer:
    (dense, name), (a, b), scaling = _dequantizer(operands), operands.lora(), operands.scaling
    return Layer(
        lambda x: _Decomposed.apply(x, a, b, scaling, dense),
        lambda x: f"{name}, matmul, addmm_",
        (a, b),
    )


def _own_decomposed_lora(operands: Operands) -> Layer:
    w, (a, b), scaling = operands.nf4(), operands.lora(), operands.scaling
    return Layer(
        lambda x: _Decomposed.apply(x, a, b, scaling, w.dequantize),
        lambda x: f"pylora dequantize on {explained('dequantize_nf4', w)}, matmul, addmm_",
        (a, b),
    )


def _decomposed_base(operands: Operands) -> Layer:
    dense, name = _dequantizer(operands)
    return Layer(lambda x: x @ dense().t(), lambda x: f"{name}, matmul")


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
        lambda operands: on_reference(nf4_linear(operands)),
        ("pylora-kernels", "torch"),
        has_lora=False,
    ),
    *DENSE,
    _hopper(nf4_linear, has_lora=False),
    _triton(nf4_linear, has_lora=False),
    # Its backward keeps the dequantized weight alive, which nobody would do: forward alone.
    Contender("dequantize + linear", _decomposed_base, has_lora=False, modes=MODES[:1]),
)

LORA = (
    Contender("pylora", lora_linear, ("pylora-kernels",), is_ours=True),
    Contender("pylora, no LoRA", nf4_linear, ("pylora-kernels",), has_lora=False),
    Contender(
        "pylora reference",
        lambda operands: on_reference(lora_linear(operands)),
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
