// The blocks of tokens of a bottleneck adapter (bottleneck_adapter.h), as templates over the vector
// primitives and over the products of gemm_tile.h.
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
  static_assert(kAdapterTokens % kCopied == 0);
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
            for (int64_t c = 0; c < elements; c += kShrinkChain) {
              run_tile<Broadcast::kRowMajor>(
                  Mac<S>{}, v, elements - c < kShrinkChain ? elements - c : kShrinkChain,
                  values + i * kTileLd + c, 0, panels.panel(k, t) + c * width, sum + i * width,
                  k + c > 0);
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

// Runs body(block, first token, tokens) for each block of tokens.
template <class S, template <class> class Mac, class Body>
void for_each_block(int64_t all_tokens, const Body& body) {
  const int64_t share = ceil_div(all_tokens, num_threads());
  const int64_t size = ceil_div(share, ceil_div(share, kAdapterTokens));  // equal blocks
  parallel_for(0, ceil_div(all_tokens, size), 1, [&](int64_t begin, int64_t end) {
    AdapterBlock<S, Mac> block(thread_workspace());
    [[maybe_unused]] const typename Mac<S>::Scope scope;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * size;
      body(block, first, all_tokens - first < size ? all_tokens - first : size);
    }
  });
}

PYLORA_INLINE float with_bias(const BottleneckArgs& args, float sum, int64_t feature) {
  return args.down_bias != nullptr ? sum + args.down_bias[feature] : sum;
}
// row = scaling * act(row), or its derivative. The common ReLU needs no fp64.
template <class S>
void scale_activation(const BottleneckArgs& args, int64_t n, float* row) {
  if (args.activation == Activation::kRelu) {
    for (int64_t i = 0; i < n; ++i) row[i] = (row[i] <= 0.0f ? 0.0f : row[i]) * args.scaling;
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    row[i] = static_cast<float>(activate(args.activation, row[i]) * args.scaling);
  }
}
template <class S>
void scale_slope(const BottleneckArgs& args, int64_t n, float* row) {
  if (args.activation == Activation::kRelu) {
    for (int64_t i = 0; i < n; ++i) row[i] = row[i] > 0.0f ? args.scaling : 0.0f;
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    row[i] = static_cast<float>(activation_slope(args.activation, row[i]) * args.scaling);
  }
}

template <class S, template <class> class Mac, class T, class TW>
void adapter_forward_as(const BottleneckArgs& args) {
  const int64_t hidden = args.hidden;
  const auto* x = static_cast<const T*>(args.x);
  const auto* residual = static_cast<const T*>(args.residual);
  const int64_t floats = packed_floats<S>(args);
  const CallMemory memory(static_cast<size_t>(2 * floats));
  const Panels<S, Mac> down =
      pack_weight<S, Mac>(static_cast<const TW*>(args.down), hidden, args.size, true,
                          kAdapterChain * Mac<S>::kStep, memory.data());
  const Panels<S, Mac> up = pack_weight<S, Mac>(static_cast<const TW*>(args.up), args.size, hidden,
                                                true, args.size, memory.data() + floats);
  using Block = AdapterBlock<S, Mac>;
  for_each_block<S, Mac>(args.tokens, [&](Block& block, int64_t first, int64_t tokens) {
    const int64_t start = first * hidden;
    block.shrink(x + start, tokens, hidden, down, block.sums);
    block.for_each_row(down.tiles, tokens, [&](int64_t m, int64_t j, int64_t n, int64_t at) {
      float row[Block::kWide] = {};
      for (int64_t i = 0; i < n; ++i) row[i] = with_bias(args, block.sums[at + i], j + i);
      scale_activation<S>(args, n, row);
      block.set_factors(m, j, n, args.size, row);
    });
    block.expand(residual != nullptr ? residual + start : nullptr, tokens, hidden, up, args.up_bias,
                 static_cast<T*>(args.y) + start);
  });
}

template <class S, template <class> class Mac, class T, class TW>
void adapter_backward_as(const BottleneckArgs& args, float* low, float* dh) {
  const int64_t hidden = args.hidden;
  const auto* x = static_cast<const T*>(args.x);
  const auto* grad = static_cast<const T*>(args.grad);
  const auto* down = static_cast<const TW*>(args.down);
  const int64_t floats = packed_floats<S>(args);
  const CallMemory memory(static_cast<size_t>(3 * floats));
  const Panels<S, Mac> shrinking = pack_weight<S, Mac>(
      down, hidden, args.size, true, kAdapterChain * Mac<S>::kStep, memory.data());
  Panels<S, Mac> of_grad{}, of_dh{};
  if (dh != nullptr) {
    of_grad = pack_weight<S, Mac>(static_cast<const TW*>(args.up), hidden, args.size, false,
                                  kAdapterChain * Mac<S>::kStep, memory.data() + floats);
  }
  if (args.dx != nullptr) {
    of_dh =
        pack_weight<S, Mac>(down, args.size, hidden, false, args.size, memory.data() + 2 * floats);
  }
  using Block = AdapterBlock<S, Mac>;
  for_each_block<S, Mac>(args.tokens, [&](Block& block, int64_t first, int64_t tokens) {
    const int64_t start = first * hidden;
    block.shrink(x + start, tokens, hidden, shrinking, block.sums);
    if (dh != nullptr) block.shrink(grad + start, tokens, hidden, of_grad, block.second);
    block.for_each_row(shrinking.tiles, tokens, [&](int64_t m, int64_t j, int64_t n, int64_t at) {
      const int64_t place = (first + m) * args.size + j;
      float h[Block::kWide] = {}, slope[Block::kWide] = {};
      for (int64_t i = 0; i < n; ++i) slope[i] = h[i] = with_bias(args, block.sums[at + i], j + i);
      if (dh != nullptr) {
        scale_slope<S>(args, n, slope);
        for (int64_t i = 0; i < n; ++i) slope[i] *= block.second[at + i];
        std::copy_n(slope, n, dh + place);
        block.set_factors(m, j, n, args.size, slope);
      }
      if (low != nullptr) {
        scale_activation<S>(args, n, h);
        std::copy_n(h, n, low + place);
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
      adapter_forward_as<S, F32Mac, decltype(token), decltype(weight)>(args);
    });
  });
}

template <class S>
void adapter_backward_on(const BottleneckArgs& args, float* low, float* dh) {
  visit_dtype(args.dtype, [&](auto token) {
    visit_dtype(args.weight_dtype, [&](auto weight) {
      adapter_backward_as<S, F32Mac, decltype(token), decltype(weight)>(args, low, dh);
    });
  });
}

// The kernels of bf16 products, which take only bf16.
template <class S, template <class> class Mac>
void adapter_forward_bf16(const BottleneckArgs& args) {
  adapter_forward_as<S, Mac, BFloat16, BFloat16>(args);
}
template <class S, template <class> class Mac>
void adapter_backward_bf16(const BottleneckArgs& args, float* low, float* dh) {
  adapter_backward_as<S, Mac, BFloat16, BFloat16>(args, low, dh);
}

}  // namespace pylora::cpu
