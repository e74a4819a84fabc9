// The products of LoRA with a side of the rank's length (lora_linear.h), as templates over the
// vector primitives.
//
// Activations are converted to fp32, and dropout is applied, one stretch at a time that fits the
// first-level cache. The products are tiles of gemm_tile.h. Sums run in chains of kChain products,
// which are then added: this is as accurate as torch's many short chains.
#pragma once

#include "cpu/gemm_pack.h"
#include "cpu/lora_linear.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

namespace pylora::cpu {

inline constexpr int64_t kChain = 32;
inline constexpr int64_t kSumChain = 16;       // column sums run in fp32 so far, then in fp64
inline constexpr int64_t kDotGrain = 1 << 17;  // a thread is woken for at least so many products
inline constexpr int64_t kDotTokens = 16;      // up to so many tokens, threads share out the ranks

// Writes x[first_token .. first_token + tokens)[col .. col + count) to out [tokens][ld] as fp32,
// with dropout.
template <class S, class T>
void widen_tokens(const TokenMatrix& x, int64_t first_token, int64_t tokens, int64_t col,
                  int64_t count, float* out, int64_t ld) {
  for (int64_t m = 0; m < tokens; ++m) {
    const int64_t first = x.row(first_token + m) * x.cols + col;
    float* to = out + m * ld;
    widen_row<S>(static_cast<const T*>(x.data) + first, count, to);
    if (x.dropout.enabled) drop_values<S>(x.dropout, first, count, to);
  }
}

// The same as the elements of a product, to rows that are kTileLd apart. A row has `count` values, at
// most kTileK elements. Those of bf16 that dropout has scaled are rounded to bf16, as torch rounds
// them.
template <class S, template <class> class Mac, class T>
void copy_tokens(const TokenMatrix& x, int64_t first_token, int64_t tokens, int64_t col,
                 int64_t count, float* out) {
  if constexpr (Mac<S>::kStep == 1) {
    widen_tokens<S, T>(x, first_token, tokens, col, count, out, kTileLd);
  } else {
    float dropped[Mac<S>::kStep * kTileK];
    for (int64_t m = 0; m < tokens; ++m, out += kTileLd) {
      const auto* row = static_cast<const T*>(x.data) + x.row(first_token + m) * x.cols + col;
      if (!x.dropout.enabled) {
        copy_row<S, Mac>(row, count, out);
      } else {
        widen_tokens<S, T>(x, first_token + m, 1, col, count, dropped, 0);
        narrow_row<S, Mac>(dropped, count, out);
      }
    }
  }
}

// The projection for few tokens: dot products of rows of x with four rows of lora_A at a time. The
// threads share out the ranks.
template <class S, class T, class TA>
void project_dots(const TokenMatrix& x, const TA* factor, int64_t rank, const float* bias,
                  float* out) {
  constexpr int kRanks = 4;
  const int64_t grain = ceil_div(kDotGrain, kRanks * x.cols * x.tokens + 1);
  parallel_for(0, ceil_div(rank, kRanks), grain, [&](int64_t begin, int64_t end) {
    float* values = thread_workspace();
    float* rows = values + kDotTokens * kTileK;
    for (int64_t group = begin; group < end; ++group) {
      const int64_t j0 = group * kRanks;
      const int64_t ranks = rank - j0 < kRanks ? rank - j0 : kRanks;
      float sums[kDotTokens][kRanks] = {};
      for (int64_t k = 0; k < x.cols; k += kTileK) {
        const int64_t count = x.cols - k < kTileK ? x.cols - k : kTileK;
        const int64_t padded = ceil_div(count, S::kLanes) * S::kLanes;
        for (int64_t m = 0; m < x.tokens; ++m) {
          widen_tokens<S, T>(x, m, 1, k, count, values + m * kTileK, kTileK);
          for (int64_t i = count; i < padded; ++i) values[m * kTileK + i] = 0.0f;
        }
        for (int64_t j = 0; j < ranks; ++j) {
          widen_row<S>(factor + (j0 + j) * x.cols + k, count, rows + j * kTileK);
          for (int64_t i = count; i < padded; ++i) rows[j * kTileK + i] = 0.0f;
        }
        for (int64_t m = 0; m < x.tokens; ++m) {
          typename S::F acc[kRanks];
          for (auto& a : acc) a = S::zero();
          for (int64_t i = 0; i < padded; i += S::kLanes) {
            const auto value = S::load(values + m * kTileK + i);
#pragma GCC unroll 4
            for (int j = 0; j < kRanks; ++j) {
              acc[j] = S::fma(value, S::load(rows + j * kTileK + i), acc[j]);
            }
          }
          for (int64_t j = 0; j < ranks; ++j) sums[m][j] += S::sum(acc[j]);
        }
      }
      for (int64_t m = 0; m < x.tokens; ++m) {
        for (int64_t j = 0; j < ranks; ++j) {
          out[m * rank + j0 + j] = sums[m][j] + (bias != nullptr ? bias[j0 + j] : 0.0f);
        }
      }
    }
  });
}

// The projection for many tokens: they are the broadcast operand, and the ranks lie along the
// vectors. The threads share out the tokens.
template <class S, template <class> class Mac, class T, class TA>
void project_tiles(const TokenMatrix& x, const TA* factor, int64_t rank, bool rank_first,
                   const float* bias, float* out) {
  using Sums = Mac<S>;
  constexpr int64_t kWide = TokenTiles<S>::kWidth;
  constexpr int64_t kFactorFloats = 64 * 1024;
  constexpr int64_t kSumFloats = 128 * 1024;
  constexpr int64_t kTokens = Sums::kRowsUnit;
  constexpr int64_t kSumOf = Sums::kStep == 1 ? kChain : Sums::kChain;  // elements
  const TokenTiles<S> ranks{rank};
  const int64_t width = ranks.padded();
  const int64_t most = kFactorFloats / width / kChain * kChain;
  const int64_t stretch = (most < kTileK ? most : kTileK) * Sums::kStep;
  int64_t share = ceil_div(x.tokens, num_threads());
  if (share > kSumFloats / width) share = kSumFloats / width;
  share = (share < kTokens ? 1 : share / kTokens) * kTokens;
  parallel_for(0, ceil_div(x.tokens, share), 1, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const typename Sums::Scope scope;
    float* packed = thread_workspace();
    float* values = packed + kFactorFloats;
    float* sums = values + kTokens * kTileLd;  // per tile of ranks: [share][ranks]
    for (int64_t batch = begin; batch < end; ++batch) {
      const int64_t first_token = batch * share;
      const int64_t tokens = x.tokens - first_token < share ? x.tokens - first_token : share;
      for (int64_t k = 0; k < x.cols; k += stretch) {
        const int64_t count = x.cols - k < stretch ? x.cols - k : stretch;
        const int64_t elements = elements_of<Sums>(count);
        for (int64_t t = 0; t < ranks.count(); ++t) {
          const int v = ranks.vectors(t);
          float* to = packed + ranks.offset(t, elements);
          if (rank_first) {
            pack_tile<S, Mac>(factor + t * kWide * x.cols + k, x.cols, ranks.tokens_in(t), count, v,
                              to);
          } else {
            pack_rows<S, Mac>(factor + k * rank + t * kWide, rank, count, ranks.tokens_in(t), v,
                              to);
          }
        }
        for (int64_t m = 0; m < tokens; m += kTokens) {
          copy_tokens<S, Mac, T>(x, first_token + m, tokens - m < kTokens ? tokens - m : kTokens, k,
                                 count, values);
          for (int64_t t = 0; t < ranks.count(); ++t) {
            const int v = ranks.vectors(t);
            for (int64_t i = 0; i < kTokens && m + i < tokens; i += Sums::rows_for(v)) {
              for (int64_t c = 0; c < elements; c += kSumOf) {
                run_tile<Broadcast::kRowMajor>(
                    Sums{}, v, elements - c < kSumOf ? elements - c : kSumOf,
                    values + i * kTileLd + c, 0,
                    packed + ranks.offset(t, elements) + c * v * S::kLanes,
                    sums + ranks.offset(t, share) + (m + i) * v * S::kLanes, k + c > 0);
              }
            }
          }
        }
      }
      for (int64_t m = 0; m < tokens; ++m) {
        for (int64_t j = 0; j < rank; ++j) {
          const int64_t t = j / kWide;
          const float sum =
              x.cols == 0
                  ? 0.0f
                  : sums[ranks.offset(t, share) + m * ranks.vectors(t) * S::kLanes + j % kWide];
          out[(first_token + m) * rank + j] = sum + (bias != nullptr ? bias[j] : 0.0f);
        }
      }
    }
  });
}

