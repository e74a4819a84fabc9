// Measures the time between two kernels that follow each other, in a stream and in a graph, each
// with and without programmatic dependent launch.
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#include "experiment.cuh"

namespace primitives {
namespace {

constexpr int kKernels = 200;
constexpr int kSamples = 9;
constexpr int kThreads = 128;

struct Times {
  unsigned long long first_begin, last_end;  // %globaltimer, over all CTAs
};

// Keeps the device busy while the host launches all that follows.
__global__ void occupy(int64_t nanoseconds) {
  const uint64_t begin = global_nanoseconds();
  while (static_cast<int64_t>(global_nanoseconds() - begin) < nanoseconds) {
  }
}

// Only notes when it ran. With kDependent it lets the next kernel start at once, and waits until
// the kernel before it has ended.
template <bool kDependent>
__global__ void __launch_bounds__(kThreads) empty(Times* times) {
  if constexpr (kDependent) {
    start_dependent_kernel();
    wait_for_previous_kernel();
  }
  if (threadIdx.x != 0) return;
  const uint64_t begin = global_nanoseconds();
  atomicMin(&times->first_begin, begin);
  atomicMax(&times->last_end, global_nanoseconds());
}

// Does nothing. Many of these are timed between two events.
template <bool kDependent>
__global__ void __launch_bounds__(kThreads) nothing() {
  if constexpr (kDependent) {
    start_dependent_kernel();
    wait_for_previous_kernel();
  }
}

LaunchShape shape_of(int ctas, bool dependent, cudaStream_t stream) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(ctas));
  shape.threads = kThreads;
  shape.stream = stream;
  shape.dependent = dependent;
  return shape;
}

// Runs what `enqueue` puts into a stream, directly or as a graph. A kernel before it keeps the
// device busy until everything is in the queue. Returns the microseconds from the end of that
// kernel to the end of all.
double microseconds(cudaStream_t stream, bool graph,
                    const std::function<void(cudaStream_t)>& enqueue) {
  cudaGraphExec_t executable = nullptr;
  if (graph) {
    cudaGraph_t captured = nullptr;
    CHECKED(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    enqueue(stream);
    CHECKED(cudaStreamEndCapture(stream, &captured));
    CHECKED(cudaGraphInstantiate(&executable, captured, 0));
    CHECKED(cudaGraphDestroy(captured));
    CHECKED(cudaGraphUpload(executable, stream));
  }
  cudaEvent_t begin, end;
  CHECKED(cudaEventCreate(&begin));
  CHECKED(cudaEventCreate(&end));
  constexpr int64_t kBusy = 4000000;
  occupy<<<1, 1, 0, stream>>>(kBusy);
  CHECKED(cudaGetLastError());
  CHECKED(cudaEventRecord(begin, stream));
  if (graph) {
    CHECKED(cudaGraphLaunch(executable, stream));
  } else {
    enqueue(stream);
  }
  CHECKED(cudaEventRecord(end, stream));
  CHECKED(cudaEventSynchronize(end));
  float elapsed = 0.0f;
  CHECKED(cudaEventElapsedTime(&elapsed, begin, end));
  CHECKED(cudaEventDestroy(begin));
  CHECKED(cudaEventDestroy(end));
  if (graph) CHECKED(cudaGraphExecDestroy(executable));
  return 1e3 * elapsed;
}

template <bool kDependent>
Result time_launches(bool graph, int ctas) {
  cudaStream_t stream = nullptr;
  CHECKED(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const LaunchShape shape = shape_of(ctas, kDependent, stream);
  const DeviceArray<Times> times(kKernels);
  const std::vector<Times> unset(kKernels, Times{~0ull, 0});
  Result result;
  std::vector<double> gaps, runs;
  for (int sample = -1; sample < kSamples; ++sample) {  // the first warms up
    const double all = microseconds(stream, graph, [&](cudaStream_t) {
      for (int i = 0; i < kKernels; ++i) CHECKED(launch(nothing<kDependent>, shape));
    });
    CHECKED(
        cudaMemcpy(times.data(), unset.data(), kKernels * sizeof(Times), cudaMemcpyHostToDevice));
    microseconds(stream, graph, [&](cudaStream_t) {
      for (int i = 0; i < kKernels; ++i) {
        CHECKED(launch(empty<kDependent>, shape, times.data() + i));
      }
    });
    if (sample < 0) continue;
    result.samples.push_back(all / kKernels);
    const auto noted = times.to_host();
    for (int i = 1; i < kKernels; ++i) {
      const auto begin = static_cast<double>(noted[i].first_begin);
      gaps.push_back((begin - static_cast<double>(noted[i - 1].last_end)) / 1e3);
      runs.push_back((static_cast<double>(noted[i].last_end) - begin) / 1e3);
    }
    for (const Times& of : noted) {
      if (of.last_end < of.first_begin) result.problem = "a kernel did not run";
    }
  }
  CHECKED(cudaStreamDestroy(stream));
  result.derived = {{"gap_us", json(median(gaps))}, {"first_to_last_cta_us", json(median(runs))}};
  return result;
}

template <bool kDependent>
void add_launches(std::vector<Experiment>& all, bool graph, bool all_processors) {
  Experiment experiment;
  experiment.name = std::string("launch_") + (graph ? "graph" : "stream") +
                    (kDependent ? "_dependent" : "") + (all_processors ? "_all_sms" : "_one_cta");
  experiment.parameters = {{"graph", graph ? "true" : "false"},
                           {"dependent", kDependent ? "true" : "false"},
                           {"one_cta_per_sm", all_processors ? "true" : "false"},
                           {"kernels", json(kKernels)}};
  experiment.unit = "us per kernel";
  experiment.note =
      "empty kernels, time of all by their number; gap_us: by %globaltimer, from the end of one to "
      "the begin of the next";
  if (kDependent) experiment.least_capability = 90;
  experiment.run = [=] {
    return time_launches<kDependent>(graph, all_processors ? processors() : 1);
  };
  all.push_back(experiment);
}

std::vector<Experiment> experiments() {
  std::vector<Experiment> all;
  for (const bool all_processors : {false, true}) {
    for (const bool graph : {false, true}) {
      add_launches<false>(all, graph, all_processors);
      add_launches<true>(all, graph, all_processors);
    }
  }
  return all;
}

}  // namespace
}  // namespace primitives

int main(int count, char** arguments) {
  return primitives::run_program(primitives::experiments(), count, arguments);
}
