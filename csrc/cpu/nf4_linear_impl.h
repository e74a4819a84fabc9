// nf4_linear.h for any number of tokens, as a template over the vector primitives.
//
// One task is a block of tokens times a block of outputs:
//   1. for each stretch of the sum: pack the tokens' values, then, for each panel of outputs,
//      decode W into the cache and multiply all tiles of tokens by it;
//   2. for each panel: add the low-rank term, likewise; add the bias; transpose, round and store.
#pragma once

#include <type_traits>

#include "cpu/gemm_pack.h"
#include "cpu/nf4_linear.h"
#include "cpu/nf4_panel.h"
#include "cpu/nf4_vector.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

namespace pylora::cpu {

inline constexpr int64_t kTokenBlock = 512;
// Columns of W decoded at a time: a multiple of every rows_for(v), and of kGroup.
inline constexpr int64_t kBackwardPanel = 96;
inline constexpr int64_t kFewTokens = 48;  // up to here a longer stretch of the sum fits the cache

// torch sums fp32 products in chains that are shorter, and so more accurate, than a stretch, the
// more so for few tokens; so must we. (bf16 products are exact in fp32, and bf16 outweighs the
// sum's rounding.)
inline constexpr int64_t kFewTokensChain = 32;
inline constexpr int64_t kManyTokensChain = 64;

// Parts of a thread's workspace, in floats; what they leave is for the sums. The more outputs a
// task has, the less often its tokens are packed.
struct WorkspaceParts {
  static constexpr int64_t kTotal = static_cast<int64_t>(kWorkspaceBytes / sizeof(float));
  static constexpr int64_t kPacked = kTokenBlock * kTileK / 2;
  int64_t panel;
  int64_t low_rank = 0;  // only where dropout needs the low-rank term apart
  int64_t factors = 0;

