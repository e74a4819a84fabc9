"""The tile kernel of the backward pass: grad @ W straight from the 4-bit weight, with LoRA."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pylora.kernels.configs import TilePlan
from pylora.kernels.epilogue import Epilogue, add_epilogue
from pylora.kernels.launch import on_device_of
from pylora.kernels.nf4_decode import BF16_FACTOR, decode_words, load_absmax
from pylora.kernels.precision import dot_add, fp32_precision, rounded
from pylora.kernels.weight import NF4Base, weight_arguments


@triton.jit
def _nf4_tile(
    words_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    n,  # int64 [BLOCK_N], valid rows
    first_k,
    K,
    DTYPE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The dense tile [BLOCK_N, BLOCK_K] of W, rounded once to DTYPE; zero beyond K."""
    GROUP: tl.constexpr = BLOCKSIZE if BLOCKSIZE < BLOCK_K else BLOCK_K
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    CODE_SCALE: tl.constexpr = 1.0 / BF16_FACTOR if DTYPE == tl.bfloat16 else 1.0
    group = first_k + tl.arange(0, GROUPS) * GROUP
    absmax = load_absmax(
        absmax_ptr,
        nested_absmax_ptr,
        nested_code_ptr,
        offset_ptr,
        (n[:, None] * K + group[None, :]) // BLOCKSIZE,
        (n >= 0)[:, None] & (group < K)[None, :],
        NESTED_BLOCKSIZE,
    )
    word = first_k // 8 + tl.arange(0, BLOCK_K // 8)
    pointers = words_ptr + n[:, None] * (K // 8) + word[None, :]
    if EVEN_K:
        words = tl.load(pointers)
    else:
        words = tl.load(pointers, mask=(word * 8 < K)[None, :], other=0)
    codes = decode_words(words, DTYPE).to(tl.float32).reshape(BLOCK_N, GROUPS, GROUP)
    return rounded(codes * (absmax * CODE_SCALE)[:, :, None], DTYPE).reshape(BLOCK_N, BLOCK_K)


@triton.jit(do_not_specialize=["M", "parts", "threshold"])
def _nf4_linear_backward_kernel(
    grad_ptr,  # [M, N], rows stride_grad apart
    weight_ptr,  # int32 [N, K / 8] or dense [N, K]
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    out_ptr,  # [M, K] of grad's dtype, or fp32 [splits, M, K] where PARTIAL
    bias_ptr,  # this and the following: see `epilogue.add_epilogue`
    parts_ptr,
    parts,
    parts_scale,
    hidden_bias_ptr,
    h_ptr,
    factor_ptr,
    stride_q,
    stride_r,
    factor_bias_ptr,
    scaling,
    seed_ptr,
    threshold,
    keep_scale,
    M,
    N,
    K,
    R,
    stride_grad,
    n_per_split,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    LORA_PRECISION: tl.constexpr,
    ALIGNED_MASK: tl.constexpr,
    PARTIAL: tl.constexpr,
    EVEN_N: tl.constexpr,  # N % BLOCK_N == 0
    EVEN_K: tl.constexpr,  # K % BLOCK_K == 0
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dx = grad @ dequantize(W) + mask / (1 - p) * (dh @ lora_A)

    Shapes    grad [M, N] fp32|fp16|bf16; W int32 words [N, K / 8] with absmax [N, K / BLOCKSIZE],
              or dense [N, K] of grad's dtype; dh fp32 [1, M, R]; lora_A [R, K]; dx [M, K]
              (M = rows of grad, N = out_features, K = in_features, R = rank)
    Numerics  fp32 accumulation; code * absmax in fp32, rounded once to grad's dtype.
    Grid      (tiles of M, fastest, times tiles of K; splits of N)
    Algorithm 1. Decode a tile of W, through shared memory as the right operand, and multiply.
              2. Where N is split, store the fp32 partial sum for `linear_expand`. 3. Else add the
              low-rank term under the mask, regenerated here. 4. Store dx.
    Limits    K % BLOCKSIZE == 0; blocks and BLOCK_K are powers of two.
    Source    QLoRA, arXiv:2305.14314; pylora/reference/lora_linear.py
    """
    DTYPE: tl.constexpr = grad_ptr.dtype.element_ty
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid_m, pid_k = tl.program_id(0) % tiles_m, tl.program_id(0) // tiles_m
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    first_k = pid_k * BLOCK_K
    k = first_k + tl.arange(0, BLOCK_K)
    split = tl.program_id(1)
    step = tl.arange(0, BLOCK_N)
    row = tl.minimum(m, M - 1).to(tl.int64)
    grad_rows = grad_ptr + row[:, None] * stride_grad + step[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    first = split * n_per_split
    for start in range(first, tl.minimum(first + n_per_split, N), BLOCK_N):
        # 1. Beyond N grad is zero and W repeats its last row.
        n = tl.minimum(start + step, N - 1).to(tl.int64)
        if EVEN_N:
            grad = tl.load(grad_rows + start)
        else:
            grad = tl.load(grad_rows + start, mask=(start + step < N)[None, :], other=0.0)
        if BLOCKSIZE:
            w = _nf4_tile(
                weight_ptr,
                absmax_ptr,
                nested_absmax_ptr,
                nested_code_ptr,
                offset_ptr,
                n,
                first_k,
                K,
                DTYPE,
                BLOCKSIZE,
                NESTED_BLOCKSIZE,
                EVEN_K,
                BLOCK_N,
                BLOCK_K,
            )
        else:
            w = tl.load(weight_ptr + n[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
        acc = dot_add(acc, grad, w, PRECISION)
    out = out_ptr + m.to(tl.int64)[:, None] * K + k[None, :]
    inside = (m < M)[:, None] & (k < K)[None, :]
    if PARTIAL:
        # 2.
        tl.store(out + split.to(tl.int64) * M * K, acc, mask=inside)
    else:
        # 3.
        acc = add_epilogue(
            acc,
            m,
            first_k,
            bias_ptr,
            parts_ptr,
            parts,
            parts_scale,
            hidden_bias_ptr,
            h_ptr,
            pid_k == 0,
            factor_ptr,
            stride_q,
            stride_r,
            factor_bias_ptr,
            scaling,
            seed_ptr,
            threshold,
            keep_scale,
            M,
            K,
            R,
            ACTIVATION,
            OPERAND,
            LORA_PRECISION,
            ALIGNED_MASK,
            False,
            BLOCK_K,
            BLOCK_R,
        )
        # 4.
        tl.store(out, rounded(acc, out_ptr.dtype.element_ty), mask=inside)


def launch_nf4_linear_backward(
    grad: Tensor, weight: NF4Base | Tensor, out: Tensor, plan: TilePlan, epilogue: Epilogue
) -> None:
    """grad [M, N], any row stride; weight NF4 whose blocks lie in rows, or dense [N, K] contiguous.

    out is [M, K] of grad's dtype; with plan.splits > 1 it is fp32 [splits, M, K], and gets the
    partial sums without the epilogue.
    """
    (M, N), K = grad.shape, out.shape[-1]
    tile = plan.tile
    epilogue = Epilogue() if plan.splits > 1 else epilogue
    tiles = triton.cdiv(M, tile.block_m) * triton.cdiv(K, tile.block_n)
    with on_device_of(grad):
        _nf4_linear_backward_kernel[(tiles, plan.splits)](
            grad_ptr=grad,
            **weight_arguments(weight),
            out_ptr=out,
            M=M,
            N=N,
            K=K,
            stride_grad=grad.stride(0),
            n_per_split=plan.per_split,
            PRECISION=fp32_precision(),
            ALIGNED_MASK=K % 4 == 0,
            PARTIAL=plan.splits > 1,
            EVEN_N=N % tile.block_k == 0,
            EVEN_K=K % tile.block_n == 0,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_k,
            BLOCK_K=tile.block_n,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **epilogue.arguments(),
        )
