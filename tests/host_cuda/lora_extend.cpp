// Runs lora_extend on the CPU. It reads the arguments from standard input and writes [x | low | 0]
// and h to standard output.
#include "cuda/many_rows/lora_shrink.cuh"
#include "linear_input.h"

struct Header {
  int64_t tokens, cols, rank, dtype, has_bias, activation, has_dropout;
  double scaling, dropout_p;
};

int main() {
  const Header in = *read_array<Header>(1);
  const int64_t size = pylora::dtype_size(dtype_of(in.dtype));
  const void* x = read_vector(in.dtype, in.tokens * in.cols).data;
  pylora::cuda::LoraShrinkArgs op;
  op.dtype = dtype_of(in.dtype);
  op.rank = static_cast<int>(in.rank);
  op.lora_A = read_vector(in.dtype, in.rank * in.cols).data;
  if (in.has_bias != 0) op.lora_A_bias = read_vector(in.dtype, in.rank).data;
  op.scaling = static_cast<float>(in.scaling);
  op.activation = static_cast<pylora::Activation>(in.activation);
  if (in.has_dropout != 0) read_dropout(op, in.dropout_p);
  const int64_t wide_bytes = in.tokens * pylora::cuda::wide_cols(in.cols, in.rank) * size;
  void* wide = make_output(wide_bytes);
  op.h = static_cast<float*>(make_output(4 * in.tokens * in.rank));
  const int tokens = static_cast<int>(in.tokens);
  if (pylora::cuda::lora_extend_cuda(op, x, tokens, in.cols, wide, nullptr) != cudaSuccess)
    return 1;
  cudaDeviceSynchronize();
  write_output(wide, wide_bytes);
  write_output(op.h, 4 * in.tokens * in.rank);
}
