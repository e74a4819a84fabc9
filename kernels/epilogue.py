"""What a tile kernel adds to its sum before it stores: bias, low-rank terms, their biases.

In the forward pass the low-rank term is scaling * act(h) @ lora_B^T, where h is still to be added
up from the parts that `lora_shrink` left; in the backward pass it is dh @ lora_A under the dropout
mask, one for each projection whose input has the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from pylora.kernels.activation import activate
from pylora.kernels.lora_hidden import sum_of_parts
from pylora.kernels.philox import Mask, keep_mask
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
def factor_pointers(factor_ptr, wide, rank, WIDE, R, RANK_FIRST: tl.constexpr):
    """Of the elements (rank, wide) of a contiguous low-rank factor: [R, WIDE] where RANK_FIRST,
    else [WIDE, R]. wide [Q] and rank [P] give pointers [Q, P]."""
    if RANK_FIRST:
        return factor_ptr + rank.to(tl.int64)[None, :] * WIDE + wide[:, None]
    else:
        return factor_ptr + wide.to(tl.int64)[:, None] * R + rank[None, :]


@triton.jit
def add_low_rank(
    acc,  # fp32 [BLOCK_Q, BLOCK_M] where COLUMNS_FIRST, else [BLOCK_M, BLOCK_Q]
    m,  # int [BLOCK_M], rows of the output
    first_q,  # its columns are [first_q, first_q + BLOCK_Q)
    parts_ptr,  # fp32 [parts, M, R]
    parts,
    parts_scale,
    hidden_bias_ptr,  # [R] or None
    h_ptr,  # fp32 [M, R] or None
    writes_h,  # this program stores h
    factor_ptr,  # [Q, R], or [R, Q] where RANK_FIRST
    scaling,
    seed_ptr,  # int64 [] or None; a mask needs COLUMNS_FIRST = False
    threshold,
    keep_scale,
    M,
    Q,
    R,
    ACTIVATION: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK_FIRST: tl.constexpr,
    ALIGNED_MASK: tl.constexpr,
    COLUMNS_FIRST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """acc + mask * (scaling * act(h) @ factor^T) for any rank, BLOCK_R of it at a time.

    h = parts_scale * sum(parts) + hidden_bias; mask is keep_scale or 0, from the seed.
    """
    q = first_q + tl.arange(0, BLOCK_Q)
    term = acc
    if seed_ptr is not None:
        term = tl.zeros(acc.shape, tl.float32)
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
            factor_pointers(factor_ptr, q, r, Q, R, RANK_FIRST),
            mask=(q < Q)[:, None] & (r < R)[None, :],
            other=0.0,
        )
        hidden = rounded(hidden, OPERAND)
        factor = as_operand(factor, OPERAND)
        if COLUMNS_FIRST:
            term = dot_add(term, factor, hidden.T, PRECISION)
        else:
            term = dot_add(term, hidden, factor.T, PRECISION)
    if seed_ptr is not None:
        tl.static_assert(not COLUMNS_FIRST)
        rows = m.to(tl.int64)
        keep = keep_mask(seed_ptr, threshold, rows, first_q, Q, BLOCK_Q, ALIGNED_MASK)
        term = acc + tl.where(keep, keep_scale * term, 0.0)
    return term


@triton.jit
def add_to_columns(acc, vector_ptr, scale, q, Q, COLUMNS_FIRST: tl.constexpr):
    """acc + scale * vector [Q], along the columns q of the output."""
    vector = scale * tl.load(vector_ptr + q, mask=q < Q, other=0.0).to(tl.float32)
    if COLUMNS_FIRST:
        acc += vector[:, None]
    else:
        acc += vector[None, :]
    return acc


class Term(NamedTuple):
    """One low-rank term: what of `add_low_rank` differs from projection to projection."""

    parts: Tensor  # fp32 [parts, M, R]
    factor: Tensor  # [Q, R], or [R, Q] where the epilogue is rank_first
    hidden_bias: Tensor | None = None
    h: Tensor | None = None
    factor_bias: Tensor | None = None
    scaling: float = 1.0
    mask: Mask = Mask()


class Epilogue(NamedTuple):
    """What a kernel adds: to each of several outputs its bias and its term, in that order, or to
    one output a bias and all the terms."""

    biases: Sequence[Tensor | None] = (None,)
    terms: Sequence[Term] = ()
    parts_scale: float = 1.0
    rank_first: bool = False
    activation: str = "identity"
    operands: Operands = Operands(tl.float32, "ieee")

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(term.factor.shape[0 if self.rank_first else 1] for term in self.terms)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of every kernel that adds low-rank terms."""
        return {
            "parts_ptrs": tuple(term.parts for term in self.terms),
            "parts": self.terms[0].parts.shape[0] if self.terms else 0,
            "factor_ptrs": tuple(term.factor.contiguous() for term in self.terms),
            "Rs": self.ranks,
            "OPERAND": self.operands.dtype,
            "LORA_PRECISION": self.operands.precision,
            # Wider steps leave too few registers beside a tile of 128 x 128.
            "BLOCK_R": 16 if max(self.ranks, default=0) <= 16 else 32,
        }

    def forward_arguments(self) -> dict[str, Any]:
        """Those of the kernels that may end a forward pass."""
        return {
            "bias_ptrs": tuple(self.biases),
            "parts_scale": self.parts_scale,
            "hidden_bias_ptrs": tuple(term.hidden_bias for term in self.terms),
            "h_ptrs": tuple(term.h for term in self.terms),
            "factor_bias_ptrs": tuple(term.factor_bias for term in self.terms),
            "scalings": tuple(term.scaling for term in self.terms),
            "ACTIVATION": self.activation,
        }

    def mask_arguments(self) -> dict[str, Any]:
        """Those of the kernels that may end a backward pass; all masks have one probability."""
        masks = [term.mask for term in self.terms]
        return {
            "seed_ptrs": tuple(mask.seed for mask in masks),
            "threshold": masks[0].threshold if masks else 0,
            "keep_scale": masks[0].scale if masks else 1.0,
        }
