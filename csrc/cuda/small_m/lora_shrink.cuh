// h = dropout(x) lora_A^T + lora_A_bias and low = scaling * act(h) for few tokens. Each token may
// have an adapter of its own.
//
// Shapes    x [M, K] fp16|bf16; lora_A [R, K], or [adapters, R, K], of x's dtype or fp32;
//           lora_A_bias [R] of lora_A's dtype -> h, low [M, R] fp32, 0 if a token has no adapter
// Numerics  Everything is fp32. Dropout multiplies by 0 or 1 / (1 - p), with the mask of
//           pylora/reference/dropout.py.
// Grid      One CTA for each row of lora_A and each 4 tokens.
// Algorithm 1. Let the next kernel start. It reads nothing of this one before it has waited.
//           2. Clear the counters by which the next kernel counts its splits.
//           3. Sum the products. A thread takes 4 columns a step: one draw of Philox, one load of
//              lora_A, and one load of each token.
//           4. Add the sums of lanes by shuffles, then those of warps in their order, and store.
// Limits    K % 4 == 0; x and lora_A aligned to 16 bytes.
// Source    LoRA, arXiv:2106.09685; pylora/reference/lora_linear.py
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/common/lora_args.cuh"

namespace pylora::cuda {

// Sets counters [count] to 0 as well. Returns the error of the launch.
cudaError_t lora_shrink_small_m_cuda(const LoraShrinkArgs& args, DType dtype, const void* x,
                                     int tokens, int64_t cols, unsigned* counters, int64_t count,
                                     cudaStream_t stream);

}  // namespace pylora::cuda
