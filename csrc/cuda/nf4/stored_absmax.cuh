// absmax as it lies in memory, on its way through registers: what it is made of is loaded chunks
// before it is needed.
#pragma once

#include "common/nf4.h"
#include "cuda/common/launch.cuh"

namespace pylora::cuda {

struct StoredAbsmax {
  float value = 0.0f;  // plain: absmax; nested: nested_absmax
  uint32_t code = 0;   // nested

  __device__ __forceinline__ void load(const NF4Matrix& weight, uint32_t block, int nested_shift) {
    if (weight.absmax_q == nullptr) {
      value = __ldg(weight.absmax + block);
    } else {
      code = __ldg(weight.absmax_q + block);
      value = __ldg(weight.nested_absmax + (block >> nested_shift));
    }
  }

  __device__ __forceinline__ float decode(const NF4Matrix& weight, float offset) const {
    if (weight.absmax_q == nullptr) return value;
    return __fadd_rn(__fmul_rn(__ldg(weight.nested_code + code), value), offset);
  }
};

}  // namespace pylora::cuda
