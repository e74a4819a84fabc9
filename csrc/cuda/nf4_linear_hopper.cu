#include <algorithm>

#include "cuda/element.cuh"
#include "cuda/hopper_maps.cuh"
#include "cuda/load_any.cuh"
#include "cuda/lora_hidden_many.cuh"
#include "cuda/nf4_absmax.cuh"
#include "cuda/nf4_linear_hopper.cuh"
#include "cuda/nf4_pairs.cuh"
#include "cuda/ptx_hopper.cuh"
#include "cuda/tensor_map.cuh"
#include "cuda/tf32.cuh"

namespace pylora {
namespace {

// Registers of a thread: 128 * (24 + 2 * 240) are the SM's, less 1024.
constexpr int kFeedRegisters = 24;
constexpr int kConsumerRegisters = 240;

struct HopperProblem {
  TensorMap x_map, packed_map, low_map;
  LoraLinear op;
  HopperPlan plan;
  int block_shift;         // log2 of blocksize / 64
  int nested_block_shift;  // log2 of nested_blocksize
};

#if PYLORA_SM90A

struct Ring {
  uint8_t* stages;
  Barrier* full;   // a stage's copies have come
  Barrier* empty;  // the consumers have left it
};

// 2.
template <int kTokens>
__device__ __forceinline__ void feed(const HopperProblem& problem, const Ring& ring) {
  using Stages = HopperStages<kTokens>;
  const int blocks = static_cast<int>(problem.op.weight.cols / kHopperColumns);
  const int rank = problem.op.hidden.rank;
  bool low_is_there = false;
  RingPlace place;
  prefetch_map(problem.x_map);
  prefetch_map(problem.packed_map);
  for (int64_t tile = blockIdx.x; tile < problem.plan.tiles; tile += gridDim.x) {
    const int row = static_cast<int>(tile % problem.plan.row_tiles) * kTileRows;
    const int token = static_cast<int>(tile / problem.plan.row_tiles) * kTokens;
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
      uint8_t* stage = ring.stages + place.stage * Stages::kBytes;
      Barrier* full = ring.full + place.stage;
      barrier_wait(ring.empty + place.stage, place.parity ^ 1);
      barrier_arrive_expect(full, Stages::kBytes);
      copy_tile(stage, problem.x_map, token, block * static_cast<int>(kHopperColumns), full);
      copy_tile(stage + Stages::kXBytes, problem.packed_map, row, block * kPackedRowBytes, full);
      place.advance(Stages::kCount);
    }
    if (rank > 0 && !low_is_there) wait_for_previous_kernel();
    low_is_there = true;
#pragma unroll 1
    for (int first = 0; first < rank; first += kLowColumns) {
      Barrier* full = ring.full + place.stage;
      barrier_wait(ring.empty + place.stage, place.parity ^ 1);
      barrier_arrive_expect(full, Stages::kXBytes);
      copy_tile(ring.stages + place.stage * Stages::kBytes, problem.low_map, token, first, full);
      place.advance(Stages::kCount);
    }
  }
}

// absmax as two numbers of T whose sum it is, each twice in a register.
template <class T>
struct Scale {
  uint32_t high, low;
};
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float first, float second) {
  union {
    T values[2];
    uint32_t word;
  } pair;
  pair.values[0] = round_to<T>(first);
  pair.values[1] = round_to<T>(second);
  return pair.word;
}
template <class T>
__device__ __forceinline__ Scale<T> scale_of(float absmax) {
  const float rest = absmax - to_fp32(round_to<T>(absmax));
  return {pack_pair<T>(absmax, absmax), pack_pair<T>(rest, rest)};
}

