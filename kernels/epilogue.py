"""What a tile kernel adds to its sum before it stores: bias, the low-rank term, their biases.

In the forward pass the low-rank term is scaling * act(h) @ lora_B^T, where h is still to be added
up from the parts that `lora_shrink` left; in the backward pass it is dh @ lora_A under the dropout
mask.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from pylora.kernels.activation import activate
from pylora.kernels.lora_hidden import sum_of_parts
from pylora.kernels.philox import Dropout, keep_mask
from pylora.kernels.precision import Operands, as_operand, dot_add, rounded


@triton.jit
def _hidden(
    parts_ptr,
    parts,
    parts_scale,
    hidden_bias_ptr,
    h_ptr,
    writes_h,
    scaling,
    m,
    r,
    M,
    R,
    ACTIVATION: tl.constexpr,
):
    """scaling * act(h) in fp32 with h = parts_scale * sum(parts) + bias, which is stored."""
    offset = m.to(tl.int64)[:, None] * R + r[None, :]
    inside = (m < M)[:, None] & (r < R)[None, :]
    h = parts_scale * sum_of_parts(parts_ptr, parts, offset, inside, M, R)
    if hidden_bias_ptr is not None:
        h += tl.load(hidden_bias_ptr + r, mask=r < R, other=0.0).to(tl.float32)[None, :]
    if h_ptr is not None:
        tl.store(h_ptr + offset, h, mask=inside & writes_h)
    return scaling * activate(h, ACTIVATION)


@triton.jit
def _add_low_rank(
    acc,
    m,
    q,
    parts_ptr,
    parts,
    parts_scale,
    hidden_bias_ptr,
    h_ptr,
    writes_h,
    factor_ptr,
    stride_q,
    stride_r,
    scaling,
    M,
    Q,
    R,
    ACTIVATION: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS_FIRST: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """acc + hidden [M, R] @ factor [Q, R]^T for any rank, BLOCK_R of it at a time."""
    for first in range(0, R, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        hidden = _hidden(
            parts_ptr,
            parts,
            parts_scale,
            hidden_bias_ptr,
            h_ptr,
            writes_h,
            scaling,
            m,
            r,
            M,
            R,
            ACTIVATION,
        )
        factor = tl.load(
            factor_ptr + q.to(tl.int64)[:, None] * stride_q + r.to(tl.int64)[None, :] * stride_r,
            mask=(q < Q)[:, None] & (r < R)[None, :],
            other=0.0,
        )
        hidden = rounded(hidden, OPERAND)
        factor = as_operand(factor, OPERAND)
        if COLUMNS_FIRST:
            acc = dot_add(acc, factor, hidden.T, PRECISION)
        else:
            acc = dot_add(acc, hidden, factor.T, PRECISION)
    return acc


@triton.jit
def add_epilogue(
    acc,  # fp32 [BLOCK_Q, BLOCK_M] where COLUMNS_FIRST, else [BLOCK_M, BLOCK_Q]
    m,  # int [BLOCK_M], rows of the output
    first_q,  # its columns are [first_q, first_q + BLOCK_Q)
    bias_ptr,  # [Q] or None
    parts_ptr,  # fp32 [parts, M, R] or None: no low-rank term
    parts,
    parts_scale,
    hidden_bias_ptr,  # [R] or None
    h_ptr,  # fp32 [M, R] or None
    writes_h,  # this program stores h
    factor_ptr,  # element (q, r) at q * stride_q + r * stride_r
    stride_q,
    stride_r,
    factor_bias_ptr,  # [Q] or None
    scaling,
    seed_ptr,  # int64 [] or None; a mask needs COLUMNS_FIRST = False
    threshold,
    keep_scale,
    M,
    Q,
    R,
    ACTIVATION: tl.constexpr,
    OPERAND: tl.constexpr,
    LORA_PRECISION: tl.constexpr,
    ALIGNED_MASK: tl.constexpr,
    COLUMNS_FIRST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """acc + bias + mask * (scaling * act(h) @ factor^T) + scaling * factor_bias

    h = parts_scale * sum(parts) + hidden_bias; mask is keep_scale or 0, from the seed.
    """
    q = first_q + tl.arange(0, BLOCK_Q)
    if bias_ptr is not None:
        acc = _add_to_columns(acc, bias_ptr, 1.0, q, Q, COLUMNS_FIRST)
    if parts_ptr is not None:
        term = acc
        if seed_ptr is not None:
            term = tl.zeros(acc.shape, tl.float32)
        term = _add_low_rank(
            term,
            m,
            q,
            parts_ptr,
            parts,
            parts_scale,
            hidden_bias_ptr,
            h_ptr,
            writes_h,
            factor_ptr,
            stride_q,
            stride_r,
            scaling,
            M,
            Q,
            R,
            ACTIVATION,
            OPERAND,
            LORA_PRECISION,
            COLUMNS_FIRST,
            BLOCK_R,
        )
        if seed_ptr is not None:
            tl.static_assert(not COLUMNS_FIRST)
            rows = m.to(tl.int64)
            keep = keep_mask(seed_ptr, threshold, rows, first_q, Q, BLOCK_Q, ALIGNED_MASK)
            acc += tl.where(keep, keep_scale * term, 0.0)
        else:
            acc = term
    if factor_bias_ptr is not None:
        acc = _add_to_columns(acc, factor_bias_ptr, scaling, q, Q, COLUMNS_FIRST)
    return acc


@triton.jit
def _add_to_columns(acc, vector_ptr, scale, q, Q, COLUMNS_FIRST: tl.constexpr):
    vector = scale * tl.load(vector_ptr + q, mask=q < Q, other=0.0).to(tl.float32)
    if COLUMNS_FIRST:
        acc += vector[:, None]
    else:
        acc += vector[None, :]
    return acc


class Epilogue(NamedTuple):
    """The arguments of `add_epilogue` that do not belong to one kernel."""

    bias: Tensor | None = None
    parts: Tensor | None = None
    parts_scale: float = 1.0
    hidden_bias: Tensor | None = None
    h: Tensor | None = None
    factor: Tensor | None = None  # [Q, R], any strides
    factor_bias: Tensor | None = None
    scaling: float = 1.0
    activation: str = "identity"
    operands: Operands = Operands(tl.float32, "ieee")
    dropout: Dropout = Dropout()

    def arguments(self) -> dict[str, Any]:
        """As keyword arguments of a kernel that ends with `add_epilogue`."""
        factor = self.factor
        rank = factor.shape[1] if factor is not None else 0
        return {
            "bias_ptr": self.bias,
            "parts_ptr": self.parts,
            "parts": self.parts.shape[0] if self.parts is not None else 0,
            "parts_scale": self.parts_scale,
            "hidden_bias_ptr": self.hidden_bias,
            "h_ptr": self.h,
            "factor_ptr": factor,
            "stride_q": factor.stride(0) if factor is not None else 0,
            "stride_r": factor.stride(1) if factor is not None else 0,
            "factor_bias_ptr": self.factor_bias,
            "scaling": self.scaling,
            "seed_ptr": self.dropout.seed,
            "threshold": self.dropout.threshold,
            "keep_scale": self.dropout.scale,
            "R": rank,
            "ACTIVATION": self.activation,
            "OPERAND": self.operands.dtype,
            "LORA_PRECISION": self.operands.precision,
            # Wider steps leave too few registers beside a tile of 128 x 128.
            "BLOCK_R": 16 if rank <= 16 else 32,
        }
