// What becomes of the sums of lora_linear_hopper.cu: splits of K added, biases, y stored.
#pragma once

#include "cuda/common/element.cuh"
#include "cuda/hopper/maps.cuh"
#include "cuda/hopper/producer.cuh"
#include "cuda/hopper/ptx.cuh"
#include "cuda/nf4/nf4_decode.cuh"

#if PYLORA_SM90A

namespace pylora::cuda {

// 5. Leaves the split's sums in the workspace; whether it was the last one to come.
template <int kTokens>
__device__ __forceinline__ bool store_partials(const LoraLinearHopperParams& params,
                                               const WorkItem& item, int* is_last,
                                               const float (&sums)[kTokens / 2], int consumer,
                                               int thread) {
  const HopperPlan& plan = params.plan;
  auto* partials = reinterpret_cast<uint4*>(params.args.partials) +
                   partial_vector<kTokens>(item.split, plan.tiles, item.tile, consumer, 0, thread);
#pragma unroll
  for (int i = 0; i < kTokens / 8; ++i) {
    Bytes16<float> chunk;
#pragma unroll
    for (int j = 0; j < 4; ++j) chunk.values[j] = sums[4 * i + j];
    partials[i * kGroupThreads] = chunk.bits;
  }
  __threadfence();  // they are visible before they are counted
  named_barrier<kGroupThreads>(1 + consumer);
  if (thread == 0) {
    const unsigned before = atomicAdd(params.args.counters + item.tile * kConsumers + consumer, 1u);
    *is_last = before == static_cast<unsigned>(plan.splits - 1);
  }
  named_barrier<kGroupThreads>(1 + consumer);
  const bool last = any_lane(*is_last != 0);
  if (last) __threadfence();
  return last;
}

// The sums of all splits, of batch `batch` of the accumulators. Not in the registers of the
// products themselves: ptxas would no longer let these overlap.
template <int kTokens>
__device__ __forceinline__ void sum_splits(const LoraLinearHopperParams& params,
                                           const WorkItem& item, float (&total)[kBatchSums],
                                           int batch, int consumer, int thread) {
  constexpr int kLoads = kBatchSums / 4;  // under way at a time
  const HopperPlan& plan = params.plan;
  const auto* partials = reinterpret_cast<const uint4*>(params.args.partials);
#pragma unroll
  for (int i = 0; i < kBatchSums; ++i) total[i] = 0.0f;
#pragma unroll 1
  for (int split = 0; split < plan.splits; ++split) {
    const int64_t index =
        partial_vector<kTokens>(split, plan.tiles, item.tile, consumer, batch * kLoads, thread);
    Bytes16<float> chunks[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      chunks[i].bits = load_from_l2(partials + index + i * kGroupThreads);
    }
#pragma unroll
    for (int i = 0; i < kBatchSums; ++i) total[i] += chunks[i / 4].values[i % 4];
  }
}

// 6. What the biases add to the outputs of a row of W.
__device__ __forceinline__ float bias_of(const LoraLinearArgs& args, int64_t n) {
  float sum = 0.0f;
  if (n >= args.weight.rows) return sum;
  if (args.bias.data != nullptr) sum = load_any(args.bias, n);
  if (args.lora_B_bias.data != nullptr) sum += args.shrink.scaling * load_any(args.lora_B_bias, n);
  return sum;
}

// 6. A turn: y of as many tokens as the holes of the decode table take. sums_of(batch, sums) gives
// the accumulators of a batch of the turn.
template <class T, class SumsOf>
__device__ __forceinline__ void store_turn(const LoraLinearArgs& args, uint8_t* pairs,
                                           int64_t first_row, int64_t first_token, int consumer,
                                           int thread, const SumsOf& sums_of) {
  constexpr int kUnits = kGroupRows * sizeof(T) / kVectorBytes;
  const int64_t N = args.weight.rows;
  const int warp = thread / kLanes, lane = thread % kLanes;
  const auto place = [&](int token, int unit) {
    return hole(pairs, staging_hole(consumer, token)) + staging_unit(token, unit) * kVectorBytes;
  };
  float added[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    added[half] = bias_of(args, first_row + fragment_row(thread, half));
  }
#pragma unroll
  for (int batch = 0; batch < kStagedTokens / (16 * kBatchPairs); ++batch) {
    float sums[kBatchSums];
    sums_of(batch, sums);
#pragma unroll
    for (int pair = 0; pair < kBatchPairs; ++pair) {
      uint32_t out[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int sum = 4 * staged_octet(pair, i) + i % 2 * 2;
        out[i] = pack_pair<T>(sums[sum] + added[i % 2], sums[sum + 1] + added[i % 2]);
      }
      const int token = staged_token(batch * kBatchPairs + pair, lane);
      store_matrices_transposed(place(token, staged_unit(warp, lane)), out);
    }
  }
  named_barrier<kGroupThreads>(1 + consumer);
  for (int i = thread; i < kStagedTokens * kUnits; i += kGroupThreads) {
    const int token = i / kUnits, unit = i % kUnits;
    const int64_t m = first_token + token;
    const int64_t n = first_row + unit * Bytes16<T>::kElements;
    if (m >= args.tokens || n >= N) continue;
    T* y = static_cast<T*>(args.y) + m * N + n;
    const uint8_t* staged = place(token, unit);
    if (N % Bytes16<T>::kElements == 0) {
      *reinterpret_cast<uint4*>(y) = load_shared(reinterpret_cast<const uint4*>(staged));
    } else {
      for (int j = 0; j < Bytes16<T>::kElements && n + j < N; ++j) {
        y[j] = reinterpret_cast<const T*>(staged)[j];
      }
    }
  }
  named_barrier<kGroupThreads>(1 + consumer);  // before the next turn writes
}

}  // namespace pylora::cuda

#endif
