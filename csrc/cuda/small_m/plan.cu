#include <algorithm>

#include "cuda/nf4/nf4_decode.cuh"
#include "cuda/small_m/plan.cuh"
#include "cuda/small_m/tiles.cuh"

namespace pylora::cuda {
namespace {

constexpr int64_t kReserved = 1024;  // bytes of shared memory that the system takes for each CTA
// A tile has 64 rows, so that x is read seldom. With one token, which is little to read, a tile has
// 16 rows if larger ones would leave SMs idle. Measured on an H100 at 4096x4096: 14.1 us for 16.2,
// but with 4 tokens 25.2 us for 18.7.
constexpr int64_t kMaxMOfLowTiles = 1;
// Two CTAs an SM are worth so many splits. Each split is one more partial sum to write and read.
constexpr int64_t kWorthwhileSplits = 4;

// The work of a call, in the terms that the forward and the backward share.
struct Work {
  int64_t tokens;
  int64_t outputs;      // of a token
  int64_t summed;       // terms of each sum
  int warp_outputs;     // outputs that a warp owns
  int chunk;            // terms that a warp takes in a step
  int output_warps;     // warps of a CTA that have outputs of their own
  int64_t fixed_bytes;  // of shared memory, beside the staged x or grad
  int filled;           // CTAs that each SM gets before sums are no longer split for their sake
};

// The plan with `splits` splits, or fewer if some would be empty. It still lacks the grid.
SmallMPlan cut(const Work& work, int64_t splits) {
  SmallMPlan plan;
  plan.output_warps = work.output_warps;
  plan.sum_warps = kWarps / plan.output_warps;
  plan.tiles = static_cast<int>(ceil_div(work.outputs, work.warp_outputs * plan.output_warps));
  plan.pitch = x_pitch(work.tokens);
  const int64_t chunks = ceil_div(work.summed, work.chunk);
  plan.split_chunks = static_cast<int>(ceil_div(chunks, splits));
  plan.splits = static_cast<int>(ceil_div(chunks, plan.split_chunks));
  plan.steps = static_cast<int>(ceil_div(plan.split_chunks, plan.sum_warps));
  plan.shared_bytes = work.fixed_bytes + plan.split_chunks * (2 * work.chunk * plan.pitch);
  return plan;
}

SmallMPlan plan_work(const Work& work, const DeviceLimits& limits) {
  const SmallMPlan whole = cut(work, 1);
  const int64_t chunks = whole.split_chunks;
  const int64_t chunk_bytes = 2 * work.chunk * whole.pitch;  // of the staged x or grad

  // The least number of splits whose share of x fits into so many bytes.
  const auto splits_in = [&](int64_t bytes) {
    int64_t fitting = (bytes - work.fixed_bytes) / chunk_bytes;
    // In each step there is a chunk for each warp.
    if (fitting > whole.sum_warps) fitting -= fitting % whole.sum_warps;
    return fitting > 0 ? ceil_div(chunks, std::min(fitting, chunks)) : chunks + 1;
  };
  const int64_t half_sm = std::min(limits.shared_per_sm / 2 - kReserved, limits.shared_per_cta);
  // So many splits give work to two CTAs on each SM.
  const int64_t idle_splits = 2 * limits.processors / whole.tiles;
  const bool pair_up =
      ctas_per_sm(token_tiles(work.tokens)) == 2 &&
      splits_in(half_sm) <= std::min(std::max(kWorthwhileSplits, idle_splits), chunks);
  const int64_t needed = splits_in(pair_up ? half_sm : limits.shared_per_cta);

  // Split more if some SMs would have too few tiles, but not beyond a chunk for each warp.
  const int64_t ctas_per = pair_up ? 2 : 1;
  const int64_t ctas = limits.processors * ctas_per;
  const int64_t finest = ceil_div(chunks, whole.sum_warps);
  const int64_t filled = limits.processors * std::min<int64_t>(work.filled, ctas_per);
  const int64_t filling = std::min(filled / whole.tiles, finest);
  SmallMPlan plan = cut(work, std::max(needed, filling));
  plan.grid = static_cast<int>(std::min<int64_t>(ctas, int64_t{plan.tiles} * plan.splits));
  return plan;
}

Work forward_work(int64_t tokens, int64_t rows, int64_t cols, int row_warps) {
  const int64_t sums = 4 * sum_floats(pass_tiles(token_tiles(tokens)));
  // A second CTA for each SM is not worth a split: on an H100, 4096x4096 with 4 tokens takes 19.2 us
  // in 2 splits and 20.7 us in 4.
  return {tokens, rows, cols, kWarpRows, kChunk, row_warps, kPairBytes + sums, 1};
}

}  // namespace

SmallMPlan plan_small_m(int64_t tokens, int64_t rows, int64_t cols, const DeviceLimits& limits) {
  const bool few_tiles = rows < int64_t{kWarpRows} * kRowWarpsMax * limits.processors;
  const int row_warps = tokens <= kMaxMOfLowTiles && few_tiles ? 1 : kRowWarpsMax;
  return plan_work(forward_work(tokens, rows, cols, row_warps), limits);
}

const char* choose_small_m(const SmallMChoice& choice, int64_t tokens, int64_t rows, int64_t cols,
                           const DeviceLimits& limits, SmallMPlan* plan) {
  const int64_t warps = choice.output_warps;
  if (warps < 1 || warps > kRowWarpsMax || kWarps % warps != 0) {
    return "output_warps must be 1, 2 or 4";
  }
  const Work work = forward_work(tokens, rows, cols, static_cast<int>(warps));
  const int64_t chunks = ceil_div(cols, kChunk);
  if (choice.splits < 1 || choice.splits > chunks) {
    return "splits must be 1 to the chunks of 128 columns";
  }
  *plan = cut(work, choice.splits);
  if (plan->splits != choice.splits) {
    return "splits must not leave one empty: all but the last have the same number of chunks";
  }
  if (choice.grid < 1 || choice.grid > int64_t{plan->tiles} * plan->splits) {
    return "grid must be 1 to the tiles times splits";
  }
  if (plan->shared_bytes > limits.shared_per_cta) {
    return "splits must be so many that the x of one split fits shared memory";
  }
  plan->grid = static_cast<int>(choice.grid);
  return nullptr;
}

SmallMPlan plan_small_m_backward(int64_t tokens, int64_t rows, int64_t cols,
                                 const DeviceLimits& limits) {
  const int64_t fixed_bytes = kPairBytes + kBackwardSumBytes;
  return plan_work({tokens, cols, rows, kWarpColumns, kChunkRows, kColumnWarps, fixed_bytes, 2},
                   limits);
}

}  // namespace pylora::cuda
