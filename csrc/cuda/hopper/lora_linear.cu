#include <algorithm>

#include "cuda/common/element.cuh"
#include "cuda/hopper/epilogue.cuh"
#include "cuda/hopper/fragments.cuh"
#include "cuda/hopper/lora_linear.cuh"
#include "cuda/hopper/maps.cuh"
#include "cuda/hopper/producer.cuh"
#include "cuda/hopper/ptx.cuh"
#include "cuda/hopper/tensor_map.cuh"
#include "cuda/many_rows/lora_shrink.cuh"
#include "cuda/nf4/nf4_decode.cuh"

namespace pylora::cuda {
namespace {

#if PYLORA_SM90A

// Registers of a thread: 128 * (24 + 2 * 240) are the SM's, less 1024.
constexpr int kProducerRegisters = 24;
constexpr int kConsumerRegisters = 240;

template <class T, int kTokens>
__device__ __forceinline__ void consume(const LoraLinearHopperParams& params, const Ring& ring,
                                        uint8_t* pairs, int consumer, int thread) {
  using Stages = HopperStages<kTokens>;
  const LoraLinearHopperArgs& args = params.args;
  const NF4Matrix& weight = args.weight;
  const int64_t k_tiles = weight.cols / kHopperColumns;
  const int64_t items = params.plan.tiles * params.plan.splits;
  const float offset = args.offset != nullptr ? __ldg(args.offset) : 0.0f;
  RingPlace place;
  const auto leave = [&](int stage) {
    if (thread % kLanes == 0) barrier_arrive(ring.empty + stage);
  };

  for (int64_t number = blockIdx.x; number < items; number += gridDim.x) {
    const WorkItem item = WorkItem::make<kTokens>(params, number);
    const int64_t first_row = item.first_row + consumer * kGroupRows;
    uint32_t row_k_tile[2] = {};  // where the two rows begin, counted in 64 columns
    StoredAbsmax stored[2];       // of the next k_tile
    const auto fetch_absmax = [&](int half, int k_tile) {
      const uint32_t of_absmax = (row_k_tile[half] + k_tile) >> params.block_shift;
      stored[half].load(weight, of_absmax, params.nested_block_shift);
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t n = min(first_row + fragment_row(thread, half), weight.rows - 1);
      row_k_tile[half] = static_cast<uint32_t>(n * k_tiles);
      fetch_absmax(half, item.first_k_tile);
    }

    float sums[kTokens / 2];
    uint32_t fragments[2][kSteps][4];
    int used = 0;  // the stage of the k_tile before
    const auto take_k_tile = [&](int k_tile, uint32_t (&mine)[kSteps][4]) {
      // 3.
      Scale<T> scales[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        scales[half] = scale_of<T>(stored[half].decode(weight, offset));
        fetch_absmax(half, min(k_tile + 1, item.end_k_tile - 1));
      }
      const uint8_t* stage = ring.stages + place.stage * Stages::kBytes;
      barrier_wait(ring.full + place.stage, place.parity);
      const uint8_t* packed = stage + Stages::kXBytes + consumer * kGroupRows * kPackedRowBytes;
      decode_k_tile<T>(mine, pairs, packed, scales, thread);
      // 4.
      const SharedOperand x = shared_operand(stage);
      settle(mine);
      multiply_fence();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        multiply<T, kTokens>(sums, mine[step], x.behind(step * kStepBytes),
                             k_tile > item.first_k_tile || step > 0);
      }
      multiply_commit();
      multiply_wait<1>();
      if (k_tile > item.first_k_tile) leave(used);
      used = place.stage;
      place.advance(Stages::kCount);
    };
    int k_tile = item.first_k_tile;
    for (; k_tile + 1 < item.end_k_tile; k_tile += 2) {
      take_k_tile(k_tile, fragments[0]);
      take_k_tile(k_tile + 1, fragments[1]);
    }
    if (k_tile < item.end_k_tile) take_k_tile(k_tile, fragments[0]);
    multiply_wait<0>();
    leave(used);

    // 5.
    for (int first = 0; item.has_low && first < args.shrink.rank; first += kLowColumns) {
      load_lora_B(fragments[0], args, first_row, first, thread);
      barrier_wait(ring.full + place.stage, place.parity);
      const SharedOperand low = shared_operand(ring.stages + place.stage * Stages::kBytes);
      settle(fragments[0]);
      multiply_fence();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        multiply<float, kTokens>(sums, fragments[0][step], low.behind(step * kStepBytes), 1);
      }
      multiply_commit();
      multiply_wait<0>();
      leave(place.stage);
      place.advance(Stages::kCount);
    }
    settle(sums);
    constexpr int kTurns = kTokens / kStagedTokens;
    constexpr int kBatches = kTokens / 2 / kBatchSums / kTurns;  // of a turn
    const auto store = [&](int turn, const auto& sums_of) {
      const int64_t first_token = item.first_token + turn * kStagedTokens;
      store_turn<T>(args, pairs, first_row, first_token, consumer, thread, sums_of);
    };
    if (params.plan.splits == 1) {
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        store(turn, [&](int batch, float (&of_batch)[kBatchSums]) {
#pragma unroll
          for (int i = 0; i < kBatchSums; ++i) {
            of_batch[i] = sums[(turn * kBatches + batch) * kBatchSums + i];
          }
        });
      }
    } else if (store_partials<kTokens>(params, item, ring.is_last + consumer, sums, consumer,
                                       thread)) {
#pragma unroll 1
      for (int turn = 0; turn < kTurns; ++turn) {
        store(turn, [&](int batch, float (&of_batch)[kBatchSums]) {
          sum_splits<kTokens>(params, item, of_batch, turn * kBatches + batch, consumer, thread);
        });
      }
    }
  }
}

