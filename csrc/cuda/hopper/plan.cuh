#pragma once

#include <cstdint>

namespace pylora::cuda {

// How the work is cut. The thresholds are estimates: nothing of this has run on a GPU.
struct HopperPlan {
  int tile_tokens = 256;  // or 128
  int64_t row_tiles = 0;
  int64_t tiles = 0;
  int splits = 1;         // of K
  int split_k_tiles = 0;  // k_tiles of 64 columns a split; the last split may have fewer
  int grid = 0;

  int64_t partial_floats() const;
  int64_t counters() const;
};

HopperPlan plan_hopper(int64_t tokens, int64_t rows, int64_t cols, int processors);

// What a caller who measures other plans than the rule's decides; the rest of a plan follows.
struct HopperChoice {
  int64_t tile_tokens = 0, splits = 0, grid = 0;
};

// Makes the chosen plan and returns null, or returns why the kernel cannot run it.
const char* choose_hopper(const HopperChoice& choice, int64_t tokens, int64_t rows, int64_t cols,
                          HopperPlan* plan);

}  // namespace pylora::cuda
