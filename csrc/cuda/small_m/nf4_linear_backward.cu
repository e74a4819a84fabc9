#include "cuda/common/element.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/nf4/nf4_decode.cuh"
#include "cuda/small_m/nf4_linear_backward.cuh"
#include "cuda/small_m/work.cuh"

namespace pylora::cuda {
namespace {

constexpr int kTileColumns = kColumnWarps * kWarpColumns;
constexpr int kRowsOfStep = 16;  // rows of W in a product: the k16 of the matrix instruction
constexpr int kSteps = kChunkRows / kRowsOfStep;
constexpr int kLaneColumns = 8;  // columns of a lane: one word of qweight
static_assert(kChunkRows * kWarpColumns / 2 == kStageHoles * (kPairRow - kPairHole));

// The parameters of the kernel: the call, its plan, and what the launcher derives from them.
struct NF4LinearBackwardSmallMParams {
  NF4LinearBackwardSmallMArgs args;
  SmallMPlan plan;
  int block_shift;         // log2 of blocksize
  int nested_block_shift;  // log2 of nested_blocksize
  bool grad_vectors;       // grad can be read 16 bytes at a time
};

// Brings a warp its chunks. In place of a row or column beyond the end of W it reads the last one:
// grad is 0 for such rows, and the outputs of such columns are not stored.
class BackwardChunkFeed {
 public:
  __device__ __forceinline__ BackwardChunkFeed(const NF4LinearBackwardSmallMParams& params,
                                               const Chunks& chunks, int column_warp, int lane)
      : params_(params),
        chunks_(chunks),
        column_warp_(column_warp),
        lane_(lane),
        granules_(static_cast<uint32_t>(params.args.weight.cols) / kGranule) {
    open();
  }

  // 1. Starts the copy of the next chunk into `stage`, loads its absmax, and closes the group of
  // copies. After the last chunk the group is empty.
  __device__ __forceinline__ void fetch(uint8_t* stage, StoredAbsmax& absmax) {
    if (chunks_.inside()) {
      // Rows 4 h to 4 h + 3 lie in hole h. A lane copies half of a row and half of the 16th row
      // after it.
      uint8_t* place = stage + lane_ / 8 * kPairRow + lane_ % 8 * kVectorBytes;
      const NF4Matrix& weight = params_.args.weight;
      const auto* qweight = reinterpret_cast<const uint4*>(weight.qweight);
      const uint32_t lower = granule_ + kRowsOfStep * granules_;
      copy_async_16(place, qweight + min(granule_, final_granule_));
      copy_async_16(place + kStageHoles / 2 * kPairRow, qweight + min(lower, final_granule_));
      absmax.load(weight, min(block_, final_block_), params_.nested_block_shift);
    }
    const uint32_t rows = params_.plan.sum_warps * kChunkRows;
    granule_ += rows * granules_;
    block_ += rows * (granules_ * kGranule >> params_.block_shift);
    if (chunks_.next(params_.plan)) open();
    copy_async_commit();
  }

 private:
  // Goes to the first chunk of the current work item.
  __device__ __forceinline__ void open() {
    const NF4Matrix& weight = params_.args.weight;
    const int column = min((chunks_.tile() * kColumnWarps + column_warp_) * kWarpColumns,
                           static_cast<int>(weight.cols) - kWarpColumns);
    const uint32_t blocks = granules_ * kGranule >> params_.block_shift;
    const auto row = static_cast<uint32_t>(chunks_.chunk() * kChunkRows);
    const auto final_row = static_cast<uint32_t>(weight.rows) - 1;
    const uint32_t granule = static_cast<uint32_t>(column) / kGranule + lane_ % 2;
    const uint32_t block = static_cast<uint32_t>(column) >> params_.block_shift;
    granule_ = (row + lane_ / 2) * granules_ + granule;
    final_granule_ = final_row * granules_ + granule;
    block_ = (row + lane_) * blocks + block;
    final_block_ = final_row * blocks + block;
  }

