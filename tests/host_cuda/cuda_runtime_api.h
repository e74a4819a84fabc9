// Stands in for the toolkit's header, so that CUDA C++ compiles as plain C++ and runs on the
// executor. This folder takes the toolkit's place on the include path. The header has only what the
// kernels use.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <utility>

#include "executor.h"

#define __global__
#define __host__
#define __device__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorNotSupported };

#define CUDART_VERSION 13000
enum cudaDriverEntryPointQueryResult {
  cudaDriverEntryPointSuccess,
  cudaDriverEntryPointSymbolNotFound,
};
constexpr unsigned long long cudaEnableDefault = 0;
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                             unsigned long long flags,
                                             cudaDriverEntryPointQueryResult* found);

enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* /*kernel*/, cudaFuncAttribute /*attribute*/,
                                 int /*value*/) {
  return cudaSuccess;
}

inline cudaError_t cudaDeviceSynchronize() {
  host_cuda::synchronize();
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t /*stream*/) {
  host_cuda::synchronize();
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

// The simulated device does not tell its attributes: each program here gets its limits as input.
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
};
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* /*value*/, cudaDeviceAttr /*attribute*/,
                                          int /*device*/) {
  return cudaErrorInvalidValue;
}

inline void __syncthreads() {
  host_cuda::wait_at(host_cuda::executor.current().cta->barrier, "__syncthreads");
}
inline void __syncwarp() { host_cuda::wait_at(host_cuda::warp().barrier, "__syncwarp"); }
inline void __threadfence() {}

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
inline unsigned atomicAdd(unsigned* counter, unsigned value) {
  return std::exchange(*counter, *counter + value);
}

using std::max;
using std::min;
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  host_cuda::start(config->gridDim, config->blockDim.x, config->dynamicSmemBytes,
                   config->numAttrs > 0, [=] { kernel(arguments...); });
  return cudaSuccess;
}
