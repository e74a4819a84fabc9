// The blocks of tokens of a bottleneck adapter (bottleneck_adapter.h), as templates over the vector
// primitives.
//
// Tokens are the broadcast operand of gemm_tile.h, and the features of a product's result lie along
// the vectors. The weights are packed once per call, and all threads read the same panels.
#pragma once

#include "cpu/bottleneck_adapter.h"
#include "cpu/gemm_pack.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

namespace pylora::cpu {

// The tokens of a block. Panels of a weight are read once for all of them.
inline constexpr int64_t kAdapterTokens = 96;
// So many tokens are widened at a time, a multiple of every S::rows_for(v).
inline constexpr int64_t kWidenedTokens = 24;
// A stretch of x is fetched so many tokens ahead. Tokens may lie a power of two apart, and then more
// of them would not fit their sets of the second-level cache.
inline constexpr int64_t kTokensAhead = 4;
// Sums run in chains of so many products, which are then added. A panel of that depth fits the
// first-level cache.
inline constexpr int64_t kAdapterChain = 256;
// Panels of so many floats together stay in the second-level cache.
inline constexpr int64_t kStripFloats = 32 * 1024;
// The bottleneck features that the second product broadcasts lie in segments of a chain's length.
inline constexpr int64_t kSegments = kMaxBottleneck / kAdapterChain;
inline constexpr int64_t kSegmentFloats = kAdapterTokens * kTileLd;

// A weight as fp32 panels of up to TokenTiles<S>::kWidth columns: [stretches of k][columns / kWidth]
// [k in the stretch][columns in the panel].
template <class S>
struct Panels {
  TokenTiles<S> tiles;
  int64_t depth;    // the length of k
  int64_t stretch;  // of all stretches of k but the last
  float* values;

  int64_t count(int64_t k) const { return depth - k < stretch ? depth - k : stretch; }
  // The panel of tile t in the stretch that begins at k.
  float* panel(int64_t k, int64_t t) const {
    return values + k * tiles.padded() + tiles.offset(t, count(k));
  }
};

// Packs the matrix of a product over k < depth to `memory`, which must have packed_floats(). Its
// element (k, n) is weight[n * depth + k] if `transposed`, else weight[k * columns + n].
template <class S, class T>
Panels<S> pack_weight(const T* weight, int64_t depth, int64_t columns, bool transposed,
                      int64_t stretch, float* memory) {
  constexpr int64_t kWide = TokenTiles<S>::kWidth;
  const TokenTiles<S> tiles{columns};
  const Panels<S> out{tiles, depth, stretch, memory};
  const int64_t panels = ceil_div(depth, stretch) * tiles.count();
  parallel_for(0, panels, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / tiles.count() * stretch;
      const int64_t t = i % tiles.count();
      const int v = tiles.vectors(t);
      const int64_t cols = tiles.tokens_in(t);
      const int64_t count = out.count(first);
      float* to = out.panel(first, t);
      if (transposed) {
        const T* from = weight + t * kWide * depth + first;
        pack_tile<S, F32Mac>(from, depth, cols, count, v, to);
        continue;
      }
      for (int64_t k = 0; k < count; ++k) {
        float* line = to + k * v * S::kLanes;
        widen_row<S>(weight + (first + k) * columns + t * kWide, cols, line);
        for (int64_t j = cols; j < v * S::kLanes; ++j) line[j] = 0.0f;
      }
    }
  });
  return out;
}

// The floats that a weight of this call takes, packed along either side.
template <class S>
int64_t packed_floats(const BottleneckArgs& args) {
  return round_up(args.size, S::kLanes) * round_up(args.hidden, S::kLanes);
}

// Starts to load `count` values from p on, which are needed soon.
template <class T>
PYLORA_INLINE void prefetch_row(const T* p, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(p + i, 0, 2);
}

