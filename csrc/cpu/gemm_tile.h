// The inner kernel of every matrix product here: a register tile of fp32 accumulators.
//
//   c[i][j] (+)= sum_k a(i, k) * b[k][j]      i < I rows, j < V vectors of S::kLanes floats
//
// `a` is broadcast, one 32-bit element at a time; `b` is a packed panel of 32-bit elements. An
// element is one fp32, or (Bf16Mac) two bf16 neighbours along k. Tokens run along j, so that a
// weight decoded in its natural order is the broadcast operand and needs no shuffle.
#pragma once

#include <cstdint>

#include "common/nf4.h"

namespace pylora {

template <class S>
struct F32Mac {
  using F = typename S::F;
  static constexpr int kStep = 1;  // values of k in an element
  PYLORA_INLINE static F mac(F acc, F a, F b) { return S::fma(a, b, acc); }
};

template <class S>
struct Bf16Mac {
  using F = typename S::F;
  static constexpr int kStep = 2;
  PYLORA_INLINE static F mac(F acc, F a, F b) { return S::dot(acc, a, b); }
};

// Elements from one row of a row-major `a` to the next: fixed, so that rows are address offsets;
// odd in cache lines, so that rows do not share a cache set.
inline constexpr int64_t kTileK = 512;  // most elements along k in one call
inline constexpr int64_t kTileLd = kTileK + 16;

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

template <class S, template <class> class Mac, Broadcast kOrder>
inline void run_tile(int v, int64_t k_count, const float* a, int64_t lda, const float* b, float* c,
                     bool accumulate) {
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

}  // namespace pylora
