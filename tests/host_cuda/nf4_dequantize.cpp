// Runs the CUDA kernel on the CPU. It reads the arguments from standard input and writes the
// weight, with the memory between its rows, to standard output.
#include "cuda/nf4/nf4_dequantize.cuh"

#include "stdin_arrays.h"

struct Header {
  int64_t rows, cols, stride, blocksize, nested_blocksize, nested, dtype, misalign;
};

int main() {
  const Header in = *read_array<Header>(1);
  const auto dtype = static_cast<pylora::DType>(in.dtype);
  pylora::NF4Matrix weight;
  weight.rows = in.rows;
  weight.cols = in.cols;
  weight.blocksize = in.blocksize;
  weight.nested_blocksize = in.nested_blocksize;
  const float* offset = nullptr;
  weight.qweight = read_array<uint8_t>(pylora::ceil_div(weight.numel(), 2), in.misalign);
  const int64_t blocks = weight.num_blocks();
  if (in.nested != 0) {
    weight.absmax_q = read_array<uint8_t>(blocks);
    weight.nested_absmax = read_array<float>(pylora::ceil_div(blocks, weight.nested_blocksize));
    weight.nested_code = read_array<float>(256);
    offset = read_array<float>(1);
  } else {
    weight.absmax = read_array<float>(blocks);
  }
  const int64_t bytes = ((in.rows - 1) * in.stride + in.cols) * pylora::dtype_size(dtype);
  void* out = make_output(bytes);
  if (pylora::cuda::nf4_dequantize_cuda(weight, offset, dtype, in.stride, out, nullptr) !=
      cudaSuccess) {
    return 1;
  }
  cudaDeviceSynchronize();
  write_output(out, bytes);
}
