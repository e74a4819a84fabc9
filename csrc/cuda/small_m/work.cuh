// The way of a CTA through its work, and of each of its warps: what lora_linear.cu and
// nf4_linear_backward.cu have in common beside their plan.
#pragma once

#include <climits>

#include "cuda/common/ptx.cuh"
#include "cuda/nf4/nf4_pairs.cuh"
#include "cuda/small_m/lora_linear.cuh"
#include "cuda/small_m/sizes.cuh"

namespace pylora::cuda {

// A warp's bytes of qweight are under way kAhead chunks ahead of its arithmetic, in a ring of
// stages that lie in the holes of the decode table.
inline constexpr int kStages = 4;
inline constexpr int kAhead = kStages - 1;
inline constexpr int kStageHoles = 8;
inline constexpr int kStageBytes = kStageHoles * kPairRow;  // from one stage to the next
inline constexpr int kGranule = 32;                         // columns in 16 bytes
static_assert(kWarps * kStages * kStageHoles == kPairEntries);

inline int log2_of(int64_t power) {
  int result = 0;
  while (int64_t{1} << result < power) ++result;
  return result;
}

// The thread's warp. That a quotient is the same in all lanes the compiler does not see; of a
// shuffle it does, and keeps what follows from it in uniform registers.
__device__ __forceinline__ int uniform_warp(int thread) { return shuffle(thread / kLanes, 0); }

// The CTA's items: tiles of the outputs times slices of the sum, slice by slice.
struct Items {
  int left, slice, tile;

  __device__ __forceinline__ explicit Items(const SmallPlan& plan) {
    const int64_t items = static_cast<int64_t>(plan.tiles) * plan.slices;
    const int begin = static_cast<int>(items * blockIdx.x / gridDim.x);
    left = static_cast<int>(items * (blockIdx.x + 1) / gridDim.x) - begin;
    slice = begin / plan.tiles;
    tile = begin - slice * plan.tiles;
  }
  __device__ __forceinline__ void next(const SmallPlan& plan) {
    --left;
    if (++tile == plan.tiles) {
      tile = 0;
      ++slice;
    }
  }
};

// A warp's chunks of the sum, those of one item behind those of the other: every `sum_warps`-th of
// a slice. All warps make the same number of steps, whether there is a chunk for each in the last
// or not.
class Chunks {
 public:
  // `chunks` of the whole sum.
  __device__ __forceinline__ Chunks(const SmallPlan& plan, const Items& items, int chunks,
                                    int sum_warp)
      : items_(items), chunks_(chunks), sum_warp_(sum_warp) {
    if (items_.left > 0) open(plan);
  }

  __device__ __forceinline__ bool inside() const { return chunk_ < last_; }
  __device__ __forceinline__ int chunk() const { return chunk_; }
  __device__ __forceinline__ int tile() const { return items_.tile; }

  // Whether the next chunk, if there is one, is the first of an item.
  __device__ __forceinline__ bool next(const SmallPlan& plan) {
    chunk_ += plan.sum_warps;
    if (chunk_ < end_) return false;
    items_.next(plan);
    if (items_.left <= 0) {
      last_ = 0;
      end_ = INT_MAX;
      return false;
    }
    open(plan);
    return true;
  }

 private:
  __device__ __forceinline__ void open(const SmallPlan& plan) {
    const int first = items_.slice * plan.slice_chunks;
    chunk_ = first + sum_warp_;
    last_ = min(first + plan.slice_chunks, chunks_);
    end_ = first + plan.steps * plan.sum_warps;
  }

  Items items_;
  int chunks_, sum_warp_;
  int chunk_ = 0, last_ = 0, end_ = INT_MAX;  // the next one; where the slice and its steps end
};

template <int kCount>
struct TokenTiles {
  static constexpr int count = kCount;
};

// Calls `launch` with the number of token tiles that a kernel is compiled for, as a type.
template <class Launch>
cudaError_t with_token_tiles(int64_t tokens, const Launch& launch) {
  switch (token_tiles(tokens)) {
    case 1:
      return launch(TokenTiles<1>{});
    case 2:
      return launch(TokenTiles<2>{});
    case 3:
      return launch(TokenTiles<3>{});
    case 4:
      return launch(TokenTiles<4>{});
    case 5:
    case 6:
      return launch(TokenTiles<6>{});
    case 7:
    case 8:
      return launch(TokenTiles<8>{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace pylora::cuda
