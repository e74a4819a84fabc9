"""Rounding and matrix products that give the same on a GPU and in Triton's interpreter.

The interpreter rounds fp32 to bf16 towards zero and multiplies bf16 matrices wrongly. The functions
here make it do what a GPU does, so every kernel rounds and multiplies through them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

# Triton decides when it decorates a kernel, so the answer holds for the whole process.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """Rounds an fp32 value to DTYPE, to nearest even."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(DTYPE)


@triton.jit
def as_operand(value, DTYPE: tl.constexpr):
    """Returns a loaded tile in DTYPE; it is unchanged if it has that dtype already."""
    if value.dtype == DTYPE:
        return value
    else:
        return rounded(value.to(tl.float32), DTYPE)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """Returns a [P, Q] @ b [Q, S] in fp32; PRECISION matters only if the operands are fp32."""
    return dot_add(tl.zeros((a.shape[0], b.shape[1]), tl.float32), a, b, PRECISION)


@triton.jit
def dot_add(acc, a, b, PRECISION: tl.constexpr):
    """Returns acc + a @ b, with acc as the accumulator of the matrix units.

    A product in fp32 arithmetic begins at zero and is added to acc, so that a long sum is made of
    short ones, and its error does not grow with its length as that of one long chain would.
    """
    if INTERPRETED or PRECISION == "ieee":
        return acc + finished_dot(a, b, PRECISION)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def finished_dot(a, b, PRECISION: tl.constexpr):
    """Returns what `dot` returns, but the compiler keeps what is added to it out of the product.

    So the program waits for the product before the addition. An addition that became a part of the
    product would let a product of the Hopper matrix unit run on into the next turn of the loop.
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=1)


class Operands(NamedTuple):
    """The dtype that a low-rank product's operands are multiplied in, and how fp32 is multiplied.

    precision    Triton's `input_precision`: "ieee", "tf32" or "tf32x3"
    """

    dtype: tl.dtype
    precision: str


_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


def fp32_precision() -> str:
    """Triton's `input_precision` for fp32 operands, from torch's switch for fp32 matrix products.

    `allow_tf32` and `set_float32_matmul_precision` set the same switch. "tf32x3", which splits each
    operand into two TF32 numbers, is not accurate enough: the matrix units of an H100 round their
    sums towards zero, and the errors are up to three times those of torch in fp32.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def lora_operands(dtype: torch.dtype, lora_dtype: torch.dtype) -> Operands:
    """The operands of products whose result stays in fp32 or in the dtype of the LoRA weights.

    dtype         the dtype of x
    lora_dtype    the dtype of lora_A and lora_B, in which plain torch computes these products

    If the two dtypes differ, the operands are TF32, which holds fp16 and bf16 exactly.
    """
    if lora_dtype == torch.float32:
        return Operands(tl.float32, fp32_precision())
    if dtype == lora_dtype:
        return Operands(_DTYPES[dtype], "tf32")
    return Operands(tl.float32, "tf32")


def output_operands(dtype: torch.dtype, lora_dtype: torch.dtype) -> Operands:
    """The operands of the low-rank product that is added to y or dx and then rounded with them.

    If x and the LoRA weights have different dtypes, the operands are TF32. It has the range of
    fp32, which fp16 lacks, and eight times the precision of bf16, whose errors would add up over
    the layers of an MLP. If x is fp16, which has as many bits as TF32, each operand is two TF32
    numbers.
    """
    if dtype == torch.float32:
        return lora_operands(dtype, lora_dtype)
    if dtype == lora_dtype:
        return Operands(_DTYPES[dtype], "tf32")
    return Operands(tl.float32, "tf32x3" if dtype == torch.float16 else "tf32")
