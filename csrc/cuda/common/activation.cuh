// The activations of the low-rank path in fp32, as pylora/reference/activation.py has them.
#pragma once

#include <cuda_runtime.h>

#include "common/activation.h"

namespace pylora::cuda {

__device__ __forceinline__ float activate_fp32(Activation activation, float h) {
  switch (activation) {
    case Activation::kIdentity:
      return h;
    case Activation::kRelu:
      return h > 0.0f || h != h ? h : 0.0f;
    case Activation::kGelu:
      return 0.5f * h * (1.0f + erff(h * 0.70710678f));
    case Activation::kGeluTanh: {
      const float cubic = h + static_cast<float>(kGeluCubic) * h * h * h;
      return 0.5f * h * (1.0f + tanhf(static_cast<float>(kGeluScale) * cubic));
    }
    case Activation::kSilu:
      return h / (1.0f + expf(-h));
    case Activation::kTanh:
      return tanhf(h);
    case Activation::kSigmoid:
      return 1.0f / (1.0f + expf(-h));
  }
  return h;
}

}  // namespace pylora::cuda
