#include "common/philox.h"
#include "cuda/common/activation.cuh"
#include "cuda/common/element.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/many_rows/lora_shrink.cuh"

namespace pylora::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr int kDraw = 4;  // columns of one draw of Philox

constexpr int kTokens = 16;  // of a CTA, on the matrix units
constexpr int kColumns = 8;  // of a lane, in 16 bytes
constexpr int kLoads = 2;    // of each row in a step
constexpr int kStep = 4 * kLoads * kColumns;
static_assert(kManyRowsColumns % kStep == 0);

constexpr int kSide = 8;  // tokens, and rows of lora_A, of a CTA in fp32
constexpr int kSums = kSide * kSide;
static_assert(kSums == 2 * kLanes);

template <int kRows>
struct WarpSums {
  float sums[kWarps][kTokens][kRows];
};
struct WarpSumsFp32 {
  float sums[kWarps][kSums];
};

// Where low goes: to args.low, or kWide: beside a copy of x.
template <class T>
struct LowRows {
  T* wide;        // [tokens, pitch]
  int64_t pitch;  // of args.low, if not kWide
  int columns;    // of low: the rank, and kWide: zeros behind it
};

__device__ __forceinline__ uint64_t seed_of(const LoraShrinkArgs& args) {
  return args.seed != nullptr ? static_cast<uint64_t>(*args.seed) : 0;
}

// 4.
template <class L, bool kWide, class T>
__device__ __forceinline__ void store_h_and_low(const LoraShrinkArgs& args, const LowRows<T>& low,
                                                int64_t cols, int64_t token, int row, float h) {
  float value = 0.0f;
  if (row < args.rank) {
    if (args.lora_A_bias != nullptr) h += to_fp32(static_cast<const L*>(args.lora_A_bias)[row]);
    args.h[token * args.rank + row] = h;
    value = args.scaling * activate_fp32(args.activation, h);
  }
  if constexpr (kWide) {
    low.wide[token * low.pitch + cols + row] = round_to<T>(value);
  } else {
    reinterpret_cast<uint32_t*>(args.low)[token * low.pitch + row] = to_tf32(value);
  }
}

// Sets the elements to 0 that dropout leaves out; `element` is the number of the first one.
template <class T>
__device__ __forceinline__ void drop(Bytes16<T>& chunk, const LoraShrinkArgs& args, uint64_t seed,
                                     int64_t element) {
#pragma unroll
  for (int first = 0; first < Bytes16<T>::kElements; first += kDraw) {
    uint32_t words[kDraw];
    philox4(seed, static_cast<uint64_t>((element + first) / kDraw), words);
#pragma unroll
    for (int j = 0; j < kDraw; ++j) {
      if (words[j] < args.threshold) chunk.values[first + j] = round_to<T>(0.0f);
    }
  }
}

// What lies beyond the last token or row of lora_A is read from the last one, and not stored.
template <class T, int kRows, bool kWide>
__global__ void __launch_bounds__(kThreads)
    lora_shrink_many_rows(LoraShrinkArgs args,      // device pointers
                          const T* __restrict__ x,  // [tokens, cols]
                          int tokens, int64_t cols, LowRows<T> low) {
  constexpr int kTiles = kRows / 8;
  auto& shared = shared_memory<WarpSums<kRows>>();
  const int thread = threadIdx.x;
  const int warp = thread / kLanes, lane = thread % kLanes;
  const int group = lane / 4, quarter = lane % 4;
  const int first_row = blockIdx.x * kRows;
  const int first_token = blockIdx.y * kTokens;

  // 1.
  start_dependent_kernel();

  // 2.
  const uint64_t seed = seed_of(args);
  int64_t token_at[2], row_at[kTiles];  // elements
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    token_at[half] = min(first_token + group + 8 * half, tokens - 1) * cols;
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    row_at[tile] = min(first_row + 8 * tile + group, args.rank - 1) * cols;
  }
  const T* lora_A = static_cast<const T*>(args.lora_A);
  const bool copies = blockIdx.x == 0;  // one CTA of those with the same tokens
  float sums[kTiles][4] = {};
  for (int64_t step = warp * kStep; step < cols; step += kWarps * kStep) {
    Bytes16<T> a[kLoads][2], b[kLoads][kTiles];
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const int64_t k = step + (4 * load + quarter) * kColumns;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        a[load][half].bits = __ldg(reinterpret_cast<const uint4*>(x + token_at[half] + k));
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        b[load][tile].bits = __ldg(reinterpret_cast<const uint4*>(lora_A + row_at[tile] + k));
      }
    }
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const int64_t k = step + (4 * load + quarter) * kColumns;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t token = first_token + group + 8 * half;
        if (kWide && copies && token < tokens) {
          *reinterpret_cast<uint4*>(low.wide + token * low.pitch + k) = a[load][half].bits;
        }
      }
      if (args.seed != nullptr) {
        drop(a[load][0], args, seed, token_at[0] + k);
        drop(a[load][1], args, seed, token_at[1] + k);
      }
      const uint4& upper = a[load][0].bits;
      const uint4& lower = a[load][1].bits;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint4& row = b[load][tile].bits;
        const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
        const uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
        mma_16x8x16<T>(sums[tile], first, row.x, row.y);
        mma_16x8x16<T>(sums[tile], second, row.z, row.w);
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      shared.sums[warp][group + i / 2 * 8][8 * tile + 2 * quarter + i % 2] = sums[tile][i];
    }
  }
  __syncthreads();

  // 4.
  for (int i = thread; i < kTokens * kRows; i += kThreads) {
    const int64_t token = first_token + i / kRows;
    const int row = first_row + i % kRows;
    if (token >= tokens || row >= low.columns) continue;
    float h = 0.0f;
    for (int w = 0; w < kWarps; ++w) h += shared.sums[w][i / kRows][i % kRows];
    if (args.seed != nullptr) h *= args.keep_scale;
    store_h_and_low<T, kWide>(args, low, cols, token, row, h);
  }
}

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

