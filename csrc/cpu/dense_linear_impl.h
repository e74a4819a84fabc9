// The kernel of dense_linear.h, as templates over the vector primitives and the product.
#pragma once

#include <cstring>
#include <type_traits>

#include "cpu/dense_linear.h"
#include "cpu/gemm_pack.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

namespace pylora::cpu {

// So many vectors of a row are summed up before their sum is added to the total.
inline constexpr int64_t kDenseChain = 32;
inline constexpr int64_t kDenseAhead = 1024;  // the distance in bytes at which W is prefetched

template <class S, template <class> class Mac>
struct DenseVector {
  static constexpr int kValues = S::kLanes * Mac<S>::kStep;  // of a row of W
  using Value = std::conditional_t<Mac<S>::kStep == 1, float, BFloat16>;

  template <class T>
  PYLORA_INLINE static typename S::F load(const T* values) {
    if constexpr (Mac<S>::kStep == 1) {
      return S::load(values);
    } else {
      return S::load(reinterpret_cast<const float*>(values));
    }
  }

  // The rows of W that are multiplied at a time: as many as the registers have sums for, and no more
  // than the prefetchers follow.
  static constexpr int rows_for(int tokens) {
    const int rows = S::rows_for(1) / tokens;
    return rows < 1 ? 1 : rows < 4 ? rows : 4;
  }
};

// y of rows [row, row + kRows) of W for all tokens, whose packed values are `stride` floats apart.
template <class S, template <class> class Mac, class T, int kTokens, int kRows>
PYLORA_INLINE void dense_rows(const DenseLinearArgs& args, const float* packed, int64_t stride,
                              int64_t row) {
  using F = typename S::F;
  using Vector = DenseVector<S, Mac>;
  const int64_t cols = args.weight.cols;
  const int64_t whole = cols / Vector::kValues;
  const T* w = static_cast<const T*>(args.weight.data) + row * cols;
  F total[kRows][kTokens];
#pragma GCC unroll 4
  for (int n = 0; n < kRows; ++n) {
#pragma GCC unroll 8
    for (int m = 0; m < kTokens; ++m) total[n][m] = S::zero();
  }
  for (int64_t start = 0; start < whole; start += kDenseChain) {
    F acc[kRows][kTokens];
#pragma GCC unroll 4
    for (int n = 0; n < kRows; ++n) {
#pragma GCC unroll 8
      for (int m = 0; m < kTokens; ++m) acc[n][m] = S::zero();
    }
    const int64_t end = start + kDenseChain < whole ? start + kDenseChain : whole;
    for (int64_t v = start; v < end; ++v) {
      F weights[kRows];
#pragma GCC unroll 4
      for (int n = 0; n < kRows; ++n) {
        const T* values = w + n * cols + v * Vector::kValues;
        __builtin_prefetch(reinterpret_cast<const char*>(values) + kDenseAhead);
        weights[n] = Vector::load(values);
      }
#pragma GCC unroll 8
      for (int m = 0; m < kTokens; ++m) {
        const F value = S::load(packed + m * stride + v * S::kLanes);
#pragma GCC unroll 4
        for (int n = 0; n < kRows; ++n) acc[n][m] = Mac<S>::mac(acc[n][m], weights[n], value);
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < kRows; ++n) {
#pragma GCC unroll 8
      for (int m = 0; m < kTokens; ++m) total[n][m] = S::add(total[n][m], acc[n][m]);
    }
  }
  if (const int64_t left = cols - whole * Vector::kValues; left > 0) {
    for (int n = 0; n < kRows; ++n) {
      T end[Vector::kValues] = {};
      std::memcpy(end, w + n * cols + whole * Vector::kValues,
                  static_cast<size_t>(left) * sizeof(T));
      const F weights = Vector::load(end);
      for (int m = 0; m < kTokens; ++m) {
        const F value = S::load(packed + m * stride + whole * S::kLanes);
        total[n][m] = Mac<S>::mac(total[n][m], weights, value);
      }
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < kRows; ++n) finish_row<S, kTokens>(args, 0, row + n, total[n]);
}

template <class S, template <class> class Mac, class T>
void dense_linear_as(const DenseLinearArgs& args) {
  using Vector = DenseVector<S, Mac>;
  // 1. Pack the tokens, with zeros behind their last values.
  const int64_t cols = args.weight.cols;
  const int64_t stride = ceil_div(cols, Vector::kValues) * S::kLanes;
  const CallMemory memory(static_cast<size_t>(args.tokens * stride));
  for (int64_t m = 0; m < args.tokens; ++m) {
    auto* to = reinterpret_cast<typename Vector::Value*>(memory.data() + m * stride);
    const T* from = static_cast<const T*>(args.x) + m * cols;
    for (int64_t k = 0; k < cols; ++k) {
      if constexpr (Mac<S>::kStep == 1) {
        to[k] = to_float(from[k]);
      } else {
        to[k] = from[k];
      }
    }
    for (int64_t k = cols; k < stride * Mac<S>::kStep; ++k) to[k] = {};
  }
  // 2. Multiply.
  with_token_count<kMaxDenseM>(args.tokens, [&](auto count) {
    constexpr int kTokens = decltype(count)::value;
    constexpr int kRows = Vector::rows_for(kTokens);
    const int64_t grain = ceil_div(kSmallMGrain, cols);
    parallel_for(0, args.weight.rows, grain, [&](int64_t begin, int64_t end) {
      int64_t row = begin;
      for (; row + kRows <= end; row += kRows) {
        dense_rows<S, Mac, T, kTokens, kRows>(args, memory.data(), stride, row);
      }
      for (; row < end; ++row) {
        dense_rows<S, Mac, T, kTokens, 1>(args, memory.data(), stride, row);
      }
    });
  });
}

template <class S>
void dense_linear_on(const DenseLinearArgs& args) {
  visit_dtype(args.dtype,
              [&](auto element) { dense_linear_as<S, F32Mac, decltype(element)>(args); });
}

}  // namespace pylora::cpu
