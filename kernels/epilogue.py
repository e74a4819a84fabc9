"""What a tile kernel adds to its sum before it stores it: biases and low-rank terms.

In the forward pass the low-rank term is scaling * act(h) @ lora_B^T, where h is still to be added
up from the partials of `lora_shrink`. In the backward pass each layer with LoRA has a term dh @
lora_A under its dropout mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from pylora.kernels.activation import activate
from pylora.kernels.lora_hidden import sum_of_partials
from pylora.kernels.philox import Mask, keep_mask
from pylora.kernels.precision import Operands, as_operand, dot_add, rounded


@triton.jit
def _hidden(
    partials_ptr,
    splits,
    partials_scale,
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
    """Returns scaling * act(h) in fp32 and stores h = partials_scale * sum(partials) + bias.

    The arguments are those of `add_low_rank`; h [m, r] is stored if writes_h.
    """
    offset = m.to(tl.int64)[:, None] * R + r[None, :]
    inside = (m < M)[:, None] & (r < R)[None, :]
    h = partials_scale * sum_of_partials(partials_ptr, splits, offset, inside, M, R)
    if hidden_bias_ptr is not None:
        h += tl.load(hidden_bias_ptr + r, mask=r < R, other=0.0).to(tl.float32)[None, :]
    if h_ptr is not None:
        tl.store(h_ptr + offset, h, mask=inside & writes_h)
    return scaling * activate(h, ACTIVATION)


@triton.jit
def factor_pointers(factor_ptr, wide, rank, WIDE, R, RANK_FIRST: tl.constexpr):
    """Pointers [Q, P] to the elements (rank [P], wide [Q]) of a contiguous low-rank factor.

    The factor is [R, WIDE] if RANK_FIRST, else [WIDE, R].
    """
    if RANK_FIRST:
        return factor_ptr + rank.to(tl.int64)[None, :] * WIDE + wide[:, None]
    else:
        return factor_ptr + wide.to(tl.int64)[:, None] * R + rank[None, :]


@triton.jit
def add_low_rank(
    acc,  # fp32 [BLOCK_Q, BLOCK_M] if COLUMNS_FIRST, else [BLOCK_M, BLOCK_Q]
    m,  # int [BLOCK_M], tokens of the output tile
    first_q,  # the tile's columns are [first_q, first_q + BLOCK_Q)
    partials_ptr,  # fp32 [splits, M, R]
    splits,  # the number of partials
    partials_scale,
    hidden_bias_ptr,  # [R] or None
    h_ptr,  # fp32 [M, R] or None
    writes_h,  # true if this program stores h
    factor_ptr,  # [Q, R], or [R, Q] if RANK_FIRST
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
    """Returns acc + mask * (scaling * act(h) @ factor^T) for any rank, BLOCK_R of it at a time.

    h = partials_scale * sum(partials) + hidden_bias. The mask is 1 without a seed, else keep_scale
    or 0, drawn from the seed. In the backward pass dh takes the place of h, with the identity.
    """
    q = first_q + tl.arange(0, BLOCK_Q)
    term = acc
    if seed_ptr is not None:
        term = tl.zeros(acc.shape, tl.float32)
    for first in range(0, R, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        hidden = _hidden(
            partials_ptr,
            splits,
            partials_scale,
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
        keep = keep_mask(seed_ptr, threshold, m.to(tl.int64), first_q, Q, BLOCK_Q, ALIGNED_MASK)
        term = acc + tl.where(keep, keep_scale * term, 0.0)
    return term


@triton.jit
def add_to_columns(acc, vector_ptr, scale, q, Q, COLUMNS_FIRST: tl.constexpr):
    """Returns acc + scale * vector [Q]; the vector has an entry for each column q of the output."""
    vector = scale * tl.load(vector_ptr + q, mask=q < Q, other=0.0).to(tl.float32)
    if COLUMNS_FIRST:
        acc += vector[:, None]
    else:
        acc += vector[None, :]
    return acc


class Term(NamedTuple):
    """One low-rank term: those arguments of `add_low_rank` that differ from layer to layer."""

    partials: Tensor  # fp32 [splits, M, R]
    factor: Tensor  # [Q, R], or [R, Q] if the epilogue is rank_first
    hidden_bias: Tensor | None = None
    h: Tensor | None = None
    factor_bias: Tensor | None = None
    scaling: float = 1.0
    mask: Mask = Mask()


class Epilogue(NamedTuple):
    """What a kernel adds to its output or outputs.

    In the forward pass each output gets its own bias and term. In the backward pass the one output
    gets all the terms.
    """

    biases: Sequence[Tensor | None] = (None,)
    terms: Sequence[Term] = ()
    partials_scale: float = 1.0
    rank_first: bool = False
    activation: str = "identity"
    operands: Operands = Operands(tl.float32, "ieee")

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each term."""
        return tuple(term.factor.shape[0 if self.rank_first else 1] for term in self.terms)

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of every kernel that adds low-rank terms."""
        return {
            "partials_ptrs": tuple(term.partials for term in self.terms),
            "splits": self.terms[0].partials.shape[0] if self.terms else 0,
            "factor_ptrs": tuple(term.factor.contiguous() for term in self.terms),
            "Rs": self.ranks,
            "OPERAND": self.operands.dtype,
            "LORA_PRECISION": self.operands.precision,
            # Wider steps would leave too few registers beside a tile of 128 x 128.
            "BLOCK_R": 16 if max(self.ranks, default=0) <= 16 else 32,
        }

    def forward_arguments(self) -> dict[str, Any]:
        """The further keyword arguments of the kernels that may end a forward pass."""
        return {
            "bias_ptrs": tuple(self.biases),
            "partials_scale": self.partials_scale,
            "hidden_bias_ptrs": tuple(term.hidden_bias for term in self.terms),
            "h_ptrs": tuple(term.h for term in self.terms),
            "factor_bias_ptrs": tuple(term.factor_bias for term in self.terms),
            "scalings": tuple(term.scaling for term in self.terms),
            "ACTIVATION": self.activation,
        }

    def mask_arguments(self) -> dict[str, Any]:
        """The further keyword arguments of the kernels that may end a backward pass.

        All masks have the same dropout probability.
        """
        masks = [term.mask for term in self.terms]
        return {
            "seed_ptrs": tuple(mask.seed for mask in masks),
            "threshold": masks[0].threshold if masks else 0,
            "keep_scale": masks[0].scale if masks else 1.0,
        }
