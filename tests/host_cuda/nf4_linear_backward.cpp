// Runs the CUDA kernel on the CPU. It reads the arguments from standard input and writes dx to
// standard output.
#include "cuda/small_m/nf4_linear_backward.cuh"

#include "stdin_weight.h"

int main() {
  struct Header {
    int64_t tokens, rows, cols, dtype, blocksize, nested_blocksize, nested, misalign, processors,
        shared_per_sm;
  };
  const Header& in = *read_array<Header>(1);
  pylora::cuda::NF4LinearBackwardSmallMArgs op;
  op.dtype = static_cast<pylora::DType>(in.dtype);
  op.tokens = static_cast<int>(in.tokens);
  op.grad = read_array<uint16_t>(in.tokens * in.rows, in.misalign);
  op.weight = read_weight(in, &op.offset);

  const pylora::cuda::DeviceLimits limits = limits_of(in);
  const auto plan = pylora::cuda::plan_small_m_backward(in.tokens, in.rows, in.cols, limits);
  if (plan.shared_bytes > limits.shared_per_cta) return 2;
  op.partials = static_cast<float*>(make_output(4 * plan.partial_floats(in.tokens, in.cols)));
  op.counters = static_cast<unsigned*>(make_output(4 * plan.counters()));
  const int64_t bytes = in.tokens * in.cols * pylora::dtype_size(op.dtype);
  op.dx = make_output(bytes);
  if (pylora::cuda::nf4_linear_backward_small_m_cuda(op, plan, nullptr) != cudaSuccess) return 1;
  cudaDeviceSynchronize();
  std::fprintf(stderr, "splits %d, grid %d\n", plan.splits, plan.grid);
  write_output(op.dx, bytes);
}
