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

__device__ __forceinline__ void load_absmax(StoredAbsmax* stored, const NF4Matrix& weight,
                                            uint32_t block, int nested_block_shift) {
  if (weight.absmax_q == nullptr) {
    stored->value = __ldg(weight.absmax + block);
  } else {
    stored->code = __ldg(weight.absmax_q + block);
    stored->value = __ldg(weight.nested_absmax + (block >> nested_block_shift));
  }
}

// Two roundings where it is nested, as in NF4Matrix::absmax_at.
__device__ __forceinline__ float absmax_of(const NF4Matrix& weight, const StoredAbsmax& stored,
                                           float offset) {
  float absmax = stored.value;
  if (weight.absmax_q != nullptr) {
    absmax = __fadd_rn(__fmul_rn(__ldg(weight.nested_code + stored.code), absmax), offset);
  }
  return absmax;
}

}  // namespace pylora
