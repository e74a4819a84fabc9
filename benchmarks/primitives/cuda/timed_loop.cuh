// Times a loop of instructions on all SMs at once, with one CTA on each SM.
//
// A Body has the instructions. A round calls `slot(i)` for each i in [0, kSlots), and a turn of the
// loop has kRounds rounds. A slot is one instruction to measure, or in a mix one of each of two.
// The instructions are volatile assembly with operands that the compiler cannot know.
// tests/test_primitives_code.py counts them in the machine code between the two readings of the
// clock.
//
// The cycles of a CTA go from the start of its first warp to the end of its last warp, by the clock
// of its SM. A sample has the cycles of the slowest CTA.
#pragma once

#include <iterator>

#include "cuda/common/ptx.cuh"
#include "experiment.cuh"

namespace primitives {

inline constexpr int kMaxThreads = 512;
inline constexpr int kSlots = 8;
inline constexpr int kRounds = 8;  // so many that the loop's own instructions hardly count
inline constexpr int kSamples = 7;

// Turns a number into a random one, the same on the host and on the device.
__host__ __device__ constexpr uint32_t scramble(uint32_t x) {
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = (x ^ x >> 15) * 0x846CA68Bu;
  return x ^ x >> 16;
}

inline constexpr int kGlobalWords = 1 << 20;
// After so many words the data repeat: CTAs read different addresses, but equal data.
inline constexpr int kGlobalPeriod = 1 << 14;
__host__ __device__ constexpr uint32_t global_word(int i) { return scramble(i % kGlobalPeriod); }

struct Input {
  const uint8_t* global;      // kGlobalWords words; word i is global_word(i)
  const uint32_t* constants;  // numbers that the compiler must not know
};

struct Span {
  long long begin, end;
};

template <class Body>
__global__ void __launch_bounds__(kMaxThreads)
    timed(Input input, int turns, Span* spans, uint32_t* results) {
  extern __shared__ __align__(1024) uint8_t loop_memory[];
  const int thread = static_cast<int>(threadIdx.x);
  Body::prepare(loop_memory, thread, static_cast<int>(blockDim.x));
  __syncthreads();
  Body body(loop_memory, input, thread);
  __syncthreads();
  const long long begin = clock64();
#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
#pragma unroll
      for (int i = 0; i < kSlots; ++i) body.slot(i);
      body.end_round();
    }
  }
  body.end_loop();
  const long long end = clock64();
  const int index = static_cast<int>(blockIdx.x * blockDim.x) + thread;
  if (thread % 32 == 0) spans[index / 32] = {begin, end};
  results[index] = body.result();
}

// The parts of a body in which most bodies do nothing.
struct PlainBody {
  static constexpr int kSharedBytes = 0;
  static __device__ void prepare(uint8_t*, int, int) {}
  __device__ void end_round() {}
  __device__ void end_loop() {}
};

// Both bodies in one loop, a slot of A and a slot of B in turn.
template <class A, class B>
struct Mix {
  static constexpr int kSharedBytes = A::kSharedBytes + B::kSharedBytes;
  static __device__ void prepare(uint8_t* shared, int thread, int threads) {
    A::prepare(shared, thread, threads);
    B::prepare(shared + A::kSharedBytes, thread, threads);
  }
  __device__ Mix(uint8_t* shared, const Input& input, int thread)
      : a(shared, input, thread), b(shared + A::kSharedBytes, input, thread) {}
  __device__ __forceinline__ void slot(int i) {
    a.slot(i);
    b.slot(i);
  }
  __device__ __forceinline__ void end_round() {
    a.end_round();
    b.end_round();
  }
  __device__ __forceinline__ void end_loop() {
    a.end_loop();
    b.end_loop();
  }
  __device__ uint32_t result() { return a.result() + b.result(); }
  static uint32_t expected(int thread, uint32_t rounds) {
    return A::expected(thread, rounds) + B::expected(thread, rounds);
  }

  A a;
  B b;
};

inline constexpr uint32_t kConstants[] = {0x9E3779B9u, 0x3C003C00u, 0x3F803F80u, 0x3F800000u, 0};
inline constexpr int kZero = 4;  // the index of the zero

