// What the kernels for a few tokens share, whatever the weight is: they hold the dot products of a
// row of W with each token in registers.
#pragma once

#include <type_traits>
#include <utility>

#include "common/float16.h"
#include "cpu/gemm_tile.h"

namespace pylora::cpu {

inline constexpr int64_t kAdapterRowsAhead = 8;
inline constexpr int64_t kSmallMGrain = 1 << 16;  // a thread is woken for at least so many weights

// y[token + m][row] = the sum over the lanes of sums[m] + the low-rank term + the bias. The arguments
// are NF4LinearArgs or DenseLinearArgs.
template <class S, int kTokens, class Args>
PYLORA_INLINE void finish_row(const Args& args, int64_t token, int64_t row,
                              const typename S::F (&sums)[kTokens]) {
  using F = typename S::F;
  F acc[kTokens];
#pragma GCC unroll 8
  for (int m = 0; m < kTokens; ++m) acc[m] = sums[m];
  if (args.low != nullptr) {
    visit_dtype(args.adapter_dtype, [&](auto element) {
      const auto* adapter = static_cast<const decltype(element)*>(args.adapter) + row * args.rank;
      const float* low = args.low + token * args.rank;
      // Each row has only a cache line or so, which is too sparse for the hardware's prefetcher.
      __builtin_prefetch(adapter + kAdapterRowsAhead * args.rank);
      int64_t r = 0;
      for (; r + S::kLanes <= args.rank; r += S::kLanes) {
        const F b = S::load(adapter + r);
#pragma GCC unroll 8
        for (int m = 0; m < kTokens; ++m) {
          acc[m] = S::fma(b, S::load(low + m * args.rank + r), acc[m]);
        }
      }
      if (r < args.rank) {
        const int left = static_cast<int>(args.rank - r);
        const F b = S::load_n(adapter + r, left);
#pragma GCC unroll 8
        for (int m = 0; m < kTokens; ++m) {
          acc[m] = S::fma(b, S::load_n(low + m * args.rank + r, left), acc[m]);
        }
      }
    });
  }
  const float bias = args.bias != nullptr ? args.bias[row] : 0.0f;
  visit_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    T* y = static_cast<T*>(args.y) + token * args.weight.rows + row;
#pragma GCC unroll 8
    for (int m = 0; m < kTokens; ++m) {
      y[m * args.weight.rows] = from_float<T>(S::sum(acc[m]) + bias);
    }
  });
}

template <class Run, int... kBelow>
bool with_token_count(int64_t tokens, const Run& run, std::integer_sequence<int, kBelow...>) {
  return ((tokens == kBelow + 1 && (run(std::integral_constant<int, kBelow + 1>{}), true)) || ...);
}

// Calls run with the number of tokens as a constant of its type; returns false if there are none or
// more than kMost.
template <int kMost, class Run>
bool with_token_count(int64_t tokens, const Run& run) {
  return with_token_count(tokens, run, std::make_integer_sequence<int, kMost>());
}

}  // namespace pylora::cpu
