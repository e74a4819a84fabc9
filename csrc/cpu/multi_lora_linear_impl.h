// The sums of multi_lora_linear.h, as a template over the vector primitives.
//
// The threads share out strips of columns, and take a few of them at a time, as wide as a part of a
// factor that stays in the second-level cache. For these and each group:
//   1. Pack the factor's part as fp32, with the columns along the vectors.
//   2. Multiply a few tokens at a time by it (gemm_tile.h), in chains of kChain products.
//   3. Add the products to the rows of the tokens, and round.
#pragma once

#include "cpu/lora_linear_impl.h"
#include "cpu/multi_lora_linear.h"

namespace pylora::cpu {

// A packed part of a factor has so many floats, or one tile of columns if its rank is too high for
// that. A wider part touches the rows of y less often: with one tile at a time, 2,048 tokens of 4,096
// columns took twice as long.
inline constexpr int64_t kPanelFloats = 16 * 1024;

// Adds `count` values to a row of activations.
template <class S, class T>
PYLORA_INLINE void add_row(const float* values, int64_t count, T* row) {
  int64_t i = 0;
  for (; i + S::kLanes <= count; i += S::kLanes) {
    S::store(row + i, S::add(S::load(values + i), S::load(row + i)));
  }
  if (i < count) {
    const int left = static_cast<int>(count - i);
    S::store_n(row + i, S::add(S::load(values + i), S::load_n(row + i, left)), left);
  }
}

template <class S, class T, class TA>
void add_low_rank_columns(const LowRankSum& sum, int64_t first_col, const TokenTiles<S>& columns) {
  constexpr int64_t kRows = S::rows_for(S::kMaxV);  // the fewest that a tile has
  const int64_t rank = sum.factor.rank;
  float* panel = thread_workspace();                              // by tile: [rank][columns]
  float* values = panel + columns.offset(columns.count(), rank);  // [tokens][columns of a tile]
  for (const AdapterGroup& group : sum.groups) {
    // 1. The panel.
    const auto* factor = static_cast<const TA*>(sum.factor.data) + group.adapter * rank * sum.cols;
    for (int64_t t = 0; t < columns.count(); ++t) {
      const int64_t col = first_col + t * columns.kWidth, cols = columns.tokens_in(t);
      float* to = panel + columns.offset(t, rank);
      if (sum.factor.rank_first) {
        pack_rows<S, F32Mac>(factor + col, sum.cols, rank, cols, columns.vectors(t), to);
      } else {
        pack_tile<S, F32Mac>(factor + col * rank, rank, cols, rank, columns.vectors(t), to);
      }
    }
    const float* low = sum.low + group.first * rank;
    const int64_t* rows = sum.rows + group.first;
    for (int64_t m = 0; m < group.count; m += kRows) {
      for (int64_t t = 0; t < columns.count(); ++t) {
        // 2. The products. Those of the tile's rows beyond kRows, and beyond the group, are unused.
        const int v = columns.vectors(t);
        const int64_t width = v * S::kLanes;
        for (int64_t r = 0; r < rank; r += kChain) {
          run_tile<Broadcast::kColMajor>(
              F32Mac<S>{}, v, rank - r < kChain ? rank - r : kChain, low + r * group.count + m,
              group.count, panel + columns.offset(t, rank) + r * width, values, r > 0);
        }
        // 3. The sums.
        T* out = static_cast<T*>(sum.out) + first_col + t * columns.kWidth;
        for (int64_t i = 0; i < kRows && m + i < group.count; ++i) {
          add_row<S>(values + i * width, columns.tokens_in(t), out + rows[m + i] * sum.cols);
        }
      }
    }
  }
}

template <class S>
void add_low_rank_on(const LowRankSum& sum) {
  constexpr int64_t kWide = TokenTiles<S>::kWidth;
  const int64_t rank = sum.factor.rank;
  const int64_t fitting = kPanelFloats / kWide / rank;
  const int64_t block = fitting > 0 ? fitting : 1;  // strips
  int64_t rows = 0;                                 // of all tiles
  for (const AdapterGroup& group : sum.groups) {
    rows += round_up(group.count, S::rows_for(S::kMaxV));
  }
  const int64_t grain = ceil_div(kDotGrain, kWide * rank * rows + 1);
  visit_dtype(sum.dtype, [&](auto token) {
    visit_dtype(sum.factor.dtype, [&](auto weight) {
      parallel_for(0, ceil_div(sum.cols, kWide), grain, [&](int64_t begin, int64_t end) {
        for (int64_t strip = begin; strip < end; strip += block) {
          const int64_t first = strip * kWide, left = sum.cols - first;
          const int64_t most = (end - strip < block ? end - strip : block) * kWide;
          add_low_rank_columns<S, decltype(token), decltype(weight)>(
              sum, first, TokenTiles<S>{left < most ? left : most});
        }
      });
    });
  });
}

}  // namespace pylora::cpu
