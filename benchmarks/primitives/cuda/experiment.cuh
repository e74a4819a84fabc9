// What the programs of this folder have in common, and how they talk to
// benchmarks/primitives/runner.py.
//
//   PROGRAM --facts         one JSON line about the device
//   PROGRAM --list          one JSON line for each experiment; touches no device
//   PROGRAM NAME...         runs these experiments in this order
//
// A program prints {"begin": NAME} before an experiment, and after it the result or {"name": NAME,
// "error": ...}. It flushes each line, so that the runner sees how far a program came that hangs or
// dies. At the first error the program ends with code 3, because a CUDA error can spoil what
// follows in the same process. The runner then starts it again for the experiments that are left.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

// The wrappers of csrc/cuda/ are in pylora or in pylora::cuda.
namespace pylora::cuda {}

namespace primitives {

using namespace pylora;
using namespace pylora::cuda;

// Pairs of a name and a value that is written as JSON.
using Fields = std::vector<std::pair<std::string, std::string>>;

inline std::string json(const std::string& text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') quoted += '\\';
    quoted += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return quoted + '"';
}
inline std::string json(const char* text) { return json(std::string(text)); }
inline std::string json(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.9g", value);
  return text;
}
inline std::string json(int64_t value) { return std::to_string(value); }
inline std::string json(int value) { return std::to_string(value); }
inline std::string json(const std::vector<double>& values) {
  std::string list = "[";
  for (const double value : values) list += (list.size() > 1 ? ", " : "") + json(value);
  return list + "]";
}
inline std::string json(const Fields& fields) {
  std::string object = "{";
  for (const auto& [name, value] : fields) {
    object += (object.size() > 1 ? ", " : "") + json(name) + ": " + value;
  }
  return object + "}";
}

// Throws with the name of the call and CUDA's name of the error.
inline void checked(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorName(error) + " (" +
                           cudaGetErrorString(error) + ")");
}
#define CHECKED(call) ::primitives::checked(call, #call)

// Called after a launch. Throws if the launch or the kernel failed.
inline void finish_launch(const char* kernel) {
  checked(cudaGetLastError(), kernel);
  checked(cudaDeviceSynchronize(), kernel);
}

struct Result {
  std::vector<double> samples;
  Fields derived;       // rates that follow from the median
  double ideal = 0.0;   // if only the device can tell it; 0: the ideal of the experiment
  std::string problem;  // what is wrong with the result, if it is wrong; the samples are kept
};

struct Experiment {
  std::string name;
  Fields parameters;
  std::string unit;    // the unit of the samples
  double ideal = 0.0;  // the best possible sample; 0: not known
  std::string note;
  int least_capability = 80, most_capability = 999;  // 90 stands for 9.0
  std::function<Result()> run;
};

inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t half = values.size() / 2;
  return values.size() % 2 ? values[half] : (values[half - 1] + values[half]) / 2;
}

