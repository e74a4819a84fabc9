// Sizes that the kernel of lora_linear.cu and its plan agree on.
#pragma once

#include "cuda/launch.cuh"

namespace pylora {

inline constexpr int kWarps = 8;  // a CTA
inline constexpr int kThreads = kWarps * kLanes;
inline constexpr int kWarpRows = 16;    // of W: the m16 of the matrix instruction
inline constexpr int kRowWarpsMax = 4;  // beside each other along N
inline constexpr int kChunk = 128;      // columns, a warp's step

// Sums of warps in shared memory, [warp][token][row] with rows 20 apart: free of bank conflicts.
inline constexpr int kSumPitch = 20;
__host__ __device__ constexpr int sum_floats(int token_tiles) {
  return kWarps * 8 * token_tiles * kSumPitch;
}
__host__ __device__ constexpr int sum_index(int token_tiles, int warp, int token, int row) {
  return (warp * 8 * token_tiles + token) * kSumPitch + row;
}

}  // namespace pylora
