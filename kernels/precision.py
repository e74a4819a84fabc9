"""Rounding and matrix products, the same on a GPU and in Triton's interpreter.

The interpreter rounds fp32 to bf16 towards zero and multiplies bf16 matrices wrongly; both go
through the functions here, which do there what a GPU does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

# Triton asks this when a kernel is decorated: it holds for the whole process.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """fp32 -> DTYPE, to nearest even."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(DTYPE)


@triton.jit
def as_operand(value, DTYPE: tl.constexpr):
    """A loaded tile in DTYPE; as it is where it has it already."""
    if value.dtype == DTYPE:
        return value
    else:
        return rounded(value.to(tl.float32), DTYPE)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a [P, Q] @ b [Q, S] -> fp32 [P, S]; PRECISION decides only for fp32 operands."""
    return dot_add(tl.zeros((a.shape[0], b.shape[1]), tl.float32), a, b, PRECISION)


@triton.jit
def dot_add(acc, a, b, PRECISION: tl.constexpr):
    """acc + a @ b, summed inside the matrix units."""
    if INTERPRETED:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


class Operands(NamedTuple):
    """How a low-rank product is computed: in what dtype, and for fp32 on which of its paths."""

    dtype: tl.dtype
    precision: str


_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


def fp32_precision() -> str:
    """How a matrix product of fp32 operands is done, by torch's own switch.

    `allow_tf32` and `set_float32_matmul_precision` set it as well. "tf32x3" splits each operand
    into two TF32 numbers and is as accurate as fp32 arithmetic to a few units in the last place,
    on the matrix units.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def lora_operands(dtype: torch.dtype, lora_dtype: torch.dtype) -> Operands:
    """For products whose result is kept in fp32 or in the dtype of the LoRA weights.

    Plain torch computes them in the dtype of the LoRA weights. TF32 holds fp16 and bf16 exactly,
    which serves operands of two different dtypes.
    """
    if lora_dtype == torch.float32:
        return Operands(tl.float32, fp32_precision())
    if dtype == lora_dtype:
        return Operands(_DTYPES[dtype], "tf32")
    return Operands(tl.float32, "tf32")


def output_operands(dtype: torch.dtype, lora_dtype: torch.dtype) -> Operands:
    """For the low-rank product that is added to y or dx, and rounded to their dtype with them.

    TF32 serves LoRA weights of another dtype than x: it has the range of fp32, which fp16 lacks,
    and eight times the precision of bf16, whose errors would add up over the layers of an MLP.
    """
    if dtype == torch.float32:
        return lora_operands(dtype, lora_dtype)
    if dtype == lora_dtype:
        return Operands(_DTYPES[dtype], "tf32")
    return Operands(tl.float32, "tf32")
