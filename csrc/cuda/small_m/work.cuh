// The way of a CTA through its work, and of each of its warps: what lora_linear.cu and
// nf4_linear_backward.cu have in common beside their plan.
#pragma once

#include <climits>

#include "cuda/common/ptx.cuh"
#include "cuda/nf4/nf4_decode.cuh"
#include "cuda/small_m/plan.cuh"
#include "cuda/small_m/tiles.cuh"

namespace pylora::cuda {

// A warp's bytes of qweight are under way kAhead chunks ahead of its arithmetic, in a ring of
// stages that lie in the holes of the decode table.
inline constexpr int kStages = 4;
inline constexpr int kAhead = kStages - 1;
inline constexpr int kStageHoles = 8;
inline constexpr int kStageBytes = kStageHoles * kPairRow;  // from one stage to the next
inline constexpr int kGranule = 32;                         // columns in 16 bytes
static_assert(kWarps * kStages * kStageHoles == kPairEntries);

// The thread's warp. That a quotient is the same in all lanes the compiler does not see; of a
// shuffle it does, and keeps what follows from it in uniform registers.
__device__ __forceinline__ int uniform_warp(int thread) { return shuffle(thread / kLanes, 0); }

// The CTA's work: tiles of the outputs times splits of the sum, split by split.
struct WorkRange {
  int left, split, tile;

  __device__ __forceinline__ explicit WorkRange(const SmallMPlan& plan) {
    const int64_t work = static_cast<int64_t>(plan.tiles) * plan.splits;
    const int begin = static_cast<int>(work * blockIdx.x / gridDim.x);
    left = static_cast<int>(work * (blockIdx.x + 1) / gridDim.x) - begin;
    split = begin / plan.tiles;
    tile = begin - split * plan.tiles;
  }
  __device__ __forceinline__ void next(const SmallMPlan& plan) {
    --left;
    if (++tile == plan.tiles) {
      tile = 0;
      ++split;
    }
  }
};

// A warp's chunks of the sum, those of one work behind those of the other: every `sum_warps`-th of
// a split. All warps make the same number of steps, whether there is a chunk for each in the last
// or not.
class Chunks {
 public:
  // `chunks` of the whole sum.
  __device__ __forceinline__ Chunks(const SmallMPlan& plan, const WorkRange& work, int chunks,
                                    int sum_warp)
      : work_(work), chunks_(chunks), sum_warp_(sum_warp) {
    if (work_.left > 0) open(plan);
  }

  __device__ __forceinline__ bool inside() const { return chunk_ < last_; }
  __device__ __forceinline__ int chunk() const { return chunk_; }
  __device__ __forceinline__ int tile() const { return work_.tile; }

  // Whether the next chunk, if there is one, is the first of an work.
  __device__ __forceinline__ bool next(const SmallMPlan& plan) {
    chunk_ += plan.sum_warps;
    if (chunk_ < end_) return false;
    work_.next(plan);
    if (work_.left <= 0) {
      last_ = 0;
      end_ = INT_MAX;
      return false;
    }
    open(plan);
    return true;
  }

 private:
  __device__ __forceinline__ void open(const SmallMPlan& plan) {
    const int first = work_.split * plan.split_chunks;
    chunk_ = first + sum_warp_;
    last_ = min(first + plan.split_chunks, chunks_);
    end_ = first + plan.steps * plan.sum_warps;
  }

  WorkRange work_;
  int chunks_, sum_warp_;
  int chunk_ = 0, last_ = 0, end_ = INT_MAX;  // the next one; where the split and its steps end
};

// Whole CTA. True in the last of `splits` CTAs that come here: what all of them wrote before can be
// read, past L1. `flag` is shared memory that nobody else uses until all threads have returned.
__device__ __forceinline__ bool is_last_split(unsigned* counter, int splits, bool* flag) {
  __threadfence();  // what was written is visible before it is counted
  __syncthreads();
  if (threadIdx.x == 0) *flag = atomicAdd(counter, 1u) == static_cast<unsigned>(splits - 1);
  __syncthreads();
  const bool last = *flag;
  if (last) __threadfence();
  return last;
}

template <int kCount>
struct TokenTileCount {
  static constexpr int count = kCount;
};

// Calls `launch` with the number of token tiles that a kernel is compiled for, as a type.
template <class Launch>
cudaError_t with_token_tiles(int64_t tokens, const Launch& launch) {
  switch (token_tiles(tokens)) {
    case 1:
      return launch(TokenTileCount<1>{});
    case 2:
      return launch(TokenTileCount<2>{});
    case 3:
      return launch(TokenTileCount<3>{});
    case 4:
      return launch(TokenTileCount<4>{});
    case 5:
    case 6:
      return launch(TokenTileCount<6>{});
    case 7:
    case 8:
      return launch(TokenTileCount<8>{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace pylora::cuda
