// A block of tokens of a bottleneck adapter (bottleneck_adapter.h) and its two products, as templates
// over the vector primitives and over the products of gemm_tile.h.
//
// Tokens are the broadcast operand of gemm_tile.h, and the features of a product's result lie along
// the vectors. The weights are packed once per call, and all threads read the same panels.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/bottleneck_adapter_tile.h"
#include "cpu/workspace.h"

namespace pylora::cpu {

// What a thread keeps of a block of tokens.
template <class S, template <class> class Mac>
struct AdapterBlock {
  static constexpr int64_t kWide = TokenTiles<S>::kWidth;
  static constexpr int64_t kStep = Mac<S>::kStep;
  // So many tokens are copied at a time, and then multiplied by each panel.
  static constexpr int64_t kCopied = Mac<S>::kRowsUnit;
  static_assert(kAdapterTokens % kCopied == 0 && kAdapterTokens % kSumTokens == 0);
  // The first product sums over the whole width of x, in fp32 in chains as short as torch's.
  // Products of bf16 are exact in fp32, and need none.
  static constexpr int64_t kShrinkChain = kStep == 1 ? 32 : kAdapterChain;
  float* values;   // [kCopied][kTileLd], the elements of a stretch of tokens
  float* sums;     // by tile of bottleneck features: [kAdapterTokens][features]
  float* second;   // another one
  float* factors;  // [kSegments][kAdapterTokens][kTileLd], what the second product broadcasts

  explicit AdapterBlock(float* workspace) : values(workspace) {
    sums = values + kCopied * kTileLd;
    second = sums + kAdapterTokens * kMaxBottleneck;
    factors = second + kAdapterTokens * kMaxBottleneck;
  }

  // out = x[tokens] @ panels, summed over `cols`; x points to the first token.
  template <class T>
  void shrink(const T* x, int64_t tokens, int64_t cols, const Panels<S, Mac>& panels, float* out) {
    for (int64_t k = 0; k < cols; k += panels.stretch) {
      const int64_t count = panels.count(k);
      for (int64_t first = 0; first < tokens; first += kCopied) {
        const int64_t left = tokens - first;
        const int64_t rows = left < kCopied ? left : kCopied;
        for (int64_t m = 0; m < rows; ++m) {
          const T* row = x + (first + m) * cols + k;
          if (m + kTokensAhead < left) prefetch_row(row + kTokensAhead * cols, count);
          copy_row<S, Mac>(row, count, values + m * kTileLd);
        }
        for (int64_t t = 0; t < panels.tiles.count(); ++t) {
          const int v = panels.tiles.vectors(t);
          const int64_t width = v * S::kLanes;
          float* sum = out + t * kWide * kAdapterTokens + first * width;
          const int64_t elements = panels.elements(k);
          for (int64_t i = 0; i < rows; i += Mac<S>::rows_for(v)) {
            float* total = sum + i * width;
            // In fp32 the chains of a stretch are added up by themselves, so that a sum over many
            // elements is one of few terms, each of which has few.
            alignas(64) float part[kCopied * kWide];
            const bool apart = kStep == 1 && k > 0;
            float* to = apart ? part : total;
            for (int64_t c = 0; c < elements; c += kShrinkChain) {
              run_tile<Broadcast::kRowMajor>(
                  Mac<S>{}, v, elements - c < kShrinkChain ? elements - c : kShrinkChain,
                  values + i * kTileLd + c, 0, panels.panel(k, t) + c * width, to,
                  apart ? c > 0 : k + c > 0);
            }
            const int64_t added = apart ? Mac<S>::rows_for(v) * width : 0;
            for (int64_t j = 0; j < added; j += S::kLanes) {
              S::store(total + j, S::add(S::load(total + j), S::load(part + j)));
            }
          }
        }
      }
    }
  }

  // Sets what the second product broadcasts for token m: features j .. j + n, of `size` in all. `row`
  // is readable to its next multiple of S::kLanes.
  void set_factors(int64_t m, int64_t j, int64_t n, int64_t size, const float* row) {
    constexpr int64_t kSegment = kAdapterChain * kStep;
    using Value = std::conditional_t<kStep == 1, float, BFloat16>;
    auto* to = reinterpret_cast<Value*>(factors + j / kSegment * kSegmentFloats + m * kTileLd) +
               j % kSegment;
    for (int64_t i = 0; i < n; i += S::kLanes) S::store(to + i, S::load(row + i));
    if (j + n < size) return;
    const int64_t end = elements_of<Mac<S>>(size) * kStep - j;
    for (int64_t i = n; i < end; ++i) to[i] = Value{};
  }

