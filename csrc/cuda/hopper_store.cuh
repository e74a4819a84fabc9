// What becomes of the sums of nf4_linear_hopper.cu: slices of K added, biases, y stored.
#pragma once

#include "cuda/element.cuh"
#include "cuda/hopper_feed.cuh"
#include "cuda/hopper_maps.cuh"
#include "cuda/load_any.cuh"
#include "cuda/nf4_pairs.cuh"
#include "cuda/ptx_hopper.cuh"

#if PYLORA_SM90A

namespace pylora {

// 5. Leaves the slice's sums in the workspace; whether it was the last one to come.
template <int kTokens>
__device__ __forceinline__ bool leave_slice(const HopperProblem& problem, const Item& item,
                                            int* is_last, const float (&sums)[kTokens / 2],
                                            int consumer, int thread) {
  const HopperPlan& plan = problem.plan;
  auto* partials = reinterpret_cast<uint4*>(problem.op.partials);
#pragma unroll
  for (int i = 0; i < kTokens / 8; ++i) {
    Chunk<float> chunk;
#pragma unroll
    for (int j = 0; j < 4; ++j) chunk.values[j] = sums[4 * i + j];
    partials[partial_index<kTokens>(item.slice, plan.tiles, item.tile, consumer, i, thread)] =
        chunk.vector;
  }
  __threadfence();  // they are visible before they are counted
  named_barrier<kGroupThreads>(1 + consumer);
  if (thread == 0) {
    const unsigned before = atomicAdd(problem.op.counters + item.tile * kConsumers + consumer, 1u);
    *is_last = before == static_cast<unsigned>(plan.slices - 1);
  }
  named_barrier<kGroupThreads>(1 + consumer);
  if (*is_last == 0) return false;
  __threadfence();
  return true;
}

// Accumulators 4 * i to 4 * i + 3 of all slices. Not in the registers of the products themselves:
// ptxas would no longer let these overlap.
template <int kTokens>
__device__ __forceinline__ Chunk<float> add_slices(const HopperProblem& problem, const Item& item,
                                                   int consumer, int i, int thread) {
  const HopperPlan& plan = problem.plan;
  const auto* partials = reinterpret_cast<const uint4*>(problem.op.partials);
  Chunk<float> total = {};
  for (int slice = 0; slice < plan.slices; ++slice) {
    Chunk<float> chunk;
    chunk.vector = load_from_l2(
        partials + partial_index<kTokens>(slice, plan.tiles, item.tile, consumer, i, thread));
#pragma unroll
    for (int j = 0; j < 4; ++j) total.values[j] += chunk.values[j];
  }
  return total;
}

// 6. What the biases add to the outputs of a row of W.
__device__ __forceinline__ float bias_of(const LoraLinear& op, int64_t n) {
  float sum = 0.0f;
  if (n >= op.weight.rows) return sum;
  if (op.bias.data != nullptr) sum = load_any(op.bias, n);
  if (op.lora_B_bias.data != nullptr) sum += op.hidden.scaling * load_any(op.lora_B_bias, n);
  return sum;
}

// 6. octet(i): the accumulators 4 * i to 4 * i + 3.
template <class T, int kTokens, class Octet>
__device__ __forceinline__ void store_tile(const LoraLinear& op, uint8_t* pairs, int64_t first_row,
                                           int64_t first_token, int consumer, int thread,
                                           const Octet& octet) {
  constexpr int kUnits = kGroupRows * sizeof(T) / kVectorBytes;
  const int64_t N = op.weight.rows;
  const int warp = thread / kLanes, lane = thread % kLanes;
  const auto place = [&](int token, int unit) {
    return hole(pairs, staging_hole(consumer, token)) + staging_unit(token, unit) * kVectorBytes;
  };
  float added[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    added[half] = bias_of(op, first_row + fragment_row(thread, half));
  }
#pragma unroll
  for (int turn = 0; turn < kTokens / kStagedTokens; ++turn) {
#pragma unroll
    for (int pair = 0; pair < kStagedTokens / 16; ++pair) {
      uint32_t out[4];
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const Chunk<float> sums = octet(turn * kStagedTokens / 8 + staged_octet(pair, i));
        out[i] = pack_pair<T>(sums.values[0] + added[0], sums.values[1] + added[0]);
        out[i + 1] = pack_pair<T>(sums.values[2] + added[1], sums.values[3] + added[1]);
      }
      store_matrices_transposed(place(staged_token(pair, lane), staged_unit(warp, lane)), out);
    }
    named_barrier<kGroupThreads>(1 + consumer);
    for (int i = thread; i < kStagedTokens * kUnits; i += kGroupThreads) {
      const int token = i / kUnits, unit = i % kUnits;
      const int64_t m = first_token + turn * kStagedTokens + token;
      const int64_t n = first_row + unit * Chunk<T>::kElements;
      if (m >= op.tokens || n >= N) continue;
      T* y = static_cast<T*>(op.y) + m * N + n;
      const uint8_t* staged = place(token, unit);
      if (N % Chunk<T>::kElements == 0) {
        *reinterpret_cast<uint4*>(y) = *reinterpret_cast<const uint4*>(staged);
      } else {
        for (int j = 0; j < Chunk<T>::kElements && n + j < N; ++j) {
          y[j] = reinterpret_cast<const T*>(staged)[j];
        }
      }
    }
    named_barrier<kGroupThreads>(1 + consumer);  // before the next turn writes
  }
}

}  // namespace pylora

#endif
