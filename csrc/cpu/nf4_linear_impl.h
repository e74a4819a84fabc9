// nf4_linear.h for any number of tokens, as a template over the vector primitives.
//
// A task is a batch of tokens times a share of the outputs:
//   1. For each stretch of the sum, pack the tokens' values. For each panel of outputs, decode W
//      into the cache and multiply all tiles of tokens by it.
//   2. For each panel, add the low-rank term in the same way, add the bias, transpose, round and
//      store.
#pragma once

#include <type_traits>

#include "cpu/gemm_pack.h"
#include "cpu/nf4_linear.h"
#include "cpu/nf4_linear_small_m.h"
#include "cpu/nf4_panel.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

namespace pylora::cpu {

inline constexpr int64_t kTokenBatch = 512;
// How many columns of W the backward decodes at a time: a multiple of every rows_for(v) and of
// kGroup.
inline constexpr int64_t kBackwardPanel = 96;
inline constexpr int64_t kFewTokens =
    48;  // up to so many, a longer stretch of the sum fits the cache

// Torch sums fp32 products in chains that are shorter than a stretch, and so more accurate, above
// all for few tokens. To be as accurate, a sum here runs in chains of so many products, which are
// then added. bf16 needs none: its products are exact in fp32, and rounding to bf16 outweighs the
// rounding of the sum.
inline constexpr int64_t kFewTokensChain = 32;
inline constexpr int64_t kManyTokensChain = 64;

// The parts of a thread's workspace, in floats. The sums get what the other parts leave: the more
// outputs a task has, the less often its tokens are packed.
struct WorkspaceParts {
  static constexpr int64_t kTotal = static_cast<int64_t>(kWorkspaceBytes / sizeof(float));
  static constexpr int64_t kPacked = kTokenBatch * kTileK / 2;
  int64_t panel;
  int64_t low_rank = 0;  // only if dropout needs the low-rank term apart
  int64_t factors = 0;

  WorkspaceParts(int64_t panel_outputs, bool masked) : panel(panel_outputs * kTileLd) {
    if (masked) {
      low_rank = kBackwardPanel * kTokenBatch;
      factors = kBackwardPanel * 64;
    }
  }
  int64_t sums() const { return kTotal - kPacked - panel - low_rank - factors; }
};
static_assert(kFewTokens * kTileK <= WorkspaceParts::kPacked);

template <class S, template <class> class Mac, class T, bool kBackward>
struct LinearTask {
  using Sums = Mac<S>;
  static constexpr int64_t kPanel = kBackward ? kBackwardPanel : Sums::kForwardPanel;
  static constexpr int64_t kRanks = kTileK / 2;  // so many meet a panel at a time
  template <class M>
  static constexpr bool kByColumn = kBackward && !M::kRowMajorOnly;

  const NF4LinearArgs& args;
  int64_t first_token;
  int64_t first_output;
  int64_t outputs;  // how many
  TokenTiles<S> tiles;
  float* packed;
  float* panel;
  float* low_rank;
  float* factors;
  float* sums;  // per tile of tokens: [outputs, padded to panels][tokens]

  void run() {
    const int64_t padded = round_up(outputs, kPanel);
    const int64_t depth = args.depth();
    const int64_t tokens = tiles.padded();
    const int64_t elements = stretch_elements();
    const int64_t step = panel_width();
    const int64_t stretch = elements * Sums::kStep;
    // If all of the tokens' values fit, pack them first, and then read W row by row, as it lies in
    // memory.
    const bool whole = tokens * elements_of<Sums>(depth) <= WorkspaceParts::kPacked;
    if (whole) {
      for (int64_t k = 0; k < depth; k += stretch) pack(k, min(stretch, depth - k), whole);
      for (int64_t p = 0; p < outputs; p += step) {
        for (int64_t k = 0; k < depth; k += stretch) {
          add_panel(p, min(step, outputs - p), padded, k, min(stretch, depth - k), whole);
        }
      }
    } else {
      for (int64_t k = 0; k < depth; k += stretch) {
        pack(k, min(stretch, depth - k), whole);
        for (int64_t p = 0; p < outputs; p += step) {
          add_panel(p, min(step, outputs - p), padded, k, min(stretch, depth - k), whole);
        }
      }
    }
    if constexpr (Sums::kStep == 2) {
      if (args.adapter_dtype == DType::kBFloat16) return finish_panels<Mac>(padded);
    }
    finish_panels<F32Mac>(padded);
  }

