// Runs the Hopper kernel on the CPU. It reads the arguments from standard input and writes y and h
// to standard output.
#include "cuda/hopper/lora_linear.cuh"
#include "linear_input.h"

int main() {
  pylora::cuda::LoraLinearHopperArgs op;
  const LinearHeader in = read_linear(op);
  pylora::cuda::HopperPlan plan =
      pylora::cuda::plan_hopper(in.tokens, in.rows, in.cols, static_cast<int>(in.processors));
  if (in.plan[0] != 0) {
    const pylora::cuda::HopperChoice choice = {in.plan[0], in.plan[1], in.plan[2]};
    const char* wrong = choose_hopper(choice, in.tokens, in.rows, in.cols, &plan);
    if (wrong != nullptr) return std::fprintf(stderr, "%s\n", wrong), kRefused;
  }
  op.partials = static_cast<float*>(make_output(4 * plan.partial_floats()));
  op.counters = static_cast<unsigned*>(make_output(4 * plan.counters()));
  const LinearOutput out = make_outputs(op, pylora::cuda::low_pitch(in.rank));
  if (pylora::cuda::lora_linear_hopper_cuda(op, plan, nullptr) != cudaSuccess) return 1;
  cudaDeviceSynchronize();
  std::fprintf(stderr, "tokens %d, tiles %d, splits %d, grid %d\n", plan.tile_tokens,
               static_cast<int>(plan.tiles), plan.splits, plan.grid);
  write_outputs(op, out);
}
