// The inner kernel of every matrix product on the CPU: a tile of fp32 accumulators in registers.
//
//   c[i][j] (+)= sum_k a(i, k) * b[k][j]      i < I rows, j < V vectors of S::kLanes floats
//
// `a` is broadcast, one 32-bit element at a time; `b` is a packed panel of 32-bit elements. An
// element is one fp32 value or, with Bf16Mac, two bf16 values that are neighbours along k. Tokens
// run along j: the weight, decoded in its natural order, is the broadcast operand and needs no
// shuffle.
#pragma once

#include <cstdint>

#include "common/nf4.h"

namespace pylora::cpu {

// The longest call, in elements along k; and the distance of two rows of a row-major `a`, in
// elements. The distance is fixed, so that a row is a constant address offset, and it is an odd
// number of cache lines, so that rows do not share a cache set.
inline constexpr int64_t kTileK = 512;
inline constexpr int64_t kTileLd = kTileK + 16;

// How a product wants its operands laid out.
template <class S, int kValues>
struct MacLayout {
  static constexpr int kStep = kValues;  // values of k in an element
  static constexpr int kGrain = 1;       // k is padded with zeros to a multiple of so many elements
  static constexpr bool kRowMajorOnly = false;  // `a` is row-major even in the backward
  static constexpr int64_t kForwardPanel = 48;  // rows of W, a multiple of every rows_for(v)
  static constexpr int64_t kChain = kTileK;     // the longest sum that a tile takes at once
  static constexpr bool kChainFirst = false;    // tiles of a chain run one after the other
  static constexpr int64_t kRowsUnit = 24;      // the least common multiple of every rows_for(v)
  struct Scope {};                              // an object of it lives while a thread multiplies
  PYLORA_INLINE static constexpr int rows_for(int v) { return S::rows_for(v); }
};

template <class S>
struct F32Mac : MacLayout<S, 1> {
  using F = typename S::F;
  PYLORA_INLINE static F mac(F acc, F a, F b) { return S::fma(a, b, acc); }
};

template <class S>
struct Bf16Mac : MacLayout<S, 2> {
  using F = typename S::F;
  PYLORA_INLINE static F mac(F acc, F a, F b) { return S::dot(acc, a, b); }
};

// How many elements `count` values along k take.
template <class Mac>
PYLORA_INLINE int64_t elements_of(int64_t count) {
  return ceil_div(count, Mac::kStep * Mac::kGrain) * Mac::kGrain;
}

enum class Broadcast {
  kRowMajor,  // a(i, k) = a[i * kTileLd + k]
  kColMajor,  // a(i, k) = a[k * lda + i]
};

template <class S, template <class> class Mac, int V, Broadcast kOrder>
__attribute__((noinline)) void tile(int64_t k_count, const float* a, int64_t lda, const float* b,
                                    float* c, bool accumulate) {
  using F = typename S::F;
  constexpr int I = S::rows_for(V);
  constexpr int kWidth = V * S::kLanes;
  F acc[I][V];
#pragma GCC unroll 32
  for (int i = 0; i < I; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[i][v] = S::zero();
  }
  for (int64_t k = 0; k < k_count; ++k) {
    F bv[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) bv[v] = S::load(b + v * S::kLanes);
#pragma GCC unroll 32
    for (int i = 0; i < I; ++i) {
      const F av = S::set1(kOrder == Broadcast::kRowMajor ? a[i * kTileLd] : a[i]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[i][v] = Mac<S>::mac(acc[i][v], av, bv[v]);
    }
    a += kOrder == Broadcast::kRowMajor ? 1 : lda;
    b += kWidth;
  }
#pragma GCC unroll 32
  for (int i = 0; i < I; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* out = c + i * kWidth + v * S::kLanes;
      S::store(out, accumulate ? S::add(acc[i][v], S::load(out)) : acc[i][v]);
    }
  }
}

template <Broadcast kOrder, class S, template <class> class Mac>
inline void run_tile(Mac<S>, int v, int64_t k_count, const float* a, int64_t lda, const float* b,
                     float* c, bool accumulate) {
  switch (v) {
    case 1:
      return tile<S, Mac, 1, kOrder>(k_count, a, lda, b, c, accumulate);
    case 2:
      return tile<S, Mac, 2, kOrder>(k_count, a, lda, b, c, accumulate);
    case 3:
      if constexpr (S::kMaxV > 2) return tile<S, Mac, 3, kOrder>(k_count, a, lda, b, c, accumulate);
      break;
    default:
      if constexpr (S::kMaxV > 2) return tile<S, Mac, 4, kOrder>(k_count, a, lda, b, c, accumulate);
  }
}

}  // namespace pylora::cpu
