// h = dropout(x) lora_A^T + lora_A_bias and low = scaling * act(h), for few tokens, which may each
// have an adapter of its own.
//
// Shapes    x [M, K] fp16|bf16; lora_A [R, K], or [adapters, R, K], of x's dtype or fp32;
//           lora_A_bias [R] of lora_A's -> h, low [M, R] fp32, 0 where a token has no adapter
// Numerics  everything in fp32. Dropout multiplies by 0 or 1 / (1 - p), by the mask of
//           pylora/reference/dropout.py.
// Grid      a CTA for every row of lora_A and every 4 tokens.
// Algorithm 1. The next kernel may start: it reads nothing of this one before it has waited.
//           2. Clear the counters that the next kernel counts splits with.
//           3. A thread takes 4 columns a step: one draw of Philox, one load of lora_A, one of each
//              token.
//           4. Sums of lanes by shuffles, of warps in their order.
// Limits    K % 4 == 0; x and lora_A aligned to 16 bytes.
// Source    LoRA, arXiv:2106.09685; pylora/reference/lora_linear.py
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/common/lora_args.cuh"

namespace pylora::cuda {

// Also sets counters [count] to 0. Returns the launch's error.
cudaError_t lora_shrink_small_m_cuda(const LoraShrinkArgs& args, DType dtype, const void* x,
                                     int tokens, int64_t cols, unsigned* counters, int64_t count,
                                     cudaStream_t stream);

}  // namespace pylora::cuda
