// The end of lora_linear.cu: biases, the low-rank part, and the store.
#pragma once

#include "cuda/common/element.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/small_m/chunk_feed.cuh"
#include "cuda/small_m/lora_linear.cuh"
#include "cuda/small_m/tiles.cuh"

namespace pylora::cuda {

inline constexpr int kLineBytes = 128;  // of L2
inline constexpr int kTurnTokens = 4;   // that a thread has of one row of W, at most, in a pass
inline constexpr int kRankVector = 4;   // elements of lora_B that a thread takes at a time
static_assert(kThreads / (kRowWarpsMax * kWarpRows) * kTurnTokens >= kPassTokens);

// The rows of lora_B that the tile's outputs will want, of each token's adapter, towards L2: nobody
// else has read them.
template <class T>
__device__ __forceinline__ void prefetch_lora_B(const LoraLinearSmallMArgs& args, int tile,
                                                int rows) {
  const LoraShrinkArgs& shrink = args.shrink;
  const int size = shrink.dtype == DType::kFloat32 ? sizeof(float) : sizeof(T);
  const int64_t row_bytes = static_cast<int64_t>(shrink.rank) * size;
  const int64_t first = tile * rows * row_bytes;
  const int64_t end = min(first + rows * row_bytes, args.weight.rows * row_bytes);
  const int lines = static_cast<int>((end - first + kLineBytes - 1) / kLineBytes);
  const int count = shrink.adapters.many() ? args.tokens * lines : lines;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int64_t adapter = shrink.adapters.of(i / lines);
    if (adapter < 0) continue;
    const int64_t byte = adapter * args.weight.rows * row_bytes + first + i % lines * kLineBytes;
    prefetch_to_l2(static_cast<const uint8_t*>(args.lora_B) + byte);
  }
}

template <int kWidth>
__device__ __forceinline__ void load_low(float (&out)[kWidth], const float* low) {
  static_assert(kWidth == 1 || kWidth == 4);
  if constexpr (kWidth == 1) {
    out[0] = load_from_l2(low);
  } else {
    const float4 four = load_from_l2(reinterpret_cast<const float4*>(low));
    out[0] = four.x, out[1] = four.y, out[2] = four.z, out[3] = four.w;
  }
}

// This lane's part of low . lora_B for row n and tokens `token`, `token` + `stride`, ...: every
// `lanes`-th vector of the rank, from `part` on.
template <int kWidth, class L>
__device__ __forceinline__ void add_dots(const LoraLinearSmallMArgs& args, int64_t n, int token,
                                         int stride, int end, int part, int lanes,
                                         float (&sums)[kTurnTokens]) {
  const int rank = args.shrink.rank;
  const Adapters& adapters = args.shrink.adapters;
  const auto* lora_B = static_cast<const L*>(args.lora_B);
  int adapter[kTurnTokens];  // -1: no token, or one without
#pragma unroll
  for (int i = 0; i < kTurnTokens; ++i) {
    const int other = token + i * stride;
    adapter[i] = other < end ? adapters.of(other) : -1;
  }
#pragma unroll 1  // its loads are enough to have under way, and more cost registers
  for (int j = kWidth * part; j < rank; j += kWidth * lanes) {
    AlignedArray<L, kWidth> b;
#pragma unroll
    for (int i = 0; i < kTurnTokens; ++i) {
      if (adapter[i] < 0) continue;
      if (i == 0 || adapters.many()) {
        const int64_t first = (adapter[i] * args.weight.rows + n) * rank + j;
        b = *reinterpret_cast<const AlignedArray<L, kWidth>*>(lora_B + first);
      }
      const int other = token + i * stride;
      float low[kWidth];
      load_low(low, args.shrink.low + static_cast<int64_t>(other) * rank + j);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) sums[i] += low[k] * to_fp32(b.values[k]);
    }
  }
}

template <class L>
__device__ __forceinline__ void add_low_rank(const LoraLinearSmallMParams& params, int64_t n,
                                             int token, int stride, int end, int part, int lanes,
                                             float (&sums)[kTurnTokens]) {
  if (params.rank_vectors) {
    add_dots<kRankVector, L>(params.args, n, token, stride, end, part, lanes, sums);
  } else {
    add_dots<1, L>(params.args, n, token, stride, end, part, lanes, sums);
  }
}

// 7. The outputs of a tile for tokens [first, first + kPassTokens) that there are: y =
// round(base(token, row) + bias + low . lora_B + ...). A thread has up to four tokens of a row.
// Where there are fewer outputs than threads, up to 16 lanes share one: they would wait for memory
// one by one.
template <class T, class Base>
__device__ __forceinline__ void store_outputs(const LoraLinearSmallMParams& params, int tile,
                                              int first, const Base& base) {
  const LoraLinearSmallMArgs& args = params.args;
  const int N = static_cast<int>(args.weight.rows);
  const int rows = params.plan.output_warps * kWarpRows;
  const int end = min(first + kPassTokens, args.tokens);
  const int thread = threadIdx.x;
  const int per_row = kThreads / rows;
  int stride = per_row;
  while (stride / 2 >= args.tokens) stride /= 2;
  const int lanes = per_row / stride;
  const int place = lanes == 1 ? thread / rows : thread % per_row;
  const int row = lanes == 1 ? thread % rows : thread / per_row;
  const int part = place % lanes;
  const int token = first + place / lanes;
  const int64_t n = static_cast<int64_t>(tile) * rows + row;

  float sums[kTurnTokens] = {};
  if (n < N && args.shrink.rank > 0) {
    if (args.shrink.dtype == DType::kFloat32) {
      add_low_rank<float>(params, n, token, stride, end, part, lanes, sums);
    } else {
      add_low_rank<T>(params, n, token, stride, end, part, lanes, sums);
    }
  }
  // Lanes share an output only where a thread has one token.
  for (int other = 1; other < lanes; other *= 2) sums[0] += shuffle_xor(sums[0], other);
  if (n >= N || part != 0) return;
  float bias = args.bias.data != nullptr ? load_any(args.bias, n) : 0.0f;
  if (args.lora_B_bias.data != nullptr) bias += args.shrink.scaling * load_any(args.lora_B_bias, n);
#pragma unroll
  for (int i = 0; i < kTurnTokens; ++i) {
    const int other = token + i * stride;
    if (other >= end) break;
    T* y = static_cast<T*>(args.y) + static_cast<int64_t>(other) * N;
    y[n] = round_to<T>(base(other, row) + (sums[i] + bias));
  }
}

}  // namespace pylora::cuda
