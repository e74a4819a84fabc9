// Measures how the bandwidth of reading DRAM depends on the number of bytes that are under way. It
// reads a buffer that is many times as large as the L2 cache: with plain 16-byte loads, with
// cp.async, with bulk copies and with tiles through a tensor map.
//
// There are two orders. In the order "contiguous" a CTA reads a range from its begin to its end. In
// the order "rows" it reads as the decode kernels read a qweight of 4096 columns: a copy of a warp
// is 64 bytes of each of 8 rows of 2048 bytes, and the copies of the next warps follow in the same
// rows.
#include "bulk_copy.cuh"
#include "cuda/hopper/ptx.cuh"
#include "cuda/hopper/tensor_map.cuh"
#include "experiment.cuh"

namespace primitives {
namespace {

constexpr int64_t kMostBytes = int64_t{4} << 30;
constexpr int64_t kRangeUnit = 256 << 10;  // the range of a CTA is a multiple of it
constexpr int kRowBytes = 2048;
constexpr int kVector = 16;
constexpr int kWarpBytes = 32 * kVector;
constexpr int kSamples = 5;
constexpr uint32_t kFactor = 2654435761u;  // word i of the buffer is i * kFactor

enum class Order { kContiguous, kRows };

__global__ void fill(uint32_t* words, int64_t count) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    words[i] = static_cast<uint32_t>(i) * kFactor;
  }
}

// Where the 16 bytes of this lane are in the range of the CTA, for copy number `copy` of its warps.
template <Order kOrder>
__device__ __forceinline__ int64_t place(int64_t copy, int lane) {
  if constexpr (kOrder == Order::kContiguous) return copy * kWarpBytes + lane * kVector;
  constexpr int kPieceBytes = 64, kPieces = kRowBytes / kPieceBytes, kRows = 8;
  return copy / kPieces * (kRows * kRowBytes) + lane / 4 * kRowBytes +
         copy % kPieces * kPieceBytes + lane % 4 * kVector;
}

__device__ __forceinline__ uint32_t sum_of(const uint4& v) { return v.x + v.y + v.z + v.w; }

// Called by a whole warp.
__device__ __forceinline__ void add_to(uint32_t* total, uint32_t sum) {
  sum = __reduce_add_sync(0xFFFFFFFFu, sum);
  if (threadIdx.x % 32 == 0) atomicAdd(total, sum);
}

// Each thread has kDepth loads under way.
template <int kDepth, Order kOrder>
__global__ void __launch_bounds__(512)
    read_plain(const uint8_t* data, int64_t range, uint32_t* total) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  const uint8_t* mine = data + blockIdx.x * range;
  const int64_t copies = range / kWarpBytes;
  uint32_t sum = 0;
#pragma unroll 1
  for (int64_t copy = warp; copy < copies; copy += warps * kDepth) {
    uint4 loaded[kDepth];
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      const int64_t at = place<kOrder>(copy + i * warps, lane);
      loaded[i] = load_streaming(reinterpret_cast<const uint4*>(mine + at));
    }
#pragma unroll
    for (int i = 0; i < kDepth; ++i) sum += sum_of(loaded[i]);
  }
  add_to(total, sum);
}

// Each thread keeps kStages copies of 16 bytes under way, and reads what it has copied itself.
template <int kStages, Order kOrder>
__global__ void __launch_bounds__(512)
    read_async(const uint8_t* data, int64_t range, uint32_t* total) {
  uint8_t* stages = dynamic_shared_memory() + threadIdx.x * kVector;
  const int stage_bytes = static_cast<int>(blockDim.x) * kVector;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  const uint8_t* mine = data + blockIdx.x * range;
  const int64_t copies = range / kWarpBytes;
  int64_t next = warp;
  const auto fetch = [&](int stage) {
    if (next < copies) {
      copy_async_16(stages + stage * stage_bytes, mine + place<kOrder>(next, lane));
    }
    copy_async_commit();
    next += warps;
  };
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) fetch(stage);
  uint32_t sum = 0;
#pragma unroll 1
  for (int64_t copy = warp; copy < copies; copy += warps * kStages) {
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      copy_async_wait<kStages - 1>();
      sum += sum_of(*reinterpret_cast<const uint4*>(stages + stage * stage_bytes));
      fetch(stage);
    }
  }
  copy_async_wait<0>();
  add_to(total, sum);
}

struct BulkProblem {
  TensorMap map;  // for tiles of kTileRows x kTileColumns bytes
  const uint8_t* data;
  int64_t range;
  int stages, stage_bytes;
};
constexpr int kTileRows = 128, kTileColumns = 32;  // as hopper/lora_linear.cu reads qweight
constexpr int kBulkWarps = 4;