// Memory on the device that is freed with this object.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) {
    CHECKED(cudaMalloc(&data_, count * sizeof(T)));
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    CHECKED(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  // If cudaFree fails, an earlier call failed, and that was reported.
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() const { return data_; }
  size_t size() const { return count_; }
  std::vector<T> to_host() const {
    std::vector<T> values(count_);
    CHECKED(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  T* data_ = nullptr;
  size_t count_;
};

inline int device_attribute(cudaDeviceAttr attribute) {
  int value = 0;
  CHECKED(cudaDeviceGetAttribute(&value, attribute, 0));
  return value;
}
inline int processors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
inline int capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
         device_attribute(cudaDevAttrComputeCapabilityMinor);
}

// Lets a kernel have more dynamic shared memory than the 48 KiB that it may have without asking.
template <class Kernel>
void allow_shared_memory(Kernel* kernel, int bytes) {
  CHECKED(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

// Measures the milliseconds between two events around `launch`.
inline double milliseconds(const char* kernel, const std::function<void()>& launch) {
  cudaEvent_t begin, end;
  CHECKED(cudaEventCreate(&begin));
  CHECKED(cudaEventCreate(&end));
  CHECKED(cudaEventRecord(begin));
  launch();
  checked(cudaGetLastError(), kernel);
  CHECKED(cudaEventRecord(end));
  checked(cudaEventSynchronize(end), kernel);
  float elapsed = 0.0f;
  CHECKED(cudaEventElapsedTime(&elapsed, begin, end));
  CHECKED(cudaEventDestroy(begin));
  CHECKED(cudaEventDestroy(end));
  return elapsed;
}

__device__ __forceinline__ uint64_t global_nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}

// Runs for about 5 ms, and notes its cycles, its nanoseconds and the smallest step of %globaltimer.
__global__ void measure_clock(uint64_t* facts) {
  const uint64_t begin = global_nanoseconds();
  const long long first = clock64();
  uint64_t last = begin, step = UINT64_MAX;
  while (last - begin < 5000000) {
    const uint64_t now = global_nanoseconds();
    if (now != last) step = min(step, now - last);
    last = now;
  }
  facts[0] = static_cast<uint64_t>(clock64() - first);
  facts[1] = last - begin;
  facts[2] = step;
}

inline Fields device_facts() {
  cudaDeviceProp properties;
  CHECKED(cudaGetDeviceProperties(&properties, 0));
  int driver = 0, runtime = 0;
  CHECKED(cudaDriverGetVersion(&driver));
  CHECKED(cudaRuntimeGetVersion(&runtime));
  DeviceArray<uint64_t> clock(3);
  // The first run raises the clock of the device. The second run is kept.
  for (int turn = 0; turn < 2; ++turn) {
    measure_clock<<<1, 1>>>(clock.data());
    finish_launch("measure_clock");
  }
  const auto measured = clock.to_host();
  return {
      {"name", json(properties.name)},
      {"capability", json(capability())},
      {"processors", json(processors())},
      {"l2_bytes", json(properties.l2CacheSize)},
      {"memory_bytes", json(static_cast<int64_t>(properties.totalGlobalMem))},
      {"shared_bytes_per_processor",
       json(static_cast<int64_t>(properties.sharedMemPerMultiprocessor))},
      {"rated_clock_mhz", json(device_attribute(cudaDevAttrClockRate) / 1e3)},
      {"rated_memory_clock_mhz", json(device_attribute(cudaDevAttrMemoryClockRate) / 1e3)},
      {"measured_clock_mhz", json(1e3 * measured[0] / measured[1])},
      {"global_timer_step_ns", json(static_cast<int64_t>(measured[2]))},
      {"driver_version", json(driver)},
      {"runtime_version", json(runtime)},
  };
}

inline void say(const Fields& fields) {
  std::printf("%s\n", json(fields).c_str());
  std::fflush(stdout);
}

inline Fields described(const Experiment& experiment) {
  return {{"name", json(experiment.name)},
          {"parameters", json(experiment.parameters)},
          {"unit", json(experiment.unit)},
          {"ideal", experiment.ideal > 0 ? json(experiment.ideal) : "null"},
          {"note", json(experiment.note)}};
}

inline void run_one(const Experiment& experiment) {
  Experiment described_by = experiment;
  Fields outcome;
  const int here = capability();
  if (here < experiment.least_capability || here > experiment.most_capability) {
    outcome.emplace_back("skipped", json("not for compute capability " + std::to_string(here / 10) +
                                         "." + std::to_string(here % 10)));
  } else {
    const Result result = experiment.run();
    if (result.ideal > 0) described_by.ideal = result.ideal;
    outcome.emplace_back("samples", json(result.samples));
    outcome.emplace_back("derived", json(result.derived));
    if (!result.problem.empty()) outcome.emplace_back("error", json(result.problem));
  }
  Fields fields = described(described_by);
  fields.insert(fields.end(), outcome.begin(), outcome.end());
  say(fields);
}

inline int run_program(const std::vector<Experiment>& experiments, int count, char** arguments) {
  const std::vector<std::string> names(arguments + 1, arguments + count);
  const bool facts = names.size() == 1 && names[0] == "--facts";
  const bool list = names.size() == 1 && names[0] == "--list";
  if (list) {
    for (const Experiment& experiment : experiments) say(described(experiment));
    return 0;
  }
  std::string current = facts ? "--facts" : "";
  try {
    if (facts) say(device_facts());
    for (const std::string& name : names) {
      if (facts) break;
      current = name;
      say({{"begin", json(name)}});
      const auto found = std::find_if(experiments.begin(), experiments.end(),
                                      [&](const Experiment& e) { return e.name == name; });
      if (found == experiments.end()) throw std::runtime_error("there is no such experiment");
      run_one(*found);
    }
  } catch (const std::exception& error) {
    say({{"name", json(current)}, {"error", json(error.what())}});
    return 3;
  }
  return 0;
}

}  // namespace primitives
