// Runs the CUDA kernels for few tokens on the CPU. It reads the arguments from standard input and
// writes y and h to standard output.
#include "cuda/small_m/lora_linear.cuh"

#include "linear_input.h"

int main() {
  pylora::cuda::LoraLinearSmallMArgs op;
  const LinearHeader in = read_linear(op);
  const pylora::cuda::DeviceLimits limits = limits_of(in);
  pylora::cuda::SmallMPlan plan = pylora::cuda::plan_small_m(in.tokens, in.rows, in.cols, limits);
  if (in.plan[0] != 0) {
    const pylora::cuda::SmallMChoice choice = {in.plan[0], in.plan[1], in.plan[2]};
    const char* wrong = choose_small_m(choice, in.tokens, in.rows, in.cols, limits, &plan);
    if (wrong != nullptr) return std::fprintf(stderr, "%s\n", wrong), kRefused;
  }
  if (plan.shared_bytes > limits.shared_per_cta) return 2;
  op.partials = static_cast<float*>(make_output(4 * plan.partial_floats(in.tokens, in.rows)));
  op.counters = static_cast<unsigned*>(make_output(4 * plan.counters()));
  const LinearOutput out = make_outputs(op, op.shrink.rank);
  if (pylora::cuda::lora_linear_small_m_cuda(op, plan, true, nullptr) != cudaSuccess) return 1;
  cudaDeviceSynchronize();
  std::fprintf(stderr, "splits %d, output warps %d, grid %d\n", plan.splits, plan.output_warps,
               plan.grid);
  write_outputs(op, out);
}
