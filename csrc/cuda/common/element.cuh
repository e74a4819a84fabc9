// The three element types in kernels: to and from fp32, and 16 bytes of them at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/common/launch.cuh"
#include "cuda/common/lora_args.cuh"

namespace pylora::cuda {

__device__ __forceinline__ float to_fp32(float x) { return x; }
__device__ __forceinline__ float to_fp32(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_fp32(__nv_bfloat16 x) { return __bfloat162float(x); }

// To nearest, ties to even.
template <class T>
__device__ __forceinline__ T round_to(float x);
template <>
__device__ __forceinline__ float round_to<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half round_to<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 round_to<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Two elements in a register, the first in its low half.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float first, float second) {
  union {
    T values[2];
    uint32_t word;
  } pair;
  pair.values[0] = round_to<T>(first);
  pair.values[1] = round_to<T>(second);
  return pair.word;
}

// `kCount` elements that one load brings, aligned to their size.
template <class T, int kCount>
struct alignas(kCount * sizeof(T)) AlignedArray {
  T values[kCount];
};

// 16 bytes of T.
template <class T>
struct Bytes16 {
  static constexpr int kElements = kVectorBytes / sizeof(T);
  static constexpr int kPacked = kElements / 2;  // bytes of qweight that hold as many weights
  union {
    T values[kElements];
    uint4 bits;
  };
};

// Element `index` of a vector whose dtype is known at run time.
__device__ __forceinline__ float load_any(const TypedVector& vector, int64_t index) {
  switch (vector.dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(vector.data)[index];
    case DType::kFloat16:
      return to_fp32(static_cast<const __half*>(vector.data)[index]);
    case DType::kBFloat16:
      return to_fp32(static_cast<const __nv_bfloat16*>(vector.data)[index]);
  }
  return 0.0f;
}

// The bits of x rounded to nearest, ties away from 0, as cvt.rna.tf32 rounds; NaN stays NaN.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  constexpr uint32_t kHalfUnit = 1u << 12;
  const uint32_t bits = __float_as_uint(x);
  return x != x ? bits : (bits + kHalfUnit) & ~(2 * kHalfUnit - 1);
}

}  // namespace pylora::cuda
