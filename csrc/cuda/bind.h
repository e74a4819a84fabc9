// What the bind files of this folder share.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "common/tensors.h"

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

// Makes a tensor's device the current one for as long as it lives.
class Device {
 public:
  explicit Device(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {}

  cudaStream_t stream() const { return current_stream(index_); }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace pylora::cuda
