// h = dropout(x) lora_A^T + lora_A_bias and low = scaling * act(h) for many tokens.
// small_m/lora_shrink.cuh reads x once for each row of lora_A; these kernels read it once for each
// 8, 16 or 32 rows. They serve two products: the Hopper kernel reads low, and a dense product over
// a decoded weight, [x | low | 0] times [W | lora_B | 0]^T, reads low beside a copy of x.
//
// Shapes    x [M, K] fp16|bf16; lora_A [R, K] of x's dtype or fp32; lora_A_bias [R] of lora_A's
//           dtype -> h [M, R] fp32, and low: either [M, pitch] fp32, or in [x | low | 0] of x's
//           dtype
// Numerics  If lora_A has x's dtype, products are exact, and the matrix units sum them in fp32. If
//           it is fp32, everything is fp32, as in torch, since h is judged in lora_A's dtype. low
//           is rounded to what it is multiplied in next: TF32 or x's dtype. Dropout multiplies by 0
//           or 1 / (1 - p), with the mask of pylora/reference/dropout.py; on the matrix units, the
//           sum is multiplied by 1 / (1 - p).
// Grid      A CTA of 8 warps, which share out K, for 16 tokens and 16 or 32 rows of lora_A. In fp32
//           it is for 8 tokens and 8 rows.
// Algorithm 1. Let the next kernel start. It reads nothing of this one before it has waited.
//           2. Sum the products. On the matrix units, a lane loads 16 bytes, which are 8 columns,
//              of its rows of x and lora_A, twice a step. It copies x if that is wanted, and
//              applies dropout. What it has loaded is its fragments as they are, since any order of
//              k serves. In fp32 a lane takes 4 columns a step, of 8 tokens and 8 rows, and adds to
//              64 sums.
//           3. In fp32, the lanes of a warp add up their sums: they exchange halves until each lane
//              has the warp's total of two sums.
//           4. Add the sums of the warps in their order, and store h and low.
// Limits    K % 64 == 0; x and lora_A aligned to 16 bytes; M <= 8 * 65535.
// Source    LoRA, arXiv:2106.09685; pylora/reference/lora_linear.py
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/common/lora_args.cuh"
#include "cuda/limits.h"

namespace pylora::cuda {

// How many columns [x | low | 0] has. Its rows are whole multiples of 16 bytes.
constexpr int64_t wide_cols(int64_t cols, int64_t rank) { return cols + ceil_div(rank, 8) * 8; }

// Makes h and args.low, whose rows are `low_pitch` floats apart. Returns the error of the launch.
cudaError_t lora_shrink_many_rows_cuda(const LoraShrinkArgs& args, DType dtype, const void* x,
                                       int tokens, int64_t cols, int64_t low_pitch,
                                       cudaStream_t stream);

// Makes h and `wide` = [x | low | 0] [M, wide_cols], which is aligned to 16 bytes. lora_A must have
// x's dtype. args.low is not used. Returns the error of the launch.
cudaError_t lora_extend_cuda(const LoraShrinkArgs& args, const void* x, int tokens, int64_t cols,
                             void* wide, cudaStream_t stream);

}  // namespace pylora::cuda
