// What brings qweight and absmax to a warp of lora_linear.cu, three chunks ahead of its arithmetic.
#pragma once

#include <climits>

#include "cuda/lora_linear.cuh"
#include "cuda/lora_plan.cuh"
#include "cuda/nf4_pairs.cuh"
#include "cuda/ptx.cuh"

namespace pylora {

// The bytes of a chunk, 16 rows by 128 columns, lie in 8 holes of the decode table: hole 2 j + h
// has granule j (16 bytes, 32 columns) of rows 8 h to 8 h + 7, which is a matrix for ldmatrix.
inline constexpr int kStages = 4;
inline constexpr int kAhead = kStages - 1;
inline constexpr int kStageHoles = 8;
inline constexpr int kStageBytes = kStageHoles * kPairRow;  // from one stage to the next
inline constexpr int kGranule = 32;                         // columns
static_assert(kWarps * kStages * kStageHoles == kPairEntries);

// What the kernel needs beside the plan, which is the same for all its CTAs.
struct Problem {
  LoraLinearSmall op;
  SmallPlan plan;
  int block_shift;         // log2 of blocksize
  int nested_block_shift;  // and of nested_blocksize
};

// absmax as it lies in memory, on its way through registers.
struct StoredAbsmax {
  float value = 0.0f;  // plain: absmax; nested: nested_absmax
  uint32_t code = 0;   // nested
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
        lane_(lane) {
    if (items_ > 0) open();
  }

  // Starts the copy of the next chunk into `stage`, loads its absmax, and closes a group of copies;
  // an empty one behind the last chunk.
  __device__ __forceinline__ void fetch(uint8_t* stage, StoredAbsmax (&absmax)[kAbsmax]) {
    const NF4Matrix& weight = problem_.op.weight;
    if (chunk_ < last_) {
      const int granule = lane_ % 4;
      const int byte = min(chunk_ * kChunk + granule * kGranule, columns() - kGranule) / 2;
      uint8_t* place = stage + 2 * granule * kPairRow + lane_ / 4 * kVectorBytes;
      copy_async_16(place, upper_ + byte, policy_);
      copy_async_16(place + kPairRow, lower_ + byte, policy_);
#pragma unroll
      for (int i = 0; i < kAbsmax; ++i) {
        const int column = chunk_ * kChunk + lane_ % 2 * 64 + i * kGranule;
        const uint32_t block =
            first_block_ +
            (static_cast<uint32_t>(min(column, columns() - kGranule)) >> problem_.block_shift);
        if (weight.absmax_q == nullptr) {
          absmax[i].value = __ldg(weight.absmax + block);
        } else {
          absmax[i].code = __ldg(weight.absmax_q + block);
          absmax[i].value = __ldg(weight.nested_absmax + (block >> problem_.nested_block_shift));
        }
      }
    }
    chunk_ += problem_.plan.k_warps;
    if (chunk_ >= end_) next_item();
    copy_async_commit();
  }

 private:
  __device__ __forceinline__ int columns() const {
    return static_cast<int>(problem_.op.weight.cols);
  }

  // Goes to the first chunk of the item.
  __device__ __forceinline__ void open() {
    const SmallPlan& plan = problem_.plan;
    const NF4Matrix& weight = problem_.op.weight;
    const int first = slice_ * plan.slice_chunks;
    chunk_ = first + k_warp_;
    last_ = min(first + plan.slice_chunks, (columns() + kChunk - 1) / kChunk);
    // Every warp makes the same number of steps, whether there is a chunk for it in the last or
    // not.
    end_ = first + plan.steps * plan.k_warps;

    const int row = (tile_ * plan.row_warps + row_warp_) * kWarpRows;
    const int64_t final_row = weight.rows - 1;
    const int64_t upper = min(static_cast<int64_t>(row + lane_ / 4), final_row);
    const int64_t lower = min(static_cast<int64_t>(row + lane_ / 4 + 8), final_row);
    upper_ = weight.qweight + upper * columns() / 2;
    lower_ = weight.qweight + lower * columns() / 2;
    const int64_t absmax_row = min(static_cast<int64_t>(row + lane_ / 2), final_row);
    first_block_ = static_cast<uint32_t>(absmax_row * columns() >> problem_.block_shift);
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
  int row_warp_, k_warp_, lane_;
  int chunk_ = 0, last_ = 0, end_ = INT_MAX;  // of the slice: the next one, and where they end
  const uint8_t *upper_ = nullptr, *lower_ = nullptr;  // the two rows whose bytes this lane copies
  uint32_t first_block_ = 0;                           // of the row whose absmax this lane loads
};

}  // namespace pylora