// The cycles of the slowest CTA, from the spans of its warps.
inline long long slowest(const std::vector<Span>& spans, int ctas, int warps) {
  long long longest = 0;
  for (int cta = 0; cta < ctas; ++cta) {
    const auto first = spans.begin() + cta * warps;
    long long begin = first->begin, end = first->end;
    for (auto span = first; span != first + warps; ++span) {
      begin = std::min(begin, span->begin);
      end = std::max(end, span->end);
    }
    longest = std::max(longest, end - begin);
  }
  return longest;
}

// Names the first thread whose result is not what the host computes; empty if all are right.
template <class Body>
std::string wrong_result(const std::vector<uint32_t>& results, int threads, uint32_t rounds) {
  for (size_t i = 0; i < results.size(); ++i) {
    const int thread = static_cast<int>(i % threads);
    const uint32_t expected = Body::expected(thread, rounds);
    if (results[i] == expected) continue;
    return "wrong result: thread " + std::to_string(thread) + " of CTA " +
           std::to_string(i / threads) + " has " + std::to_string(results[i]) + ", not " +
           std::to_string(expected);
  }
  return "";
}

// Measures the cycles that an SM needs for one slot of one warp.
template <class Body>
Result time_loop(int warps, int turns) {
  const int ctas = processors(), threads = 32 * warps;
  std::vector<uint32_t> words(kGlobalWords);
  for (int i = 0; i < kGlobalWords; ++i) words[i] = global_word(i);
  const DeviceArray<uint32_t> global(words);
  const DeviceArray<uint32_t> constants(
      std::vector<uint32_t>(std::begin(kConstants), std::end(kConstants)));
  const DeviceArray<Span> spans(static_cast<size_t>(ctas) * warps);
  const DeviceArray<uint32_t> results(static_cast<size_t>(ctas) * threads);
  // More than half of an SM's shared memory, so that no second CTA comes to the same SM.
  const int shared = std::max(
      Body::kSharedBytes, device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2 + 1024);
  allow_shared_memory(timed<Body>, shared);
  const Input input = {reinterpret_cast<const uint8_t*>(global.data()), constants.data()};

  Result result;
  for (int sample = -1; sample < kSamples; ++sample) {  // the first warms up
    timed<Body><<<ctas, threads, shared>>>(input, turns, spans.data(), results.data());
    finish_launch("timed loop");
    if (sample < 0) continue;
    const double slots = static_cast<double>(turns) * kRounds * kSlots * warps;
    result.samples.push_back(slowest(spans.to_host(), ctas, warps) / slots);
  }
  // All CTAs do the same; the first and the last are compared with the host.
  const auto found = results.to_host();
  const uint32_t rounds = static_cast<uint32_t>(turns) * kRounds;
  const std::vector<uint32_t> first(found.begin(), found.begin() + threads);
  const std::vector<uint32_t> last(found.end() - threads, found.end());
  result.problem = wrong_result<Body>(first, threads, rounds);
  if (result.problem.empty() && last != first) result.problem = "wrong result: CTAs differ";
  result.derived = {{"slots_per_cycle", json(1.0 / median(result.samples))}};
  return result;
}

template <class Body>
Experiment loop_experiment(const std::string& name, int warps, int turns, double ideal,
                           const std::string& note) {
  Experiment experiment;
  experiment.name = name + "_" + std::to_string(warps) + "w";
  experiment.parameters = {
      {"warps", json(warps)}, {"turns", json(turns)}, {"slots", json(kRounds * kSlots)}};
  experiment.unit = "cycles per slot and SM";
  experiment.ideal = ideal;
  experiment.note = note;
  experiment.run = [=] { return time_loop<Body>(warps, turns); };
  return experiment;
}

// Adds the experiment with 4, with 8 and with 16 warps.
template <class Body>
void add_loop(std::vector<Experiment>& experiments, const std::string& name, int turns,
              double ideal, const std::string& note) {
  for (const int warps : {4, 8, 16}) {
    experiments.push_back(loop_experiment<Body>(name, warps, turns, ideal, note));
  }
}

}  // namespace primitives
