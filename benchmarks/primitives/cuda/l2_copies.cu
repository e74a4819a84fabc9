// Measures how many bytes reach an SM from L2, by plain loads and by bulk copies. The CTAs either
// copy each for itself, or those of a cluster copy together: each CTA brings a part of a tile and
// gives it to all of them (multicast).
#include "bulk_copy.cuh"
#include "timed_loop.cuh"

namespace primitives {
namespace {

constexpr int kTileBytes = 32 << 10;
constexpr int kStages = 4;
constexpr int kTilesInL2 = 256;  // 8 MiB, so that they stay in L2
constexpr int kTiles = 1024;     // so many are copied to each CTA
constexpr int kThreads = 128;

// The tile that comes at place `number` in a cluster. All CTAs of a cluster take the same tiles,
// and clusters begin at different ones.
__host__ __device__ constexpr int tile_of(int cluster, int number) {
  return (cluster * 37 + number) % kTilesInL2;
}

template <int kClusterCtas, bool kMulticast>
__global__ void __launch_bounds__(kThreads)
    copy_from_l2(const uint8_t* data, Span* spans, uint32_t* results) {
#if PYLORA_SM90A
  uint8_t* stages = tiled_shared_memory();
  __shared__ Barrier full[kStages], empty[kStages];
  const int thread = static_cast<int>(threadIdx.x);
  const int cluster = static_cast<int>(blockIdx.x) / kClusterCtas;
  if (thread == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(full + stage, 1);
      barrier_init(empty + stage, kMulticast ? kClusterCtas : 1);
    }
    barrier_init_fence();
  }
  cluster_barrier();
  if (thread == 0) {
    const uint32_t rank = cluster_rank();
    const long long begin = clock64();
    int stage = 0, parity = 0;
    // Between asking for a tile and waiting for it, this thread asks for kStages - 1 others.
#pragma unroll 1
    for (int number = 0; number < kTiles + kStages - 1; ++number) {
      if (number < kTiles) {
        barrier_wait(empty + stage, parity ^ 1);
        barrier_arrive_expect(full + stage, kTileBytes);
        const uint8_t* tile = data + tile_of(cluster, number) * kTileBytes;
        uint8_t* shared = stages + stage * kTileBytes;
        if constexpr (kMulticast) {
          constexpr int kPart = kTileBytes / kClusterCtas;
          copy_bulk_to(shared + rank * kPart, tile + rank * kPart, kPart, full + stage,
                       (1 << kClusterCtas) - 1);
        } else {
          copy_bulk(shared, tile, kTileBytes, full + stage);
        }
      }
      const int waited = number - (kStages - 1);
      if (++stage == kStages) {
        stage = 0;
        parity ^= 1;
      }
      if (waited < 0) continue;
      // Tile `waited` is in stage `stage`.
      barrier_wait(full + stage, waited / kStages % 2);
      if constexpr (kMulticast) {
        for (uint32_t cta = 0; cta < kClusterCtas; ++cta) barrier_arrive_at(empty + stage, cta);
      } else {
        barrier_arrive(empty + stage);
      }
    }
    spans[blockIdx.x] = {begin, clock64()};
  }
  cluster_barrier();  // a CTA must not end before the last copy and arrival have reached it
  uint32_t sum = 0;
  for (int i = thread; i < kStages * kTileBytes / 4; i += kThreads) {
    sum += reinterpret_cast<const uint32_t*>(stages)[i];
  }
  results[blockIdx.x * kThreads + thread] = sum;
#else
  __trap();
#endif
}

constexpr int kReadThreads = 512;
constexpr int kReadDepth = 4;
constexpr int kReadTurns = 4;  // so often all tiles are read

// Every CTA reads all tiles by 16-byte loads that bypass L1. A thread has kReadDepth of them under
// way, and CTAs begin at different tiles.
__global__ void __launch_bounds__(kReadThreads)
    read_from_l2(const uint4* data, Span* spans, uint32_t* results) {
  constexpr int kVectors = kTilesInL2 * kTileBytes / 16, kStep = kReadThreads * kReadDepth;
  static_assert(kVectors % kStep == 0);
  const int thread = static_cast<int>(threadIdx.x);
  const int first = static_cast<int>(blockIdx.x) * 37 * (kTileBytes / 16);
  __syncthreads();
  const long long begin = clock64();
  uint32_t sum = 0;
#pragma unroll 1
  for (int at = first; at < first + kReadTurns * kVectors; at += kStep) {
    uint4 loaded[kReadDepth];
#pragma unroll
    for (int i = 0; i < kReadDepth; ++i) {
      loaded[i] = load_from_l2(data + (at + i * kReadThreads + thread) % kVectors);
    }
#pragma unroll
    for (int i = 0; i < kReadDepth; ++i) {
      sum += loaded[i].x + loaded[i].y + loaded[i].z + loaded[i].w;
    }
  }
  results[blockIdx.x * kReadThreads + thread] = sum;
  if (thread % 32 == 0) {
    spans[(blockIdx.x * kReadThreads + thread) / 32] = {begin, clock64()};
  }
}

std::vector<uint32_t> random_tiles() {
  std::vector<uint32_t> words(kTilesInL2 * (kTileBytes / 4));
  for (size_t i = 0; i < words.size(); ++i) words[i] = scramble(static_cast<uint32_t>(i));
  return words;
}

Result time_reads() {
  constexpr int kWarps = kReadThreads / 32;
  const int ctas = processors();
  const auto words = random_tiles();
  const DeviceArray<uint32_t> data(words);
  const DeviceArray<Span> spans(static_cast<size_t>(ctas) * kWarps);
  const DeviceArray<uint32_t> sums(static_cast<size_t>(ctas) * kReadThreads);
  Result result;
  for (int sample = -1; sample < kSamples; ++sample) {  // the first warms up
    read_from_l2<<<ctas, kReadThreads>>>(reinterpret_cast<const uint4*>(data.data()), spans.data(),
                                         sums.data());
    finish_launch("read_from_l2");
    if (sample < 0) continue;
    const double cycles = static_cast<double>(slowest(spans.to_host(), ctas, kWarps));
    result.samples.push_back(4.0 * kReadTurns * words.size() / cycles);
  }
  uint32_t expected = 0;
  for (const uint32_t word : words) expected += kReadTurns * word;
  const auto found = sums.to_host();
  for (int cta = 0; cta < ctas && result.problem.empty(); ++cta) {
    uint32_t sum = 0;
    for (int thread = 0; thread < kReadThreads; ++thread) sum += found[cta * kReadThreads + thread];
    if (sum != expected) result.problem = "wrong sum of what CTA " + std::to_string(cta) + " read";
  }
  return result;
}

// The sum of the tiles that are in the stages at the end.
uint32_t expected_sum(int cluster) {
  uint32_t sum = 0;
  for (int number = kTiles - kStages; number < kTiles; ++number) {
    const int first = tile_of(cluster, number) * (kTileBytes / 4);
    for (int i = 0; i < kTileBytes / 4; ++i) sum += scramble(first + i);
  }
  return sum;
}

template <int kClusterCtas, bool kMulticast>
Result time_copies() {
  const auto kernel = copy_from_l2<kClusterCtas, kMulticast>;
  // More than half of an SM's shared memory, so that no second CTA comes to the same SM.
  const int shared =
      std::max(kStages * kTileBytes,
               device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2 + 1024);
  allow_shared_memory(kernel, shared);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kClusterCtas;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(kClusterCtas);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.attrs = &cluster;
  config.numAttrs = 1;
  // As many clusters as run at once. Clusters of four may not fill all SMs.
  int clusters = 0;
  CHECKED(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
  const int ctas = clusters * kClusterCtas;
  config.gridDim = dim3(static_cast<unsigned>(ctas));

  const DeviceArray<uint32_t> data(random_tiles());
  const DeviceArray<Span> spans(static_cast<size_t>(ctas));
  const DeviceArray<uint32_t> sums(static_cast<size_t>(ctas) * kThreads);
  Result result;
  for (int sample = -1; sample < kSamples; ++sample) {  // the first warms up
    const auto* bytes = reinterpret_cast<const uint8_t*>(data.data());
    CHECKED(cudaLaunchKernelEx(&config, kernel, bytes, spans.data(), sums.data()));
    finish_launch("copy_from_l2");
    if (sample < 0) continue;
    const double cycles = static_cast<double>(slowest(spans.to_host(), ctas, 1));
    result.samples.push_back(1.0 * kTiles * kTileBytes / cycles);
  }
  const double rate = median(result.samples);
  result.derived = {{"ctas", json(ctas)},
                    {"l2_reads_per_cycle", json(kMulticast ? rate / kClusterCtas : rate)}};
  const auto found = sums.to_host();
  for (int cta = 0; cta < ctas && result.problem.empty(); ++cta) {
    uint32_t sum = 0;
    for (int thread = 0; thread < kThreads; ++thread) sum += found[cta * kThreads + thread];
    if (sum != expected_sum(cta / kClusterCtas)) {
      result.problem = "wrong bytes in the shared memory of CTA " + std::to_string(cta);
    }
  }
  return result;
}

template <int kClusterCtas, bool kMulticast>
void add_copies(std::vector<Experiment>& all) {
  Experiment experiment;
  experiment.name = "l2_bulk_cluster" + std::to_string(kClusterCtas);
  if (kMulticast) experiment.name += "_multicast";
  experiment.parameters = {{"cluster", json(kClusterCtas)},
                           {"multicast", kMulticast ? "true" : "false"},
                           {"tile_bytes", json(kTileBytes)},
                           {"stages", json(kStages)}};
  experiment.unit = "bytes per cycle and SM";
  experiment.note = "bytes that arrive in shared memory, of tiles that a cluster shares";
  experiment.least_capability = experiment.most_capability = 90;
  experiment.run = time_copies<kClusterCtas, kMulticast>;
  all.push_back(experiment);
}

std::vector<Experiment> experiments() {
  std::vector<Experiment> all;
  Experiment read;
  read.name = "l2_read";
  read.parameters = {{"warps", json(kReadThreads / 32)}, {"loads_at_a_time", json(kReadDepth)}};
  read.unit = "bytes per cycle and SM";
  read.note = "16-byte loads past L1 of 8 MiB that all SMs read";
  read.run = time_reads;
  all.push_back(read);
  add_copies<1, false>(all);
  add_copies<2, false>(all);
  add_copies<2, true>(all);
  add_copies<4, false>(all);
  add_copies<4, true>(all);
  return all;
}

}  // namespace
}  // namespace primitives

int main(int count, char** arguments) {
  return primitives::run_program(primitives::experiments(), count, arguments);
}
