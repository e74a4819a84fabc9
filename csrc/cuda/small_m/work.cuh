// How a CTA of a small-M kernel, and each of its warps, iterates over its work: what lora_linear.cu
// and nf4_linear_backward.cu share beside their plan.
#pragma once

#include <climits>

#include "cuda/common/ptx.cuh"
#include "cuda/nf4/nf4_decode.cuh"
#include "cuda/small_m/plan.cuh"
#include "cuda/small_m/tiles.cuh"

namespace pylora::cuda {

// A warp's bytes of qweight are copied kAhead chunks ahead of its arithmetic, into a ring of stages
// that lie in the holes of the decode table.
inline constexpr int kStages = 4;
inline constexpr int kAhead = kStages - 1;
inline constexpr int kStageHoles = 8;
inline constexpr int kStageBytes = kStageHoles * kPairRow;  // from one stage to the next
inline constexpr int kGranule = 32;                         // columns in 16 bytes of qweight
static_assert(kWarps * kStages * kStageHoles == kPairEntries);

// The thread's warp. The compiler does not see that a quotient is the same in all lanes, but it
// knows that of a shuffle, and keeps what follows from it in uniform registers.
__device__ __forceinline__ int uniform_warp(int thread) { return shuffle(thread / kLanes, 0); }

// A CTA's range of the work items, split by split. An item is an output tile and a split of the
// sum; `tile` and `split` are those of the current item.
struct WorkRange {
  int left, split, tile;

  __device__ __forceinline__ explicit WorkRange(const SmallMPlan& plan) {
    const int64_t items = static_cast<int64_t>(plan.tiles) * plan.splits;
    const int begin = static_cast<int>(items * blockIdx.x / gridDim.x);
    left = static_cast<int>(items * (blockIdx.x + 1) / gridDim.x) - begin;
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

// A warp's chunks of the sum, work item after work item. A warp takes every `sum_warps`-th chunk of
// a split. All warps make the same number of steps, even if the last step has no chunk for some of
// them.
class Chunks {
 public:
  // `chunks` is the number of chunks in the whole sum.
  __device__ __forceinline__ Chunks(const SmallMPlan& plan, const WorkRange& work, int chunks,
                                    int sum_warp)
      : work_(work), chunks_(chunks), sum_warp_(sum_warp) {
    if (work_.left > 0) open(plan);
  }

  __device__ __forceinline__ bool inside() const { return chunk_ < split_end_; }
  __device__ __forceinline__ int chunk() const { return chunk_; }
  __device__ __forceinline__ int tile() const { return work_.tile; }

  // Goes to the next chunk. Returns true if that is the first one of a new item.
  __device__ __forceinline__ bool next(const SmallMPlan& plan) {
    chunk_ += plan.sum_warps;
    if (chunk_ < step_end_) return false;
    work_.next(plan);
    if (work_.left <= 0) {
      split_end_ = 0;
      step_end_ = INT_MAX;
      return false;
    }
    open(plan);
    return true;
  }

 private:
  __device__ __forceinline__ void open(const SmallMPlan& plan) {
    const int first = work_.split * plan.split_chunks;
    chunk_ = first + sum_warp_;
    split_end_ = min(first + plan.split_chunks, chunks_);
    step_end_ = first + plan.steps * plan.sum_warps;
  }

  WorkRange work_;
  int chunks_, sum_warp_;
  int chunk_ = 0;           // the current one
  int split_end_ = 0;       // the chunks of the split end here
  int step_end_ = INT_MAX;  // the steps through the split end here
};

// Whole CTA. Returns true in the CTA that comes last of the `splits` CTAs that call this with the
// same counter: it may then read what all of them wrote before, by load_from_l2. `flag` is in
// shared memory, and nothing else may use it until all threads have returned.
__device__ __forceinline__ bool is_last_split(unsigned* counter, int splits, bool* flag) {
  __threadfence();  // what was written is visible before it is counted
  __syncthreads();
  if (threadIdx.x == 0) *flag = atomicAdd(counter, 1u) == static_cast<unsigned>(splits - 1);
  __syncthreads();
  const bool comes_last = *flag;
  if (comes_last) __threadfence();
  return comes_last;
}

template <int kCount>
struct TokenTileCount {
  static constexpr int count = kCount;
};

// Calls `launch` with a number of token tiles that kernels are compiled for and that holds
// `tokens`. The number comes as a type.
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
