#include <algorithm>

#include "cuda/common/element.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/nf4/nf4_quantize.cuh"

namespace pylora::cuda {
namespace {

constexpr int kWarps = 4;  // a CTA
constexpr int kThreads = kWarps * kLanes;
constexpr int kWarpElements = 1024;
constexpr int kTileElements = kWarps * kWarpElements;
constexpr int kGroup = 32;                     // elements; the smallest block
constexpr int64_t kMaxGrid = (1LL << 31) - 1;  // CTAs
constexpr int64_t kScalarGrid = 1LL << 20;     // beyond it the warps loop
static_assert(kTileElements / kGroup == kThreads, "a thread reduces one group");

// Cell c holds the s with round(15 s) + 16 == c. The rounding of 15 s is exact in one fused
// multiply-add with a number so large that its unit is 1, and monotonic: no s is in a wrong cell.
constexpr int kCells = 32;
constexpr float kCellsPerUnit = 15.0f;
constexpr float kCellMagic = 12582912.0f + 16.0f;  // 1.5 * 2^23

struct Cell {
  float midpoint;  // the one in the cell, or infinity
  uint32_t below;  // how many lie below the cell
};

constexpr Cell make_cell(int index) {
  const double first = (index - 16 - 0.5) / kCellsPerUnit;
  const double last = (index - 16 + 0.5) / kCellsPerUnit;
  Cell cell = {__builtin_inff(), 0};
  for (int i = 0; i < kNF4Size - 1; ++i) {
    const float midpoint = nf4_midpoint(i);
    if (midpoint < first) ++cell.below;
    if (midpoint >= first && midpoint <= last) cell.midpoint = midpoint;
  }
  return cell;
}

// Every midpoint is the midpoint of exactly one cell, and that cell counts those before it.
constexpr bool cells_are_exact() {
  int found = 0;
  for (int index = 0; index < kCells; ++index) {
    const Cell cell = make_cell(index);
    if (cell.midpoint <= 1.0f) found += nf4_midpoint(static_cast<int>(cell.below)) == cell.midpoint;
  }
  return found == kNF4Size - 1;
}
static_assert(cells_are_exact());

struct CellTable {
  Cell cells[kCells];
};

constexpr CellTable make_cells() {
  CellTable table = {};
  for (int index = 0; index < kCells; ++index) table.cells[index] = make_cell(index);
  return table;
}

__constant__ CellTable cell_table = make_cells();

__device__ __forceinline__ uint32_t nearest_code(const Cell* cells, float scaled) {
  // The mask keeps what is not finite inside the table.
  const uint32_t index = __float_as_uint(__fmaf_rn(scaled, kCellsPerUnit, kCellMagic)) % kCells;
  const Cell cell = cells[index];
  return cell.below + (scaled > cell.midpoint ? 1u : 0u);
}

// The largest of `value` over aligned runs of `lanes` lanes.
__device__ __forceinline__ float max_of_lanes(float value, int lanes) {
  for (int other = 1; other < lanes; other *= 2) {
    value = fmaxf(value, shuffle_xor(value, other));
  }
  return value;
}

struct TileMemory {
  Cell cells[kCells];
  float group_max[kThreads];
  float warp_max[kWarps];
  float group_inverse[kThreads];
  uint4 packed[kWarps][kLanes];
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    nf4_quantize_tiles(const T* __restrict__ weight,   // [tiles * kTileElements], at least
                       int64_t blocksize,              // a power of two, at most kTileElements
                       uint8_t* __restrict__ qweight,  // [tiles * kTileElements / 2]
                       float* __restrict__ absmax) {   // [tiles * kTileElements / blocksize]
  using In = Bytes16<T>;
  constexpr int kSteps = kWarpElements / In::kElements / kLanes;
  constexpr int kGroupLanes = kGroup / In::kElements;
  TileMemory& shared = shared_memory<TileMemory>();
  const int thread = threadIdx.x;
  const int warp = thread / kLanes;
  const int lane = thread % kLanes;
  const int64_t tile = blockIdx.x;

  // 1.
  const int64_t first = tile * kTileElements + warp * kWarpElements;
  In vectors[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const auto* source = reinterpret_cast<const uint4*>(weight + first);
    vectors[step].bits = load_streaming(source + step * kLanes + lane);
  }
  if (thread < kCells) shared.cells[thread] = cell_table.cells[thread];

  // 2.
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < In::kElements; ++i) {
      largest = fmaxf(largest, fabsf(to_fp32(vectors[step].values[i])));
    }
    largest = max_of_lanes(largest, kGroupLanes);
    const int group = (step * kLanes + lane) / kGroupLanes;
    if (lane % kGroupLanes == 0) shared.group_max[warp * kLanes + group] = largest;
  }
  __syncthreads();

