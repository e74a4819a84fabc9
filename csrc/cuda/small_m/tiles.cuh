// Sizes that the kernels of lora_linear.cu and nf4_linear_backward.cu and their plans agree on.
#pragma once

#include "cuda/common/launch.cuh"

namespace pylora::cuda {

inline constexpr int kWarps = 8;  // a CTA
inline constexpr int kThreads = kWarps * kLanes;
inline constexpr int kWarpRows = 16;    // of W: the m16 of the matrix instruction
inline constexpr int kRowWarpsMax = 4;  // beside each other along N
inline constexpr int kChunk = 128;      // columns, a warp's step

// Of 8 tokens, the n8 of the matrix instruction.
__host__ __device__ constexpr int token_tiles(int64_t tokens) {
  return static_cast<int>((tokens + 7) / 8);
}
// Up to 2 tiles a thread does with 128 registers, beyond with 256.
__host__ __device__ constexpr int ctas_per_sm(int token_tiles) { return token_tiles <= 2 ? 2 : 1; }

// Tokens whose sums the warps of a CTA add at a time.
inline constexpr int kPassTokens = 16;
__host__ __device__ constexpr int pass_tiles(int token_tiles) {
  return token_tiles < 2 ? token_tiles : 2;
}

// x in shared memory is [columns / 8][token][8 columns] with tokens `x_pitch` apart. Eight lanes
// read 16 bytes each of 2 tokens in 4 places along k: 2 modulo 4 puts them in different banks.
constexpr int x_pitch(int64_t tokens) {
  return static_cast<int>(tokens < 4 ? tokens : (tokens + 1) / 4 * 4 + 2);
}

// Sums of warps in shared memory, [warp][token][row] with rows 20 apart: free of bank conflicts.
inline constexpr int kSumPitch = 20;
static_assert(kSumPitch > kWarpRows);
__host__ __device__ constexpr int sum_floats(int token_tiles) {
  return kWarps * 8 * token_tiles * kSumPitch;
}
__host__ __device__ constexpr int sum_index(int token_tiles, int warp, int token, int row) {
  return (warp * 8 * token_tiles + token) * kSumPitch + row;
}

// The backward's. Half of the warps hand 64 columns of 8 tokens to the other half.
inline constexpr int kWarpColumns = 64;
inline constexpr int kColumnWarps = 4;  // beside each other along K: a line of L2 in every row
inline constexpr int kChunkRows = 32;   // a warp's step
inline constexpr int kBackwardSumBytes = kColumnWarps * kWarpColumns * 8 * 4;

}  // namespace pylora::cuda