#endif

template <class T, int kTokens>
__global__ void __launch_bounds__(kHopperThreads, 1)
    lora_linear_hopper(const __grid_constant__ LoraLinearHopperParams params) {
#if PYLORA_SM90A
  using Stages = HopperStages<kTokens>;
  uint8_t* pairs = tiled_shared_memory();
  Ring ring;
  ring.stages = pairs + kPairBytes;
  ring.full = reinterpret_cast<Barrier*>(ring.stages + Stages::kCount * Stages::kBytes);
  ring.empty = ring.full + Stages::kCount;
  ring.is_last = reinterpret_cast<int*>(ring.empty + Stages::kCount);
  const int thread = threadIdx.x % kGroupThreads;
  const int group = threadIdx.x / kGroupThreads;

  // 1.
  if (threadIdx.x < kPairEntries) fill_pairs<T>(pairs, static_cast<int>(threadIdx.x));
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Stages::kCount; ++stage) {
      barrier_init(ring.full + stage, 1);
      barrier_init(ring.empty + stage, kConsumerWarps);
    }
    barrier_init_fence();
  }
  __syncthreads();

  if (group == 0) {
    give_registers<kProducerRegisters>();
    if (thread == 0) produce<kTokens>(params, ring);
  } else {
    take_registers<kConsumerRegisters>();
    consume<T, kTokens>(params, ring, pairs, group - 1, thread);
  }
#else
  __trap();  // the launcher's caller has asked for the capability; code for others has no body
#endif
}

template <class T, int kTokens>
cudaError_t launch_hopper(const LoraLinearHopperParams& params, LaunchShape shape) {
  shape.shared_bytes = HopperStages<kTokens>::kSharedBytes;
  return launch(lora_linear_hopper<T, kTokens>, shape, params);
}

template <class T>
cudaError_t launch_hopper(const LoraLinearHopperParams& params, const LaunchShape& shape) {
  return params.plan.tile_tokens == 256 ? launch_hopper<T, 256>(params, shape)
                                        : launch_hopper<T, 128>(params, shape);
}

}  // namespace

cudaError_t lora_linear_hopper_cuda(const LoraLinearHopperArgs& args, const HopperPlan& plan,
                                    cudaStream_t stream) {
  const NF4Matrix& weight = args.weight;
  LoraLinearHopperParams params = {};
  params.args = args;
  params.plan = plan;
  params.block_shift = log2_of(weight.blocksize / kHopperColumns);
  params.nested_block_shift = log2_of(weight.nested_blocksize);

  TiledMatrix x;
  x.data = args.x;
  x.item_bytes = 2;
  x.rows = args.tokens;
  x.cols = weight.cols;
  x.pitch = 2 * weight.cols;
  x.tile_rows = plan.tile_tokens;
  TiledMatrix packed;
  packed.data = weight.qweight;
  packed.rows = weight.rows;
  packed.cols = packed.pitch = weight.cols / 2;
  packed.tile_rows = kTileRows;
  packed.swizzle = Swizzle::k32;
  cudaError_t error = encode_tensor_map(x, &params.x_map);
  if (error == cudaSuccess) error = encode_tensor_map(packed, &params.packed_map);
  if (error == cudaSuccess && plan.counters() > 0) {
    error = cudaMemsetAsync(args.counters, 0, sizeof(unsigned) * plan.counters(), stream);
  }

  LaunchShape shape;
  shape.grid.x = static_cast<unsigned>(plan.grid);
  shape.threads = kHopperThreads;
  shape.stream = stream;
  if (args.shrink.rank > 0) {
    TiledMatrix low;
    low.data = args.shrink.low;
    low.item_bytes = 4;
    low.rows = args.tokens;
    low.cols = args.shrink.rank;
    low.pitch = 4 * low_pitch(args.shrink.rank);
    low.tile_rows = plan.tile_tokens;
    if (error == cudaSuccess) error = encode_tensor_map(low, &params.low_map);
    if (error == cudaSuccess) {
      error = lora_shrink_many_rows_cuda(args.shrink, args.dtype, args.x, args.tokens, weight.cols,
                                         low_pitch(args.shrink.rank), stream);
    }
    shape.dependent = true;
  }
  if (error != cudaSuccess) return error;
  if (args.dtype == DType::kFloat16) return launch_hopper<__half>(params, shape);
  if (args.dtype == DType::kBFloat16) return launch_hopper<__nv_bfloat16>(params, shape);
  return cudaErrorInvalidValue;
}

}  // namespace pylora::cuda