  const NF4LinearBackwardSmallMParams& params_;
  Chunks chunks_;
  int column_warp_, lane_;
  uint32_t granules_;  // in a row
  // The granule that this lane copies next and the block whose absmax it loads next, and the same
  // two in the last row of W.
  uint32_t granule_ = 0, block_ = 0, final_granule_ = 0, final_block_ = 0;
};

// Loads elements [n, n + 8) of a token's grad; they are 0 beyond N.
template <class T>
__device__ __forceinline__ uint4 load_grad(const NF4LinearBackwardSmallMParams& params, int token,
                                           int n) {
  const int N = static_cast<int>(params.args.weight.rows);
  const T* grad = static_cast<const T*>(params.args.grad) + static_cast<int64_t>(token) * N + n;
  if (params.grad_vectors && n < N) return __ldg(reinterpret_cast<const uint4*>(grad));
  Bytes16<T> result;
#pragma unroll
  for (int i = 0; i < Bytes16<T>::kElements; ++i) {
    result.values[i] = n + i < N ? grad[i] : round_to<T>(0.0f);
  }
  return result.bits;
}

// 2. Stages the rows of a chunk for one token, in the order in which four lanes read them. Vector
// `quarter` has the rows `quarter`, `quarter` + 4, ..., `quarter` + 28. They are the columns 2q, 2q
// + 1, 2q + 8 and 2q + 9 of two fragments.
template <class T>
__device__ __forceinline__ void stage_grad(const NF4LinearBackwardSmallMParams& params, int token,
                                           int n, uint4* staged, int pitch) {
  uint32_t words[kChunkRows / 2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint4 eight = load_grad<T>(params, token, n + 8 * i);
    words[4 * i] = eight.x, words[4 * i + 1] = eight.y;
    words[4 * i + 2] = eight.z, words[4 * i + 3] = eight.w;
  }
#pragma unroll
  for (int quarter = 0; quarter < 4; ++quarter) {
    const auto pair = [&](int i) {
      const int word = 4 * i + quarter / 2;
      return permute_bytes(words[word], words[word + 2], quarter % 2 == 0 ? 0x5410u : 0x7632u);
    };
    store_shared(staged + quarter * pitch, uint4{pair(0), pair(1), pair(2), pair(3)});
  }
}

// 5. If N is split: adds the sums of all splits and stores the tile's outputs, four columns a
// thread.
template <class T>
__device__ __forceinline__ void store_sum_of_splits(const NF4LinearBackwardSmallMParams& params,
                                                    int tile) {
  const NF4LinearBackwardSmallMArgs& args = params.args;
  const int64_t K = args.weight.cols;
  constexpr int kFours = kTileColumns / 4;
  for (int i = threadIdx.x; i < kFours * args.tokens; i += kThreads) {
    const int64_t column = static_cast<int64_t>(tile) * kTileColumns + i % kFours * 4;
    if (column >= K) continue;
    float sums[4] = {};
    for (int split = 0; split < params.plan.splits; ++split) {
      const int64_t row = static_cast<int64_t>(split) * args.tokens + i / kFours;
      const auto* partials = reinterpret_cast<const float4*>(args.partials + row * K + column);
      const float4 four = load_from_l2(partials);
      sums[0] += four.x, sums[1] += four.y, sums[2] += four.z, sums[3] += four.w;
    }
    T* dx = static_cast<T*>(args.dx) + i / kFours * K + column;
#pragma unroll
    for (int j = 0; j < 4; ++j) dx[j] = round_to<T>(sums[j]);
  }
}

// kTokenTiles may be one more than the call's tokens fill.
template <class T, int kTokenTiles>
__global__ void __launch_bounds__(kThreads, ctas_per_sm(kTokenTiles))
    nf4_linear_backward_small_m(NF4LinearBackwardSmallMParams params) {
  constexpr int kFragments = kWarpColumns / 16;  // fragments beside each other along the columns
  const NF4LinearBackwardSmallMArgs& args = params.args;
  const SmallMPlan& plan = params.plan;
  const NF4Matrix& weight = args.weight;
  const int64_t K = weight.cols;
  const int M = args.tokens;
  const int pitch = plan.pitch;
  const int chunks = (static_cast<int>(weight.rows) + kChunkRows - 1) / kChunkRows;

  uint8_t* pairs = dynamic_shared_memory();
  auto* sums = reinterpret_cast<float*>(pairs + kPairBytes);
  auto* staged_grad = reinterpret_cast<uint4*>(pairs + kPairBytes + kBackwardSumBytes);

  const int thread = threadIdx.x;
  const int warp = uniform_warp(thread);
  const int lane = thread % kLanes;
  const int group = lane / 4;    // a word of a row, or a token
  const int quarter = lane % 4;  // a place among the rows
  const int column_warp = warp % kColumnWarps;
  const int sum_warp = warp / kColumnWarps;
  const float offset = args.offset != nullptr ? __ldg(args.offset) : 0.0f;

  // 1. Start the copies of qweight.
  uint8_t* ring = hole(pairs, warp * kStages * kStageHoles);
  WorkRange work(plan);
  BackwardChunkFeed feed(params, Chunks(plan, work, chunks, sum_warp), column_warp, lane);
  StoredAbsmax stored[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) feed.fetch(ring + i * kStageBytes, stored[i]);

  // 2. Fill the decode table.
  fill_pairs<T>(pairs, thread);
  const uint32_t lane_offset = 4 * static_cast<uint32_t>(lane);
  int staged_split = -1;
  unsigned stage = 0;

  for (; work.left > 0; work.next(plan)) {
    const int split = work.split, tile = work.tile;
    const int first_chunk = split * plan.split_chunks;
    const int split_chunks = min(plan.split_chunks, chunks - first_chunk);
    // 2. Stage grad. All warps have left the split before, by the last barrier of step 5.
    if (split != staged_split) {
      for (int i = thread; i < split_chunks * M; i += kThreads) {
        const int chunk = i / M, token = i % M;
        stage_grad<T>(params, token, (first_chunk + chunk) * kChunkRows,
                      staged_grad + chunk * 4 * pitch + token, pitch);
      }
      staged_split = split;
      __syncthreads();
    }

    float total[kFragments][kTokenTiles][4] = {};
    for (int step = 0; step < plan.steps; ++step) {
      copy_async_wait<kStages - 2>();
      __syncwarp();  // all lanes' copies have landed, and all lanes have read the stage to refill
      const StoredAbsmax current = stored[0];
#pragma unroll
      for (int later = 1; later < kAhead; ++later) stored[later - 1] = stored[later];
      const uint8_t* current_stage = ring + stage * kStageBytes;
      feed.fetch(ring + (stage + kAhead) % kStages * kStageBytes, stored[kAhead - 1]);
      stage = (stage + 1) % kStages;
      const int chunk = step * plan.sum_warps + sum_warp;
      if (chunk >= split_chunks) continue;

      // Lane n packs the absmax of rows n and n + 4 into one register. Only the lanes whose number
      // has no 4 in it are asked for theirs.
      const float row_absmax = current.decode(weight, offset);
      const uint32_t two_rows = pack_pair<T>(row_absmax, shuffle_xor(row_absmax, 4));
      uint4 tokens[kTokenTiles];
#pragma unroll
      for (int n8 = 0; n8 < kTokenTiles; ++n8) {
        // A lane beyond the last token reads the last one, and its results are not used. There are
        // such lanes only in the last two tiles.
        const int token = 8 * n8 + group;
        const int valid = n8 + 2 < kTokenTiles ? token : min(token, M - 1);
        tokens[n8] = load_shared(&staged_grad[(chunk * 4 + quarter) * pitch + valid]);
      }

#pragma unroll
      for (int half = 0; half < kSteps; ++half) {  // 16 rows each
        // 3. Load the words and exchange their nibbles. Register i has row `quarter` + 4 i and the
        // columns from 8 * group on.
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint8_t* rows_bytes = current_stage + (4 * half + i) * kPairRow;
          const uint8_t* word = rows_bytes + 32 * quarter + 4 * group;
          words[i] = load_shared(reinterpret_cast<const uint32_t*>(word));
        }
        uint32_t even[2], odd[2];  // byte j has column 2j, or 2j + 1, of two rows
        uint32_t absmax[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          constexpr uint32_t kHigh = 0xF0F0F0F0u;
          const uint32_t upper = words[2 * i], lower = words[2 * i + 1];
          even[i] = (upper & kHigh) | (lower >> 4 & ~kHigh);
          odd[i] = (upper << 4 & kHigh) | (lower & ~kHigh);
          absmax[i] = shuffle(two_rows, quarter + 8 * i + kRowsOfStep * half);
        }
#pragma unroll
        for (int j = 0; j < kFragments; ++j) {
          // 4. Decode, multiply by absmax, and multiply with grad.
          uint32_t fragment[4];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            fragment[2 * i] =
                multiply_pairs<T>(decode_pair(pairs, lane_offset, even[i], j), absmax[i]);
            fragment[2 * i + 1] =
                multiply_pairs<T>(decode_pair(pairs, lane_offset, odd[i], j), absmax[i]);
          }
#pragma unroll
          for (int n8 = 0; n8 < kTokenTiles; ++n8) {
            const uint4& t = tokens[n8];
            mma_16x8x16<T>(total[j][n8], fragment, half == 0 ? t.x : t.z, half == 0 ? t.y : t.w);
          }
        }
      }
    }

