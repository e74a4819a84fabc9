#include <algorithm>

#include "cuda/common/element.cuh"
#include "cuda/common/load_any.cuh"
#include "cuda/hopper/epilogue.cuh"
#include "cuda/hopper/feed.cuh"
#include "cuda/hopper/fragments.cuh"
#include "cuda/hopper/lora_linear.cuh"
#include "cuda/hopper/maps.cuh"
#include "cuda/hopper/ptx.cuh"
#include "cuda/hopper/tensor_map.cuh"
#include "cuda/many_rows/lora_shrink.cuh"
#include "cuda/nf4/nf4_pairs.cuh"
#include "cuda/nf4/stored_absmax.cuh"

namespace pylora::cuda {
namespace {

#if PYLORA_SM90A

// Registers of a thread: 128 * (24 + 2 * 240) are the SM's, less 1024.
constexpr int kFeedRegisters = 24;
constexpr int kConsumerRegisters = 240;

template <class T, int kTokens>
__device__ __forceinline__ void consume(const HopperProblem& problem, const Ring& ring,
                                        uint8_t* pairs, int consumer, int thread) {
  using Stages = HopperStages<kTokens>;
  const LoraLinearHopper& op = problem.op;
  const NF4Matrix& weight = op.weight;
  const int64_t blocks = weight.cols / kHopperColumns;
  const int64_t items = problem.plan.tiles * problem.plan.slices;
  const float offset = op.offset != nullptr ? __ldg(op.offset) : 0.0f;
  RingPlace place;
  const auto leave = [&](int stage) {
    if (thread % kLanes == 0) barrier_arrive(ring.empty + stage);
  };

  for (int64_t number = blockIdx.x; number < items; number += gridDim.x) {
    const Item item = Item::of<kTokens>(problem, number);
    const int64_t first_row = item.first_row + consumer * kGroupRows;
    uint32_t row_block[2] = {};  // where the two rows begin, counted in 64 columns
    StoredAbsmax stored[2];      // of the next block
    const auto fetch_absmax = [&](int half, int block) {
      const uint32_t of_absmax = (row_block[half] + block) >> problem.block_shift;
      stored[half].load(weight, of_absmax, problem.nested_block_shift);
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t n = min(first_row + fragment_row(thread, half), weight.rows - 1);
      row_block[half] = static_cast<uint32_t>(n * blocks);
      fetch_absmax(half, item.first_block);
    }

    float sums[kTokens / 2];
    uint32_t fragments[2][kSteps][4];
    int used = 0;  // the stage of the block before
    const auto take_block = [&](int block, uint32_t (&mine)[kSteps][4]) {
      // 3.
      Scale<T> scales[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        scales[half] = scale_of<T>(stored[half].decode(weight, offset));
        fetch_absmax(half, min(block + 1, item.end_block - 1));
      }
      const uint8_t* stage = ring.stages + place.stage * Stages::kBytes;
      barrier_wait(ring.full + place.stage, place.parity);
      const uint8_t* packed = stage + Stages::kXBytes + consumer * kGroupRows * kPackedRowBytes;
      decode_block<T>(mine, pairs, packed, scales, thread);
      // 4.
      const SharedOperand x = shared_operand(stage);
      settle(mine);
      multiply_fence();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        multiply<T, kTokens>(sums, mine[step], x.behind(step * kStepBytes),
                             block > item.first_block || step > 0);
      }
      multiply_commit();
      multiply_wait<1>();
      if (block > item.first_block) leave(used);
      used = place.stage;
      place.advance(Stages::kCount);
    };
    int block = item.first_block;
    for (; block + 1 < item.end_block; block += 2) {
      take_block(block, fragments[0]);
      take_block(block + 1, fragments[1]);
    }
    if (block < item.end_block) take_block(block, fragments[0]);
    multiply_wait<0>();
    leave(used);

    // 5.
    for (int first = 0; item.has_low && first < op.hidden.rank; first += kLowColumns) {
      load_lora_B(fragments[0], op, first_row, first, thread);
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
      store_turn<T>(op, pairs, first_row, first_token, consumer, thread, sums_of);
    };
    if (problem.plan.slices == 1) {
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        store(turn, [&](int batch, float (&of_batch)[kBatchSums]) {
#pragma unroll
          for (int i = 0; i < kBatchSums; ++i) {
            of_batch[i] = sums[(turn * kBatches + batch) * kBatchSums + i];
          }
        });
      }
    } else if (leave_slice<kTokens>(problem, item, ring.is_last + consumer, sums, consumer,
                                    thread)) {
#pragma unroll 1
      for (int turn = 0; turn < kTurns; ++turn) {
        store(turn, [&](int batch, float (&of_batch)[kBatchSums]) {
          add_slices<kTokens>(problem, item, of_batch, turn * kBatches + batch, consumer, thread);
        });
      }
    }
  }
}

