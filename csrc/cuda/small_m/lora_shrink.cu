#include "common/philox.h"
#include "cuda/common/activation.cuh"
#include "cuda/common/element.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/small_m/lora_shrink.cuh"

namespace pylora::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr int kTokens = 4;   // a CTA
constexpr int kColumns = 4;  // a thread and step: one draw of Philox

struct WarpSums {
  float sums[kWarps][kTokens];
};

template <class T, class L>
__global__ void __launch_bounds__(kThreads)
    lora_shrink_small_m(LoraShrinkArgs args,      // device pointers
                        const T* __restrict__ x,  // [tokens, cols]
                        int tokens, int64_t cols,
                        unsigned* counters,  // [count], or null
                        int64_t count) {
  WarpSums& shared = shared_memory<WarpSums>();
  const int thread = threadIdx.x;
  const int warp = thread / kLanes;
  const int lane = thread % kLanes;
  const int row = blockIdx.x;
  const int first_token = blockIdx.y * kTokens;

  // 1.
  start_dependent_kernel();

  // 2.
  if (blockIdx.x == 0 && blockIdx.y == 0) {
    for (int64_t i = thread; i < count; i += kThreads) counters[i] = 0;
  }

  // 3.
  const uint64_t seed = args.seed != nullptr ? static_cast<uint64_t>(*args.seed) : 0;
  const L* lora_A[kTokens];  // null: no token, or one without an adapter
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    const int64_t adapter = first_token + i < tokens ? args.adapters.of(first_token + i) : -1;
    const int64_t first = (adapter * args.rank + row) * cols;
    lora_A[i] = adapter >= 0 ? static_cast<const L*>(args.lora_A) + first : nullptr;
  }
  float sums[kTokens] = {};
  for (int64_t k = kColumns * thread; k < cols; k += kColumns * kThreads) {
    AlignedArray<L, kColumns> a;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (lora_A[i] == nullptr) continue;
      const int64_t token = first_token + i;
      if (i == 0 || args.adapters.many())
        a = *reinterpret_cast<const AlignedArray<L, kColumns>*>(lora_A[i] + k);
      const auto columns =
          *reinterpret_cast<const AlignedArray<T, kColumns>*>(x + token * cols + k);
      uint32_t words[kColumns];
      if (args.seed != nullptr) {
        philox4(seed, static_cast<uint64_t>((token * cols + k) / kColumns), words);
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        float value = to_fp32(columns.values[j]);
        if (args.seed != nullptr)
          value = words[j] >= args.threshold ? value * args.keep_scale : 0.0f;
        sums[i] += value * to_fp32(a.values[j]);
      }
    }
  }

  // 4.
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    for (int other = kLanes / 2; other > 0; other /= 2) sums[i] += shuffle_xor(sums[i], other);
    if (lane == 0) shared.sums[warp][i] = sums[i];
  }
  __syncthreads();
  if (thread >= kTokens || first_token + thread >= tokens) return;
  const int64_t adapter = args.adapters.of(first_token + thread);
  float h = 0.0f;
  for (int i = 0; i < kWarps; ++i) h += shared.sums[i][thread];
  if (args.lora_A_bias != nullptr) h += to_fp32(static_cast<const L*>(args.lora_A_bias)[row]);
  const int64_t index = static_cast<int64_t>(first_token + thread) * args.rank + row;
  float scaling = args.scaling;
  if (args.adapters.many()) scaling = adapter >= 0 ? args.adapters.scalings[adapter] : 0.0f;
  args.h[index] = h;
  args.low[index] = scaling * activate_fp32(args.activation, h);
}

template <class T>
cudaError_t launch_shrink(const LoraShrinkArgs& args, const void* x, int tokens, int64_t cols,
                          unsigned* counters, int64_t count, cudaStream_t stream) {
  LaunchShape shape;
  shape.threads = kThreads;
  shape.stream = stream;
  shape.grid.x = static_cast<unsigned>(args.rank);
  shape.grid.y = static_cast<unsigned>(ceil_div(tokens, kTokens));
  const auto* typed = static_cast<const T*>(x);
  return args.dtype == DType::kFloat32
             ? launch(lora_shrink_small_m<T, float>, shape, args, typed, tokens, cols, counters,
                      count)
             : launch(lora_shrink_small_m<T, T>, shape, args, typed, tokens, cols, counters, count);
}

}  // namespace

cudaError_t lora_shrink_small_m_cuda(const LoraShrinkArgs& args, DType dtype, const void* x,
                                     int tokens, int64_t cols, unsigned* counters, int64_t count,
                                     cudaStream_t stream) {
  if (args.dtype != DType::kFloat32 && args.dtype != dtype) return cudaErrorInvalidValue;
  if (dtype == DType::kFloat16) {
    return launch_shrink<__half>(args, x, tokens, cols, counters, count, stream);
  }
  if (dtype == DType::kBFloat16) {
    return launch_shrink<__nv_bfloat16>(args, x, tokens, cols, counters, count, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace pylora::cuda