// Computes `rows` rows of a tile of out = factors @ panel + bias + add, where `bias` and `add` may be
// null. `factors` has rows of kTileLd floats, in segments that are kSegmentFloats apart; `add` and
// `out` have rows of `ld` values, of which the tile covers `cols`.
template <class S, int V, class T>
__attribute__((noinline)) void expand_tile(int64_t depth, const float* factors, const float* panel,
                                           const float* bias, const T* add, T* out, int64_t ld,
                                           int64_t rows, int64_t cols) {
  using F = typename S::F;
  constexpr int I = S::rows_for(V);
  constexpr int L = S::kLanes;
  for (int64_t i = 0; i < I && i < rows; ++i) {
    if (add != nullptr) __builtin_prefetch(add + i * ld, 0, 3);
    __builtin_prefetch(out + i * ld, 1, 3);
  }
  F acc[I][V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const int64_t left = cols - v * L;
    const F first = bias == nullptr || left <= 0 ? S::zero()
                    : left >= L                  ? S::load(bias + v * L)
                                                 : S::load_n(bias + v * L, static_cast<int>(left));
#pragma GCC unroll 32
    for (int i = 0; i < I; ++i) acc[i][v] = first;
  }
  float finished[I * V * L];  // the sum of all chains but the last
  for (int64_t start = 0; start < depth; start += kAdapterChain, factors += kSegmentFloats) {
    if (start > 0) {
#pragma GCC unroll 32
      for (int i = 0; i < I; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          float* sum = finished + (i * V + v) * L;
          S::store(sum, start > kAdapterChain ? S::add(acc[i][v], S::load(sum)) : acc[i][v]);
          acc[i][v] = S::zero();
        }
      }
    }
    const int64_t count = depth - start < kAdapterChain ? depth - start : kAdapterChain;
    for (int64_t k = 0; k < count; ++k, panel += V * L) {
      F bv[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) bv[v] = S::load(panel + v * L);
#pragma GCC unroll 32
      for (int i = 0; i < I; ++i) {
        const F av = S::set1(factors[i * kTileLd + k]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[i][v] = S::fma(av, bv[v], acc[i][v]);
      }
    }
  }
  if (depth > kAdapterChain) {
#pragma GCC unroll 32
    for (int i = 0; i < I; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        acc[i][v] = S::add(acc[i][v], S::load(finished + (i * V + v) * L));
      }
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < I; ++i) {
    if (i >= rows) break;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const int64_t place = i * ld + v * L;
      if (cols - v * L >= L) {
        S::store(out + place, add == nullptr ? acc[i][v] : S::add(acc[i][v], S::load(add + place)));
      } else if (cols > v * L) {
        const int n = static_cast<int>(cols - v * L);
        S::store_n(out + place,
                   add == nullptr ? acc[i][v] : S::add(acc[i][v], S::load_n(add + place, n)), n);
      }
    }
  }
}

// What a thread keeps of a block of tokens.
template <class S>
struct AdapterBlock {
  static constexpr int64_t kWide = TokenTiles<S>::kWidth;
  float* values;   // [kWidenedTokens][kTileLd], a stretch of tokens in fp32
  float* sums;     // by tile of bottleneck features: [kAdapterTokens][features]
  float* second;   // another one
  float* factors;  // [kSegments][kAdapterTokens][kTileLd], what the second product broadcasts

  explicit AdapterBlock(float* workspace) : values(workspace) {
    sums = values + kWidenedTokens * kTileLd;
    second = sums + kAdapterTokens * kMaxBottleneck;
    factors = second + kAdapterTokens * kMaxBottleneck;
  }

