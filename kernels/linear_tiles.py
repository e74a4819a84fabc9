"""The tile kernel of the forward pass: x @ W^T over NF4 or dense weights, finished with LoRA."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from pylora.calls import Weight
from pylora.kernels.configs import TilePlan
from pylora.kernels.epilogue import Epilogue, add_low_rank, add_to_columns
from pylora.kernels.launch import MAX_REGISTERS, on_device_of
from pylora.kernels.nf4_decode import BF16_FACTOR, decode_words, load_absmax
from pylora.kernels.precision import dot, dot_add, fp32_precision, rounded
from pylora.kernels.weight import pick, segment_of, weight_arguments


@triton.jit
def _word_order(tile):
    """Reorders the columns of [P, 8 C] from word-major to element-pair-major.

    A matrix product may take k in any order that is the same for both operands. In this order the
    registers of a thread's fragment are the pairs of one word, so the thread loads whole words of
    W; in the natural order it would load bytes.
    """
    P: tl.constexpr = tile.shape[0]
    K: tl.constexpr = tile.shape[1]
    return tile.reshape(P, K // 8, 4, 2).permute(0, 2, 1, 3).reshape(P, K)


@triton.jit
def _weight_times_x(
    x_ptr,
    weight_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    m,  # int [BLOCK_M], tokens, all of them valid
    n,  # int [BLOCK_N], rows of the weight, all of them valid
    first,  # k to begin at, a multiple of BLOCK_K
    end,  # k to stop before
    K,
    stride_x,
    BLOCKSIZE: tl.constexpr,  # 0: a dense weight of x's dtype
    NESTED_BLOCKSIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,  # K % BLOCK_K == 0
):
    """Returns W @ x^T [BLOCK_N, BLOCK_M] in fp32, summed over k from first to end.

    The weight is the left operand because that one stays in registers.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    k = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + m.to(tl.int64)[:, None] * stride_x + k[None, :]
    acc = tl.zeros((n.shape[0], m.shape[0]), tl.float32)
    if BLOCKSIZE:
        # Each row holds whole NF4 blocks and BLOCK_K divides a block, so nothing needs a mask.
        words = tl.arange(0, BLOCK_K // 8)
        w_rows = weight_ptr + n.to(tl.int64)[:, None] * (K // 8) + words[None, :]
        blocks = n.to(tl.int64) * (K // BLOCKSIZE)
        CODE_SCALE: tl.constexpr = 1.0 / BF16_FACTOR if DTYPE == tl.bfloat16 else 1.0
        for start in range(first, end, BLOCK_K):
            absmax = load_absmax(
                absmax_ptr,
                nested_absmax_ptr,
                nested_code_ptr,
                offset_ptr,
                blocks + start // BLOCKSIZE,
                None,
                NESTED_BLOCKSIZE,
            )
            x = tl.load(x_rows + start)
            w = decode_words(tl.load(w_rows + start // 8), DTYPE).reshape(n.shape[0], BLOCK_K)
            partial = dot(_word_order(w), _word_order(x).T, PRECISION)
            acc += partial * (absmax * CODE_SCALE)[:, None]
    else:
        w_rows = weight_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
        for start in range(first, end, BLOCK_K):
            if EVEN_K:
                x = tl.load(x_rows + start)
                w = tl.load(w_rows + start)
            else:
                inside = (start + k < K)[None, :]
                x = tl.load(x_rows + start, mask=inside, other=0.0)
                w = tl.load(w_rows + start, mask=inside, other=0.0)
            acc = dot_add(acc, w, x.T, PRECISION)
    return acc


@triton.jit(do_not_specialize=["M", "splits"])
def _linear_tiles_kernel(
    x_ptr,  # [M, K], rows stride_x apart
    weight_ptrs,  # this and all `_ptrs` have one entry per layer; int32 [N, K / 8] or dense [N, K]
    absmax_ptrs,
    nested_absmax_ptrs,
    nested_code_ptrs,
    offset_ptrs,
    out_ptrs,  # [M, N] of x's dtype, or fp32 [splits of K, M, N] if PARTIAL
    bias_ptrs,  # this and the following: see `epilogue.add_low_rank`
    partials_ptrs,
    splits,
    partials_scale,
    hidden_bias_ptrs,
    h_ptrs,
    factor_ptrs,
    factor_bias_ptrs,
    scalings,
    M,
    Ns,
    K,
    Rs,
    stride_x,
    k_per_split,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    LORA_PRECISION: tl.constexpr,
    PARTIAL: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y = x @ dequantize(W)^T + bias + scaling * (act(h) @ lora_B^T + lora_B_bias) for each layer

    Shapes    x [M, K] fp32|fp16|bf16; W int32 words [N, K / 8], eight codes each, the even one of a
              byte in its high nibble, with absmax [N, K / BLOCKSIZE]; or dense [N, K] of x's dtype;
              h = partials_scale * sum(partials) + lora_A_bias; partials fp32 [splits, M, R];
              lora_B [N, R]; y [M, N]
              (M = tokens, N = out_features, K = in_features, R = rank)
    Numerics  fp32 accumulation; the codes' values are multiplied before scaling (fp16: 11 bits,
              bf16: 8 bits under a factor that suits them); absmax is applied in fp32 to the product
              of each NF4 block.
    Grid      (tiles of M, fastest, times tiles of N, layer after layer; splits of K)
    Algorithm 1. Find the layer. 2. Sum over this split's K. 3. If K is split, store the fp32
              partial for `linear_expand`. 4. Else add bias and the low-rank term; the programs of a
              layer's first tile of N store h. 5. Store y.
    Limits    K % BLOCKSIZE == 0, BLOCKSIZE % BLOCK_K == 0; the layers' tensors are alike in dtype
              and in what is absent.
    Source    QLoRA, arXiv:2305.14314; weight in registers as in Machete and CUTLASS example 55;
              pylora/reference/lora_linear.py
    """
    # 1. Find the layer.
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid_m, pid_n = tl.program_id(0) % tiles_m, tl.program_id(0) // tiles_m
    index, first_tile = segment_of(pid_n, Ns, BLOCK_N)
    N = pick(Ns, index)
    first_n = (pid_n - first_tile) * BLOCK_N
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    # 2. Sum over this split's K. Rows beyond the end repeat the last one and are not stored.
    acc = _weight_times_x(
        x_ptr,
        pick(weight_ptrs, index),
        pick(absmax_ptrs, index) if BLOCKSIZE else None,
        pick(nested_absmax_ptrs, index) if nested_absmax_ptrs[0] is not None else None,
        pick(nested_code_ptrs, index) if nested_absmax_ptrs[0] is not None else None,
        pick(offset_ptrs, index) if nested_absmax_ptrs[0] is not None else None,
        tl.minimum(m, M - 1),
        tl.minimum(n, N - 1),
        split * k_per_split,
        tl.minimum(split * k_per_split + k_per_split, K),
        K,
        stride_x,
        BLOCKSIZE,
        NESTED_BLOCKSIZE,
        PRECISION,
        BLOCK_K,
        EVEN_K,
    )
    out = pick(out_ptrs, index) + m.to(tl.int64)[None, :] * N + n[:, None]
    inside = (n < N)[:, None] & (m < M)[None, :]
    if PARTIAL:
        # 3. Store the partial.
        tl.store(out + split.to(tl.int64) * M * N, acc, mask=inside)
    else:
        # 4. Add bias and the low-rank term.
        if bias_ptrs[0] is not None:
            acc = add_to_columns(acc, pick(bias_ptrs, index), 1.0, n, N, True)
        if len(partials_ptrs) > 0:
            scaling = pick(scalings, index)
            acc = add_low_rank(
                acc,
                m,
                first_n,
                pick(partials_ptrs, index),
                splits,
                partials_scale,
                pick(hidden_bias_ptrs, index) if hidden_bias_ptrs[0] is not None else None,
                pick(h_ptrs, index),
                first_n == 0,
                pick(factor_ptrs, index),
                scaling,
                None,
                0,
                1.0,
                M,
                N,
                pick(Rs, index),
                ACTIVATION,
                OPERAND,
                LORA_PRECISION,
                False,
                False,
                True,
                BLOCK_N,
                BLOCK_R,
            )
            if factor_bias_ptrs[0] is not None:
                acc = add_to_columns(acc, pick(factor_bias_ptrs, index), scaling, n, N, True)
        # 5. Store y.
        tl.store(out, rounded(acc, out.dtype.element_ty), mask=inside)


def launch_linear_tiles(
    x: Tensor,
    weights: Sequence[Weight],
    outs: Sequence[Tensor],
    plan: TilePlan,
    epilogue: Epilogue,
) -> None:
    """Launches the tiles of x @ W^T for each weight, and writes each result to its `out`.

    x           [M, K], any row stride
    weights     NF4 weights whose rows hold whole blocks, or dense contiguous ones [N, K]; all have
                the same `weight_key`
    outs        [M, N] each, of x's dtype; fp32 [splits, M, N] if plan.splits > 1
    epilogue    a bias and a term for each out, or none; ignored if plan.splits > 1, because each
                out then gets partials
    """
    M, K = x.shape
    sizes = tuple(out.shape[-1] for out in outs)
    tile = plan.tile
    epilogue = Epilogue() if plan.splits > 1 else epilogue
    tiles_n = sum(triton.cdiv(size, tile.block_n) for size in sizes)
    with on_device_of(x):
        _linear_tiles_kernel[(triton.cdiv(M, tile.block_m) * tiles_n, plan.splits)](
            x_ptr=x,
            **weight_arguments(weights),
            out_ptrs=tuple(outs),
            M=M,
            Ns=sizes,
            K=K,
            stride_x=x.stride(0),
            k_per_split=plan.per_split,
            PRECISION=fp32_precision(),
            PARTIAL=plan.splits > 1,
            EVEN_K=K % tile.block_k == 0,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            maxnreg=MAX_REGISTERS,
            num_stages=tile.num_stages,
            **epilogue.arguments(),
            **epilogue.forward_arguments(),
        )
