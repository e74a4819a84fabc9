#include "cuda/element.cuh"
#include "cuda/launch.cuh"
#include "cuda/load_any.cuh"
#include "cuda/lora_feed.cuh"
#include "cuda/lora_linear.cuh"
#include "cuda/lora_plan.cuh"
#include "cuda/nf4_pairs.cuh"
#include "cuda/ptx.cuh"

namespace pylora {
namespace {

constexpr int kLineBytes = 128;  // of L2

__device__ __forceinline__ int64_t partial_index(const LoraLinearSmall& op, int slice, int token,
                                                 int n) {
  return (static_cast<int64_t>(slice) * op.tokens + token) * op.weight.rows + n;
}

// The rows of lora_B that the tile's outputs will want, towards L2: nobody else has read them.
template <class T>
__device__ __forceinline__ void prefetch_lora_B(const LoraLinearSmall& op, int tile, int rows) {
  const int size = op.hidden.dtype == DType::kFloat32 ? sizeof(float) : sizeof(T);
  const int64_t row_bytes = static_cast<int64_t>(op.hidden.rank) * size;
  const int64_t first = tile * rows * row_bytes;
  const int64_t last = min(first + rows * row_bytes, op.weight.rows * row_bytes);
  for (int64_t i = first + threadIdx.x * kLineBytes; i < last; i += kThreads * kLineBytes) {
    prefetch_to_l2(static_cast<const uint8_t*>(op.lora_B) + i);
  }
}

// This lane's part of low . lora_B: every `lanes`-th of the rank, from `part` on.
template <class L>
__device__ __forceinline__ float dot_low(const float* low, const L* lora_B, int rank, int part,
                                         int lanes) {
  float sum = 0.0f;
#pragma unroll 4
  for (int j = part; j < rank; j += lanes) sum += load_from_l2(low + j) * to_fp32(lora_B[j]);
  return sum;
}

// 7. What LoRA and the biases add to one output: lane `part` of `lanes` gives a part of it.
template <class T>
__device__ __forceinline__ float low_rank_part(const LoraLinearSmall& op, int token, int64_t n,
                                               int part, int lanes) {
  const LoraHidden& hidden = op.hidden;
  float sum = 0.0f;
  if (part == 0 && op.bias.data != nullptr) sum = load_any(op.bias, n);
  if (hidden.rank == 0) return sum;
  if (part == 0 && op.lora_B_bias.data != nullptr) {
    sum += hidden.scaling * load_any(op.lora_B_bias, n);
  }
  const float* low = hidden.low + token * hidden.rank;
  const int64_t first = n * hidden.rank;
  if (hidden.dtype == DType::kFloat32) {
    const auto* lora_B = static_cast<const float*>(op.lora_B) + first;
    return sum + dot_low(low, lora_B, hidden.rank, part, lanes);
  }
  const auto* lora_B = static_cast<const T*>(op.lora_B) + first;
  return sum + dot_low(low, lora_B, hidden.rank, part, lanes);
}

// 7. The outputs of a tile: y = round(base(token, row) + bias + low . lora_B + ...). Where there
// are fewer of them than threads, up to 16 lanes share one: they would wait for memory one by one.
template <class T, class Base>
__device__ __forceinline__ void store_tile(const LoraLinearSmall& op, int tile, int rows,
                                           const Base& base) {
  const int N = static_cast<int>(op.weight.rows);
  const int outputs = rows * op.tokens;
  int lanes = 1;
  while (op.hidden.rank > 0 && lanes < 16 && 2 * lanes * outputs <= kThreads) lanes *= 2;
  const int part = threadIdx.x % lanes;
  // The same number of turns for all lanes of a warp: they meet in the shuffles.
  for (int first = 0; first < outputs; first += kThreads / lanes) {
    const int output = first + static_cast<int>(threadIdx.x) / lanes;
    const int token = output / rows, row = output % rows;
    const int n = tile * rows + row;
    const bool valid = output < outputs && n < N;
    float sum = valid ? low_rank_part<T>(op, token, n, part, lanes) : 0.0f;
    for (int other = 1; other < lanes; other *= 2) sum += shuffle_xor(sum, other);
    if (!valid || part != 0) continue;
    T* y = static_cast<T*>(op.y) + static_cast<int64_t>(token) * N;
    y[n] = round_to<T>(base(token, row) + sum);
  }
}

// kTokenTiles: of 8 tokens. kBlock32: blocks of 32, where one word of qweight ends a block.
template <class T, int kTokenTiles, bool kBlock32>
__global__ void __launch_bounds__(kThreads, 2) lora_linear_small(Problem problem) {
  constexpr int kAbsmax = kBlock32 ? 2 : 1;  // a lane's share of the chunk's
  const LoraLinearSmall& op = problem.op;
  const SmallPlan& plan = problem.plan;
  const NF4Matrix& weight = op.weight;
  const int N = static_cast<int>(weight.rows), K = static_cast<int>(weight.cols);
  const int M = op.tokens;
  const int chunks = (K + kChunk - 1) / kChunk;

  uint8_t* pairs = dynamic_shared_memory();
  auto* sums = reinterpret_cast<float*>(pairs + kPairBytes);
  auto* staged_x = reinterpret_cast<uint4*>(sums + sum_floats(kTokenTiles));

  const int thread = threadIdx.x;
  const int warp = thread / kLanes;
  const int lane = thread % kLanes;
  const int group = lane / 4;    // row of the fragment, or token
  const int quarter = lane % 4;  // place along k
  const int row_warp = warp % plan.row_warps;
  const int k_warp = warp / plan.row_warps;
  const int64_t items = static_cast<int64_t>(plan.tiles) * plan.slices;
  const int begin = static_cast<int>(items * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(items * (blockIdx.x + 1) / gridDim.x);
  const float offset = op.offset != nullptr ? __ldg(op.offset) : 0.0f;

  // 1.
  uint8_t* ring = hole(pairs, warp * kStages * kStageHoles);
  Feed<kAbsmax> feed(problem, begin, end, row_warp, k_warp, lane);
  StoredAbsmax stored[kAhead][kAbsmax];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) feed.fetch(ring + i * kStageBytes, stored[i]);

  // 2.
  fill_pairs<T>(pairs, thread);
  const uint32_t lane_offset = 4 * static_cast<uint32_t>(lane);
  int staged_slice = -1;
  unsigned stage = 0;
  int slice = begin / plan.tiles;
  int tile = begin - slice * plan.tiles;

  for (int item = begin; item < end; ++item) {
    const int first_chunk = slice * plan.slice_chunks;
    const int slice_chunks = min(plan.slice_chunks, chunks - first_chunk);
    if (slice != staged_slice) {  // all have left the slice before: the last barrier of 6.
      const int vectors = plan.slice_chunks * (kChunk / 8) * M;
      for (int i = thread; i < vectors; i += kThreads) {
        const int column = first_chunk * kChunk + i / M * 8;
        uint4 value = {0, 0, 0, 0};
        if (column < K) {
          const T* source = static_cast<const T*>(op.x) + static_cast<int64_t>(i % M) * K + column;
          value = __ldg(reinterpret_cast<const uint4*>(source));
        }
        staged_x[i] = value;
      }
      staged_slice = slice;
      __syncthreads();
    }

    if (op.hidden.rank > 0) prefetch_lora_B<T>(op, tile, plan.row_warps * kWarpRows);

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
        absmax[i] = absmax_of(weight, mine[i], offset);
      }
      const uint8_t* used = ring + stage * kStageBytes;
      feed.fetch(ring + (stage + kAhead) % kStages * kStageBytes, stored[kAhead - 1]);
      stage = (stage + 1) % kStages;
      const int chunk = step * plan.k_warps + k_warp;
      if (chunk >= slice_chunks) continue;

#pragma unroll
      for (int block = 0; block < 2; ++block) {  // of 64 columns
        // 3.
        uint32_t words[4];  // rows `group` and `group` + 8; the same 32 columns on
        load_matrices(words, used + (4 * block + lane / 8) * kPairRow + lane % 8 * kVectorBytes);
        float part[kTokenTiles][4] = {};
#pragma unroll
        for (int word = 0; word < 2; ++word) {
          const int column = chunk * (kChunk / 8) + 8 * block + 4 * word + quarter;
          uint4 tokens[kTokenTiles];
#pragma unroll
          for (int n8 = 0; n8 < kTokenTiles; ++n8) {
            // Beyond the last token its columns of the result are not used.
            tokens[n8] = staged_x[column * M + min(8 * n8 + group, M - 1)];
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
          const float upper = shuffle(own, 2 * group + block);
          const float lower = shuffle(own, 2 * (group + 8) + block);
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

    // 6.
#pragma unroll
    for (int n8 = 0; n8 < kTokenTiles; ++n8) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 8 * n8 + 2 * quarter + i % 2;
        sums[sum_index(kTokenTiles, warp, token, group + i / 2 * 8)] = total[n8][i];
      }
    }
    __syncthreads();
    if (item == begin) wait_for_previous_kernel();
    const int rows = plan.row_warps * kWarpRows;
    const auto sum_of_warps = [&](int token, int row) {
      float sum = 0.0f;
      for (int w = row / kWarpRows; w < kWarps; w += plan.row_warps) {
        sum += sums[sum_index(kTokenTiles, w, token, row % kWarpRows)];
      }
      return sum;
    };
    if (plan.slices == 1) {
      store_tile<T>(op, tile, rows, sum_of_warps);
    } else {
      for (int i = thread; i < rows * M; i += kThreads) {
        const int token = i / rows, row = i % rows, n = tile * rows + row;
        if (n < N) op.partials[partial_index(op, slice, token, n)] = sum_of_warps(token, row);
      }
      __threadfence();  // the slice is visible before it is counted
      __syncthreads();
      bool* last = reinterpret_cast<bool*>(sums);
      if (thread == 0) {
        const unsigned before = atomicAdd(op.counters + tile, 1u);
        *last = before == static_cast<unsigned>(plan.slices - 1);
      }
      __syncthreads();
      if (*last) {
        __threadfence();
        store_tile<T>(op, tile, rows, [&](int token, int row) {
          float sum = 0.0f;
          for (int s = 0; s < plan.slices; ++s) {
            sum += load_from_l2(op.partials + partial_index(op, s, token, tile * rows + row));
          }
          return sum;
        });
      }
    }
    __syncthreads();  // before the next tile's sums
    if (++tile == plan.tiles) {
      tile = 0;
      ++slice;
    }
  }
}

int log2_of(int64_t power) {
  int result = 0;
  while (int64_t{1} << result < power) ++result;
  return result;
}

template <class T>
cudaError_t launch_small(const Problem& problem, const LaunchShape& shape) {
  const bool two_tiles = problem.op.tokens > 8;
  if (problem.op.weight.blocksize == 32) {
    return two_tiles ? launch(lora_linear_small<T, 2, true>, shape, problem)
                     : launch(lora_linear_small<T, 1, true>, shape, problem);
  }
  return two_tiles ? launch(lora_linear_small<T, 2, false>, shape, problem)
                   : launch(lora_linear_small<T, 1, false>, shape, problem);
}

}  // namespace

cudaError_t lora_linear_small_cuda(const LoraLinearSmall& op, const SmallPlan& plan,
                                   bool dependent_launch, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  LaunchShape shape;
  shape.block = kThreads;
  shape.shared_bytes = static_cast<size_t>(plan.shared_bytes);
  shape.stream = stream;
  shape.grid.x = static_cast<unsigned>(plan.grid);
  if (op.hidden.rank > 0) {
    error = lora_hidden_cuda(op.hidden, op.dtype, op.x, op.tokens, op.weight.cols, op.counters,
                             plan.counters(), stream);
    shape.dependent = dependent_launch;
  } else if (plan.counters() > 0) {
    error = cudaMemsetAsync(op.counters, 0, sizeof(unsigned) * plan.counters(), stream);
  }
  if (error != cudaSuccess) return error;
  const Problem problem = {op, plan, log2_of(op.weight.blocksize),
                           log2_of(op.weight.nested_blocksize)};
  if (op.dtype == DType::kFloat16) return launch_small<__half>(problem, shape);
  if (op.dtype == DType::kBFloat16) return launch_small<__nv_bfloat16>(problem, shape);
  return cudaErrorInvalidValue;
}

}  // namespace pylora
