// h = dropout(x) lora_A^T + lora_A_bias and low = scaling * act(h), for many tokens: the kernel of
// lora_hidden.cuh reads x once for each row of lora_A, this one once for 8 of them.
//
// Shapes    x [M, K] fp16|bf16; lora_A [R, K] of x's dtype or fp32; lora_A_bias [R] of lora_A's
//           -> h [M, R], low [M, pitch] fp32
// Numerics  everything in fp32; low is rounded to TF32, in which it is multiplied next. Dropout
//           multiplies by 0 or 1 / (1 - p), by the mask of pylora/reference/dropout.py.
// Grid      a CTA for every 8 tokens and 8 rows of lora_A.
// Algorithm 1. The next kernel may start: it reads nothing of this one before it has waited.
//           2. A lane takes 4 columns a step, loads them of 8 tokens and of 8 rows of lora_A, and
//              adds to 64 sums. One draw of Philox for each token.
//           3. Lanes halve their sums until each has the whole warp's of two of them.
//           4. The sums of warps, in their order.
// Limits    K % 4 == 0; x and lora_A aligned to 16 bytes; M <= 8 * 65535.
// Source    LoRA, arXiv:2106.09685; pylora/reference/lora_linear.py
#pragma once

#include "cuda/lora_hidden.cuh"

namespace pylora {

inline constexpr int64_t kMaxManyTokens = 8 * 65535;  // of a grid

// Returns the launch's error.
cudaError_t lora_hidden_many_cuda(const LoraHidden& op, DType dtype, const void* x, int tokens,
                                  int64_t cols, int64_t low_pitch, cudaStream_t stream);

}  // namespace pylora
