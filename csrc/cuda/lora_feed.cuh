// What brings qweight and absmax to a warp of lora_linear.cu, three chunks ahead of its arithmetic.
#pragma once

#include <climits>

#include "cuda/lora_linear.cuh"
#include "cuda/lora_plan.cuh"
#include "cuda/nf4_pairs.cuh"
#include "cuda/ptx.cuh"
#include "cuda/stored_absmax.cuh"

namespace pylora {

// The bytes of a chunk, 16 rows by 128 columns, lie in 8 holes of the decode table: hole 2 j + h
// has granule j (16 bytes, 32 columns) of rows 8 h to 8 h + 7, which is a matrix for ldmatrix.
inline constexpr int kStages = 4;
inline constexpr int kAhead = kStages - 1;
inline constexpr int kStageHoles = 8;
inline constexpr int kStageBytes = kStageHoles * kPairRow;  // from one stage to the next
inline constexpr int kGranule = 32;                         // columns
inline constexpr int kChunkGranules = kChunk / kGranule;
static_assert(kWarps * kStages * kStageHoles == kPairEntries);

inline int log2_of(int64_t power) {
  int result = 0;
  while (int64_t{1} << result < power) ++result;
  return result;
}

// The thread's warp. That a quotient is the same in all lanes the compiler does not see; of a
// shuffle it does, and keeps what follows from it in uniform registers.
__device__ __forceinline__ int uniform_warp(int thread) { return shuffle(thread / kLanes, 0); }

// What the kernel needs beside the plan, which is the same for all its CTAs.
struct Problem {
  LoraLinearSmall op;
  SmallPlan plan;
  int block_shift;         // log2 of blocksize
  int nested_block_shift;  // and of nested_blocksize
  bool rank_vectors;       // lora_B can be read 8 elements at a time
};

// A warp's way through its items, and through the chunks of each. What lies beyond the last row or
// column is read from the last one instead: such rows are not stored, and x is 0 in such columns.
template <int kAbsmax>  // a lane's share of the absmax of a chunk: 2 where blocks have 32 columns
class Feed {
 public:
  __device__ __forceinline__ Feed(const Problem& problem, int begin, int end, int row_warp,
                                  int k_warp, int lane)
      : problem_(problem),
        policy_(evict_first_policy()),
        items_(end - begin),
        slice_(begin / problem.plan.tiles),
        tile_(begin - slice_ * problem.plan.tiles),
        row_warp_(row_warp),
        k_warp_(k_warp),
        lane_(lane),
        row_granules_(static_cast<int>(problem.op.weight.cols) / kGranule) {
    if (items_ > 0) open();
  }

  // Starts the copy of the next chunk into `stage`, loads its absmax, and closes a group of copies;
  // an empty one behind the last chunk.
  __device__ __forceinline__ void fetch(uint8_t* stage, StoredAbsmax (&absmax)[kAbsmax]) {
    const NF4Matrix& weight = problem_.op.weight;
    const int shift = problem_.block_shift;
    if (chunk_ < last_) {
      const uint32_t granule = static_cast<uint32_t>(
          min(chunk_ * kChunkGranules + lane_ % kChunkGranules, row_granules_ - 1));
      uint8_t* place =
          stage + 2 * (lane_ % kChunkGranules) * kPairRow + lane_ / kChunkGranules * kVectorBytes;
      const auto* qweight = reinterpret_cast<const uint4*>(weight.qweight);
      copy_async_16(place, qweight + (upper_ + granule), policy_);
      copy_async_16(place + kPairRow, qweight + (lower_ + granule), policy_);
#pragma unroll
      for (int i = 0; i < kAbsmax; ++i) {
        const int column =
            min(chunk_ * kChunk + lane_ % 2 * 64 + i * kGranule, (row_granules_ - 1) * kGranule);
        const uint32_t block = first_block_ + (static_cast<uint32_t>(column) >> shift);
        absmax[i].load(weight, block, problem_.nested_block_shift);
      }
    }
    chunk_ += problem_.plan.sum_warps;
    if (chunk_ >= end_) next_item();
    copy_async_commit();
  }

 private:
  // Goes to the first chunk of the item.
  __device__ __forceinline__ void open() {
    const SmallPlan& plan = problem_.plan;
    const NF4Matrix& weight = problem_.op.weight;
    const int first = slice_ * plan.slice_chunks;
    chunk_ = first + k_warp_;
    last_ = min(first + plan.slice_chunks, (row_granules_ + 3) / kChunkGranules);
    // Every warp makes the same number of steps, whether there is a chunk for it in the last or
    // not.
    end_ = first + plan.steps * plan.sum_warps;

    const int row = (tile_ * plan.output_warps + row_warp_) * kWarpRows;
    const int final_row = static_cast<int>(weight.rows) - 1;
    const auto granules = static_cast<uint32_t>(row_granules_);
    const uint32_t blocks = granules * kGranule >> problem_.block_shift;
    upper_ = static_cast<uint32_t>(min(row + lane_ / kChunkGranules, final_row)) * granules;
    lower_ = static_cast<uint32_t>(min(row + lane_ / kChunkGranules + 8, final_row)) * granules;
    first_block_ = static_cast<uint32_t>(min(row + lane_ / 2, final_row)) * blocks;
  }

  __device__ __forceinline__ void next_item() {
    if (--items_ <= 0) {
      last_ = 0;  // nothing is left to fetch
      end_ = INT_MAX;
      return;
    }
    if (++tile_ == problem_.plan.tiles) {
      tile_ = 0;
      ++slice_;
    }
    open();
  }

  const Problem& problem_;
  uint64_t policy_;
  int items_, slice_, tile_;  // slice and tile of the item, and how many are left with it
  int row_warp_, k_warp_, lane_, row_granules_;
  int chunk_ = 0, last_ = 0, end_ = INT_MAX;  // of the slice: the next one, and where they end
  uint32_t upper_ = 0, lower_ = 0;            // the two rows whose bytes this lane copies
  uint32_t first_block_ = 0;                  // of the row whose absmax this lane loads
};

}  // namespace pylora