// 3. The fragments of a block out of the warpgroup's 64 rows of the packed tile.
template <class T>
__device__ __forceinline__ void decode_block(uint32_t (&fragments)[kSteps][4], const uint8_t* pairs,
                                             const uint8_t* packed, const Scale<T> (&scales)[2],
                                             int thread) {
  const uint32_t lane_offset = 4 * static_cast<uint32_t>(thread % kLanes);
  uint4 units[2][2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int unit = 0; unit < 2; ++unit) {
      const int offset = packed_offset(fragment_row(thread, half), unit);
      units[half][unit] = *reinterpret_cast<const uint4*>(packed + offset);
    }
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int word = fragment_word(step, i);
      const uint4& unit = units[i % 2][word / 4];
      const uint32_t words[4] = {unit.x, unit.y, unit.z, unit.w};
      const uint32_t codes =
          decode_pair(pairs, lane_offset, words[word % 4], fragment_byte(thread));
      const Scale<T>& scale = scales[i % 2];
      fragments[step][i] = fma_pair<T>(codes, scale.high, multiply_pair<T>(codes, scale.low));
    }
  }
}

// 5. lora_B as fragments, from column `first` of the rank on; 0 outside of it.
__device__ __forceinline__ void load_lora_B(uint32_t (&fragments)[kSteps][4], const LoraLinear& op,
                                            int64_t first_row, int first, int thread) {
  const Vector lora_B = {op.lora_B, op.hidden.dtype};
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t n = first_row + fragment_row(thread, i);
      const int r = first + fragment_rank(thread, step, i);
      const bool valid = n < op.weight.rows && r < op.hidden.rank;
      const float value = valid ? load_any(lora_B, n * op.hidden.rank + r) : 0.0f;
      fragments[step][i] = to_tf32(value);
    }
  }
}

// 6. What the biases add to the outputs of a row of W.
__device__ __forceinline__ float bias_of(const LoraLinear& op, int64_t n) {
  float sum = 0.0f;
  if (n >= op.weight.rows) return sum;
  if (op.bias.data != nullptr) sum = load_any(op.bias, n);
  if (op.lora_B_bias.data != nullptr) sum += op.hidden.scaling * load_any(op.lora_B_bias, n);
  return sum;
}

// 6.
template <class T, int kTokens>
__device__ __forceinline__ void store_tile(const LoraLinear& op, uint8_t* pairs,
                                           const float (&sums)[kTokens / 2], int64_t first_row,
                                           int64_t first_token, int consumer, int thread) {
  constexpr int kUnits = kGroupRows * sizeof(T) / kVectorBytes;
  const int64_t N = op.weight.rows;
  const int warp = thread / kLanes, lane = thread % kLanes;
  const auto place = [&](int token, int unit) {
    return hole(pairs, staging_hole(consumer, token)) + staging_unit(token, unit) * kVectorBytes;
  };
  float added[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    added[half] = bias_of(op, first_row + fragment_row(thread, half));
  }
#pragma unroll
  for (int turn = 0; turn < kTokens / kStagedTokens; ++turn) {
#pragma unroll
    for (int pair = 0; pair < kStagedTokens / 16; ++pair) {
      uint32_t out[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int sum = 4 * (turn * kStagedTokens / 8 + staged_octet(pair, i)) + i % 2 * 2;
        out[i] = pack_pair<T>(sums[sum] + added[i % 2], sums[sum + 1] + added[i % 2]);
      }
      store_matrices_transposed(place(staged_token(pair, lane), staged_unit(warp, lane)), out);
    }
    named_barrier<kGroupThreads>(1 + consumer);
    for (int i = thread; i < kStagedTokens * kUnits; i += kGroupThreads) {
      const int token = i / kUnits, unit = i % kUnits;
      const int64_t m = first_token + turn * kStagedTokens + token;
      const int64_t n = first_row + unit * Chunk<T>::kElements;
      if (m >= op.tokens || n >= N) continue;
      T* y = static_cast<T*>(op.y) + m * N + n;
      const uint8_t* staged = place(token, unit);
      if (N % Chunk<T>::kElements == 0) {
        *reinterpret_cast<uint4*>(y) = *reinterpret_cast<const uint4*>(staged);
      } else {
        for (int j = 0; j < Chunk<T>::kElements && n + j < N; ++j) {
          y[j] = reinterpret_cast<const T*>(staged)[j];
        }
      }
    }
    named_barrier<kGroupThreads>(1 + consumer);  // before the next turn writes
  }
}

