// A small executor: CUDA kernels as C++ on the CPU, a thread a CUDA thread, one CTA after the
// other. Its folder goes before the toolkit's on the include path. It has what the kernels use, no
// more.
#pragma once

#include <barrier>
#include <bit>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __constant__
#define __shared__ static  // one CTA runs at a time
#define __forceinline__ inline
#define __launch_bounds__(threads)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

namespace host_cuda {

constexpr unsigned kWarp = 32;

struct Warp {
  explicit Warp(unsigned lanes) : barrier(lanes) {}
  std::barrier<> barrier;
  uint64_t shuffled[kWarp] = {};
};

struct Cta {
  explicit Cta(unsigned threads) : barrier(threads) {
    for (unsigned first = 0; first < threads; first += kWarp) {
      warps.push_back(std::make_unique<Warp>(std::min(kWarp, threads - first)));
    }
  }
  std::barrier<> barrier;
  std::vector<std::unique_ptr<Warp>> warps;
};

inline thread_local Cta* cta = nullptr;

}  // namespace host_cuda

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

inline host_cuda::Warp& host_cuda_warp() {
  return *host_cuda::cta->warps[threadIdx.x / host_cuda::kWarp];
}

inline void __syncthreads() { host_cuda::cta->barrier.arrive_and_wait(); }
inline void __syncwarp() { host_cuda_warp().barrier.arrive_and_wait(); }

template <class T>
T __shfl_sync(unsigned /*mask*/, T value, int lane) {
  host_cuda::Warp& warp = host_cuda_warp();
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  warp.shuffled[threadIdx.x % host_cuda::kWarp] = bits;
  __syncwarp();
  bits = warp.shuffled[lane % host_cuda::kWarp];
  __syncwarp();  // before anyone shuffles again
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}

inline int max(int a, int b) { return a > b ? a : b; }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  const dim3 grid = config->gridDim;
  const dim3 block = config->blockDim;
  for (unsigned index = 0; index < grid.x; ++index) {
    host_cuda::Cta cta(block.x);
    std::vector<std::jthread> threads;
    for (unsigned thread = 0; thread < block.x; ++thread) {
      threads.emplace_back([&, thread] {
        host_cuda::cta = &cta;
        threadIdx = {thread, 0, 0};
        blockIdx = {index, 0, 0};
        blockDim = block;
        gridDim = grid;
        kernel(arguments...);
        host_cuda_warp().barrier.arrive_and_drop();  // who has returned is waited for no more
        cta.barrier.arrive_and_drop();
      });
    }
  }
  return cudaSuccess;
}