  // out = x[tokens] @ panels, summed over `cols`; x points to the first token.
  template <class T>
  void shrink(const T* x, int64_t tokens, int64_t cols, const Panels<S>& panels, float* out) {
    for (int64_t k = 0; k < cols; k += panels.stretch) {
      const int64_t count = panels.count(k);
      for (int64_t first = 0; first < tokens; first += kWidenedTokens) {
        const int64_t left = tokens - first;
        const int64_t rows = left < kWidenedTokens ? left : kWidenedTokens;
        for (int64_t m = 0; m < rows; ++m) {
          const T* row = x + (first + m) * cols + k;
          if (m + kTokensAhead < left) prefetch_row(row + kTokensAhead * cols, count);
          widen_row<S>(row, count, values + m * kTileLd);
        }
        for (int64_t t = 0; t < panels.tiles.count(); ++t) {
          const int v = panels.tiles.vectors(t);
          const int64_t width = v * S::kLanes;
          float* sum = out + t * kWide * kAdapterTokens + first * width;
          for (int64_t i = 0; i < rows; i += S::rows_for(v)) {
            run_tile<Broadcast::kRowMajor>(F32Mac<S>{}, v, count, values + i * kTileLd, 0,
                                           panels.panel(k, t), sum + i * width, k > 0);
          }
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
    return factors[j / kAdapterChain * kSegmentFloats + m * kTileLd + j % kAdapterChain];
  }

  // out[tokens] = add + factors @ panels + bias; `add` and `bias` may be null. `add` and `out` point
  // to the first token and have `cols` columns.
  template <class T>
  void expand(const T* add, int64_t tokens, int64_t cols, const Panels<S>& panels,
              const float* bias, T* out) {
    const int64_t full = cols / kWide;  // tiles of kWide columns; at most one more is narrower
    const int64_t wanted = kStripFloats / (panels.depth * kWide);
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
  void expand_strip(const T* add, int64_t tokens, int64_t cols, const Panels<S>& panels,
                    const float* bias, T* out, int64_t begin, int64_t end) {
    constexpr int64_t kRows = S::rows_for(V);
    for (int64_t i = 0; i < tokens; i += kRows) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t col = t * kWide;
        const int64_t place = i * cols + col;
        expand_tile<S, V>(panels.depth, factors + i * kTileLd, panels.panel(0, t),
                          bias == nullptr ? nullptr : bias + col,
                          add == nullptr ? nullptr : add + place, out + place, cols, tokens - i,
                          panels.tiles.tokens_in(t));
      }
    }
  }

  // Calls visit(m, j, the sum of token m and bottleneck feature j) for each of them.
  template <class Visit>
  static void for_each_sum(const float* sums, const TokenTiles<S>& features, int64_t tokens,
                           const Visit& visit) {
    for (int64_t t = 0; t < features.count(); ++t) {
      const int64_t width = features.vectors(t) * S::kLanes;
      for (int64_t m = 0; m < tokens; ++m) {
        const float* row = sums + t * kWide * kAdapterTokens + m * width;
        for (int64_t j = 0; j < features.tokens_in(t); ++j) visit(m, t * kWide + j, row[j]);
      }
    }
  }
};

// Runs body(block, first token, tokens) for each block of tokens.
template <class S, class Body>
void for_each_block(int64_t all_tokens, const Body& body) {
  const int64_t share = ceil_div(all_tokens, num_threads());
  const int64_t size = ceil_div(share, ceil_div(share, kAdapterTokens));  // equal blocks
  parallel_for(0, ceil_div(all_tokens, size), 1, [&](int64_t begin, int64_t end) {
    AdapterBlock<S> block(thread_workspace());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * size;
      body(block, first, all_tokens - first < size ? all_tokens - first : size);
    }
  });
}

// scaling * act(h), and its derivative. The common ReLU needs no fp64.
PYLORA_INLINE float scaled_activation(const BottleneckArgs& args, float h) {
  if (args.activation == Activation::kRelu) return (h > 0.0f || h != h ? h : 0.0f) * args.scaling;
  return static_cast<float>(activate(args.activation, h) * args.scaling);
}
PYLORA_INLINE float scaled_slope(const BottleneckArgs& args, float h) {
  if (args.activation == Activation::kRelu) return h > 0.0f ? args.scaling : 0.0f;
  return static_cast<float>(activation_slope(args.activation, h) * args.scaling);
}

template <class S, class T, class TW>
void adapter_forward_as(const BottleneckArgs& args) {
  const int64_t hidden = args.hidden;
  const auto* x = static_cast<const T*>(args.x);
  const auto* residual = static_cast<const T*>(args.residual);
  const int64_t floats = packed_floats<S>(args);
  const CallMemory memory(static_cast<size_t>(2 * floats));
  const Panels<S> down = pack_weight<S>(static_cast<const TW*>(args.down), hidden, args.size, true,
                                        kAdapterChain, memory.data());
  const Panels<S> up = pack_weight<S>(static_cast<const TW*>(args.up), args.size, hidden, true,
                                      args.size, memory.data() + floats);
  for_each_block<S>(args.tokens, [&](AdapterBlock<S>& block, int64_t first, int64_t tokens) {
    const int64_t start = first * hidden;
    block.shrink(x + start, tokens, hidden, down, block.sums);
    block.for_each_sum(block.sums, down.tiles, tokens, [&](int64_t m, int64_t j, float sum) {
      const float h = args.down_bias != nullptr ? sum + args.down_bias[j] : sum;
      block.factor(m, j) = scaled_activation(args, h);
    });
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
  const int64_t floats = packed_floats<S>(args);
  const CallMemory memory(static_cast<size_t>(3 * floats));
  const Panels<S> shrinking =
      pack_weight<S>(down, hidden, args.size, true, kAdapterChain, memory.data());
  Panels<S> of_grad{}, of_dh{};
  if (dh != nullptr) {
    of_grad = pack_weight<S>(static_cast<const TW*>(args.up), hidden, args.size, false,
                             kAdapterChain, memory.data() + floats);
  }
  if (args.dx != nullptr) {
    of_dh = pack_weight<S>(down, args.size, hidden, false, args.size, memory.data() + 2 * floats);
  }
  for_each_block<S>(args.tokens, [&](AdapterBlock<S>& block, int64_t first, int64_t tokens) {
    const int64_t start = first * hidden;
    block.shrink(x + start, tokens, hidden, shrinking, block.sums);
    if (dh != nullptr) block.shrink(grad + start, tokens, hidden, of_grad, block.second);
    block.for_each_sum(block.sums, shrinking.tiles, tokens, [&](int64_t m, int64_t j, float sum) {
      const float h = args.down_bias != nullptr ? sum + args.down_bias[j] : sum;
      const int64_t place = (first + m) * args.size + j;
      if (low != nullptr) low[place] = scaled_activation(args, h);
      if (dh != nullptr) {
        const float da = block.sum_of(block.second, shrinking.tiles, m, j);
        dh[place] = block.factor(m, j) = scaled_slope(args, h) * da;
      }
    });
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
