"""Decodes NF4 inside Triton kernels: the eight codes of a 32-bit word to eight values, and absmax.

The values come from the one table, `pylora.nf4.NF4_CODE`. A GPU looks them up with byte permutes
(PRMT) in registers and reads no table from memory. The sixteen values are held as planes of bytes
(all lowest bytes, all next ones, ...), each plane in four 32-bit constants. One PRMT picks four
bytes out of eight by four 3-bit indices: it runs once for codes 0-7 and once for codes 8-15, and a
third PRMT chooses between the two results by the highest bit of each code. The interpreter has no
inline assembly, so it looks the values up in a tensor instead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pylora.kernels.precision import INTERPRETED, rounded
from pylora.nf4 import NF4_CODE

# In bf16 the sixteen values are stored times this factor. No other factor rounds them with a
# smaller rms error: it is 3.2e-4, and 5.5e-4 without a factor.
_BF16_FACTOR = 1.437
BF16_FACTOR = tl.constexpr(_BF16_FACTOR)
_CODE = tl.constexpr(NF4_CODE)


def code_planes(dtype: torch.dtype) -> list[list[int]]:
    """The table in `dtype` as [itemsize][4] 32-bit words: planes of bytes, lowest bytes first."""
    factor = _BF16_FACTOR if dtype == torch.bfloat16 else 1.0
    values = torch.tensor(NF4_CODE, dtype=torch.float64).mul(factor).to(dtype)
    planes = values.view(torch.uint8).view(16, -1).t().reshape(-1, 4, 4).tolist()
    return [[sum(b << (8 * i) for i, b in enumerate(word)) for word in plane] for plane in planes]


def _decoder(dtype: torch.dtype) -> str:
    """The PTX that decodes the eight codes of one word to values of `dtype`.

    Its outputs are 32-bit registers in the order of the elements: four pairs of 16-bit values, or
    eight fp32 values.
    """
    planes = code_planes(dtype)
    outputs = 2 * len(planes)
    # 1. Make four 3-bit indices for PRMT and the selectors that choose a byte of the lower table
    #    (0-3) or of the upper one (4-7), for the codes of each half of the word.
    text = f"""
    .reg .b32 index0, index1, choice0, choice1;
    and.b32 index0, ${outputs}, 0x77777777;
    shr.u32 index1, index0, 16;
    shr.u32 choice0, ${outputs}, 1;
    lop3.b32 choice0, choice0, 0x44444444, 0x32103210, 0xEA;
    shr.u32 choice1, choice0, 16;
    """
    for half in range(2):
        # 2. Look up one register per plane. Its bytes belong to elements 1, 0, 3, 2, because the
        # even element of a byte sits in the high nibble.
        for plane, (w0, w1, w2, w3) in enumerate(planes):
            text += f"""
            .reg .b32 low{half}{plane}, high{half}{plane}, byte{half}{plane};
            prmt.b32 low{half}{plane}, {w0:#010x}, {w1:#010x}, index{half};
            prmt.b32 high{half}{plane}, {w2:#010x}, {w3:#010x}, index{half};
            prmt.b32 byte{half}{plane}, low{half}{plane}, high{half}{plane}, choice{half};
            """
        # 3. Put the values together from their planes.
        text += _pairs(half) if len(planes) == 2 else _singles(half)
    return "{" + text + "}"


def _pairs(half: int) -> str:
    return f"""
    prmt.b32 ${2 * half}, byte{half}0, byte{half}1, 0x4051;
    prmt.b32 ${2 * half + 1}, byte{half}0, byte{half}1, 0x6273;
    """


def _singles(half: int) -> str:
    text = ""
    for pair, selector in enumerate(("0x4051", "0x6273")):
        text += f"""
        .reg .b32 lower{half}{pair}, upper{half}{pair};
        prmt.b32 lower{half}{pair}, byte{half}0, byte{half}1, {selector};
        prmt.b32 upper{half}{pair}, byte{half}2, byte{half}3, {selector};
        prmt.b32 ${4 * half + 2 * pair}, lower{half}{pair}, upper{half}{pair}, 0x5410;
        prmt.b32 ${4 * half + 2 * pair + 1}, lower{half}{pair}, upper{half}{pair}, 0x7632;
        """
    return text


_DECODE_BF16 = tl.constexpr(_decoder(torch.bfloat16))
_DECODE_FP16 = tl.constexpr(_decoder(torch.float16))
_DECODE_FP32 = tl.constexpr(_decoder(torch.float32))


@triton.jit
def _plain_table(DTYPE: tl.constexpr):
    code = tl.arange(0, 16)
    table = tl.zeros((16,), tl.float32)
    for index in tl.static_range(16):
        table = tl.where(code == index, _CODE[index], table)
    if DTYPE == tl.bfloat16:
        table *= BF16_FACTOR
    return rounded(table, DTYPE)


@triton.jit
def _plain(words, table, ELEMENT: tl.constexpr):
    # Element 0 is the high nibble of the lowest byte.
    code = (words >> (4 * (ELEMENT ^ 1))) & 0xF
    return tl.gather(table, code.reshape(words.numel), 0).reshape(words.shape)


@triton.jit
def _halves(pair, DTYPE: tl.constexpr):
    low = (pair & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
    high = (pair >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return low, high


@triton.jit
def _elements(words, DTYPE: tl.constexpr):
    """Returns the eight values of each word as eight tensors."""
    if INTERPRETED:
        table = _plain_table(DTYPE)
        v0, v1 = _plain(words, table, 0), _plain(words, table, 1)
        v2, v3 = _plain(words, table, 2), _plain(words, table, 3)
        v4, v5 = _plain(words, table, 4), _plain(words, table, 5)
        v6, v7 = _plain(words, table, 6), _plain(words, table, 7)
    elif DTYPE == tl.float32:
        v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
            _DECODE_FP32,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
            [words],
            dtype=(tl.float32,) * 8,
            is_pure=True,
            pack=1,
        )
    else:
        ASM: tl.constexpr = _DECODE_BF16 if DTYPE == tl.bfloat16 else _DECODE_FP16
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            ASM, "=&r,=&r,=&r,=&r,r", [words], dtype=(tl.int32,) * 4, is_pure=True, pack=1
        )
        v0, v1 = _halves(p0, DTYPE)
        v2, v3 = _halves(p1, DTYPE)
        v4, v5 = _halves(p2, DTYPE)
        v6, v7 = _halves(p3, DTYPE)
    return v0, v1, v2, v3, v4, v5, v6, v7


@triton.jit
def decode_words(words, DTYPE: tl.constexpr):
    """Decodes words int32 [P, C] to the values of their codes, DTYPE [P, C, 8].

    The last dimension is in the order of the elements; bf16 values are multiplied by BF16_FACTOR.
    All eight values of a word stay in the thread that holds the word.
    """
    v0, v1, v2, v3, v4, v5, v6, v7 = _elements(words, DTYPE)
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    values = tl.join(even, odd)  # [P, C, 2, 2, 2]: bits 2, 1 and 0 of the element's index
    return values.reshape(words.shape[0], words.shape[1], 8)


@triton.jit
def _product(a, b):
    """Returns a * b rounded to fp32, so that no addition that follows can become an FMA."""
    if INTERPRETED:
        return a * b
    return tl.inline_asm_elementwise(
        "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def load_absmax(
    absmax_ptr,  # fp32 [blocks], or uint8 codes under double quantization
    nested_absmax_ptr,  # fp32 [ceil(blocks / NESTED_BLOCKSIZE)] or None
    nested_code_ptr,  # fp32 [256] or None
    offset_ptr,  # fp32 [] or None
    index,  # indices of NF4 blocks, any shape
    mask,  # of the same shape, or None
    NESTED_BLOCKSIZE: tl.constexpr,
):
    """Returns the absmax of the NF4 blocks `index` in fp32.

    Under double quantization it is code * scale + offset, with one rounding for the product and one
    for the sum, as in bitsandbytes.
    """
    absmax = tl.load(absmax_ptr + index, mask=mask)
    if nested_absmax_ptr is not None:
        code = tl.load(nested_code_ptr + absmax.to(tl.int32), mask=mask)
        scale = tl.load(nested_absmax_ptr + index // NESTED_BLOCKSIZE, mask=mask)
        absmax = _product(code, scale) + tl.load(offset_ptr)
    return absmax
