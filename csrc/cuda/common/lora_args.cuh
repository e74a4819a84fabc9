// Descriptors of a call, as the host code fills them and passes them to a launcher. All pointers are
// device pointers. This header includes no device code: the bindings are compiled without nvcc.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/nf4.h"

namespace pylora::cuda {

// A vector whose dtype is known at run time; null if the call has none.
struct TypedVector {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
};

// The adapter of each token: one adapter for all of them, or one out of a stack for each.
struct Adapters {
  const int64_t* ids = nullptr;     // [M]; null if all tokens have adapter 0
  const float* scalings = nullptr;  // [count]; used only with ids
  int count = 1;

  PYLORA_INLINE bool many() const { return ids != nullptr; }
  // The adapter of a token, or -1 if the token has none (its id is not in the stack).
  PYLORA_INLINE int of(int64_t token) const {
    if (!many()) return 0;
    const int64_t id = ids[token];
    return id >= 0 && id < count ? static_cast<int>(id) : -1;
  }
};

// h = dropout(x) lora_A^T + lora_A_bias and low = scaling * act(h).
struct LoraShrinkArgs {
  int rank = 0;
  Adapters adapters;
  const void* lora_A = nullptr;       // [R, K], or [adapters, R, K]
  const void* lora_A_bias = nullptr;  // [R]; null if there is none, and always with many adapters
  DType dtype = DType::kFloat32;      // of lora_A, lora_A_bias and lora_B
  float scaling = 1.0f;               // used only with one adapter
  Activation activation = Activation::kIdentity;

  const int64_t* seed = nullptr;  // [1]; null if there is no dropout
  uint32_t threshold = 0;         // an element is dropped if its 32-bit word is below this
  float keep_scale = 1.0f;        // 1 / (1 - p)

  float* h = nullptr;    // [M, R]
  float* low = nullptr;  // [M, R]
};

// y = x W^T + bias, plus the low-rank part unless the rank is 0.
struct LoraLinearArgs {
  DType dtype = DType::kBFloat16;  // of x and y
  const void* x = nullptr;         // [M, K]
  void* y = nullptr;               // [M, N]
  int tokens = 0;                  // M
  NF4Matrix weight;
  const float* offset = nullptr;  // [1]; null if absmax is not nested
  TypedVector bias;               // [N]

  LoraShrinkArgs shrink;         // its rank is 0 if the call has no LoRA
  const void* lora_B = nullptr;  // [N, R], or [adapters, N, R]
  TypedVector lora_B_bias;       // [N]
};

}  // namespace pylora::cuda