  // How many elements of the sum are taken at a time. A panel that only one tile of tokens reads
  // should stay in the first-level cache.
  int64_t stretch_elements() const {
    constexpr int64_t kShort = kByColumn<Sums> ? kTileK / 4 : kTileK / 2;
    if (tiles.count() == 1) return kShort;
    return tiles.padded() * kTileK <= WorkspaceParts::kPacked ? kTileK : kShort;
  }
  int64_t panel_width() const {
    return tiles.count() == 1 && !kBackward ? Sums::rows_for(tiles.vectors(0)) : kPanel;
  }

  PYLORA_INLINE static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

  float* packed_at(int64_t k, bool whole) {
    return packed + (whole ? tiles.padded() * (k / Sums::kStep) : 0);
  }

  void pack(int64_t k, int64_t count, bool whole) {
    const int64_t depth = args.depth();
    const T* x = static_cast<const T*>(args.x) + first_token * depth + k;
    pack_tokens<S, Mac>(x, depth, tiles, count, packed_at(k, whole));
  }

  // 1. Adds one stretch to the sums of outputs p .. p + width.
  void add_panel(int64_t p, int64_t width, int64_t padded, int64_t k, int64_t count, bool whole) {
    if constexpr (kBackward) {
      decode_panel_t(Sums{}, args.weight, k, count, first_output + p, width, panel, kPanel);
    } else {
      // What is read next is the next stretch of these rows, or this stretch of the rows below.
      const int64_t cols = args.weight.cols;
      const int64_t ahead = (!whole             ? width * cols
                             : k + count < cols ? count
                                                : width * cols - k) /
                            2;
      decode_panel(Sums{}, args.weight, first_output + p, width, k, count, ahead, panel);
    }
    multiply<Mac>(packed_at(k, whole), elements_of<Sums>(count), width, sums, padded, p, k > 0);
  }

  // Multiplies all tiles of tokens by the panel, into outputs p .. p + width of `target`, which
  // holds `height` outputs for each tile.
  template <template <class> class M>
  void multiply(const float* from, int64_t elements, int64_t width, float* target, int64_t height,
                int64_t p, bool accumulate) {
    const int64_t chain = M<S>::kStep > 1              ? M<S>::kChain
                          : tiles.tokens <= kFewTokens ? kFewTokensChain
                                                       : kManyTokensChain;
    for (int64_t t = 0; t < tiles.count(); ++t) {
      const int v = tiles.vectors(t);
      const int64_t tokens = v * S::kLanes;
      const int step = M<S>::rows_for(v);
      float* c = target + tiles.offset(t, height) + p * tokens;
      const float* b = from + tiles.offset(t, elements);
      // The innermost loop reuses a chain of the tokens (kChainFirst) or of the panel.
      const auto add_chain = [&](int64_t i, int64_t k) {
        const float* a = panel + (kByColumn<M<S>> ? i + k * kPanel : i * kTileLd + k);
        run_tile<kByColumn<M<S>> ? Broadcast::kColMajor : Broadcast::kRowMajor>(
            M<S>{}, v, elements - k < chain ? elements - k : chain, a, kPanel, b + k * tokens,
            c + i * tokens, accumulate || k > 0);
      };
      if constexpr (M<S>::kChainFirst) {
        for (int64_t k = 0; k < elements; k += chain) {
          for (int64_t i = 0; i < width; i += step) add_chain(i, k);
        }
      } else {
        for (int64_t i = 0; i < width; i += step) {
          for (int64_t k = 0; k < elements; k += chain) add_chain(i, k);
        }
      }
    }
  }

  // 2. Completes and stores all outputs. LowMac multiplies the low-rank term.
  template <template <class> class LowMac>
  void finish_panels(int64_t padded) {
    if (args.low != nullptr && args.rank <= kRanks) pack_low<LowMac>(0, args.rank);
    for (int64_t p = 0; p < outputs; p += kPanel) {
      finish<LowMac>(p, min(kPanel, outputs - p), padded, args.depth() > 0);
    }
  }

  template <template <class> class LowMac>
  void pack_low(int64_t first, int64_t count) {
    pack_tokens<S, LowMac>(args.low + first_token * args.rank + first, args.rank, tiles, count,
                           packed);
  }

