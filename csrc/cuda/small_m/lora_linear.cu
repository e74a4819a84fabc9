#include "cuda/common/element.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/limits.h"
#include "cuda/nf4/nf4_decode.cuh"
#include "cuda/small_m/chunk_feed.cuh"
#include "cuda/small_m/lora_epilogue.cuh"
#include "cuda/small_m/lora_linear.cuh"
#include "cuda/small_m/lora_shrink.cuh"
#include "cuda/small_m/tiles.cuh"

namespace pylora::cuda {
namespace {

__device__ __forceinline__ int64_t partial_element(const LoraLinearSmallMArgs& args, int split,
                                                   int token, int n) {
  return (static_cast<int64_t>(split) * args.tokens + token) * args.weight.rows + n;
}

// kTokenTiles: of 8 tokens; the last may have none. kBlock32: blocks of 32, where one word of
// qweight ends a block.
template <class T, int kTokenTiles, bool kBlock32>
__global__ void __launch_bounds__(kThreads, ctas_per_sm(kTokenTiles))
    lora_linear_small_m(LoraLinearSmallMParams params) {
  constexpr int kPassTiles = pass_tiles(kTokenTiles);
  constexpr int kAbsmax = kBlock32 ? 2 : 1;  // a lane's share of the chunk's
  const LoraLinearSmallMArgs& args = params.args;
  const SmallMPlan& plan = params.plan;
  const NF4Matrix& weight = args.weight;
  const int N = static_cast<int>(weight.rows), K = static_cast<int>(weight.cols);
  const int M = args.tokens;
  const int pitch = plan.pitch;
  const int chunks = (K + kChunk - 1) / kChunk;

  uint8_t* pairs = dynamic_shared_memory();
  auto* sums = reinterpret_cast<float*>(pairs + kPairBytes);
  // Between the sums of two tokens, where no sum is written: who did not come last goes on while
  // others still read it.
  bool* is_last_flag = reinterpret_cast<bool*>(sums + kWarpRows);
  auto* staged_x = reinterpret_cast<uint4*>(sums + sum_floats(kPassTiles));

  const int thread = threadIdx.x;
  const int warp = uniform_warp(thread);
  const int lane = thread % kLanes;
  const int group = lane / 4;    // row of the fragment, or token
  const int quarter = lane % 4;  // place along k
  const int row_warp = warp % plan.output_warps;
  const int k_warp = warp / plan.output_warps;
  const float offset = args.offset != nullptr ? __ldg(args.offset) : 0.0f;

  // 1.
  uint8_t* ring = hole(pairs, warp * kStages * kStageHoles);
  WorkRange work(plan);
  ChunkFeed<kAbsmax> feed(params, Chunks(plan, work, chunks, k_warp), row_warp, lane);
  StoredAbsmax stored[kAhead][kAbsmax];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) feed.fetch(ring + i * kStageBytes, stored[i]);

  // 2.
  fill_pairs<T>(pairs, thread);
  const uint32_t lane_offset = 4 * static_cast<uint32_t>(lane);
  int staged_split = -1;
  unsigned stage = 0;
  bool is_first = true;

  for (; work.left > 0; work.next(plan)) {
    const int split = work.split, tile = work.tile;
    const int first_chunk = split * plan.split_chunks;
    const int split_chunks = min(plan.split_chunks, chunks - first_chunk);
    if (split != staged_split) {  // all have left the split before: the last barrier of 6.
      const int vectors = plan.split_chunks * (kChunk / 8) * M;
      for (int i = thread; i < vectors; i += kThreads) {
        const int column = first_chunk * kChunk + i / M * 8;
        uint4 value = {0, 0, 0, 0};
        if (column < K) {
          const T* source =
              static_cast<const T*>(args.x) + static_cast<int64_t>(i % M) * K + column;
          value = __ldg(reinterpret_cast<const uint4*>(source));
        }
        store_shared(&staged_x[i / M * pitch + i % M], value);
      }
      staged_split = split;
      __syncthreads();
    }

    if (args.shrink.rank > 0) prefetch_lora_B<T>(args, tile, plan.output_warps * kWarpRows);

    float total[kTokenTiles][4] = {};
    for (int step = 0; step < plan.steps; ++step) {
      copy_async_wait<kStages - 2>();
      __syncwarp();  // the copies of all lanes have landed, and all have read the stage to refill
      StoredAbsmax mine[kAbsmax];
      float absmax[kAbsmax];
#pragma unroll
      for (int i = 0; i < kAbsmax; ++i) {
        mine[i] = stored[0][i];
#pragma unroll
        for (int later = 1; later < kAhead; ++later) stored[later - 1][i] = stored[later][i];
        absmax[i] = mine[i].decode(weight, offset);
      }
      const uint8_t* used = ring + stage * kStageBytes;
      feed.fetch(ring + (stage + kAhead) % kStages * kStageBytes, stored[kAhead - 1]);
      stage = (stage + 1) % kStages;
      const int chunk = step * plan.sum_warps + k_warp;
      if (chunk >= split_chunks) continue;

#pragma unroll
      for (int k64 = 0; k64 < 2; ++k64) {  // 64 columns each
        // 3.
        uint32_t words[4];  // rows `group` and `group` + 8; the same 32 columns on
        load_matrices(words, used + chunk_offset(4 * k64 + lane / 8, lane % 8));
        float part[kTokenTiles][4] = {};
#pragma unroll
        for (int word = 0; word < 2; ++word) {
          const int column = chunk * (kChunk / 8) + 8 * k64 + 4 * word + quarter;
          uint4 tokens[kTokenTiles];
#pragma unroll
          for (int n8 = 0; n8 < kTokenTiles; ++n8) {
            // Beyond the last token, in one of the last two tiles, the results are not used.
            const int token = 8 * n8 + group;
            const int valid = n8 + 2 < kTokenTiles ? token : min(token, M - 1);
            tokens[n8] = load_shared(&staged_x[column * pitch + valid]);
          }
          // 4.
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            uint32_t fragment[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              fragment[i] =
                  decode_pair(pairs, lane_offset, words[2 * word + i % 2], 2 * half + i / 2);
            }
#pragma unroll
            for (int n8 = 0; n8 < kTokenTiles; ++n8) {
              const uint4& t = tokens[n8];
              mma_16x8x16<T>(part[n8], fragment, half == 0 ? t.x : t.z, half == 0 ? t.y : t.w);
            }
          }
          // 5.
          if (!kBlock32 && word == 0) continue;
          const float own = absmax[kBlock32 ? word : 0];
          const float upper = shuffle(own, 2 * group + k64);
          const float lower = shuffle(own, 2 * (group + 8) + k64);
#pragma unroll
          for (int n8 = 0; n8 < kTokenTiles; ++n8) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              total[n8][i] = fmaf(part[n8][i], i < 2 ? upper : lower, total[n8][i]);
              part[n8][i] = 0.0f;
            }
          }
        }
      }
    }

    // 6. In passes of 16 tokens: the sums of more would take x's place in shared memory. Where K is
    // is_split the CTA that comes last makes the passes once more, over the sums of the splits.
    const int passes = (M + kPassTokens - 1) / kPassTokens;
    const int rows = plan.output_warps * kWarpRows;
    const bool is_split = plan.splits > 1;
