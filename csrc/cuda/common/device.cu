#include <map>
#include <mutex>

#include "cuda/common/device.cuh"

namespace pylora::cuda {

cudaError_t device_limits(DeviceLimits* limits) {
  static std::mutex mutex;
  static std::map<int, DeviceLimits> known;
  int device = 0, per_sm = 0, per_cta = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto entry = known.find(device);
  if (entry != known.end()) {
    *limits = entry->second;
    return cudaSuccess;
  }
  const auto read = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  };
  read(&limits->processors, cudaDevAttrMultiProcessorCount);
  read(&per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  read(&per_cta, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  read(&limits->major, cudaDevAttrComputeCapabilityMajor);
  read(&limits->minor, cudaDevAttrComputeCapabilityMinor);
  limits->shared_per_sm = per_sm;
  limits->shared_per_cta = per_cta;
  limits->dependent_launch = limits->major >= 9;
  if (error == cudaSuccess) known[device] = *limits;
  return error;
}

}  // namespace pylora::cuda
