// The sums of multi_lora_linear.h, as a template over the vector primitives.
//
// The threads share out strips of columns. For each strip and each group:
//   1. Pack the factor's part as fp32, with the columns along the vectors.
//   2. Multiply a few tokens at a time by it (gemm_tile.h), in chains of kChain products.
//   3. Add the products to the rows of the tokens, and round.
#pragma once

#include "cpu/lora_linear_impl.h"
#include "cpu/multi_lora_linear.h"

namespace pylora::cpu {

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
void add_low_rank_strips(const LowRankSum& sum, int64_t begin, int64_t end) {
  constexpr int64_t kWide = TokenTiles<S>::kWidth;
  const int64_t rank = sum.factor.rank;
  float* panel = thread_workspace();     // [rank][v * kLanes]
  float* values = panel + rank * kWide;  // [tokens of a tile][v * kLanes]
  for (int64_t strip = begin; strip < end; ++strip) {
    const int64_t col = strip * kWide;
    const int64_t cols = sum.cols - col < kWide ? sum.cols - col : kWide;
    const int v = static_cast<int>(ceil_div(cols, S::kLanes));
    const int64_t width = v * S::kLanes;
    for (const AdapterGroup& group : sum.groups) {
      // 1. The panel.
      const auto* factor =
          static_cast<const TA*>(sum.factor.data) + group.adapter * rank * sum.cols;
      if (sum.factor.rank_first) {
        pack_rows<S, F32Mac>(factor + col, sum.cols, rank, cols, v, panel);
      } else {
        pack_tile<S, F32Mac>(factor + col * rank, rank, cols, rank, v, panel);
      }
      const float* low = sum.low + group.first * rank;
      const int64_t* rows = sum.rows + group.first;
      for (int64_t m = 0; m < group.count; m += S::rows_for(v)) {
        // 2. The products. The tile's last rows may be no tokens of the group; they are not read.
        for (int64_t r = 0; r < rank; r += kChain) {
          run_tile<Broadcast::kColMajor>(F32Mac<S>{}, v, rank - r < kChain ? rank - r : kChain,
                                         low + r * group.count + m, group.count, panel + r * width,
                                         values, r > 0);
        }
        // 3. The sums.
        for (int64_t i = 0; i < S::rows_for(v) && m + i < group.count; ++i) {
          add_row<S>(values + i * width, cols,
                     static_cast<T*>(sum.out) + rows[m + i] * sum.cols + col);
        }
      }
    }
  }
}

template <class S>
void add_low_rank_on(const LowRankSum& sum) {
  constexpr int64_t kWide = TokenTiles<S>::kWidth;
  int64_t tokens = 0;
  for (const AdapterGroup& group : sum.groups)
    tokens += round_up(group.count, S::rows_for(S::kMaxV));
  const int64_t grain = ceil_div(kDotGrain, kWide * sum.factor.rank * tokens + 1);
  visit_dtype(sum.dtype, [&](auto token) {
    visit_dtype(sum.factor.dtype, [&](auto weight) {
      parallel_for(0, ceil_div(sum.cols, kWide), grain, [&](int64_t begin, int64_t end) {
        add_low_rank_strips<S, decltype(token), decltype(weight)>(sum, begin, end);
      });
    });
  });
}

}  // namespace pylora::cpu
