// What a plan must know about the GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace pylora::cuda {

struct DeviceLimits {
  int processors = 0;             // SMs
  int64_t shared_per_sm = 0;      // bytes
  int64_t shared_per_cta = 0;     // bytes; the most that a kernel may ask for
  int major = 0, minor = 0;       // compute capability
  bool dependent_launch = false;  // the GPU has programmatic dependent launch (sm_90 and later)
};

// Fills `limits` for the current device. The driver is asked once for each device.
cudaError_t device_limits(DeviceLimits* limits);

}  // namespace pylora::cuda
