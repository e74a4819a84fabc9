// Sums that several CTAs have a part of, each in its own place in memory.
#pragma once

#include "cuda/common/launch.cuh"

namespace pylora::cuda {

// Whole CTA. True in the last of `slices` CTAs that come here: what all of them wrote before can be
// read, past L1. `flag` is shared memory that nobody else uses until all threads have returned.
__device__ __forceinline__ bool comes_last(unsigned* counter, int slices, bool* flag) {
  __threadfence();  // what was written is visible before it is counted
  __syncthreads();
  if (threadIdx.x == 0) *flag = atomicAdd(counter, 1u) == static_cast<unsigned>(slices - 1);
  __syncthreads();
  const bool last = *flag;
  if (last) __threadfence();
  return last;
}

}  // namespace pylora::cuda
