// Runs the CUDA kernels on the CPU: arguments from standard input, y and h to standard output.
#include "cuda/lora_linear.cuh"

#include "stdin_weight.h"

namespace {

pylora::DType dtype_of(int64_t code) { return static_cast<pylora::DType>(code); }

// What follows in the input where `code` is not negative.
pylora::Vector read_vector(int64_t code, int64_t count) {
  if (code < 0) return {};
  const int64_t bytes = count * pylora::dtype_size(dtype_of(code));
  return {read_array<uint8_t>(bytes), dtype_of(code)};
}

}  // namespace

int main() {
  struct Header {
    int64_t tokens, rows, cols, dtype, blocksize, nested_blocksize, nested, bias_dtype, rank,
        lora_dtype, biases, activation, dropout, processors, shared_per_sm, adapters;
  };
  const Header& in = *read_array<Header>(1);
  const double scaling = *read_array<double>(1);
  const double dropout_p = *read_array<double>(1);

  pylora::LoraLinearSmall op;
  op.dtype = dtype_of(in.dtype);
  op.tokens = static_cast<int>(in.tokens);
  op.x = read_vector(in.dtype, in.tokens * in.cols).data;
  op.weight = read_weight(in, &op.offset);
  op.bias = read_vector(in.bias_dtype, in.rows);

  pylora::LoraHidden& hidden = op.hidden;
  hidden.rank = static_cast<int>(in.rank);
  if (in.rank > 0) {
    hidden.dtype = dtype_of(in.lora_dtype);
    const int64_t stacked = in.adapters > 0 ? in.adapters : 1;
    hidden.lora_A = read_vector(in.lora_dtype, stacked * in.rank * in.cols).data;
    op.lora_B = read_vector(in.lora_dtype, stacked * in.rows * in.rank).data;
    if (in.adapters > 0) {
      hidden.adapters.count = static_cast<int>(in.adapters);
      hidden.adapters.ids = read_array<int64_t>(in.tokens);
      hidden.adapters.scalings = read_array<float>(in.adapters);
    } else if (in.biases != 0) {
      hidden.lora_A_bias = read_vector(in.lora_dtype, in.rank).data;
      op.lora_B_bias = read_vector(in.lora_dtype, in.rows);
    }
    hidden.scaling = static_cast<float>(scaling);
    hidden.activation = static_cast<pylora::Activation>(in.activation);
    if (in.dropout != 0) {
      hidden.seed = read_array<int64_t>(1);
      hidden.threshold = static_cast<uint32_t>(dropout_p * 4294967296.0 + 0.5);
      hidden.keep_scale = static_cast<float>(1.0 / (1.0 - dropout_p));
    }
  }

  const pylora::DeviceLimits limits = limits_of(in);
  const pylora::SmallPlan plan = pylora::plan_small(in.tokens, in.rows, in.cols, limits);
  if (plan.shared_bytes > limits.shared_per_cta) return 2;
  op.partials = static_cast<float*>(make_output(4 * plan.partial_floats(in.tokens, in.rows)));
  op.counters = static_cast<unsigned*>(make_output(4 * plan.counters()));
  const int64_t y_bytes = in.tokens * in.rows * pylora::dtype_size(op.dtype);
  const int64_t h_bytes = 4 * in.tokens * in.rank;
  op.y = make_output(y_bytes);
  hidden.h = static_cast<float*>(make_output(h_bytes));
  hidden.low = static_cast<float*>(make_output(h_bytes));
  if (pylora::lora_linear_small_cuda(op, plan, true, nullptr) != cudaSuccess) return 1;
  cudaDeviceSynchronize();
  std::fprintf(stderr, "slices %d, output warps %d, grid %d\n", plan.slices, plan.output_warps,
               plan.grid);
  write_output(op.y, y_bytes);
  write_output(hidden.h, h_bytes);
}
