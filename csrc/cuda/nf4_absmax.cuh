// The absmax of a block, plain or nested: loaded some steps before it is used.
#pragma once

#include <cuda_runtime.h>

#include "common/nf4.h"

namespace pylora {

// absmax as it lies in memory, on its way through registers.
struct StoredAbsmax {
  float value = 0.0f;  // plain: absmax; nested: nested_absmax
  uint32_t code = 0;   // nested
};

__device__ __forceinline__ StoredAbsmax load_absmax(const NF4Matrix& weight, uint32_t block,
                                                    int nested_block_shift) {
  if (weight.absmax_q == nullptr) return {__ldg(weight.absmax + block), 0};
  return {__ldg(weight.nested_absmax + (block >> nested_block_shift)),
          __ldg(weight.absmax_q + block)};
}

// Two roundings where it is nested, as in NF4Matrix::absmax_at.
__device__ __forceinline__ float absmax_of(const NF4Matrix& weight, const StoredAbsmax& stored,
                                           float offset) {
  if (weight.absmax_q == nullptr) return stored.value;
  return __fadd_rn(__fmul_rn(__ldg(weight.nested_code + stored.code), stored.value), offset);
}

}  // namespace pylora
