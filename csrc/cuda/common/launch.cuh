// What every kernel file of this folder shares: warp geometry, alignment, one way to launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

namespace pylora::cuda {

inline constexpr int kLanes = 32;
inline constexpr int kVectorBytes = 16;  // the widest load or store of a lane

inline bool aligned(const void* pointer, uintptr_t bytes = kVectorBytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// The exponent of a power of two.
inline int log2_of(int64_t power) {
  int result = 0;
  while (int64_t{1} << result < power) ++result;
  return result;
}

struct LaunchShape {
  dim3 grid;
  int threads = 0;
  size_t shared_bytes = 0;  // dynamic
  cudaStream_t stream = nullptr;
  bool dependent = false;  // may start before the kernel before it has ended (sm_90 on)
};

// Lets a kernel have so much dynamic shared memory on the current device. The driver keeps that, and
// is told only if a launch needs more than those before.
inline cudaError_t allow_shared_memory(const void* kernel, size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, size_t> allowed;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& most = allowed[{device, kernel}];
  if (bytes <= most) return cudaSuccess;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(bytes));
  if (error == cudaSuccess) most = bytes;
  return error;
}

// A plain function call where <<<>>> would do: tests/host_cuda compiles the kernels as C++.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchShape& shape,
                   Arguments... arguments) {
  constexpr size_t kWithoutAsking = 48 << 10;
  if (shape.shared_bytes > kWithoutAsking) {
    const auto* address = reinterpret_cast<const void*>(kernel);
    const cudaError_t error = allow_shared_memory(address, shape.shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = shape.stream;
  config.attrs = &overlap;
  config.numAttrs = shape.dependent ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t grid, int threads, cudaStream_t stream,
                   Arguments... arguments) {
  LaunchShape shape;
  shape.grid.x = static_cast<unsigned>(grid);
  shape.threads = threads;
  shape.stream = stream;
  return launch(kernel, shape, arguments...);
}

}  // namespace pylora::cuda
