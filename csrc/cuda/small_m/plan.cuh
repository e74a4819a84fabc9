// How the small-M kernels cut their work. Outputs are cut into tiles, and the sum into splits: the
// forward (lora_linear.cuh) sums over K and has N outputs a token, the backward
// (nf4_linear_backward.cuh) sums over N and has K outputs a token.
//
// The thresholds behind a plan are estimates: none of this has been timed on a GPU.
#pragma once

#include <cstdint>

#include "cuda/common/device.cuh"

namespace pylora::cuda {

struct SmallMPlan {
  int output_warps = 1;  // warps of a CTA that have outputs of their own
  int sum_warps = 1;     // warps that share outputs, and take every n-th chunk of the sum
  int tiles = 0;         // a tile is the outputs that a CTA works on at a time
  int splits = 1;        // parts of the sum, each with partial sums of its own
  int split_chunks = 0;  // chunks in a split; the last split may have fewer
  int pitch = 0;  // of the staged x or grad, from one group of columns to the next, in tokens
  int steps = 0;  // of a warp through a split: split_chunks / sum_warps, rounded up
  int grid = 0;   // CTAs
  int64_t shared_bytes = 0;

  // The workspace that a launch with this plan needs.
  int64_t partial_floats(int64_t tokens, int64_t outputs) const {
    return splits > 1 ? splits * tokens * outputs : 0;
  }
  int64_t counters() const { return splits > 1 ? tiles : 0; }
};

SmallMPlan plan_small_m(int64_t tokens, int64_t rows, int64_t cols, const DeviceLimits& limits);
SmallMPlan plan_small_m_backward(int64_t tokens, int64_t rows, int64_t cols,
                                 const DeviceLimits& limits);

// The numbers that a caller may choose for a forward, to time plans other than the rule's. The rest
// of a plan follows from them.
struct SmallMChoice {
  int64_t output_warps = 0, splits = 0, grid = 0;
};

// Makes the plan with these numbers and returns null, or returns why the kernel cannot run it.
const char* choose_small_m(const SmallMChoice& choice, int64_t tokens, int64_t rows, int64_t cols,
                           const DeviceLimits& limits, SmallMPlan* plan);

}  // namespace pylora::cuda