  // Outputs p .. p + width.
  template <template <class> class LowMac>
  void finish(int64_t p, int64_t width, int64_t padded, bool summed) {
    const bool masked = args.low != nullptr && args.dropout.enabled;
    if (args.low != nullptr) {
      for (int64_t r = 0; r < args.rank; r += kRanks) {
        const int64_t count = min(kRanks, args.rank - r);
        if (args.rank > kRanks) pack_low<LowMac>(r, count);
        load_adapter<LowMac>(p, width, r, count);
        const int64_t elements = elements_of<LowMac<S>>(count);
        if (masked) {
          multiply<LowMac>(packed, elements, width, low_rank, kPanel, 0, r > 0);
        } else {
          multiply<LowMac>(packed, elements, width, sums, padded, p, summed || r > 0);
        }
      }
    }
    const int64_t total = args.width();
    const float* bias = args.bias != nullptr ? args.bias + first_output + p : nullptr;
    for (int64_t t = 0; t < tiles.count(); ++t) {
      const int v = tiles.vectors(t);
      const int64_t tokens = tiles.tokens_in(t);
      const int64_t first = (first_token + t * tiles.kWidth) * total + first_output + p;
      if (masked) {
        for (int64_t m = 0; m < tokens; ++m) {
          dropout_factors<S>(args.dropout, first + m * total, width, factors + m * width);
        }
      }
      float* c = sums + tiles.offset(t, padded) + p * v * S::kLanes;
      write_tile<S>(c, v, tokens, width, bias,
                    masked ? low_rank + tiles.offset(t, kPanel) : nullptr, factors,
                    static_cast<T*>(args.y) + first, total);
    }
  }

  // Loads the adapter's part that meets the panel, in the panel's own order.
  template <template <class> class LowMac>
  void load_adapter(int64_t p, int64_t width, int64_t r, int64_t count) {
    const auto load = [&](auto element) {
      const auto* adapter = static_cast<const decltype(element)*>(args.adapter);
      if constexpr (kBackward) {
        copy_panel_t(LowMac<S>{}, adapter + r * args.width() + first_output + p, args.width(),
                     count, width, panel, kPanel);
      } else {
        for (int64_t i = 0; i < width; ++i) {
          copy_row<S, LowMac>(adapter + (first_output + p + i) * args.rank + r, count,
                              panel + i * kTileLd);
        }
      }
    };
    if constexpr (LowMac<S>::kStep == 2) {
      load(BFloat16{});
    } else {
      visit_dtype(args.adapter_dtype, load);
    }
  }
};

template <class S, template <class> class Mac, class T, bool kBackward>
void run_panels(const NF4LinearArgs& args) {
  using Task = LinearTask<S, Mac, T, kBackward>;
  const int64_t token_batches = ceil_div(args.tokens, kTokenBatch);
  const int64_t tokens =
      round_up(ceil_div(args.tokens, token_batches), token_batches > 1 ? TokenTiles<S>::kWidth : 1);
  const int64_t width = args.width();
  const WorkspaceParts parts(Task::kPanel, args.low != nullptr && args.dropout.enabled);
  const int64_t most = parts.sums() / TokenTiles<S>{tokens}.padded() / Task::kPanel * Task::kPanel;
  const int64_t panels = ceil_div(width, Task::kPanel);
  int64_t out_shares = ceil_div(width, most);
  // Every thread gets the same number of tasks, if there are enough panels.
  while (token_batches * out_shares % num_threads() != 0 && out_shares < panels) ++out_shares;
  const int64_t outputs = round_up(ceil_div(width, out_shares), Task::kPanel);
  out_shares = ceil_div(width, outputs);

  parallel_for(0, token_batches * out_shares, 1, [&](int64_t begin, int64_t end) {
    float* memory = thread_workspace();
    [[maybe_unused]] const typename Mac<S>::Scope scope;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first_token = i % token_batches * tokens;
      const int64_t first_output = i / token_batches * outputs;
      if (first_token >= args.tokens) continue;
      Task task{
          args,
          first_token,
          first_output,
          width - first_output < outputs ? width - first_output : outputs,
          TokenTiles<S>{args.tokens - first_token < tokens ? args.tokens - first_token : tokens},
          memory,
          memory + parts.kPacked,
          memory + parts.kPacked + parts.panel,
          memory + parts.kPacked + parts.panel + parts.low_rank,
          memory + parts.kTotal - parts.sums(),
      };
      task.run();
    }
  });
}

template <class S, template <class> class Mac, class T>
void run_linear_as(const NF4LinearArgs& args) {
  if (args.tokens == 0 || args.width() == 0) return;
  if (args.backward) {
    run_panels<S, Mac, T, true>(args);
  } else if (!run_small_m<S, Mac, T>(args)) {
    run_panels<S, Mac, T, false>(args);
  }
}

}  // namespace pylora::cpu