template <class T>
__global__ void __launch_bounds__(kThreads)
    lora_shrink_many_rows_fp32(LoraShrinkArgs args,      // device pointers
                               const T* __restrict__ x,  // [tokens, cols]
                               int tokens, int64_t cols, LowRows<T> low) {
  auto& shared = shared_memory<WarpSumsFp32>();
  const int thread = threadIdx.x;
  const int warp = thread / kLanes, lane = thread % kLanes;
  const int first_row = blockIdx.x * kSide;
  const int first_token = blockIdx.y * kSide;

  // 1.
  start_dependent_kernel();

  // 2.
  const uint64_t seed = seed_of(args);
  const auto* lora_A = static_cast<const float*>(args.lora_A);
  float sums[kSums] = {};  // [token][row of lora_A]
  for (int64_t k = kDraw * thread; k < cols; k += kDraw * kThreads) {
    AlignedArray<float, kDraw> a[kSide];
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      const int64_t row = min(first_row + i, args.rank - 1);
      a[i] = *reinterpret_cast<const AlignedArray<float, kDraw>*>(lora_A + row * cols + k);
    }
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      const int64_t token = min(first_token + i, tokens - 1);
      const auto columns = *reinterpret_cast<const AlignedArray<T, kDraw>*>(x + token * cols + k);
      uint32_t words[kDraw];
      if (args.seed != nullptr) {
        philox4(seed, static_cast<uint64_t>((token * cols + k) / kDraw), words);
      }
#pragma unroll
      for (int j = 0; j < kDraw; ++j) {
        float value = to_fp32(columns.values[j]);
        if (args.seed != nullptr)
          value = words[j] >= args.threshold ? value * args.keep_scale : 0.0f;
#pragma unroll
        for (int row = 0; row < kSide; ++row) sums[i * kSide + row] += value * a[row].values[j];
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
  if (token >= tokens || row >= low.columns) return;
  float h = 0.0f;
  for (int i = 0; i < kWarps; ++i) h += shared.sums[i][thread];
  store_h_and_low<float, false>(args, low, cols, token, row, h);
}

template <class T, bool kWide>
cudaError_t launch_shrink(const LoraShrinkArgs& args, const void* x, int tokens, int64_t cols,
                          const LowRows<T>& low, cudaStream_t stream) {
  const bool is_fp32 = !kWide && args.dtype == DType::kFloat32;
  const int rows = is_fp32 ? kSide : args.rank <= 16 ? 16 : 32;
  LaunchShape shape;
  shape.threads = kThreads;
  shape.stream = stream;
  shape.grid.x = static_cast<unsigned>(ceil_div(low.columns, rows));
  shape.grid.y = static_cast<unsigned>(ceil_div(tokens, is_fp32 ? kSide : kTokens));
  void (*kernel)(LoraShrinkArgs, const T*, int, int64_t, LowRows<T>) =
      lora_shrink_many_rows<T, 32, kWide>;
  if (rows == 16) kernel = lora_shrink_many_rows<T, 16, kWide>;
  if (is_fp32) kernel = lora_shrink_many_rows_fp32<T>;
  return launch(kernel, shape, args, static_cast<const T*>(x), tokens, cols, low);
}

template <class T>
cudaError_t launch_alone(const LoraShrinkArgs& args, const void* x, int tokens, int64_t cols,
                         int64_t low_pitch, cudaStream_t stream) {
  return launch_shrink<T, false>(args, x, tokens, cols, {nullptr, low_pitch, args.rank}, stream);
}

template <class T>
cudaError_t launch_extend(const LoraShrinkArgs& args, const void* x, int tokens, int64_t cols,
                          void* wide, cudaStream_t stream) {
  const int64_t pitch = wide_cols(cols, args.rank);
  const LowRows<T> low = {static_cast<T*>(wide), pitch, static_cast<int>(pitch - cols)};
  return launch_shrink<T, true>(args, x, tokens, cols, low, stream);
}

}  // namespace

cudaError_t lora_shrink_many_rows_cuda(const LoraShrinkArgs& args, DType dtype, const void* x,
                                       int tokens, int64_t cols, int64_t low_pitch,
                                       cudaStream_t stream) {
  const bool takes = args.dtype == DType::kFloat32 || args.dtype == dtype;
  if (!takes || cols % kManyRowsColumns != 0) return cudaErrorInvalidValue;
  if (dtype == DType::kFloat16) {
    return launch_alone<__half>(args, x, tokens, cols, low_pitch, stream);
  }
  if (dtype == DType::kBFloat16) {
    return launch_alone<__nv_bfloat16>(args, x, tokens, cols, low_pitch, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t lora_extend_cuda(const LoraShrinkArgs& args, const void* x, int tokens, int64_t cols,
                             void* wide, cudaStream_t stream) {
  if (cols % kManyRowsColumns != 0) return cudaErrorInvalidValue;
  if (args.dtype == DType::kFloat16)
    return launch_extend<__half>(args, x, tokens, cols, wide, stream);
  if (args.dtype == DType::kBFloat16) {
    return launch_extend<__nv_bfloat16>(args, x, tokens, cols, wide, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace pylora::cuda