    // 5. Add the sums of the two warps that have the same columns, and store.
    const int64_t column = static_cast<int64_t>(tile) * kTileColumns + column_warp * kWarpColumns +
                           group * kLaneColumns;
    float* lane_sums = sums + column_warp * kWarpColumns * 8 + lane;
#pragma unroll
    for (int n8 = 0; n8 < kTokenTiles; ++n8) {
      if (sum_warp == 1) {
#pragma unroll
        for (int i = 0; i < 4 * kFragments; ++i) {
          store_shared(lane_sums + i * kLanes, total[i / 4][n8][i % 4]);
        }
      }
      __syncthreads();
      if (sum_warp == 0) {
#pragma unroll
        for (int i = 0; i < 4 * kFragments; ++i) {
          total[i / 4][n8][i % 4] += load_shared(lane_sums + i * kLanes);
        }
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const int token = 8 * n8 + 2 * quarter + odd;
          if (token >= M || column >= K) continue;
          float eight[kLaneColumns];
#pragma unroll
          for (int i = 0; i < kLaneColumns; ++i) eight[i] = total[i / 2][n8][i % 2 * 2 + odd];
          if (plan.splits == 1) {
            Bytes16<T> rounded;
#pragma unroll
            for (int i = 0; i < kLaneColumns; ++i) rounded.values[i] = round_to<T>(eight[i]);
            T* dx = static_cast<T*>(args.dx) + token * K + column;
            *reinterpret_cast<uint4*>(dx) = rounded.bits;
          } else {
            const int64_t row = static_cast<int64_t>(split) * M + token;
            auto* partials = reinterpret_cast<float4*>(args.partials + row * K + column);
            partials[0] = {eight[0], eight[1], eight[2], eight[3]};
            partials[1] = {eight[4], eight[5], eight[6], eight[7]};
          }
        }
      }
      __syncthreads();  // before the next sums
    }
    if (plan.splits > 1) {
      if (is_last_split(args.counters + tile, plan.splits, reinterpret_cast<bool*>(sums))) {
        store_sum_of_splits<T>(params, tile);
      }
      __syncthreads();  // before the next sums
    }
  }
}