// Each warp keeps `stages` copies of `stage_bytes` under way, and reads what it has copied itself.
template <bool kTensor>
__global__ void __launch_bounds__(32 * kBulkWarps)
    read_bulk(const __grid_constant__ BulkProblem problem, uint32_t* total) {
#if PYLORA_SM90A
  constexpr int kMostStages = 16;
  __shared__ Barrier barriers[kBulkWarps][kMostStages];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int stage_bytes = problem.stage_bytes;
  uint8_t* stages = tiled_shared_memory() + warp * problem.stages * stage_bytes;
  Barrier* full = barriers[warp];
  const int64_t copies = problem.range / stage_bytes;
  int64_t next = warp;
  const auto fetch = [&](int stage) {
    uint8_t* shared = stages + stage * stage_bytes;
    barrier_arrive_expect(full + stage, stage_bytes);
    if constexpr (kTensor) {
      constexpr int kTiles = kRowBytes / kTileColumns;  // side by side
      const int64_t first_row = blockIdx.x * (problem.range / kRowBytes);
      const int row = static_cast<int>(first_row + next / kTiles * kTileRows);
      copy_tile(shared, problem.map, row, static_cast<int>(next % kTiles) * kTileColumns,
                full + stage);
    } else {
      const int64_t at = blockIdx.x * problem.range + next * stage_bytes;
      copy_bulk(shared, problem.data + at, stage_bytes, full + stage);
    }
  };
  if (lane == 0) {
    for (int stage = 0; stage < problem.stages; ++stage) barrier_init(full + stage, 1);
    barrier_init_fence();
  }
  __syncwarp();
  for (int stage = 0; stage < problem.stages; ++stage, next += kBulkWarps) {
    if (lane == 0) fetch(stage);
  }
  uint32_t sum = 0;
  int stage = 0, parity = 0;
#pragma unroll 1
  for (int64_t copy = warp; copy < copies; copy += kBulkWarps, next += kBulkWarps) {
    barrier_wait(full + stage, parity);
#pragma unroll 2
    for (int at = lane * kVector; at < stage_bytes; at += kWarpBytes) {
      sum += sum_of(*reinterpret_cast<const uint4*>(stages + stage * stage_bytes + at));
    }
    __syncwarp();
    if (lane == 0 && next < copies) fetch(stage);
    if (++stage == problem.stages) {
      stage = 0;
      parity ^= 1;
    }
  }
  add_to(total, sum);
#else
  __trap();
#endif
}

// The buffer is allocated once, since filling it takes longer than an experiment.
struct Buffer {
  int64_t bytes;
  DeviceArray<uint32_t> words, total;

  static int64_t size() {
    size_t free = 0, all = 0;
    CHECKED(cudaMemGetInfo(&free, &all));
    int64_t bytes = kMostBytes;
    while (bytes > static_cast<int64_t>(free / 2)) bytes /= 2;
    return bytes;
  }
  Buffer() : bytes(size()), words(bytes / 4), total(1) {
    fill<<<8 * processors(), 256>>>(words.data(), bytes / 4);
    finish_launch("fill");
  }
  static Buffer& get() {
    static Buffer buffer;
    return buffer;
  }
};

struct Shape {
  int ctas_per_processor, threads;
  int shared_bytes;         // what the kernel uses
  int64_t bytes_under_way;  // on an SM
};

// Measures the GB/s of `launch(data, range, total, grid, shared bytes)`. The sum of all words that
// it read is compared with that of the buffer, so that no word can be left out.
template <class Launch>
Result time_reading(const char* kernel, const Shape& shape, const Launch& launch) {
  Buffer& buffer = Buffer::get();
  const int ctas = shape.ctas_per_processor * processors();
  const int64_t range = buffer.bytes / ctas / kRangeUnit * kRangeUnit;
  const int64_t bytes = range * ctas;
  // A CTA gets so much shared memory that an SM runs no more CTAs than the experiment says.
  const int per_processor = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  const int reserved = 2048;  // 1 KiB of each CTA is the system's, and some is static
  const int shared =
      std::max(shape.shared_bytes, per_processor / (shape.ctas_per_processor + 1) + reserved);
  Result result;
  for (int sample = -1; sample < kSamples; ++sample) {  // the first warms up
    CHECKED(cudaMemset(buffer.total.data(), 0, sizeof(uint32_t)));
    const double elapsed = milliseconds(kernel, [&] {
      launch(reinterpret_cast<const uint8_t*>(buffer.words.data()), range, buffer.total.data(),
             ctas, shared);
    });
    if (sample >= 0) result.samples.push_back(bytes / elapsed / 1e6);
  }
  result.ideal = 2e3 * device_attribute(cudaDevAttrMemoryClockRate) *
                 device_attribute(cudaDevAttrGlobalMemoryBusWidth) / 8 / 1e9;
  result.derived = {
      {"bytes", json(bytes)},
      {"of_ideal", json(median(result.samples) / result.ideal)},
  };
  const uint64_t count = static_cast<uint64_t>(bytes) / 4;
  const uint32_t expected = static_cast<uint32_t>(count / 2 * (count - 1)) * kFactor;
  const uint32_t found = buffer.total.to_host()[0];
  if (found != expected) {
    result.problem = "wrong sum of what was read: " + std::to_string(found) + ", not " +
                     std::to_string(expected);
  }
  return result;
}

