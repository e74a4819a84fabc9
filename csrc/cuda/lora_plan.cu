#include <algorithm>

#include "cuda/lora_linear.cuh"
#include "cuda/lora_plan.cuh"
#include "cuda/nf4_pairs.cuh"

namespace pylora {
namespace {

constexpr int64_t kReserved = 1024;  // bytes of shared memory that a CTA costs beside its own
// Estimates. Up to 4 tokens a CTA reads less of x than of W with 16 rows a tile; beyond, taller
// tiles read x less often.
constexpr int64_t kTokensOfLowTiles = 4;
// Slices of K that two CTAs an SM are worth: each slice is one more partial sum to write and read.
constexpr int64_t kWorthwhileSlices = 4;

}  // namespace

cudaError_t device_limits(DeviceLimits* limits) {
  int device = 0, major = 0, per_sm = 0, per_cta = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto read = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  };
  read(&limits->processors, cudaDevAttrMultiProcessorCount);
  read(&per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  read(&per_cta, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  read(&major, cudaDevAttrComputeCapabilityMajor);
  limits->shared_per_sm = per_sm;
  limits->shared_per_cta = per_cta;
  limits->dependent_launch = major >= 9;
  return error;
}

SmallPlan plan_small(int64_t tokens, int64_t rows, int64_t cols, const DeviceLimits& limits) {
  SmallPlan plan;
  plan.row_warps = tokens <= kTokensOfLowTiles ? 1 : kRowWarpsMax;
  plan.k_warps = kWarps / plan.row_warps;
  plan.tiles = static_cast<int>(ceil_div(rows, kWarpRows * plan.row_warps));
  const int64_t chunks = ceil_div(cols, kChunk);
  plan.pitch = x_pitch(tokens);
  const int64_t chunk_bytes = 2 * kChunk * plan.pitch;  // of x
  const int64_t fixed = kPairBytes + 4 * sum_floats(pass_tiles(token_tiles(tokens)));

  // Slices of K whose share of x fits beside the table.
  const auto slices_in = [&](int64_t bytes) {
    int64_t fitting = (bytes - fixed) / chunk_bytes;
    if (fitting > plan.k_warps) fitting -= fitting % plan.k_warps;  // a chunk for each, every step
    return fitting > 0 ? ceil_div(chunks, std::min(fitting, chunks)) : chunks + 1;
  };
  const int64_t two = std::min(limits.shared_per_sm / 2 - kReserved, limits.shared_per_cta);
  const bool pair_up = ctas_per_sm(token_tiles(tokens)) == 2 &&
                       slices_in(two) <= std::min(kWorthwhileSlices, chunks);
  const int64_t needed = slices_in(pair_up ? two : limits.shared_per_cta);

  // More of them while CTAs would have no tile, down to a chunk for each warp.
  const int64_t ctas = static_cast<int64_t>(limits.processors) * (pair_up ? 2 : 1);
  const int64_t finest = ceil_div(chunks, plan.k_warps);
  const int64_t slices = std::max(needed, std::min(ctas / plan.tiles, finest));
  plan.slice_chunks = static_cast<int>(ceil_div(chunks, slices));
  plan.slices = static_cast<int>(ceil_div(chunks, plan.slice_chunks));
  plan.steps = static_cast<int>(ceil_div(plan.slice_chunks, plan.k_warps));
  plan.grid = static_cast<int>(std::min<int64_t>(ctas, int64_t{plan.tiles} * plan.slices));
  plan.shared_bytes = fixed + plan.slice_chunks * chunk_bytes;
  return plan;
}

}  // namespace pylora