  WorkspaceParts(int64_t panel_outputs, bool masked) : panel(panel_outputs * kTileLd) {
    if (masked) {
      low_rank = kBackwardPanel * kTokenBlock;
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
  template <class M>
  static constexpr bool kByColumn = kBackward && !M::kRowMajorOnly;

  const LinearProblem& problem;
  int64_t row;   // first token
  int64_t out;   // first output
  int64_t outs;  // outputs of this task
  TokenTiles<S> tiles;
  float* packed;
  float* panel;
  float* low_rank;
  float* factors;
  float* sums;  // per tile of tokens: [outs, padded to panels][tokens]

  void run() {
    const int64_t padded = round_up(outs, kPanel);
    const int64_t depth = problem.depth();
    const int64_t tokens = tiles.padded();
    const int64_t elements = stretch_elements();
    const int64_t step = panel_width();
    const int64_t stretch = elements * Sums::kStep;
    // Few tokens: pack all of them first, then go through W row by row as it lies in memory.
    const bool whole = tokens * elements_of<Sums>(depth) <= WorkspaceParts::kPacked;
    if (whole) {
      for (int64_t k = 0; k < depth; k += stretch) pack(k, min(stretch, depth - k), whole);
      for (int64_t p = 0; p < outs; p += step) {
        for (int64_t k = 0; k < depth; k += stretch) {
          add_panel(p, min(step, outs - p), padded, k, min(stretch, depth - k), whole);
        }
      }
    } else {
      for (int64_t k = 0; k < depth; k += stretch) {
        pack(k, min(stretch, depth - k), whole);
        for (int64_t p = 0; p < outs; p += step) {
          add_panel(p, min(step, outs - p), padded, k, min(stretch, depth - k), whole);
        }
      }
    }
    if (problem.low != nullptr && problem.rank <= kTileK / 2) pack_low(0, problem.rank);
    for (int64_t p = 0; p < outs; p += kPanel) {
      finish(p, min(kPanel, outs - p), padded, depth > 0);
    }
  }

  // A panel that only one tile of tokens will read should not leave the first-level cache.
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
    const int64_t depth = problem.depth();
    const T* x = static_cast<const T*>(problem.x) + row * depth + k;
    pack_tokens<S, Mac>(x, depth, tiles, count, packed_at(k, whole));
  }

  // Sums of outputs p .. over one stretch.
  void add_panel(int64_t p, int64_t width, int64_t padded, int64_t k, int64_t count, bool whole) {
    if constexpr (kBackward) {
      decode_panel_t(Sums{}, problem.weight, k, count, out + p, width, panel, kPanel);
    } else {
      // Next comes the next stretch of these rows, or this stretch of the rows below.
      const int64_t cols = problem.weight.cols;
      const int64_t ahead = (!whole             ? width * cols
                             : k + count < cols ? count
                                                : width * cols - k) /
                            2;
      decode_panel(Sums{}, problem.weight, out + p, width, k, count, ahead, panel);
    }
    multiply<Mac>(packed_at(k, whole), elements_of<Sums>(count), width, sums, padded, p, k > 0);
  }

  // All tiles of tokens times the panel, into outputs p .. p + width of `target`, which holds
  // `height` outputs a tile.
  template <template <class> class M>
  void multiply(const float* from, int64_t elements, int64_t width, float* target, int64_t height,
                int64_t p, bool accumulate) {
    const int64_t chain = M<S>::kStep > 1            ? kTileK
                          : tiles.rows <= kFewTokens ? kFewTokensChain
                                                     : kManyTokensChain;
    for (int64_t t = 0; t < tiles.count(); ++t) {
      const int v = tiles.vectors(t);
      const int64_t tokens = v * S::kLanes;
      const int step = M<S>::rows_for(v);
      float* c = target + tiles.offset(t, height) + p * tokens;
      const float* b = from + tiles.offset(t, elements);
      for (int64_t i = 0; i < width; i += step) {
        const float* a = panel + (kByColumn<M<S>> ? i : i * kTileLd);
        for (int64_t k = 0; k < elements; k += chain) {
          run_tile<kByColumn<M<S>> ? Broadcast::kColMajor : Broadcast::kRowMajor>(
              M<S>{}, v, elements - k < chain ? elements - k : chain,
              a + (kByColumn<M<S>> ? k * kPanel : k), kPanel, b + k * tokens, c + i * tokens,
              accumulate || k > 0);
        }
      }
    }
  }

  void pack_low(int64_t first, int64_t count) {
    pack_tokens<S, F32Mac>(problem.low + row * problem.rank + first, problem.rank, tiles, count,
                           packed);
  }

  // Outputs p .. p + width: the low-rank term, the bias, and out.
  void finish(int64_t p, int64_t width, int64_t padded, bool summed) {
    const bool masked = problem.low != nullptr && problem.dropout.enabled;
    if (problem.low != nullptr) {
      for (int64_t r = 0; r < problem.rank; r += kTileK / 2) {
        const int64_t count = min(kTileK / 2, problem.rank - r);
        if (problem.rank > kTileK / 2) pack_low(r, count);
        load_adapter(p, width, r, count);
        if (masked) {
          multiply<F32Mac>(packed, count, width, low_rank, kPanel, 0, r > 0);
        } else {
          multiply<F32Mac>(packed, count, width, sums, padded, p, summed || r > 0);
        }
      }
    }
    const int64_t total = problem.width();
    const float* bias = problem.bias != nullptr ? problem.bias + out + p : nullptr;
    for (int64_t t = 0; t < tiles.count(); ++t) {
      const int v = tiles.vectors(t);
      const int64_t rows = tiles.rows_in(t);
      const int64_t first = (row + t * tiles.kWidth) * total + out + p;
      if (masked) {
        for (int64_t m = 0; m < rows; ++m) {
          dropout_factors<S>(problem.dropout, first + m * total, width, factors + m * width);
        }
      }
      float* c = sums + tiles.offset(t, padded) + p * v * S::kLanes;
      write_tile<S>(c, v, rows, width, bias, masked ? low_rank + tiles.offset(t, kPanel) : nullptr,
                    factors, static_cast<T*>(problem.y) + first, total);
    }
  }

  // The adapter's part of the panel, as fp32, in the panel's own order.
  void load_adapter(int64_t p, int64_t width, int64_t r, int64_t count) {
    visit_dtype(problem.adapter_dtype, [&](auto element) {
      const auto* adapter = static_cast<const decltype(element)*>(problem.adapter);
      if constexpr (kBackward) {
        for (int64_t i = 0; i < count; ++i) {
          widen_row<S>(adapter + (r + i) * problem.width() + out + p, width, panel + i * kPanel);
        }
      } else {
        for (int64_t i = 0; i < width; ++i) {
          widen_row<S>(adapter + (out + p + i) * problem.rank + r, count, panel + i * kTileLd);
        }
      }
    });
  }
};

template <class S, template <class> class Mac, class T, bool kBackward>
void run_panels(const LinearProblem& problem) {
  using Task = LinearTask<S, Mac, T, kBackward>;
  const int64_t row_blocks = ceil_div(problem.rows, kTokenBlock);
  const int64_t rows =
      round_up(ceil_div(problem.rows, row_blocks), row_blocks > 1 ? TokenTiles<S>::kWidth : 1);
  const int64_t width = problem.width();
  const WorkspaceParts parts(Task::kPanel, problem.low != nullptr && problem.dropout.enabled);
  const int64_t most = parts.sums() / TokenTiles<S>{rows}.padded() / Task::kPanel * Task::kPanel;
  const int64_t panels = ceil_div(width, Task::kPanel);
  int64_t out_blocks = ceil_div(width, most);
  // An even share for every thread, where there are enough panels.
  while (row_blocks * out_blocks % num_threads() != 0 && out_blocks < panels) ++out_blocks;
  const int64_t outs = round_up(ceil_div(width, out_blocks), Task::kPanel);
  out_blocks = ceil_div(width, outs);

  parallel_for(0, row_blocks * out_blocks, 1, [&](int64_t begin, int64_t end) {
    float* memory = thread_workspace();
    [[maybe_unused]] const typename Mac<S>::Scope scope;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % row_blocks * rows;
      const int64_t out = i / row_blocks * outs;
      if (row >= problem.rows) continue;
      Task task{
          problem,
          row,
          out,
          width - out < outs ? width - out : outs,
          TokenTiles<S>{problem.rows - row < rows ? problem.rows - row : rows},
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
void run_linear_as(const LinearProblem& problem) {
  if (problem.rows == 0 || problem.width() == 0) return;
  if (problem.backward) {
    run_panels<S, Mac, T, true>(problem);
  } else if (!run_vector<S, Mac, T>(problem)) {
    run_panels<S, Mac, T, false>(problem);
  }
}

}  // namespace pylora::cpu