#endif

template <class T, int kTokens>
__global__ void __launch_bounds__(kHopperThreads, 1)
    nf4_linear_hopper(const __grid_constant__ HopperProblem problem) {
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
    give_registers<kFeedRegisters>();
    if (thread == 0) feed<kTokens>(problem, ring);
  } else {
    take_registers<kConsumerRegisters>();
    consume<T, kTokens>(problem, ring, pairs, group - 1, thread);
  }
#else
  __trap();  // the launcher's caller has asked for the capability; code for others has no body
#endif
}

int log2_of(int64_t power) {
  int result = 0;
  while (int64_t{1} << result < power) ++result;
  return result;
}

template <class T, int kTokens>
cudaError_t launch_hopper(const HopperProblem& problem, LaunchShape shape) {
  shape.shared_bytes = HopperStages<kTokens>::kSharedBytes;
  return launch(nf4_linear_hopper<T, kTokens>, shape, problem);
}

template <class T>
cudaError_t launch_hopper(const HopperProblem& problem, const LaunchShape& shape) {
  return problem.plan.tile_tokens == 256 ? launch_hopper<T, 256>(problem, shape)
                                         : launch_hopper<T, 128>(problem, shape);
}

}  // namespace

cudaError_t nf4_linear_hopper_cuda(const LoraLinearHopper& op, const HopperPlan& plan,
                                   cudaStream_t stream) {
  const NF4Matrix& weight = op.weight;
  HopperProblem problem = {};
  problem.op = op;
  problem.plan = plan;
  problem.block_shift = log2_of(weight.blocksize / kHopperColumns);
  problem.nested_block_shift = log2_of(weight.nested_blocksize);

  TiledMatrix x;
  x.data = op.x;
  x.item_bytes = 2;
  x.rows = op.tokens;
  x.cols = weight.cols;
  x.pitch = 2 * weight.cols;
  x.tile_rows = plan.tile_tokens;
  TiledMatrix packed;
  packed.data = weight.qweight;
  packed.rows = weight.rows;
  packed.cols = packed.pitch = weight.cols / 2;
  packed.tile_rows = kTileRows;
  packed.swizzle = Swizzle::k32;
  cudaError_t error = encode_tensor_map(x, &problem.x_map);
  if (error == cudaSuccess) error = encode_tensor_map(packed, &problem.packed_map);
  if (error == cudaSuccess && plan.counters() > 0) {
    error = cudaMemsetAsync(op.counters, 0, sizeof(unsigned) * plan.counters(), stream);
  }

  LaunchShape shape;
  shape.grid.x = static_cast<unsigned>(plan.grid);
  shape.block = kHopperThreads;
  shape.stream = stream;
  if (op.hidden.rank > 0) {
    TiledMatrix low;
    low.data = op.hidden.low;
    low.item_bytes = 4;
    low.rows = op.tokens;
    low.cols = op.hidden.rank;
    low.pitch = 4 * low_pitch(op.hidden.rank);
    low.tile_rows = plan.tile_tokens;
    if (error == cudaSuccess) error = encode_tensor_map(low, &problem.low_map);
    if (error == cudaSuccess) {
      error = lora_hidden_many_cuda(op.hidden, op.dtype, op.x, op.tokens, weight.cols,
                                    low_pitch(op.hidden.rank), stream);
    }
    shape.dependent = true;
  }
  if (error != cudaSuccess) return error;
  if (op.dtype == DType::kFloat16) return launch_hopper<__half>(problem, shape);
  if (op.dtype == DType::kBFloat16) return launch_hopper<__nv_bfloat16>(problem, shape);
  return cudaErrorInvalidValue;
}

}  // namespace pylora::cuda
