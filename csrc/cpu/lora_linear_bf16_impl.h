// The products of LoRA with a side of the rank's length (lora_linear.h) in bf16, as templates over
// the vector primitives and over the products of gemm_tile.h.
//
// In that of a gradient, an element is a pair of tokens. The columns of x lie along the vectors, and
// low, rounded to bf16, is the broadcast operand.
#pragma once

#include <algorithm>

#include "cpu/lora_linear_impl.h"

namespace pylora::cpu {

// Columns that a task reads of each token: short pieces of rows cost the memory more.
inline constexpr int64_t kGatherColumns = 128;
// A stretch of so many elements, for all columns of a task, stays in the second-level cache.
inline constexpr int64_t kGatherStretch = 256;

// low [tokens, rank] as rows of elements: [stretches of tokens][ranks, padded][kTileLd].
template <class S, template <class> class Mac>
struct PackedLow {
  int64_t rank;
  int64_t ranks;  // padded
  float* values;

  static int64_t padded(int64_t rank) { return round_up(rank, Mac<S>::kRowsUnit); }
  static int64_t floats(int64_t tokens, int64_t rank) {
    return ceil_div(tokens, 2 * kGatherStretch) * padded(rank) * kTileLd;
  }
  const float* row(int64_t token, int64_t r) const {
    return values + (token / (2 * kGatherStretch) * ranks + r) * kTileLd;
  }

  void pack(const float* low, int64_t tokens) {
    constexpr int L = S::kLanes;
    parallel_for(0, ceil_div(rank, L), 4, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin * L; r < end * L && r < rank; r += L) {
        const int count = static_cast<int>(rank - r < L ? rank - r : L);
        for (int64_t m = 0; m < tokens; m += 2 * L) {
          typename S::F square[L];
          for (int i = 0; i < L; ++i) {
            const int64_t even = m + 2 * i, odd = even + 1;
            square[i] =
                S::to_pairs(even < tokens ? S::load_n(low + even * rank + r, count) : S::zero(),
                            odd < tokens ? S::load_n(low + odd * rank + r, count) : S::zero());
          }
          S::transpose(square);
          float* out = const_cast<float*>(row(m, r)) + m % (2 * kGatherStretch) / 2;
          for (int i = 0; i < count; ++i) S::store(out + i * kTileLd, square[i]);
        }
      }
    });
  }
};

// The columns [col, col + cols) of x, tile by tile: [columns / kWidth][elements][columns].
template <class S, template <class> class Mac>
void pack_token_pairs(const TokenMatrix& x, int64_t first, int64_t tokens, int64_t col,
                      const TokenTiles<S>& tiles, float* packed) {
  constexpr int L = S::kLanes;
  const auto* data = static_cast<const BFloat16*>(x.data) + col;
  const int64_t elements = elements_of<Mac<S>>(tokens);
  float dropped[2][kGatherColumns + L];
  for (int64_t e = 0; e < elements; ++e) {
    const int64_t m = 2 * e;
    const bool pair = m + 1 < tokens;
    if (x.dropout.enabled) {
      for (int64_t i = 0; i < 2 && m + i < tokens; ++i) {
        widen_tokens<S, BFloat16>(x, first + m + i, 1, col, tiles.tokens, dropped[i], 0);
      }
    }
    const BFloat16* even = m < tokens ? data + x.row(first + m) * x.cols : nullptr;
    const BFloat16* odd = pair ? data + x.row(first + m + 1) * x.cols : nullptr;
    for (int64_t t = 0; t < tiles.count(); ++t) {
      const int64_t width = tiles.vectors(t) * L;
      float* out = packed + tiles.offset(t, elements) + e * width;
      for (int64_t j = 0; j < width; j += L) {
        const int64_t place = t * tiles.kWidth + j, left = tiles.tokens - place;
        const int n = static_cast<int>(left < L ? left : L);
        typename S::F values = S::zero();
        if (m < tokens && !x.dropout.enabled) {
          values = S::load_pairs(even + place, pair ? odd + place : nullptr, n);
        } else if (m < tokens) {
          values = S::to_pairs(S::load_n(dropped[0] + place, n),
                               pair ? S::load_n(dropped[1] + place, n) : S::zero());
        }
        S::store(out + j, values);
      }
    }
  }
}

