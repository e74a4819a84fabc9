// h = dropout(x) lora_A^T + lora_A_bias and low = scaling * act(h), for many tokens: the kernel of
// lora_shrink_small_m.cuh reads x once for each row of lora_A, these once for 32 or 8 of them.
//
// Shapes    x [M, K] fp16|bf16; lora_A [R, K] of x's dtype or fp32; lora_A_bias [R] of lora_A's
//           -> h [M, R] fp32, and low: [M, pitch] fp32, or beside a copy of x, [x | low | 0] of
//           x's dtype, which is the left operand of a product with [W | lora_B | 0]
// Numerics  lora_A of x's dtype: exact products, summed in fp32 by the matrix units; fp32: all in
//           fp32, as torch does it, since h is judged in lora_A's dtype. low is rounded to TF32 or
//           x's dtype, in which it is multiplied next. Dropout multiplies by 0 or 1 / (1 - p), by
//           the mask of pylora/reference/dropout.py; the matrix units leave 1 / (1 - p) to the sum.
// Grid      a CTA of 8 warps, which share K, for 16 tokens and 16 or 32 rows of lora_A; in fp32
//           for 8 and 8.
// Algorithm 1. The next kernel may start: it reads nothing of this one before it has waited.
//           2. A lane loads 16 bytes of its rows of x and lora_A, 8 columns, twice a step, copies
//              x where that is wanted, and drops out: they are its fragments as they are, since any
//              order of k serves.
//              In fp32 it takes 4 columns a step of 8 tokens and 8 rows, and adds to 64 sums.
//           3. In fp32 lanes halve their sums until each has the whole warp's of two of them.
//           4. The sums of warps, in their order.
// Limits    K % 64 == 0; x and lora_A aligned to 16 bytes; M <= 8 * 65535.
// Source    LoRA, arXiv:2106.09685; pylora/reference/lora_linear.py
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/common/lora_args.cuh"
#include "cuda/limits.h"

namespace pylora::cuda {

// Columns of [x | low | 0], whose rows are of whole 16 bytes.
constexpr int64_t wide_cols(int64_t cols, int64_t rank) { return cols + ceil_div(rank, 8) * 8; }

// h and args.low [tokens, low_pitch]. Returns the launch's error.
cudaError_t lora_shrink_many_rows_cuda(const LoraShrinkArgs& args, DType dtype, const void* x,
                                       int tokens, int64_t cols, int64_t low_pitch,
                                       cudaStream_t stream);

// h and `wide` [tokens, wide_cols], aligned to 16 bytes, where x has lora_A's dtype; args.low is not
// used. Returns the launch's error.
cudaError_t lora_extend_cuda(const LoraShrinkArgs& args, const void* x, int tokens, int64_t cols,
                             void* wide, cudaStream_t stream);

}  // namespace pylora::cuda
