#include <algorithm>

#include "cuda/element.cuh"
#include "cuda/launch.cuh"
#include "cuda/nf4_code.cuh"
#include "cuda/nf4_dequantize.cuh"
#include "cuda/ptx.cuh"

namespace pylora {
namespace {

constexpr int kWarps = 8;                                 // a CTA
constexpr int kTileElements = 2 * kVectorBytes * kLanes;  // 1024
constexpr int kScalarThreads = 256;
constexpr int64_t kScalarBlocks = 1 << 20;  // beyond it the threads loop

struct TileMemory {
  float code[kNF4Size];
  uint4 staged[kWarps][kLanes];
};

template <class T>
__global__ void __launch_bounds__(kWarps* kLanes)
    nf4_dequantize_tiles(NF4Matrix weight,                  // device pointers
                         const float* __restrict__ offset,  // [1], or null
                         int64_t tiles,                     // whole tiles of the weight
                         T* __restrict__ out) {             // [tiles * kTileElements], at least
  using Out = Chunk<T>;
  constexpr int kSteps = kTileElements / Out::kElements / kLanes;
  TileMemory& shared = shared_memory<TileMemory>();
  if (threadIdx.x < kNF4Size) shared.code[threadIdx.x] = nf4_code[threadIdx.x];
  __syncthreads();

  const int warp = threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (tile >= tiles) return;
  const int64_t first = tile * kTileElements;

  // 1. and 3. (the latency of 2. overlaps)
  const uint4 packed = __ldg(reinterpret_cast<const uint4*>(weight.qweight + first / 2) + lane);

  // 2.
  if (offset != nullptr) weight.offset = __ldg(offset);
  const int shift = __ffsll(weight.blocksize) - 1;
  const int64_t first_block = first >> shift;
  const int blocks = max(1, kTileElements >> shift);
  const float own_absmax = lane < blocks ? weight.absmax_at(first_block + lane) : 0.0f;

  shared.staged[warp][lane] = packed;
  __syncwarp();
  const auto* bytes = reinterpret_cast<const uint8_t*>(shared.staged[warp]);

  // 4.
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int chunk = step * kLanes + lane;
    uint32_t word = 0;
    if constexpr (Out::kPacked == 4) {
      word = *reinterpret_cast<const uint32_t*>(bytes + 4 * chunk);
    } else {
      word = *reinterpret_cast<const uint16_t*>(bytes + 2 * chunk);
    }
    const int block = chunk * Out::kElements >> shift;
    const float absmax = shuffle(own_absmax, block);
    Out result;
#pragma unroll
    for (int j = 0; j < Out::kPacked; ++j) {
      result.values[2 * j] =
          round_to<T>(__fmul_rn(shared.code[word >> (8 * j + 4) & 0xFu], absmax));
      result.values[2 * j + 1] =
          round_to<T>(__fmul_rn(shared.code[word >> (8 * j) & 0xFu], absmax));
    }
    reinterpret_cast<uint4*>(out + first)[chunk] = result.vector;
  }
}

// Elements [begin, end), one a thread and step: what is left of the last tile, and misaligned
// tensors.
template <class T>
__global__ void __launch_bounds__(kScalarThreads)
    nf4_dequantize_elements(NF4Matrix weight, const float* __restrict__ offset, int64_t begin,
                            int64_t end, T* __restrict__ out) {
  if (offset != nullptr) weight.offset = __ldg(offset);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kScalarThreads;
  int64_t i = begin + static_cast<int64_t>(blockIdx.x) * kScalarThreads + threadIdx.x;
#pragma unroll 1  // unrolled, it spills on sm_100
  for (; i < end; i += stride) {
    const float code = nf4_code[nf4_code_at(weight.qweight, i)];
    out[i] = round_to<T>(__fmul_rn(code, weight.absmax_at(i / weight.blocksize)));
  }
}

template <class T>
cudaError_t dequantize(const NF4Matrix& weight, const float* offset, T* out, cudaStream_t stream) {
  const int64_t numel = weight.numel();
  const int64_t tiles = aligned(weight.qweight) && aligned(out) ? numel / kTileElements : 0;
  if (tiles > 0) {
    const cudaError_t error = launch(nf4_dequantize_tiles<T>, ceil_div(tiles, kWarps),
                                     kWarps * kLanes, stream, weight, offset, tiles, out);
    if (error != cudaSuccess) return error;
  }
  const int64_t begin = tiles * kTileElements;
  if (begin == numel) return cudaSuccess;
  const int64_t grid = std::min(ceil_div(numel - begin, kScalarThreads), kScalarBlocks);
  return launch(nf4_dequantize_elements<T>, grid, kScalarThreads, stream, weight, offset, begin,
                numel, out);
}

}  // namespace

cudaError_t nf4_dequantize_cuda(const NF4Matrix& weight, const float* offset, DType out_dtype,
                                void* out, cudaStream_t stream) {
  switch (out_dtype) {
    case DType::kFloat32:
      return dequantize(weight, offset, static_cast<float*>(out), stream);
    case DType::kFloat16:
      return dequantize(weight, offset, static_cast<__half*>(out), stream);
    case DType::kBFloat16:
      return dequantize(weight, offset, static_cast<__nv_bfloat16*>(out), stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace pylora