#pragma unroll 1
    for (int turn = 0; turn < (is_split ? 2 : 1) * passes; ++turn) {
      const bool again = turn >= passes;
      const int pass = again ? turn - passes : turn;
      const int first = pass * kPassTokens;
      if (turn == passes && !is_last_split(args.counters + tile, plan.splits, is_last_flag)) break;
      const auto sum_of_warps = [&](int token, int row) {
        float sum = 0.0f;
        for (int w = row / kWarpRows; w < kWarps; w += plan.output_warps) {
          sum += load_shared(&sums[sum_index(kPassTiles, w, token - first, row % kWarpRows)]);
        }
        return sum;
      };
      if (!again) {
#pragma unroll
        for (int n8 = 0; n8 < kTokenTiles; ++n8) {
          if (n8 / kPassTiles != pass) continue;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int token = 8 * (n8 % kPassTiles) + 2 * quarter + i % 2;
            store_shared(&sums[sum_index(kPassTiles, warp, token, group + i / 2 * 8)],
                         total[n8][i]);
          }
        }
        __syncthreads();
        if (is_first && pass == 0) wait_for_previous_kernel();
        const int outputs = is_split ? rows * min(kPassTokens, M - first) : 0;
        for (int i = thread; i < outputs; i += kThreads) {
          const int token = first + i / rows, row = i % rows, n = tile * rows + row;
          if (n < N)
            args.partials[partial_element(args, split, token, n)] = sum_of_warps(token, row);
        }
      }
      if (again || !is_split) {
        store_outputs<T>(params, tile, first, [&](int token, int row) {
          if (!is_split) return sum_of_warps(token, row);
          float sum = 0.0f;
          for (int s = 0; s < plan.splits; ++s) {
            sum += load_from_l2(args.partials + partial_element(args, s, token, tile * rows + row));
          }
          return sum;
        });
      }
      __syncthreads();  // before the next sums
    }
    is_first = false;
  }
}

template <class T>
cudaError_t launch_small(const LoraLinearSmallMParams& params, const LaunchShape& shape) {
  return with_token_tiles(params.args.tokens, [&](auto tiles) {
    constexpr int kTokenTiles = decltype(tiles)::count;
    if constexpr (kTokenTiles <= token_tiles(kMaxSmallMBlock32)) {
      if (params.args.weight.blocksize == 32) {
        return launch(lora_linear_small_m<T, kTokenTiles, true>, shape, params);
      }
    }
    return launch(lora_linear_small_m<T, kTokenTiles, false>, shape, params);
  });
}

}  // namespace

cudaError_t lora_linear_small_m_cuda(const LoraLinearSmallMArgs& args, const SmallMPlan& plan,
                                     bool dependent_launch, cudaStream_t stream) {
  const bool block32 = args.weight.blocksize == 32;
  if (args.tokens > (block32 ? kMaxSmallMBlock32 : kMaxSmallM)) {
    return cudaErrorInvalidValue;
  }
  cudaError_t error = cudaSuccess;
  LaunchShape shape;
  shape.threads = kThreads;
  shape.shared_bytes = static_cast<size_t>(plan.shared_bytes);
  shape.stream = stream;
  shape.grid.x = static_cast<unsigned>(plan.grid);
  if (args.shrink.rank > 0) {
    error = lora_shrink_small_m_cuda(args.shrink, args.dtype, args.x, args.tokens, args.weight.cols,
                                     args.counters, plan.counters(), stream);
    shape.dependent = dependent_launch;
  } else if (plan.counters() > 0) {
    error = cudaMemsetAsync(args.counters, 0, sizeof(unsigned) * plan.counters(), stream);
  }
  if (error != cudaSuccess) return error;
  const LoraLinearSmallMParams params = {
      args, plan, log2_of(args.weight.blocksize), log2_of(args.weight.nested_blocksize),
      args.shrink.rank % kRankVector == 0 && aligned(args.lora_B)};
  if (args.dtype == DType::kFloat16) return launch_small<__half>(params, shape);
  if (args.dtype == DType::kBFloat16) return launch_small<__nv_bfloat16>(params, shape);
  return cudaErrorInvalidValue;
}

}  // namespace pylora::cuda
