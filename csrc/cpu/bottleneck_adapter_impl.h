// The blocks of tokens of a bottleneck adapter (bottleneck_adapter.h), as templates over the vector
// primitives.
//
// Tokens are the broadcast operand of gemm_tile.h, and the features of a product's result lie along
// the vectors. The weights are packed once per call, and all threads read the same panels.
#pragma once

#include <memory>

#include "cpu/bottleneck_adapter.h"
#include "cpu/gemm_pack.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

namespace pylora::cpu {

inline constexpr int64_t kAdapterTokens = 24;  // a multiple of every S::rows_for(v)
// Sums run in chains of so many products, which are then added. A stretch of 24 tokens and a panel
// of that depth fit the first-level cache.
inline constexpr int64_t kAdapterChain = 128;
inline constexpr int64_t kSegments = kMaxBottleneck / kTileK;

// A weight as fp32 panels of up to TokenTiles<S>::kWidth columns each: [depth][columns].
template <class S>
struct Panels {
  TokenTiles<S> tiles;
  int64_t depth;
  std::unique_ptr<float[]> values;

  const float* panel(int64_t t) const { return values.get() + tiles.offset(t, depth); }
};

// Packs the matrix that `depth` products run over. Its element (k, n) is weight[n * depth + k] if
// `transposed`, else weight[k * columns + n].
template <class S, class T>
Panels<S> pack_weight(const T* weight, int64_t depth, int64_t columns, bool transposed) {
  constexpr int64_t kWide = TokenTiles<S>::kWidth;
  const TokenTiles<S> tiles{columns};
  Panels<S> out{tiles, depth,
                std::unique_ptr<float[]>(new float[static_cast<size_t>(depth * tiles.padded())])};
  parallel_for(0, tiles.count(), 8, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int v = tiles.vectors(t);
      const int64_t count = tiles.tokens_in(t);
      float* to = out.values.get() + tiles.offset(t, depth);
      if (transposed) {
        pack_tile<S, F32Mac>(weight + t * kWide * depth, depth, count, depth, v, to);
        continue;
      }
      for (int64_t k = 0; k < depth; ++k) {
        float* line = to + k * v * S::kLanes;
        widen_row<S>(weight + k * columns + t * kWide, count, line);
        for (int64_t j = count; j < v * S::kLanes; ++j) line[j] = 0.0f;
      }
    }
  });
  return out;
}

// What a thread keeps of a block of tokens.
template <class S>
struct AdapterBlock {
  static constexpr int64_t kWide = TokenTiles<S>::kWidth;
  float* values;   // [kAdapterTokens][kTileLd], a stretch of tokens in fp32
  float* sums;     // by tile of bottleneck features: [kAdapterTokens][features]
  float* second;   // another one
  float* factors;  // [kSegments][kAdapterTokens][kTileLd], what the second product broadcasts
  float* tile;     // a tile of accumulators

  explicit AdapterBlock(float* workspace) : values(workspace) {
    sums = values + kAdapterTokens * kTileLd;
    second = sums + kAdapterTokens * kMaxBottleneck;
    factors = second + kAdapterTokens * kMaxBottleneck;
    tile = factors + kSegments * kAdapterTokens * kTileLd;
  }

  // out = x[tokens] @ panels, summed over `cols`; x points to the first token.
  template <class T>
  void shrink(const T* x, int64_t tokens, int64_t cols, const Panels<S>& panels, float* out) {
    for (int64_t k = 0; k < cols; k += kAdapterChain) {
      const int64_t count = cols - k < kAdapterChain ? cols - k : kAdapterChain;
      for (int64_t m = 0; m < tokens; ++m) {
        widen_row<S>(x + m * cols + k, count, values + m * kTileLd);
      }
      for (int64_t t = 0; t < panels.tiles.count(); ++t) {
        const int v = panels.tiles.vectors(t);
        const int64_t width = v * S::kLanes;
        for (int64_t i = 0; i < tokens; i += S::rows_for(v)) {
          run_tile<Broadcast::kRowMajor>(F32Mac<S>{}, v, count, values + i * kTileLd, 0,
                                         panels.panel(t) + k * width,
                                         out + t * kWide * kAdapterTokens + i * width, k > 0);
        }
      }
    }
  }

  // The sum of token m and bottleneck feature j.
  static float sum_of(const float* sums, const TokenTiles<S>& features, int64_t m, int64_t j) {
    const int64_t t = j / kWide;
    return sums[t * kWide * kAdapterTokens + m * features.vectors(t) * S::kLanes + j % kWide];
  }

  float& factor(int64_t m, int64_t j) {
    return factors[(j / kTileK * kAdapterTokens + m) * kTileLd + j % kTileK];
  }

