// Reads the call of a linear op from standard input, and allocates memory for its results.
#pragma once

#include "cuda/common/lora_args.cuh"
#include "stdin_weight.h"

inline pylora::DType dtype_of(int64_t code) { return static_cast<pylora::DType>(code); }

// Reads a vector of the dtype `code` if `code` is not negative; else there is none in the input.
inline pylora::cuda::TypedVector read_vector(int64_t code, int64_t count) {
  if (code < 0) return {};
  const int64_t bytes = count * pylora::dtype_size(dtype_of(code));
  return {read_array<uint8_t>(bytes), dtype_of(code)};
}

// Reads the seed, and sets what follows from the probability `p`.
inline void read_dropout(pylora::cuda::LoraShrinkArgs& shrink, double p) {
  shrink.seed = read_array<int64_t>(1);
  shrink.threshold = static_cast<uint32_t>(p * 4294967296.0 + 0.5);
  shrink.keep_scale = static_cast<float>(1.0 / (1.0 - p));
}

struct LinearHeader {
  int64_t tokens, rows, cols, dtype, blocksize, nested_blocksize, nested, bias_dtype, rank,
      lora_dtype, biases, activation, dropout, processors, shared_per_sm, adapters;
  int64_t plan[3];  // the caller's choice, or zeros for the plan of the rule
};

// The exit code of a program if the kernel cannot run the plan that was chosen.
inline constexpr int kRefused = 3;

// Reads the header and all arrays of the call.
inline LinearHeader read_linear(pylora::cuda::LoraLinearArgs& op) {
  const LinearHeader in = *read_array<LinearHeader>(1);
  const double scaling = *read_array<double>(1);
  const double dropout_p = *read_array<double>(1);

  op.dtype = dtype_of(in.dtype);
  op.tokens = static_cast<int>(in.tokens);
  op.x = read_vector(in.dtype, in.tokens * in.cols).data;
  op.weight = read_weight(in, &op.offset);
  op.bias = read_vector(in.bias_dtype, in.rows);

  pylora::cuda::LoraShrinkArgs& shrink = op.shrink;
  shrink.rank = static_cast<int>(in.rank);
  if (in.rank > 0) {
    shrink.dtype = dtype_of(in.lora_dtype);
    const int64_t stacked = in.adapters > 0 ? in.adapters : 1;
    shrink.lora_A = read_vector(in.lora_dtype, stacked * in.rank * in.cols).data;
    op.lora_B = read_vector(in.lora_dtype, stacked * in.rows * in.rank).data;
    if (in.adapters > 0) {
      shrink.adapters.count = static_cast<int>(in.adapters);
      shrink.adapters.ids = read_array<int64_t>(in.tokens);
      shrink.adapters.scalings = read_array<float>(in.adapters);
    } else if (in.biases != 0) {
      shrink.lora_A_bias = read_vector(in.lora_dtype, in.rank).data;
      op.lora_B_bias = read_vector(in.lora_dtype, in.rows);
    }
    shrink.scaling = static_cast<float>(scaling);
    shrink.activation = static_cast<pylora::Activation>(in.activation);
    if (in.dropout != 0) read_dropout(shrink, dropout_p);
  }
  return in;
}

struct LinearOutput {
  int64_t y_bytes, h_bytes;
};

// `low_pitch` is the number of floats from one row of low to the next.
inline LinearOutput make_outputs(pylora::cuda::LoraLinearArgs& op, int64_t low_pitch) {
  const LinearOutput out = {op.tokens * op.weight.rows * pylora::dtype_size(op.dtype),
                            int64_t{4} * op.tokens * op.shrink.rank};
  op.y = make_output(out.y_bytes);
  op.shrink.h = static_cast<float*>(make_output(out.h_bytes));
  op.shrink.low = static_cast<float*>(make_output(4 * op.tokens * low_pitch));
  return out;
}

inline void write_outputs(const pylora::cuda::LoraLinearArgs& op, const LinearOutput& out) {
  write_output(op.y, out.y_bytes);
  write_output(op.shrink.h, out.h_bytes);
}