template <class S, template <class> class Mac, class T, class TA>
void project_as(const TokenMatrix& x, const AdapterFactor& factor, const float* bias, float* out) {
  if (x.tokens == 0) return;
  const auto* values = static_cast<const TA*>(factor.data);
  if (x.tokens <= kDotTokens && factor.rank_first) {
    project_dots<S, T>(x, values, factor.rank, bias, out);
  } else {
    project_tiles<S, Mac, T>(x, values, factor.rank, factor.rank_first, bias, out);
  }
}

template <class S>
void project_on(const TokenMatrix& x, const AdapterFactor& factor, const float* bias, float* out) {
  visit_dtype(x.dtype, [&](auto token) {
    visit_dtype(factor.dtype, [&](auto weight) {
      project_as<S, F32Mac, decltype(token), decltype(weight)>(x, factor, bias, out);
    });
  });
}

// gradient = low^T x: the columns of x lie along the vectors, and low is the broadcast operand.
template <class S, class T>
void gather_columns(const TokenMatrix& x, const float* low, const AdapterFactor& gradient,
                    float* sums) {
  constexpr int64_t kWide = TokenTiles<S>::kWidth;
  constexpr int64_t kTokens = 2 * kChain;
  parallel_for(0, ceil_div(x.cols, kWide), 1, [&](int64_t begin, int64_t end) {
    float* values = thread_workspace();
    float* acc = values + kTokens * kWide;  // [rank, padded][v * kLanes]
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t col = strip * kWide;
      const int64_t cols = x.cols - col < kWide ? x.cols - col : kWide;
      const int v = static_cast<int>(ceil_div(cols, S::kLanes));
      const int64_t width = v * S::kLanes;
      double totals[kWide] = {};
      for (int64_t i = cols; i < width; ++i) {
        for (int64_t m = 0; m < kTokens; ++m) values[m * width + i] = 0.0f;
      }
      for (int64_t m = 0; m < x.tokens; m += kTokens) {
        const int64_t tokens = x.tokens - m < kTokens ? x.tokens - m : kTokens;
        widen_tokens<S, T>(x, m, tokens, col, cols, values, width);
        if (sums != nullptr) {
          for (int64_t i = 0; i < tokens; i += kSumChain) {
            float part[kWide] = {};
            for (int64_t l = i; l < tokens && l < i + kSumChain; ++l) {
              for (int64_t j = 0; j < width; ++j) part[j] += values[l * width + j];
            }
            for (int64_t j = 0; j < cols; ++j) totals[j] += part[j];
          }
        }
        if (gradient.data == nullptr) continue;
        for (int64_t r = 0; r < gradient.rank; r += S::rows_for(v)) {
          for (int64_t c = 0; c < tokens; c += kChain) {
            run_tile<Broadcast::kColMajor>(F32Mac<S>{}, v,
                                           tokens - c < kChain ? tokens - c : kChain,
                                           low + (m + c) * gradient.rank + r, gradient.rank,
                                           values + c * width, acc + r * width, m + c > 0);
          }
        }
      }
      if (sums != nullptr) {
        for (int64_t j = 0; j < cols; ++j) sums[col + j] = static_cast<float>(totals[j]);
      }
      if (gradient.data == nullptr) continue;
      visit_dtype(gradient.dtype, [&](auto element) {
        auto* out = static_cast<decltype(element)*>(gradient.data);
        if (x.tokens == 0) {
          for (int64_t i = 0; i < gradient.rank * width; ++i) acc[i] = 0.0f;
        }
        if (gradient.rank_first) {
          for (int64_t r = 0; r < gradient.rank; ++r) {
            for (int64_t i = 0; i < cols; i += S::kLanes) {
              const int64_t left = cols - i;
              S::store_n(out + r * x.cols + col + i, S::load(acc + r * width + i),
                         static_cast<int>(left < S::kLanes ? left : S::kLanes));
            }
          }
        } else {
          write_tile<S>(acc, v, cols, gradient.rank, nullptr, nullptr, nullptr,
                        out + col * gradient.rank, gradient.rank);
        }
      });
    }
  });
}

template <class S>
void gather_on(const TokenMatrix& x, const float* low, const AdapterFactor& gradient, float* sums) {
  visit_dtype(x.dtype,
              [&](auto token) { gather_columns<S, decltype(token)>(x, low, gradient, sums); });
}

}  // namespace pylora::cpu