  // out[tokens] = add + factors @ panels + bias; `add` and `bias` may be null. `add` and `out` point
  // to the first token and have `cols` columns.
  template <class T>
  void expand(const T* add, int64_t tokens, int64_t cols, const Panels<S>& panels,
              const float* bias, T* out) {
    for (int64_t t = 0; t < panels.tiles.count(); ++t) {
      const int v = panels.tiles.vectors(t);
      const int64_t width = v * S::kLanes;
      const int64_t rows = S::rows_for(v);
      const int64_t col = t * kWide;
      const int64_t left = panels.tiles.tokens_in(t);
      for (int64_t i = 0; i < tokens; i += rows) {
        for (int64_t k = 0; k < panels.depth; k += kAdapterChain) {
          const int64_t count = panels.depth - k < kAdapterChain ? panels.depth - k : kAdapterChain;
          run_tile<Broadcast::kRowMajor>(F32Mac<S>{}, v, count, &factor(i, k), 0,
                                         panels.panel(t) + k * width, tile, k > 0);
        }
        for (int64_t m = i; m < i + rows && m < tokens; ++m) {
          const float* from = tile + (m - i) * width;
          const int64_t place = m * cols + col;
          for (int64_t j = 0; j < left; j += S::kLanes) {
            const int n = static_cast<int>(left - j < S::kLanes ? left - j : S::kLanes);
            auto value = S::load(from + j);
            if (n == S::kLanes) {
              if (bias != nullptr) value = S::add(value, S::load(bias + col + j));
              if (add != nullptr) value = S::add(value, S::load(add + place + j));
              S::store(out + place + j, value);
            } else {
              if (bias != nullptr) value = S::add(value, S::load_n(bias + col + j, n));
              if (add != nullptr) value = S::add(value, S::load_n(add + place + j, n));
              S::store_n(out + place + j, value, n);
            }
          }
        }
      }
    }
  }
};

// Runs body(block, first token, tokens) for each block of tokens.
template <class S, class Body>
void for_each_block(int64_t all_tokens, const Body& body) {
  const int64_t share = ceil_div(all_tokens, num_threads());
  const int64_t size = share < kAdapterTokens ? share : kAdapterTokens;
  parallel_for(0, ceil_div(all_tokens, size), 1, [&](int64_t begin, int64_t end) {
    AdapterBlock<S> block(thread_workspace());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * size;
      body(block, first, all_tokens - first < size ? all_tokens - first : size);
    }
  });
}

template <class S, class T, class TW>
void adapter_forward_as(const BottleneckArgs& args) {
  const int64_t hidden = args.hidden;
  const auto* x = static_cast<const T*>(args.x);
  const auto* residual = static_cast<const T*>(args.residual);
  const Panels<S> down = pack_weight<S>(static_cast<const TW*>(args.down), hidden, args.size, true);
  const Panels<S> up = pack_weight<S>(static_cast<const TW*>(args.up), args.size, hidden, true);
  for_each_block<S>(args.tokens, [&](AdapterBlock<S>& block, int64_t first, int64_t tokens) {
    const int64_t start = first * hidden;
    block.shrink(x + start, tokens, hidden, down, block.sums);
    for (int64_t m = 0; m < tokens; ++m) {
      for (int64_t j = 0; j < args.size; ++j) {
        const float bias = args.down_bias != nullptr ? args.down_bias[j] : 0.0f;
        const float h = block.sum_of(block.sums, down.tiles, m, j) + bias;
        block.factor(m, j) = static_cast<float>(activate(args.activation, h) * args.scaling);
      }
    }
    block.expand(residual != nullptr ? residual + start : nullptr, tokens, hidden, up, args.up_bias,
                 static_cast<T*>(args.y) + start);
  });
}

template <class S, class T, class TW>
void adapter_backward_as(const BottleneckArgs& args, float* low, float* dh) {
  const int64_t hidden = args.hidden;
  const auto* x = static_cast<const T*>(args.x);
  const auto* grad = static_cast<const T*>(args.grad);
  const auto* down = static_cast<const TW*>(args.down);
  const Panels<S> shrinking = pack_weight<S>(down, hidden, args.size, true);
  Panels<S> of_grad, of_dh;
  if (dh != nullptr) {
    of_grad = pack_weight<S>(static_cast<const TW*>(args.up), hidden, args.size, false);
  }
  if (args.dx != nullptr) of_dh = pack_weight<S>(down, args.size, hidden, false);
  for_each_block<S>(args.tokens, [&](AdapterBlock<S>& block, int64_t first, int64_t tokens) {
    const int64_t start = first * hidden;
    block.shrink(x + start, tokens, hidden, shrinking, block.sums);
    if (dh != nullptr) block.shrink(grad + start, tokens, hidden, of_grad, block.second);
    for (int64_t m = 0; m < tokens; ++m) {
      for (int64_t j = 0; j < args.size; ++j) {
        const float bias = args.down_bias != nullptr ? args.down_bias[j] : 0.0f;
        const float h = block.sum_of(block.sums, shrinking.tiles, m, j) + bias;
        const int64_t place = (first + m) * args.size + j;
        if (low != nullptr) {
          low[place] = static_cast<float>(activate(args.activation, h) * args.scaling);
        }
        if (dh != nullptr) {
          const float da = block.sum_of(block.second, shrinking.tiles, m, j);
          const double slope = activation_slope(args.activation, h) * args.scaling;
          dh[place] = block.factor(m, j) = static_cast<float>(slope * da);
        }
      }
    }
    if (args.dx != nullptr) {
      block.expand(args.adds_x ? grad + start : nullptr, tokens, hidden, of_dh,
                   static_cast<const float*>(nullptr), static_cast<T*>(args.dx) + start);
    }
  });
}

template <class S>
void adapter_forward_on(const BottleneckArgs& args) {
  visit_dtype(args.dtype, [&](auto token) {
    visit_dtype(args.weight_dtype, [&](auto weight) {
      adapter_forward_as<S, decltype(token), decltype(weight)>(args);
    });
  });
}

template <class S>
void adapter_backward_on(const BottleneckArgs& args, float* low, float* dh) {
  visit_dtype(args.dtype, [&](auto token) {
    visit_dtype(args.weight_dtype, [&](auto weight) {
      adapter_backward_as<S, decltype(token), decltype(weight)>(args, low, dh);
    });
  });
}

}  // namespace pylora::cpu
