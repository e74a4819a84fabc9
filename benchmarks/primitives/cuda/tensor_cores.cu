// Measures mma.sync, and wgmma with A in registers and B in shared memory. wgmma runs alone and
// beside look-ups in the decode table, which are made by the same warps while their products run or
// by other warps.
#include "bodies.cuh"
#include "wgmma_narrow.cuh"

namespace primitives {
namespace {

enum class Lookups { kNone, kSameWarps, kOtherWarps };

constexpr int kSteps = 4;     // so many wgmma multiply the 64 columns of k that B has
constexpr int kLookups = 16;  // a thread makes so many in a turn to decode A for four wgmma
constexpr int kGroupThreads = 128;
constexpr int kLookupThreads = 128;
constexpr int kMostGroups = 2;
constexpr int kTurns = 512;

struct WgmmaOutputs {
  Span* spans;        // for each warp
  uint32_t* lookups;  // for each thread the number of rounds of kLookups look-ups
  uint32_t* sums;     // for each thread the sum of all that it looked up
  float* products;    // from CTA 0: [chain][register][thread of the first warpgroup]
};

#if PYLORA_SM90A

// Decodes four words of qweight as the kernels do. Each round has other words.
struct LookupRound {
  const uint8_t* pairs;
  uint32_t lane_offset, words[kLookups / 4], sum = 0;

