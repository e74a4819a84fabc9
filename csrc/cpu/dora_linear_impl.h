// The kernel of dora_linear.h, as a template over the vector primitives.
#pragma once

#include "cpu/dora_linear.h"
#include "cpu/gemm_tile.h"
#include "cpu/parallel.h"

namespace pylora::cpu {

inline constexpr int64_t kRescaleChain = 16;
inline constexpr int64_t kRescaleStrip = 128;      // columns whose sums a thread holds
inline constexpr int64_t kRescaleGrain = 1 << 15;  // a thread is woken for at least so many values

// Columns [col, col + cols) of one row; part [cols] += values * product unless it is null.
template <class S, class T>
PYLORA_INLINE void rescale_row(const RescaleArgs& args, int64_t row, int64_t col, int64_t cols,
                               float* part) {
  const int64_t first = row * args.cols + col;
  const T* values = static_cast<const T*>(args.values) + first;
  T* out = static_cast<T*>(args.out) + first;
  const T* product = part == nullptr ? nullptr : static_cast<const T*>(args.product) + first;
  const float* factors = args.factors + col;
  const float* bias = args.bias == nullptr ? nullptr : args.bias + col;
  int64_t i = 0;
  for (; i + S::kLanes <= cols; i += S::kLanes) {
    const auto value = S::load(values + i);
    if (part != nullptr) {
      S::store(part + i, S::fma(value, S::load(product + i), S::load(part + i)));
    }
    const auto factor = S::load(factors + i);
    S::store(out + i,
             bias == nullptr ? S::mul(value, factor) : S::fma(value, factor, S::load(bias + i)));
  }
  if (i == cols) return;
  const int left = static_cast<int>(cols - i);
  const auto value = S::load_n(values + i, left);
  if (part != nullptr) {
    const auto sum = S::fma(value, S::load_n(product + i, left), S::load_n(part + i, left));
    S::store_n(part + i, sum, left);
  }
  const auto factor = S::load_n(factors + i, left);
  S::store_n(
      out + i,
      bias == nullptr ? S::mul(value, factor) : S::fma(value, factor, S::load_n(bias + i, left)),
      left);
}

template <class S, class T>
void rescale_as(const RescaleArgs& args) {
  const int64_t grain = ceil_div(kRescaleGrain, kRescaleStrip * (args.tokens + 1));
  parallel_for(0, ceil_div(args.cols, kRescaleStrip), grain, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t col = strip * kRescaleStrip;
      const int64_t cols = args.cols - col < kRescaleStrip ? args.cols - col : kRescaleStrip;
      double totals[kRescaleStrip] = {};
      for (int64_t m = 0; m < args.tokens; m += kRescaleChain) {
        const int64_t stop = m + kRescaleChain < args.tokens ? m + kRescaleChain : args.tokens;
        float part[kRescaleStrip] = {};
        for (int64_t row = m; row < stop; ++row) {
          rescale_row<S, T>(args, row, col, cols, args.sums == nullptr ? nullptr : part);
        }
        if (args.sums == nullptr) continue;
        for (int64_t j = 0; j < cols; ++j) totals[j] += part[j];
      }
      if (args.sums == nullptr) continue;
      for (int64_t j = 0; j < cols; ++j) args.sums[col + j] = static_cast<float>(totals[j]);
    }
  });
}

template <class S>
void rescale_on(const RescaleArgs& args) {
  visit_dtype(args.dtype, [&](auto element) { rescale_as<S, decltype(element)>(args); });
}

}  // namespace pylora::cpu