// Adds the column sums of `tokens` rows of x to totals.
template <class S>
void add_column_sums(const TokenMatrix& x, int64_t first, int64_t tokens, int64_t col, int64_t cols,
                     double* totals) {
  float row[kGatherColumns];
  for (int64_t m = 0; m < tokens; m += kSumChain) {
    float part[kGatherColumns] = {};
    for (int64_t i = m; i < tokens && i < m + kSumChain; ++i) {
      widen_tokens<S, BFloat16>(x, first + i, 1, col, cols, row, 0);
      for (int64_t j = 0; j < cols; ++j) part[j] += row[j];
    }
    for (int64_t j = 0; j < cols; ++j) totals[j] += part[j];
  }
}

template <class S, template <class> class Mac>
void project_bf16(const TokenMatrix& x, const AdapterFactor& factor, const float* bias,
                  float* out) {
  project_as<S, Mac, BFloat16, BFloat16>(x, factor, bias, out);
}

template <class S, template <class> class Mac>
void gather_bf16(const TokenMatrix& x, const float* low, const AdapterFactor& gradient,
                 float* sums) {
  static_assert(kGatherColumns % TokenTiles<S>::kWidth == 0);
  const bool multiplies = gradient.data != nullptr;
  using Low = PackedLow<S, Mac>;
  const CallMemory memory(
      static_cast<size_t>(multiplies ? Low::floats(x.tokens, gradient.rank) : 0));
  Low factors{gradient.rank, Low::padded(gradient.rank), memory.data()};
  if (multiplies) factors.pack(low, x.tokens);
  parallel_for(0, ceil_div(x.cols, kGatherColumns), 1, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const typename Mac<S>::Scope scope;
    float* packed = thread_workspace();
    float* acc = packed + kGatherStretch * kGatherColumns;  // by tile: [ranks, padded][columns]
    for (int64_t task = begin; task < end; ++task) {
      const int64_t col = task * kGatherColumns;
      const TokenTiles<S> tiles{x.cols - col < kGatherColumns ? x.cols - col : kGatherColumns};
      double totals[kGatherColumns] = {};
      for (int64_t m = 0; m < x.tokens; m += 2 * kGatherStretch) {
        const int64_t left = x.tokens - m;
        const int64_t tokens = left < 2 * kGatherStretch ? left : 2 * kGatherStretch;
        if (sums != nullptr) add_column_sums<S>(x, m, tokens, col, tiles.tokens, totals);
        if (!multiplies) continue;
        const int64_t elements = elements_of<Mac<S>>(tokens);
        pack_token_pairs<S, Mac>(x, m, tokens, col, tiles, packed);
        for (int64_t t = 0; t < tiles.count(); ++t) {
          const int v = tiles.vectors(t);
          float* out = acc + tiles.offset(t, factors.ranks);
          for (int64_t r = 0; r < gradient.rank; r += Mac<S>::rows_for(v)) {
            run_tile<Broadcast::kRowMajor>(Mac<S>{}, v, elements, factors.row(m, r), 0,
                                           packed + tiles.offset(t, elements),
                                           out + r * v * S::kLanes, m > 0);
          }
        }
      }
      if (sums != nullptr) {
        for (int64_t j = 0; j < tiles.tokens; ++j) sums[col + j] = static_cast<float>(totals[j]);
      }
      if (!multiplies) continue;
      auto* out = static_cast<BFloat16*>(gradient.data);
      for (int64_t t = 0; t < tiles.count(); ++t) {
        const int v = tiles.vectors(t);
        const int64_t width = v * S::kLanes, first = col + t * tiles.kWidth;
        float* values = acc + tiles.offset(t, factors.ranks);
        if (x.tokens == 0) std::fill_n(values, factors.ranks * width, 0.0f);
        if (!gradient.rank_first) {
          write_tile<S>(values, v, tiles.tokens_in(t), gradient.rank, nullptr, nullptr, nullptr,
                        out + first * gradient.rank, gradient.rank);
          continue;
        }
        for (int64_t r = 0; r < gradient.rank; ++r) {
          for (int64_t j = 0; j < tiles.tokens_in(t); j += S::kLanes) {
            const int64_t left = tiles.tokens_in(t) - j;
            S::store_n(out + r * x.cols + first + j, S::load(values + r * width + j),
                       static_cast<int>(left < S::kLanes ? left : S::kLanes));
          }
        }
      }
    }
  });
}

}  // namespace pylora::cpu