Experiment reading(const std::string& name, const Shape& shape, const std::string& note) {
  Experiment experiment;
  const int64_t under_way = shape.bytes_under_way;
  experiment.name = name;
  experiment.parameters = {{"ctas_per_processor", json(shape.ctas_per_processor)},
                           {"warps_per_cta", json(shape.threads / 32)},
                           {"bytes_under_way_per_processor", json(under_way)}};
  experiment.unit = "GB/s";
  experiment.note = note + "; ideal: rated memory clock times bus width";
  return experiment;
}

std::string suffix(const Shape& shape, int stages) {
  return "_" + std::to_string(shape.ctas_per_processor) + "x" + std::to_string(shape.threads / 32) +
         "w_" + std::to_string(stages) + "s";
}

template <int kStages, Order kOrder>
void add_loads(std::vector<Experiment>& all, int ctas, int warps) {
  Shape shape = {ctas, 32 * warps, 0, int64_t{kStages} * ctas * warps * kWarpBytes};
  const std::string order = kOrder == Order::kContiguous ? "contiguous" : "rows";
  Experiment plain = reading("dram_plain_" + order + suffix(shape, kStages), shape,
                             "16-byte loads, so many of a thread at a time as there are stages");
  plain.run = [=] {
    return time_reading("read_plain", shape, [&](auto data, auto range, auto total, int grid, int) {
      read_plain<kStages, kOrder><<<grid, shape.threads>>>(data, range, total);
    });
  };
  shape.shared_bytes = kStages * shape.threads * kVector;
  Experiment async = reading("dram_cp_async_" + order + suffix(shape, kStages), shape,
                             "cp.async of 16 bytes a lane and stage");
  async.run = [=] {
    return time_reading("read_async", shape,
                        [&](auto data, auto range, auto total, int grid, int shared) {
                          const auto kernel = read_async<kStages, kOrder>;
                          allow_shared_memory(kernel, shared);
                          kernel<<<grid, shape.threads, shared>>>(data, range, total);
                        });
  };
  all.push_back(plain);
  all.push_back(async);
}

template <bool kTensor>
void add_bulk(std::vector<Experiment>& all, int ctas, int stages, int stage_bytes) {
  const int ring_bytes = kBulkWarps * stages * stage_bytes;
  const Shape shape = {ctas, 32 * kBulkWarps, ring_bytes, int64_t{ctas} * ring_bytes};
  std::string name = kTensor ? "dram_tensor_map" : "dram_bulk_" + std::to_string(stage_bytes);
  Experiment experiment = reading(
      name + suffix(shape, stages), shape,
      kTensor ? "tiles of 128 rows by 32 bytes through a tensor map, as the Hopper kernel "
                "reads qweight, one a warp and stage"
              : "cp.async.bulk of " + std::to_string(stage_bytes) + " bytes a warp and stage");
  experiment.least_capability = experiment.most_capability = 90;
  experiment.run = [=] {
    return time_reading(
        "read_bulk", shape,
        [&](const uint8_t* data, int64_t range, uint32_t* total, int grid, int shared) {
          BulkProblem problem = {{}, data, range, stages, stage_bytes};
          TiledMatrix matrix;
          matrix.data = data;
          matrix.rows = range * grid / kRowBytes;
          matrix.cols = matrix.pitch = kRowBytes;
          matrix.tile_rows = kTileRows;
          matrix.swizzle = Swizzle::k32;
          CHECKED(encode_tensor_map(matrix, &problem.map));
          allow_shared_memory(read_bulk<kTensor>, shared);
          read_bulk<kTensor><<<grid, shape.threads, shared>>>(problem, total);
        });
  };
  all.push_back(experiment);
}

template <Order kOrder>
void add_loads_of(std::vector<Experiment>& all) {
  for (const int ctas : {1, 2}) {
    for (const int warps : {4, 8, 16}) {
      add_loads<1, kOrder>(all, ctas, warps);
      add_loads<2, kOrder>(all, ctas, warps);
      add_loads<4, kOrder>(all, ctas, warps);
      add_loads<8, kOrder>(all, ctas, warps);
    }
  }
}

std::vector<Experiment> experiments() {
  std::vector<Experiment> all;
  add_loads_of<Order::kContiguous>(all);
  add_loads_of<Order::kRows>(all);
  constexpr int kMostUnderWay = 128 << 10;  // on an SM
  for (const int ctas : {1, 2}) {
    for (const int stages : {2, 4, 8, 16}) {
      for (const int stage_bytes : {1024, 2048, 4096, 8192}) {
        if (ctas * kBulkWarps * stages * stage_bytes > kMostUnderWay) continue;
        add_bulk<false>(all, ctas, stages, stage_bytes);
      }
      constexpr int kTileBytes = kTileRows * kTileColumns;
      if (ctas * kBulkWarps * stages * kTileBytes > kMostUnderWay) continue;
      add_bulk<true>(all, ctas, stages, kTileBytes);
    }
  }
  return all;
}

}  // namespace
}  // namespace primitives

int main(int count, char** arguments) {
  return primitives::run_program(primitives::experiments(), count, arguments);
}
