// How the Hopper kernel (hopper/lora_linear.cuh) cuts its work: outputs into tiles, K into splits.
//
// The thresholds behind a plan are estimates: none of this has been timed on a GPU.
#pragma once

#include <cstdint>

namespace pylora::cuda {

struct HopperPlan {
  int tile_tokens = 256;  // or 128
  int64_t row_tiles = 0;  // tiles along N
  int64_t tiles = 0;      // tiles of the whole output
  int splits = 1;         // parts of K, each with partial sums of its own
  int split_k_tiles = 0;  // K tiles of 64 columns in a split; the last split may have fewer
  int grid = 0;           // CTAs

  // The workspace that a launch with this plan needs.
  int64_t partial_floats() const;
  int64_t counters() const;
};

HopperPlan plan_hopper(int64_t tokens, int64_t rows, int64_t cols, int processors);

// The numbers that a caller may choose, to time plans other than the rule's. The rest of a plan
// follows from them.
struct HopperChoice {
  int64_t tile_tokens = 0, splits = 0, grid = 0;
};

// Makes the plan with these numbers and returns null, or returns why the kernel cannot run it.
const char* choose_hopper(const HopperChoice& choice, int64_t tokens, int64_t rows, int64_t cols,
                          HopperPlan* plan);

}  // namespace pylora::cuda
