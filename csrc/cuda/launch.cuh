// What every kernel file of this folder shares: warp geometry, alignment, one way to launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace pylora {

inline constexpr int kLanes = 32;
inline constexpr int kVectorBytes = 16;  // the widest load or store of a lane

inline bool aligned(const void* pointer, uintptr_t bytes = kVectorBytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// A plain function call where <<<>>> would do: tests/host_cuda compiles the kernels as C++.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t grid, int block, cudaStream_t stream,
                   Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(static_cast<unsigned>(block));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace pylora
