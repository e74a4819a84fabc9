"""Dequantizes an NF4 weight to a dense tensor."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pylora.calls import Weight
from pylora.kernels.configs import DEQUANTIZE
from pylora.kernels.launch import MAX_REGISTERS, on_device_of
from pylora.kernels.nf4_decode import decode_words, load_absmax
from pylora.kernels.precision import rounded
from pylora.kernels.weight import scales, words


@triton.jit
def _nf4_dequantize_kernel(
    words_ptr,  # int32 [ceil(rows * columns / 8)]
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    out_ptr,  # [rows, columns], rows `stride` elements apart
    columns,
    stride,
    tiles,  # tiles of each row
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """out = code * absmax in fp32, rounded once to the dtype of `out`

    Shapes    words int32, eight elements each, the even one of a byte in its high nibble;
              absmax [rows * columns / BLOCKSIZE]; out [rows, columns] fp32|fp16|bf16
    Numerics  one fp32 product, one rounding: equal bit for bit to bitsandbytes.
    Grid      one program per row and BLOCKS of its NF4 blocks.
    Algorithm 1. Load BLOCKS absmax values. 2. Load and decode their words. 3. Multiply and store.
    Limits    columns % BLOCKSIZE == 0, or there is one row, padded to whole words: a weight whose
              blocks straddle rows is passed as one flat row.
    Source    QLoRA, arXiv:2305.14314; pylora/reference/nf4_dequantize.py
    """
    WORDS: tl.constexpr = BLOCKSIZE // 8
    row = (tl.program_id(0) // tiles).to(tl.int64)
    block = tl.program_id(0) % tiles * BLOCKS + tl.arange(0, BLOCKS)
    # 1. Load absmax. A block that begins in the row counts, even if only part of it is there.
    column = block.to(tl.int64) * BLOCKSIZE
    begins = column < columns
    first = row * columns
    absmax = load_absmax(
        absmax_ptr,
        nested_absmax_ptr,
        nested_code_ptr,
        offset_ptr,
        (first + column) // BLOCKSIZE,
        begins,
        NESTED_BLOCKSIZE,
    )
    # 2. Load and decode [BLOCKS, WORDS] words.
    word_column = column[:, None] + tl.arange(0, WORDS)[None, :] * 8
    words = tl.load(words_ptr + (first + word_column) // 8, mask=word_column < columns, other=0)
    values = decode_words(words, tl.float32)
    # 3. Multiply and store [BLOCKS, BLOCKSIZE] values.
    out = (values * absmax[:, None, None]).reshape(BLOCKS, BLOCKSIZE)
    element = column[:, None] + tl.arange(0, BLOCKSIZE)[None, :]
    pointers = out_ptr + row * stride + element
    tl.store(pointers, rounded(out, out_ptr.dtype.element_ty), mask=element < columns)


def launch_nf4_dequantize(weight: Weight, out: Tensor) -> None:
    """Writes the dense weight to `out` [rows, columns], whose rows may lie apart.

    Raises ValueError if NF4 blocks straddle rows and `out` is not contiguous.
    """
    columns = out.shape[-1]
    rows = math.prod(out.shape[:-1])
    stride = out.stride(-2) if out.dim() > 1 else columns
    if columns % weight.blocksize:
        if not out.is_contiguous():
            raise ValueError(
                "out is not contiguous; it must be contiguous if NF4 blocks straddle rows"
            )
        columns, rows = out.numel(), 1
    if rows * columns == 0:
        return
    blocks = max(1, DEQUANTIZE.elements // weight.blocksize)
    tiles = triton.cdiv(columns, blocks * weight.blocksize)
    with on_device_of(out):
        _nf4_dequantize_kernel[(rows * tiles,)](
            words(weight),
            *scales(weight),
            out,
            columns,
            stride,
            tiles,
            BLOCKSIZE=weight.blocksize,
            NESTED_BLOCKSIZE=weight.nested_blocksize,
            BLOCKS=blocks,
            num_warps=DEQUANTIZE.num_warps,
            maxnreg=MAX_REGISTERS,
        )


def nf4_dequantize(weight: Weight, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The weight as a dense tensor of `shape` and `dtype`."""
    out = weight.data.new_empty(shape, dtype=dtype)
    launch_nf4_dequantize(weight, out)
    return out
