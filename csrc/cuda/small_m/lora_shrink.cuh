// h = dropout(x) lora_A^T + lora_A_bias and low = scaling * act(h), for few tokens, which may each
// have an adapter of its own.
//
// Shapes    x [M, K] fp16|bf16; lora_A [R, K], or [adapters, R, K], of x's dtype or fp32;
//           lora_A_bias [R] of lora_A's -> h, low [M, R] fp32, 0 where a token has no adapter
// Numerics  everything in fp32. Dropout multiplies by 0 or 1 / (1 - p), by the mask of
//           pylora/reference/dropout.py.
// Grid      a CTA for every row of lora_A and every 4 tokens.
// Algorithm 1. The next kernel may start: it reads nothing of this one before it has waited.
//           2. Clear the counters that the next kernel counts slices with.
//           3. A thread takes 4 columns a step: one draw of Philox, one load of lora_A, one of each
//              token.
//           4. Sums of lanes by shuffles, of warps in their order.
// Limits    K % 4 == 0; x and lora_A aligned to 16 bytes.
// Source    LoRA, arXiv:2106.09685; pylora/reference/lora_linear.py
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/activation.h"
#include "common/nf4.h"

namespace pylora::cuda {

// Which of a stack of adapters a token has.
struct Adapters {
  const int64_t* ids = nullptr;     // [M] on the device; null: there is one, and all have it
  const float* scalings = nullptr;  // [count], with ids
  int count = 1;

  PYLORA_INLINE bool many() const { return ids != nullptr; }
  // -1: none.
  PYLORA_INLINE int of(int64_t token) const {
    if (!many()) return 0;
    const int64_t id = ids[token];
    return id >= 0 && id < count ? static_cast<int>(id) : -1;
  }
};

struct LoraHidden {
  int rank = 0;
  Adapters adapters;
  const void* lora_A = nullptr;
  const void* lora_A_bias = nullptr;  // or null, as with many adapters
  DType dtype = DType::kFloat32;      // of lora_A, lora_A_bias and lora_B
  float scaling = 1.0f;               // with one adapter
  Activation activation = Activation::kIdentity;

  const int64_t* seed = nullptr;  // [1] on the device; null: no dropout
  uint32_t threshold = 0;         // elements whose 32-bit word is below are dropped
  float keep_scale = 1.0f;        // 1 / (1 - p)

  float* h = nullptr;    // [M, R]
  float* low = nullptr;  // [M, R]
};

// Also sets counters [count] to 0. Returns the launch's error.
cudaError_t lora_hidden_cuda(const LoraHidden& op, DType dtype, const void* x, int tokens,
                             int64_t cols, unsigned* counters, int64_t count, cudaStream_t stream);

}  // namespace pylora::cuda
