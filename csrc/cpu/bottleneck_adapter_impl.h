// The passes of a bottleneck adapter over its blocks of tokens (bottleneck_adapter.h), as templates
// over the vector primitives and over the products of gemm_tile.h.
#pragma once

#include <algorithm>

#include "cpu/bottleneck_adapter_block.h"
#include "cpu/bottleneck_adapter_rows.h"

namespace pylora::cpu {

// What a product adds if it adds nothing. The bias of z comes behind the product, because a large one
// would make every addition of the product round more.
inline constexpr const float* kNone = nullptr;

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

// Sets what the second product broadcasts to low, from the sums of h. Unless `low` is null, low is
// also written there, to the rows from `first` on.
template <class S, template <class> class Mac>
void set_low(const BottleneckArgs& args, const TokenTiles<S>& features, int64_t first,
             int64_t tokens, AdapterBlock<S, Mac>& block, float* low) {
  block.for_each_row(features, tokens, [&](int64_t m, int64_t j, int64_t n, int64_t at) {
    float row[AdapterBlock<S, Mac>::kWide] = {};
    for (int64_t i = 0; i < n; ++i) row[i] = with_bias(args, block.sums[at + i], j + i);
    scale_activation<S>(args, n, row);
    block.set_factors(m, j, n, args.size, row);
    if (low != nullptr) std::copy_n(row, n, low + (first + m) * args.size + j);
  });
}

template <class S, template <class> class Mac, class T, class TW>
void adapter_forward_as(const BottleneckArgs& args) {
  const int64_t hidden = args.hidden;
  const auto* x = static_cast<const T*>(args.x);
  const auto* residual = static_cast<const T*>(args.residual);
  const TokenBlocks blocks = cut_tokens(args.tokens, 1);
  const BlockRowsLayout<TW> layout{blocks.size * hidden, args.changes_z(),
                                   args.norm_before.enabled(), false};
  const int64_t floats = packed_floats<S>(args);
  const CallMemory memory(static_cast<size_t>(2 * floats + blocks.ranges * layout.floats()));
  const Panels<S, Mac> down =
      pack_weight<S, Mac>(static_cast<const TW*>(args.down), hidden, args.size, true,
                          kAdapterChain * Mac<S>::kStep, memory.data());
  const Panels<S, Mac> up = pack_weight<S, Mac>(static_cast<const TW*>(args.up), args.size, hidden,
                                                true, args.size, memory.data() + floats);
  using Block = AdapterBlock<S, Mac>;
  for_each_block<S, Mac>(blocks, [&](Block& block, int64_t range, int64_t first, int64_t tokens) {
    const int64_t start = first * hidden;
    const BlockRows<TW> rows = layout.at(memory.data() + 2 * floats + range * layout.floats());
    if (args.norm_before.enabled()) {
      RowStatistics statistics[kAdapterTokens];
      normalize_rows<S>(args.norm_before, x + start, tokens, hidden, statistics, rows.n);
      block.shrink(rows.n, tokens, hidden, down, block.sums);
    } else {
      block.shrink(x + start, tokens, hidden, down, block.sums);
    }
    set_low(args, down.tiles, first, tokens, block, nullptr);
    const T* add = residual != nullptr ? residual + start : nullptr;
    T* y = static_cast<T*>(args.y) + start;
    if (args.changes_z()) {
      block.expand(kNone, tokens, hidden, up, kNone, rows.z);
      write_y<S>(args, first, tokens, rows.z, add, y);
    } else {
      block.expand(add, tokens, hidden, up, args.up_bias, y);
    }
  });
}

template <class S, template <class> class Mac, class T, class TW>
void adapter_backward_as(const BottleneckArgs& args, const BackwardBuffers& buffers) {
  const int64_t hidden = args.hidden;
  const auto* x = static_cast<const T*>(args.x);
  const auto* grad = static_cast<const T*>(args.grad);
  const auto* down = static_cast<const TW*>(args.down);
  const auto* up = static_cast<const TW*>(args.up);
  const bool norm_before = args.norm_before.enabled(), norm_after = args.norm_after.enabled();
  const bool wants_dh = buffers.dh != nullptr;
  const bool writes_dz = norm_after || (args.dropout.enabled && wants_dh);
  const bool wants_dn = args.dx != nullptr || buffers.before_parts != nullptr;

  const bool has_parts = buffers.before_parts != nullptr || buffers.after_parts != nullptr;
  const TokenBlocks blocks = cut_tokens(args.tokens, has_parts ? kSumTokens : 1);
  const BlockRowsLayout<TW> layout{blocks.size * hidden, writes_dz || (norm_before && wants_dn),
                                   norm_before && buffers.n == nullptr,
                                   writes_dz && buffers.dz == nullptr};
  const int64_t floats = packed_floats<S>(args), stretch = kAdapterChain * Mac<S>::kStep;
  const int64_t weights = norm_after ? 4 : 3;
  const CallMemory memory(static_cast<size_t>(weights * floats + blocks.ranges * layout.floats()));
  float* row_memory = memory.data() + weights * floats;
  const Panels<S, Mac> shrinking =
      pack_weight<S, Mac>(down, hidden, args.size, true, stretch, memory.data());
  Panels<S, Mac> of_dz{}, of_dh{}, expanding{};
  if (wants_dh) {
    of_dz = pack_weight<S, Mac>(up, hidden, args.size, false, stretch, memory.data() + floats);
  }
  if (wants_dn) {
    of_dh =
        pack_weight<S, Mac>(down, args.size, hidden, false, args.size, memory.data() + 2 * floats);
  }
  if (norm_after) {
    expanding =
        pack_weight<S, Mac>(up, args.size, hidden, true, args.size, memory.data() + 3 * floats);
  }
  using Block = AdapterBlock<S, Mac>;
  for_each_block<S, Mac>(blocks, [&](Block& block, int64_t range, int64_t first, int64_t tokens) {
    const int64_t start = first * hidden;
    BlockRows<TW> rows = layout.at(row_memory + range * layout.floats());
    if (buffers.n != nullptr) rows.n = static_cast<TW*>(buffers.n) + start;
    if (buffers.dz != nullptr) rows.dz = static_cast<TW*>(buffers.dz) + start;

    // 1. The sums of h.
    RowStatistics statistics[kAdapterTokens];
    if (norm_before) {
      normalize_rows<S>(args.norm_before, x + start, tokens, hidden, statistics, rows.n);
      block.shrink(rows.n, tokens, hidden, shrinking, block.sums);
    } else {
      block.shrink(x + start, tokens, hidden, shrinking, block.sums);
    }

    // 2. dz, and the sums of dh.
    if (norm_after) {
      set_low(args, shrinking.tiles, first, tokens, block, buffers.low);
      block.expand(kNone, tokens, hidden, expanding, kNone, rows.z);
    }
    if (writes_dz) {
      write_dz<S>(args, first, tokens, rows.z, grad + start, buffers.after_parts, rows.dz);
      if (wants_dh) block.shrink(rows.dz, tokens, hidden, of_dz, block.second);
    } else if (wants_dh) {
      block.shrink(grad + start, tokens, hidden, of_dz, block.second);
    }

    // 3. low and dh.
    block.for_each_row(shrinking.tiles, tokens, [&](int64_t m, int64_t j, int64_t n, int64_t at) {
      const int64_t place = (first + m) * args.size + j;
      float h[Block::kWide] = {}, slope[Block::kWide] = {};
      for (int64_t i = 0; i < n; ++i) slope[i] = h[i] = with_bias(args, block.sums[at + i], j + i);
      if (wants_dh) {
        scale_slope<S>(args, n, slope);
        for (int64_t i = 0; i < n; ++i) slope[i] *= block.second[at + i];
        std::copy_n(slope, n, buffers.dh + place);
        block.set_factors(m, j, n, args.size, slope);
      }
      if (buffers.low != nullptr && !norm_after) {
        scale_activation<S>(args, n, h);
        std::copy_n(h, n, buffers.low + place);
      }
    });

    // 4. dx.
    if (norm_before && wants_dn) {
      block.expand(kNone, tokens, hidden, of_dh, kNone, rows.z);
      write_dx<S, T>(args, first, tokens, statistics, rows.z, buffers.before_parts);
    } else if (wants_dn) {
      block.expand(args.adds_x ? grad + start : nullptr, tokens, hidden, of_dh, kNone,
                   static_cast<T*>(args.dx) + start);
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
void adapter_backward_on(const BottleneckArgs& args, const BackwardBuffers& buffers) {
  visit_dtype(args.dtype, [&](auto token) {
    visit_dtype(args.weight_dtype, [&](auto weight) {
      adapter_backward_as<S, F32Mac, decltype(token), decltype(weight)>(args, buffers);
    });
  });
}

// The kernels of bf16 products, which take only bf16.
template <class S, template <class> class Mac>
void adapter_forward_bf16(const BottleneckArgs& args) {
  adapter_forward_as<S, Mac, BFloat16, BFloat16>(args);
}
template <class S, template <class> class Mac>
void adapter_backward_bf16(const BottleneckArgs& args, const BackwardBuffers& buffers) {
  adapter_backward_as<S, Mac, BFloat16, BFloat16>(args, buffers);
}

}  // namespace pylora::cpu