  __device__ LookupRound(const uint8_t* table, int thread)
      : pairs(table), lane_offset(4 * (thread % 32)) {
    for (int i = 0; i < kLookups / 4; ++i) words[i] = scramble(thread * (kLookups / 4) + i);
  }
  __device__ __forceinline__ void run() {
    uint32_t loaded[kLookups];
#pragma unroll
    for (int i = 0; i < kLookups; ++i) {
      loaded[i] = decode_pair(pairs, lane_offset, words[i / 4], i % 4);
    }
#pragma unroll
    for (int i = 0; i < kLookups; i += 2) sum += loaded[i] + loaded[i + 1];
#pragma unroll
    for (int i = 0; i < kLookups / 4; ++i) words[i] += DecodeTable::kStep;
  }
};

// Writes B as wgmma reads it: each column has 64 numbers along k, 128 bytes, with the swizzle of
// 128 bytes.
__device__ void fill_b(uint8_t* tile, int columns, int thread, int threads) {
  for (int i = thread; i < columns * 32; i += threads) {
    const int column = i / 32, word = i % 32;
    const int unit = (word / 4) ^ (column % 8);
    reinterpret_cast<uint32_t*>(tile + column * 128 + unit * 16)[word % 4] =
        b_pair(2 * word, column);
  }
  // wgmma reads shared memory through the asynchronous proxy, to which writes must be made visible.
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#endif

// How often a turn multiplies by B. Products alone come in large groups, which shows their peak.
// Beside look-ups they come in fours, as in a kernel that decodes A for four products.
template <Lookups kWhere>
constexpr int kRepeats = kWhere == Lookups::kNone ? 4 : 1;

constexpr int most_threads(Lookups where) {
  return kMostGroups * kGroupThreads + (where == Lookups::kOtherWarps ? kLookupThreads : 0);
}

// A warpgroup has kChains sums of 64 x kTokens, to which its products add in turn. With one chain
// every wgmma adds to what the one before it has written.
template <int kTokens, int kChains, Lookups kWhere>
__global__ void __launch_bounds__(most_threads(kWhere), 1)
    wgmma_loop(int groups, int turns, WgmmaOutputs out) {
#if PYLORA_SM90A
  uint8_t* pairs = tiled_shared_memory();
  uint8_t* tile = pairs + kPairBytes;
  __shared__ volatile int groups_left;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int index = static_cast<int>(blockIdx.x) * threads + thread;
  fill_words(pairs, kPairBytes, thread, threads);
  fill_b(tile, kTokens, thread, threads);
  if (thread == 0) groups_left = groups;
  __syncthreads();
  LookupRound lookups(pairs, thread);
  uint32_t rounds = 0;

  if (shuffle(thread / 32, 0) < 4 * groups) {
    // 256 columns take more registers than there are for each of 384 threads.
    if constexpr (kWhere == Lookups::kOtherWarps) take_registers<232>();
    const int row = thread % kGroupThreads / 32 * 16 + thread % 32 / 4, k = 2 * (thread % 4);
    uint32_t a[kSteps][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[step][i] = a_pair(row + i % 2 * 8, 16 * step + k + i / 2 * 8);
    }
    float d[kChains][kTokens / 2] = {};
    const SharedOperand b = shared_operand(tile);
    settle(a);
    const long long begin = clock64();
#pragma unroll 1
    for (int turn = 0; turn < turns; ++turn) {
      multiply_fence();
#pragma unroll
      for (int i = 0; i < kRepeats<kWhere> * kSteps; ++i) {
        const int step = i % kSteps;
#pragma unroll
        for (int chain = 0; chain < kChains; ++chain) {
          multiply_bf16<kTokens>(d[chain], a[step], b.behind(32 * step));
        }
      }
      multiply_commit();
      if (kWhere == Lookups::kSameWarps) lookups.run();
      multiply_wait<1>();
    }
    multiply_wait<0>();
    const long long end = clock64();
#pragma unroll
    for (int chain = 0; chain < kChains; ++chain) settle(d[chain]);
    if (thread % 32 == 0) out.spans[index / 32] = {begin, end};
    rounds = kWhere == Lookups::kSameWarps ? static_cast<uint32_t>(turns) : 0;
    if (thread % kGroupThreads == 0) atomicSub(const_cast<int*>(&groups_left), 1);
    if (blockIdx.x == 0 && thread < kGroupThreads) {
#pragma unroll
      for (int chain = 0; chain < kChains; ++chain) {
#pragma unroll
        for (int i = 0; i < kTokens / 2; ++i) {
          out.products[(chain * (kTokens / 2) + i) * kGroupThreads + thread] = d[chain][i];
        }
      }
    }
  } else if constexpr (kWhere == Lookups::kOtherWarps) {
    give_registers<40>();
    const long long begin = clock64();
#pragma unroll 1
    while (groups_left > 0) {
      lookups.run();
      ++rounds;
    }
    const long long end = clock64();
    if (thread % 32 == 0) out.spans[index / 32] = {begin, end};
  }
  out.lookups[index] = rounds;
  out.sums[index] = lookups.sum;
#else
  __trap();
#endif
}

uint32_t expected_sum(int thread, uint32_t rounds) {
  uint32_t sum = 0;
  for (int i = 0; i < kLookups / 4; ++i) {
    uint32_t word = scramble(thread * (kLookups / 4) + i);
    for (uint32_t round = 0; round < rounds; ++round, word += DecodeTable::kStep) {
      for (int byte = 0; byte < 4; ++byte) {
        const uint32_t entry = word >> 8 * byte & 0xFF;
        sum += scramble((entry * kPairRow + 4 * (thread % 32)) / 4);
      }
    }
  }
  return sum;
}

// Names the first element of D that is not `times` A B; empty if all are right.
std::string wrong_product(const std::vector<float>& products, int tokens, int times) {
  for (size_t i = 0; i < products.size(); ++i) {
    const int thread = static_cast<int>(i % kGroupThreads);
    const int j = static_cast<int>(i / kGroupThreads) % (tokens / 2);
    const int row = thread / 32 * 16 + thread % 32 / 4 + j / 2 % 2 * 8;
    const int column = j / 4 * 8 + 2 * (thread % 4) + j % 2;
    uint32_t sum = 0;
    for (int k = 0; k < 64; ++k) sum += a_element(row, k) * b_element(k, column);
    const float expected = static_cast<float>(sum * times);
    if (products[i] == expected) continue;
    return "wrong product: chain " + std::to_string(i / kGroupThreads / (tokens / 2)) + ", row " +
           std::to_string(row) + ", column " + std::to_string(column) + " is " +
           json(static_cast<double>(products[i])) + ", not " + json(static_cast<double>(expected));
  }
  return "";
}

template <int kTokens, int kChains, Lookups kWhere>
Result time_wgmma(int groups) {
  const int ctas = processors();
  const int threads =
      groups * kGroupThreads + (kWhere == Lookups::kOtherWarps ? kLookupThreads : 0);
  const size_t warps = static_cast<size_t>(ctas) * threads / 32;
  const DeviceArray<Span> spans(warps);
  const DeviceArray<uint32_t> lookups(32 * warps), sums(32 * warps);
  const DeviceArray<float> products(static_cast<size_t>(kChains) * kTokens / 2 * kGroupThreads);
  const auto kernel = wgmma_loop<kTokens, kChains, kWhere>;
  // Room for the table and B, and more than half of what an SM has, so that it runs a single CTA.
  const int shared =
      std::max(kPairBytes + kTokens * 128,
               device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2 + 1024);
  allow_shared_memory(kernel, shared);
  const WgmmaOutputs out = {spans.data(), lookups.data(), sums.data(), products.data()};

  Result result;
  std::vector<double> lookup_rates;
  const int groups_warps = 4 * groups, cta_warps = threads / 32;
  for (int sample = -1; sample < kSamples; ++sample) {  // the first warms up
    kernel<<<ctas, threads, shared>>>(groups, kTurns, out);
    finish_launch("wgmma_loop");
    if (sample < 0) continue;
    const auto all = spans.to_host();
    std::vector<Span> of_groups;
    for (size_t warp = 0; warp < all.size(); ++warp) {
      if (static_cast<int>(warp % cta_warps) < groups_warps) of_groups.push_back(all[warp]);
    }
    const double cycles = static_cast<double>(slowest(of_groups, ctas, groups_warps));
    constexpr double kProducts = 1.0 * kTurns * kRepeats<kWhere> * kSteps * kChains;
    result.samples.push_back(cycles / (kProducts * groups));
    if (kWhere == Lookups::kNone) continue;
    const auto rounds = lookups.to_host();
    double warp_lookups = 0.0;  // of the warps of CTA 0
    for (int warp = 0; warp < cta_warps; ++warp) warp_lookups += kLookups * rounds[32 * warp];
    const std::vector<Span> first(all.begin(), all.begin() + cta_warps);
    const bool same = kWhere == Lookups::kSameWarps;
    const std::vector<Span> others(first.begin() + (same ? 0 : groups_warps), first.end());
    const double span = slowest(others, 1, static_cast<int>(others.size()));
    lookup_rates.push_back(warp_lookups / span);
  }
  const double wgmma_cycles = median(result.samples);
  result.derived = {{"multiply_adds_per_cycle", json(64.0 * kTokens * 16 / wgmma_cycles)}};
  if (kWhere != Lookups::kNone) {
    result.derived.emplace_back("lookups_per_cycle", json(median(lookup_rates)));
  }
  result.problem = wrong_product(products.to_host(), kTokens, kTurns * kRepeats<kWhere>);
  const auto rounds = lookups.to_host(), found = sums.to_host();
  for (int thread = 0; thread < threads && result.problem.empty(); ++thread) {
    if (found[thread] == expected_sum(thread, rounds[thread])) continue;
    result.problem = "wrong look-ups: those of thread " + std::to_string(thread);
  }
  return result;
}

template <int kTokens, int kChains, Lookups kWhere>
void add_wgmma(std::vector<Experiment>& all) {
  const char* where = kWhere == Lookups::kNone        ? "none"
                      : kWhere == Lookups::kSameWarps ? "same"
                                                      : "other";
  for (int groups = 1; groups <= kMostGroups; ++groups) {
    Experiment experiment;
    experiment.name = "wgmma_n" + std::to_string(kTokens);
    if (kChains > 1) experiment.name += "_" + std::to_string(kChains) + "chains";
    if (kWhere != Lookups::kNone) experiment.name += std::string("+lookups_") + where + "_warps";
    experiment.name += "_" + std::to_string(groups) + "g";
    experiment.parameters = {{"n", json(kTokens)},
                             {"chains", json(kChains)},
                             {"warpgroups", json(groups)},
                             {"lookup_warps", json(where)},
                             {"turns", json(kTurns)}};
    experiment.unit = "cycles per wgmma and SM";
    experiment.ideal = 64.0 * kTokens * 16 / 2048;
    experiment.note = "m64nNk16 bf16, A in registers; ideal: 2048 multiply-adds a cycle";
    if (kWhere == Lookups::kSameWarps) {
      experiment.note += "; 16 PRMT + LDS.32 a thread for every 4 wgmma of its warpgroup";
    }
    if (kWhere == Lookups::kOtherWarps) {
      experiment.note += "; 4 other warps do nothing but PRMT + LDS.32";
    }
    experiment.least_capability = experiment.most_capability = 90;
    experiment.run = [=] { return time_wgmma<kTokens, kChains, kWhere>(groups); };
    all.push_back(experiment);
  }
}

template <int kTokens>
void add_wgmma_of(std::vector<Experiment>& all) {
  add_wgmma<kTokens, 1, Lookups::kNone>(all);
  if constexpr (kTokens <= 64) add_wgmma<kTokens, 2, Lookups::kNone>(all);
  add_wgmma<kTokens, 1, Lookups::kSameWarps>(all);
  add_wgmma<kTokens, 1, Lookups::kOtherWarps>(all);
}

std::vector<Experiment> experiments() {
  std::vector<Experiment> all;
  add_loop<Mma<8>>(all, "mma_m16n8k16", 255, 1,
                   "a slot is one mma.sync of bf16; ideal: 2048 multiply-adds a cycle, which "
                   "mma.sync is known not to reach on Hopper");
  add_wgmma_of<16>(all);
  add_wgmma_of<32>(all);
  add_wgmma_of<64>(all);
  add_wgmma_of<128>(all);
  add_wgmma_of<256>(all);
  return all;
}

}  // namespace
}  // namespace primitives

int main(int count, char** arguments) {
  return primitives::run_program(primitives::experiments(), count, arguments);
}
