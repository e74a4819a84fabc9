#include "common/philox.h"
#include "cuda/activation.cuh"
#include "cuda/element.cuh"
#include "cuda/launch.cuh"
#include "cuda/lora_hidden_many.cuh"
#include "cuda/ptx.cuh"
#include "cuda/tf32.cuh"

namespace pylora {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr int kSide = 8;     // tokens, and rows of lora_A, of a CTA
constexpr int kColumns = 4;  // a lane and step: one draw of Philox
constexpr int kSums = kSide * kSide;
static_assert(kSums == 2 * kLanes);

template <class T>
struct alignas(kColumns * sizeof(T)) Columns {
  T values[kColumns];
};

struct Memory {
  float sums[kWarps][kSums];
};

// 3. Sums of the warp: sums[0] and [1] become those with the numbers 2 * lane and 2 * lane + 1. Of
// 4 * kBit sums a lane keeps the half that its bit names, and gives the other away.
template <int kBit>
__device__ __forceinline__ void add_lanes(float (&sums)[kSums], int lane) {
  const bool upper = (lane & kBit) != 0;
#pragma unroll
  for (int i = 0; i < 2 * kBit; ++i) {
    const float kept = upper ? sums[2 * kBit + i] : sums[i];
    const float given = upper ? sums[i] : sums[2 * kBit + i];
    sums[i] = kept + shuffle_xor(given, kBit);
  }
  if constexpr (kBit > 1) add_lanes<kBit / 2>(sums, lane);
}

template <class T, class L>
__global__ void __launch_bounds__(kThreads)
    lora_hidden_many(LoraHidden op,            // device pointers
                     const T* __restrict__ x,  // [tokens, cols]
                     int tokens, int64_t cols, int64_t low_pitch) {
  Memory& shared = shared_memory<Memory>();
  const int thread = threadIdx.x;
  const int warp = thread / kLanes;
  const int lane = thread % kLanes;
  const int first_row = blockIdx.x * kSide;
  const int first_token = blockIdx.y * kSide;

  // 1.
  start_dependent_kernel();

  // 2. What lies beyond the last token or row is read from the last one, and not stored.
  const uint64_t seed = op.seed != nullptr ? static_cast<uint64_t>(*op.seed) : 0;
  const L* lora_A = static_cast<const L*>(op.lora_A);
  float sums[kSums] = {};  // [token][row of lora_A]
  for (int64_t k = kColumns * thread; k < cols; k += kColumns * kThreads) {
    Columns<L> a[kSide];
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      const int64_t row = min(first_row + i, op.rank - 1);
      a[i] = *reinterpret_cast<const Columns<L>*>(lora_A + row * cols + k);
    }
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      const int64_t token = min(first_token + i, tokens - 1);
      const auto columns = *reinterpret_cast<const Columns<T>*>(x + token * cols + k);
      uint32_t words[kColumns];
      if (op.seed != nullptr) {
        philox4(seed, static_cast<uint64_t>((token * cols + k) / kColumns), words);
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        float value = to_fp32(columns.values[j]);
        if (op.seed != nullptr) value = words[j] >= op.threshold ? value * op.keep_scale : 0.0f;
#pragma unroll
        for (int row = 0; row < kSide; ++row) {
          sums[i * kSide + row] += value * to_fp32(a[row].values[j]);
        }
      }
    }
  }

  // 3.
  add_lanes<kLanes / 2>(sums, lane);
  shared.sums[warp][2 * lane] = sums[0];
  shared.sums[warp][2 * lane + 1] = sums[1];
  __syncthreads();

  // 4.
  if (thread >= kSums) return;
  const int64_t token = first_token + thread / kSide;
  const int row = first_row + thread % kSide;
  if (token >= tokens || row >= op.rank) return;
  float h = 0.0f;
  for (int i = 0; i < kWarps; ++i) h += shared.sums[i][thread];
  if (op.lora_A_bias != nullptr) h += to_fp32(static_cast<const L*>(op.lora_A_bias)[row]);
  op.h[token * op.rank + row] = h;
  const uint32_t low = to_tf32(op.scaling * activate_fp32(op.activation, h));
  reinterpret_cast<uint32_t*>(op.low)[token * low_pitch + row] = low;
}

template <class T>
cudaError_t launch_hidden(const LoraHidden& op, const void* x, int tokens, int64_t cols,
                          int64_t low_pitch, cudaStream_t stream) {
  LaunchShape shape;
  shape.block = kThreads;
  shape.stream = stream;
  shape.grid.x = static_cast<unsigned>(ceil_div(op.rank, kSide));
  shape.grid.y = static_cast<unsigned>(ceil_div(tokens, kSide));
  const auto* typed = static_cast<const T*>(x);
  return op.dtype == DType::kFloat32
             ? launch(lora_hidden_many<T, float>, shape, op, typed, tokens, cols, low_pitch)
             : launch(lora_hidden_many<T, T>, shape, op, typed, tokens, cols, low_pitch);
}

}  // namespace

cudaError_t lora_hidden_many_cuda(const LoraHidden& op, DType dtype, const void* x, int tokens,
                                  int64_t cols, int64_t low_pitch, cudaStream_t stream) {
  if (op.dtype != DType::kFloat32 && op.dtype != dtype) return cudaErrorInvalidValue;
  if (dtype == DType::kFloat16) {
    return launch_hidden<__half>(op, x, tokens, cols, low_pitch, stream);
  }
  if (dtype == DType::kBFloat16) {
    return launch_hidden<__nv_bfloat16>(op, x, tokens, cols, low_pitch, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace pylora