template <class T>
cudaError_t launch_small(const NF4LinearBackwardSmallMParams& params, const LaunchShape& shape) {
  return with_token_tiles(params.args.tokens, [&](auto tiles) {
    return launch(nf4_linear_backward_small_m<T, decltype(tiles)::count>, shape, params);
  });
}

}  // namespace

cudaError_t nf4_linear_backward_small_m_cuda(const NF4LinearBackwardSmallMArgs& args,
                                             const SmallMPlan& plan, cudaStream_t stream) {
  if (args.weight.blocksize < kWarpColumns) return cudaErrorInvalidValue;
  LaunchShape shape;
  shape.threads = kThreads;
  shape.shared_bytes = static_cast<size_t>(plan.shared_bytes);
  shape.stream = stream;
  shape.grid.x = static_cast<unsigned>(plan.grid);
  if (plan.counters() > 0) {
    const cudaError_t error =
        cudaMemsetAsync(args.counters, 0, sizeof(unsigned) * plan.counters(), stream);
    if (error != cudaSuccess) return error;
  }
  constexpr int64_t kVectorElements = kVectorBytes / 2;
  const NF4LinearBackwardSmallMParams params = {
      args, plan, log2_of(args.weight.blocksize), log2_of(args.weight.nested_blocksize),
      aligned(args.grad) && args.weight.rows % kVectorElements == 0};
  if (args.dtype == DType::kFloat16) return launch_small<__half>(params, shape);
  if (args.dtype == DType::kBFloat16) return launch_small<__nv_bfloat16>(params, shape);
  return cudaErrorInvalidValue;
}

}  // namespace pylora::cuda
