#include <algorithm>

#include "cuda/common/element.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/nf4/nf4_decode.cuh"
#include "cuda/nf4/nf4_dequantize.cuh"

namespace pylora::cuda {
namespace {

constexpr int kWarps = 8;                                 // a CTA
constexpr int kTileElements = 2 * kVectorBytes * kLanes;  // 1024
constexpr int kScalarThreads = 256;
constexpr int64_t kScalarGrid = 1 << 20;  // beyond it the threads loop

// Where the rows of `out` begin. Rows without gaps count as a single one.
struct OutputRows {
  int64_t cols;
  int64_t stride;

  // Elements that lie in gaps before row `row`.
  __device__ __forceinline__ int64_t gaps(int64_t row) const { return row * (stride - cols); }
};

struct TileMemory {
  float code[kNF4Size];
  uint4 staged[kWarps][kLanes];
};

template <class T, bool kHasGaps>
__global__ void __launch_bounds__(kWarps* kLanes)
    nf4_dequantize_tiles(NF4Matrix weight,                  // device pointers
                         const float* __restrict__ offset,  // [1], or null
                         int64_t tiles,                     // whole tiles of the weight
                         OutputRows rows,  // with gaps: of kTileElements or more, in whole vectors
                         T* __restrict__ out) {
  using Out = Bytes16<T>;
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

  // 4. A tile with gaps lies in two rows at most.
  auto* place = reinterpret_cast<uint4*>(out + first);
  int row_ends = 0, gap = 0;  // vectors
  if constexpr (kHasGaps) {
    const int64_t row = first / rows.cols;
    place += rows.gaps(row) / Out::kElements;
    row_ends = static_cast<int>(min((row + 1) * rows.cols - first, int64_t{kTileElements})) /
               Out::kElements;
    gap = static_cast<int>(rows.gaps(1) / Out::kElements);
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int vector = step * kLanes + lane;
    uint32_t word = 0;
    if constexpr (Out::kPacked == 4) {
      word = *reinterpret_cast<const uint32_t*>(bytes + 4 * vector);
    } else {
      word = *reinterpret_cast<const uint16_t*>(bytes + 2 * vector);
    }
    const int block = vector * Out::kElements >> shift;
    const float absmax = shuffle(own_absmax, block);
    Out result;
#pragma unroll
    for (int j = 0; j < Out::kPacked; ++j) {
      result.values[2 * j] =
          round_to<T>(__fmul_rn(shared.code[word >> (8 * j + 4) & 0xFu], absmax));
      result.values[2 * j + 1] =
          round_to<T>(__fmul_rn(shared.code[word >> (8 * j) & 0xFu], absmax));
    }
    place[vector + (kHasGaps && vector >= row_ends ? gap : 0)] = result.bits;
  }
}

// Elements [begin, end), one a thread and step: what is left of the last tile, and all that tiles
// do not take.
template <class T>
__global__ void __launch_bounds__(kScalarThreads)
    nf4_dequantize_elements(NF4Matrix weight, const float* __restrict__ offset, int64_t begin,
                            int64_t end, OutputRows rows, T* __restrict__ out) {
  if (offset != nullptr) weight.offset = __ldg(offset);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kScalarThreads;
  int64_t i = begin + static_cast<int64_t>(blockIdx.x) * kScalarThreads + threadIdx.x;
#pragma unroll 1  // unrolled, it spills on sm_100
  for (; i < end; i += stride) {
    const float code = nf4_code[nf4_code_at(weight.qweight, i)];
    const int64_t row = i < rows.cols ? 0 : i / rows.cols;  // most often there are no gaps
    out[i + rows.gaps(row)] = round_to<T>(__fmul_rn(code, weight.absmax_at(i / weight.blocksize)));
  }
}

template <class T>
cudaError_t dequantize(const NF4Matrix& weight, const float* offset, int64_t stride, T* out,
                       cudaStream_t stream) {
  constexpr int kVector = Bytes16<T>::kElements;
  const int64_t numel = weight.numel();
  const bool has_gaps = stride > weight.cols;
  const OutputRows rows = has_gaps ? OutputRows{weight.cols, stride} : OutputRows{numel, numel};
  const bool gaps_fit =
      rows.cols % kVector == 0 && rows.stride % kVector == 0 && rows.cols >= kTileElements;
  const bool in_tiles = aligned(weight.qweight) && aligned(out) && (gaps_fit || !has_gaps);
  const int64_t tiles = in_tiles ? numel / kTileElements : 0;
  if (tiles > 0) {
    const auto kernel = has_gaps ? nf4_dequantize_tiles<T, true> : nf4_dequantize_tiles<T, false>;
    const cudaError_t error = launch(kernel, ceil_div(tiles, kWarps), kWarps * kLanes, stream,
                                     weight, offset, tiles, rows, out);
    if (error != cudaSuccess) return error;
  }
  const int64_t begin = tiles * kTileElements;
  if (begin == numel) return cudaSuccess;
  const int64_t grid = std::min(ceil_div(numel - begin, kScalarThreads), kScalarGrid);
  return launch(nf4_dequantize_elements<T>, grid, kScalarThreads, stream, weight, offset, begin,
                numel, rows, out);
}

}  // namespace

cudaError_t nf4_dequantize_cuda(const NF4Matrix& weight, const float* offset, DType out_dtype,
                                int64_t stride, void* out, cudaStream_t stream) {
  if (stride < weight.cols) return cudaErrorInvalidValue;
  switch (out_dtype) {
    case DType::kFloat32:
      return dequantize(weight, offset, stride, static_cast<float*>(out), stream);
    case DType::kFloat16:
      return dequantize(weight, offset, stride, static_cast<__half*>(out), stream);
    case DType::kBFloat16:
      return dequantize(weight, offset, stride, static_cast<__nv_bfloat16*>(out), stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace pylora::cuda
