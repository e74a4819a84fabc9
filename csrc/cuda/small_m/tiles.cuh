// The sizes on which the small-M kernels (lora_linear.cu and nf4_linear_backward.cu) and their
// plans (plan.cu) agree.
#pragma once

#include "cuda/common/launch.cuh"

namespace pylora::cuda {

inline constexpr int kWarps = 8;  // of a CTA
inline constexpr int kThreads = kWarps * kLanes;
inline constexpr int kWarpRows = 16;    // rows of W of a warp: the m16 of the matrix instruction
inline constexpr int kRowWarpsMax = 4;  // at most so many warps lie beside each other along N
inline constexpr int kChunk = 128;      // columns that a warp takes in a step

// A token tile is 8 tokens, the n8 of the matrix instruction. The last one may have fewer.
__host__ __device__ constexpr int token_tiles(int64_t tokens) {
  return static_cast<int>((tokens + 7) / 8);
}
// With up to 2 token tiles a thread needs 128 registers at most, with more it needs up to 256.
__host__ __device__ constexpr int ctas_per_sm(int token_tiles) { return token_tiles <= 2 ? 2 : 1; }

// The warps of a CTA add their sums of so many tokens at a time.
inline constexpr int kPassTokens = 16;
__host__ __device__ constexpr int pass_tiles(int token_tiles) {
  return token_tiles < 2 ? token_tiles : 2;
}

// x in shared memory is [columns / 8][token][8 columns], and `x_pitch` is the distance along the
// first axis, in tokens. Eight lanes read 16 bytes each, from 2 tokens in 4 places along k. A pitch
// of 2 modulo 4 puts these in different banks.
constexpr int x_pitch(int64_t tokens) {
  return static_cast<int>(tokens < 4 ? tokens : (tokens + 1) / 4 * 4 + 2);
}

// The sums of warps in shared memory are [warp][token][row], with tokens kSumPitch floats apart.
// The stores are free of bank conflicts. The loads are not if a tile has 64 rows (see plan.cu): the
// 32 lanes of a warp then read the sums of two warps, which start in the same bank. The host
// executor counts 667 conflicts in 1000 loads from M = 8 on (tests/test_bank_conflicts.py).
inline constexpr int kSumPitch = 20;
static_assert(kSumPitch > kWarpRows);
__host__ __device__ constexpr int sum_floats(int token_tiles) {
  return kWarps * 8 * token_tiles * kSumPitch;
}
__host__ __device__ constexpr int sum_index(int token_tiles, int warp, int token, int row) {
  return (warp * 8 * token_tiles + token) * kSumPitch + row;
}

// These are the backward's sizes. Half of the warps hand their sums, of 64 columns and 8 tokens at
// a time, to the other half.
inline constexpr int kWarpColumns = 64;
inline constexpr int kColumnWarps = 4;  // side by side along K: they read a line of L2 in each row
inline constexpr int kChunkRows = 32;   // rows that a warp takes in a step
inline constexpr int kBackwardSumBytes = kColumnWarps * kWarpColumns * 8 * 4;

}  // namespace pylora::cuda
