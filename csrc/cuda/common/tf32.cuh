// TF32: fp32 of which the tensor cores leave out the 13 lowest bits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace pylora::cuda {

// The bits of x rounded to nearest, ties away from 0, as cvt.rna.tf32 rounds; NaN stays NaN.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  constexpr uint32_t kHalfUnit = 1u << 12;
  const uint32_t bits = __float_as_uint(x);
  return x != x ? bits : (bits + kHalfUnit) & ~(2 * kHalfUnit - 1);
}

}  // namespace pylora::cuda