template <class T, int kTokens>
__device__ __forceinline__ void consume(const HopperProblem& problem, const Ring& ring,
                                        uint8_t* pairs, int consumer, int thread) {
  using Stages = HopperStages<kTokens>;
  const LoraLinear& op = problem.op;
  const NF4Matrix& weight = op.weight;
  const int blocks = static_cast<int>(weight.cols / kHopperColumns);
  const float offset = op.offset != nullptr ? __ldg(op.offset) : 0.0f;
  RingPlace place;
  const auto leave = [&](int stage) {
    if (thread % kLanes == 0) barrier_arrive(ring.empty + stage);
  };

  for (int64_t tile = blockIdx.x; tile < problem.plan.tiles; tile += gridDim.x) {
    const int64_t first_row = tile % problem.plan.row_tiles * kTileRows + consumer * kGroupRows;
    const int64_t first_token = tile / problem.plan.row_tiles * kTokens;
    uint32_t first_block[2] = {};  // of the two rows, counted in 64 columns
    StoredAbsmax stored[2];        // of the next block
    const auto fetch_absmax = [&](int half, int block) {
      const uint32_t of_absmax = (first_block[half] + block) >> problem.block_shift;
      stored[half] = load_absmax(weight, of_absmax, problem.nested_block_shift);
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t n = min(first_row + fragment_row(thread, half), weight.rows - 1);
      first_block[half] = static_cast<uint32_t>(n * blocks);
      fetch_absmax(half, 0);
    }

    float sums[kTokens / 2];
    uint32_t fragments[2][kSteps][4];
    int used = 0;  // the stage of the block before
    const auto take_block = [&](int block, uint32_t (&mine)[kSteps][4]) {
      // 3.
      Scale<T> scales[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        scales[half] = scale_of<T>(absmax_of(weight, stored[half], offset));
        fetch_absmax(half, min(block + 1, blocks - 1));
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
        multiply<T, kTokens>(sums, mine[step], x.behind(step * kStepBytes), block > 0 || step > 0);
      }
      multiply_commit();
      multiply_wait<1>();
      if (block > 0) leave(used);
      used = place.stage;
      place.advance(Stages::kCount);
    };
    int block = 0;
    for (; block + 1 < blocks; block += 2) {
      take_block(block, fragments[0]);
      take_block(block + 1, fragments[1]);
    }
    if (block < blocks) take_block(block, fragments[0]);
    multiply_wait<0>();
    leave(used);

    // 5.
    for (int first = 0; first < op.hidden.rank; first += kLowColumns) {
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
    store_tile<T, kTokens>(op, pairs, sums, first_row, first_token, consumer, thread);
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

HopperPlan plan_hopper(int64_t tokens, int64_t rows, int processors) {
  HopperPlan plan;
  plan.row_tiles = ceil_div(rows, kTileRows);
  const auto tiles_of = [&](int64_t of_tile) { return plan.row_tiles * ceil_div(tokens, of_tile); };
  // Rounds over the SMs times what a tile costs: for 128 tokens 0.6 of 256, since shared memory is
  // its limit. An estimate.
  const int64_t wide = 10 * ceil_div(tiles_of(256), processors);
  const int64_t narrow = 6 * ceil_div(tiles_of(128), processors);
  plan.tile_tokens = narrow < wide ? 128 : 256;
  plan.tiles = tiles_of(plan.tile_tokens);
  plan.grid = static_cast<int>(std::min<int64_t>(plan.tiles, processors));
  return plan;
}

cudaError_t nf4_linear_hopper_cuda(const LoraLinear& op, const HopperPlan& plan,
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

}  // namespace pylora
