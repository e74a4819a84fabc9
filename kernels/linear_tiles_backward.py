"""The tile kernel of the backward pass: grad @ W over NF4 or dense weights, finished with LoRA."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from pylora.calls import Weight
from pylora.kernels.configs import TilePlan
from pylora.kernels.epilogue import Epilogue, add_low_rank
from pylora.kernels.launch import MAX_REGISTERS, on_device_of
from pylora.kernels.nf4_decode import BF16_FACTOR, decode_words, load_absmax
from pylora.kernels.precision import dot_add, fp32_precision, rounded
from pylora.kernels.weight import pick, segment_of, weight_arguments


@triton.jit
def _nf4_tile(
    words_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    n,  # int64 [BLOCK_N], rows of the weight, all of them valid
    first_k,
    K,
    DTYPE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Returns the dense tile [BLOCK_N, BLOCK_K] of W, rounded once to DTYPE and zero beyond K."""
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


@triton.jit(do_not_specialize=["M", "splits", "threshold"])
def _linear_tiles_backward_kernel(
    grad_ptrs,  # this and all `_ptrs` have one entry per layer; [M, N], rows stride_grads apart
    weight_ptrs,  # int32 [N, K / 8] or dense [N, K]
    absmax_ptrs,
    nested_absmax_ptrs,
    nested_code_ptrs,
    offset_ptrs,
    out_ptr,  # [M, K] of grad's dtype, or fp32 [splits of the Ns, M, K] if PARTIAL
    partials_ptrs,  # this and the following: see `epilogue.add_low_rank`
    splits,
    factor_ptrs,
    seed_ptrs,
    threshold,
    keep_scale,
    M,
    Ns,
    K,
    Rs,
    stride_grads,
    n_per_split,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    LORA_PRECISION: tl.constexpr,
    ALIGNED_MASK: tl.constexpr,
    PARTIAL: tl.constexpr,
    EVEN_N: tl.constexpr,  # N % BLOCK_N == 0 for each layer
    EVEN_K: tl.constexpr,  # K % BLOCK_K == 0
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dx = sum over the layers of grad @ dequantize(W) + mask / (1 - p) * (dh @ lora_A)

    Shapes    grad [M, N] fp32|fp16|bf16; W int32 words [N, K / 8] with absmax [N, K / BLOCKSIZE],
              or dense [N, K] of grad's dtype; dh fp32 [1, M, R], passed as the partials;
              lora_A [R, K]; dx [M, K]
              (M = tokens, N = out_features, K = in_features, R = rank)
    Numerics  fp32 accumulation over all layers; code * absmax in fp32, rounded once to grad's
              dtype.
    Grid      (tiles of M, fastest, times tiles of K; splits of the Ns, which lie one behind the
              other)
    Algorithm 1. Find the layer that a step of N belongs to. 2. Decode a tile of its W, through
              shared memory as the right operand, and multiply. 3. If the sum is split, store the
              fp32 partial for `linear_expand`. 4. Else add the low-rank terms under their masks,
              regenerated here. 5. Store dx.
    Limits    K % BLOCKSIZE == 0; BLOCKSIZE and BLOCK_K are powers of two; the layers' tensors are
              alike in dtype and in what is absent.
    Source    QLoRA, arXiv:2305.14314; pylora/reference/lora_linear.py
    """
    DTYPE: tl.constexpr = grad_ptrs[0].dtype.element_ty
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid_m, pid_k = tl.program_id(0) % tiles_m, tl.program_id(0) // tiles_m
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    first_k = pid_k * BLOCK_K
    k = first_k + tl.arange(0, BLOCK_K)
    split = tl.program_id(1)
    lane = tl.arange(0, BLOCK_N)
    row = tl.minimum(m, M - 1).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    steps = 0
    for i in tl.static_range(len(Ns)):
        steps += tl.cdiv(Ns[i], BLOCK_N)
    first_step = split * (n_per_split // BLOCK_N)
    for step in range(first_step, tl.minimum(first_step + n_per_split // BLOCK_N, steps)):
        # 1. Find the layer of this step.
        index, first = segment_of(step, Ns, BLOCK_N)
        N = pick(Ns, index)
        offset = (step - first) * BLOCK_N + lane
        # 2. Decode a tile of W and multiply. Beyond N grad is zero and W repeats its last row.
        n = tl.minimum(offset, N - 1).to(tl.int64)
        grad_rows = pick(grad_ptrs, index) + row[:, None] * pick(stride_grads, index)
        if EVEN_N:
            grad = tl.load(grad_rows + offset[None, :])
        else:
            grad = tl.load(grad_rows + offset[None, :], mask=(offset < N)[None, :], other=0.0)
        weight_ptr = pick(weight_ptrs, index)
        if BLOCKSIZE:
            w = _nf4_tile(
                weight_ptr,
                pick(absmax_ptrs, index),
                pick(nested_absmax_ptrs, index) if nested_absmax_ptrs[0] is not None else None,
                pick(nested_code_ptrs, index) if nested_absmax_ptrs[0] is not None else None,
                pick(offset_ptrs, index) if nested_absmax_ptrs[0] is not None else None,
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
        # 3. Store the partial.
        tl.store(out + split.to(tl.int64) * M * K, acc, mask=inside)
    else:
        # 4. Add the low-rank terms.
        for i in tl.static_range(len(partials_ptrs)):
            acc = add_low_rank(
                acc,
                m,
                first_k,
                partials_ptrs[i],
                splits,
                1.0,
                None,
                None,
                False,
                factor_ptrs[i],
                1.0,
                seed_ptrs[i],
                threshold,
                keep_scale,
                M,
                K,
                Rs[i],
                "identity",
                OPERAND,
                LORA_PRECISION,
                True,
                ALIGNED_MASK,
                False,
                BLOCK_K,
                BLOCK_R,
            )
        # 5. Store dx.
        tl.store(out, rounded(acc, out_ptr.dtype.element_ty), mask=inside)


def launch_linear_tiles_backward(
    grads: Sequence[Tensor],
    weights: Sequence[Weight],
    out: Tensor,
    plan: TilePlan,
    epilogue: Epilogue,
) -> None:
    """Launches the tiles of the sum of grad @ W over the layers, and writes it to `out`.

    grads       [M, N] of each layer, any row stride
    weights     NF4 weights whose rows hold whole blocks, or dense contiguous ones [N, K]; all have
                the same `weight_key`
    out         [M, K] of grad's dtype; fp32 [splits, M, K] if plan.splits > 1
    epilogue    the terms to add, which are rank_first; ignored if plan.splits > 1, because `out`
                then gets partials
    """
    M, K = grads[0].shape[0], out.shape[-1]
    tile = plan.tile
    epilogue = epilogue if plan.splits == 1 else Epilogue()
    tiles = triton.cdiv(M, tile.block_m) * triton.cdiv(K, tile.block_n)
    sizes = tuple(grad.shape[1] for grad in grads)
    with on_device_of(out):
        _linear_tiles_backward_kernel[(tiles, plan.splits)](
            grad_ptrs=tuple(grads),
            **weight_arguments(weights),
            out_ptr=out,
            M=M,
            Ns=sizes,
            K=K,
            stride_grads=tuple(grad.stride(0) for grad in grads),
            n_per_split=plan.per_split,
            PRECISION=fp32_precision(),
            ALIGNED_MASK=K % 4 == 0,
            PARTIAL=plan.splits > 1,
            EVEN_N=all(size % tile.block_k == 0 for size in sizes),
            EVEN_K=K % tile.block_n == 0,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_k,
            BLOCK_K=tile.block_n,
            num_warps=tile.num_warps,
            maxnreg=MAX_REGISTERS,
            num_stages=tile.num_stages,
            **epilogue.arguments(),
            **epilogue.mask_arguments(),
        )