  // 3.
  const int groups = static_cast<int>(blocksize) / kGroup;  // a block
  float largest = max_of_lanes(shared.group_max[thread], groups < kLanes ? groups : kLanes);
  if (groups > kLanes) {
    if (lane == 0) shared.warp_max[warp] = largest;
    __syncthreads();
    const int warps = groups / kLanes;
    for (int i = 0; i < warps; ++i) {
      largest = fmaxf(largest, shared.warp_max[warp / warps * warps + i]);
    }
  }
  shared.group_inverse[thread] = __frcp_rn(fmaxf(largest, kNF4MinAbsmax));
  if (thread % groups == 0) absmax[(tile * kThreads + thread) / groups] = largest;
  __syncthreads();

  // 4.
  auto* bytes = reinterpret_cast<uint8_t*>(shared.packed[warp]);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int vector = step * kLanes + lane;
    const float inverse = shared.group_inverse[warp * kLanes + vector / kGroupLanes];
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < In::kElements; ++i) {
      const float scaled = __fmul_rn(to_fp32(vectors[step].values[i]), inverse);
      word |= nearest_code(shared.cells, scaled) << (i % 2 == 0 ? 4 * i + 4 : 4 * i - 4);
    }
    if constexpr (In::kPacked == 4) {
      *reinterpret_cast<uint32_t*>(bytes + 4 * vector) = word;
    } else {
      *reinterpret_cast<uint16_t*>(bytes + 2 * vector) = static_cast<uint16_t>(word);
    }
  }
  __syncwarp();

  // 5.
  reinterpret_cast<uint4*>(qweight + first / 2)[lane] = shared.packed[warp][lane];
}

// Blocks [begin, end), the last of them perhaps short: a warp each.
template <class T>
__global__ void __launch_bounds__(kThreads)
    nf4_quantize_blocks(const T* __restrict__ weight, int64_t numel, int64_t blocksize,
                        int64_t begin, int64_t end, uint8_t* __restrict__ qweight,
                        float* __restrict__ absmax) {
  CellTable& shared = shared_memory<CellTable>();
  const int lane = threadIdx.x % kLanes;
  if (threadIdx.x < kCells) shared.cells[threadIdx.x] = cell_table.cells[threadIdx.x];
  __syncthreads();

  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
  int64_t block = begin + static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  for (; block < end; block += stride) {
    const T* x = weight + block * blocksize;
    const int64_t rest = numel - block * blocksize;
    const int count = static_cast<int>(rest < blocksize ? rest : blocksize);
    const bool whole = count == blocksize;
    float largest = 0.0f;
    for (int i = lane; i < count; i += kLanes) largest = fmaxf(largest, fabsf(to_fp32(x[i])));
    largest = max_of_lanes(largest, kLanes);
    const float clamped = fmaxf(largest, kNF4MinAbsmax);
    if (lane == 0) absmax[block] = whole ? largest : clamped;

    const float inverse = __frcp_rn(clamped);
    const auto code_of = [&](int i) -> uint32_t {
      if (i >= count) return kNF4ZeroCode;
      const float value = to_fp32(x[i]);
      return nearest_code(shared.cells,
                          whole ? __fmul_rn(value, inverse) : __fdiv_rn(value, clamped));
    };
    uint8_t* bytes = qweight + block * blocksize / 2;
    for (int i = 2 * lane; i < count; i += 2 * kLanes) {
      bytes[i / 2] = nf4_pack(code_of(i), code_of(i + 1));
    }
  }
}

template <class T>
cudaError_t quantize(const T* weight, int64_t numel, int64_t blocksize, uint8_t* qweight,
                     float* absmax, cudaStream_t stream) {
  int64_t tiles = aligned(weight) && aligned(qweight) ? numel / kTileElements : 0;
  tiles = std::min(tiles, kMaxGrid);
  if (tiles > 0) {
    const cudaError_t error =
        launch(nf4_quantize_tiles<T>, tiles, kThreads, stream, weight, blocksize, qweight, absmax);
    if (error != cudaSuccess) return error;
  }
  const int64_t begin = tiles * kTileElements / blocksize;
  const int64_t end = ceil_div(numel, blocksize);
  if (begin == end) return cudaSuccess;
  const int64_t grid = std::min(ceil_div(end - begin, kWarps), kScalarGrid);
  return launch(nf4_quantize_blocks<T>, grid, kThreads, stream, weight, numel, blocksize, begin,
                end, qweight, absmax);
}

}  // namespace

cudaError_t nf4_quantize_cuda(const void* weight, DType dtype, int64_t numel, int64_t blocksize,
                              uint8_t* qweight, float* absmax, cudaStream_t stream) {
  switch (dtype) {
    case DType::kFloat32:
      return quantize(static_cast<const float*>(weight), numel, blocksize, qweight, absmax, stream);
    case DType::kFloat16:
      return quantize(static_cast<const __half*>(weight), numel, blocksize, qweight, absmax,
                      stream);
    case DType::kBFloat16:
      return quantize(static_cast<const __nv_bfloat16*>(weight), numel, blocksize, qweight, absmax,
                      stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace pylora::cuda
