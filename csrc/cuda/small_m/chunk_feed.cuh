// How qweight and absmax reach a warp of small_m/lora_linear.cu, three chunks ahead of its
// arithmetic.
#pragma once

#include "cuda/common/ptx.cuh"
#include "cuda/small_m/lora_linear.cuh"
#include "cuda/small_m/work.cuh"

namespace pylora::cuda {

// The bytes of a chunk, 16 rows by 128 columns, lie in 8 holes of the decode table. Hole 2 j + h
// has granule j (16 bytes, 32 columns) of rows 8 h to 8 h + 7, which is a matrix for ldmatrix. Its
// rows change places by j, so that eight lanes, which copy two rows of four granules, write to
// different banks.
inline constexpr int kChunkGranules = kChunk / kGranule;
static_assert(2 * kChunkGranules == kStageHoles);
__device__ __forceinline__ int chunk_offset(int hole, int row) {
  return hole * kPairRow + (row ^ hole / 2 * 2) * kVectorBytes;
}

// The parameters of the kernel: the call, its plan, and what the launcher derives from them.
struct LoraLinearSmallMParams {
  LoraLinearSmallMArgs args;
  SmallMPlan plan;
  int block_shift;         // log2 of blocksize
  int nested_block_shift;  // log2 of nested_blocksize
  bool rank_vectors;       // lora_B can be read kRankVector elements at a time
};

// Brings a warp its chunks. In place of a row or column beyond the end of W it reads the last one:
// the outputs of such rows are not stored, and x is 0 in such columns.
template <int kAbsmax>  // how many absmax of a chunk a lane loads: 2 if blocksize is 32
class ChunkFeed {
 public:
  __device__ __forceinline__ ChunkFeed(const LoraLinearSmallMParams& params, const Chunks& chunks,
                                       int row_warp, int lane)
      : params_(params),
        chunks_(chunks),
        row_warp_(row_warp),
        lane_(lane),
        row_granules_(static_cast<int>(params.args.weight.cols) / kGranule) {
    open();
  }

  // Starts the copy of the next chunk into `stage`, loads its absmax, and closes the group of
  // copies. After the last chunk the group is empty.
  __device__ __forceinline__ void fetch(uint8_t* stage, StoredAbsmax (&absmax)[kAbsmax]) {
    const NF4Matrix& weight = params_.args.weight;
    const int shift = params_.block_shift;
    if (chunks_.inside()) {
      const int chunk = chunks_.chunk();
      const uint32_t granule = static_cast<uint32_t>(
          min(chunk * kChunkGranules + lane_ % kChunkGranules, row_granules_ - 1));
      uint8_t* place = stage + chunk_offset(2 * (lane_ % kChunkGranules), lane_ / kChunkGranules);
      const auto* qweight = reinterpret_cast<const uint4*>(weight.qweight);
      copy_async_16(place, qweight + (upper_ + granule));
      copy_async_16(place + kPairRow, qweight + (lower_ + granule));
#pragma unroll
      for (int i = 0; i < kAbsmax; ++i) {
        const int column =
            min(chunk * kChunk + lane_ % 2 * 64 + i * kGranule, (row_granules_ - 1) * kGranule);
        const uint32_t block = first_block_ + (static_cast<uint32_t>(column) >> shift);
        absmax[i].load(weight, block, params_.nested_block_shift);
      }
    }
    if (chunks_.next(params_.plan)) open();
    copy_async_commit();
  }

 private:
  // Goes to the rows of the current tile.
  __device__ __forceinline__ void open() {
    const int row = (chunks_.tile() * params_.plan.output_warps + row_warp_) * kWarpRows;
    const int final_row = static_cast<int>(params_.args.weight.rows) - 1;
    const auto granules = static_cast<uint32_t>(row_granules_);
    const uint32_t blocks = granules * kGranule >> params_.block_shift;
    upper_ = static_cast<uint32_t>(min(row + lane_ / kChunkGranules, final_row)) * granules;
    lower_ = static_cast<uint32_t>(min(row + lane_ / kChunkGranules + 8, final_row)) * granules;
    first_block_ = static_cast<uint32_t>(min(row + lane_ / 2, final_row)) * blocks;
  }

  const LoraLinearSmallMParams& params_;
  Chunks chunks_;
  int row_warp_, lane_, row_granules_;
  uint32_t upper_ = 0, lower_ = 0;  // the two rows whose bytes this lane copies
  uint32_t first_block_ = 0;        // of the row whose absmax this lane loads
};

}  // namespace pylora::cuda