  // out[tokens] = add + factors @ panels + bias; `add` and `bias` may be null. `add` and `out` point
  // to the first token and have `cols` columns.
  template <class T>
  void expand(const T* add, int64_t tokens, int64_t cols, const Panels<S, Mac>& panels,
              const float* bias, T* out) {
    const int64_t full = cols / kWide;  // tiles of kWide columns; at most one more is narrower
    const int64_t wanted = kStripFloats / (panels.elements(0) * kWide);
    const int64_t strip = wanted < 1 ? 1 : wanted;
    for (int64_t t = 0; t < full; t += strip) {
      expand_strip<S::kMaxV>(add, tokens, cols, panels, bias, out, t,
                             t + strip < full ? t + strip : full);
    }
    if (full == panels.tiles.count()) return;
    switch (panels.tiles.vectors(full)) {
      case 1:
        return expand_strip<1>(add, tokens, cols, panels, bias, out, full, full + 1);
      case 2:
        return expand_strip<2>(add, tokens, cols, panels, bias, out, full, full + 1);
      case 3:
        if constexpr (S::kMaxV > 2) {
          return expand_strip<3>(add, tokens, cols, panels, bias, out, full, full + 1);
        }
        break;
      default:
        if constexpr (S::kMaxV > 2) {
          return expand_strip<4>(add, tokens, cols, panels, bias, out, full, full + 1);
        }
    }
  }

  // The columns of `expand` in tiles [begin, end), which all have V vectors.
  template <int V, class T>
  void expand_strip(const T* add, int64_t tokens, int64_t cols, const Panels<S, Mac>& panels,
                    const float* bias, T* out, int64_t begin, int64_t end) {
    constexpr int64_t kRows = Mac<S>::rows_for(V);
    for (int64_t i = 0; i < tokens; i += kRows) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t col = t * kWide;
        const int64_t place = i * cols + col;
        expand_tile<V>(Mac<S>{}, panels.elements(0), factors + i * kTileLd, panels.panel(0, t),
                       bias == nullptr ? nullptr : bias + col,
                       add == nullptr ? nullptr : add + place, out + place, cols, tokens - i,
                       panels.tiles.tokens_in(t));
      }
    }
  }

  // Calls visit(m, j, n, offset) for each token m and each tile of n bottleneck features from j on.
  // Their sums begin at `offset` in `sums` and in `second`.
  template <class Visit>
  static void for_each_row(const TokenTiles<S>& features, int64_t tokens, const Visit& visit) {
    for (int64_t t = 0; t < features.count(); ++t) {
      const int64_t width = features.vectors(t) * S::kLanes;
      for (int64_t m = 0; m < tokens; ++m) {
        visit(m, t * kWide, features.tokens_in(t), t * kWide * kAdapterTokens + m * width);
      }
    }
  }
};

// How the tokens of a call are cut into blocks of `size`, and these into ranges, of which each runs
// on one thread.
struct TokenBlocks {
  int64_t tokens;
  int64_t size;
  int64_t ranges;

  PYLORA_INLINE int64_t count() const { return ceil_div(tokens, size); }
};

// Blocks of about the same size, which is a multiple of `unit`.
PYLORA_INLINE TokenBlocks cut_tokens(int64_t tokens, int64_t unit) {
  const int64_t threads = num_threads();
  const int64_t share = ceil_div(tokens, threads);
  const int64_t size = round_up(ceil_div(share, ceil_div(share, kAdapterTokens)), unit);
  const int64_t count = ceil_div(tokens, size);
  return {tokens, size, count < threads ? count : threads};
}

// Runs body(block, range, first token, tokens) for each block of tokens.
template <class S, template <class> class Mac, class Body>
void for_each_block(const TokenBlocks& blocks, const Body& body) {
  const int64_t count = blocks.count(), share = ceil_div(count, blocks.ranges);
  parallel_for(0, blocks.ranges, 1, [&](int64_t begin, int64_t end) {
    AdapterBlock<S, Mac> block(thread_workspace());
    [[maybe_unused]] const typename Mac<S>::Scope scope;
    for (int64_t range = begin; range < end; ++range) {
      for (int64_t i = range * share; i < count && i < (range + 1) * share; ++i) {
        const int64_t first = i * blocks.size, left = blocks.tokens - first;
        body(block, range, first, left < blocks.size ? left : blocks.size);
      }
    }
  });
}

}  // namespace pylora::cpu
