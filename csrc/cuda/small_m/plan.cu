#include <algorithm>

#include "cuda/nf4/nf4_decode.cuh"
#include "cuda/small_m/plan.cuh"
#include "cuda/small_m/tiles.cuh"

namespace pylora::cuda {
namespace {

constexpr int64_t kReserved = 1024;  // bytes of shared memory that a CTA costs beside its own
// Estimates. Up to 4 tokens a CTA reads less of x than of W with 16 rows a tile; beyond, taller
// tiles read x less often.
constexpr int64_t kTokensOfLowTiles = 4;
// Slices that two CTAs an SM are worth: each split is one more partial sum to write and read.
constexpr int64_t kWorthwhileSplits = 4;

struct Work {
  int64_t tokens, outputs, summed;
  int warp_outputs, chunk;  // of a warp
  int output_warps;
  int64_t fixed;  // bytes of shared memory beside the staged x
};

// The plan with so many splits, or as many of them as are not empty; all of it but the grid.
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
  plan.shared_bytes = work.fixed + plan.split_chunks * (2 * work.chunk * plan.pitch);
  return plan;
}

SmallMPlan plan_work(const Work& work, const DeviceLimits& limits) {
  const SmallMPlan whole = cut(work, 1);
  const int64_t chunks = whole.split_chunks;
  const int64_t chunk_bytes = 2 * work.chunk * whole.pitch;  // of x

  // Slices whose share of x fits beside the table.
  const auto splits_in = [&](int64_t bytes) {
    int64_t fitting = (bytes - work.fixed) / chunk_bytes;
    // A chunk for each warp in every step.
    if (fitting > whole.sum_warps) fitting -= fitting % whole.sum_warps;
    return fitting > 0 ? ceil_div(chunks, std::min(fitting, chunks)) : chunks + 1;
  };
  const int64_t two = std::min(limits.shared_per_sm / 2 - kReserved, limits.shared_per_cta);
  const int64_t idle_splits = 2 * limits.processors / whole.tiles;  // that fill two CTAs an SM
  const bool pair_up = ctas_per_sm(token_tiles(work.tokens)) == 2 &&
                       splits_in(two) <= std::min(std::max(kWorthwhileSplits, idle_splits), chunks);
  const int64_t needed = splits_in(pair_up ? two : limits.shared_per_cta);

  // More of them while CTAs would have no tile, down to a chunk for each warp.
  const int64_t ctas = static_cast<int64_t>(limits.processors) * (pair_up ? 2 : 1);
  const int64_t finest = ceil_div(chunks, whole.sum_warps);
  SmallMPlan plan = cut(work, std::max(needed, std::min(ctas / whole.tiles, finest)));
  plan.grid = static_cast<int>(std::min<int64_t>(ctas, int64_t{plan.tiles} * plan.splits));
  return plan;
}

Work small_work(int64_t tokens, int64_t rows, int64_t cols, int row_warps) {
  const int64_t sums = 4 * sum_floats(pass_tiles(token_tiles(tokens)));
  return {tokens, rows, cols, kWarpRows, kChunk, row_warps, kPairBytes + sums};
}

}  // namespace

SmallMPlan plan_small_m(int64_t tokens, int64_t rows, int64_t cols, const DeviceLimits& limits) {
  const int row_warps = tokens <= kTokensOfLowTiles ? 1 : kRowWarpsMax;
  return plan_work(small_work(tokens, rows, cols, row_warps), limits);
}

const char* choose_small_m(const SmallMChoice& choice, int64_t tokens, int64_t rows, int64_t cols,
                           const DeviceLimits& limits, SmallMPlan* plan) {
  const int64_t warps = choice.output_warps;
  if (warps < 1 || warps > kRowWarpsMax || kWarps % warps != 0) {
    return "output_warps must be 1, 2 or 4";
  }
  const Work work = small_work(tokens, rows, cols, static_cast<int>(warps));
  const int64_t chunks = ceil_div(cols, kChunk);
  if (choice.splits < 1 || choice.splits > chunks) {
    return "slices must be 1 to the chunks of 128 columns";
  }
  *plan = cut(work, choice.splits);
  if (plan->splits != choice.splits) {
    return "slices must not leave one empty: all but the last have the same number of chunks";
  }
  if (choice.grid < 1 || choice.grid > int64_t{plan->tiles} * plan->splits) {
    return "grid must be 1 to the tiles times splits";
  }
  if (plan->shared_bytes > limits.shared_per_cta) {
    return "slices must be so many that a slice of x fits shared memory";
  }
  plan->grid = static_cast<int>(choice.grid);
  return nullptr;
}

SmallMPlan plan_small_m_backward(int64_t tokens, int64_t rows, int64_t cols,
                                 const DeviceLimits& limits) {
  const int64_t fixed = kPairBytes + kBackwardSumBytes;
  return plan_work({tokens, cols, rows, kWarpColumns, kChunkRows, kColumnWarps, fixed}, limits);
}

}  // namespace pylora::cuda
