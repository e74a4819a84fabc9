// The three element types in kernels: to and from fp32, and 16 bytes of them at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/common/launch.cuh"

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

template <class T>
struct Chunk {
  static constexpr int kElements = kVectorBytes / sizeof(T);
  static constexpr int kPacked = kElements / 2;  // bytes of qweight that hold as many weights
  union {
    T values[kElements];
    uint4 vector;
  };
};

}  // namespace pylora::cuda
