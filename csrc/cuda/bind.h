// What the bind files of this folder share.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/check.h"

namespace pylora::cuda {

cudaStream_t current_stream(int32_t device_index);

// Raises where a launch, or a question to the device, gave an error.
inline void check_cuda_call(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, op, " could not be launched: ", cudaGetErrorName(error),
                  ", ", cudaGetErrorString(error));
}

inline void check_on_cuda(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.device().type() == DeviceType::CUDA, name,
                  " must be on a CUDA device, got device type ",
                  static_cast<int>(tensor.device().type()));
}

}  // namespace pylora::cuda
