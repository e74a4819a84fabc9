// One element of a vector whose dtype is known at run time.
#pragma once

#include "cuda/common/element.cuh"
#include "cuda/small_m/lora_linear.cuh"

namespace pylora::cuda {

__device__ __forceinline__ float load_any(const Vector& vector, int64_t index) {
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

}  // namespace pylora::cuda
